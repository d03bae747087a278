# SPDX-License-Identifier: Apache-2.0
"""A whole manager in this process, and real drivers and clients on its sockets, in threads."""

from __future__ import annotations

import errno
import gc
import os
import random
import re
import select
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from ism.device.contract import AreaOf
from ism.driver.device import Device
from ism.driver.region import Region
from ism.driver.vfio_user import VfioUserTransport
from ism.errors import DeviceError, DeviceGoneError, PermissionDeniedError, QuotaError, TransportError
from ism.eventfd import raise_eventfd
from ism.ids import WindowOffset
from ism.manager import orders
from ism.manager.config import parse_config
from ism.manager.control import request
from ism.manager.server import Manager, run_manager
from ism.memory import create_memfd, memfd_seals
from ism.vfio_user.client import Client
from ism.vfio_user.errors import VfioUserError
from ism.vfio_user.fds import Fd
from ism.vfio_user.map_channel import client_capability
from ism.vfio_user.payloads import IrqAction, IrqData, SetIrqs
from ism.virtio.ism_spec import EventType, Permission

T = TypeVar("T")
READ, WRITE = Permission.READ, Permission.WRITE
ATTACH_RW = READ | WRITE | Permission.ATTACH
ATTACH_RO = READ | Permission.ATTACH
SMALL = """
[defaults]
window = "16 MiB"
vectors = 16
[defaults.quota]
bytes = "8 MiB"
regions = 20
"""
TEST_S = 30


@asynccontextmanager
async def manager(tmp_path: Path, text: str = "") -> AsyncIterator[Manager]:
    """Run a manager; at the end nothing is left: no descriptor, no socket, no device of a client."""
    run_dir = tmp_path / "run"
    with Fd(os.eventfd(0)) as fd:
        raise_eventfd(fd.fileno())  # it keeps what it opens for as long as the process lives
    gc.collect()
    before = descriptors()
    with trio.fail_after(TEST_S):
        async with trio.open_nursery() as nursery:
            running = await nursery.start(run_manager, parse_config(SMALL + text, "test.toml", run_dir), run_dir)
            yield running
            await eventually(lambda: running.clients == 0)
            nursery.cancel_scope.cancel()
    assert os.listdir(run_dir) == []
    assert all(not domain.registry.regions for domain in running.domains.values())
    assert all(domain.registry.account.bytes == 0 for domain in running.domains.values())
    gc.collect()
    assert descriptors() == before


def descriptors() -> list[str]:
    """List what every open descriptor of this process refers to, without numbers."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(re.sub(r"[0-9]+", "", os.readlink(f"/proc/self/fd/{number}")))
        except FileNotFoundError:
            pass  # it was the listing's own
    return sorted(links)


async def blocking(call: Callable[[], T]) -> T:
    """Run what blocks in a thread."""
    return await trio.to_thread.run_sync(call)


async def eventually(condition: Callable[[], object]) -> None:
    """Wait until a condition holds; the test's deadline is the limit."""
    while not condition():  # noqa: ASYNC110 - what clients in other threads do sets no event here
        await trio.sleep(0.002)


def connect(running: Manager, name: str = "device", *, channel: bool = True) -> Device:
    path = running.run_dir / f"{name}.sock"
    if channel:
        return Device(VfioUserTransport.connect(path))
    return Device(VfioUserTransport(Client.connect(path), str(path)))


async def devices(running: Manager, count: int) -> list[Device]:
    return [await blocking(lambda: connect(running)) for _ in range(count)]


async def close(*opened: Device) -> None:
    for device in opened:
        await blocking(device.close)


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


async def rings(ringer: Region, *heard: Region) -> None:
    """Ring once; all of `heard` hear it."""
    ringer.ring()
    for region in heard:
        await trio.lowlevel.wait_readable(region.fileno())
        os.eventfd_read(region.fileno())


async def settled(running: Manager, *regions: Region) -> None:
    """Wait until all clients have done as told: changing eventfds rings once more than anybody asked for."""
    connected = running.domains["default"].devices.values()
    await eventually(lambda: all(not device._orders._entries for device in connected))
    for region in regions:
        if readable(region.fileno()):
            os.eventfd_read(region.fileno())


def wired(region: Region) -> int | None:
    return region.device.transport.doorbell_fd(region._held.slot)


# -- regions


async def test_two_devices_share_bytes_both_ways_and_are_told_of_each_other(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        a, b = await devices(running, 2)
        seen: list[tuple[EventType, int, int]] = []
        mine = await blocking(lambda: a.alloc(300_000, grants=[(ATTACH_RW, b.devid)]))
        mine.on_event(lambda event: seen.append((event.kind, event.devid, event.peers)))
        theirs = await blocking(lambda: b.attach(mine.token))
        mine.view[:5] = b"hello"
        theirs.view[200_000:200_005] = b"world"
        assert bytes(theirs.view[:5]) == b"hello"
        assert bytes(mine.view[200_000:200_005]) == b"world"
        await eventually(lambda: (EventType.ATTACH, b.devid, 2) in seen)
        theirs.close()
        await eventually(lambda: (EventType.DETACH, b.devid, 1) in seen)
        await close(a, b)


async def test_devices_of_different_domains_do_not_see_each_others_regions(tmp_path: Path) -> None:
    text = '[[domain]]\nname="red"\n[[domain]]\nname="blue"\n[fresh]\ndomain="red"\n[[device]]\nname="b"\ndomain="blue"'
    async with manager(tmp_path, text) as running:
        (a,) = await devices(running, 1)
        b = await blocking(lambda: connect(running, "b"))
        assert a.gid != b.gid
        region = await blocking(lambda: a.alloc(4096, grants=[(ATTACH_RW, None)]))
        with pytest.raises(DeviceError) as caught:
            await blocking(lambda: b.attach(region.token))
        assert caught.value.ack_name == "ENOENT"
        await close(a, b)


async def test_a_client_that_dies_takes_everything_with_it_but_what_peers_hold(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        a, b = await devices(running, 2)
        mine = await blocking(lambda: a.alloc(65536, grants=[(ATTACH_RW, None)]))
        theirs = await blocking(lambda: b.attach(mine.token))
        seen: list[EventType] = []
        theirs.on_event(lambda event: seen.append(event.kind))
        mine.view[:3] = b"abc"
        with socket.socket(fileno=os.dup(a.transport._client.fileno())) as sock:
            sock.shutdown(socket.SHUT_RDWR)  # as when a process is killed: no goodbye
        await eventually(lambda: running.clients == 1)
        await eventually(lambda: EventType.DETACH in seen)
        assert bytes(theirs.view[:3]) == b"abc"
        registry = running.domains["default"].registry
        assert [device.account.bytes for device in registry.devices.values()] == [65536]
        with pytest.raises(DeviceError):
            await blocking(lambda: b.attach(mine.token))
        await close(a, b)


async def test_reset_of_one_device_unmaps_before_it_is_confirmed(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        a, b = await devices(running, 2)
        mine = await blocking(lambda: a.alloc(65536, grants=[(ATTACH_RW, None)]))
        theirs = await blocking(lambda: b.attach(mine.token))
        theirs.view[:3] = b"abc"
        await blocking(a.transport.reset)
        assert bytes(mine.view[:3]) == bytes(3)
        assert bytes(theirs.view[:3]) == b"abc"
        registry = running.domains["default"].registry
        assert not registry.devices[a.devid].attachments
        await close(a, b)


async def test_many_commands_in_flight_are_all_answered(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        (a,) = await devices(running, 1)
        region = await blocking(lambda: a.alloc(4096))
        commands = [a.control.grant(region.token, ATTACH_RW, None) for _ in range(15)]
        for command in commands:
            await blocking(command.expect_ok)
        await close(a)


async def test_quotas_and_the_window_are_refusals_of_one_command(tmp_path: Path) -> None:
    async with manager(tmp_path, '[fresh.quota]\nbytes="1M"\ncommands_per_s=1000000') as running:
        (a,) = await devices(running, 1)
        with pytest.raises(QuotaError) as caught:
            await blocking(lambda: a.alloc(2 << 20))
        assert caught.value.ack_name == "ENOMEM"
        region = await blocking(lambda: a.alloc(1 << 20))
        region.close()
        await close(a)


# -- rights


async def test_a_read_only_attach_is_sealed_and_a_later_writer_refused(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        a, b, c = await devices(running, 3)
        mine = await blocking(lambda: a.alloc(65536, grants=[(ATTACH_RW, None)]))
        theirs = await blocking(lambda: b.attach(mine.token, READ))
        memory = running.domains["default"].registry.regions[mine.token].memory
        assert memfd_seals(memory.fd) & 0x10
        mine.view[:3] = b"abc"
        assert bytes(theirs.view[:3]) == b"abc"
        with pytest.raises(PermissionDeniedError):
            await blocking(lambda: c.attach(mine.token))
        assert bytes((await blocking(lambda: c.attach(mine.token, READ))).view[:3]) == b"abc"
        del memory
        await close(a, b, c)


async def test_a_reader_waits_until_a_writer_under_way_has_mapped_and_both_work(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        a, b, c = await devices(running, 3)
        mine = await blocking(lambda: a.alloc(65536, grants=[(ATTACH_RW, None)]))
        handler = b.transport._channel._handler
        original, asked, go_on = handler.map, threading.Event(), threading.Event()

        def hesitate(*arguments: object) -> None:
            asked.set()
            assert go_on.wait(TEST_S)
            original(*arguments)

        handler.map = hesitate
        got: dict[str, Region] = {}

        async def attach(name: str, device: Device, rights: Permission) -> None:
            got[name] = await blocking(lambda: device.attach(mine.token, rights))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(attach, "writer", b, READ | WRITE)
            await blocking(lambda: asked.wait(TEST_S))
            nursery.start_soon(attach, "reader", c, READ)
            registry = running.domains["default"].registry
            await eventually(lambda: registry.regions[mine.token].sealed)
            other = await blocking(lambda: a.alloc(65536))
            assert not got
            assert not memfd_seals(registry.regions[mine.token].memory.fd) & 0x10
            go_on.set()
        got["writer"].view[:3] = b"abc"
        assert bytes(got["reader"].view[:3]) == b"abc"
        other.close()
        await close(a, b, c)


async def test_taking_all_rights_from_a_peer_empties_its_window_and_keeps_the_owners(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        a, b = await devices(running, 2)
        mine = await blocking(lambda: a.alloc(65536, grants=[(ATTACH_RW, b.devid)]))
        theirs = await blocking(lambda: b.attach(mine.token))
        mine.view[:3] = b"abc"
        await blocking(lambda: mine.grant(Permission(0), b.devid))
        await eventually(lambda: bytes(theirs.view[:3]) == bytes(3))
        assert bytes(mine.view[:3]) == b"abc"
        await close(a, b)


async def test_trapped_accesses_are_exact_and_hold_the_rights(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        (a,) = await devices(running, 1)
        b = await blocking(lambda: connect(running, channel=False))
        client = b.transport._client
        mine = await blocking(lambda: a.alloc(65536, grants=[(ATTACH_RW, None)]))
        await blocking(lambda: b.control.alloc(65536))
        area = (await blocking(lambda: b.control.attach(mine.token, READ))).areas[0]
        assert area.offset == 65536
        mine.view[:8] = b"12345678"
        assert await blocking(lambda: client.region_read(4, area.offset, 8)) == b"12345678"
        await blocking(lambda: client.region_write(4, area.offset, b"hostile!"))
        assert bytes(mine.view[:8]) == b"12345678"
        assert not memfd_seals(running.domains["default"].registry.regions[mine.token].memory.fd) & 0x10
        await blocking(lambda: b.control.detach(mine.token).expect_ok())
        assert await blocking(lambda: client.region_read(4, area.offset, 8)) == bytes(8)
        area = (await blocking(lambda: b.control.attach(mine.token, READ | WRITE))).areas[0]
        await blocking(lambda: client.region_write(4, area.offset + 65532, b"abcdefgh"))
        assert bytes(mine.view[65532:]) == b"abcd"
        window = await blocking(lambda: client.region_info(4))
        assert window.size == 16 << 20
        assert window.fd is None
        with pytest.raises(VfioUserError):
            await blocking(lambda: client.region_read(4, window.size - 4, 8))
        await close(a, b)


async def test_a_trapped_writer_goes_on_writing_after_the_seal(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        (a,) = await devices(running, 1)
        b = await blocking(lambda: connect(running, channel=False))
        placement = await blocking(lambda: b.control.alloc(65536))
        await blocking(lambda: b.control.grant(placement.token, ATTACH_RO, None).expect_ok())
        theirs = await blocking(lambda: a.attach(placement.token))
        write = b.transport._client.region_write
        await blocking(lambda: write(4, placement.areas[0].offset, b"after the seal"))
        assert bytes(theirs.view[:14]) == b"after the seal"
        await close(a, b)


# -- doorbells


async def test_two_holders_ring_each_other_directly_and_a_third_makes_the_manager_fan_out(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        a, b, c = await devices(running, 3)
        one = await blocking(lambda: a.alloc(65536, grants=[(ATTACH_RW, None)]))
        two = await blocking(lambda: b.attach(one.token, interrupt=True))
        fan_out = running._shared.fan_out
        await eventually(lambda: wired(one) is not None and wired(two) is not None)
        assert len(fan_out) == 0
        stats = running.domains["default"].registry.devices[a.devid].stats
        before = stats.doorbells
        await rings(one, two)
        await rings(two, one)
        assert stats.doorbells == before

        three = await blocking(lambda: c.attach(one.token, interrupt=True))
        await eventually(lambda: wired(three) is not None and len(fan_out) == 3)
        await settled(running, one, two, three)
        await rings(one, two, three)
        await rings(three, one, two)
        assert stats.doorbells > before

        three.close()
        await eventually(lambda: len(fan_out) == 0)
        await rings(one, two)
        await rings(two, one)
        await close(a, b, c)


async def test_whoever_rings_by_fan_out_is_not_woken_itself(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        opened = await devices(running, 3)
        first = await blocking(lambda: opened[0].alloc(65536, grants=[(ATTACH_RW, None)]))
        others = [await blocking(lambda peer=peer: peer.attach(first.token, interrupt=True)) for peer in opened[1:]]
        await eventually(lambda: len(running._shared.fan_out) == 3)
        await settled(running, first, *others)
        await rings(first, *others)
        assert not readable(first.fileno())
        await close(*opened)


@pytest.mark.parametrize("seed", [1, 2])
async def test_whoever_comes_and_goes_all_holders_keep_ringing_all_others(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    async with manager(tmp_path) as running:
        opened = await devices(running, 4)
        owned = await blocking(lambda: opened[0].alloc(65536, grants=[(ATTACH_RW, None)]))
        held = {opened[0]: owned}
        for _ in range(14):
            device = choose.choice(opened[1:])
            if device in held:
                held.pop(device).close()
                await eventually(lambda: len(running.domains["default"].registry.holders(owned.token)) == len(held))
            else:
                held[device] = await blocking(lambda device=device: device.attach(owned.token, interrupt=True))
            await settled(running, *held.values())
            if len(held) > 1:
                assert all(wired(region) is not None for region in held.values())
                assert len(running._shared.fan_out) == (len(held) if len(held) > 2 else 0)
            for region in held.values():
                others = [other for other in held.values() if other is not region]
                await rings(region, *others)
                assert not any(readable(other.fileno()) for other in held.values())
        await close(*opened)


async def test_a_doorbell_by_register_reaches_a_peer_without_vector_as_an_event(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        a, b = await devices(running, 2)
        one = await blocking(lambda: a.alloc(65536, interrupt=False, grants=[(ATTACH_RW, None)]))
        await blocking(lambda: b.attach(one.token, interrupt=True))
        seen = []
        held = a._by_offset[one._held.slot * a.chunk_size]
        deliver = a._deliver
        a._events._deliver = lambda event: (seen.append(event.kind), deliver(event))
        assert held.binding is None
        await blocking(lambda: b.ring_slot(0))
        await eventually(lambda: EventType.UPDATE in seen)
        await close(a, b)


async def test_a_vector_that_loses_its_eventfd_is_no_longer_rung_directly(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        a, b = await devices(running, 2)
        one = await blocking(lambda: a.alloc(65536, grants=[(ATTACH_RW, None)]))
        two = await blocking(lambda: b.attach(one.token, interrupt=True))
        await eventually(lambda: wired(one) is not None)
        await blocking(lambda: b.transport.set_vectors(two.binding.vector, [None]))
        await eventually(lambda: len(running._shared.fan_out) == 1)
        one.ring()
        with Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)) as fd:
            await eventually(lambda: running.domains["default"].devices[b.devid]._vectors._pending)
            await blocking(lambda: b.transport.set_vectors(two.binding.vector, [fd.fileno()]))
            await trio.lowlevel.wait_readable(fd.fileno())
            await eventually(lambda: len(running._shared.fan_out) == 0)
        await close(a, b)


# -- the PCI function as a client sees it


async def test_identity_bars_and_interrupts_are_those_of_the_device(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        with await blocking(lambda: Client.connect(running.run_dir / "device.sock")) as client:
            info = await blocking(client.device_info)
            assert (info.num_regions, info.num_irqs, info.flags) == (9, 5, 3)
            config = await blocking(lambda: client.region_read(7, 0, 64))
            assert config[:4] == bytes.fromhex("f41a6c10")
            sizes = [(await blocking(lambda index=index: client.region_info(index))).size for index in range(9)]
            assert sizes[4] == 16 << 20
            assert sizes[7] == 256
            assert [sizes[index] for index in (3, 5, 6, 8)] == [0, 0, 0, 0]
            assert all(sizes[index] for index in (0, 1, 2))
            counts = [(await blocking(lambda index=index: client.irq_info(index))).count for index in range(5)]
            assert counts == [1, 0, 16, 0, 0]


async def test_interrupts_take_eventfds_only_and_can_be_triggered(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        with (
            await blocking(lambda: Client.connect(running.run_dir / "device.sock")) as client,
            Fd(os.eventfd(0, os.EFD_NONBLOCK)) as fd,
            Fd(os.open("/dev/null", os.O_RDWR)) as other,
        ):
            with pytest.raises(VfioUserError) as caught:
                await blocking(lambda: client.set_irq_eventfds(2, 0, [other]))
            assert caught.value.errno == errno.EINVAL
            for index in (0, 2):
                await blocking(lambda index=index: client.set_irq_eventfds(index, 0, [fd]))
                trigger = SetIrqs(data=IrqData.NONE, action=IrqAction.TRIGGER, index=index, start=0, count=1)
                await blocking(lambda trigger=trigger: client.set_irqs(trigger))
                assert os.eventfd_read(fd.fileno()) == 1
                await blocking(lambda index=index: client.disable_irqs(index))
                await blocking(lambda trigger=trigger: client.set_irqs(trigger))
                assert not readable(fd.fileno())


async def test_dma_maps_of_what_could_fault_are_refused(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        with (
            await blocking(lambda: Client.connect(running.run_dir / "device.sock")) as client,
            Fd(create_memfd("m", 8192)) as good,
            Fd(os.open("/dev/zero", os.O_RDWR)) as bad,
        ):
            with pytest.raises(VfioUserError):
                await blocking(lambda: client.dma_map(0, 4096, fd=bad, memory=bytearray(4096)))
            with pytest.raises(VfioUserError):
                await blocking(lambda: client.dma_map(0, 16384, fd=good, memory=bytearray(16384)))
            await blocking(lambda: client.dma_map(0, 8192, fd=good))
            await blocking(lambda: client.dma_unmap(0, 8192))


# -- clients that misbehave


async def test_a_client_that_does_not_map_loses_its_own_device_only(tmp_path: Path) -> None:
    async with manager(tmp_path, "[manager]\nmap_timeout_s = 0.05") as running:
        a, b = await devices(running, 2)
        a.transport._channel.process = lambda: time.sleep(0.01) or True
        mine = await blocking(lambda: b.alloc(65536, grants=[(ATTACH_RW, None)]))
        with pytest.raises((DeviceGoneError, TransportError)):
            await blocking(lambda: a.attach(mine.token))
        await eventually(lambda: running.clients == 1)
        again = await blocking(lambda: b.alloc(65536))
        again.close()
        await close(a, b)


async def test_a_client_that_sends_garbage_on_its_map_channel_loses_its_own_device_only(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        a, b = await devices(running, 2)
        a.transport._channel._sock.send(b"garbage")
        await eventually(lambda: running.clients == 1)
        await blocking(lambda: b.alloc(65536))
        await close(a, b)


async def test_garbage_on_every_socket_leaves_others_undisturbed(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        (a,) = await devices(running, 1)
        for name in ("device", "control"):
            for garbage in (b"", b"\0" * 64, b"\xff" * 70_000, b"GET / HTTP/1.0\r\n\r\n", b"{" * 9000 + b"\n"):
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                    sock.connect(str(running.run_dir / f"{name}.sock"))
                    sock.setblocking(False)
                    try:
                        sock.send(garbage)
                    except (BrokenPipeError, BlockingIOError):
                        pass
                    await trio.lowlevel.checkpoint()
        await eventually(lambda: running.clients == 1)
        await blocking(lambda: a.alloc(65536))
        await close(a)


async def test_a_client_that_refuses_a_mapping_gets_its_command_refused_and_stays(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        a, b = await devices(running, 2)
        handler = a.transport._channel._handler
        original = handler.map

        def refuse(*args: object) -> None:
            raise OSError(errno.ENOMEM, "no")

        handler.map = refuse
        mine = await blocking(lambda: b.alloc(65536, grants=[(ATTACH_RW, None)]))
        with pytest.raises(QuotaError):
            await blocking(lambda: a.attach(mine.token))
        with pytest.raises(QuotaError):
            await blocking(lambda: a.alloc(65536))
        registry = running.domains["default"].registry
        assert not registry.devices[a.devid].attachments
        handler.map = original
        theirs = await blocking(lambda: a.attach(mine.token))
        theirs.view[:1] = b"x"
        assert bytes(mine.view[:1]) == b"x"
        await close(a, b)


async def test_no_client_is_accepted_beyond_the_limits_and_the_old_ones_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with manager(tmp_path, "[manager]\nmax_clients = 2") as running:
        a, b = await devices(running, 2)
        with pytest.raises((TransportError, DeviceGoneError)):
            await blocking(lambda: connect(running))
        assert "max_clients" in caplog.text
        await close(b)
        await eventually(lambda: running.clients == 1)
        limit, running.descriptor_limit = running.descriptor_limit, 1
        with pytest.raises((TransportError, DeviceGoneError)):
            await blocking(lambda: connect(running))
        assert "descriptors is near" in caplog.text
        with pytest.raises(QuotaError):
            await blocking(lambda: a.alloc(65536))
        running.descriptor_limit = limit
        await blocking(lambda: a.alloc(65536))
        assert running.refused == 2
        await close(a)


async def test_a_writer_that_maps_slowly_cannot_hold_up_whoever_waits_for_it_beyond_the_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orders, "MAX_UNANSWERED", 4)
    async with manager(tmp_path, "[manager]\nmap_timeout_s = 0.3") as running:
        owner, victim, accomplice = await devices(running, 3)
        window = running.domains["default"].registry.devices[accomplice.devid].window
        for chunk in range(1, 256, 2):  # so that a region appears in areas of one chunk, mapped one by one
            window.take([AreaOf(WindowOffset(chunk * 65536), 65536)])
        shared = await blocking(lambda: owner.alloc(65536 * 20, grants=[(ATTACH_RW, None)]))
        theirs = await blocking(lambda: victim.attach(shared.token))
        handler = accomplice.transport._channel._handler
        original, asked = handler.map, threading.Event()

        def dawdle(*arguments: object) -> None:
            asked.set()
            time.sleep(0.05)  # each answer, and each batch of them, is well in time; all of them are not
            original(*arguments)

        handler.map = dawdle

        async def attach_slowly() -> None:
            with pytest.raises((DeviceGoneError, TransportError)):
                await blocking(lambda: accomplice.attach(shared.token, READ | WRITE))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(attach_slowly)
            await blocking(lambda: asked.wait(TEST_S))
            await blocking(lambda: shared.grant(READ | Permission.ATTACH, victim.devid))
            unrelated = await blocking(lambda: victim.alloc(65536))
        await eventually(lambda: accomplice.gone is not None)
        assert victim.gone is None
        unrelated.close()
        theirs.close()
        await close(owner, victim, accomplice)


async def test_two_clients_that_wait_for_each_other_in_a_circle_hold_up_nobody_for_ever(tmp_path: Path) -> None:
    async with manager(tmp_path, "[manager]\nmap_timeout_s = 0.3") as running:
        owner, one, other = await devices(running, 3)
        a, b = [await blocking(lambda: owner.alloc(65536, grants=[(ATTACH_RW, None)])) for _ in range(2)]
        memories = running.domains["default"].shared.memories
        regions = running.domains["default"].registry.regions
        held = regions[a.token].memory  # as if a writer of it stood behind an order that waits in a circle
        memories.writer_begins(held)
        with pytest.raises(DeviceError):
            await blocking(lambda: one.attach(a.token, READ))
        unrelated = await blocking(lambda: one.attach(b.token))
        memories.writer_ends(held)
        readable_now = await blocking(lambda: other.attach(a.token, READ))
        for region in (unrelated, readable_now):
            region.close()
        del held
        await close(owner, one, other)


async def test_a_client_that_hoards_descriptors_is_refused_and_takes_nothing_from_others(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        a, b = await devices(running, 2)
        limit, running.descriptor_limit = running.descriptor_limit, 64
        with Fd(os.eventfd(0)) as fd, pytest.raises(VfioUserError) as refused:
            await blocking(lambda: a.transport.set_vectors(3, [fd.fileno()] * 13))
        assert refused.value.errno == errno.EMFILE
        running.descriptor_limit = limit
        await blocking(lambda: b.alloc(65536))
        await close(a, b)


# -- named devices, status


async def test_a_named_device_has_one_client_at_a_time_and_starts_afresh_with_each(tmp_path: Path) -> None:
    async with manager(tmp_path, '[[device]]\nname = "vm1"') as running:
        first = await blocking(lambda: connect(running, "vm1"))
        devid = first.devid
        await blocking(lambda: first.alloc(65536))
        with pytest.raises(TransportError) as caught:
            await blocking(lambda: connect(running, "vm1"))
        assert caught.value.errno == errno.EBUSY
        await close(first)
        await eventually(lambda: running.clients == 0)
        registry = running.domains["default"].registry
        assert registry.devices[devid].account.bytes == 0
        second = await blocking(lambda: connect(running, "vm1"))
        assert second.devid == devid
        await close(second)


async def test_status_says_who_holds_what_and_keeps_tokens_to_itself(tmp_path: Path) -> None:
    async with manager(tmp_path, '[[device]]\nname = "vm1"') as running:
        (a,) = await devices(running, 1)
        region = await blocking(lambda: a.alloc(65536))
        path = running.run_dir / "control.sock"
        reply = await blocking(lambda: request(path, "status"))
        status = reply["status"]
        assert status["pid"] == os.getpid()
        assert status["totals"] == {"devices": 2, "connected": 1, "regions": 1, "attachments": 0, "bytes": 65536}
        domain = status["domains"][0]
        fresh = next(device for device in domain["devices"] if device["connected"])
        assert fresh["client"] == {"pid": os.getpid(), "uid": os.getuid(), "gid": os.getgid(), "maps": True}
        assert (fresh["regions"], fresh["bytes"], fresh["quota"]["regions"]) == (1, 65536, 20)
        assert fresh["stats"]["commands"] >= 1
        idle = next(device for device in domain["devices"] if not device["connected"])
        assert idle["name"] == "vm1"
        (shown,) = domain["regions"]
        assert (shown["owner"], shown["holders"], shown["alive"], shown["sealed"]) == (fresh["name"], 1, True, False)
        whole = f"{region.token:#018x}"
        assert whole not in str(reply)
        assert whole in str(await blocking(lambda: request(path, "status", tokens=True)))
        with pytest.raises(Exception, match="there are: status"):
            await blocking(lambda: request(path, "halt"))
        await close(a)


async def test_a_long_control_request_is_refused_and_several_share_a_connection(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        path = str(running.run_dir / "control.sock")
        async with await trio.open_unix_socket(path) as stream:
            await stream.send_all(b'{"op":"x"}\n{"op":"y"}\n')
            data = b""
            while data.count(b"\n") < 2:
                data += await stream.receive_some()
            assert b'unknown op \\"x\\"' in data
        async with await trio.open_unix_socket(path) as stream:
            await stream.send_all(b"x" * 5000)
            data = b""
            while b"\n" not in data:
                data += await stream.receive_some()
            assert b"at most 4096 bytes" in data


async def test_a_second_manager_in_the_same_directory_is_told_so(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        with pytest.raises(TransportError, match="already running"):
            await run_manager(parse_config("", "f", running.run_dir), running.run_dir)


async def test_a_capability_of_another_version_gets_no_map_channel(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        proposals = [{"map_channel": {"version": 99}}, {"map_channel": 1}, {"map_channel": None}, client_capability()]
        granted = []
        for proposal in proposals:
            path = running.run_dir / "device.sock"
            with await blocking(lambda proposal=proposal, path=path: Client.connect(path, capabilities=proposal)) as c:
                granted.append(len(fds := c.take_version_fds()))
                for fd in fds:
                    fd.close()
        assert granted == [0, 0, 0, 1]

# SPDX-License-Identifier: Apache-2.0
"""A whole manager: regions, rights and doorbells between real drivers in threads."""

from __future__ import annotations

import os
import random
import socket
import threading
from pathlib import Path
from typing import TypeVar

import pytest
import trio
from manager_rig import (
    ATTACH_RO,
    ATTACH_RW,
    READ,
    TEST_S,
    WRITE,
    blocking,
    close,
    connect,
    devices,
    eventually,
    manager,
    readable,
    rings,
    settled,
    wired,
)

from ism.driver.device import Device
from ism.driver.region import Region
from ism.errors import DeviceError, PermissionDeniedError, QuotaError
from ism.memory import memfd_seals
from ism.vfio_user.errors import VfioUserError
from ism.vfio_user.fds import Fd
from ism.virtio.ism_spec import EventType, Permission

T = TypeVar("T")
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

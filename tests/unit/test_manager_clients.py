# SPDX-License-Identifier: Apache-2.0
"""A whole manager and its clients: the function as they see it, those that misbehave, named devices, status."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from pathlib import Path
from typing import TypeVar

import pytest
import trio
from manager_rig import (
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
)

from ism.device.contract import AreaOf
from ism.errors import DeviceError, DeviceGoneError, QuotaError, TransportError
from ism.ids import WindowOffset
from ism.manager import orders
from ism.manager.config import parse_config
from ism.manager.control import request
from ism.manager.server import run_manager
from ism.memory import create_memfd
from ism.vfio_user.client import Client
from ism.vfio_user.errors import VfioUserError
from ism.vfio_user.fds import Fd
from ism.vfio_user.map_channel import client_capability
from ism.vfio_user.payloads import IrqAction, IrqData, SetIrqs
from ism.virtio.ism_spec import Permission

T = TypeVar("T")
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
        assert fresh["client"] == {
            "pid": os.getpid(),
            "uid": os.getuid(),
            "gid": os.getgid(),
            "maps": True,
            "agent": False,
        }
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

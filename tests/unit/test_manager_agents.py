# SPDX-License-Identifier: Apache-2.0
"""The manager's side of map agents: who is believed to be one, what it is told and when, and what its lies cost."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from fake_agent import INTRODUCTION, Answer, FakeAgent, GuestTransport, Told, Vm
from manager_rig import (
    ATTACH_RW,
    READ,
    blocking,
    close,
    connect,
    descriptors,
    devices,
    eventually,
    manager,
    rings,
    settled,
    wired,
)

from ism.device.contract import AreaOf
from ism.driver.device import Device
from ism.driver.directory import FourTuple
from ism.driver.vfio_user import VfioUserTransport
from ism.errors import DeviceGoneError, QuotaError, TransportError
from ism.ids import WindowOffset
from ism.manager.agents import MAX_KEPT
from ism.manager.server import Manager
from ism.memory import Mapping, memfd_seals
from ism.vfio_user.client import Client, ClientRegionInfo
from ism.vfio_user.errors import VfioUserError
from ism.vfio_user.fds import Fd
from ism.vfio_user.map_channel_wire import REPLY, Packet, PacketType
from ism.vfio_user.payloads import RegionFlag
from ism.virtio.ism_spec import Ack, EventType, IsmFeature
from ism.virtio.pci import CommonCfg

HELLO, MAP, UNMAP = PacketType.HELLO, PacketType.MAP, PacketType.UNMAP
BAR = 4
WINDOW = 16 << 20
CHUNK = 65536
SEAL_FUTURE_WRITE = 0x10
IMPATIENT = "[manager]\nmap_timeout_s = 0.2"
DEVICE_STATUS = CommonCfg.offset_of("device_status")


def device_path(running: Manager, name: str = "device") -> Path:
    return running.run_dir / f"{name}.sock"


async def start_vm(running: Manager, name: str = "device") -> Vm:
    return await blocking(lambda: Vm(device_path(running, name)))


async def bar_of(client: Client) -> ClientRegionInfo:
    return await blocking(lambda: client.region_info(BAR))


async def is_trapped(running: Manager) -> bool:
    """Connect as QEMU; tell whether the BAR is not offered for mapping."""
    with await blocking(lambda: Client.connect(device_path(running))) as client:
        info = await bar_of(client)
        if info.fd is not None:
            info.fd.close()
        return info.fd is None and not info.flags & RegionFlag.MMAP


def answered(device: Device) -> int:
    """How many commands the device has completed, as its memory says now."""
    return int(device.control.queue._used_words[1])


def status_of(vm: Device) -> int:
    """One register access: whatever came before is handled, and done if nothing is to be waited for."""
    return vm.transport.bar_read(0, DEVICE_STATUS, 1)[0]


async def works(*opened: Device) -> None:
    for device in opened:
        region = await blocking(lambda device=device: device.alloc(CHUNK))
        region.view[:5] = b"works"
        region.close()


@asynccontextmanager
async def meanwhile(call: Callable[[], object]) -> AsyncIterator[list[object]]:
    """Run a call in a thread; what it returns, or the library's error that it raises, is in the list at the end."""
    results: list[object] = []

    async def run() -> None:
        try:
            results.append(await blocking(call))
        except (DeviceGoneError, TransportError) as error:
            results.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        yield results


# -- who is an agent


async def test_with_an_agent_the_bar_is_an_empty_file_whose_inode_the_agent_was_told(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        agent = await blocking(lambda: FakeAgent(device_path(running)))
        with await blocking(lambda: Client.connect(device_path(running))) as client:
            (hello,) = agent.told
            assert (hello.type, hello.packet.offset, hello.packet.length) == (HELLO, CHUNK, WINDOW)
            assert (hello.packet.sequence, hello.inode) == (1, None)
            info = await bar_of(client)
            assert info.size == WINDOW
            assert info.flags == RegionFlag.READ | RegionFlag.WRITE | RegionFlag.MMAP
            assert (info.offset, info.areas) == (0, ())
            assert info.fd is not None
            with info.fd as fd:
                found = os.fstat(fd.fileno())
                assert (found.st_ino, found.st_size) == (hello.packet.file_offset, WINDOW)
                assert found.st_blocks == 0
                assert memfd_seals(fd.fileno()) & 0b110 == 0b110
                assert bytes(Mapping.of_file(CHUNK, fd.fileno(), WINDOW - CHUNK).view[-4:]) == bytes(4)
            others = [await blocking(lambda index=index: client.region_info(index)) for index in (0, 1, 2, 3, 7)]
            assert not any(other.flags & RegionFlag.MMAP for other in others)
        agent.close()


async def test_without_an_agent_the_bar_is_not_offered_for_mapping(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        assert await is_trapped(running)


async def test_every_client_of_a_process_has_an_agent_of_its_own_or_none(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        first = await start_vm(running)
        assert await is_trapped(running)
        second = await start_vm(running)
        await works(first, second)
        await close(first, second)


async def test_two_agents_of_one_process_serve_each_its_own_device(tmp_path: Path) -> None:
    async with manager(tmp_path, '[[device]]\nname = "vm1"\n[[device]]\nname = "vm2"') as running:
        agents = {name: FakeAgent(device_path(running, name)) for name in ("vm1", "vm2")}
        for name in ("vm2", "vm1"):
            with await blocking(lambda name=name: Client.connect(device_path(running, name))) as client:
                info = await bar_of(client)
                assert info.fd is not None
                with info.fd as fd:
                    (hello,) = agents[name].told
                    assert hello.packet.file_offset == os.fstat(fd.fileno()).st_ino
        for agent in agents.values():
            agent.close()
        await eventually(lambda: running.clients == 0)
        one, two = await start_vm(running, "vm1"), await start_vm(running, "vm2")
        region = await blocking(lambda: one.alloc(CHUNK, grants=[(ATTACH_RW, two.devid)]))
        assert len(one.agent.of_type(MAP)) == 1
        assert two.agent.of_type(MAP) == []
        theirs = await blocking(lambda: two.attach(region.token))
        theirs.view[:3] = b"abc"
        assert bytes(region.view[:3]) == b"abc"
        assert len(two.agent.of_type(MAP)) == 1
        await close(one, two)


async def test_the_newest_introduction_of_a_process_counts_and_the_former_is_hung_up_on(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        former = FakeAgent(device_path(running))
        vm = await start_vm(running)
        assert former.ended.is_set() or await blocking(lambda: former.ended.wait(20))
        assert former.told == []
        former.close()
        await works(vm)
        await close(vm)


INTRODUCE_FROM_CHILDREN = """
import os, socket, sys
path, packet, count = sys.argv[1], bytes.fromhex(sys.argv[2]), int(sys.argv[3])
for _ in range(count):
    if os.fork() == 0:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(path)
        sock.send(packet)
        os.write(1, b"c")
        try:
            sock.recv(100)
        except ConnectionResetError:  # its introduction was never read
            pass
        os.write(1, b"e")
        os._exit(0)
sys.stdin.read(1)
"""
"""Each child says c when it has introduced itself, and e when the manager hung up; then it ends."""


class Strangers:
    """Other processes that introduce themselves as agents."""

    def __init__(self, path: Path, count: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", INTRODUCE_FROM_CHILDREN, f"{path}.map", INTRODUCTION.hex(), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.said = b""

    def read_until(self, letter: bytes, count: int) -> None:
        assert self.process.stdout is not None
        while self.said.count(letter) < count:
            more = os.read(self.process.stdout.fileno(), 100)
            assert more, f"the strangers ended: {self.said!r}"
            self.said += more

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()


async def test_an_introduction_by_another_process_is_not_used(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        strangers = Strangers(device_path(running), 1)
        await blocking(lambda: strangers.read_until(b"c", 1))
        assert await is_trapped(running)
        vm = await start_vm(running)
        await works(vm)
        assert b"e" not in strangers.said
        await close(vm)
        await blocking(strangers.close)


async def test_of_introductions_that_nobody_asks_for_only_the_last_are_kept(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        before = descriptors().count("socket:[]")
        count = MAX_KEPT + 5
        strangers = Strangers(device_path(running), count)
        await blocking(lambda: strangers.read_until(b"c", count))
        await blocking(lambda: strangers.read_until(b"e", count - MAX_KEPT))
        assert descriptors().count("socket:[]") == before + MAX_KEPT
        vm = await start_vm(running)
        await works(vm)
        await blocking(lambda: strangers.read_until(b"e", count - MAX_KEPT + 1))
        await close(vm)
        await eventually(lambda: running.clients == 0)
        assert descriptors().count("socket:[]") == before + MAX_KEPT - 1
        await blocking(strangers.close)


async def test_a_process_that_introduces_itself_often_occupies_one_descriptor(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        before = descriptors().count("socket:[]")
        agents = [FakeAgent(device_path(running)) for _ in range(100)]
        for agent in agents[:-1]:
            assert await blocking(lambda agent=agent: agent.ended.wait(20))
            agent.close()
        assert descriptors().count("socket:[]") == before + 2
        agents[-1].close()


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"garbage",
        INTRODUCTION[:-1],
        INTRODUCTION + b"x",
        bytes(40),
        Packet(type=HELLO, offset=4096, length=4096).pack(),
        Packet(type=PacketType.INTRODUCE, sequence=1).pack(),
        Packet(type=PacketType.INTRODUCE | REPLY).pack(),
        Packet(type=PacketType.INTRODUCE, version=2).pack(),
    ],
    ids=["nothing", "text", "short", "long", "zeros", "hello", "numbered", "answer", "version"],
)
async def test_whoever_sends_no_introduction_is_no_agent_and_spoils_nothing(tmp_path: Path, garbage: bytes) -> None:
    async with manager(tmp_path) as running:
        liar = FakeAgent(device_path(running), introduction=garbage)
        assert await is_trapped(running)
        assert await blocking(lambda: liar.ended.wait(20))
        assert liar.told == []
        liar.close()
        vm = await start_vm(running)
        await works(vm)
        await close(vm)


async def test_an_introduction_with_descriptors_leaves_none_in_the_manager(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        with Fd(os.eventfd(0)) as fd:
            agent = FakeAgent(device_path(running), fds=[fd, fd, fd])
            before = descriptors().count("anon_inode:[eventfd]")
            await is_trapped(running)
            assert descriptors().count("anon_inode:[eventfd]") == before
            agent.close()


async def test_an_agent_that_is_gone_before_its_process_connects_costs_that_connection_only(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        (other,) = await devices(running, 1)
        FakeAgent(device_path(running)).close()
        with pytest.raises(VfioUserError) as refused:
            await blocking(lambda: Client.connect(device_path(running)))
        assert refused.value.errno == errno.EPROTO
        assert await is_trapped(running)
        await works(other)
        await close(other)


# -- agents that do not greet


async def test_an_agent_that_never_answers_hello_has_its_client_refused_in_time(tmp_path: Path) -> None:
    async with manager(tmp_path, IMPATIENT) as running:
        (other,) = await devices(running, 1)
        agent = FakeAgent(device_path(running))
        agent.hold(HELLO)
        async with meanwhile(lambda: Client.connect(device_path(running))) as results:
            await blocking(agent.wait_asked)
            await works(other)
        (refused,) = results
        assert isinstance(refused, VfioUserError)
        assert refused.errno == errno.EPROTO
        await eventually(lambda: running.clients == 1)
        agent.close()
        await works(other)
        await close(other)


def silent_about(type: PacketType, instead: Callable[[Told], int | bytes | None]) -> Answer:
    """Do as told but for requests of one type."""
    return lambda told: instead(told) if told.type == type else 0


def wrong_sequence(told: Told) -> bytes:
    return Packet(type=told.type | REPLY, sequence=told.packet.sequence + 1).pack()


def wrong_type(told: Told) -> bytes:
    return Packet(type=UNMAP | REPLY, sequence=told.packet.sequence).pack()


def wrong_version(told: Told) -> bytes:
    return Packet(type=told.type | REPLY, version=7, sequence=told.packet.sequence).pack()


def a_request(told: Told) -> bytes:
    return told.packet.pack()


LIES = {
    "text": lambda told: b"garbage",
    "too-long": lambda told: told.answer() + b"x",
    "out-of-turn": wrong_sequence,
    "of-another": wrong_type,
    "of-another-version": wrong_version,
    "no-answer": a_request,
    "introduction": lambda told: INTRODUCTION,
}
lies = pytest.mark.parametrize("lie", LIES.values(), ids=LIES)


@pytest.mark.parametrize("refusal", [lambda told: errno.EINVAL, *LIES.values()], ids=["refusal", *LIES])
async def test_an_agent_that_refuses_hello_or_lies_has_its_client_refused(
    tmp_path: Path, refusal: Callable[[Told], int | bytes]
) -> None:
    async with manager(tmp_path) as running:
        (other,) = await devices(running, 1)
        agent = FakeAgent(device_path(running))
        agent.answer = refusal
        with pytest.raises(VfioUserError) as refused:
            await blocking(lambda: Client.connect(device_path(running)))
        assert refused.value.errno == errno.EPROTO
        assert await blocking(lambda: agent.ended.wait(20))
        agent.close()
        vm = await start_vm(running)
        await works(vm, other)
        await close(vm, other)


async def test_a_client_that_leaves_while_its_agent_thinks_takes_everything_with_it(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        agent = FakeAgent(device_path(running))
        agent.hold(HELLO)
        with pytest.raises(TransportError):
            await blocking(lambda: Client.connect(device_path(running), timeout_s=0.05))
        agent.let_go()
        await eventually(lambda: running.clients == 0)
        assert await blocking(lambda: agent.ended.wait(20))
        agent.close()


# -- agents that fail later


async def test_an_agent_that_hangs_up_ends_its_own_device_only(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        (other,) = await devices(running, 1)
        vm, bystander = await start_vm(running), await start_vm(running)
        region = await blocking(lambda: vm.alloc(CHUNK, grants=[(ATTACH_RW, None)]))
        theirs = await blocking(lambda: other.attach(region.token))
        seen: list[EventType] = []
        theirs.on_event(lambda event: seen.append(event.kind))
        vm.agent.close()
        await eventually(lambda: vm.gone is not None)
        await eventually(lambda: EventType.DETACH in seen)
        assert running.clients == 2
        await works(other, bystander)
        await close(vm, other, bystander)


@lies
async def test_an_agent_that_answers_wrongly_ends_its_own_device_only(
    tmp_path: Path, lie: Callable[[Told], bytes]
) -> None:
    async with manager(tmp_path) as running:
        (other,) = await devices(running, 1)
        vm, bystander = await start_vm(running), await start_vm(running)
        vm.agent.answer = silent_about(MAP, lie)
        with pytest.raises((DeviceGoneError, TransportError)):
            await blocking(lambda: vm.alloc(CHUNK))
        await eventually(lambda: running.clients == 2)
        assert await blocking(lambda: vm.agent.ended.wait(20))
        await works(other, bystander)
        await close(vm, other, bystander)


@pytest.mark.parametrize("data", [b"garbage", Packet(type=MAP | REPLY, sequence=2).pack(), INTRODUCTION])
async def test_an_agent_that_speaks_unasked_ends_its_own_device_only(tmp_path: Path, data: bytes) -> None:
    async with manager(tmp_path) as running:
        vm, bystander = await start_vm(running), await start_vm(running)
        vm.agent.send(data)
        await eventually(lambda: vm.gone is not None)
        await eventually(lambda: running.clients == 1)
        await works(bystander)
        await close(vm, bystander)


async def test_an_agent_that_answers_with_descriptors_ends_its_own_device_and_leaves_none(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        vm, bystander = await start_vm(running), await start_vm(running)

        def with_descriptor(told: Told) -> None:
            with Fd(os.eventfd(0)) as fd:
                vm.agent.send(told.answer(), [fd])

        vm.agent.answer = silent_about(MAP, with_descriptor)
        with pytest.raises((DeviceGoneError, TransportError)):
            await blocking(lambda: vm.alloc(CHUNK))
        await works(bystander)
        await close(vm, bystander)


async def test_an_agent_that_never_answers_a_map_loses_its_device_in_time(tmp_path: Path) -> None:
    async with manager(tmp_path, IMPATIENT) as running:
        (other,) = await devices(running, 1)
        vm = await start_vm(running)
        vm.agent.hold(MAP)
        async with meanwhile(lambda: vm.alloc(CHUNK)) as results:
            await blocking(vm.agent.wait_asked)
            await works(other)
        assert isinstance(results[0], TransportError | DeviceGoneError)
        await eventually(lambda: running.clients == 1)
        await close(vm, other)


async def test_an_agent_that_refuses_a_map_fails_the_command_and_keeps_its_device(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        (other,) = await devices(running, 1)
        vm = await start_vm(running)
        shared = await blocking(lambda: other.alloc(CHUNK, grants=[(ATTACH_RW, None)]))
        vm.agent.answer = silent_about(MAP, lambda told: errno.ENODEV)
        for call in (partial(vm.alloc, CHUNK), partial(vm.attach, shared.token)):
            with pytest.raises(QuotaError) as refused:
                await blocking(call)
            assert refused.value.ack == Ack.ENOMEM
        registry = running.domains["default"].registry
        assert not registry.devices[vm.devid].attachments
        vm.agent.answer = lambda told: 0
        theirs = await blocking(lambda: vm.attach(shared.token))
        theirs.view[:1] = b"x"
        assert bytes(shared.view[:1]) == b"x"
        await close(vm, other)


async def test_an_agent_that_refuses_an_unmap_loses_its_device(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        vm, bystander = await start_vm(running), await start_vm(running)
        region = await blocking(lambda: vm.alloc(CHUNK))
        vm.agent.answer = silent_about(UNMAP, lambda told: errno.EPERM)
        region.close()
        await eventually(lambda: vm.gone is not None)
        await works(bystander)
        await close(vm, bystander)


# -- what an agent is told, and when


async def test_a_region_is_mapped_before_its_alloc_is_acknowledged(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        vm = await start_vm(running)
        before = answered(vm)
        vm.agent.hold(MAP)
        async with meanwhile(lambda: vm.control.alloc(CHUNK + 1)) as results:
            await blocking(vm.agent.wait_asked)
            await blocking(lambda: status_of(vm))
            assert (answered(vm), results) == (before, [])
            vm.agent.let_go()
        (placement,) = results
        (area,) = placement.areas
        registry = running.domains["default"].registry
        (told,) = vm.agent.of_type(MAP)
        packet = told.packet
        assert (packet.offset, packet.length) == (area.offset, area.length) == (0, 2 * CHUNK)
        assert (packet.file_offset, packet.rights, told.mode) == (0, 3, os.O_RDWR)
        assert told.inode == os.fstat(registry.regions[placement.token].memory.fd).st_ino
        await close(vm)


async def test_a_region_is_unmapped_before_its_detach_is_acknowledged(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        vm = await start_vm(running)
        await blocking(lambda: vm.control.alloc(CHUNK))
        placement = await blocking(lambda: vm.control.alloc(3 * CHUNK))
        before = answered(vm)
        vm.agent.hold(UNMAP)
        command = vm.control.detach(placement.token)
        await blocking(vm.agent.wait_asked)
        await blocking(lambda: status_of(vm))
        assert answered(vm) == before
        vm.agent.let_go()
        await blocking(command.expect_ok)
        (told,) = vm.agent.of_type(UNMAP)
        assert (told.packet.offset, told.packet.length, told.inode) == (CHUNK, 3 * CHUNK, None)
        assert len(vm.agent.window) == 1
        await close(vm)


async def test_a_region_in_several_areas_is_mapped_piece_by_piece(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        vm = await start_vm(running)
        window = running.domains["default"].registry.devices[vm.devid].window
        for chunk in range(3, WINDOW // CHUNK, 2):
            window.take([AreaOf(WindowOffset(chunk * CHUNK), CHUNK)])
        region = await blocking(lambda: vm.alloc(5 * CHUNK))
        packets = [told.packet for told in vm.agent.of_type(MAP)]
        assert [packet.length // CHUNK for packet in packets] == [3, 1, 1]
        assert [packet.file_offset // CHUNK for packet in packets] == [0, 3, 4]
        assert len({packet.offset for packet in packets}) == 3
        memory = running.domains["default"].registry.regions[region.token].memory
        assert {told.inode for told in vm.agent.of_type(MAP)} == {os.fstat(memory.fd).st_ino}
        del memory
        region.close()
        await eventually(lambda: len(vm.agent.of_type(UNMAP)) == 3)
        await close(vm)


async def test_a_read_only_attach_is_told_rights_1_with_a_descriptor_that_cannot_write(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        (other,) = await devices(running, 1)
        vm = await start_vm(running)
        region = await blocking(lambda: other.alloc(CHUNK, grants=[(ATTACH_RW, None)]))
        region.view[:3] = b"abc"
        theirs = await blocking(lambda: vm.attach(region.token, READ))
        (told,) = vm.agent.of_type(MAP)
        assert (told.packet.rights, told.mode) == (1, os.O_RDONLY)
        assert bytes(theirs.view[:3]) == b"abc"
        await close(vm, other)


async def test_a_region_is_sealed_before_an_agent_gets_it_read_only(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        (other,) = await devices(running, 1)
        vm = await start_vm(running)
        region = await blocking(lambda: other.alloc(CHUNK, grants=[(ATTACH_RW, None)]))
        await blocking(lambda: vm.attach(region.token, READ))
        memory = running.domains["default"].registry.regions[region.token].memory
        assert memfd_seals(memory.fd) & SEAL_FUTURE_WRITE  # else the VMM opens it again for writing, through /proc
        del memory
        await close(vm, other)


async def test_narrowing_a_grant_has_the_agent_map_the_region_read_only_or_unmap_it(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        (other,) = await devices(running, 1)
        vm = await start_vm(running)
        region = await blocking(lambda: other.alloc(CHUNK, grants=[(ATTACH_RW, vm.devid)]))
        theirs = await blocking(lambda: vm.attach(region.token))
        region.view[:3] = b"abc"
        await blocking(lambda: region.grant(READ, vm.devid))
        await eventually(lambda: len(vm.agent.of_type(MAP)) == 2)
        assert [told.packet.rights for told in vm.agent.of_type(MAP)] == [3, 1]
        await settled(running)
        theirs.view[4:7] = b"xyz"
        assert bytes(region.view[:8]) == b"abc\0\0\0\0\0"
        del theirs
        await blocking(lambda: region.grant(READ & ~READ, vm.devid))
        await eventually(lambda: len(vm.agent.of_type(UNMAP)) == 1)
        await close(vm, other)


def write_status_0(vm: Vm) -> None:
    vm.transport.bar_write(0, DEVICE_STATUS, b"\0")


def reset_function(vm: Vm) -> None:
    vm.client.reset()


@pytest.mark.parametrize("reset", [write_status_0, reset_function])
async def test_a_reset_unmaps_everything_before_it_is_answered(tmp_path: Path, reset: Callable[[Vm], None]) -> None:
    async with manager(tmp_path) as running:
        (other,) = await devices(running, 1)
        vm = await start_vm(running)
        mine = await blocking(lambda: vm.alloc(CHUNK, grants=[(ATTACH_RW, None)]))
        shared = await blocking(lambda: other.alloc(3 * CHUNK, grants=[(ATTACH_RW, None)]))
        held = await blocking(lambda: other.attach(mine.token))
        theirs = await blocking(lambda: vm.attach(shared.token))
        shared.view[:3] = mine.view[:3] = b"abc"
        mapped = {(told.packet.offset, told.packet.length) for told in vm.agent.of_type(MAP)}
        assert len(mapped) == 2
        vm.agent.hold(UNMAP)
        async with meanwhile(lambda: reset(vm)) as results:
            await blocking(vm.agent.wait_asked)
            await works(other)
            assert results == []
            vm.agent.let_go()
        assert results == [None]
        assert {(told.packet.offset, told.packet.length) for told in vm.agent.of_type(UNMAP)} == mapped
        assert len(vm.agent.window) == 0
        assert (bytes(mine.view[:3]), bytes(theirs.view[:3])) == (bytes(3), bytes(3))
        assert (bytes(held.view[:3]), bytes(shared.view[:3])) == (b"abc", b"abc")
        await close(vm, other)


async def test_the_next_driver_of_a_guest_finds_the_same_agent(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        agent = FakeAgent(device_path(running))
        client = await blocking(lambda: Client.connect(device_path(running)))
        first = await blocking(lambda: Device(Lent(client, "first", agent.window)))
        region = await blocking(lambda: first.alloc(CHUNK))
        region.view[:3] = b"abc"
        await close(first)
        await blocking(client.reset)
        assert len(agent.of_type(UNMAP)) == 1
        transport = GuestTransport(client, "second", agent.window)
        transport._next_iova <<= 1
        second = await blocking(lambda: Device(transport))
        again = await blocking(lambda: second.alloc(2 * CHUNK))
        assert bytes(again.view[:3]) == bytes(3)
        assert [told.packet.length for told in agent.of_type(MAP)] == [CHUNK, 2 * CHUNK]
        assert len(agent.of_type(HELLO)) == 1
        await close(second)
        agent.close()


class Lent(GuestTransport):
    """A transport that leaves its client open, as QEMU does when the guest's driver goes."""

    def close(self) -> None:
        self._on_gone = None
        self._unwatch()


# -- doorbells, directory


def eventfd_id(fd: int) -> str:
    """Which eventfd it is, whatever its numbers (proc(5))."""
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return next(line for line in lines if line.startswith("eventfd-id:"))


async def test_an_agent_gets_no_doorbells_and_a_peer_that_maps_rings_the_vms_vector(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        process, third = await devices(running, 2)
        vm = await start_vm(running)
        one = await blocking(lambda: process.alloc(CHUNK, grants=[(ATTACH_RW, None)]))
        two = await blocking(lambda: vm.attach(one.token, interrupt=True))
        await eventually(lambda: wired(one) is not None)
        await settled(running, one, two)
        assert two.binding is not None
        assert eventfd_id(wired(one)) == eventfd_id(two.binding.fd)
        stats = running.domains["default"].registry.devices
        before = {device.devid: stats[device.devid].stats.doorbells for device in (process, vm)}
        await rings(one, two)
        assert stats[process.devid].stats.doorbells == before[process.devid]
        assert wired(two) is None
        await rings(two, one)
        assert stats[vm.devid].stats.doorbells == before[vm.devid] + 1

        three = await blocking(lambda: third.attach(one.token, interrupt=True))
        await eventually(lambda: wired(three) is not None and len(running._shared.fan_out) == 2)
        await settled(running, one, two, three)
        assert eventfd_id(wired(one)) != eventfd_id(two.binding.fd)
        await rings(one, two, three)
        await rings(two, one, three)
        three.close()
        await eventually(lambda: len(running._shared.fan_out) == 0)
        await settled(running, one, two)
        assert eventfd_id(wired(one)) == eventfd_id(two.binding.fd)
        assert {told.type for told in vm.agent.told} <= {HELLO, MAP, UNMAP}
        await close(vm, process, third)


async def test_two_vms_ring_each_other_by_register(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        a, b = await start_vm(running), await start_vm(running)
        one = await blocking(lambda: a.alloc(CHUNK, grants=[(ATTACH_RW, None)]))
        two = await blocking(lambda: b.attach(one.token, interrupt=True))
        await rings(one, two)
        await rings(two, one)
        assert wired(one) is wired(two) is None
        types = {told.type for vm in (a, b) for told in vm.agent.told}
        assert types == {HELLO, MAP}
        await close(a, b)


LOOPBACK = bytes(10) + b"\xff\xff\x7f\0\0\1"
ELSEWHERE = bytes(10) + b"\xff\xff\x0a\0\0\1"


async def test_loopback_of_a_vm_is_not_that_of_another_or_of_the_host(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        (process,) = await devices(running, 1)
        a, b = await start_vm(running), await start_vm(running)
        opened = (a, b, process)
        assert all(device.directory is not None for device in opened)
        await blocking(lambda: a.directory.publish(LOOPBACK, 80, 0))
        await blocking(lambda: a.directory.publish(ELSEWHERE, 80, 0))

        async def found(address: bytes) -> list[int]:
            return [await blocking(lambda device=device: device.directory.lookup(address, 80, 0)) for device in opened]

        assert await found(LOOPBACK) == [1, 0, 0]
        assert await found(ELSEWHERE) == [1, 1, 1]
        ends = FourTuple(LOOPBACK, 1000, LOOPBACK, 80, 0)
        assert await blocking(lambda: a.directory.intend(ends, 5))
        assert not await blocking(lambda: process.directory.intend(ends, 6))
        scopes = running.domains["default"].registry.directory.members
        assert scopes[a.devid].scope == ("device", a.devid)
        assert scopes[process.devid].scope == ("namespace", (os.stat("/proc/self/ns/net").st_dev, *_namespace()))
        await close(a, b, process)


def _namespace() -> Iterable[int]:
    return (os.stat("/proc/self/ns/net").st_ino,)


async def test_status_says_that_a_client_with_an_agent_maps(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        vm = await start_vm(running)
        trapped = await blocking(lambda: connect(running, channel=False))
        shown = {device["devid"]: device["client"]["maps"] for device in running.status()["domains"][0]["devices"]}
        assert sorted(shown.values()) == [False, True]
        await close(vm, trapped)


async def test_only_a_client_that_maps_nothing_is_told_that_its_window_is_trapped(tmp_path: Path) -> None:
    def offers_trapped(client: Client) -> bool:
        client.region_write(0, 0, bytes(4))  # device_feature_select
        return bool(int.from_bytes(client.region_read(0, 4, 4), "little") >> IsmFeature.TRAPPED & 1)

    async with manager(tmp_path) as running:
        with await blocking(lambda: Client.connect(device_path(running))) as client:
            assert await blocking(lambda: offers_trapped(client))
        agent = await blocking(lambda: FakeAgent(device_path(running)))
        with await blocking(lambda: Client.connect(device_path(running))) as client:
            assert not await blocking(lambda: offers_trapped(client))
        agent.close()
        process = await blocking(lambda: Device(VfioUserTransport.connect(device_path(running))))
        assert process.atomic
        await blocking(process.close)

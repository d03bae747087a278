# SPDX-License-Identifier: Apache-2.0
"""A hostile guest at a real manager's socket: any writes to configuration space, BARs, queues and doorbells, any
messages of its VMM, any DMA addresses, any answers on its map channel.

Whatever it does, the manager goes on, and its neighbours, two devices that share a region it was granted nothing of,
are served as before and hear nothing of it.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from fake_agent import FakeAgent, GuestTransport, Told
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from manager_rig import ATTACH_RW, blocking, close, devices, manager, readable

from ism.driver.device import Device
from ism.errors import DeviceGoneError, IsmError, LocalProtocolError
from ism.ids import Token
from ism.manager.server import Manager
from ism.memory import Mapping, create_memfd
from ism.vfio_user import payloads
from ism.vfio_user.client import Client
from ism.vfio_user.errors import VfioUserError
from ism.vfio_user.fds import Fd
from ism.vfio_user.map_channel import client_capability, take_channel
from ism.vfio_user.map_channel_wire import REPLY, Packet
from ism.vfio_user.payloads import DmaMap, DmaUnmap, IrqAction, IrqData, IrqSetFixed, RegionWrite
from ism.vfio_user.wire import Command
from ism.virtio.pci import CommonCfg, Status
from ism.virtio.queue import Desc, DescFlag

CHUNK = 65536
WINDOW = 16 << 20
SERVED_WITHIN_S = 10.0
PAGE = 4096
BASE = 0x100000
"""Where the guest's memory begins, as its device sees it."""
MAPPED_PAGES = 4
GUARD_PAGES = 4
END = BASE + MAPPED_PAGES * PAGE
GUARD = b"\xa5" * GUARD_PAGES * PAGE
DESC, DRIVER, DEVICE, OUT, IN = BASE, BASE + 0x400, BASE + 0x800, BASE + 0x1000, BASE + 0x2000
EVENT_QUEUE = 0x3000
ENTRIES = 8
CONFIG = 7
PCI_COMMAND = 4
NOTIFY = 0x3000
ALLOC = struct.pack("<BBQ", 0, 0, CHUNK)


def examples(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


class Neighbours:
    """Two devices and the region that they share. `check` says whether anything of theirs has changed."""

    def __init__(self, running: Manager, victim: Device, peer: Device) -> None:
        self.running, self.victim, self.peer = running, victim, peer
        self.region = victim.alloc(CHUNK, grants=[(ATTACH_RW, peer.devid)])
        self.seen_by_peer = peer.attach(self.region.token, interrupt=True)
        self.content = bytes(range(256)) * (CHUNK // 256)
        self.region.view[:] = self.content
        self.events: list[object] = []
        for device in (victim, peer):
            assert device._events is not None
            device._events._deliver = self.events.append
        self._settle()
        self.before = self._state()

    def _settle(self) -> None:
        """Wiring rings once more than anybody asked for."""
        for device in (self.victim, self.peer):
            device.alloc(CHUNK).close()
            self._await_releases(device)
        for region in (self.region, self.seen_by_peer):
            while readable(region.fileno()):
                os.eventfd_read(region.fileno())
        self.events.clear()

    def _await_releases(self, device: Device) -> None:
        """Commands of a device are completed in order. This one is refused to the peer, and changes nothing."""
        device.control.grant(self.region.token, ATTACH_RW, self.peer.devid).wait()

    def _state(self) -> Sequence[object]:
        registry = self.running.domains["default"].registry
        region = registry.regions[self.region.token]
        hosts = self.running.domains["default"].devices
        counters = [dict(hosts[device.devid].function.stats) for device in (self.victim, self.peer)]
        for counted in counters:
            for name in ("commands", "refused_commands"):
                counted.pop(name)
        return (
            region.default,
            dict(region.grants),
            {devid: (held.rights, held.vector) for devid, held in region.holders.items()},
            region.alive,
            region.sealed,
            [registry.devices[device.devid].account.bytes for device in (self.victim, self.peer)],
            counters,
        )

    def check(self) -> None:
        started = time.monotonic()
        for device in (self.victim, self.peer):
            own = device.alloc(CHUNK)
            assert bytes(own.view) == bytes(CHUNK)
            own.close()
            self._await_releases(device)
            assert device.gone is None
        assert time.monotonic() - started < SERVED_WITHIN_S
        assert bytes(self.region.view) == self.content
        assert self.events == []
        assert not readable(self.region.fileno())
        assert not readable(self.seen_by_peer.fileno())
        now = self._state()
        for was, found in zip(self.before, now, strict=True):
            assert was == found


class Hostile:
    """A guest and its VMM in one: sends messages, has some memory, asks nobody. A refusal is nothing to it.

    Its memory file has guard pages on both sides of what it maps for its device.
    """

    def __init__(self, path: Path, *, channel: bool) -> None:
        """Args: `channel`: whether it asks for the map channel, as processes do and QEMU does not."""
        self.client = Client.connect(path, capabilities=client_capability() if channel else None)
        self.agent = FakeAgent(path, channel=take_channel(self.client)) if channel else None
        self.alive = True
        self.memory = Fd(create_memfd("guest", (MAPPED_PAGES + 2 * GUARD_PAGES) * PAGE))
        self.ram = Mapping.of_file((MAPPED_PAGES + 2 * GUARD_PAGES) * PAGE, self.memory.fileno(), 0).view
        self.ram[: len(GUARD)] = GUARD
        self.ram[-len(GUARD) :] = GUARD
        self.avail = [0, 0]
        self.fds = {
            "eventfd": Fd(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)),
            "memory": self.memory,
            "null": Fd(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)),
        }

    def send(self, command: int, payload: bytes, fds: Iterable[str] = ()) -> bytes | None:
        """One message; None when it was refused, or the manager has hung up."""
        if not self.alive:
            return None
        try:
            reply = self.client._channel.request(command, payload, [self.fds[kind] for kind in fds])
        except DeviceGoneError:
            self.alive = False
            return None
        except (VfioUserError, LocalProtocolError):
            return None
        for fd in reply.fds:
            fd.close()
        return bytes(reply.payload)

    def write(self, region: int, offset: int, data: bytes) -> None:
        self.send(Command.REGION_WRITE, payloads.REGION_ACCESS.pack(offset, region, len(data)) + data)

    def read(self, region: int, offset: int, count: int) -> bytes:
        reply = self.send(Command.REGION_READ, payloads.REGION_ACCESS.pack(offset, region, count))
        return reply[payloads.REGION_ACCESS.size :] if reply is not None else b""

    def put(self, name: str, value: int) -> None:
        info = CommonCfg.info(name)
        width = struct.calcsize(info.fmt)
        self.write(0, info.offset, (value & (1 << 8 * width) - 1).to_bytes(width, "little"))

    @property
    def status(self) -> int:
        return self.read(0, CommonCfg.offset_of("device_status"), 1)[0]

    def map(self, flags: int = 3, fds: Iterable[str] = ("memory",)) -> None:
        size = MAPPED_PAGES * PAGE
        self.send(Command.DMA_MAP, DmaMap(flags=flags, offset=GUARD_PAGES * PAGE, address=BASE, size=size).pack(), fds)

    def store(self, address: int, data: bytes) -> None:
        """Into its own memory, as far as that reaches."""
        at = address - BASE + GUARD_PAGES * PAGE
        if 0 <= at <= len(self.ram) - len(data):
            self.ram[at : at + len(data)] = data

    def queue(self, index: int, desc: int, driver: int, device: int, size: int = ENTRIES) -> None:
        self.put("queue_select", index)
        self.put("queue_size", size)
        self.put("queue_desc", desc)
        self.put("queue_driver", driver)
        self.put("queue_device", device)
        self.put("queue_enable", 1)

    def start(self, *, desc: int = DESC, driver: int = DRIVER, device: int = DEVICE) -> None:
        """Initialise the device as virtio orders, with queues wherever it is told."""
        self.write(CONFIG, PCI_COMMAND, b"\6\0")  # memory and bus master
        for status in (Status.RESET, Status.ACKNOWLEDGE, Status.ACKNOWLEDGE | Status.DRIVER):
            self.put("device_status", status)
        for word, accepted in ((0, 0x10003), (1, 1)):
            self.put("driver_feature_select", word)
            self.put("driver_feature", accepted)
        self.put("device_status", Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
        self.queue(0, desc, driver, device)
        self.queue(1, DESC + EVENT_QUEUE, DRIVER + EVENT_QUEUE, DEVICE + EVENT_QUEUE)
        self.put("device_status", 0xF)
        self.avail = [0, 0]

    def offer(self, which: int, head: int, *, driver: int = DRIVER) -> None:
        at = driver + which * EVENT_QUEUE
        self.store(at + 4 + 2 * (self.avail[which] % ENTRIES), struct.pack("<H", head))
        self.avail[which] = (self.avail[which] + 1) & 0xFFFF
        self.store(at + 2, struct.pack("<H", self.avail[which]))

    def command(self, data: bytes) -> None:
        """Put a command in the control queue and notify."""
        self.prepare(data)
        self.notify()

    def notify(self) -> None:
        self.write(0, NOTIFY, b"\0\0")

    def prepare(self, data: bytes, *, desc: int = DESC, driver: int = DRIVER, out: int = OUT, into: int = IN) -> None:
        """Put a command in the control queue, wherever its parts are to be."""
        self.store(out, data)
        self.store(desc, Desc(addr=out, len=len(data), flags=DescFlag.NEXT, next=1).pack())
        self.store(desc + 16, Desc(addr=into, len=256, flags=DescFlag.WRITE, next=0).pack())
        self.offer(0, 0, driver=driver)

    def guards(self) -> tuple[bytes, bytes]:
        """What is before and behind the part of its memory that is mapped for the device."""
        return bytes(self.ram[: len(GUARD)]), bytes(self.ram[-len(GUARD) :])

    def close(self) -> None:
        self.client.close()
        if self.agent is not None:
            self.agent.close()
        for fd in self.fds.values():
            fd.close()


@contextlib.contextmanager
def hostile(running: Manager, *, channel: bool = False) -> Iterator[Hostile]:
    guest = Hostile(running.run_dir / "device.sock", channel=channel)
    try:
        yield guest
    finally:
        guest.close()


# -- anything at all

u64 = st.integers(0, (1 << 64) - 1)
addresses = st.one_of(
    st.sampled_from([DESC, DRIVER, DEVICE, OUT, IN, END - 16, END - 2, END, BASE - PAGE, 0, (1 << 64) - 16]),
    st.integers(BASE - PAGE, END + PAGE),
    u64,
)
data = st.binary(min_size=1, max_size=16)
registers = st.one_of(
    st.sampled_from(["device_status", "driver_feature", "driver_feature_select", "config_msix_vector"]),
    st.sampled_from(["queue_select", "queue_size", "queue_enable", "queue_msix_vector", "queue_reset"]),
    st.sampled_from(["queue_desc", "queue_driver", "queue_device"]),
)
values = st.one_of(st.sampled_from([0, 1, 2, 3, 4, 8, 0xB, 0xF, 0x40, 0x80, 0xFF, 0xFFFF]), u64)
descriptors = st.tuples(
    addresses,
    st.one_of(st.integers(0, 64), st.sampled_from([0xFFFFFFFF, 0x10000])),
    st.one_of(st.integers(0, 7), st.integers(0, 0xFFFF)),
    st.one_of(st.integers(0, 9), st.integers(0, 0xFFFF)),
)
heads = st.one_of(st.integers(0, 8), st.integers(0, 0xFFFF))
pages = st.integers(-8, 16)
fd_lists = st.lists(st.sampled_from(["eventfd", "eventfd", "memory", "null"]), max_size=4)
THEIRS: Final = object()
"""The token of the neighbours' region, which the guest is taken to have learned."""
commands = st.tuples(
    st.one_of(
        st.sampled_from([b"\0\0", b"\1\0", b"\2\0", b"\3\0", b"\3\1", b"\4\0"]), st.binary(min_size=2, max_size=2)
    ),
    st.one_of(st.just(THEIRS), u64, st.integers(0, 1 << 20)),
    st.one_of(st.builds(lambda *v: struct.pack("<QQ", *v), st.integers(0, 31), u64), st.binary(max_size=32)),
)
intrusions = st.tuples(
    st.sampled_from([b"\1\0", b"\2\0", b"\3\0", b"\3\1", b"\4\0"]),
    st.just(THEIRS),
    st.builds(lambda *v: struct.pack("<QQ", *v), st.integers(0, 31), u64),
)

operations = st.one_of(
    st.tuples(st.just("write"), st.just(CONFIG), st.integers(0, 260), data),
    st.tuples(st.just("write"), st.just(CONFIG), st.sampled_from([4, 0x10, 0x14, 0x18, 0x20, 0x24, 0x30, 0x3C]), data),
    st.tuples(st.just("write"), st.integers(0, 9), st.one_of(st.integers(0, 0x4010), u64), data),
    st.tuples(st.just("write"), st.just(2), st.integers(0, WINDOW // CHUNK + 4).map(lambda slot: 4 * slot), data),
    st.tuples(st.just("write"), st.just(4), st.integers(0, WINDOW), data),
    st.tuples(st.just("read"), st.integers(0, 9), st.one_of(st.integers(0, 0x4010), u64), st.integers(0, 300)),
    st.tuples(st.just("multi"), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 0x4010), data), max_size=4)),
    st.tuples(st.just("put"), registers, values),
    st.tuples(st.just("put"), st.sampled_from(["queue_desc", "queue_driver", "queue_device"]), addresses),
    st.tuples(st.just("queue"), st.integers(0, 2), addresses, addresses, addresses, st.sampled_from([1, 8, 64, 65])),
    st.tuples(st.just("start")),
    st.tuples(st.just("notify"), st.integers(0, 2)),
    st.tuples(st.just("chains"), st.integers(0, 1), st.lists(descriptors, max_size=8), st.lists(heads, max_size=9)),
    st.tuples(st.just("command"), commands),
    st.tuples(st.just("command"), intrusions),
    st.tuples(
        st.just("irqs"),
        st.one_of(st.sampled_from([a | d for a in (8, 16, 32) for d in (1, 2, 4)]), st.integers(0, 64)),
        st.integers(0, 5),
        st.one_of(st.integers(0, 17), st.just(0xFFFFFFFF)),
        st.one_of(st.integers(0, 17), st.just(0xFFFFFFFF)),
        st.binary(max_size=20),
        fd_lists,
    ),
    st.tuples(st.just("vector"), st.integers(0, 15)),
    st.tuples(
        st.just("dma"),
        st.integers(0, 4),
        pages,
        st.one_of(pages, st.just(1 << 51)),
        pages,
        fd_lists.map(lambda x: x[:1]),
    ),
    st.tuples(st.just("undma"), st.integers(0, 3), pages, pages),
    st.tuples(st.just("reset")),
    st.tuples(st.just("message"), st.sampled_from(Command), st.binary(max_size=48), fd_lists),
)


def u64_of(pages_: int) -> int:
    return pages_ * PAGE % (1 << 64)


def perform(guest: Hostile, operation: tuple[Any, ...], theirs: Token) -> None:
    verb, *arguments = operation
    match verb, arguments:
        case "write", (region, offset, written):
            guest.write(region, offset, written)
        case "read", (region, offset, count):
            guest.read(region, offset, count)
        case "multi", (writes,):
            writes = [RegionWrite(region, offset, written[:8]) for region, offset, written in writes]
            guest.send(Command.REGION_WRITE_MULTI, payloads.encode_region_write_multi(writes))
        case "put", (name, value):
            guest.put(name, value)
        case "queue", (index, desc, driver, device, size):
            guest.queue(index, desc, driver, device, size)
        case "start", ():
            guest.start()
        case "notify", (index,):
            guest.write(0, NOTIFY + 4 * index, b"\1\0")
        case "chains", (which, table, ring_heads):
            for index, (address, length, flags, following) in enumerate(table):
                described = Desc(addr=address, len=length, flags=flags, next=following).pack()
                guest.store(DESC + which * EVENT_QUEUE + 16 * index, described)
            for head in ring_heads:
                guest.offer(which, head)
            guest.write(0, NOTIFY + 4 * which, b"\1\0")
        case "command", ((header, token, rest),):
            guest.command(header + struct.pack("<Q", theirs if token is THEIRS else token) + rest)
        case "irqs", (flags, index, start, count, rest, fds):
            fixed = IrqSetFixed(argsz=20 + len(rest), flags=flags, index=index, start=start, count=count)
            guest.send(Command.DEVICE_SET_IRQS, fixed.pack() + rest, fds)
        case "vector", (vector,):
            fixed = IrqSetFixed(argsz=20, flags=IrqAction.TRIGGER | IrqData.EVENTFD, index=2, start=vector, count=1)
            guest.send(Command.DEVICE_SET_IRQS, fixed.pack(), ["eventfd"])
        case "dma", (flags, at, size, offset, fds):
            request = DmaMap(
                flags=flags, offset=u64_of(offset), address=(BASE + u64_of(at)) % (1 << 64), size=u64_of(size)
            )
            guest.send(Command.DMA_MAP, request.pack(), fds)
        case "undma", (flags, at, size):
            request = DmaUnmap(flags=flags, address=(BASE + u64_of(at)) % (1 << 64), size=u64_of(size))
            guest.send(Command.DMA_UNMAP, request.pack())
        case "reset", ():
            guest.send(Command.DEVICE_RESET, b"")
        case "message", (number, payload, fds):
            guest.send(number, payload, fds)
        case _:
            raise AssertionError(operation)


async def with_neighbours(tmp_path: Path, attack: Any, text: str = "") -> None:
    """Run a property against a manager with two neighbours that outlives all examples."""
    async with manager(tmp_path, text) as running:
        victim, peer = await devices(running, 2)
        neighbours = await blocking(lambda: Neighbours(running, victim, peer))
        await blocking(lambda: attack(running, neighbours))
        await close(victim, peer)


async def test_whatever_a_guest_does_its_neighbours_are_served_and_hear_nothing_of_it(tmp_path: Path) -> None:
    def attack(running: Manager, neighbours: Neighbours) -> None:
        @examples(250)
        @given(st.booleans(), st.booleans(), st.lists(operations, min_size=10, max_size=40))
        def property(channel: bool, started: bool, script: list[tuple[Any, ...]]) -> None:
            with hostile(running, channel=channel) as guest:
                if started:
                    guest.map()
                    guest.start()
                for operation in script:
                    perform(guest, operation, neighbours.region.token)
                neighbours.check()

        property()

    await with_neighbours(tmp_path, attack)


async def test_a_guest_that_knows_a_token_can_do_nothing_to_a_region_it_was_not_granted(tmp_path: Path) -> None:
    def attack(running: Manager, neighbours: Neighbours) -> None:
        with hostile(running) as guest:
            guest.map()
            guest.start()
            token = struct.pack("<Q", neighbours.region.token)
            for header, rest in (
                (b"\1\0", bytes(8)),
                (b"\1\0", struct.pack("<Q", 1)),
                (b"\2\0", b""),
                (b"\3\0", struct.pack("<Q", 0)),
                (b"\3\0", struct.pack("<Q", 15)),
                (b"\3\1", struct.pack("<QQ", 16, neighbours.peer.devid)),
                (b"\4\0", struct.pack("<Q", 1)),
            ):
                guest.store(IN, b"\xff")
                guest.command(header + token + rest)
                (ack,) = guest.ram[IN - BASE + len(GUARD) : IN - BASE + len(GUARD) + 1]
                assert ack in (2, 100, 101, 102, 255)
            for slot in range(WINDOW // CHUNK):
                guest.write(2, 4 * slot, b"\1\0\0\0")
                guest.write(4, slot * CHUNK, b"hostile!")
            assert guest.status == 0xF
            neighbours.check()

    await with_neighbours(tmp_path, attack)


# -- DMA

outside = st.one_of(
    st.sampled_from([0, BASE - PAGE, BASE - 16, END, END + 16, END + PAGE, 1 << 63, (1 << 64) - PAGE]),
    st.integers(0, BASE // 16 - 16).map(lambda n: 16 * n),
    st.integers(END // 16, (1 << 60) - 512).map(lambda n: 16 * n),
)
faults = st.one_of(
    st.tuples(st.sampled_from(["desc", "driver", "device", "out", "into"]), outside),
    st.tuples(st.just("desc"), st.just(END - 16)),
    st.tuples(st.just("driver"), st.sampled_from([END - 2, END - 4])),
    st.tuples(st.just("device"), st.just(END - 4)),
    st.tuples(st.just("out"), st.integers(END - len(ALLOC) + 1, END - 1)),
    st.tuples(st.just("into"), st.integers(END - 32, END - 1)),
    st.tuples(st.just("into"), st.integers(BASE - 256, BASE - 1)),
)
"""One of the addresses that an ALLOC needs, and a place that the guest's map does not cover, or not to the end."""


async def test_an_address_outside_the_maps_is_refused_and_nothing_there_is_touched(tmp_path: Path) -> None:
    def attack(running: Manager, neighbours: Neighbours) -> None:
        with hostile(running) as guest:
            guest.map()

            @examples(150)
            @example(("desc", 0))
            @given(faults)
            def property(fault: tuple[str, int]) -> None:
                name, address = fault
                where = {name: address}
                areas = {key: value for key, value in where.items() if key in ("desc", "driver", "device")}
                guest.start(**areas)
                assert not guest.status & Status.NEEDS_RESET
                at = {key: value for key, value in where.items() if key != "device"}
                guest.prepare(ALLOC, **at)
                unmapped = guest.guards()
                guest.notify()
                assert guest.status & Status.NEEDS_RESET
                assert guest.guards() == unmapped
                guest.start()
                guest.command(ALLOC)
                assert guest.ram[IN - BASE + len(GUARD)] == 0
                assert guest.guards() == unmapped

            property()
            neighbours.check()

    await with_neighbours(tmp_path, attack)


@pytest.mark.parametrize(("flags", "what"), [(0, "nothing"), (1, "read"), (2, "write")])
async def test_a_map_is_used_only_for_what_it_allows(tmp_path: Path, flags: int, what: str) -> None:
    def attack(running: Manager, neighbours: Neighbours) -> None:
        with hostile(running) as guest:
            guest.map(flags)
            before = bytes(guest.ram)
            guest.start()
            guest.command(ALLOC)
            assert guest.status & Status.NEEDS_RESET
            assert bytes(guest.ram[IN - BASE + len(GUARD) :]) == before[IN - BASE + len(GUARD) :], what
            neighbours.check()

    await with_neighbours(tmp_path, attack)


@pytest.mark.parametrize("how", ["unmapped", "never-mapped", "no-descriptor"])
async def test_memory_that_is_not_mapped_or_no_more_is_not_reached(tmp_path: Path, how: str) -> None:
    def attack(running: Manager, neighbours: Neighbours) -> None:
        with hostile(running) as guest:
            if how != "never-mapped":
                guest.map(fds=["memory"] if how == "unmapped" else [])
            guest.start()
            if how == "unmapped":
                guest.command(ALLOC)
                assert not guest.status & Status.NEEDS_RESET
                guest.send(Command.DMA_UNMAP, DmaUnmap(flags=0, address=BASE, size=MAPPED_PAGES * PAGE).pack())
            guest.store(IN, b"\xee" * 64)
            guest.command(ALLOC)
            assert guest.status & Status.NEEDS_RESET
            assert bytes(guest.ram[IN - BASE + len(GUARD) :][:64]) == b"\xee" * 64
            neighbours.check()

    await with_neighbours(tmp_path, attack)


# -- map channels that lie

answers = st.lists(
    st.one_of(
        st.just(0),
        st.just(0),
        st.integers(1, 0xFFFFFFFF),
        st.binary(min_size=1, max_size=60),
        st.tuples(st.integers(0, 7), st.integers(-1, 1), st.integers(0, 1)),
    ),
    max_size=8,
)
"""Of each request: a status, garbage, or an answer of another type, number or version."""


def liar(script: list[Any]) -> Any:
    left = iter(script)

    def answer(told: Told) -> int | bytes:
        said = next(left, 0)
        if isinstance(said, tuple):
            type, ahead, version = said
            number = (told.packet.sequence + ahead) & 0xFFFFFFFF
            return Packet(type=type | REPLY, sequence=number, version=version).pack()
        assert isinstance(said, int | bytes)
        return said

    return answer


@pytest.mark.parametrize("kind", ["agent", "channel"])
async def test_whatever_is_said_on_a_map_channel_costs_its_own_device_only(tmp_path: Path, kind: str) -> None:
    def attack(running: Manager, neighbours: Neighbours) -> None:
        path = running.run_dir / "device.sock"

        @examples(40)
        @given(answers, st.lists(st.binary(min_size=1, max_size=60), max_size=1), st.integers(1, 4))
        def property(script: list[Any], unasked: list[bytes], regions: int) -> None:
            if kind == "agent":
                agent = FakeAgent(path)
                agent.answer = liar(script)
            with contextlib.ExitStack() as stack:
                try:
                    client = Client.connect(path, capabilities=None if kind == "agent" else client_capability())
                except IsmError:
                    stack.callback(agent.close)
                else:
                    if kind == "channel":
                        agent = FakeAgent(path, channel=take_channel(client))
                        agent.answer = liar(script)
                    stack.callback(agent.close)
                    misuse(client, agent, regions, unasked)
            neighbours.check()

        property()

    await with_neighbours(tmp_path, attack)


def misuse(client: Client, agent: FakeAgent, regions: int, unasked: list[bytes]) -> None:
    """Have regions come and go in the window of a guest."""
    try:
        device = Device(GuestTransport(client, "hostile", agent.window))
    except IsmError:
        client.close()
        return
    try:
        for _ in range(regions):
            with contextlib.suppress(IsmError):
                device.alloc(CHUNK).close()
        for said in unasked:
            with contextlib.suppress(OSError):
                agent.send(said)
        with contextlib.suppress(IsmError):
            device.alloc(CHUNK)
    finally:
        device.close()

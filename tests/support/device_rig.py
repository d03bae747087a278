# SPDX-License-Identifier: Apache-2.0
"""What the tests of `ism.device` share: guest memory, a host that carries out effects, a small driver.

The registry is the real one. The driver writes registers and rings as virtio 1.3 orders, or as a test tells it to.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from ism.device import bars
from ism.device.contract import (
    Effect,
    FunctionConfig,
    GuestMemoryError,
    Interrupt,
    MapChunks,
    PostEvent,
    UnmapChunks,
)
from ism.device.function import IsmFunction, Request, Work
from ism.ids import DevId, Gid
from ism.manager.quota import Quota
from ism.manager.registry import DomainRegistry
from ism.virtio.ism_spec import CommandClass, IsmFeature
from ism.virtio.pci import CommonCfg, Status
from ism.virtio.queue import Desc, DescFlag, avail_bytes, desc_bytes, used_bytes

CHUNK = 4096
WINDOW = 64 * CHUNK
VECTORS = 8
RAM_BASE = 0x100000
RAM_SIZE = 0x40000
BOTH = frozenset({IsmFeature.EVENT_IRQ, IsmFeature.EVENT_VQ})
VERSION_1 = 1 << 32
EVENT_VQ = 1 << IsmFeature.EVENT_VQ


class Ram:
    """Guest memory: one mapped range. `accesses` counts every call."""

    def __init__(self) -> None:
        self.data = bytearray(RAM_SIZE)
        self.accesses = 0

    def at(self, iova: int, length: int) -> int:
        self.accesses += 1
        if iova < RAM_BASE or iova + length > RAM_BASE + RAM_SIZE:
            raise GuestMemoryError(f"{iova:#x}+{length} is not mapped")
        return iova - RAM_BASE

    def read(self, iova: int, length: int) -> bytes:
        at = self.at(iova, length)
        return bytes(self.data[at : at + length])

    def write(self, iova: int, data: bytes | memoryview) -> None:
        at = self.at(iova, len(data))
        self.data[at : at + len(data)] = data

    def read_u16(self, iova: int) -> int:
        assert iova % 2 == 0
        return int.from_bytes(self.read(iova, 2), "little")

    def write_u16(self, iova: int, value: int) -> None:
        assert iova % 2 == 0
        self.write(iova, value.to_bytes(2, "little"))


class Ring:
    """The driver's side of one queue in guest memory: areas, and a plain way to put chains there."""

    def __init__(self, ram: Ram, base: int, size: int) -> None:
        self.ram, self.size = ram, size
        self.desc = base
        self.driver = self.desc + desc_bytes(size)
        self.device = -(-(self.driver + avail_bytes(size)) // 4) * 4
        self.end = self.device + used_bytes(size)
        self.next_desc = 0
        self.avail = 0
        self.used = 0

    def set_desc(self, index: int, addr: int, length: int, flags: int = 0, following: int = 0) -> None:
        self.ram.write(self.desc + 16 * index, Desc(addr=addr, len=length, flags=flags, next=following).pack())

    def offer(self, head: int) -> None:
        self.ram.write_u16(self.driver + 4 + 2 * (self.avail % self.size), head)
        self.avail = (self.avail + 1) & 0xFFFF
        self.ram.write_u16(self.driver + 2, self.avail)

    def add(self, readable: Iterable[tuple[int, int]], writable: Iterable[tuple[int, int]]) -> int:
        """Chain the pieces (address, length), readable ones first, and make the chain available."""
        pieces = [(a, n, 0) for a, n in readable] + [(a, n, DescFlag.WRITE) for a, n in writable]
        indices = [(self.next_desc + i) % self.size for i in range(len(pieces))]
        self.next_desc = (self.next_desc + len(pieces)) % self.size
        for i, (addr, length, flags) in enumerate(pieces):
            last = i + 1 == len(pieces)
            self.set_desc(
                indices[i], addr, length, flags if last else flags | DescFlag.NEXT, 0 if last else indices[i + 1]
            )
        self.offer(indices[0])
        return indices[0]

    def used_idx(self) -> int:
        return self.ram.read_u16(self.device + 2)

    def take_used(self) -> list[tuple[int, int]]:
        """New used elements: (head, bytes written)."""
        out = []
        while self.used != self.used_idx():
            raw = self.ram.read(self.device + 4 + 8 * (self.used % self.size), 8)
            out.append(struct.unpack("<II", raw))
            self.used = (self.used + 1) & 0xFFFF
        return out


class Host:
    """Carries out effects: a model of every device's window, interrupts that were raised, events that were posted."""

    def __init__(self) -> None:
        self.registry = DomainRegistry(Gid(0x51), CHUNK)
        self.functions: dict[int, IsmFunction] = {}
        self.windows: dict[int, dict[int, MapChunks]] = {}
        self.raised: list[tuple[int, int]] = []

    def add(
        self,
        devid: int,
        *,
        features: frozenset[int] = BOTH,
        vectors: int = VECTORS,
        window_size: int = WINDOW,
        **options: object,
    ) -> Driver:
        self.registry.add_device(DevId(devid), window_size, Quota(bytes=1 << 24, regions=50, attachments=50))
        config = FunctionConfig(
            gid=0x51,
            devid=DevId(devid),
            chunk_size=CHUNK,
            window_size=window_size,
            vectors=vectors,
            features=features,
            name=f"guest{devid}",
        )
        ram = Ram()
        function = IsmFunction(config, self.registry, ram, **options)  # type: ignore[arg-type]
        self.functions[devid] = function
        self.windows[devid] = {}
        return Driver(self, devid, function, ram)

    def carry_out(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case MapChunks():
                    assert effect.length % CHUNK == 0
                    self.windows[effect.devid][effect.offset] = effect
                case UnmapChunks():
                    window = self.windows[effect.devid]
                    for offset in [o for o in window if effect.offset <= o < effect.offset + effect.length]:
                        del window[offset]
                case Interrupt():
                    line = self.functions[effect.devid].route(effect.vector)
                    if line is not None:
                        self.raised.append((effect.devid, line))
                case PostEvent():
                    self.carry_out(self.functions[effect.devid].post_event(effect.payload))

    def finish(self, function: IsmFunction, request: Request) -> None:
        self.carry_out(request.effects)
        self.carry_out(function.complete(request))

    def do(self, function: IsmFunction, work: Work) -> None:
        while True:
            self.carry_out(work.effects)
            for request in work.requests:
                self.finish(function, request)
            if not work.more:
                return
            work = function.run()

    def take_raised(self) -> list[tuple[int, int]]:
        raised, self.raised = self.raised, []
        return raised


class Driver:
    """A guest: registers of one function, its rings, its memory."""

    def __init__(self, host: Host, devid: int, function: IsmFunction, ram: Ram) -> None:
        self.host, self.devid, self.function, self.ram = host, devid, function, ram
        self.control = Ring(ram, RAM_BASE, 64)
        self.events = Ring(ram, RAM_BASE + 0x2000, 64)
        self.buffers = RAM_BASE + 0x10000
        self.allow_dma(True)

    def allow_dma(self, allowed: bool) -> None:
        """Set or clear bus mastering in the PCI command register, as the guest's kernel does."""
        self.host.do(self.function, self.function.config_write(4, b"\6\0" if allowed else b"\2\0"))

    # registers

    def get(self, name: str) -> int:
        row = CommonCfg.info(name)
        return int.from_bytes(self.function.bar_read(0, row.offset, row.size), "little")

    def put(self, name: str, value: int) -> None:
        row = CommonCfg.info(name)
        self.host.do(self.function, self.function.bar_write(0, row.offset, value.to_bytes(row.size, "little")))

    @property
    def status(self) -> Status:
        return Status(self.get("device_status"))

    def add_status(self, bits: Status) -> Status:
        self.put("device_status", self.get("device_status") | bits)
        return self.status

    def offered(self) -> int:
        value = 0
        for word in (0, 1):
            self.put("device_feature_select", word)
            value |= self.get("device_feature") << 32 * word
        return value

    def accept(self, features: int) -> None:
        for word in (0, 1):
            self.put("driver_feature_select", word)
            self.put("driver_feature", features >> 32 * word & 0xFFFFFFFF)

    def configure_queue(self, index: int, ring: Ring, vector: int) -> None:
        self.put("queue_select", index)
        self.put("queue_size", ring.size)
        self.put("queue_msix_vector", vector)
        self.put("queue_desc", ring.desc)
        self.put("queue_driver", ring.driver)
        self.put("queue_device", ring.device)
        self.put("queue_enable", 1)

    def start(self, *, features: int | None = None, msix: bool = True) -> Driver:
        """Initialise in the order of virtio 1.3 section 3.1.1."""
        self.allow_dma(True)
        self.put("device_status", 0)
        if msix:
            self.host.carry_out(self.function.set_msix_enabled(True))
        self.add_status(Status.ACKNOWLEDGE)
        self.add_status(Status.DRIVER)
        self.accept(self.offered() if features is None else features)
        assert self.add_status(Status.FEATURES_OK) & Status.FEATURES_OK
        if msix:
            self.put("config_msix_vector", 0)
        for index, ring in enumerate([self.control, self.events][: self.get("num_queues")]):
            ring.avail = ring.used = 0
            self.ram.write(ring.driver, bytes(ring.device - ring.driver + used_bytes(ring.size)))
            self.configure_queue(index, ring, index + 1 if msix else 0xFFFF)
        assert self.add_status(Status.DRIVER_OK) & Status.DRIVER_OK
        return self

    # commands

    def notify(self, queue: int = 0) -> Work:
        return self.function.bar_write(0, bars.QUEUE_NOTIFY_OFFSET + 4 * queue, queue.to_bytes(2, "little"))

    def submit(self, readable: bytes, capacity: int, slot: int = 0) -> int:
        """Make one command available, its reply preset to 0xEE; returns the reply's address."""
        out = self.buffers + 0x2000 * slot
        self.ram.write(out, readable)
        self.ram.write(out + 0x1000, b"\xee" * 0x1000)
        self.control.add([(out, len(readable))] if readable else [], [(out + 0x1000, capacity)] if capacity else [])
        return out + 0x1000

    def command(self, readable: bytes, capacity: int = 1024) -> tuple[int, bytes]:
        """Run one command to its end; returns the used length and the whole reply buffer."""
        reply = self.submit(readable, capacity)
        self.host.do(self.function, self.notify())
        used = self.control.take_used()
        assert len(used) == 1
        return used[0][1], self.ram.read(reply, capacity)

    def alloc(self, size: int) -> tuple[int, list[tuple[int, int]]]:
        """ALLOC that must succeed; returns token and areas."""
        _, reply = self.command(struct.pack("<BBQ", CommandClass.ALLOC, 0, size))
        ack, token, num = struct.unpack_from("<BQQ", reply)
        assert ack == 0
        return token, list(struct.iter_unpack("<QQ", reply[17 : 17 + 16 * num]))

    def ack(self, readable: bytes) -> int:
        return self.command(readable)[1][0]

    def grant_all(self, token: int, permissions: int = 7) -> None:
        assert self.ack(struct.pack("<BBQQ", CommandClass.GRANT, 0, token, permissions)) == 0

    def attach(self, token: int, rw_perm: int = 0) -> list[tuple[int, int]]:
        """ATTACH that must succeed; returns the areas."""
        _, reply = self.command(struct.pack("<BBQI", CommandClass.ATTACH, 0, token, rw_perm))
        ack, num = struct.unpack_from("<BQ", reply)
        assert ack == 0
        return list(struct.iter_unpack("<QQ", reply[9 : 9 + 16 * num]))

    def bind(self, token: int, vector: int) -> int:
        return self.ack(struct.pack("<BBQQ", CommandClass.EVENT_VECTOR, 0, token, vector))

    def ring_doorbell(self, slot: int, data: bytes = b"\1") -> None:
        self.host.do(self.function, self.function.bar_write(2, 4 * slot, data))

    def post_event_buffers(self, count: int, size: int = 32) -> None:
        for _ in range(count):
            address = self.buffers + 0x10000 + 64 * self.events.next_desc
            self.events.add([], [(address, size)])
        self.host.do(self.function, self.notify(1))

    def take_events(self) -> list[bytes]:
        return [self.ram.read(self.buffers + 0x10000 + 64 * head, length) for head, length in self.events.take_used()]

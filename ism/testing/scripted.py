# SPDX-License-Identifier: Apache-2.0
"""The device's side of one virtqueue, by hand: it takes chains and gives back whatever a test wants, lies included.

Layout of the areas: virtio 1.3 section 2.7. Nothing is checked here: the driver under test must.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ism.driver.transport import DmaBuffer
from ism.driver.virtqueue import VirtQueue
from ism.memory import PAGE_SIZE, Mapping
from ism.virtio.queue import AVAIL_IDX, AVAIL_RING, USED_IDX, USED_RING, Desc, DescFlag, UsedElem

_FIRST_IOVA = 1 << 32


class QueueMemory:
    """The part of a transport that a queue needs. Attributes: `name`, `buffers` (by iova), `freed` (iovas)."""

    name = "scripted"

    def __init__(self) -> None:
        self.buffers: dict[int, DmaBuffer] = {}
        self.freed: list[int] = []
        self._next_iova = _FIRST_IOVA

    def dma_alloc(self, size: int) -> DmaBuffer:
        """Get zeroed memory for queues."""
        mapping = Mapping(-(-size // PAGE_SIZE) * PAGE_SIZE)
        buffer = DmaBuffer(self._next_iova, mapping)
        self._next_iova += mapping.length
        self.buffers[buffer.iova] = buffer
        return buffer

    def dma_free(self, buffer: DmaBuffer) -> None:
        """Take the buffer out of the device's reach."""
        del self.buffers[buffer.iova]
        self.freed.append(buffer.iova)

    def at(self, iova: int, length: int) -> memoryview:
        """View of guest memory. Raises KeyError outside of every buffer."""
        for base, buffer in self.buffers.items():
            if base <= iova and iova + length <= base + buffer.mapping.length:
                return buffer.mapping.view[iova - base : iova - base + length]
        raise KeyError(f"{length} bytes at {iova:#x}")


@dataclass(frozen=True, slots=True)
class TakenChain:
    """A chain as the device sees it: `readable` bytes, and where `capacity` bytes may be written."""

    head: int
    readable: bytes
    writable_iova: int
    capacity: int


class ScriptedDevice:
    """Reads the driver's areas of `queue` and writes the device's."""

    def __init__(self, memory: QueueMemory, queue: VirtQueue) -> None:
        self._memory, self._queue = memory, queue
        self._taken = 0
        self.used_idx = 0

    def take(self) -> list[TakenChain]:
        """Take what the driver has made available since the last time."""
        queue, found = self._queue, []
        (end,) = struct.unpack("<H", self._memory.at(queue.driver + AVAIL_IDX, 2))
        while self._taken != end:
            entry = queue.driver + AVAIL_RING + 2 * (self._taken % queue.size)
            (head,) = struct.unpack("<H", self._memory.at(entry, 2))
            self._taken = (self._taken + 1) & 0xFFFF
            found.append(self._chain(head))
        return found

    def _chain(self, head: int) -> TakenChain:
        readable, iova, capacity, index = b"", 0, 0, head
        while True:
            desc = Desc.unpack(self._memory.at(self._queue.desc + Desc.SIZE * index, Desc.SIZE))
            if desc.flags & DescFlag.WRITE:
                iova, capacity = desc.addr, desc.len
            else:
                readable += bytes(self._memory.at(desc.addr, desc.len))
            if not desc.flags & DescFlag.NEXT:
                return TakenChain(head, readable, iova, capacity)
            index = desc.next

    def answer(self, chain: TakenChain, data: bytes) -> None:
        """Write `data` and give the chain back, as a device should."""
        self._memory.at(chain.writable_iova, len(data))[:] = data
        self.give_back(chain.head, len(data))

    def give_back(self, head: int, written: int) -> None:
        """Put one element on the used ring and publish it."""
        at = self._queue.device + USED_RING + UsedElem.SIZE * (self.used_idx % self._queue.size)
        self._memory.at(at, UsedElem.SIZE)[:] = UsedElem(id=head, len=written).pack()
        self.publish(self.used_idx + 1)

    def publish(self, used_idx: int) -> None:
        """Write the used index."""
        self.used_idx = used_idx & 0xFFFF
        self._memory.at(self._queue.device + USED_IDX, 2)[:] = struct.pack("<H", self.used_idx)

    def set_used_flags(self, flags: int) -> None:
        """Write the flags of the device's area."""
        self._memory.at(self._queue.device, 2)[:] = struct.pack("<H", flags)

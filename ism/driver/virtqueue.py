# SPDX-License-Identifier: Apache-2.0
"""Driver side of a split virtqueue (virtio 1.3 section 2.7).

The queue owns one DMA buffer: descriptor area, driver area, device area, then one readable and one writable slot a
chain, so that no memory is allocated for a command. A chain is at most two descriptors: what the device reads, then
what it writes. Bytes of the used ring belong to the device; everything else is written here only.

Order (virtio 1.3 section 2.7.13). Before the store of the available index: descriptors, readable bytes, the preset
ack and the ring entry; after it, and ordered by a full barrier because it is a load behind a store, the look at the
used flags. Behind the load of the used index: the used elements and what the device wrote into the slots; a slot is
written again only after that load, which the same barrier orders. 16-bit indices are loaded and stored in one access
each: memoryviews of format "H" copy two aligned bytes, which every compiler makes one instruction. Hosts are
little-endian (x86-64, arm64). Not thread-safe: the caller holds a lock.

The device is this guest's own, but it may be broken: the used index and each element are read once and checked, work
is bounded by the chains under way, and a lie is RemoteProtocolError, after which the queue must not be used.
"""

from __future__ import annotations

from dataclasses import dataclass

from ism.driver.transport import DmaBuffer, Transport
from ism.errors import RemoteProtocolError
from ism.memory import PAGE_SIZE
from ism.virtio import barrier
from ism.virtio.queue import (
    AVAIL_IDX,
    AVAIL_RING,
    MAX_QUEUE_SIZE,
    USED_ALIGN,
    USED_F_NO_NOTIFY,
    USED_FLAGS,
    USED_IDX,
    USED_RING,
    Desc,
    DescFlag,
    UsedElem,
    avail_bytes,
    desc_bytes,
    used_bytes,
)


def usable_entries(device_size: int, wanted: int) -> int:
    """Queue size to use: the largest power of two that neither the device's size nor `wanted` is below; 0 for none.

    Source: virtio 1.3 section 4.1.4.3.2: queue_size is a power of two, a driver may write a smaller one.
    """
    most = min(device_size, wanted)
    return 1 << most.bit_length() - 1 if most else 0


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True, slots=True)
class Used:
    """A chain that the device gave back: its `slot`, and how many bytes it wrote."""

    slot: int
    written: int


class VirtQueue:
    """A split queue of `size` entries with `slots` chains of `out_size` readable and `in_size` writable bytes.

    A slot is free, busy (the device has its chain) or returned (by `reap`, until `release`).

    Attributes: `desc`, `driver`, `device` (iovas for the registers), `free` (slots that can be used).
    """

    def __init__(self, transport: Transport, size: int, *, slots: int, out_size: int, in_size: int) -> None:
        """Allocate the queue's memory. Raises TransportError (no DMA memory), ValueError."""
        if size & (size - 1) or not 2 <= size <= MAX_QUEUE_SIZE or not 1 <= slots <= size // (2 if out_size else 1):
            raise ValueError(f"{slots} chains do not fit a queue of {size} entries")
        self._transport = transport
        self.size, self.slots, self.out_size, self.in_size = size, slots, out_size, in_size
        avail_at = desc_bytes(size)
        used_at = _round_up(avail_at + avail_bytes(size), USED_ALIGN)
        self._slots_at = _round_up(used_at + used_bytes(size), 16)
        self._stride = _round_up(out_size + in_size, 16)
        self._buffer: DmaBuffer = transport.dma_alloc(_round_up(self._slots_at + self._stride * slots, PAGE_SIZE))
        iova, view = self._buffer.iova, self._buffer.mapping.view
        self.desc, self.driver, self.device = iova, iova + avail_at, iova + used_at
        self._view = view
        self._avail = view[avail_at : avail_at + avail_bytes(size)].cast("H")
        self._used = view[used_at : used_at + used_bytes(size)]
        # the used area is 4-aligned and of 4n + 2 bytes: flags and idx are its first two half words
        self._used_words = self._used[:USED_RING].cast("H")
        self._avail_idx = self._used_idx = 0
        self.free = list(range(slots - 1, -1, -1))
        self._busy: set[int] = set()

    def _out_at(self, slot: int) -> int:
        return self._slots_at + slot * self._stride

    def submit(self, slot: int, readable: bytes, writable: int, *, indirect_in: DmaBuffer | None = None) -> bool:
        """Make the chain in `slot` (taken from `free` by the caller) available to the device.

        Args: `readable` up to `out_size` bytes; `writable` how many bytes the device may write, up to `in_size`, or
            any length inside `indirect_in`, a buffer of the caller's own that is used instead of the slot's.
        Returns: whether the device must be notified.
        """
        assert len(readable) <= self.out_size
        assert slot not in self._busy
        self._busy.add(slot)
        at = self._out_at(slot)
        head = slot * 2 if self.out_size else slot
        in_addr = indirect_in.iova if indirect_in else self._buffer.iova + at + self.out_size
        index = head
        if self.out_size:
            self._view[at : at + len(readable)] = readable
            Desc(
                addr=self._buffer.iova + at, len=len(readable), flags=DescFlag.NEXT if writable else 0, next=head + 1
            ).pack_into(self._view, index * Desc.SIZE)
            index += 1
        if writable:
            Desc(addr=in_addr, len=writable, flags=DescFlag.WRITE, next=0).pack_into(self._view, index * Desc.SIZE)
        self._avail[AVAIL_RING // 2 + self._avail_idx % self.size] = head
        barrier.full()
        self._avail_idx = (self._avail_idx + 1) & 0xFFFF
        self._avail[AVAIL_IDX // 2] = self._avail_idx
        barrier.full()
        return not self._used_words[USED_FLAGS // 2] & USED_F_NO_NOTIFY

    def reap(self) -> list[Used]:
        """Take back what the device has finished. The slots cannot be used until `release`.

        Raises: RemoteProtocolError when the used ring holds what no device may write there.
        """
        done: list[Used] = []
        device_idx = self._used_words[USED_IDX // 2]
        if (device_idx - self._used_idx) & 0xFFFF > len(self._busy):
            raise RemoteProtocolError(
                f"the device returned {(device_idx - self._used_idx) & 0xFFFF} chains, {len(self._busy)} are under way",
                event="used index",
            )
        barrier.full()
        while self._used_idx != device_idx:
            elem = UsedElem.unpack(self._used, USED_RING + (self._used_idx % self.size) * UsedElem.SIZE)
            self._used_idx = (self._used_idx + 1) & 0xFFFF
            slot, odd = divmod(elem.id, 2) if self.out_size else (elem.id, 0)
            if odd or slot not in self._busy:
                raise RemoteProtocolError(f"the device returned chain {elem.id}, which it does not have", event="used")
            self._busy.discard(slot)
            done.append(Used(slot, elem.len))
        return done

    def written(self, slot: int, length: int) -> bytes:
        """Copy the first `length` bytes that the device wrote into the slot; never more than the slot holds."""
        at = self._out_at(slot) + self.out_size
        return bytes(self._view[at : at + min(length, self.in_size)])

    def preset(self, slot: int, value: int) -> None:
        """Set the first writable byte of a slot before it is submitted."""
        self._view[self._out_at(slot) + self.out_size] = value

    def release(self, slot: int) -> None:
        """Give the slot back for use."""
        self.free.append(slot)

    def close(self) -> None:
        """Free the memory; the device must have been reset."""
        self._transport.dma_free(self._buffer)

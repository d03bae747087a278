# SPDX-License-Identifier: Apache-2.0
"""The device side of one split virtqueue (virtio 1.3 section 2.7): chains out of it, used elements into it.

The driver's memory is hostile. Each ring word and each descriptor is read once into a local and checked; a chain is
walked for at most as many descriptors as the queue has, so a loop ends. What the driver may not do, and what it gives
that lies outside its DMA maps, raises `RemoteProtocolError`; the function then asks for a reset. Buffers are not held:
only addresses are kept, and guest memory is reached through `GuestMemory` at the moment of use.

The device writes the used area and nothing else; its own positions live here and are never read back.
"""

from __future__ import annotations

from dataclasses import dataclass

from ism.device.contract import GuestMemory, GuestMemoryError
from ism.errors import RemoteProtocolError
from ism.virtio import barrier
from ism.virtio.pci import NO_VECTOR
from ism.virtio.queue import (
    AVAIL_ALIGN,
    AVAIL_F_NO_INTERRUPT,
    AVAIL_FLAGS,
    AVAIL_IDX,
    AVAIL_RING,
    DESC_ALIGN,
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

ADDRESS_SPACE = 1 << 64
MAX_CHAIN_BYTES = 1 << 32
"""A chain may not be longer in total (virtio 1.3 section 2.7.5)."""


@dataclass(frozen=True, slots=True)
class Chain:
    """One descriptor chain: two byte streams, the readable one first, each scattered over (address, bytes) pieces."""

    head: int
    readable: tuple[tuple[int, int], ...]
    writable: tuple[tuple[int, int], ...]

    @property
    def readable_size(self) -> int:
        """Bytes the driver gave."""
        return _size(self.readable)

    @property
    def writable_size(self) -> int:
        """Bytes the device may write."""
        return _size(self.writable)


def _size(pieces: tuple[tuple[int, int], ...]) -> int:
    return pieces[0][1] if len(pieces) == 1 else sum(length for _, length in pieces)


_NEXT, _WRITE, _INDIRECT = int(DescFlag.NEXT), int(DescFlag.WRITE), int(DescFlag.INDIRECT)


class DeviceQueue:
    """One virtqueue: the registers the driver sets, and the device's place in the rings.

    Attributes: `index`, `max_size`; `size`, `vector`, `enabled`, `desc`, `driver`, `device` as in common configuration.
    """

    def __init__(self, index: int, max_size: int, memory: GuestMemory) -> None:
        """Make a disabled queue of at most `max_size` entries, a power of two."""
        assert max_size > 0
        assert not max_size & (max_size - 1)
        self.index = index
        self.max_size = max_size
        self._memory = memory
        self.reset()

    def reset(self) -> None:
        """Forget everything the driver set."""
        self.size = self.max_size
        self.vector = NO_VECTOR
        self.enabled = False
        self.desc = self.driver = self.device = 0
        self._avail_next = 0
        self._used_next = 0
        self._spared: bool | None = None  # what the flag in the driver's memory says is not known before it is set

    def enable(self) -> None:
        """Start using the areas the driver named. Raises RemoteProtocolError when an address cannot be one."""
        for name, address, align, length in (
            ("descriptor", self.desc, DESC_ALIGN, desc_bytes(self.size)),
            ("driver", self.driver, AVAIL_ALIGN, avail_bytes(self.size)),
            ("device", self.device, USED_ALIGN, used_bytes(self.size)),
        ):
            if address % align:
                raise self._error(f"{name} area at {address:#x} is not aligned to {align} bytes")
            if address + length > ADDRESS_SPACE:
                raise self._error(f"{name} area at {address:#x} does not fit the address space")
        self.enabled = True

    @property
    def used(self) -> int:
        """The used index: how many chains went back, modulo 65536."""
        return self._used_next

    def available(self) -> int:
        """Count the chains the driver has made available and the device has not popped.

        Raises: RemoteProtocolError when the driver claims more outstanding chains than the queue has entries, or the
            driver area is not mapped.
        """
        try:
            avail_idx = self._memory.read_u16(self.driver + AVAIL_IDX)
        except GuestMemoryError as exc:
            raise self._error(f"driver area: {exc}") from exc
        # chains popped but not pushed yet still occupy entries: the driver may not run ahead of the used index by more
        if (avail_idx - self._used_next) & 0xFFFF > self.size:
            raise self._error(f"available index {avail_idx} is more than {self.size} ahead of used {self._used_next}")
        count = (avail_idx - self._avail_next) & 0xFFFF
        if count > self.size:
            raise self._error(f"available index {avail_idx} went back behind {self._avail_next}")
        return count

    def pop(self) -> Chain | None:
        """Take the next chain, or None when the driver has made no other available.

        Raises: RemoteProtocolError when the ring or the chain is malformed or not mapped; the position then stays.
        Ordering: the available index is loaded before the ring entry and the descriptors it announces.
        """
        if not self.available():
            return None
        barrier.full()
        try:
            head = self._memory.read_u16(self.driver + AVAIL_RING + 2 * (self._avail_next % self.size))
            chain = self._walk(head)
        except GuestMemoryError as exc:
            raise self._error(f"ring or descriptor: {exc}") from exc
        self._avail_next = (self._avail_next + 1) & 0xFFFF
        return chain

    def _walk(self, head: int) -> Chain:
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        total = 0
        index = head
        for _ in range(self.size):
            if index >= self.size:
                raise self._error(f"descriptor index {index} in a queue of {self.size}")
            desc = Desc.unpack(self._memory.read(self.desc + Desc.SIZE * index, Desc.SIZE))
            flags = desc.flags
            if flags & _INDIRECT:
                raise self._error(f"descriptor {index} is indirect, which was not negotiated")
            total += desc.len
            if desc.len == 0 or total > MAX_CHAIN_BYTES or desc.addr + desc.len > ADDRESS_SPACE:
                raise self._error(f"descriptor {index} has address {desc.addr:#x} and length {desc.len}")
            if flags & _WRITE:
                writable.append((desc.addr, desc.len))
            elif writable:
                raise self._error(f"descriptor {index} is readable behind a writable one")
            else:
                readable.append((desc.addr, desc.len))
            if not flags & _NEXT:
                return Chain(head, tuple(readable), tuple(writable))
            index = desc.next
        raise self._error(f"chain from descriptor {head} has more than {self.size} descriptors: a loop")

    def read(self, chain: Chain, limit: int) -> bytes:
        """Copy the first `limit` bytes of the readable part, fewer when it is shorter. Raises RemoteProtocolError."""
        parts: list[bytes] = []
        try:
            for address, length in chain.readable:
                if limit <= 0:
                    break
                parts.append(self._memory.read(address, min(length, limit)))
                limit -= length
        except GuestMemoryError as exc:
            raise self._error(f"readable buffer: {exc}") from exc
        return b"".join(parts)

    def push(self, chain: Chain, data: bytes) -> bool:
        """Write `data` to the start of the chain's writable part and hand the chain back.

        Args: `data`: at most `chain.writable_size` bytes.
        Returns: whether the driver wants to be interrupted.
        Raises: RemoteProtocolError when the buffer or an area is not mapped; `used` tells whether the chain went back.
        Ordering: data and used element are stored before the used index; the used index is stored before the driver's
            flags are loaded, so that a driver which asks for interrupts and then looks at the index misses nothing.
        """
        assert len(data) <= chain.writable_size
        view = memoryview(data)
        try:
            for address, length in chain.writable:
                if not view:
                    break
                self._memory.write(address, view[:length])
                view = view[length:]
            element = UsedElem(id=chain.head, len=len(data)).pack()
            self._memory.write(self.device + USED_RING + UsedElem.SIZE * (self._used_next % self.size), element)
            barrier.full()
            used_next = (self._used_next + 1) & 0xFFFF
            self._memory.write_u16(self.device + USED_IDX, used_next)
            self._used_next = used_next
            barrier.full()
            flags = self._memory.read_u16(self.driver + AVAIL_FLAGS)
        except GuestMemoryError as exc:
            raise self._error(f"writable buffer or used ring: {exc}") from exc
        return not flags & AVAIL_F_NO_INTERRUPT

    def spare_notify(self, spared: bool) -> bool:
        """Tell the driver whether it may make chains available without a notification. Returns whether that is new.

        Raises: RemoteProtocolError when the device area is not mapped.
        Ordering: the flag is stored before the available index is loaded next. So a driver that publishes a chain and
            then looks at the flag either sees that it must notify, or its chain is seen by whoever looks once more.
        """
        if spared == self._spared:
            return False
        try:
            self._memory.write_u16(self.device + USED_FLAGS, USED_F_NO_NOTIFY if spared else 0)
        except GuestMemoryError as exc:
            raise self._error(f"used ring: {exc}") from exc
        self._spared = spared
        barrier.full()
        return True

    def _error(self, problem: str) -> RemoteProtocolError:
        return RemoteProtocolError(f"queue {self.index}: {problem}", state=f"queue {self.index}")

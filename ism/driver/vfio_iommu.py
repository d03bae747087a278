# SPDX-License-Identifier: Apache-2.0
"""Memory that a device behind an IOMMU can reach: pages of this process, mapped at addresses of the device's own.

Two kernel interfaces do the mapping, of which a host has one or both: a type1 container, and an address space of
iommufd. Both pin the pages and count them against the memlock limit. `IommuMemory` gives out buffers over either.

The pages are shared memory, so that a fork does not move them by copying on write. A forked child gets zero pages in
their place. (MADV_DONTFORK would leave holes there, into which the child's other memory falls before the interpreter
unmaps the range.)
Source: Linux include/uapi/linux/vfio.h (type1 API), include/uapi/linux/iommufd.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ism.driver.physical import HUGE_PAGE, HugeMapping
from ism.driver.transport import DmaBuffer
from ism.driver.vfio_uapi import (
    Capability,
    DmaFlag,
    DmaMap,
    DmaUnmap,
    IoasIovaRanges,
    IoasMap,
    IoasMapFlag,
    IoasUnmap,
    IommuInfoFlag,
    IovaRange,
    IovaRangeCapability,
    Request,
    Type1Info,
    capability_chain,
    table,
)
from ism.errors import DeviceGoneError, TransportError
from ism.memory import PAGE_SIZE, Mapping

_FIRST_IOVA = 1 << 32
_UNSAID = (IovaRange(start=_FIRST_IOVA, end=(1 << 39) - 1),)
"""What every IOMMU of a 64-bit machine can map, for kernels that do not say."""
_MOST_RANGES = 4096
_WORTH_HUGE_PAGES = HUGE_PAGE // 2


class Kernel(Protocol):
    """The system calls on VFIO's files. All raise OSError."""

    def open(self, path: Path) -> int:
        """Open for reading and writing, close-on-exec."""
        ...

    def close(self, fd: int) -> None:
        """Close."""
        ...

    def ioctl(self, fd: int, request: int, argument: bytearray | int) -> int:
        """ioctl(2); a bytearray is the structure that the kernel reads and fills."""
        ...

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """pread(2)."""
        ...

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """pwrite(2)."""
        ...

    def place(self, mapping: Mapping, at: int, length: int, fd: int, offset: int) -> None:
        """mmap(2) over a part of `mapping`."""
        ...


class Linux:
    """The kernel that this process runs on. Implements `Kernel`."""

    def open(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def close(self, fd: int) -> None:
        os.close(fd)

    def ioctl(self, fd: int, request: int, argument: bytearray | int) -> int:
        return fcntl.ioctl(fd, request, argument)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        return os.pread(fd, length, offset)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def place(self, mapping: Mapping, at: int, length: int, fd: int, offset: int) -> None:
        mapping.place(at, length, fd, offset)


def explain(name: str, what: str, exc: OSError, advice: str = "") -> TransportError:
    """Make the error for a system call that failed: DeviceGoneError when the function is no longer there."""
    kind = DeviceGoneError if exc.errno in (errno.ENODEV, errno.ENXIO) else TransportError
    return kind(f"{name}: {what}: {exc.strerror or exc}{'; ' if advice else ''}{advice}", exc.errno or 0)


class Iommu(Protocol):
    """One address space of a device. All raise OSError."""

    def ranges(self) -> Sequence[IovaRange]:
        """Which addresses may be mapped."""
        ...

    def map(self, iova: int, address: int, length: int) -> None:
        """Let the device read and write memory of this process at `iova`; the pages stay where they are from now on."""
        ...

    def unmap(self, iova: int, length: int) -> None:
        """Undo one `map`. When it returns the device cannot reach the pages any more."""
        ...


class Type1:
    """A container with a type1v2 IOMMU. Implements `Iommu`; the descriptor stays the caller's."""

    def __init__(self, kernel: Kernel, container: int) -> None:
        self._kernel, self._container = kernel, container

    def ranges(self) -> Sequence[IovaRange]:
        answer = bytearray(Type1Info().pack())
        self._kernel.ioctl(self._container, Request.VFIO_IOMMU_GET_INFO, answer)
        size = Type1Info.unpack(answer).argsz
        if size > len(answer):
            answer = bytearray(Type1Info(argsz=size).pack().ljust(size, b"\0"))
            self._kernel.ioctl(self._container, Request.VFIO_IOMMU_GET_INFO, answer)
        info = Type1Info.unpack(answer)
        if info.flags & IommuInfoFlag.VFIO_IOMMU_INFO_CAPS:
            for kind, at in capability_chain(answer, info.cap_offset):
                if kind == Capability.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE:
                    (head,) = table(IovaRangeCapability, answer, at, 1)
                    return table(IovaRange, answer, at + IovaRangeCapability.SIZE, head.nr_iovas)
        return _UNSAID

    def map(self, iova: int, address: int, length: int) -> None:
        flags = DmaFlag.VFIO_DMA_MAP_FLAG_READ | DmaFlag.VFIO_DMA_MAP_FLAG_WRITE
        ask = DmaMap(flags=flags, vaddr=address, iova=iova, size=length)
        self._kernel.ioctl(self._container, Request.VFIO_IOMMU_MAP_DMA, bytearray(ask.pack()))

    def unmap(self, iova: int, length: int) -> None:
        ask = bytearray(DmaUnmap(iova=iova, size=length).pack())
        self._kernel.ioctl(self._container, Request.VFIO_IOMMU_UNMAP_DMA, ask)


class Iommufd:
    """An address space of /dev/iommu. Implements `Iommu`; the descriptor stays the caller's."""

    def __init__(self, kernel: Kernel, fd: int, ioas: int) -> None:
        self._kernel, self._fd, self._ioas = kernel, fd, ioas

    def ranges(self) -> Sequence[IovaRange]:
        room = 16
        while True:
            rows = ctypes.create_string_buffer(room * IovaRange.SIZE)
            ask = IoasIovaRanges(ioas_id=self._ioas, num_iovas=room, allowed_iovas=ctypes.addressof(rows))
            answer = bytearray(ask.pack())
            try:
                self._kernel.ioctl(self._fd, Request.IOMMU_IOAS_IOVA_RANGES, answer)
            except OSError as exc:
                wanted = IoasIovaRanges.unpack(answer).num_iovas
                if exc.errno != errno.EMSGSIZE or not room < wanted <= _MOST_RANGES:
                    raise
                room = wanted
                continue
            return table(IovaRange, rows.raw, 0, IoasIovaRanges.unpack(answer).num_iovas)

    def map(self, iova: int, address: int, length: int) -> None:
        flags = (
            IoasMapFlag.IOMMU_IOAS_MAP_FIXED_IOVA
            | IoasMapFlag.IOMMU_IOAS_MAP_READABLE
            | IoasMapFlag.IOMMU_IOAS_MAP_WRITEABLE
        )
        ask = IoasMap(flags=flags, ioas_id=self._ioas, user_va=address, length=length, iova=iova)
        self._kernel.ioctl(self._fd, Request.IOMMU_IOAS_MAP, bytearray(ask.pack()))

    def unmap(self, iova: int, length: int) -> None:
        ask = bytearray(IoasUnmap(ioas_id=self._ioas, iova=iova, length=length).pack())
        self._kernel.ioctl(self._fd, Request.IOMMU_IOAS_UNMAP, ask)


class IovaSpace:
    """Gives out addresses for the device, lowest first: from 4 GiB on, and below only when nothing else is left."""

    def __init__(self, ranges: Sequence[IovaRange]) -> None:
        """Take the ranges that may be mapped; address 0 is never given out."""
        high = [(max(one.start, _FIRST_IOVA), one.end + 1) for one in ranges]
        low = [(max(one.start, PAGE_SIZE), min(one.end + 1, _FIRST_IOVA)) for one in ranges]
        self._ranges = [(start, end) for start, end in (*high, *low) if start < end]
        self._taken: dict[int, int] = {}

    def take(self, length: int, align: int) -> int | None:
        """Return an address with `length` free bytes behind it, or None when there is none."""
        taken = sorted(self._taken.items())
        for start, end in self._ranges:
            at = -(-start // align) * align
            for begin, size in taken:
                if begin + size <= at:
                    continue
                if at + length <= begin:
                    break
                at = -(-(begin + size) // align) * align
            if at + length <= end:
                self._taken[at] = length
                return at
        return None

    def give(self, iova: int) -> None:
        """Take an address back."""
        del self._taken[iova]


class IommuMemory:
    """Gives out memory that the device can reach. Thread-safe."""

    def __init__(self, name: str, iommu: Iommu) -> None:
        """Ask for the addresses that may be mapped. Raises TransportError."""
        self._name, self._iommu = name, iommu
        try:
            self._space = IovaSpace(iommu.ranges())
        except OSError as exc:
            raise explain(name, "the IOMMU does not say which addresses it maps", exc) from exc
        self._lock = threading.Lock()
        self._buffers: dict[int, Mapping] = {}
        self._closed = False

    def alloc(self, size: int) -> DmaBuffer:
        """Get zeroed memory of at least `size` bytes, in huge pages when it is worth it and they are there.

        Raises: TransportError naming the limit (memlock, addresses of the IOMMU).
        """
        mapping = self._memory(size)
        with self._lock:
            if self._closed:
                raise DeviceGoneError(f"{self._name} is closed")
            iova = self._space.take(mapping.length, min(mapping.length & -mapping.length, HUGE_PAGE))
            if iova is None:
                raise TransportError(f"{self._name}: the IOMMU maps no {mapping.length} bytes more: free some buffers")
            try:
                self._iommu.map(iova, mapping.address, mapping.length)
            except OSError as exc:
                self._space.give(iova)
                raise self._refused(mapping.length, exc) from exc
            self._buffers[iova] = mapping
        return DmaBuffer(iova, mapping)

    def _memory(self, size: int) -> Mapping:
        length = -(-size // PAGE_SIZE) * PAGE_SIZE
        if length >= _WORTH_HUGE_PAGES:
            try:
                return HugeMapping(-(-length // HUGE_PAGE) * HUGE_PAGE)
            except OSError:
                pass  # no huge pages are free: those of the usual size do as well
        try:
            mapping = Mapping(length)
            mapping.place_anonymous(mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        except OSError as exc:
            raise explain(self._name, f"no memory for a queue of {size} bytes", exc) from exc
        return mapping

    def _refused(self, length: int, exc: OSError) -> TransportError:
        advice = ""
        if exc.errno == errno.ENOMEM:
            limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            now = "not limited" if limit == resource.RLIM_INFINITY else f"{limit} bytes"
            advice = f"the memlock limit is {now}: raise it (ulimit -l, or LimitMEMLOCK= of the unit)"
        elif exc.errno == errno.ENOSPC:
            advice = "too many mappings: raise dma_entry_limit of the module vfio_iommu_type1"
        return explain(self._name, f"the device gets no {length} bytes of queue memory", exc, advice)

    def free(self, buffer: DmaBuffer) -> None:
        """Take the buffer out of the device's reach. Nothing happens when it is already. Raises TransportError."""
        with self._lock:
            mapping = self._buffers.get(buffer.iova)
            if mapping is not buffer.mapping:
                return
            try:
                self._iommu.unmap(buffer.iova, mapping.length)
            except OSError as exc:
                raise explain(self._name, f"the IOMMU keeps {mapping.length} bytes at {buffer.iova:#x}", exc) from exc
            del self._buffers[buffer.iova]
            self._space.give(buffer.iova)

    def close(self) -> None:
        """Take everything out of the device's reach; what the kernel refuses ends with its descriptors. Idempotent."""
        with self._lock:
            self._closed = True
            for iova, mapping in self._buffers.items():
                try:
                    self._iommu.unmap(iova, mapping.length)
                except OSError:
                    pass
            self._buffers.clear()

    def abandon(self) -> None:
        """In a forked child: let go of the memory without a word to the kernel."""
        self._lock = threading.Lock()  # another thread of the parent may have held it
        self._closed = True
        for mapping in self._buffers.values():
            try:
                mapping.clear()
            except OSError:
                pass  # the kernel has no memory for the call: the child is about to fail anyway
        self._buffers.clear()

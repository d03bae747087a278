# SPDX-License-Identifier: Apache-2.0
"""A client's own memory behind its DMA maps, for a server that asks for it by message.

Owns what stands behind each map (a buffer, an mmap of the descriptor that was shared, or callbacks) and answers
DMA_READ and DMA_WRITE from it. Never sends anything. Follows the vfio-user specification, "DMA_READ" and "DMA_WRITE".
The server names addresses and counts; each access must lie inside one map that grants it, else it is refused.
"""

from __future__ import annotations

import errno
import mmap
import threading
from collections.abc import Callable
from typing import Protocol

from ism.vfio_user.dma import DmaTable
from ism.vfio_user.errors import VfioUserError
from ism.vfio_user.wire import FdLike


class DmaCallbacks(Protocol):
    """Memory that is not a buffer. Offsets count from the start of the map and are always inside it."""

    def read(self, offset: int, count: int, /) -> bytes:
        """Exactly `count` bytes. An OSError or VfioUserError becomes the error reply."""
        ...

    def write(self, offset: int, data: bytes, /) -> None:
        """Store all of `data`. An OSError or VfioUserError becomes the error reply."""
        ...


class Backing:
    """What stands behind one map.

    Args:
        size: bytes of the map.
        memory: a writable (or, for a map the server may only read, read-only) buffer of at least `size` bytes, or
            callbacks; None to map `fd`.
        fd: borrowed; mapped here when there is no `memory`. With neither the server gets EFAULT.
        offset: in the file of `fd`, a page multiple.
    Raises: OSError when `fd` cannot be mapped; ValueError for a buffer that is too short or read-only.
    """

    def __init__(
        self, size: int, memory: object | None, fd: FdLike | None, offset: int, *, read: bool, write: bool
    ) -> None:
        self.readable, self.writable = read, write
        self._mapping: mmap.mmap | None = None
        self._view: memoryview | None = None
        self._read: Callable[[int, int], bytes] | None = None
        self._write: Callable[[int, bytes], None] | None = None
        if memory is None:
            if fd is not None and (read or write):
                prot = (mmap.PROT_READ if read else 0) | (mmap.PROT_WRITE if write else 0)
                number = fd if isinstance(fd, int) else fd.fileno()
                self._mapping = mmap.mmap(number, size, mmap.MAP_SHARED, prot, offset=offset)
                self._view = memoryview(self._mapping)
            return
        try:
            self._view = memoryview(memory).cast("B")  # type: ignore[arg-type]
        except TypeError:
            callbacks: DmaCallbacks = memory  # type: ignore[assignment]
            self._read, self._write = callbacks.read, callbacks.write
            return
        if self._view.nbytes < size:
            raise ValueError(f"a buffer of {self._view.nbytes} bytes behind a map of {size}")
        if write and self._view.readonly:
            raise ValueError("a read-only buffer behind a map the server may write")

    def read(self, offset: int, count: int) -> bytes:
        """Bytes of this map. Raises VfioUserError (EPERM, EFAULT), or what a callback raises."""
        if not self.readable:
            raise VfioUserError(errno.EPERM, "the map is not readable")
        if self._view is not None:
            return bytes(self._view[offset : offset + count])
        if self._read is None:
            raise VfioUserError(errno.EFAULT, "no memory stands behind the map")
        data = bytes(self._read(offset, count))
        if len(data) != count:
            raise VfioUserError(errno.EIO, f"the map's read callback gave {len(data)} bytes instead of {count}")
        return data

    def write(self, offset: int, data: bytes) -> None:
        """Store bytes into this map. Raises VfioUserError (EPERM, EFAULT), or what a callback raises."""
        if not self.writable:
            raise VfioUserError(errno.EPERM, "the map is not writable")
        if self._view is not None:
            self._view[offset : offset + len(data)] = data
        elif self._write is not None:
            self._write(offset, data)
        else:
            raise VfioUserError(errno.EFAULT, "no memory stands behind the map")

    def release(self) -> None:
        """Let go of the buffer or mapping."""
        if self._view is not None:
            self._view.release()
            self._view = None
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None
        self._read = self._write = None

    @property
    def is_buffer(self) -> bool:
        """Whether an access is a plain copy, so that it may be made under a lock."""
        return self._view is not None


class DmaMemory:
    """All maps of one client; safe to use from several threads."""

    def __init__(self, max_maps: int) -> None:
        self._lock = threading.Lock()
        self._table: DmaTable[Backing] = DmaTable(max_maps)

    def add(self, iova: int, size: int, backing: Backing) -> None:
        """Enter a map. Raises VfioUserError as `DmaTable.add`."""
        with self._lock:
            self._table.add(iova, size, backing)

    def check_known(self, iova: int, size: int) -> None:
        """Raise VfioUserError (ENOENT) unless there is exactly this map."""
        with self._lock:
            self._table.get(iova, size)

    def remove(self, iova: int, size: int) -> None:
        """Take out a map and release what stands behind it. Raises VfioUserError (ENOENT)."""
        with self._lock:
            self._table.remove(iova, size).value.release()

    def clear(self) -> None:
        """Release everything."""
        with self._lock:
            for entry in self._table.clear():
                entry.value.release()

    def read(self, address: int, count: int) -> bytes:
        """Answer a DMA_READ. Raises VfioUserError (EFAULT outside one map, EPERM), or what a callback raises."""
        with self._lock:
            backing, offset = self._find(address, count)
            if backing.is_buffer:
                return backing.read(offset, count)
        return backing.read(offset, count)

    def write(self, address: int, data: bytes) -> None:
        """Answer a DMA_WRITE. Raises as `read`."""
        with self._lock:
            backing, offset = self._find(address, len(data))
            if backing.is_buffer:
                backing.write(offset, data)
                return
        backing.write(offset, data)

    def _find(self, address: int, count: int) -> tuple[Backing, int]:
        entry = self._table.find(address, count)
        if entry is None:
            raise VfioUserError(errno.EFAULT, f"{count} bytes at {address:#x} are not inside one DMA map")
        return entry.value, address - entry.address

# SPDX-License-Identifier: Apache-2.0
"""A client's memory as its device reaches it: the DMA maps of one vfio-user connection.

It owns the descriptors that came with DMA_MAP, one per file however often it came (a virtual IOMMU maps page by page,
each with a copy), and short-lived mappings of the parts in use. It never interprets the bytes. Follows the vfio-user
specification, "DMA_MAP", and virtio 1.3 section 2.7.

The client is hostile, and a fault on its file would end the manager for everybody. So only files of which the kernel
alone decides what an access does are taken: memory files (memfd) with pages of the normal size, sealed against
shrinking - sealed here if they are not, which a file on a mounted tmpfs does not allow. Anything else is refused. A map
without a descriptor is kept and cannot be accessed: QEMU announces the device's own BARs and ROMs so. What is mapped at
one time is bounded, so that no client uses up the addresses of the manager.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections import OrderedDict

from ism.device.contract import GuestMemoryError
from ism.memory import F_SEAL_FUTURE_WRITE, PAGE_SIZE, Mapping, memfd_seals
from ism.vfio_user.dma import DmaTable
from ism.vfio_user.errors import VfioUserError
from ism.vfio_user.fds import Fd

PART_BYTES = 2 << 20
MAX_PARTS = 16
MAX_FILES = 64
MAX_MAPS = 65535
_TMPFS_MAGIC = 0x01021994
_libc = ctypes.CDLL(None, use_errno=True)
_WRITE_SEALS = fcntl.F_SEAL_WRITE | F_SEAL_FUTURE_WRITE


def _filesystem_of(fd: int) -> int:
    """Magic number of the file system that a descriptor is on (statfs(2)), 0 when it cannot be had."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, buffer):
        return 0
    return ctypes.c_long.from_buffer(buffer).value


_Run = tuple[int, int, memoryview]
"""Addresses [start, end) of the client, and the same bytes here."""
_NO_BYTES = memoryview(bytearray(0))


class _File:
    """One memory file of the client: its descriptor, and how many maps refer to it."""

    __slots__ = ("fd", "key", "size", "uses", "writable")

    def __init__(self, fd: Fd, key: tuple[int, int, bool], size: int, writable: bool) -> None:
        self.fd, self.key, self.size, self.writable = fd, key, size, writable
        self.uses = 0


class _Map:
    """What one DMA map allows; `file` is None for a map that cannot be accessed."""

    __slots__ = ("file", "offset", "readable", "writable")

    def __init__(self, file: _File | None, offset: int, readable: bool, writable: bool) -> None:
        self.file, self.offset, self.readable, self.writable = file, offset, readable, writable


class GuestRam:
    """All DMA maps of one client. Implements `ism.device.contract.GuestMemory`. Close it with `clear`."""

    def __init__(self) -> None:
        self._maps: DmaTable[_Map] = DmaTable(MAX_MAPS)
        self._files: dict[tuple[int, int, bool], _File] = {}
        self._parts: OrderedDict[tuple[tuple[int, int, bool], int], Mapping] = OrderedDict()
        self._forget_runs()

    def add(self, address: int, size: int, fd: Fd | None, offset: int, *, readable: bool, writable: bool) -> None:
        """Enter a map.

        Args: `fd`: of a memory file; ownership passes here, unless this raises. `offset`: in it, bytes.
        Raises: VfioUserError: EINVAL (not a memory file, range beyond its end, huge pages), EACCES (rights the
            descriptor does not have), EPERM (cannot be sealed against shrinking), EEXIST, ENOSPC.
        """
        self._maps.check(address, size)
        file = None
        if fd is not None:
            file = self._file_of(fd, writable)
            if offset + size > file.size:
                if not file.uses:
                    del self._files[file.key]
                raise VfioUserError(errno.EINVAL, f"map up to {offset + size:#x} of a file of {file.size:#x} bytes")
            file.uses += 1
            if file.fd is not fd:
                fd.close()
        self._maps.add(address, size, _Map(file, offset, readable, writable))

    def remove(self, address: int, size: int) -> None:
        """End a map: it is not used any more when this returns. Raises VfioUserError (ENOENT)."""
        ended = self._maps.remove(address, size).value
        self._forget_runs()
        self._release(ended)

    def clear(self) -> None:
        """End all maps and close every descriptor."""
        self._forget_runs()
        for entry in self._maps.clear():
            self._release(entry.value)
        assert not self._files

    def read(self, iova: int, length: int) -> bytes:
        """Copy `length` bytes. Raises GuestMemoryError when the range is not mapped readable for the device."""
        start, end, view = self._readable
        if not start <= iova <= iova + length <= end:
            start, end, view = self._reach(iova, length, write=False)
        if iova + length <= end:
            return bytes(view[iova - start : iova - start + length])
        out = bytearray(view[iova - start :])
        while len(out) < length:
            start, _, view = self._reach(iova + len(out), 1, write=False)
            out += view[iova + len(out) - start :][: length - len(out)]
        return bytes(out)

    def write(self, iova: int, data: bytes | memoryview) -> None:
        """Copy `data` to the client's memory. Raises GuestMemoryError when the range is not mapped writable."""
        length, done = len(data), 0
        start, end, view = self._writable
        if start <= iova and iova + length <= end:
            view[iova - start : iova - start + length] = data
            return
        while done < length:
            start, end, view = self._reach(iova + done, length - done, write=True)
            size = min(length - done, end - iova - done)
            view[iova + done - start : iova + done - start + size] = data[done : done + size]
            done += size

    def read_u16(self, iova: int) -> int:
        """Load an aligned 16-bit word in one access (little-endian). Raises GuestMemoryError."""
        word: int = self._word(iova, self._readable, write=False)[0]
        return word

    def write_u16(self, iova: int, value: int) -> None:
        """Store an aligned 16-bit word in one access (little-endian). Raises GuestMemoryError."""
        self._word(iova, self._writable, write=True)[0] = value

    def _word(self, iova: int, last: _Run, *, write: bool) -> memoryview:
        if iova % 2:
            raise GuestMemoryError(f"16-bit word at {iova:#x} is not aligned")
        start, end, view = last
        if not start <= iova < end:
            start, end, view = self._reach(iova, 2, write=write)
        return view[iova - start : iova - start + 2].cast("H")

    def _reach(self, iova: int, length: int, *, write: bool) -> _Run:
        """Find the longest run around `iova` that lies in one map and one part; it is the next access's first guess."""
        if length <= 0:
            return iova, iova, _NO_BYTES
        entry = self._maps.find(iova, 1)
        if entry is None:
            raise GuestMemoryError(f"{iova:#x} is outside the DMA maps")
        found = entry.value
        file = found.file
        if file is None or not (found.writable if write else found.readable):
            raise GuestMemoryError(f"{iova:#x} may not be {'written' if write else 'read'}")
        number, at = divmod(found.offset + iova - entry.address, PART_BYTES)
        part = self._part(file, number)
        start = max(entry.address, iova - at)
        end = min(entry.address + entry.size, iova - at + PART_BYTES)
        run = (start, end, part[at - (iova - start) :][: end - start])
        if write:
            self._writable = run
        else:
            self._readable = run
        return run

    def _forget_runs(self) -> None:
        self._readable = self._writable = (0, 0, _NO_BYTES)

    def _part(self, file: _File, number: int) -> memoryview:
        key = (file.key, number)
        mapping = self._parts.get(key)
        if mapping is None:
            start = number * PART_BYTES
            length = min(PART_BYTES, -(-(file.size - start) // PAGE_SIZE) * PAGE_SIZE)
            try:
                mapping = Mapping(length)
                mapping.place(0, length, file.fd.fileno(), start, write=file.writable)
            except OSError as exc:
                raise GuestMemoryError(f"the client's memory cannot be mapped: {exc}") from exc
            self._parts[key] = mapping
            if len(self._parts) > MAX_PARTS:
                self._forget_runs()
                self._parts.popitem(last=False)
        else:
            self._parts.move_to_end(key)
        return mapping.view

    def _file_of(self, fd: Fd, writable: bool) -> _File:
        number = fd.fileno()
        try:
            seals = memfd_seals(number)  # asks the kernel alone, unlike fstat of a file served by a process
            status = os.fstat(number)
            mode = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE
        except OSError as exc:
            raise VfioUserError(errno.EINVAL, "the descriptor is not of a memory file (memfd)") from exc
        if _filesystem_of(number) != _TMPFS_MAGIC:
            raise VfioUserError(errno.EINVAL, "memory files with huge pages are not supported for DMA")
        may_write = mode == os.O_RDWR and not seals & _WRITE_SEALS
        if mode == os.O_WRONLY or (writable and not may_write):
            raise VfioUserError(errno.EACCES, "the descriptor does not allow what the map does")
        key = (status.st_dev, status.st_ino, may_write)
        file = self._files.get(key)
        if file is not None and file.size >= status.st_size:
            return file
        if not seals & fcntl.F_SEAL_SHRINK:
            try:
                fcntl.fcntl(number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            except OSError as exc:
                raise VfioUserError(
                    errno.EPERM,
                    "the memory file can shrink, and the manager may not seal it: make it with MFD_ALLOW_SEALING",
                ) from exc
            status = os.fstat(number)
        if file is not None:  # it has grown; what was mapped of it stays valid
            self._drop_parts(file)
            file.size = status.st_size
            return file
        if len(self._files) >= MAX_FILES:
            raise VfioUserError(errno.ENOSPC, f"DMA maps of more than {MAX_FILES} files")
        file = _File(fd, key, status.st_size, may_write)
        self._files[key] = file
        return file

    def _release(self, ended: _Map) -> None:
        file = ended.file
        if file is None:
            return
        file.uses -= 1
        if not file.uses:
            del self._files[file.key]
            self._drop_parts(file)
            file.fd.close()

    def _drop_parts(self, file: _File) -> None:
        self._forget_runs()
        for key in [key for key in self._parts if key[0] == file.key]:
            del self._parts[key]

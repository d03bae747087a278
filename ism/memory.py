# SPDX-License-Identifier: Apache-2.0
"""Mappings and memory files: the few calls Python's `mmap` does not offer (fixed addresses, seals, zero pages).

A `Mapping` is a range of this process's addresses. It is unmapped only when nothing refers to it any more: every
memoryview of it keeps it alive, so a view used too late reads old or zero bytes and never crashes the process.

Pages are replaced in place (MAP_FIXED): other threads that use the range meanwhile see the old page or the new one,
never a hole. Whoever takes the right to write away from a range that is in use maps private copies: the stores of this
process go on to work and reach nobody.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from typing import Self

PAGE_SIZE = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_mremap = _libc.mremap
_mremap.restype = ctypes.c_void_p
_mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]

MAP_FIXED = 0x10
MAP_NORESERVE = 0x4000
_MREMAP_MAYMOVE_FIXED = 1 | 2
_MAP_FAILED = ctypes.c_void_p(-1).value
_MFD_NOEXEC_SEAL = 0x8
F_SEAL_FUTURE_WRITE = 0x10
"""Linux 5.1; Python's fcntl does not name it yet."""


def _map(address: int, length: int, prot: int, flags: int, fd: int, offset: int) -> int:
    result = _mmap(address or None, length, prot, flags, fd, offset)
    if result is None or result == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"mmap of {length} bytes failed: {os.strerror(code)}")
    return int(result)


def protection(read: bool, write: bool) -> int:
    """PROT_ bits for the given rights."""
    return (mmap.PROT_READ if read else 0) | (mmap.PROT_WRITE if write else 0)


class Mapping:
    """A page-aligned range of addresses of this process.

    Attributes: `address`, `length` (bytes), `view` (writable memoryview of all of it; writing where the pages are
    mapped read-only is a fault, so writers must know their rights).
    """

    def __init__(self, length: int) -> None:
        """Reserve `length` bytes (a page multiple), backed by private zero pages. Raises OSError."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self._own(length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)

    @classmethod
    def of_file(cls, length: int, fd: int, file_offset: int, *, read: bool = True, write: bool = True) -> Self:
        """Map `length` bytes of `fd` from `file_offset`, shared, at a new address. Raises OSError, ValueError."""
        made = cls.__new__(cls)
        made._own(length, protection(read, write), mmap.MAP_SHARED, fd, file_offset)
        return made

    def _own(self, length: int, prot: int, flags: int, fd: int, file_offset: int) -> None:
        if length <= 0 or length % PAGE_SIZE:
            raise ValueError(f"mapping length {length} is not a positive multiple of the page size {PAGE_SIZE}")
        # The address range is that of an `mmap` object, which every view refers to and which unmaps it when it is
        # deallocated. Not a finalizer: those of garbage in cycles run before other objects' `__del__`, which may
        # still use the memory, or bring it back.
        try:
            owner = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        except (OSError, OverflowError) as exc:
            code = getattr(exc, "errno", None) or errno.ENOMEM
            raise OSError(code, f"mmap of {length} bytes failed: {os.strerror(code)}") from None
        exporter = (ctypes.c_char * length).from_buffer(owner)
        self.address, self.length = ctypes.addressof(exporter), length
        _map(self.address, length, prot, flags | MAP_FIXED, fd, file_offset)
        self._exporter = exporter
        self.view = memoryview(exporter).cast("B")

    def _check(self, at: int, length: int) -> None:
        if at < 0 or length <= 0 or at % PAGE_SIZE or length % PAGE_SIZE or at + length > self.length:
            raise ValueError(f"range {at}+{length} is not a page-aligned part of a mapping of {self.length} bytes")

    def place(self, at: int, length: int, fd: int, file_offset: int, *, read: bool = True, write: bool = True) -> None:
        """Map `length` bytes of `fd` over [at, at + length) of this mapping, shared. Raises OSError, ValueError."""
        self._check(at, length)
        prot = protection(read, write)
        _map(self.address + at, length, prot, mmap.MAP_SHARED | MAP_FIXED, fd, file_offset)

    def place_private(self, at: int, length: int, fd: int, file_offset: int) -> None:
        """Show `length` bytes of `fd` there so that stores change copies of this process only (copy on write).

        A page that was never stored to shows what the file holds now. Raises OSError, ValueError.
        """
        self._check(at, length)
        prot = protection(True, True)
        flags = mmap.MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED
        _map(self.address + at, length, prot, flags, fd, file_offset)

    def place_anonymous(self, flags: int) -> None:
        """Map new zero-filled memory over all of this mapping, with the given MAP_ flags. Raises OSError."""
        _map(self.address, self.length, mmap.PROT_READ | mmap.PROT_WRITE, flags | MAP_FIXED, -1, 0)

    def share(self, at: int, other: Mapping) -> None:
        """Show the shared pages of `other` at `at` of this mapping too. Raises OSError, ValueError."""
        self._check(at, other.length)
        # an old size of 0 duplicates a shared mapping, with the rights that it has (mremap(2))
        result = _mremap(other.address, 0, other.length, _MREMAP_MAYMOVE_FIXED, self.address + at)
        if result is None or result == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, f"mremap of {other.length} bytes failed: {os.strerror(code)}")

    def clear(self, at: int = 0, length: int | None = None) -> None:
        """Put private zero pages over the range: what was mapped there is let go. Raises OSError, ValueError."""
        if length is None:
            length = self.length - at
        self._check(at, length)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
        _map(self.address + at, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)


def create_memfd(name: str, size: int) -> int:
    """Make a zero-filled memory file: sealed against growing, shrinking and, where the kernel can, execution.

    Args: `name` shows in /proc; `size` in bytes.
    Returns: a descriptor owned by the caller.
    Raises: OSError (ENOMEM, EMFILE, ENFILE).
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        fd = os.memfd_create(name, flags)  # Linux before 6.3
    try:
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    except OSError:
        os.close(fd)
        raise
    return fd


def reopen_readonly(fd: int) -> int:
    """Open the same file again with O_RDONLY: a descriptor that can never be mapped writable. Raises OSError."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def seal_writers(fd: int) -> None:
    """Allow no new writable mapping or write of a memory file; writable mappings that exist stay. Raises OSError."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)


def memfd_seals(fd: int) -> int:
    """Seals of a memory file (F_SEAL_ bits). Raises OSError (EINVAL: not a memory file)."""
    return fcntl.fcntl(fd, fcntl.F_GET_SEALS)

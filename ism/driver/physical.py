# SPDX-License-Identifier: Apache-2.0
"""Queue memory for a device that no IOMMU stands in front of: it is named to the device by its physical address.

The page must therefore stay where it is. A huge page does; a locked page of the usual size is never swapped out, but
the kernel moves it when it makes room for larger ones, unless /proc/sys/vm/compact_unevictable_allowed is 0. So a huge
page is taken where there is one, else, for at most a page, a locked one that the kernel has promised not to move.

The memory is shared, so that a fork does not move a page by copying it on write. A forked child gets zero pages in its
place: what it does with them reaches no device.
Source: Linux Documentation/admin-guide/mm/pagemap, Documentation/admin-guide/sysctl/vm.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from pathlib import Path

from ism.driver.transport import DmaBuffer
from ism.errors import TransportError
from ism.memory import PAGE_SIZE, Mapping

PAGEMAP = Path("/proc/self/pagemap")
COMPACTION = Path("/proc/sys/vm/compact_unevictable_allowed")
HUGE_PAGE = 2 * 1024 * 1024

MAP_HUGETLB_2M = 0x40000 | 21 << 26
"""MAP_HUGETLB | MAP_HUGE_2MB: two megabytes whatever the system's default size of a huge page is."""

_PRESENT = 1 << 63
_FRAME = (1 << 55) - 1
_SHARED = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def physical_address(address: int, pagemap: Path = PAGEMAP) -> int:
    """Return the physical address of a resident byte of this process.

    Raises: TransportError when the page is not resident, or the kernel hides the address (CAP_SYS_ADMIN is needed).
    """
    try:
        with pagemap.open("rb", buffering=0) as file:
            file.seek(address // PAGE_SIZE * 8)
            entry = int.from_bytes(file.read(8), "little")
    except OSError as exc:
        raise TransportError(f"{pagemap}: {exc.strerror}: run as root (CAP_SYS_ADMIN)", exc.errno or 0) from exc
    frame = entry & _FRAME
    if not entry & _PRESENT or not frame:
        raise TransportError(
            f"the kernel does not tell the physical address of {address:#x}: run as root (CAP_SYS_ADMIN)", errno.EPERM
        )
    return frame * PAGE_SIZE + address % PAGE_SIZE


class HugeMapping(Mapping):
    """Shared, zero-filled huge pages of 2 MiB at an address that is a multiple of their size."""

    def __init__(self, length: int) -> None:
        """Take `length` bytes (a multiple of HUGE_PAGE). Raises OSError: ENOMEM when so many are not there."""
        super().__init__(length + HUGE_PAGE)
        at = -self.address % HUGE_PAGE
        self.address, self.length, self.view = self.address + at, length, self.view[at : at + length]
        self.place_anonymous(_SHARED | MAP_HUGETLB_2M)


class PhysicalMemory:
    """Gives out memory that is contiguous in physical memory and stays there. Thread-safe."""

    def __init__(self, name: str, pagemap: Path = PAGEMAP, *, compaction: Path = COMPACTION) -> None:
        """Allocate nothing yet.

        Args: `name`: whose memory it is, for errors; `pagemap`, `compaction`: where the kernel shows page frames, and
            whether it moves locked pages.
        """
        self._name, self._pagemap, self._compaction = name, pagemap, compaction

    def alloc(self, size: int) -> DmaBuffer:
        """Get zeroed memory with one physical address, at least `size` bytes and at most a huge page.

        Raises: TransportError naming what to raise (huge pages, memlock limit, privileges).
        """
        if not 0 < size <= HUGE_PAGE:
            raise TransportError(f"{self._name}: {size} bytes of queue memory are no part of a huge page ({HUGE_PAGE})")
        try:
            mapping: Mapping = HugeMapping(HUGE_PAGE)
        except OSError as exc:
            mapping = self._locked_page(size, exc)
        mapping.view[0] = 0  # there is a page now, and it stays
        buffer = DmaBuffer(physical_address(mapping.address, self._pagemap), mapping)
        _given.add(mapping)
        return buffer

    def _locked_page(self, size: int, cause: OSError) -> Mapping:
        if size > PAGE_SIZE or not self._locked_pages_stay():
            instead = ", or 0 to /proc/sys/vm/compact_unevictable_allowed" if size <= PAGE_SIZE else ""
            raise TransportError(
                f"{self._name}: no huge page for {size} bytes of queue memory, which must not move in physical "
                f"memory: write 16 to /proc/sys/vm/nr_hugepages{instead}",
                cause.errno or 0,
            ) from cause
        try:
            mapping = Mapping(PAGE_SIZE)
            mapping.place_anonymous(_SHARED)
        except OSError as exc:
            raise TransportError(f"{self._name}: no memory for queues: {exc.strerror}", exc.errno or 0) from exc
        if _libc.mlock(mapping.address, mapping.length):
            code = ctypes.get_errno()
            raise TransportError(
                f"{self._name}: cannot lock {mapping.length} bytes of queue memory: {os.strerror(code)}; raise the "
                "memlock limit (ulimit -l, or LimitMEMLOCK= of the unit)",
                code,
            )
        return mapping

    def _locked_pages_stay(self) -> bool:
        try:
            return self._compaction.read_text().strip() == "0"
        except FileNotFoundError:
            return True  # a kernel that does not compact memory
        except OSError:
            return False

    def free(self, buffer: DmaBuffer) -> None:
        """Let the memory go; the pages are the system's again when nothing refers to the buffer any more.

        The device could still reach them: free only what it has given back.
        """
        _given.discard(buffer.mapping)


_given: weakref.WeakSet[Mapping] = weakref.WeakSet()


def _after_fork() -> None:
    for mapping in list(_given):
        try:
            mapping.clear()
        except OSError:
            pass  # the kernel has no memory for the call: the child is about to fail anyway
    _given.clear()


os.register_at_fork(after_in_child=_after_fork)

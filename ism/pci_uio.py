# SPDX-License-Identifier: Apache-2.0
"""Transport over sysfs and UIO: a PCI function of this machine without an IOMMU between it and memory.

Configuration space and BARs are the files of /sys/bus/pci/devices/BDF; queue memory is locked and named to the device
by its physical address (/proc/self/pagemap). There are no interrupts here: uio_pci_generic knows INTx only, so the
driver polls its queues, and doorbells of regions arrive as events (`Device(transport, interrupts=False)`).

Nothing stops the device from reading or writing all of memory: that is why `allow_no_iommu=True` is demanded. Inside a
virtual machine the device is the host's emulation, which can do that anyway; on bare metal use VFIO.
Source: Linux Documentation/filesystems/sysfs-pci, Documentation/admin-guide/mm/pagemap.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from ism.driver.transport import DmaBuffer, Span, Watcher
from ism.errors import TransportError
from ism.memory import PAGE_SIZE, Mapping

SYSFS = Path("/sys/bus/pci/devices")
PAGEMAP = Path("/proc/self/pagemap")
HUGE_PAGE = 2 * 1024 * 1024

_BDF = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_PRESENT = 1 << 63
_FRAME = (1 << 55) - 1
_BARS = 6
_IO_SPACE = 0x100
_FORMATS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def physical_address(address: int, pagemap: Path = PAGEMAP) -> int:
    """Return the physical address of a resident byte of this process.

    Raises: TransportError when the page is not resident, or the kernel hides the address (CAP_SYS_ADMIN is needed).
    """
    with pagemap.open("rb", buffering=0) as file:
        file.seek(address // PAGE_SIZE * 8)
        entry = int.from_bytes(file.read(8), "little")
    frame = entry & _FRAME
    if not entry & _PRESENT or not frame:
        raise TransportError(
            f"the kernel does not tell the physical address of {address:#x}: run as root (CAP_SYS_ADMIN)", errno.EPERM
        )
    return frame * PAGE_SIZE + address % PAGE_SIZE


class UioTransport:
    """A PCI function reached through sysfs. Implements `ism.driver.transport.Transport`, without interrupts."""

    def __init__(self, bdf: str, *, allow_no_iommu: bool, sysfs: Path = SYSFS, pagemap: Path = PAGEMAP) -> None:
        """Open the function.

        Args:
            bdf: domain:bus:device.function, e.g. 0000:00:04.0.
            allow_no_iommu: must be True, see the module's head.
            sysfs, pagemap: where the kernel shows devices and page frames.
        Raises: TransportError (no such function, not permitted, a kernel driver holds it), ValueError (bad bdf).
        """
        if not _BDF.fullmatch(bdf):
            raise ValueError(f"{bdf!r} is no PCI address, expected e.g. 0000:00:04.0")
        if not allow_no_iommu:
            raise TransportError(
                f"uio:{bdf} has no IOMMU protection: the device can reach all memory. Use vfio:{bdf}, or pass "
                "allow_no_iommu=True where the device is trusted (an emulated one inside a virtual machine)"
            )
        self._name, self._folder, self._pagemap = f"uio:{bdf}", sysfs / bdf, pagemap
        self._check_driver()
        try:
            self._config = os.open(self._folder / "config", os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            raise TransportError(f"{self._name}: {exc.strerror}: {exc.filename}", exc.errno or 0) from exc
        self._lock = threading.Lock()
        self._sizes = self._read_sizes()
        self._registers: dict[int, Mapping] = {}

    def _check_driver(self) -> None:
        link = self._folder / "driver"
        holder = link.resolve().name if link.exists() else None
        if holder not in (None, "uio_pci_generic"):
            raise TransportError(
                f"{self._name} is held by the kernel driver {holder}: unbind it (write the address to "
                f"/sys/bus/pci/drivers/{holder}/unbind)",
                errno.EBUSY,
            )

    def _read_sizes(self) -> list[int]:
        try:
            lines = (self._folder / "resource").read_text().splitlines()[:_BARS]
            rows = [[int(word, 16) for word in line.split()] for line in lines]
            # a line is first address, last address, flags; all zero where there is no BAR
            return [0 if not last or flags & _IO_SPACE else last - first + 1 for first, last, flags in rows]
        except (OSError, ValueError) as exc:
            os.close(self._config)
            raise TransportError(f"{self._name}: the kernel's resource file cannot be read: {exc}") from exc

    @property
    def name(self) -> str:
        """How the user named it."""
        return self._name

    def start(self, watcher: Watcher, on_gone: Callable[[str], None]) -> None:
        """Nothing to watch: there are no interrupts, and a function of this machine does not go away."""

    def answer_fds(self) -> Sequence[int]:
        """None: what a command maps appears in the BAR by itself."""
        return ()

    def config_read(self, offset: int, length: int) -> bytes:
        """Read PCI configuration space."""
        return os.pread(self._config, length, offset)

    def config_write(self, offset: int, data: bytes) -> None:
        """Write PCI configuration space."""
        os.pwrite(self._config, data, offset)

    def bar_size(self, bar: int) -> int:
        """Bytes of the BAR; 0 when there is none, or it is in I/O space."""
        return self._sizes[bar] if 0 <= bar < len(self._sizes) else 0

    def _place(self, bar: int, spans: Sequence[Span]) -> Mapping:
        try:
            fd = os.open(self._folder / f"resource{bar}", os.O_RDWR | os.O_CLOEXEC | os.O_SYNC)
        except OSError as exc:
            raise TransportError(f"{self._name}: BAR {bar}: {exc.strerror}", exc.errno or 0) from exc
        try:
            mapping = Mapping(sum(span.length for span in spans))
            at = 0
            for span in spans:
                mapping.place(at, span.length, fd, span.offset)
                at += span.length
        except (OSError, ValueError) as exc:
            raise TransportError(f"{self._name}: BAR {bar} cannot be mapped: {exc}") from exc
        finally:
            os.close(fd)
        return mapping

    def _register(self, bar: int, offset: int, length: int) -> memoryview:
        if length not in _FORMATS or offset % length or offset + length > self.bar_size(bar):
            raise TransportError(f"{self._name}: {length} bytes at {offset} of BAR {bar} are no register access")
        with self._lock:
            mapping = self._registers.get(bar)
            if mapping is None:
                whole = -(-self.bar_size(bar) // PAGE_SIZE) * PAGE_SIZE
                mapping = self._registers[bar] = self._place(bar, [Span(0, whole)])
        return mapping.view[offset : offset + length].cast(_FORMATS[length])

    def bar_read(self, bar: int, offset: int, length: int) -> bytes:
        """Read registers in one access."""
        return int(self._register(bar, offset, length)[0]).to_bytes(length, "little")

    def bar_write(self, bar: int, offset: int, data: bytes, *, posted: bool = False) -> None:
        """Write registers in one access; PCI posts every write."""
        self._register(bar, offset, len(data))[0] = int.from_bytes(data, "little")

    def map_spans(self, bar: int, spans: Sequence[Span]) -> Mapping:
        """Map parts of the BAR side by side."""
        return self._place(bar, spans)

    def vector_count(self) -> int:
        """None: sysfs offers no MSI-X."""
        return 0

    def set_vectors(self, first: int, eventfds: Sequence[int | None]) -> None:
        """Always fails. Raises TransportError."""
        raise TransportError(f"{self._name} has no interrupts; open the device with interrupts=False")

    def dma_alloc(self, size: int) -> DmaBuffer:
        """Get locked memory with one physical address: one page, or part of a huge page.

        Raises: TransportError naming what to raise (huge pages, memlock limit, privileges).
        """
        length = -(-size // PAGE_SIZE) * PAGE_SIZE
        if length > HUGE_PAGE:
            raise TransportError(f"{self._name}: {size} bytes of queue memory exceed a huge page ({HUGE_PAGE})")
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | (0 if length == PAGE_SIZE else 0x40000)  # MAP_HUGETLB
        mapping = Mapping(length if length == PAGE_SIZE else HUGE_PAGE)
        try:
            mapping.place_anonymous(flags)
        except OSError as exc:
            raise TransportError(
                f"{self._name}: no huge page for {length} bytes of queue memory: write 16 to /proc/sys/vm/nr_hugepages",
                exc.errno or 0,
            ) from exc
        if _libc.mlock(mapping.address, mapping.length):
            raise TransportError(
                f"{self._name}: cannot lock {mapping.length} bytes: raise the memlock limit (ulimit -l)",
                ctypes.get_errno(),
            )
        mapping.view[0] = 0  # resident now, and by the lock for good
        return DmaBuffer(physical_address(mapping.address, self._pagemap), mapping)

    def dma_free(self, buffer: DmaBuffer) -> None:
        """Let the memory go; it is unmapped when nothing refers to it."""

    def doorbell_fd(self, slot: int) -> int | None:
        """No eventfd rings a doorbell here: it is a register write."""
        return None

    def reset(self) -> None:
        """Reset the function, where the kernel can."""
        try:
            (self._folder / "reset").write_text("1")
        except OSError as exc:
            raise TransportError(f"{self._name}: the kernel cannot reset it: {exc.strerror}", exc.errno or 0) from exc

    def close(self) -> None:
        """Close the function's files."""
        self._registers.clear()
        if self._config >= 0:
            os.close(self._config)
            self._config = -1

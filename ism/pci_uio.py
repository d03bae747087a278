# SPDX-License-Identifier: Apache-2.0
"""Transport over sysfs and UIO: a PCI function of this machine without an IOMMU between it and memory.

Configuration space and BARs are the files of /sys/bus/pci/devices/BDF; queue memory is locked and named to the device
by its physical address (`ism.driver.physical`). A function that is bound to uio_pci_generic interrupts through
/dev/uioN: by INTx, since that kernel driver knows no MSI-X. One that is bound to nothing is polled. Either way the
doorbells of regions come as events of the event queue.

Nothing stops the device from reading or writing all of memory: that is why `allow_no_iommu=True` is demanded. Inside a
virtual machine the device is the host's emulation, which can do that anyway; on bare metal use VFIO. Prefer
uio_pci_generic to no driver: when a process ends without a word, that kernel driver takes bus mastering away from the
function as it closes /dev/uioN, so that the device does not write to pages that are somebody else's by then.

The process holds a lock on the function (flock of `config`): nothing else keeps two of them from driving one device. A
forked child gets neither the lock nor /dev/uioN.
Source: Linux Documentation/PCI/sysfs-pci, Documentation/driver-api/uio-howto, drivers/uio/uio_pci_generic.c.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from ism.driver.pci_sysfs import UIO_DRIVER, full_bdf
from ism.driver.physical import PAGEMAP, PhysicalMemory
from ism.driver.transport import DmaBuffer, Span, Watcher
from ism.errors import DeviceGoneError, TransportError
from ism.memory import PAGE_SIZE, Mapping

SYSFS = Path("/sys/bus/pci/devices")
DEV = Path("/dev")

_BARS = 6
_IO_SPACE = 0x100
_FORMATS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
_COMMAND = 4
_COMMAND_INTX_DISABLE = 0x400
_COUNT_SIZE = 4
"""What a read of /dev/uioN returns: how many interrupts there have been, 32 bits; other sizes are refused."""


class UioTransport:
    """A PCI function reached through sysfs. Implements `ism.driver.transport.Transport`, without vectors."""

    def __init__(
        self, bdf: str, *, allow_no_iommu: bool, sysfs: Path = SYSFS, dev: Path = DEV, pagemap: Path = PAGEMAP
    ) -> None:
        """Open the function.

        Args:
            bdf: domain:bus:device.function, e.g. 0000:00:04.0; the domain may be left out.
            allow_no_iommu: must be True, see the module's head.
            sysfs, dev, pagemap: where the kernel shows functions, device nodes and page frames.
        Raises: TransportError (no such function, not permitted, a kernel driver holds it, or with EBUSY another
            process), ValueError (bad bdf).
        """
        address = full_bdf(bdf)
        if address is None:
            raise ValueError(f"{bdf!r} is no PCI address, expected e.g. 0000:00:04.0")
        bdf = address
        if not allow_no_iommu:
            raise TransportError(
                f"uio:{bdf} has no IOMMU protection: every address that the device is told is a physical one, and "
                f"nothing checks which memory it then reads and writes. Use vfio:{bdf}, or say that the device is "
                "trusted, as an emulated one inside a virtual machine is: ISM_ALLOW_NO_IOMMU=1, or allow_no_iommu=True"
            )
        self._name, self._bdf, self._folder = f"uio:{bdf}", bdf, sysfs / bdf
        self._memory = PhysicalMemory(self._name, pagemap)
        self._lock = threading.Lock()
        self._registers: dict[int, Mapping] = {}
        self._config = self._uio = -1
        driver = self._driver()
        try:
            self._config = self._open_file(self._folder / "config", os.O_RDWR)
            self._lock_function()
            self._sizes = self._read_sizes()
            self._can_interrupt = driver is not None and self._open_uio(dev)
        except BaseException:
            self.close()
            raise
        _open.add(self)

    def _driver(self) -> str | None:
        """Name the kernel driver that the function is bound to. Raises TransportError when it cannot be shared."""
        link = self._folder / "driver"
        holder = link.resolve().name if link.exists() else None
        if holder in (None, UIO_DRIVER):
            return holder
        way_out = f"name it vfio:{self._bdf}, or " if holder == "vfio-pci" else ""
        raise TransportError(
            f"{self._name} is held by the kernel driver {holder}: {way_out}run `ism bind {self._bdf} "
            f"--driver {UIO_DRIVER}`",
            errno.EBUSY,
        )

    def _open_file(self, path: Path, flags: int) -> int:
        try:
            return os.open(path, flags | os.O_CLOEXEC)
        except OSError as exc:
            advice = "; run as root" if exc.errno in (errno.EACCES, errno.EPERM) else ""
            raise TransportError(f"{self._name}: {path}: {exc.strerror}{advice}", exc.errno or 0) from exc

    def _lock_function(self) -> None:
        try:
            fcntl.flock(self._config, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise TransportError(
                f"{self._name} is in use by another process: a function has one driver at a time; end that one, or "
                "name another function",
                errno.EBUSY,
            ) from exc

    def _open_uio(self, dev: Path) -> bool:
        """Open /dev/uioN; tell whether interrupts come there. It never sleeps in a read."""
        nodes = sorted((self._folder / "uio").glob("uio*"))
        if not nodes:
            return False
        self._uio = self._open_file(dev / nodes[0].name, os.O_RDWR | os.O_NONBLOCK)
        try:
            return (self._folder / "irq").read_text().strip() != "0"
        except OSError:
            return False

    def _read_sizes(self) -> list[int]:
        try:
            lines = (self._folder / "resource").read_text().splitlines()[:_BARS]
            rows = [[int(word, 16) for word in line.split()] for line in lines]
            # a line is first address, last address, flags; all zero where there is no BAR
            return [0 if not last or flags & _IO_SPACE else last - first + 1 for first, last, flags in rows]
        except (OSError, ValueError) as exc:
            raise TransportError(f"{self._name}: the kernel's resource file cannot be read: {exc}") from exc

    @property
    def name(self) -> str:
        """How the user named it."""
        return self._name

    @property
    def tells_of_loss(self) -> bool:
        """No: the kernel knows when the function goes, not when what emulates it has died."""
        return False

    def start(self, watcher: Watcher, on_gone: Callable[[str], None]) -> None:
        """Nothing to watch: a function that is unplugged shows by the interrupt, or the access, that fails."""

    def answer_fds(self) -> Sequence[int]:
        """None: what a command maps appears in the BAR by itself."""
        return ()

    def config_read(self, offset: int, length: int) -> bytes:
        """Read PCI configuration space."""
        with self._calls("cannot read configuration space"):
            return os.pread(self._config, length, offset)

    def config_write(self, offset: int, data: bytes) -> None:
        """Write PCI configuration space."""
        with self._calls("cannot write configuration space"):
            os.pwrite(self._config, data, offset)

    def _check_open(self) -> None:
        if self._config < 0:
            raise DeviceGoneError(f"{self._name} is closed")

    @contextlib.contextmanager
    def _calls(self, problem: str) -> Iterator[None]:
        """Turn errors of the kernel into TransportError."""
        self._check_open()
        try:
            yield
        except OSError as exc:
            raise TransportError(f"{self._name}: {problem}: {exc.strerror}", exc.errno or 0) from exc

    def bar_size(self, bar: int) -> int:
        """Bytes of the BAR; 0 when there is none, or it is in I/O space."""
        return self._sizes[bar] if 0 <= bar < len(self._sizes) else 0

    def _place(self, bar: int, spans: Sequence[Span]) -> Mapping:
        # How such a mapping is cached does not depend on O_SYNC: for `resourceN` the kernel always asks for uncached
        # pages (pgprot_device), which on a processor that emulates, or under KVM where the guest's wish is ignored,
        # are the ordinary pages of the host behind the BAR. `resourceN_wc` would be faster where the wish counts, and
        # wrong: write combining keeps no order between the bytes of a ring and its cursor.
        fd = self._open_file(self._folder / f"resource{bar}", os.O_RDWR)
        try:
            mapping = Mapping(sum(span.length for span in spans))
            at = 0
            for span in spans:
                mapping.place(at, span.length, fd, span.offset)
                at += span.length
        except (OSError, ValueError) as exc:
            locked = isinstance(exc, PermissionError)
            advice = "; does the kernel lock it down (/sys/kernel/security/lockdown)?" if locked else ""
            raise TransportError(f"{self._name}: BAR {bar} cannot be mapped: {exc}{advice}") from exc
        finally:
            os.close(fd)
        return mapping

    def _register(self, bar: int, offset: int, length: int) -> memoryview:
        if length not in _FORMATS or offset % length or offset + length > self.bar_size(bar):
            raise TransportError(f"{self._name}: {length} bytes at {offset} of BAR {bar} are no register access")
        self._check_open()
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
        self._check_open()
        return self._place(bar, spans)

    def vector_count(self) -> int:
        """None: uio_pci_generic knows no MSI-X."""
        return 0

    def set_vectors(self, first: int, eventfds: Sequence[int | None]) -> None:
        """Always fails. Raises TransportError."""
        raise TransportError(f"{self._name} has no interrupt vectors; its line is `enable_intx`")

    def enable_intx(self) -> int | None:
        """Return /dev/uioN; None when the function is not bound to uio_pci_generic, or the kernel gave it no line."""
        self._check_open()
        return self._uio if self._can_interrupt else None

    def rearm_intx(self) -> None:
        """Take the count of interrupts, then allow INTx again, which the kernel's handler has forbidden.

        That is a write to configuration space: uio_pci_generic has no other way. Should it interrupt between the read
        and the write of the command register, it is allowed again by mistake, and interrupts again: no harm.
        """
        # nothing came: served in another thread already
        with self._calls("its interrupt cannot be served"), contextlib.suppress(BlockingIOError):
            os.read(self._uio, _COUNT_SIZE)
        command = int.from_bytes(self.config_read(_COMMAND, 2), "little")
        self.config_write(_COMMAND, (command & ~_COMMAND_INTX_DISABLE).to_bytes(2, "little"))

    def dma_alloc(self, size: int) -> DmaBuffer:
        """Get memory with one physical address, which stays where it is: at most a huge page.

        Raises: TransportError naming what to raise (huge pages, memlock limit, privileges).
        """
        self._check_open()
        return self._memory.alloc(size)

    def dma_free(self, buffer: DmaBuffer) -> None:
        """Let the memory go; it is unmapped when nothing refers to it."""
        self._memory.free(buffer)

    def doorbell_fd(self, slot: int) -> int | None:
        """No eventfd rings a doorbell here: it is a register write."""
        return None

    def reset(self) -> None:
        """Reset the function, where the kernel can."""
        with self._calls("the kernel cannot reset it"):
            (self._folder / "reset").write_text("1")

    def close(self) -> None:
        """Close the function's files; with /dev/uioN the function loses bus mastering."""
        _open.discard(self)
        with self._lock:
            self._registers.clear()
            fds, self._uio, self._config = (self._uio, self._config), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def _abandon(self) -> None:
        """In a forked child: hold neither the lock nor the interrupt, which end when the parent's descriptors do."""
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in (self._uio, self._config):
            if fd >= 0:
                os.dup2(null, fd, inheritable=False)
        os.close(null)


_open: weakref.WeakSet[UioTransport] = weakref.WeakSet()


def _after_fork() -> None:
    for transport in list(_open):
        try:
            transport._abandon()
        except OSError:
            pass  # no descriptor is left to do it with: the child is about to fail anyway
    _open.clear()


os.register_at_fork(after_in_child=_after_fork)

# SPDX-License-Identifier: Apache-2.0
"""Transport over kernel VFIO: how a program inside a virtual machine reaches its device, protected by an IOMMU.

The function is bound to vfio-pci (`ism bind`). Registers are mapped page by page at their first access; regions are
parts of a BAR, mapped side by side. Interrupts are eventfds of MSI-X vectors, or of INTx. Queue memory is mapped in the
IOMMU (`ism.driver.vfio_iommu`). How the device is opened, and what may be missing, is in `ism.driver.vfio_open`.

Memory mapped from the device keeps it open in the kernel, whatever descriptors are closed: so `close` puts zero pages
over all that is left, and the function is free for the next process. In a forked child the descriptors are closed and
registers and queue memory become zero pages; regions stay mapped there, as they do over every transport, so that the
function is free again when the child has let them go, too.

An access to a BAR while memory space is switched off in the command register would be a bus error, the end of the
process. Every write of that register is therefore noted, and such an access is refused.
Source: Linux Documentation/driver-api/vfio.rst, include/uapi/linux/vfio.h.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

from ism.driver.transport import DmaBuffer, Span, Watcher
from ism.driver.vfio_info import device_info, irq_info, region_layout
from ism.driver.vfio_iommu import IommuMemory, Kernel, Linux, explain
from ism.driver.vfio_open import Opened, Places, normalize_bdf, open_function
from ism.driver.vfio_uapi import (
    DeviceFlag,
    Irq,
    IrqFlag,
    IrqSet,
    Region,
    Request,
    irq_set,
)
from ism.errors import DeviceGoneError, TransportError
from ism.eventfd import drain, make_eventfd
from ism.memory import PAGE_SIZE, Mapping

_FORMATS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
_BARS = range(Region.VFIO_PCI_BAR5_REGION_INDEX + 1)
_COMMAND = 4
_COMMAND_MEMORY = 2
_TRIGGER_EVENTFD = IrqSet.VFIO_IRQ_SET_DATA_EVENTFD | IrqSet.VFIO_IRQ_SET_ACTION_TRIGGER
_TRIGGER_NONE = IrqSet.VFIO_IRQ_SET_DATA_NONE | IrqSet.VFIO_IRQ_SET_ACTION_TRIGGER
_UNMASK = IrqSet.VFIO_IRQ_SET_DATA_NONE | IrqSet.VFIO_IRQ_SET_ACTION_UNMASK
_REASONS = {
    Irq.VFIO_PCI_REQ_IRQ_INDEX: "the kernel wants the device back (it is being unbound or unplugged): close it",
    Irq.VFIO_PCI_ERR_IRQ_INDEX: "the PCI bus reported a fatal error of the device: close it and open it again",
}


class _Range(Mapping):
    """The addresses of a mapping that somebody else owns, to put zero pages there. Keeps nothing alive."""

    def __init__(self, mapping: Mapping) -> None:
        self.address, self.length = mapping.address, mapping.length


class VfioTransport:
    """A PCI function bound to vfio-pci. Implements `ism.driver.transport.Transport`."""

    def __init__(self, bdf: str, opened: Opened, kernel: Kernel) -> None:
        """Take over an open device; `open` is the way to get one. Raises TransportError; it is closed then."""
        self._name, self._kernel = f"vfio:{bdf}", kernel
        self._device, self._others, self._memory = opened.device, opened.others, opened.memory
        self._lock = threading.RLock()  # a descriptor is used, and closed, under it only
        self._gone: str | None = None
        self._pages: dict[tuple[int, int], Mapping | None] = {}
        self._placed: dict[int, tuple[weakref.ref[Any], _Range]] = {}
        self._vectors: int | None = None
        self._msix_on = False
        self._intx_fd = -1
        self._watcher: Watcher | None = None
        self._watched: dict[Irq, int] = {}
        self._on_gone: Callable[[str], None] | None = None
        _open.add(self)
        try:
            with self._asking("the kernel does not describe it"):
                self._info = device_info(kernel, self._device)
                if not self._info.flags & DeviceFlag.VFIO_DEVICE_FLAGS_PCI:
                    raise TransportError(f"{self._name} is no PCI function to VFIO")
                self._regions = {
                    index: region_layout(kernel, self._device, index)
                    for index in (*_BARS, Region.VFIO_PCI_CONFIG_REGION_INDEX)
                }
                self._irqs = {index: irq_info(kernel, self._device, self._info, index) for index in Irq}
            self._memory_on = self._read_memory_on()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(
        cls,
        bdf: str,
        *,
        allow_no_iommu: bool = False,
        kernel: Kernel | None = None,
        places: Places | None = None,
    ) -> VfioTransport:
        """Open a function that is bound to vfio-pci.

        Args:
            bdf: PCI address, 0000:01:00.0; the domain may be left out.
            allow_no_iommu: let the device reach all memory where there is no IOMMU (VFIO's no-IOMMU mode).
            kernel, places: who makes the system calls, and where the kernel shows devices.
        Raises: TransportError saying what is missing (driver, IOMMU, rights, module) and how to get it, or that
            another process has the device.
        """
        kernel = kernel or Linux()
        address = normalize_bdf(bdf)
        opened = open_function(address, allow_no_iommu=allow_no_iommu, kernel=kernel, places=places or Places())
        return cls(address, opened, kernel)

    @property
    def name(self) -> str:
        """How the user named it, with the address as sysfs spells it."""
        return self._name

    # -- asking the kernel --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _asking(self, failure: str) -> Iterator[None]:
        """Hold the descriptor open, and turn what the kernel refuses into an error that begins with `failure`."""
        with self._lock:
            self._check()
            try:
                yield
            except OSError as exc:
                raise explain(self._name, failure, exc) from exc

    def _check(self) -> None:
        if self._gone is not None:
            raise DeviceGoneError(f"{self._name} {self._gone}")

    def _set_irqs(self, flags: IrqSet, index: Irq, start: int, count: int, fds: Sequence[int] = ()) -> int:
        argument = irq_set(flags, index, start, count, fds)
        return self._kernel.ioctl(self._device, Request.VFIO_DEVICE_SET_IRQS, argument)

    # -- loss ---------------------------------------------------------------------------------------------------

    @property
    def tells_of_loss(self) -> bool:
        """No: the kernel knows when the function goes, not when what emulates it has died."""
        return False

    def start(self, watcher: Watcher, on_gone: Callable[[str], None]) -> None:
        """Watch for the kernel wanting the device back, and for bus errors."""
        with self._asking("it cannot be watched"):
            self._watcher, self._on_gone = watcher, on_gone
            for index in _REASONS:
                if self._irqs[index].count:
                    self._watched[index] = fd = make_eventfd()
                    self._set_irqs(_TRIGGER_EVENTFD, index, 0, 1, [fd])
                    watcher.add(fd, partial(self._lost, index))

    def answer_fds(self) -> Sequence[int]:
        """None: what a command maps appears in the BAR by itself."""
        return ()

    def _lost(self, index: Irq) -> None:
        with self._lock:
            on_gone, self._on_gone = self._on_gone, None
            self._unwatch()
        if on_gone is not None:
            on_gone(_REASONS[index])

    def _unwatch(self) -> None:
        watched, self._watched = self._watched, {}
        for index, fd in watched.items():
            if self._watcher is not None:
                self._watcher.remove(fd)
            with contextlib.suppress(OSError):  # the kernel has its own reference, and lets it go with the device
                self._set_irqs(_TRIGGER_EVENTFD, index, 0, 1, [-1])
            os.close(fd)

    # -- registers ----------------------------------------------------------------------------------------------

    def config_read(self, offset: int, length: int) -> bytes:
        """Read PCI configuration space."""
        return self._read(Region.VFIO_PCI_CONFIG_REGION_INDEX, offset, length)

    def config_write(self, offset: int, data: bytes) -> None:
        """Write PCI configuration space."""
        with self._lock:
            self._write(Region.VFIO_PCI_CONFIG_REGION_INDEX, offset, data)
            if offset <= _COMMAND < offset + len(data):
                self._memory_on = self._read_memory_on()

    def _read_memory_on(self) -> bool:
        return bool(self.config_read(_COMMAND, 2)[0] & _COMMAND_MEMORY)

    def _place_in(self, index: int, offset: int, length: int) -> int:
        region = self._regions[index]
        if offset < 0 or offset + length > region.size:
            raise TransportError(f"{self._name}: {length} bytes at {offset} are not in region {index} ({region.size})")
        return region.offset + offset

    def _read(self, index: int, offset: int, length: int) -> bytes:
        with self._asking(f"{length} bytes at {offset} of region {index} cannot be read"):
            data = self._kernel.pread(self._device, length, self._place_in(index, offset, length))
        if len(data) != length:
            raise TransportError(f"{self._name}: {len(data)} of {length} bytes at {offset} of region {index} were read")
        return data

    def _write(self, index: int, offset: int, data: bytes) -> None:
        with self._asking(f"{len(data)} bytes at {offset} of region {index} cannot be written"):
            count = self._kernel.pwrite(self._device, data, self._place_in(index, offset, len(data)))
        if count != len(data):
            raise TransportError(f"{self._name}: {count} of {len(data)} bytes at {offset} of region {index} written")

    def bar_size(self, bar: int) -> int:
        """Bytes of the BAR, 0 when the function does not have it."""
        return self._regions[bar].size if bar in _BARS else 0

    def bar_read(self, bar: int, offset: int, length: int) -> bytes:
        """Read registers in one access; 8 bytes may be two where the kernel maps no registers."""
        register = self._register(bar, offset, length)
        return self._read(bar, offset, length) if register is None else int(register[0]).to_bytes(length, "little")

    def bar_write(self, bar: int, offset: int, data: bytes, *, posted: bool = False) -> None:
        """Write registers in one access, as `bar_read`; PCI posts every write."""
        register = self._register(bar, offset, len(data))
        if register is None:
            self._write(bar, offset, data)
        else:
            register[0] = int.from_bytes(data, "little")

    def _register(self, bar: int, offset: int, length: int) -> memoryview | None:
        """The register as a view of one element, or None when it has to be read and written through the kernel."""
        self._check()
        if length not in _FORMATS or offset < 0 or offset % length or offset + length > self.bar_size(bar):
            raise TransportError(f"{self._name}: {length} bytes at {offset} of BAR {bar} are no register access")
        if not self._memory_on:
            raise TransportError(f"{self._name}: memory space is off in the command register: BAR {bar} cannot be used")
        page, at = divmod(offset, PAGE_SIZE)
        try:
            mapping = self._pages[bar, page]
        except KeyError:
            mapping = self._map_page(bar, page)
        return None if mapping is None else mapping.view[at : at + length].cast(_FORMATS[length])

    def _map_page(self, bar: int, page: int) -> Mapping | None:
        with self._lock:
            self._check()
            if (bar, page) not in self._pages:
                try:
                    mapping: Mapping | None = self._map(bar, [Span(page * PAGE_SIZE, PAGE_SIZE)])
                except (OSError, TransportError):
                    mapping = None  # a BAR that shares its page with another is not mapped: pread and pwrite do as well
                self._pages[bar, page] = mapping
            return self._pages[bar, page]

    def _map(self, bar: int, spans: Sequence[Span]) -> Mapping:
        region = self._regions[bar]
        for span in spans:
            if not region.maps(span):
                raise TransportError(
                    f"{self._name}: BAR {bar} cannot be mapped at {span.offset}+{span.length}; does QEMU run with the "
                    "map agent?"
                )
        mapping = Mapping(sum(span.length for span in spans))
        at = 0
        for span in spans:
            self._kernel.place(mapping, at, span.length, self._device, region.offset + span.offset)
            at += span.length
        return mapping

    # -- memory -------------------------------------------------------------------------------------------------

    def map_spans(self, bar: int, spans: Sequence[Span]) -> Mapping:
        """Map parts of the BAR side by side.

        Raises: TransportError: not made of pages, not where the BAR can be mapped, no room for mappings.
        """
        if bar not in _BARS or not spans or any((span.offset | span.length) % PAGE_SIZE for span in spans):
            raise TransportError(f"{self._name}: {list(spans)} are no pages of a BAR ({bar})")
        with self._asking(f"BAR {bar} cannot be mapped in {len(spans)} parts (vm.max_map_count may be too low)"):
            mapping = self._map(bar, spans)
            # its owner may clear it, views may outlive it: what counts is whether the addresses are still its own
            self._placed = {at: entry for at, entry in self._placed.items() if entry[0]() is not None}
            self._placed[mapping.address] = (weakref.ref(mapping.view.obj), _Range(mapping))
        return mapping

    def dma_alloc(self, size: int) -> DmaBuffer:
        """Get zeroed memory for queues, mapped in the IOMMU."""
        self._check()
        return self._memory.alloc(size)

    def dma_free(self, buffer: DmaBuffer) -> None:
        """Take the buffer out of the device's reach."""
        self._memory.free(buffer)

    # -- interrupts ---------------------------------------------------------------------------------------------

    def vector_count(self) -> int:
        """MSI-X vectors that can be bound to eventfds.

        A kernel that cannot add vectors later (NORESIZE, before Linux 6.5) is asked for all of them now, none bound to
        an eventfd yet, and the count is how many it has. Binding them one by one then loses no interrupt.
        """
        with self._asking("MSI-X cannot be enabled"):
            info = self._irqs[Irq.VFIO_PCI_MSIX_IRQ_INDEX]
            if self._vectors is None:
                self._vectors = info.count
                if info.count and info.flags & IrqFlag.VFIO_IRQ_INFO_NORESIZE:
                    self._enable_all()
            return self._vectors

    def _enable_all(self) -> None:
        for _ in range(2):
            count = self._vectors or 0
            left = self._set_irqs(_TRIGGER_EVENTFD, Irq.VFIO_PCI_MSIX_IRQ_INDEX, 0, count, [-1] * count)
            if left == 0:
                self._msix_on = True
                return
            self._vectors = min(left, count - 1)  # it has enabled none, and says how many it could
            if not self._vectors:
                return
        self._vectors = 0

    def set_vectors(self, first: int, eventfds: Sequence[int | None]) -> None:
        """Bind eventfds to vectors; the kernel holds what is behind a descriptor until it is bound anew."""
        count = self.vector_count()
        if first < 0 or first + len(eventfds) > count:
            raise TransportError(f"{self._name} has {count} vectors, not {len(eventfds)} from {first} on")
        if not eventfds:
            return
        fds = [-1 if fd is None else fd for fd in eventfds]
        with self._asking(f"the vectors {first} to {first + len(fds) - 1} cannot be bound"):
            left = self._set_irqs(_TRIGGER_EVENTFD, Irq.VFIO_PCI_MSIX_IRQ_INDEX, first, len(fds), fds)
            if left:
                raise TransportError(f"{self._name}: the kernel has {left} interrupt vectors for it, {count} needed")
            self._msix_on = True

    def _disable_msix(self) -> None:
        if self._msix_on:
            self._msix_on, self._vectors = False, None
            self._set_irqs(_TRIGGER_NONE, Irq.VFIO_PCI_MSIX_IRQ_INDEX, 0, 0)

    def enable_intx(self) -> int | None:
        """Give INTA an eventfd; the kernel masks the line whenever it raises that."""
        if self._intx_fd >= 0:
            return self._intx_fd
        with self._asking("its interrupt line cannot be used"):
            if not self._irqs[Irq.VFIO_PCI_INTX_IRQ_INDEX].count:
                return None
            self._disable_msix()
            fd = make_eventfd()
            try:
                self._set_irqs(_TRIGGER_EVENTFD, Irq.VFIO_PCI_INTX_IRQ_INDEX, 0, 1, [fd])
            except BaseException:
                os.close(fd)
                raise
            self._intx_fd = fd
            return fd

    def rearm_intx(self) -> None:
        """Drain the eventfd, then unmask INTA: an interrupt that is pending comes now."""
        with self._asking("its interrupt line cannot be unmasked"):
            drain(self._intx_fd)
            if self._irqs[Irq.VFIO_PCI_INTX_IRQ_INDEX].flags & IrqFlag.VFIO_IRQ_INFO_AUTOMASKED:
                self._set_irqs(_UNMASK, Irq.VFIO_PCI_INTX_IRQ_INDEX, 0, 1)

    def doorbell_fd(self, slot: int) -> int | None:
        """No eventfd rings a doorbell here: it is a register write."""
        return None

    # -- the end ------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Reset the function. Raises TransportError, also when neither the function nor its bus can be reset."""
        with self._asking("the kernel cannot reset it"):
            if not self._info.flags & DeviceFlag.VFIO_DEVICE_FLAGS_RESET:
                raise TransportError(f"{self._name}: the kernel knows no way to reset it (it offers no FLR)")
            self._kernel.ioctl(self._device, Request.VFIO_DEVICE_RESET, 0)
            self._memory_on = self._read_memory_on()

    def close(self) -> None:
        """Let the function go: interrupts, memory, descriptors. What is still mapped of it reads as zero."""
        _open.discard(self)
        with self._lock:
            if self._gone is not None:
                return
            self._on_gone = None
            self._unwatch()
            with contextlib.suppress(OSError):
                self._disable_msix()
            if self._intx_fd >= 0:
                with contextlib.suppress(OSError):
                    self._set_irqs(_TRIGGER_NONE, Irq.VFIO_PCI_INTX_IRQ_INDEX, 0, 0)
            self._gone = "is closed"
            self._clear_pages()
            for reference, addresses in self._placed.values():
                owner = reference()
                if owner is not None:
                    with contextlib.suppress(OSError):  # no memory for the call: the pages stay until the views go
                        addresses.clear()
                del owner
            self._placed.clear()
            if isinstance(self._memory, IommuMemory):
                self._memory.close()
            self._close_descriptors()

    def _clear_pages(self) -> None:
        for mapping in self._pages.values():
            if mapping is not None:
                with contextlib.suppress(OSError):
                    mapping.clear()
        self._pages.clear()

    def _close_descriptors(self) -> None:
        for fd in (self._device, *self._others):
            self._kernel.close(fd)
        self._device, self._others = -1, ()
        if self._intx_fd >= 0:
            os.close(self._intx_fd)
            self._intx_fd = -1

    def _abandon(self) -> None:
        """In a forked child: let go of the device without a word to it."""
        self._lock = threading.RLock()  # another thread of the parent may have held it
        self._gone = "was opened before a fork; open a device in the child"
        self._on_gone = None
        self._clear_pages()
        self._placed.clear()
        if isinstance(self._memory, IommuMemory):
            self._memory.abandon()
        for fd in self._watched.values():
            os.close(fd)
        self._watched.clear()
        self._close_descriptors()


_open: weakref.WeakSet[VfioTransport] = weakref.WeakSet()


def _after_fork() -> None:
    for transport in list(_open):
        with contextlib.suppress(OSError):
            transport._abandon()
    _open.clear()


os.register_at_fork(after_in_child=_after_fork)

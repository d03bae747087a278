# SPDX-License-Identifier: Apache-2.0
"""From a PCI address to an open VFIO device: who holds the function, which of the kernel's ways leads to it.

There are three. The device's own file with an address space of iommufd, where the kernel has both. Else the file of
its IOMMU group with a type1 container. Else, where there is no IOMMU and `allow_no_iommu` is given, the group's file
for that case (module parameter enable_unsafe_noiommu_mode); queue memory then has physical addresses.

Most of this file says what is missing. Nothing here changes a driver binding or loads a module.
Source: Linux Documentation/driver-api/vfio.rst, drivers/vfio/group.c, drivers/vfio/device_cdev.c.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ism.driver.physical import PAGEMAP, PhysicalMemory
from ism.driver.vfio_iommu import Iommufd, IommuMemory, Kernel, Type1, explain
from ism.driver.vfio_uapi import (
    API_VERSION,
    AttachIommufd,
    BindIommufd,
    GroupFlag,
    GroupStatus,
    IoasAlloc,
    IommuType,
    Request,
)
from ism.errors import TransportError

SYSFS = Path("/sys/bus/pci/devices")
DEV = Path("/dev")
VFIO_DRIVER = "vfio-pci"

_BDF = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}:[01][0-9a-f]\.[0-7])", re.IGNORECASE)
_HARMLESS_NEIGHBOURS = {VFIO_DRIVER, "pci-stub", "pcieport"}
"""Drivers beside which a group is viable: they make no DMA of their own."""
_NO_REMAPPING = (
    "is it that interrupts are not remapped? Give QEMU's IOMMU intremap=on, or load the module {module} with "
    "allow_unsafe_interrupts=1"
)


@dataclass(frozen=True)
class Places:
    """Where the kernel shows PCI functions, device files and page frames."""

    sysfs: Path = SYSFS
    dev: Path = DEV
    pagemap: Path = PAGEMAP


@dataclass(frozen=True)
class Opened:
    """An open device. The descriptors are the caller's: `device` is closed first, then `others` in their order."""

    device: int
    others: tuple[int, ...]
    memory: IommuMemory | PhysicalMemory


def normalize_bdf(bdf: str) -> str:
    """Return a PCI address as sysfs spells it: 01:00.0 is 0000:01:00.0. Raises TransportError."""
    match = _BDF.fullmatch(bdf)
    if match is None:
        raise TransportError(f"{bdf!r} is no PCI address, expected e.g. 0000:00:04.0", errno.EINVAL)
    return f"{match[1] or '0000'}:{match[2]}".lower()


def driver_of(folder: Path) -> str | None:
    """Name of the kernel driver that holds the function, or None."""
    link = folder / "driver"
    return link.resolve().name if os.path.lexists(link) else None


def open_function(bdf: str, *, allow_no_iommu: bool, kernel: Kernel, places: Places) -> Opened:
    """Open a function that is bound to vfio-pci.

    Args: `bdf`: as `normalize_bdf` returns it; `allow_no_iommu`: whether a device may go without an IOMMU.
    Raises: TransportError saying what is missing and how to get it.
    """
    return _Opening(bdf, allow_no_iommu, kernel, places).open()


class _NoRightError(TransportError):
    """A device file may not be opened by this user."""


class _Opening:
    def __init__(self, bdf: str, allow_no_iommu: bool, kernel: Kernel, places: Places) -> None:
        self._bdf, self._name, self._allow_no_iommu = bdf, f"vfio:{bdf}", allow_no_iommu
        self._kernel, self._places = kernel, places
        self._folder = places.sysfs / bdf

    def open(self) -> Opened:
        self._check_driver()
        refused: _NoRightError | None = None
        cdev, iommu = self._cdev(), self._places.dev / "iommu"
        if cdev is not None and os.path.exists(iommu):
            try:
                return self._open_cdev(cdev, iommu)
            except _NoRightError as exc:
                refused = exc  # who may not use the new files may have been given the old one
        link = self._folder / "iommu_group"
        if not os.path.lexists(link):
            raise TransportError(f"{self._name} is in no IOMMU group; {self._iommu_advice()}", errno.ENODEV)
        group = link.resolve().name
        unsafe = self._places.dev / "vfio" / f"noiommu-{group}"
        if os.path.exists(unsafe):
            return self._open_without_iommu(unsafe)
        path = self._places.dev / "vfio" / group
        if refused is not None and not os.path.exists(path):
            raise refused
        return self._open_group(path)

    # -- what sysfs says ----------------------------------------------------------------------------------------

    def _check_driver(self) -> None:
        if not os.path.lexists(self._folder):
            raise TransportError(
                f"{self._name}: there is no such PCI function; `lspci -D -d 1af4:106c` lists virtio-ism devices",
                errno.ENODEV,
            )
        driver = driver_of(self._folder)
        if driver != VFIO_DRIVER:
            holder = "no kernel driver" if driver is None else f"the kernel driver {driver}"
            hint = "" if os.path.lexists(self._folder / "iommu_group") else f" (needs an IOMMU: {self._iommu_advice()})"
            raise TransportError(
                f"{self._name} is held by {holder}, not by {VFIO_DRIVER}: run `ism bind {self._bdf}` as root{hint}",
                errno.ENODEV if driver is None else errno.EBUSY,
            )

    def _iommu_advice(self) -> str:
        return (
            "boot with an IOMMU (QEMU: -device intel-iommu,intremap=on,caching-mode=on; kernel: intel_iommu=on), or "
            f"trust the device and use uio:{self._bdf}"
        )

    def _cdev(self) -> Path | None:
        try:
            names = [name for name in os.listdir(self._folder / "vfio-dev") if re.fullmatch(r"vfio\d+", name)]
        except OSError:
            return None
        for name in names:
            path = self._places.dev / "vfio" / "devices" / name
            if os.path.exists(path):
                return path
        return None

    def _neighbours(self) -> list[str]:
        """Other functions of the IOMMU group that a driver of the kernel uses."""
        found = []
        try:
            for name in sorted(os.listdir(self._folder / "iommu_group" / "devices")):
                driver = driver_of(self._folder / "iommu_group" / "devices" / name)
                if name != self._bdf and driver is not None and driver not in _HARMLESS_NEIGHBOURS:
                    found.append(f"{name} ({driver})")
        except OSError:
            pass  # an error is being explained: what cannot be listed is left out
        return found

    # -- errors that several ways have in common ----------------------------------------------------------------

    def _busy(self, exc: OSError | None = None) -> TransportError:
        neighbours = self._neighbours()
        if neighbours:
            return TransportError(
                f"{self._name} shares its IOMMU group with {', '.join(neighbours)}: a group is given away as a whole, "
                f"so bind them to {VFIO_DRIVER} too, or plug the device into a root port of its own",
                errno.EBUSY,
            )
        said = f" ({exc.strerror})" if exc is not None else ""
        return TransportError(
            f"{self._name} is in use{said}: another process, or a forked child of one, has the device open, and one "
            "function serves one process; give the guest one function per process",
            errno.EBUSY,
        )

    def _open_file(self, path: Path) -> int:
        try:
            return self._kernel.open(path)
        except OSError as exc:
            if exc.errno == errno.EBUSY:
                raise self._busy() from exc
            if exc.errno in (errno.EACCES, errno.EPERM):
                raise _NoRightError(
                    f"{self._name}: {path}: {exc.strerror}: it belongs to {_owner(path)}; `chown` it to this user, or "
                    'have udev do so (SUBSYSTEM=="vfio", OWNER="...", MODE="0600")',
                    exc.errno,
                ) from exc
            advice = f"load the module {VFIO_DRIVER}" if exc.errno == errno.ENOENT else ""
            raise explain(self._name, str(path), exc, advice) from exc

    # -- the ways -----------------------------------------------------------------------------------------------

    def _open_cdev(self, cdev: Path, iommu: Path) -> Opened:
        with ExitStack() as undo:
            fd = self._open_file(iommu)
            undo.callback(self._kernel.close, fd)
            device = self._open_file(cdev)
            undo.callback(self._kernel.close, device)
            ask = bytearray(BindIommufd(iommufd=fd).pack())
            try:
                self._kernel.ioctl(device, Request.VFIO_DEVICE_BIND_IOMMUFD, ask)
            except OSError as exc:
                if exc.errno in (errno.EBUSY, errno.EINVAL):  # EINVAL: whoever has it open has come this way too
                    raise self._busy(exc) from exc
                raise explain(self._name, "the kernel does not bind it to an iommufd", exc) from exc
            try:
                answer = bytearray(IoasAlloc().pack())
                self._kernel.ioctl(fd, Request.IOMMU_IOAS_ALLOC, answer)
                ioas = IoasAlloc.unpack(answer).out_ioas_id
                attach = bytearray(AttachIommufd(pt_id=ioas).pack())
                self._kernel.ioctl(device, Request.VFIO_DEVICE_ATTACH_IOMMUFD_PT, attach)
            except OSError as exc:
                advice = _NO_REMAPPING.format(module="iommufd") if exc.errno == errno.EPERM else ""
                raise explain(self._name, "the kernel gives it no address space", exc, advice) from exc
            memory = IommuMemory(self._name, Iommufd(self._kernel, fd, ioas))
            undo.pop_all()
        return Opened(device, (fd,), memory)

    def _open_group(self, path: Path) -> Opened:
        with ExitStack() as undo:
            device, others = self._through_group(path, IommuType.VFIO_TYPE1v2_IOMMU, undo)
            memory = IommuMemory(self._name, Type1(self._kernel, others[1]))
            undo.pop_all()
        return Opened(device, others, memory)

    def _open_without_iommu(self, path: Path) -> Opened:
        if not self._allow_no_iommu:
            raise TransportError(
                f"{self._name} has no IOMMU protection ({path}): the device can reach all memory. "
                f"Better {self._iommu_advice()}; or pass allow_no_iommu=True where the device is trusted (an "
                "emulated one inside a virtual machine)",
                errno.EPERM,
            )
        with ExitStack() as undo:
            device, others = self._through_group(path, IommuType.VFIO_NOIOMMU_IOMMU, undo)
            memory = PhysicalMemory(self._name, self._places.pagemap)
            undo.pop_all()
        return Opened(device, others, memory)

    def _through_group(self, path: Path, kind: IommuType, undo: ExitStack) -> tuple[int, tuple[int, int]]:
        """Return the device's descriptor, and those of group and container; `undo` closes all three."""
        kernel, container_path = self._kernel, self._places.dev / "vfio" / "vfio"
        group = self._open_file(path)
        undo.callback(kernel.close, group)
        container = self._open_file(container_path)
        undo.callback(kernel.close, container)
        try:
            status = bytearray(GroupStatus().pack())
            kernel.ioctl(group, Request.VFIO_GROUP_GET_STATUS, status)
            if not GroupStatus.unpack(status).flags & GroupFlag.VFIO_GROUP_FLAGS_VIABLE:
                raise self._busy()
            version = kernel.ioctl(container, Request.VFIO_GET_API_VERSION, 0)
            if version != API_VERSION:
                raise TransportError(f"{self._name}: the kernel's VFIO has version {version}, expected {API_VERSION}")
            if not kernel.ioctl(container, Request.VFIO_CHECK_EXTENSION, kind):
                module = "vfio_iommu_type1"
                if kind == IommuType.VFIO_NOIOMMU_IOMMU:
                    module = "vfio with enable_unsafe_noiommu_mode=1"
                raise TransportError(
                    f"{self._name}: the kernel has no {kind.name}: load the module {module}", errno.ENOTSUP
                )
            kernel.ioctl(group, Request.VFIO_GROUP_SET_CONTAINER, bytearray(container.to_bytes(4, "little")))
        except OSError as exc:
            if exc.errno == errno.EBUSY:
                raise self._busy(exc) from exc
            raise explain(self._name, f"the IOMMU group of {path} cannot be used", exc) from exc
        try:
            kernel.ioctl(container, Request.VFIO_SET_IOMMU, kind)
        except OSError as exc:
            advice = _NO_REMAPPING.format(module="vfio_iommu_type1") if exc.errno == errno.EPERM else ""
            raise explain(self._name, "the kernel gives it no address space", exc, advice) from exc
        try:
            device = kernel.ioctl(group, Request.VFIO_GROUP_GET_DEVICE_FD, bytearray(self._bdf.encode() + b"\0"))
        except OSError as exc:
            if exc.errno == errno.EBUSY:
                raise self._busy(exc) from exc
            raise explain(self._name, f"the IOMMU group of {path} does not give the device", exc) from exc
        undo.callback(kernel.close, device)
        return device, (group, container)


def _owner(path: Path) -> str:
    try:
        status = os.stat(path)
    except OSError:
        return "somebody else"
    return f"{_name(status.st_uid, 'user')}:{_name(status.st_gid, 'group')}, mode {status.st_mode & 0o777:o}"


def _name(number: int, kind: str) -> str:
    try:
        return pwd.getpwuid(number).pw_name if kind == "user" else grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)

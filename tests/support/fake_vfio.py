# SPDX-License-Identifier: Apache-2.0
"""A VFIO kernel in this process: files, groups, address spaces, interrupts and one PCI function behind them.

It follows drivers/vfio of Linux 6.12 where a driver can tell: who may open what, what is refused with which errno, how
vectors are allocated (all at once, or one by one), what DMA reaches, what counts against the memlock limit. Descriptors
are real memory files, so that mappings are real. `interrupt`, `ask_back` and `dma_read` are the device's side.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ism.driver import vfio_uapi as uapi
from ism.driver.transport import Span
from ism.driver.vfio_open import Places
from ism.driver.vfio_uapi import Irq, IrqSet, Request
from ism.layout import Struct
from ism.memory import PAGE_SIZE, Mapping
from ism.testing import InMemoryTransport

BDF = "0000:01:00.0"
REGION_SHIFT = 40
CONFIG_SIZE = 4096
_SIZES = {0: 4 * PAGE_SIZE, 1: 512, 2: PAGE_SIZE, 4: 16 * PAGE_SIZE, 7: CONFIG_SIZE}


def _refuse(code: int) -> OSError:
    return OSError(code, os.strerror(code))


@dataclass
class Settings:
    """What kind of machine it is; a test changes it before or after opening."""

    cdev: bool = False
    iommufd: bool = True
    group: bool = True
    no_iommu: bool = False
    type1: bool = True
    viable: bool = True
    remapping: bool = True
    memlock: int = 1 << 24
    iova: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0xFEDFFFFF), (0xFEF00000, (1 << 39) - 1)])
    says_iova: bool = True
    dynamic: bool = True
    vectors: int = 16
    irqs_left: int = 1 << 10
    has_intx: bool = True
    express: bool = True
    resets: bool = True
    mappable: set[int] = field(default_factory=lambda: {0, 2, 4})
    sparse: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    no_right: set[str] = field(default_factory=set)
    owned: int = 0o600


class PlainFunction:
    """Configuration and BARs are the bytes of the device's memory file; identity cannot be written."""

    def __init__(self) -> None:
        self.fd = -1
        self.sizes = dict(_SIZES)

    def read(self, index: int, offset: int, length: int) -> bytes:
        return os.pread(self.fd, length, (index << REGION_SHIFT) + offset)

    def write(self, index: int, offset: int, data: bytes) -> None:
        if index == 7:
            data, offset = data[max(4 - offset, 0) :], max(offset, 4)
        os.pwrite(self.fd, data, (index << REGION_SHIFT) + offset)

    def place(self, mapping: Mapping, at: int, length: int, index: int, offset: int) -> None:
        mapping.place(at, length, self.fd, (index << REGION_SHIFT) + offset)

    def reset(self) -> None:
        os.pwrite(self.fd, bytes(self.sizes[0]), 0)

    def dma(self, maps: dict[int, tuple[int, int]]) -> None: ...

    def vectors(self, first: int, fds: list[int]) -> None: ...


class FabricFunction(PlainFunction):
    """A virtio-ism function of a `Fabric`: registers trap, regions appear in BAR 4 as QEMU's map agent puts them."""

    def __init__(self, port: InMemoryTransport) -> None:
        super().__init__()
        self.port = port
        self.sizes = {index: port.bar_size(index) for index in range(6)} | {7: CONFIG_SIZE}

    def read(self, index: int, offset: int, length: int) -> bytes:
        return self.port.config_read(offset, length) if index == 7 else self.port.bar_read(index, offset, length)

    def write(self, index: int, offset: int, data: bytes) -> None:
        if index == 7:
            self.port.config_write(offset, data)
        else:
            self.port.bar_write(index, offset, data)

    def place(self, mapping: Mapping, at: int, length: int, index: int, offset: int) -> None:
        mapping.share(at, self.port.window.contiguous([Span(offset, length)]))

    def reset(self) -> None:
        self.port.reset()

    def dma(self, maps: dict[int, tuple[int, int]]) -> None:
        self.port._memory.buffers = {
            iova: SimpleNamespace(  # type: ignore[misc]
                view=memoryview((ctypes.c_char * size).from_address(vaddr)).cast("B"), length=size
            )
            for iova, (vaddr, size) in maps.items()
        }

    def vectors(self, first: int, fds: list[int]) -> None:
        self.port.set_vectors(first, [None if fd < 0 else fd for fd in fds])


class FakeVfio:
    """The kernel. Implements `ism.driver.vfio_iommu.Kernel`.

    Attributes: `places` (give it to `VfioTransport.open`), `settings`, `maps` (iova: address, size), `log` (names of
    requests, in order).
    """

    def __init__(self, folder: Path, function: PlainFunction | None = None, **settings: Any) -> None:
        self.settings = Settings(**settings)
        self.function = function or PlainFunction()
        self.places = Places(folder / "sys", folder / "dev", folder / "pagemap")
        self.maps: dict[int, tuple[int, int]] = {}
        self.log: list[str] = []
        self._files: dict[int, tuple[str, Any]] = {}
        self._triggers: dict[tuple[int, int], int] = {}
        self._msix: set[int] | None = None
        self._intx_masked = self._intx_pending = False
        self._make_sysfs()

    # -- what the file system shows -----------------------------------------------------------------------------

    def _make_sysfs(self) -> None:
        sysfs, dev, settings = self.places.sysfs, self.places.dev, self.settings
        folder = sysfs / BDF
        group = sysfs / "groups" / "7"
        (group / "devices").mkdir(parents=True)
        folder.mkdir()
        (group / "devices" / BDF).symlink_to(folder)
        (folder / "iommu_group").symlink_to(group)
        self.bind("vfio-pci")
        (dev / "vfio" / "devices").mkdir(parents=True)
        (dev / "vfio" / "vfio").touch()
        if settings.group:
            (dev / "vfio" / ("noiommu-7" if settings.no_iommu else "7")).touch(settings.owned)
        if settings.iommufd:
            (dev / "iommu").touch()
        if settings.cdev:
            (folder / "vfio-dev" / "vfio0").mkdir(parents=True)
            (dev / "vfio" / "devices" / "vfio0").touch()

    def bind(self, driver: str | None, bdf: str = BDF) -> None:
        """Bind a function to a driver, or to none."""
        folder, link = self.places.sysfs / bdf, self.places.sysfs / bdf / "driver"
        folder.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        if driver is not None:
            (self.places.sysfs / "drivers" / driver).mkdir(parents=True, exist_ok=True)
            link.symlink_to(self.places.sysfs / "drivers" / driver)

    def add_neighbour(self, bdf: str, driver: str) -> None:
        """Put another function into the IOMMU group, which makes it unusable."""
        self.bind(driver, bdf)
        (self.places.sysfs / "groups" / "7" / "devices" / bdf).symlink_to(self.places.sysfs / bdf)
        self.settings.viable = False

    # -- descriptors --------------------------------------------------------------------------------------------

    def _new(self, kind: str, state: Any = None) -> int:
        fd = os.memfd_create(f"fake-{kind}", os.MFD_CLOEXEC)
        self._files[fd] = (kind, state if state is not None else {})
        return fd

    def _open_kinds(self) -> list[str]:
        return [kind for kind, _ in self._files.values()]

    def open(self, path: Path) -> int:
        if not path.exists():
            raise _refuse(errno.ENOENT)
        if path.name in self.settings.no_right:
            raise _refuse(errno.EACCES)
        if path.name in ("7", "noiommu-7"):
            if {"group", "device"} & set(self._open_kinds()):
                raise _refuse(errno.EBUSY)
            return self._new("group")
        return self._new({"vfio": "container", "iommu": "iommufd", "vfio0": "cdev"}[path.name])

    def close(self, fd: int) -> None:
        kind, state = self._files.pop(fd)
        os.close(fd)
        if kind == "device" or (kind == "cdev" and state):
            for trigger in self._triggers.values():
                os.close(trigger)
            self._triggers.clear()
            self._msix = None
            self.function.dma({})
        if kind in ("container", "iommufd"):
            self.maps.clear()

    def _device(self, fd: int) -> None:
        """The descriptor leads to the device from now on."""
        os.ftruncate(fd, 8 << REGION_SHIFT)
        self.function.fd = fd
        os.pwrite(fd, struct.pack("<HHHH", 0x1AF4, 0x106C, 2, 0x10), 7 << REGION_SHIFT)

    def _check_device(self, fd: int) -> None:
        kind, state = self._files[fd]
        if kind != "device" and not (kind == "cdev" and state):
            raise _refuse(errno.EINVAL)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        self._check_device(fd)
        index, at = offset >> REGION_SHIFT, offset & ((1 << REGION_SHIFT) - 1)
        self.log.append(f"pread {index}")
        return self.function.read(index, at, min(length, self.function.sizes[index] - at))

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        self._check_device(fd)
        index, at = offset >> REGION_SHIFT, offset & ((1 << REGION_SHIFT) - 1)
        self.log.append(f"pwrite {index}")
        self.function.write(index, at, data)
        return len(data)

    def place(self, mapping: Mapping, at: int, length: int, fd: int, offset: int) -> None:
        self._check_device(fd)
        index, start = offset >> REGION_SHIFT, offset & ((1 << REGION_SHIFT) - 1)
        if index not in self.settings.mappable or start + length > max(self.function.sizes[index], PAGE_SIZE):
            raise _refuse(errno.EINVAL)
        self.log.append(f"mmap {index}")
        self.function.place(mapping, at, length, index, start)

    # -- requests -----------------------------------------------------------------------------------------------

    def ioctl(self, fd: int, request: int, argument: bytearray | int) -> int:
        name = Request(request).name
        self.log.append(name)
        kind, state = self._files[fd]
        result = getattr(self, f"_{name.lower()}")(fd, kind, state, argument)
        return int(result or 0)

    @staticmethod
    def _unpack(made: type[Struct], argument: bytearray) -> Any:
        row = made.unpack(argument)
        if getattr(row, made.FIELDS[0].name) < made.SIZE:
            raise _refuse(errno.EINVAL)
        return row

    def _vfio_get_api_version(self, *_: Any) -> int:
        return 0

    def _vfio_check_extension(self, fd: int, kind: str, state: Any, argument: int) -> bool:
        return argument == (uapi.IommuType.VFIO_NOIOMMU_IOMMU if self.settings.no_iommu else 3) and self.settings.type1

    def _vfio_set_iommu(self, fd: int, kind: str, state: Any, argument: int) -> None:
        if "group" not in state:
            raise _refuse(errno.EINVAL)
        if not self.settings.remapping:
            raise _refuse(errno.EPERM)
        state["iommu"] = argument

    def _vfio_group_get_status(self, fd: int, kind: str, state: Any, argument: bytearray) -> None:
        self._unpack(uapi.GroupStatus, argument)
        uapi.GroupStatus(flags=int(self.settings.viable)).pack_into(argument)

    def _vfio_group_set_container(self, fd: int, kind: str, state: Any, argument: bytearray) -> None:
        (container,) = struct.unpack("<i", argument)
        if self._files[container][0] != "container":
            raise _refuse(errno.EBADFD)
        state["container"] = container
        self._files[container][1]["group"] = fd

    def _vfio_group_get_device_fd(self, fd: int, kind: str, state: Any, argument: bytearray) -> int:
        if "iommu" not in self._files[state["container"]][1]:
            raise _refuse(errno.EINVAL)
        if bytes(argument) != BDF.encode() + b"\0":
            raise _refuse(errno.ENODEV)
        made = self._new("device")
        self._device(made)
        return made

    def _vfio_device_bind_iommufd(self, fd: int, kind: str, state: Any, argument: bytearray) -> None:
        row = self._unpack(uapi.BindIommufd, argument)
        if "group" in self._open_kinds():
            raise _refuse(errno.EBUSY)
        if not self.settings.viable:
            raise _refuse(errno.EBUSY)
        if any(other[0] == "cdev" and other[1] for other in self._files.values()):
            raise _refuse(errno.EINVAL)
        state["iommufd"] = row.iommufd
        self._device(fd)

    def _vfio_device_attach_iommufd_pt(self, fd: int, kind: str, state: Any, argument: bytearray) -> None:
        if self._unpack(uapi.AttachIommufd, argument).pt_id != 5:
            raise _refuse(errno.ENOENT)
        if not self.settings.remapping:
            raise _refuse(errno.EPERM)

    def _iommu_ioas_alloc(self, fd: int, kind: str, state: Any, argument: bytearray) -> None:
        self._unpack(uapi.IoasAlloc, argument)
        uapi.IoasAlloc(out_ioas_id=5).pack_into(argument)

    def _iommu_ioas_iova_ranges(self, fd: int, kind: str, state: Any, argument: bytearray) -> None:
        row = self._unpack(uapi.IoasIovaRanges, argument)
        ranges = [uapi.IovaRange(start=start, end=end).pack() for start, end in self.settings.iova]
        raw = b"".join(ranges[: row.num_iovas])
        ctypes.memmove(row.allowed_iovas, raw, len(raw))
        uapi.IoasIovaRanges(
            ioas_id=row.ioas_id, num_iovas=len(ranges), allowed_iovas=row.allowed_iovas, out_iova_alignment=PAGE_SIZE
        ).pack_into(argument)
        if len(ranges) > row.num_iovas:
            raise _refuse(errno.EMSGSIZE)

    def _iommu_ioas_map(self, fd: int, kind: str, state: Any, argument: bytearray) -> None:
        row = self._unpack(uapi.IoasMap, argument)
        if row.flags != 7:
            raise _refuse(errno.EOPNOTSUPP)
        self._map(row.iova, row.user_va, row.length)

    def _iommu_ioas_unmap(self, fd: int, kind: str, state: Any, argument: bytearray) -> None:
        row = self._unpack(uapi.IoasUnmap, argument)
        if self.maps.get(row.iova, (0, 0))[1] != row.length:
            raise _refuse(errno.ENOENT)
        self._unmap(row.iova)

    def _vfio_iommu_get_info(self, fd: int, kind: str, state: Any, argument: bytearray) -> None:
        size, at = uapi.Type1Info.SIZE, uapi.Type1Info.SIZE + 16
        rows = b"".join(uapi.IovaRange(start=start, end=end).pack() for start, end in self.settings.iova)
        whole = at + 16 + len(rows) if self.settings.says_iova else size
        room = self._unpack(uapi.Type1Info, argument).argsz
        if room < whole or not self.settings.says_iova:
            uapi.Type1Info(argsz=whole, flags=3 if self.settings.says_iova else 1).pack_into(argument)
            return
        uapi.Type1Info(argsz=whole, flags=3, cap_offset=size).pack_into(argument)
        uapi.CapabilityHeader(id=3, version=1, next=at).pack_into(argument, size)
        uapi.IovaRangeCapability(nr_iovas=len(self.settings.iova)).pack_into(argument, at)
        uapi.CapabilityHeader(id=1, version=1, next=0).pack_into(argument, at)
        argument[at + 16 : at + 16 + len(rows)] = rows

    def _vfio_iommu_map_dma(self, fd: int, kind: str, state: Any, argument: bytearray) -> None:
        row = self._unpack(uapi.DmaMap, argument)
        self._map(row.iova, row.vaddr, row.size)

    def _vfio_iommu_unmap_dma(self, fd: int, kind: str, state: Any, argument: bytearray) -> None:
        row = self._unpack(uapi.DmaUnmap, argument)
        if self.maps.get(row.iova, (0, 0))[1] != row.size:
            raise _refuse(errno.EINVAL)
        self._unmap(row.iova)

    def _map(self, iova: int, vaddr: int, size: int) -> None:
        if (iova | vaddr | size) % PAGE_SIZE or not size:
            raise _refuse(errno.EINVAL)
        if not any(start <= iova and iova + size - 1 <= end for start, end in self.settings.iova):
            raise _refuse(errno.EINVAL)
        if any(iova < at + length and at < iova + size for at, (_, length) in self.maps.items()):
            raise _refuse(errno.EEXIST)
        if sum(length for _, length in self.maps.values()) + size > self.settings.memlock:
            raise _refuse(errno.ENOMEM)
        self.maps[iova] = (vaddr, size)
        self.function.dma(self.maps)

    def _unmap(self, iova: int) -> None:
        del self.maps[iova]
        self.function.dma(self.maps)

    # -- the device ---------------------------------------------------------------------------------------------

    def _vfio_device_get_info(self, fd: int, kind: str, state: Any, argument: bytearray) -> None:
        self._check_device(fd)
        flags = uapi.DeviceFlag.VFIO_DEVICE_FLAGS_PCI | (1 if self.settings.resets else 0)
        uapi.DeviceInfo(flags=flags, num_regions=9, num_irqs=5).pack_into(argument)

    def _vfio_device_get_region_info(self, fd: int, kind: str, state: Any, argument: bytearray) -> None:
        row = self._unpack(uapi.RegionInfo, argument)
        size, flags = self.function.sizes.get(row.index, 0), 3 if row.index in self.function.sizes else 0
        areas = self.settings.sparse.get(row.index)
        if row.index in self.settings.mappable:
            flags |= uapi.RegionFlag.VFIO_REGION_INFO_FLAG_MMAP
        needed, chain = 32, 0
        if areas is not None:
            flags |= uapi.RegionFlag.VFIO_REGION_INFO_FLAG_CAPS
            needed = 32 + 16 + 16 * len(areas)
            if row.argsz >= needed:
                chain = 32
                uapi.SparseMmap(nr_areas=len(areas)).pack_into(argument, 32)
                uapi.CapabilityHeader(id=1, version=1, next=0).pack_into(argument, 32)
                for number, (offset, length) in enumerate(areas):
                    uapi.SparseArea(offset=offset, size=length).pack_into(argument, 48 + 16 * number)
        uapi.RegionInfo(
            argsz=max(needed, 32),
            flags=flags,
            index=row.index,
            cap_offset=chain,
            size=size,
            offset=row.index << REGION_SHIFT,
        ).pack_into(argument)

    def _vfio_device_get_irq_info(self, fd: int, kind: str, state: Any, argument: bytearray) -> None:
        row = self._unpack(uapi.IrqInfo, argument)
        if row.index == Irq.VFIO_PCI_ERR_IRQ_INDEX and not self.settings.express:
            raise _refuse(errno.EINVAL)
        count = {0: int(self.settings.has_intx), 2: self.settings.vectors, 3: 1, 4: 1}.get(row.index, 0)
        flags = 1 | (6 if row.index == 0 else 0)
        if row.index == 2 and not self.settings.dynamic:
            flags |= uapi.IrqFlag.VFIO_IRQ_INFO_NORESIZE
        uapi.IrqInfo(flags=flags, index=row.index, count=count).pack_into(argument)

    def _vfio_device_set_irqs(self, fd: int, kind: str, state: Any, argument: bytearray) -> int:
        row = self._unpack(uapi.IrqSetHeader, argument)
        if row.flags & IrqSet.VFIO_IRQ_SET_ACTION_UNMASK:
            self._intx_masked = False
            if self._intx_pending:
                self.interrupt_line()
            return 0
        if row.flags & IrqSet.VFIO_IRQ_SET_DATA_NONE:
            if row.count or (row.index == 2 and self._msix is None):
                raise _refuse(errno.EINVAL)
            for key in [key for key in self._triggers if key[0] == row.index]:
                os.close(self._triggers.pop(key))
            if row.index == 2:
                self.function.vectors(0, [-1] * self.settings.vectors)
                self._msix = None
            return 0
        fds = list(struct.unpack_from(f"<{row.count}i", argument, uapi.IrqSetHeader.SIZE))
        if row.index == 0 and self._msix is not None:
            raise _refuse(errno.EINVAL)
        if row.index == 2:
            left = self._allocate(row.start, row.count, fds)
            if left:
                return left
            self.function.vectors(row.start, fds)
        for number, trigger in enumerate(fds, row.start):
            old = self._triggers.pop((row.index, number), -1)
            if old >= 0:
                os.close(old)
            if trigger >= 0:
                self._triggers[row.index, number] = os.dup(trigger)
        return 0

    def _allocate(self, start: int, count: int, fds: list[int]) -> int:
        if start + count > self.settings.vectors or any(key[0] == 0 for key in self._triggers):
            raise _refuse(errno.EINVAL)
        if self._msix is None:
            if start + count > self.settings.irqs_left:
                return self.settings.irqs_left
            self._msix = set(range(start + count))
            return 0
        new = {number for number, fd in enumerate(fds, start) if fd >= 0} - self._msix
        if new and not self.settings.dynamic:
            raise _refuse(errno.EINVAL)
        if len(self._msix | new) > self.settings.irqs_left:
            raise _refuse(errno.ENOSPC)
        self._msix |= new
        return 0

    def _vfio_device_reset(self, *_: Any) -> None:
        if not self.settings.resets:
            raise _refuse(errno.EINVAL)
        self.function.reset()

    # -- the device's side --------------------------------------------------------------------------------------

    @property
    def open_files(self) -> list[str]:
        return sorted(self._open_kinds())

    def triggers(self, index: Irq) -> list[int]:
        """Interrupts of that index that are bound."""
        return sorted(number for kind, number in self._triggers if kind == index)

    def interrupt(self, vector: int) -> None:
        trigger = self._triggers.get((Irq.VFIO_PCI_MSIX_IRQ_INDEX, vector))
        if trigger is not None:
            os.eventfd_write(trigger, 1)

    def interrupt_line(self) -> None:
        if self._intx_masked:
            self._intx_pending = True
            return
        self._intx_masked, self._intx_pending = True, False
        os.eventfd_write(self._triggers[Irq.VFIO_PCI_INTX_IRQ_INDEX, 0], 1)

    def raise_special(self, index: Irq) -> None:
        """Ask for the device back, or report a bus error."""
        os.eventfd_write(self._triggers[index, 0], 1)

    def dma_read(self, iova: int, length: int) -> bytes:
        """What the device reads; KeyError is a fault of the IOMMU."""
        for at, (vaddr, size) in self.maps.items():
            if at <= iova and iova + length <= at + size:
                return ctypes.string_at(vaddr + iova - at, length)
        raise KeyError(iova)

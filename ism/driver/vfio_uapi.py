# SPDX-License-Identifier: Apache-2.0
"""What the kernel's VFIO and iommufd interfaces look like: request numbers, structures, bits. No system calls here.

Every structure begins with its size as the caller knows it (`argsz`, `size`); a kernel that knows more says so by a
larger size, and one that answers with a chain of capabilities sets the offset of the first, from the start of the
answer. `tests/unit/test_driver_vfio_uapi.py` compares every number with the headers of the machine it runs on.
Source: Linux include/uapi/linux/vfio.h, include/uapi/linux/iommufd.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum, IntFlag
from typing import TypeVar

from ism.errors import TransportError
from ism.layout import Buffer, Struct, field

_TYPE, _BASE, _IOMMUFD_BASE = ord(";"), 100, 0x80
_MOST_CAPABILITIES = 64

API_VERSION = 0

_Row = TypeVar("_Row", bound=Struct)


def _io(number: int) -> int:
    """_IO(';', number): neither a size nor a direction is part of a VFIO request."""
    return _TYPE << 8 | number


class Request(IntEnum):
    """The `request` argument of ioctl(2)."""

    VFIO_GET_API_VERSION = _io(_BASE)
    VFIO_CHECK_EXTENSION = _io(_BASE + 1)
    VFIO_SET_IOMMU = _io(_BASE + 2)
    VFIO_GROUP_GET_STATUS = _io(_BASE + 3)
    VFIO_GROUP_SET_CONTAINER = _io(_BASE + 4)
    VFIO_GROUP_GET_DEVICE_FD = _io(_BASE + 6)
    VFIO_DEVICE_GET_INFO = _io(_BASE + 7)
    VFIO_DEVICE_GET_REGION_INFO = _io(_BASE + 8)
    VFIO_DEVICE_GET_IRQ_INFO = _io(_BASE + 9)
    VFIO_DEVICE_SET_IRQS = _io(_BASE + 10)
    VFIO_DEVICE_RESET = _io(_BASE + 11)
    VFIO_IOMMU_GET_INFO = _io(_BASE + 12)
    VFIO_IOMMU_MAP_DMA = _io(_BASE + 13)
    VFIO_IOMMU_UNMAP_DMA = _io(_BASE + 14)
    VFIO_DEVICE_BIND_IOMMUFD = _io(_BASE + 18)
    VFIO_DEVICE_ATTACH_IOMMUFD_PT = _io(_BASE + 19)
    IOMMU_IOAS_ALLOC = _io(_IOMMUFD_BASE + 1)
    IOMMU_IOAS_IOVA_RANGES = _io(_IOMMUFD_BASE + 4)
    IOMMU_IOAS_MAP = _io(_IOMMUFD_BASE + 5)
    IOMMU_IOAS_UNMAP = _io(_IOMMUFD_BASE + 6)


class IommuType(IntEnum):
    """What VFIO_CHECK_EXTENSION is asked for and VFIO_SET_IOMMU gets."""

    VFIO_TYPE1v2_IOMMU = 3
    VFIO_NOIOMMU_IOMMU = 8


class GroupFlag(IntFlag):
    VFIO_GROUP_FLAGS_VIABLE = 1 << 0
    VFIO_GROUP_FLAGS_CONTAINER_SET = 1 << 1


class DeviceFlag(IntFlag):
    VFIO_DEVICE_FLAGS_RESET = 1 << 0
    VFIO_DEVICE_FLAGS_PCI = 1 << 1


class RegionFlag(IntFlag):
    VFIO_REGION_INFO_FLAG_READ = 1 << 0
    VFIO_REGION_INFO_FLAG_WRITE = 1 << 1
    VFIO_REGION_INFO_FLAG_MMAP = 1 << 2
    VFIO_REGION_INFO_FLAG_CAPS = 1 << 3


class IrqFlag(IntFlag):
    VFIO_IRQ_INFO_EVENTFD = 1 << 0
    VFIO_IRQ_INFO_MASKABLE = 1 << 1
    VFIO_IRQ_INFO_AUTOMASKED = 1 << 2
    VFIO_IRQ_INFO_NORESIZE = 1 << 3


class IrqSet(IntFlag):
    """Flags of VFIO_DEVICE_SET_IRQS: one of DATA, one of ACTION."""

    VFIO_IRQ_SET_DATA_NONE = 1 << 0
    VFIO_IRQ_SET_DATA_EVENTFD = 1 << 2
    VFIO_IRQ_SET_ACTION_UNMASK = 1 << 4
    VFIO_IRQ_SET_ACTION_TRIGGER = 1 << 5


class DmaFlag(IntFlag):
    VFIO_DMA_MAP_FLAG_READ = 1 << 0
    VFIO_DMA_MAP_FLAG_WRITE = 1 << 1


class IommuInfoFlag(IntFlag):
    VFIO_IOMMU_INFO_PGSIZES = 1 << 0
    VFIO_IOMMU_INFO_CAPS = 1 << 1


class IoasMapFlag(IntFlag):
    IOMMU_IOAS_MAP_FIXED_IOVA = 1 << 0
    IOMMU_IOAS_MAP_WRITEABLE = 1 << 1
    IOMMU_IOAS_MAP_READABLE = 1 << 2


class Region(IntEnum):
    """Indexes of what vfio-pci calls regions: BARs 0 to 5 are their own number."""

    VFIO_PCI_BAR0_REGION_INDEX = 0
    VFIO_PCI_BAR5_REGION_INDEX = 5
    VFIO_PCI_CONFIG_REGION_INDEX = 7


class Irq(IntEnum):
    """Indexes of the interrupts of vfio-pci."""

    VFIO_PCI_INTX_IRQ_INDEX = 0
    VFIO_PCI_MSIX_IRQ_INDEX = 2
    VFIO_PCI_ERR_IRQ_INDEX = 3
    VFIO_PCI_REQ_IRQ_INDEX = 4


class Capability(IntEnum):
    """Ids of capabilities; each kind of answer counts from 1."""

    VFIO_REGION_INFO_CAP_SPARSE_MMAP = 1
    VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE = 1


class GroupStatus(Struct, size=8):
    """struct vfio_group_status."""

    argsz: int = field("I", 0, "bytes of this structure", default=8)
    flags: int = field("I", 4, "GroupFlag, out", default=0)


class DeviceInfo(Struct, size=16):
    """struct vfio_device_info up to what every kernel has."""

    argsz: int = field("I", 0, "bytes of this structure", default=16)
    flags: int = field("I", 4, "DeviceFlag, out", default=0)
    num_regions: int = field("I", 8, "regions, out", default=0)
    num_irqs: int = field("I", 12, "interrupt indexes, out", default=0)


class RegionInfo(Struct, size=32):
    """struct vfio_region_info."""

    argsz: int = field("I", 0, "bytes in, bytes needed for the whole answer out", default=32)
    flags: int = field("I", 4, "RegionFlag, out", default=0)
    index: int = field("I", 8, "which region, in")
    cap_offset: int = field("I", 12, "offset of the first capability in the answer, out, 0 for none", default=0)
    size: int = field("Q", 16, "bytes of the region, out, 0 for none", default=0)
    offset: int = field("Q", 24, "where the region begins in the device's descriptor, out", default=0)


class CapabilityHeader(Struct, size=8):
    """struct vfio_info_cap_header."""

    id: int = field("H", 0, "Capability")
    version: int = field("H", 2, "of the layout")
    next: int = field("I", 4, "offset of the next in the answer, 0 for none")


class SparseMmap(Struct, size=16):
    """struct vfio_region_info_cap_sparse_mmap; `nr_areas` times SparseArea follow."""

    nr_areas: int = field("I", 8, "parts of the region that can be mapped")


class SparseArea(Struct, size=16):
    """struct vfio_region_sparse_mmap_area."""

    offset: int = field("Q", 0, "in the region")
    size: int = field("Q", 8, "bytes")


class IrqInfo(Struct, size=16):
    """struct vfio_irq_info."""

    argsz: int = field("I", 0, "bytes of this structure", default=16)
    flags: int = field("I", 4, "IrqFlag, out", default=0)
    index: int = field("I", 8, "Irq, in")
    count: int = field("I", 12, "interrupts of this index, out", default=0)


class IrqSetHeader(Struct, size=20):
    """struct vfio_irq_set; for DATA_EVENTFD, `count` descriptors (s32, -1 for none) follow."""

    argsz: int = field("I", 0, "bytes with what follows", default=20)
    flags: int = field("I", 4, "IrqSet")
    index: int = field("I", 8, "Irq")
    start: int = field("I", 12, "first interrupt")
    count: int = field("I", 16, "interrupts; 0 with DATA_NONE and ACTION_TRIGGER: end them all")


class Type1Info(Struct, size=24):
    """struct vfio_iommu_type1_info."""

    argsz: int = field("I", 0, "bytes in, bytes needed for the whole answer out", default=24)
    flags: int = field("I", 4, "IommuInfoFlag, out", default=0)
    iova_pgsizes: int = field("Q", 8, "bitmap of page sizes, out", default=0)
    cap_offset: int = field("I", 16, "offset of the first capability in the answer, out, 0 for none", default=0)


class IovaRangeCapability(Struct, size=16):
    """struct vfio_iommu_type1_info_cap_iova_range; `nr_iovas` times IovaRange follow."""

    nr_iovas: int = field("I", 8, "ranges")


class IovaRange(Struct, size=16):
    """struct vfio_iova_range, and struct iommu_iova_range, which calls `end` last."""

    start: int = field("Q", 0, "first address that may be mapped")
    end: int = field("Q", 8, "last one, inclusive")


class DmaMap(Struct, size=32):
    """struct vfio_iommu_type1_dma_map."""

    argsz: int = field("I", 0, "bytes of this structure", default=32)
    flags: int = field("I", 4, "DmaFlag")
    vaddr: int = field("Q", 8, "address in this process")
    iova: int = field("Q", 16, "address for the device")
    size: int = field("Q", 24, "bytes")


class DmaUnmap(Struct, size=24):
    """struct vfio_iommu_type1_dma_unmap."""

    argsz: int = field("I", 0, "bytes of this structure", default=24)
    flags: int = field("I", 4, "0", default=0)
    iova: int = field("Q", 8, "address for the device")
    size: int = field("Q", 16, "bytes; bytes unmapped, out")


class BindIommufd(Struct, size=16):
    """struct vfio_device_bind_iommufd, as it was in Linux 6.6."""

    argsz: int = field("I", 0, "bytes of this structure", default=16)
    flags: int = field("I", 4, "0", default=0)
    iommufd: int = field("i", 8, "descriptor of /dev/iommu")
    out_devid: int = field("I", 12, "name of the device there, out", default=0)


class AttachIommufd(Struct, size=12):
    """struct vfio_device_attach_iommufd_pt, as it was in Linux 6.6."""

    argsz: int = field("I", 0, "bytes of this structure", default=12)
    flags: int = field("I", 4, "0", default=0)
    pt_id: int = field("I", 8, "address space to attach to")


class IoasAlloc(Struct, size=12):
    """struct iommu_ioas_alloc."""

    size: int = field("I", 0, "bytes of this structure", default=12)
    flags: int = field("I", 4, "0", default=0)
    out_ioas_id: int = field("I", 8, "name of the new address space, out", default=0)


class IoasIovaRanges(Struct, size=32):
    """struct iommu_ioas_iova_ranges."""

    size: int = field("I", 0, "bytes of this structure", default=32)
    ioas_id: int = field("I", 4, "address space")
    num_iovas: int = field("I", 8, "room in ranges in, ranges out (EMSGSIZE: too many)")
    allowed_iovas: int = field("Q", 16, "address of an array of IovaRange")
    out_iova_alignment: int = field("Q", 24, "what addresses must be multiples of, out", default=0)


class IoasMap(Struct, size=40):
    """struct iommu_ioas_map."""

    size: int = field("I", 0, "bytes of this structure", default=40)
    flags: int = field("I", 4, "IoasMapFlag")
    ioas_id: int = field("I", 8, "address space")
    user_va: int = field("Q", 16, "address in this process")
    length: int = field("Q", 24, "bytes")
    iova: int = field("Q", 32, "address for the device")


class IoasUnmap(Struct, size=24):
    """struct iommu_ioas_unmap."""

    size: int = field("I", 0, "bytes of this structure", default=24)
    ioas_id: int = field("I", 4, "address space")
    iova: int = field("Q", 8, "address for the device")
    length: int = field("Q", 16, "bytes; bytes unmapped, out")


def irq_set(flags: IrqSet, index: int, start: int, count: int, fds: Sequence[int] = ()) -> bytearray:
    """Encode the argument of VFIO_DEVICE_SET_IRQS."""
    size = IrqSetHeader.SIZE + 4 * len(fds)
    head = IrqSetHeader(argsz=size, flags=flags, index=index, start=start, count=count)
    return bytearray(head.pack() + struct.pack(f"<{len(fds)}i", *fds))


def capability_chain(answer: Buffer, first: int) -> Iterator[tuple[int, int]]:
    """Yield (id, offset) of each capability of an answer.

    Raises: TransportError for a chain that leaves the answer or does not end.
    """
    at = first
    for _ in range(_MOST_CAPABILITIES):
        if at == 0:
            return
        if at + CapabilityHeader.SIZE > len(answer):
            break
        head = CapabilityHeader.unpack(answer, at)
        yield head.id, at
        at = head.next
    raise TransportError(f"the kernel's capabilities leave its answer of {len(answer)} bytes, or do not end")


def table(row: type[_Row], answer: Buffer, at: int, count: int) -> list[_Row]:
    """Decode `count` rows of an array. Raises TransportError when the answer ends before they do."""
    if at + count * row.SIZE > len(answer):
        raise TransportError(f"the kernel names {count} entries in an answer of {len(answer)} bytes")
    return [row.unpack(answer, at + index * row.SIZE) for index in range(count)]

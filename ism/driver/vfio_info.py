# SPDX-License-Identifier: Apache-2.0
"""What the kernel says of an open VFIO device: its regions and which parts of them can be mapped, its interrupts.

Only asks; nothing here changes the device. All raise OSError for what the kernel refuses, TransportError for an answer
that contradicts itself.
Source: Linux include/uapi/linux/vfio.h.
"""

from __future__ import annotations

from dataclasses import dataclass

from ism.driver.transport import Span
from ism.driver.vfio_iommu import Kernel
from ism.driver.vfio_uapi import (
    Capability,
    DeviceInfo,
    Irq,
    IrqFlag,
    IrqInfo,
    RegionFlag,
    RegionInfo,
    Request,
    SparseArea,
    SparseMmap,
    capability_chain,
    table,
)
from ism.memory import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class RegionLayout:
    """One BAR, or configuration space: `size`, `offset` in the device's descriptor, `areas` that can be mapped."""

    size: int
    offset: int
    areas: tuple[Span, ...] = ()

    def maps(self, span: Span) -> bool:
        """Whether the whole span can be mapped."""
        return any(
            area.offset <= span.offset and span.offset + span.length <= area.offset + area.length for area in self.areas
        )


def device_info(kernel: Kernel, device: int) -> DeviceInfo:
    """Return flags and how many regions and interrupts there are."""
    answer = bytearray(DeviceInfo().pack())
    kernel.ioctl(device, Request.VFIO_DEVICE_GET_INFO, answer)
    return DeviceInfo.unpack(answer)


def region_layout(kernel: Kernel, device: int, index: int) -> RegionLayout:
    """Return where a region is; its size is 0 when there is none."""
    answer = bytearray(RegionInfo(index=index).pack())
    kernel.ioctl(device, Request.VFIO_DEVICE_GET_REGION_INFO, answer)
    size = RegionInfo.unpack(answer).argsz
    if size > len(answer):  # capabilities follow
        answer = bytearray(RegionInfo(index=index, argsz=size).pack().ljust(size, b"\0"))
        kernel.ioctl(device, Request.VFIO_DEVICE_GET_REGION_INFO, answer)
    info = RegionInfo.unpack(answer)
    if not info.flags & RegionFlag.VFIO_REGION_INFO_FLAG_MMAP:
        return RegionLayout(info.size, info.offset)
    if info.flags & RegionFlag.VFIO_REGION_INFO_FLAG_CAPS:
        for kind, at in capability_chain(answer, info.cap_offset):
            if kind == Capability.VFIO_REGION_INFO_CAP_SPARSE_MMAP:
                (head,) = table(SparseMmap, answer, at, 1)
                rows = table(SparseArea, answer, at + SparseMmap.SIZE, head.nr_areas)
                return RegionLayout(info.size, info.offset, tuple(Span(row.offset, row.size) for row in rows))
    # the kernel maps the rest of the last page with it, or, for a BAR that shares its page, does not offer to map it
    return RegionLayout(info.size, info.offset, (Span(0, -(-info.size // PAGE_SIZE) * PAGE_SIZE),))


def irq_info(kernel: Kernel, device: int, info: DeviceInfo, index: Irq) -> IrqInfo:
    """Return what an interrupt index can do; its count is 0 when it cannot raise eventfds, or there is none."""
    none = IrqInfo(index=index)
    if index >= info.num_irqs:
        return none
    answer = bytearray(none.pack())
    try:
        kernel.ioctl(device, Request.VFIO_DEVICE_GET_IRQ_INFO, answer)
    except OSError:
        return none  # EINVAL: a function that is not PCI Express reports no errors
    found = IrqInfo.unpack(answer)
    return found if found.flags & IrqFlag.VFIO_IRQ_INFO_EVENTFD else none

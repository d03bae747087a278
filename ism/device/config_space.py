# SPDX-License-Identifier: Apache-2.0
"""The 256 bytes of PCI configuration space of one function (PCI local bus 3.0 chapter 6, virtio 1.3 section 4.1).

It owns the type 0 header, the BAR registers with their sizing protocol, and the capability list. Every byte has a mask
of the bits the driver may write; all others keep their value. It knows what the PCI configuration access capability
(virtio 1.3 section 4.1.4.9) holds, but not how to carry the access out: the function does that.

Identity: the device id is 0x1040 + 44. The subsystem device id is 0x40 or more, as virtio 1.3 section 4.1.2.1 asks of
a device that is not transitional, so that no legacy driver, which looks there for the virtio id, takes it for its own;
of those numbers it is 0x40 + 44. The subsystem vendor is the vendor, there being no environment to name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ism.device import bars
from ism.device.bars import Layout
from ism.layout import Struct, field
from ism.virtio import ism_spec
from ism.virtio.pci import (
    VENDOR_ID,
    CfgType,
    MsixCap,
    VirtioPciCap,
    VirtioPciCap64,
    VirtioPciCfgCap,
    VirtioPciNotifyCap,
)

CONFIG_SIZE = 256
SUBSYSTEM_ID = 0x40 + ism_spec.VIRTIO_ID_ISM

COMMAND_MEMORY = 0x0002
COMMAND_MASTER = 0x0004
COMMAND_PARITY = 0x0040
COMMAND_SERR = 0x0100
COMMAND_INTX_DISABLE = 0x0400
COMMAND_WRITABLE = COMMAND_MEMORY | COMMAND_MASTER | COMMAND_PARITY | COMMAND_SERR | COMMAND_INTX_DISABLE
STATUS_INTERRUPT = 0x0008
STATUS_CAPABILITIES = 0x0010
MSIX_ENABLE = 0x8000
MSIX_FUNCTION_MASK = 0x4000
BAR_TYPE_64 = 0x4
BAR_PREFETCHABLE = 0x8
FIRST_CAPABILITY = 0x40


class Header(Struct, size=64):
    """Type 0 header (PCI local bus 3.0 section 6.1)."""

    vendor_id: int = field("H", 0x00, "1af4", default=VENDOR_ID)
    device_id: int = field("H", 0x02, "0x1040 + virtio id", default=ism_spec.PCI_DEVICE_ID)
    command: int = field("H", 0x04, "memory, bus master, parity, SERR, INTx disable; rw", default=0)
    status: int = field("H", 0x06, "capabilities, interrupt status", default=STATUS_CAPABILITIES)
    revision: int = field("B", 0x08, "1: modern", default=ism_spec.PCI_REVISION)
    prog_if: int = field("B", 0x09, "low byte of the class", default=ism_spec.PCI_CLASS & 0xFF)
    class_device: int = field("H", 0x0A, "memory controller, other", default=ism_spec.PCI_CLASS >> 8)
    cache_line_size: int = field("B", 0x0C, "no effect; rw", default=0)
    latency_timer: int = field("B", 0x0D, "0", default=0)
    header_type: int = field("B", 0x0E, "0, one function", default=0)
    bar0: int = field("I", 0x10, "virtio structures; rw above the size", default=0)
    bar1: int = field("I", 0x14, "MSI-X; rw above the size", default=0)
    bar2: int = field("I", 0x18, "doorbells; rw above the size", default=0)
    bar3: int = field("I", 0x1C, "0: absent", default=0)
    bar4: int = field("I", 0x20, "regions window, low word; rw above the size", default=0)
    bar5: int = field("I", 0x24, "regions window, high word; rw above the size", default=0)
    subsystem_vendor_id: int = field("H", 0x2C, "1af4", default=VENDOR_ID)
    subsystem_id: int = field("H", 0x2E, "0x40 or more", default=SUBSYSTEM_ID)
    capabilities: int = field("B", 0x34, "offset of the first capability", default=FIRST_CAPABILITY)
    interrupt_line: int = field("B", 0x3C, "no effect; rw", default=0)
    interrupt_pin: int = field("B", 0x3D, "1: INTA", default=1)


_HEADER_WRITABLE = Header(
    vendor_id=0,
    device_id=0,
    command=COMMAND_WRITABLE,
    status=0,
    revision=0,
    prog_if=0,
    class_device=0,
    cache_line_size=0xFF,
    subsystem_vendor_id=0,
    subsystem_id=0,
    capabilities=0,
    interrupt_line=0xFF,
    interrupt_pin=0,
)

_CFG_WRITABLE = VirtioPciCfgCap(
    cap_vndr=0,
    cap_next=0,
    cap_len=0,
    cfg_type=0,
    bar=0xFF,
    id=0,
    offset=0xFFFFFFFF,
    length=0xFFFFFFFF,
    pci_cfg_data=0xFFFFFFFF,
)

_COMMAND, _STATUS = Header.offset_of("command"), Header.offset_of("status")
_MSIX_CONTROL = MsixCap.offset_of("control")

_AnyCap = VirtioPciCap | VirtioPciCap64 | VirtioPciNotifyCap | VirtioPciCfgCap | MsixCap


@dataclass(frozen=True, slots=True)
class CfgAccess:
    """What the PCI configuration access capability asks for: `length` bytes at `offset` of BAR `bar`."""

    bar: int
    offset: int
    length: int


def _virtio_cap(cfg_type: CfgType, offset: int, length: int) -> VirtioPciCap:
    return VirtioPciCap(cap_next=0, cfg_type=cfg_type, bar=bars.BAR_VIRTIO, id=0, offset=offset, length=length)


def _shared_memory_cap(shmid: int, bar: int, length: int) -> VirtioPciCap64:
    return VirtioPciCap64(
        cap_next=0, bar=bar, id=shmid, offset=0, length=length & 0xFFFFFFFF, offset_hi=0, length_hi=length >> 32
    )


def capabilities(layout: Layout) -> list[_AnyCap]:
    """List the function's capabilities in order of preference, `cap_next` not yet set."""
    table_size = layout.table_length // bars.MsixEntry.SIZE
    return [
        _virtio_cap(CfgType.COMMON_CFG, bars.COMMON_OFFSET, layout.common_length),
        VirtioPciNotifyCap(
            cap_next=0,
            bar=bars.BAR_VIRTIO,
            id=0,
            offset=bars.QUEUE_NOTIFY_OFFSET,
            length=layout.queue_notify_length,
            notify_off_multiplier=bars.QUEUE_NOTIFY_MULTIPLIER,
        ),
        _virtio_cap(CfgType.ISR_CFG, bars.ISR_OFFSET, bars.ISR_LENGTH),
        _virtio_cap(CfgType.DEVICE_CFG, bars.DEVICE_OFFSET, layout.device_length),
        VirtioPciCfgCap(cap_next=0, bar=0, id=0, offset=0, length=0, pci_cfg_data=0),
        _shared_memory_cap(ism_spec.SHMID_REGIONS, bars.BAR_REGIONS, layout.bar_size(bars.BAR_REGIONS)),
        _shared_memory_cap(ism_spec.SHMID_NOTIFY, bars.BAR_NOTIFY, layout.notify_length),
        MsixCap(
            cap_next=0,
            control=table_size - 1,
            table=layout.table_offset | bars.BAR_MSIX,
            pba=layout.pba_offset | bars.BAR_MSIX,
        ),
    ]


class ConfigSpace:
    """Configuration space of one function.

    Attributes: `cfg_cap`, `msix_cap` (offsets of the two capabilities that have writable registers); read out of the
    registers whenever one changes, since every command asks for them: `bus_master` (whether the function may reach the
    driver's memory, PCI 3.0 section 6.2.2), `intx_disabled` (whether the driver forbids INTx), `msix_enabled` (whether
    MSI-X is used, and so INTx is not).
    """

    def __init__(self, layout: Layout) -> None:
        """Build the image and the write masks."""
        image = bytearray(CONFIG_SIZE)
        mask = bytearray(CONFIG_SIZE)
        Header().pack_into(image)
        _HEADER_WRITABLE.pack_into(mask)
        for bar in layout.bars.values():
            at = Header.offset_of("bar0") + 4 * bar.index
            width = 8 if bar.is_64bit else 4
            kind = (BAR_TYPE_64 if bar.is_64bit else 0) | (BAR_PREFETCHABLE if bar.prefetchable else 0)
            image[at : at + width] = kind.to_bytes(width, "little")
            mask[at : at + width] = ((1 << 8 * width) - bar.size).to_bytes(width, "little")
        self.cfg_cap = self.msix_cap = 0
        at = FIRST_CAPABILITY
        caps = capabilities(layout)
        for number, cap in enumerate(caps):
            end = at + -(-cap.SIZE // 4) * 4
            replace(cap, cap_next=end if number + 1 < len(caps) else 0).pack_into(image, at)
            if isinstance(cap, VirtioPciCfgCap):
                self.cfg_cap = at
                _CFG_WRITABLE.pack_into(mask, at)
            elif isinstance(cap, MsixCap):
                self.msix_cap = at
                MsixCap(cap_id=0, cap_next=0, control=MSIX_ENABLE | MSIX_FUNCTION_MASK, table=0, pba=0).pack_into(
                    mask, at
                )
            at = end
        assert at <= CONFIG_SIZE
        self._initial = bytes(image)
        self._image = image
        self._mask = bytes(mask)
        self._look()

    def _look(self) -> None:
        command = self._u16(_COMMAND)
        self.bus_master = bool(command & COMMAND_MASTER)
        self.intx_disabled = bool(command & COMMAND_INTX_DISABLE)
        self.msix_enabled = bool(self._u16(self.msix_cap + _MSIX_CONTROL) & MSIX_ENABLE)

    def reset(self) -> None:
        """Go back to the state after power on."""
        self._image[:] = self._initial
        self._look()

    def read(self, offset: int, n: int) -> bytes:
        """Read `n` bytes from `offset`; beyond the 256 bytes all is zero."""
        return bytes(self._image[offset : offset + n]).ljust(n, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """Change the writable bits among the bytes written; the rest, and what is beyond the end, is ignored."""
        for at, value in enumerate(data[: max(0, CONFIG_SIZE - offset)], offset):
            mask = self._mask[at]
            self._image[at] = self._image[at] & ~mask | value & mask
        self._look()

    def _u16(self, at: int) -> int:
        return int.from_bytes(self._image[at : at + 2], "little")

    def _set_u16(self, at: int, value: int) -> None:
        self._image[at : at + 2] = value.to_bytes(2, "little")

    def enable_msix(self, enabled: bool) -> None:
        """Turn MSI-X on or off without a write of the driver."""
        at = self.msix_cap + _MSIX_CONTROL
        control = self._u16(at)
        self._set_u16(at, control | MSIX_ENABLE if enabled else control & ~MSIX_ENABLE)
        self._look()

    def set_interrupt_status(self, pending: bool) -> None:
        """Show in the status register whether an INTx interrupt is pending."""
        status = self._u16(_STATUS)
        self._set_u16(_STATUS, status | STATUS_INTERRUPT if pending else status & ~STATUS_INTERRUPT)

    @property
    def cfg_data_offset(self) -> int:
        """Offset of `pci_cfg_data`, where an access of the driver makes one to a BAR."""
        return self.cfg_cap + VirtioPciCfgCap.offset_of("pci_cfg_data")

    @property
    def cfg_data(self) -> bytes:
        """The 4 bytes of `pci_cfg_data`."""
        return bytes(self._image[self.cfg_data_offset : self.cfg_data_offset + 4])

    @cfg_data.setter
    def cfg_data(self, data: bytes) -> None:
        self._image[self.cfg_data_offset : self.cfg_data_offset + len(data)] = data

    def cfg_access(self) -> CfgAccess | None:
        """Say which access the capability asks for; None unless it is 1, 2 or 4 bytes, naturally aligned."""
        cap = VirtioPciCfgCap.unpack(self._image, self.cfg_cap)
        if cap.length not in (1, 2, 4) or cap.offset % cap.length:
            return None
        return CfgAccess(cap.bar, cap.offset, cap.length)

# SPDX-License-Identifier: Apache-2.0
"""Virtio over PCI: identities, capabilities, common configuration (virtio 1.3 sections 2.1, 4.1, 6).

Both sides use this one table: the device builds its configuration space from it, the driver parses with it.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from ism.layout import Struct, field

VENDOR_ID = 0x1AF4
DEVICE_ID_BASE = 0x1040
"""PCI device id of a modern device = this + virtio device id (virtio 1.3 section 4.1.2)."""
NO_VECTOR = 0xFFFF
"""VIRTIO_MSI_NO_VECTOR."""


class PciCap(IntEnum):
    """PCI capability ids (PCI local bus 3.0, appendix H)."""

    VENDOR_SPECIFIC = 0x09
    MSIX = 0x11


class CfgType(IntEnum):
    """cfg_type of a virtio PCI capability (virtio 1.3 section 4.1.4)."""

    COMMON_CFG = 1
    NOTIFY_CFG = 2
    ISR_CFG = 3
    DEVICE_CFG = 4
    PCI_CFG = 5
    SHARED_MEMORY_CFG = 8
    VENDOR_CFG = 9


class Status(IntFlag):
    """Device status field (virtio 1.3 section 2.1)."""

    RESET = 0
    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


class Isr(IntFlag):
    """ISR status bits (virtio 1.3 section 4.1.4.5)."""

    QUEUE = 1
    CONFIG = 2


class Feature(IntEnum):
    """Transport feature bit numbers (virtio 1.3 section 6)."""

    INDIRECT_DESC = 28
    EVENT_IDX = 29
    VERSION_1 = 32
    ACCESS_PLATFORM = 33
    RING_PACKED = 34


class VirtioPciCap(Struct, size=16):
    """struct virtio_pci_cap (virtio 1.3 section 4.1.4)."""

    cap_vndr: int = field("B", 0, "PCI capability id, 0x09", default=PciCap.VENDOR_SPECIFIC)
    cap_next: int = field("B", 1, "offset of the next capability, 0 at the end")
    cap_len: int = field("B", 2, "bytes of this capability", default=16)
    cfg_type: int = field("B", 3, "which structure this locates (CfgType)")
    bar: int = field("B", 4, "BAR 0..5")
    id: int = field("B", 5, "several of one type: which; shmid for shared memory")
    offset: int = field("I", 8, "bytes from the BAR's start (low word in the 64-bit form)")
    length: int = field("I", 12, "bytes of the structure (low word in the 64-bit form)")


class VirtioPciCap64(Struct, size=24):
    """struct virtio_pci_cap64, for shared memory regions (virtio 1.3 section 4.1.4.7)."""

    cap_vndr: int = field("B", 0, "0x09", default=PciCap.VENDOR_SPECIFIC)
    cap_next: int = field("B", 1, "offset of the next capability")
    cap_len: int = field("B", 2, "24", default=24)
    cfg_type: int = field("B", 3, "8", default=CfgType.SHARED_MEMORY_CFG)
    bar: int = field("B", 4, "BAR 0..5")
    id: int = field("B", 5, "shmid, unique in the device")
    offset: int = field("I", 8, "low word of the offset")
    length: int = field("I", 12, "low word of the length")
    offset_hi: int = field("I", 16, "high word of the offset")
    length_hi: int = field("I", 20, "high word of the length")


class VirtioPciNotifyCap(Struct, size=20):
    """struct virtio_pci_notify_cap (virtio 1.3 section 4.1.4.4)."""

    cap_vndr: int = field("B", 0, "0x09", default=PciCap.VENDOR_SPECIFIC)
    cap_next: int = field("B", 1, "offset of the next capability")
    cap_len: int = field("B", 2, "20", default=20)
    cfg_type: int = field("B", 3, "2", default=CfgType.NOTIFY_CFG)
    bar: int = field("B", 4, "BAR 0..5")
    id: int = field("B", 5, "0")
    offset: int = field("I", 8, "bytes from the BAR's start")
    length: int = field("I", 12, "bytes")
    notify_off_multiplier: int = field("I", 16, "queue_notify_off times this = byte offset of a queue's notify word")


class VirtioPciCfgCap(Struct, size=20):
    """struct virtio_pci_cfg_cap: a window for access through config space (virtio 1.3 section 4.1.4.9)."""

    cap_vndr: int = field("B", 0, "0x09", default=PciCap.VENDOR_SPECIFIC)
    cap_next: int = field("B", 1, "offset of the next capability")
    cap_len: int = field("B", 2, "20", default=20)
    cfg_type: int = field("B", 3, "5", default=CfgType.PCI_CFG)
    bar: int = field("B", 4, "BAR to access, written by the driver")
    id: int = field("B", 5, "0")
    offset: int = field("I", 8, "offset to access, written by the driver")
    length: int = field("I", 12, "1, 2 or 4, written by the driver")
    pci_cfg_data: int = field("I", 16, "data of the access")


class MsixCap(Struct, size=12):
    """MSI-X capability (PCI local bus 3.0 section 6.8.2)."""

    cap_id: int = field("B", 0, "0x11", default=PciCap.MSIX)
    cap_next: int = field("B", 1, "offset of the next capability")
    control: int = field("H", 2, "bits 0-10 table size - 1, bit 14 function mask, bit 15 enable")
    table: int = field("I", 4, "bits 0-2 BAR, the rest the table's offset")
    pba: int = field("I", 8, "bits 0-2 BAR, the rest the pending bit array's offset")


class CommonCfg(Struct, size=64):
    """struct virtio_pci_common_cfg (virtio 1.3 section 4.1.4.3)."""

    device_feature_select: int = field("I", 0, "word of device_feature to show, 0 or 1; driver rw")
    device_feature: int = field("I", 4, "offered features, selected word; driver r")
    driver_feature_select: int = field("I", 8, "word of driver_feature to show; driver rw")
    driver_feature: int = field("I", 12, "accepted features, selected word; driver rw")
    config_msix_vector: int = field("H", 16, "vector for configuration changes, 0xFFFF none; driver rw")
    num_queues: int = field("H", 18, "number of queues; driver r")
    device_status: int = field("B", 20, "Status; writing 0 resets; driver rw")
    config_generation: int = field("B", 21, "changes with the device configuration; driver r")
    queue_select: int = field("H", 22, "queue that the fields below show; driver rw")
    queue_size: int = field("H", 24, "entries; driver rw, power of two, at most the initial value")
    queue_msix_vector: int = field("H", 26, "vector of the queue, 0xFFFF none; driver rw")
    queue_enable: int = field("H", 28, "1 = enabled; the driver may write 1 only")
    queue_notify_off: int = field("H", 30, "notify offset of the queue; driver r")
    queue_desc: int = field("Q", 32, "address of the descriptor area; driver rw")
    queue_driver: int = field("Q", 40, "address of the driver area (available); driver rw")
    queue_device: int = field("Q", 48, "address of the device area (used); driver rw")
    queue_notif_config_data: int = field("H", 56, "used with NOTIF_CONFIG_DATA only; driver r")
    queue_reset: int = field("H", 58, "used with RING_RESET only; driver rw")

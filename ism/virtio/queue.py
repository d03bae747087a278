# SPDX-License-Identifier: Apache-2.0
"""Layout of the split virtqueue (virtio 1.3 section 2.7); behaviour is in `ism.driver` and `ism.device`."""

from __future__ import annotations

from enum import IntFlag

from ism.layout import Struct, field

MAX_QUEUE_SIZE = 32768


class DescFlag(IntFlag):
    """Descriptor flags (virtio 1.3 section 2.7.5)."""

    NEXT = 1
    WRITE = 2
    INDIRECT = 4


AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1


class Desc(Struct, size=16):
    """struct virtq_desc."""

    addr: int = field("Q", 0, "address of the buffer (iova)")
    len: int = field("I", 8, "bytes")
    flags: int = field("H", 12, "DescFlag")
    next: int = field("H", 14, "index of the next descriptor when NEXT is set")


class UsedElem(Struct, size=8):
    """struct virtq_used_elem."""

    id: int = field("I", 0, "index of the head descriptor of the chain")
    len: int = field("I", 4, "bytes written into the chain's writable part")


AVAIL_FLAGS = 0
AVAIL_IDX = 2
AVAIL_RING = 4
USED_FLAGS = 0
USED_IDX = 2
USED_RING = 4

DESC_ALIGN = 16
AVAIL_ALIGN = 2
USED_ALIGN = 4


def desc_bytes(queue_size: int) -> int:
    """Bytes of the descriptor area."""
    return Desc.SIZE * queue_size


def avail_bytes(queue_size: int) -> int:
    """Bytes of the driver area: flags, idx, ring, used_event."""
    return AVAIL_RING + 2 * queue_size + 2


def used_bytes(queue_size: int) -> int:
    """Bytes of the device area: flags, idx, ring, avail_event."""
    return USED_RING + UsedElem.SIZE * queue_size + 2

# SPDX-License-Identifier: Apache-2.0
"""Where everything of one function lies: BARs, their sizes, the structures inside them. Numbers only, no state.

Virtio leaves the choice of BARs to the device, drivers go by capabilities (virtio 1.3 section 4.1.4). Each structure
of BAR 0 has a page of its own, so that a driver can map one without the others. Doorbells have their own BAR, not
prefetchable, since writes there must be neither merged nor speculated on; the regions window is memory and is
prefetchable, so that bridges and guests may place it above 4 GiB.
"""

from __future__ import annotations

from dataclasses import dataclass

from ism.device.contract import FunctionConfig
from ism.layout import Struct, field
from ism.virtio import ism_spec
from ism.virtio.pci import CommonCfg

BAR_VIRTIO = 0
BAR_MSIX = 1
BAR_NOTIFY = 2
BAR_REGIONS = 4

STRUCTURE_STRIDE = 0x1000
COMMON_OFFSET = 0x0000
ISR_OFFSET = 0x1000
DEVICE_OFFSET = 0x2000
QUEUE_NOTIFY_OFFSET = 0x3000
QUEUE_NOTIFY_MULTIPLIER = 4
ISR_LENGTH = 1

MIN_VECTORS = 3
"""Configuration changes, control queue, event queue: each can have one of its own."""
MAX_VECTORS = 2048
MIN_BAR_SIZE = 4096
MAX_NOTIFY_SIZE = 1 << 31
MAX_WINDOW_SIZE = 1 << 62


class MsixEntry(Struct, size=16):
    """One entry of the MSI-X table (PCI local bus 3.0 section 6.8.2)."""

    address: int = field("I", 0, "message address, low word; rw", default=0)
    address_hi: int = field("I", 4, "message address, high word; rw", default=0)
    data: int = field("I", 8, "message data; rw", default=0)
    control: int = field("I", 12, "bit 0 masked, rw; the rest reserved", default=0)


@dataclass(frozen=True, slots=True)
class Bar:
    """One base address register: `size` is a power of two, in bytes."""

    index: int
    size: int
    is_64bit: bool = False
    prefetchable: bool = False


def _power_of_two(value: int) -> int:
    return max(MIN_BAR_SIZE, 1 << (value - 1).bit_length())


class Layout:
    """Sizes and offsets that follow from a `FunctionConfig`.

    Attributes:
        bars: BARs by index; 3 is absent, 5 is the upper half of 4.
        slots: notify slots, one per chunk.
        notify_length: bytes of shared memory region 2.
        num_queues: 1, or 2 with the event queue.
        table_offset, table_length, pba_offset, pba_length: of MSI-X, in BAR 1.
    """

    def __init__(self, config: FunctionConfig) -> None:
        """Derive the layout. Raises ValueError, naming the field, for a configuration no function can be built from."""
        check_config(config)
        self.slots = config.window_size // config.chunk_size
        self.notify_length = self.slots * ism_spec.NOTIFY_SIZE
        self.num_queues = 2 if ism_spec.IsmFeature.EVENT_VQ in config.features else 1
        self.queue_notify_length = self.num_queues * QUEUE_NOTIFY_MULTIPLIER
        self.common_length = CommonCfg.SIZE
        self.device_length = ism_spec.Config.SIZE
        self.table_offset = 0
        self.table_length = config.vectors * MsixEntry.SIZE
        self.pba_offset = -(-self.table_length // MIN_BAR_SIZE) * MIN_BAR_SIZE
        self.pba_length = -(-config.vectors // 64) * 8
        bars = [
            Bar(BAR_VIRTIO, _power_of_two(QUEUE_NOTIFY_OFFSET + self.queue_notify_length)),
            Bar(BAR_MSIX, _power_of_two(self.pba_offset + self.pba_length)),
            Bar(BAR_NOTIFY, _power_of_two(self.notify_length)),
            Bar(BAR_REGIONS, config.window_size, is_64bit=True, prefetchable=True),
        ]
        self.bars = {bar.index: bar for bar in bars}

    def bar_size(self, index: int) -> int:
        """Bytes of the BAR; 0 when there is none, and for the upper half of a 64-bit one."""
        bar = self.bars.get(index)
        return bar.size if bar else 0


IMPLEMENTED = frozenset({ism_spec.IsmFeature.EVENT_IRQ, ism_spec.IsmFeature.EVENT_VQ, ism_spec.IsmFeature.DIRECTORY})
"""Device feature bits that a `FunctionConfig` may name."""


def check_config(config: FunctionConfig) -> None:
    """Refuse a configuration no function can be built from. Raises ValueError, naming the field."""

    def power_of_two(name: str, value: int, least: int, most: int) -> None:
        if not least <= value <= most or value & (value - 1):
            raise ValueError(f"{name} is {value}: must be a power of two from {least} to {most}")

    power_of_two("chunk_size", config.chunk_size, ism_spec.MIN_CHUNK_SIZE, MAX_WINDOW_SIZE)
    power_of_two("window_size", config.window_size, config.chunk_size, MAX_WINDOW_SIZE)
    if config.window_size // config.chunk_size * ism_spec.NOTIFY_SIZE > MAX_NOTIFY_SIZE:
        raise ValueError(
            f"window_size is {config.window_size}: more chunks of {config.chunk_size} than a BAR has slots"
        )
    if not MIN_VECTORS <= config.vectors <= MAX_VECTORS:
        raise ValueError(f"vectors is {config.vectors}: must be from {MIN_VECTORS} to {MAX_VECTORS}")
    for name, value in (("gid", config.gid), ("devid", config.devid)):
        if not 0 < value < 1 << 64:
            raise ValueError(f"{name} is {value}: must be a positive 64-bit number")
    unknown = config.features - IMPLEMENTED
    if unknown:
        raise ValueError(f"features holds {sorted(unknown)}: only {sorted(IMPLEMENTED)} exist")

# SPDX-License-Identifier: Apache-2.0
"""The common configuration structure and the status machine behind it (virtio 1.3 sections 2.1, 3.1 and 4.1.4.3).

It owns the status, the feature negotiation and the registers of the queues. Any access of any width at any offset is
defined: a read copies bytes of the structure, a write changes each field it touches, in ascending order, where a field
touched in part keeps its other bytes. What does not fit the specification is ignored, except for what makes a queue
unusable.

    status         how the driver gets there                             the device then
    0              after power on, or by writing 0                       forgets all that was negotiated
    FEATURES_OK    writing the bit, only if the accepted features fit    takes no other features any more
    DRIVER_OK      writing the bit, only with FEATURES_OK                serves the queues
    NEEDS_RESET    the device, when a queue is malformed                 serves nothing until the driver writes 0
    FAILED         writing the bit: the driver gives up                  serves nothing until the driver writes 0

The driver sets bits and never clears one except by writing 0. ACKNOWLEDGE and DRIVER are stored only.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Flag, auto

from ism.device.queue import DeviceQueue
from ism.errors import RemoteProtocolError
from ism.virtio.pci import NO_VECTOR, CommonCfg, Feature, Status

REQUIRED_FEATURES = 1 << Feature.VERSION_1
_DRIVER_STATUS = Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK | Status.FEATURES_OK | Status.FAILED
_QUEUE_ADDRESSES = {"queue_desc": "desc", "queue_driver": "driver", "queue_device": "device"}

_DRIVER_OK = int(Status.DRIVER_OK)
_RUNNING = _DRIVER_OK | int(Status.NEEDS_RESET | Status.FAILED)


class Change(Flag):
    """What a write meant beyond the registers."""

    NONE = 0
    RESET = auto()
    """The driver wrote status 0: the registers are reset, everything else must follow."""
    BROKEN = auto()
    """The driver enabled a queue that cannot work; `fault` says why."""
    REFUSED = auto()
    """FEATURES_OK was not accepted."""


class CommonRegisters:
    """Common configuration of one function.

    Attributes: `offered` (feature bits), `status`, `config_vector` (0xFFFF none), `fault` (why the last change was
    BROKEN, else "").
    """

    def __init__(self, offered: int, queues: Sequence[DeviceQueue], vectors: int) -> None:
        """Offer the feature bits `offered` and the queues; `vectors` is the size of the MSI-X table."""
        self.offered = offered
        self._queues = queues
        self._vectors = vectors
        self.reset()

    def reset(self) -> None:
        """Go back to status 0, with every queue disabled and nothing negotiated."""
        self.status = Status.RESET
        self.config_vector = NO_VECTOR
        self.fault = ""
        self._accepted = 0
        self._accepted_unknown = False
        self._device_feature_select = 0
        self._driver_feature_select = 0
        self._queue_select = 0
        for queue in self._queues:
            queue.reset()

    @property
    def running(self) -> bool:
        """Whether the queues are served."""
        return int(self.status) & _RUNNING == _DRIVER_OK

    def negotiated(self, bit: int) -> bool:
        """Whether both sides agreed on the feature bit; False before FEATURES_OK."""
        return bool(self.status & Status.FEATURES_OK and self._accepted >> bit & 1)

    def read(self, offset: int, n: int) -> bytes:
        """Read `n` bytes of the structure; beyond its end all is zero."""
        return self._image()[offset : offset + n].ljust(n, b"\0")

    def write(self, offset: int, data: bytes) -> Change:
        """Write bytes of the structure; says what else must happen."""
        change = Change.NONE
        end = offset + len(data)
        for row in CommonCfg.FIELDS:
            row_end = row.offset + row.size
            if offset >= row_end or end <= row.offset:
                continue
            first, last = max(offset, row.offset), min(end, row_end)
            value = bytearray(self._image()[row.offset : row_end])
            value[first - row.offset : last - row.offset] = data[first - offset : last - offset]
            change |= self._write_field(row.name, int.from_bytes(value, "little"))
        return change

    def _selected(self) -> DeviceQueue | None:
        return self._queues[self._queue_select] if self._queue_select < len(self._queues) else None

    def _image(self) -> bytes:
        queue = self._selected()
        return CommonCfg(
            device_feature_select=self._device_feature_select,
            device_feature=_word(self.offered, self._device_feature_select),
            driver_feature_select=self._driver_feature_select,
            driver_feature=_word(self._accepted, self._driver_feature_select),
            config_msix_vector=self.config_vector,
            num_queues=len(self._queues),
            device_status=self.status,
            config_generation=0,  # the device configuration never changes
            queue_select=self._queue_select,
            queue_size=queue.size if queue else 0,
            queue_msix_vector=queue.vector if queue else NO_VECTOR,
            queue_enable=int(queue.enabled) if queue else 0,
            queue_notify_off=queue.index if queue else 0,
            queue_desc=queue.desc if queue else 0,
            queue_driver=queue.driver if queue else 0,
            queue_device=queue.device if queue else 0,
            queue_notif_config_data=0,
            queue_reset=0,
        ).pack()

    def _write_field(self, name: str, value: int) -> Change:
        match name:
            case "device_status":
                return self._write_status(value)
            case "device_feature_select":
                self._device_feature_select = value
            case "driver_feature_select":
                self._driver_feature_select = value
            case "driver_feature":
                self._accept(value)
            case "config_msix_vector":
                self.config_vector = self._vector(value)
            case "queue_select":
                self._queue_select = value
            case _:
                queue = self._selected()
                if queue:
                    return self._write_queue(queue, name, value)
        return Change.NONE

    def _accept(self, value: int) -> None:
        if self.status & Status.FEATURES_OK:
            return
        if self._driver_feature_select < 2:
            shift = 32 * self._driver_feature_select
            self._accepted = self._accepted & ~(0xFFFFFFFF << shift) | value << shift
        elif value:
            self._accepted_unknown = True  # until reset: there is no such bit to take back

    def _write_status(self, value: int) -> Change:
        if value == 0:
            self.reset()
            return Change.RESET
        change = Change.NONE
        status = self.status | Status(value) & _DRIVER_STATUS
        if status & Status.FEATURES_OK and not self.status & Status.FEATURES_OK and not self._features_fit():
            status &= ~Status.FEATURES_OK
            change = Change.REFUSED
        if not status & Status.FEATURES_OK:
            status &= ~Status.DRIVER_OK
        self.status = status
        return change

    def _features_fit(self) -> bool:
        unknown = self._accepted & ~self.offered
        return not unknown and not self._accepted_unknown and self._accepted & REQUIRED_FEATURES == REQUIRED_FEATURES

    def _write_queue(self, queue: DeviceQueue, name: str, value: int) -> Change:
        if name == "queue_msix_vector":
            queue.vector = self._vector(value)
        elif queue.enabled:
            return Change.NONE  # the rest is fixed once the queue is enabled
        elif name == "queue_size":
            if 0 < value <= queue.max_size and not value & (value - 1):
                queue.size = value
        elif name in _QUEUE_ADDRESSES:
            setattr(queue, _QUEUE_ADDRESSES[name], value)
        elif name == "queue_enable" and value == 1:
            try:
                queue.enable()
            except RemoteProtocolError as exc:
                self.fault = str(exc)
                return Change.BROKEN
        return Change.NONE

    def _vector(self, value: int) -> int:
        return value if value < self._vectors else NO_VECTOR


def _word(bits: int, select: int) -> int:
    return bits >> 32 * select & 0xFFFFFFFF if select < 2 else 0

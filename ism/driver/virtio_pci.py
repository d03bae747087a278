# SPDX-License-Identifier: Apache-2.0
"""Registers of a virtio PCI function, as the driver uses them (virtio 1.3 section 4.1.4.3).

One method a step of the initialisation; the order of the steps is `ism.driver.device`'s business.
"""

from __future__ import annotations

import time

from ism.driver.capabilities import Capabilities, Location
from ism.driver.transport import Transport
from ism.errors import FeatureMismatchError, RemoteProtocolError, TransportError
from ism.virtio.ism_spec import Config, IsmFeature
from ism.virtio.pci import NO_VECTOR, CommonCfg, Feature, Isr, Status

_RESET_TIMEOUT_S = 5.0
_GENERATION_TRIES = 16


def feature_name(bit: int) -> str:
    """Name of a feature bit as the specification spells it."""
    for kind, prefix in ((IsmFeature, "VIRTIO_ISM_F_"), (Feature, "VIRTIO_F_")):
        try:
            return prefix + kind(bit).name
        except ValueError:
            continue
    return f"feature bit {bit}"


class VirtioPci:
    """Register access to one function through its transport."""

    def __init__(self, transport: Transport, caps: Capabilities) -> None:
        self.transport, self.caps = transport, caps

    def _read(self, name: str) -> int:
        info = CommonCfg.info(name)
        at = self.caps.common.offset + info.offset
        return int.from_bytes(self.transport.bar_read(self.caps.common.bar, at, info.size), "little")

    def _write(self, name: str, value: int) -> None:
        info = CommonCfg.info(name)
        at = self.caps.common.offset + info.offset
        if info.size == 8:  # 64-bit fields are written as two words (virtio 1.3 section 4.1.3.1)
            low, high = value & 0xFFFFFFFF, value >> 32
            self.transport.bar_write(self.caps.common.bar, at, low.to_bytes(4, "little"))
            self.transport.bar_write(self.caps.common.bar, at + 4, high.to_bytes(4, "little"))
        else:
            self.transport.bar_write(self.caps.common.bar, at, value.to_bytes(info.size, "little"))

    @property
    def status(self) -> Status:
        """Device status as it is now."""
        return Status(self._read("device_status"))

    def add_status(self, bits: Status) -> None:
        """Set status bits; the others stay."""
        self._write("device_status", self.status | bits)

    def reset(self) -> None:
        """Reset the device and wait until it says so. Raises TransportError after 5 seconds."""
        self._write("device_status", 0)
        deadline = time.monotonic() + _RESET_TIMEOUT_S
        while self._read("device_status") != 0:
            if time.monotonic() > deadline:
                raise TransportError(
                    f"{self.transport.name} did not finish its reset within {_RESET_TIMEOUT_S:g} s; "
                    "restart the device manager or the virtual machine"
                )
            time.sleep(0.001)

    def negotiate(self, required: frozenset[int], optional: frozenset[int]) -> frozenset[int]:
        """Accept the required and the offered optional features.

        Returns: the accepted bits. Raises: FeatureMismatchError with the names of what is missing.
        """
        offered = 0
        for word in (0, 1):
            self._write("device_feature_select", word)
            offered |= self._read("device_feature") << (32 * word)
        missing = sorted(bit for bit in required if not offered >> bit & 1)
        if missing:
            names = [feature_name(bit) for bit in missing]
            raise FeatureMismatchError(f"{self.transport.name} does not offer {', '.join(names)}", names)
        accepted = frozenset(required | {bit for bit in optional if offered >> bit & 1})
        for word in (0, 1):
            value = sum(1 << (bit - 32 * word) for bit in accepted if bit // 32 == word)
            self._write("driver_feature_select", word)
            self._write("driver_feature", value)
        self.add_status(Status.FEATURES_OK)
        if not self.status & Status.FEATURES_OK:
            names = [feature_name(bit) for bit in sorted(accepted)]
            raise FeatureMismatchError(f"{self.transport.name} refuses the feature set {', '.join(names)}", names)
        return accepted

    def queue_count(self) -> int:
        """Queues that the device has."""
        return self._read("num_queues")

    def queue_max_size(self, index: int) -> int:
        """Most entries the queue can have; 0 when it does not exist."""
        self._write("queue_select", index)
        return self._read("queue_size")

    def enable_queue(self, index: int, *, size: int, desc: int, driver: int, device: int, vector: int | None) -> int:
        """Give the queue its memory and enable it.

        Returns: byte offset of its notify word inside the notify area's BAR.
        Raises: TransportError when the device has no resources for the vector.
        """
        self._write("queue_select", index)
        self._write("queue_size", size)
        self._write("queue_desc", desc)
        self._write("queue_driver", driver)
        self._write("queue_device", device)
        wanted = NO_VECTOR if vector is None else vector
        self._write("queue_msix_vector", wanted)
        if self._read("queue_msix_vector") != wanted:
            raise TransportError(f"{self.transport.name} cannot give queue {index} the interrupt vector {wanted}")
        at = self._read("queue_notify_off") * self.caps.notify_multiplier
        if at + 2 > self.caps.notify.length:
            raise RemoteProtocolError(f"{self.transport.name}: notify word of queue {index} lies outside its area")
        self._write("queue_enable", 1)
        return self.caps.notify.offset + at

    def set_config_vector(self, vector: int | None) -> None:
        """Choose the vector for configuration changes and NEEDS_RESET."""
        wanted = NO_VECTOR if vector is None else vector
        self._write("config_msix_vector", wanted)
        if self._read("config_msix_vector") != wanted:
            raise TransportError(f"{self.transport.name} cannot give configuration changes the vector {wanted}")

    def read_isr(self) -> Isr:
        """Read and clear the interrupt status."""
        return Isr(self.transport.bar_read(self.caps.isr.bar, self.caps.isr.offset, 1)[0] & 3)

    def read_config(self) -> Config:
        """Read the device configuration as a whole, consistent (config_generation unchanged around it)."""
        place: Location = self.caps.device
        for _ in range(_GENERATION_TRIES):
            before = self._read("config_generation")
            raw = b"".join(self.transport.bar_read(place.bar, place.offset + at, 4) for at in range(0, Config.SIZE, 4))
            if self._read("config_generation") == before:
                return Config.unpack(raw)
        raise RemoteProtocolError(f"{self.transport.name}: the configuration changes faster than it can be read")

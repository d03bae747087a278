# SPDX-License-Identifier: Apache-2.0
"""Find the virtio structures of a PCI function through its capability list (virtio 1.3 section 4.1.4).

BAR numbers are never assumed: only what the capabilities say is used, and each location is checked against the size
of its BAR before anything is read from it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from ism.driver.transport import Transport
from ism.errors import FeatureMismatchError, RemoteProtocolError
from ism.layout import Struct
from ism.virtio.ism_spec import PCI_DEVICE_ID, SHMID_NOTIFY, SHMID_REGIONS, Config
from ism.virtio.pci import (
    VENDOR_ID,
    CfgType,
    CommonCfg,
    PciCap,
    VirtioPciCap,
    VirtioPciCap64,
    VirtioPciNotifyCap,
)

_STATUS = 0x06
_STATUS_CAP_LIST = 0x10
_CAP_POINTER = 0x34
_FIRST_CAP = 0x40
_HEADER_SIZE = 64
_CONFIG_SIZE = 256


@dataclass(frozen=True, slots=True)
class Location:
    """`length` bytes at `offset` of BAR `bar`."""

    bar: int
    offset: int
    length: int


@dataclass(slots=True)
class Capabilities:
    """Where the structures of one virtio-ism function are; `notify_multiplier` is bytes per queue_notify_off."""

    common: Location
    notify: Location
    notify_multiplier: int
    isr: Location
    device: Location
    shared_memory: dict[int, Location] = field(default_factory=dict)

    @property
    def regions(self) -> Location:
        """The window in which regions appear."""
        return self.shared_memory[SHMID_REGIONS]

    @property
    def doorbells(self) -> Location:
        """The ISM notify area."""
        return self.shared_memory[SHMID_NOTIFY]


def identify(transport: Transport) -> None:
    """Check that the function is a modern virtio-ism device.

    Raises: FeatureMismatchError, naming what was found; RemoteProtocolError when there is no configuration space.
    """
    vendor, device = struct.unpack_from("<HH", _config(transport, 4))
    if (vendor, device) != (VENDOR_ID, PCI_DEVICE_ID):
        raise FeatureMismatchError(
            f"{transport.name} is PCI function {vendor:04x}:{device:04x}, not a virtio-ism device "
            f"({VENDOR_ID:04x}:{PCI_DEVICE_ID:04x})",
            ["virtio-ism"],
        )


def _config(transport: Transport, least: int) -> bytes:
    config = transport.config_read(0, least if least < _HEADER_SIZE else _CONFIG_SIZE)
    if len(config) < least:
        raise RemoteProtocolError(f"{transport.name} has {len(config)} bytes of configuration space", event="config")
    return config


def walk(config: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (capability id, bytes from the capability's start) of a configuration space. Bounded; stops at a loop.

    Args: `config`: at least the 64 bytes of the header.
    """
    if not struct.unpack_from("<H", config, _STATUS)[0] & _STATUS_CAP_LIST:
        return
    at, seen = config[_CAP_POINTER] & ~3, set[int]()
    while at >= _FIRST_CAP and at not in seen and at + 2 <= len(config):
        seen.add(at)
        yield config[at], config[at:]
        at = config[at + 1] & ~3


def find(transport: Transport) -> Capabilities:
    """Read the capability list and return where everything is.

    Raises: FeatureMismatchError with the names of the missing structures; RemoteProtocolError when one lies outside
    its BAR, or there is no configuration space. Source: virtio 1.3 section 4.1.4.
    """
    config = _config(transport, _HEADER_SIZE)  # without privileges the kernel shows the header only
    found: dict[CfgType, Location] = {}
    shared: dict[int, Location] = {}
    multiplier = 0
    for cap_id, body in walk(config):
        if cap_id != PciCap.VENDOR_SPECIFIC or len(body) < VirtioPciCap.SIZE:
            continue
        cap = VirtioPciCap.unpack(body)
        if cap.cap_len < VirtioPciCap.SIZE or cap.cap_len > len(body) or cap.bar > 5:
            continue  # virtio 1.3 section 4.1.4: the driver ignores values it does not know
        if cap.cfg_type == CfgType.SHARED_MEMORY_CFG and cap.cap_len >= VirtioPciCap64.SIZE:
            wide = VirtioPciCap64.unpack(body)
            shared.setdefault(
                wide.id,
                Location(wide.bar, wide.offset | wide.offset_hi << 32, wide.length | wide.length_hi << 32),
            )
        elif cap.cfg_type in (CfgType.COMMON_CFG, CfgType.NOTIFY_CFG, CfgType.ISR_CFG, CfgType.DEVICE_CFG):
            kind = CfgType(cap.cfg_type)
            if kind in found:
                continue  # the first of a type is preferred
            if kind == CfgType.NOTIFY_CFG:
                if cap.cap_len < VirtioPciNotifyCap.SIZE:
                    continue
                multiplier = VirtioPciNotifyCap.unpack(body).notify_off_multiplier
            found[kind] = Location(cap.bar, cap.offset, cap.length)
    _require(transport, found, shared)
    return Capabilities(
        common=_inside(transport, "common configuration", found[CfgType.COMMON_CFG], CommonCfg),
        notify=_inside(transport, "queue notify area", found[CfgType.NOTIFY_CFG]),
        notify_multiplier=multiplier,
        isr=_inside(transport, "ISR status", found[CfgType.ISR_CFG]),
        device=_inside(transport, "device configuration", found[CfgType.DEVICE_CFG], Config),
        shared_memory={shmid: _inside(transport, f"shared memory {shmid}", loc) for shmid, loc in shared.items()},
    )


def _require(transport: Transport, found: dict[CfgType, Location], shared: dict[int, Location]) -> None:
    wanted = {
        CfgType.COMMON_CFG: "common configuration",
        CfgType.NOTIFY_CFG: "queue notify area",
        CfgType.ISR_CFG: "ISR status",
        CfgType.DEVICE_CFG: "device configuration",
    }
    missing = [name for kind, name in wanted.items() if kind not in found]
    missing += [
        name
        for shmid, name in ((SHMID_REGIONS, "shared memory 1 (regions)"), (SHMID_NOTIFY, "shared memory 2 (notify)"))
        if shmid not in shared
    ]
    if missing:
        raise FeatureMismatchError(f"{transport.name} lacks the virtio capabilities: {', '.join(missing)}", missing)


def _inside(transport: Transport, what: str, place: Location, least: type[Struct] | None = None) -> Location:
    size = transport.bar_size(place.bar)
    if place.offset + place.length > size or place.length < (least.SIZE if least else 1):
        # the common configuration of virtio 1.0 ended before the fields that this driver does not use
        if least is CommonCfg and place.length >= 56 and place.offset + place.length <= size:
            return place
        raise RemoteProtocolError(
            f"{transport.name}: {what} at {place.offset}+{place.length} does not fit BAR {place.bar} of {size} bytes",
            event="capability",
        )
    return place

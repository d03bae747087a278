# SPDX-License-Identifier: Apache-2.0
"""The VERSION message: protocol version and capabilities as NUL-terminated JSON.

Owns parsing and the rules of negotiation (same major, lower minor, a subset of what was proposed). Never decides what a
server offers. Follows the vfio-user specification, "VERSION". The text may be anything: it is bounded before it is
parsed, and every value that is used is checked for type and range.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any, Final

from ism.layout import Buffer, Struct, field
from ism.vfio_user.errors import MalformedMessageError
from ism.vfio_user.wire import DEFAULT_MAX_DATA_XFER_SIZE, DEFAULT_MAX_MSG_FDS, SCM_MAX_FD

MAX_VERSION_DATA: Final = 4096
"""Longest capability text accepted, bytes; QEMU sends about 200."""


class VersionFixed(Struct, size=4):
    """VERSION, both ways, before its text."""

    major: int = field("H", 0, "must be 0")
    minor: int = field("H", 2, "highest supported; the reply's is not higher")


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a peer says of itself; absent numbers have the specification's defaults.

    Attributes: `max_msg_fds` (descriptors it takes in one message), `max_data_xfer_size` (bytes of one read or write),
    `max_dma_maps`, `pgsizes` (page sizes of DMA maps, or'ed), `write_multiple` (REGION_WRITE_MULTI is known),
    `raw` (all keys as they came, including those not known here).
    """

    max_msg_fds: int = DEFAULT_MAX_MSG_FDS
    max_data_xfer_size: int = DEFAULT_MAX_DATA_XFER_SIZE
    max_dma_maps: int = 65535
    pgsizes: int = 4096
    write_multiple: bool = False
    raw: Mapping[str, Any] = dataclass_field(default_factory=dict)

    @property
    def page_size(self) -> int:
        """Smallest page size, bytes."""
        return self.pgsizes & -self.pgsizes


_NUMBERS: Final = {
    "max_msg_fds": (0, 1 << 31),
    "max_data_xfer_size": (1, 1 << 63),
    "max_dma_maps": (0, 1 << 63),
    "pgsizes": (1, (1 << 64) - 1),
}


def parse_version(payload: Buffer) -> tuple[int, int, Capabilities]:
    """VERSION, either way: major, minor, capabilities.

    Raises: MalformedMessageError for text that is too long, not NUL-terminated UTF-8 JSON, not an object of objects, or
        a known capability of the wrong type or out of range.
    """
    if len(payload) < VersionFixed.SIZE:
        raise MalformedMessageError(f"VERSION: payload of {len(payload)} bytes, {VersionFixed.SIZE} needed")
    fixed = VersionFixed.unpack(payload)
    text = bytes(memoryview(payload)[VersionFixed.SIZE : VersionFixed.SIZE + MAX_VERSION_DATA + 1])
    if len(text) > MAX_VERSION_DATA:
        raise MalformedMessageError(f"VERSION: capabilities of more than {MAX_VERSION_DATA} bytes")
    return fixed.major, fixed.minor, _parse_text(text) if text else Capabilities()


def _parse_text(text: bytes) -> Capabilities:
    if text[-1] != 0 or 0 in text[:-1]:
        raise MalformedMessageError("VERSION: capabilities do not end in their only NUL")
    try:
        document = json.loads(text[:-1].decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise MalformedMessageError(f"VERSION: capabilities are not JSON: {error}") from None
    if not isinstance(document, dict):
        raise MalformedMessageError("VERSION: the JSON is not an object")
    raw = document.get("capabilities", {})
    if not isinstance(raw, dict):
        raise MalformedMessageError("VERSION: 'capabilities' is not an object")
    known: dict[str, Any] = {}
    for key, (low, high) in _NUMBERS.items():
        if key in raw:
            number = raw[key]
            if type(number) is not int or not low <= number <= high:
                raise MalformedMessageError(f"VERSION: {key} is not a number from {low} to {high}")
            known[key] = number
    if "write_multiple" in raw:
        if not isinstance(raw["write_multiple"], bool):
            raise MalformedMessageError("VERSION: write_multiple is not a boolean")
        known["write_multiple"] = raw["write_multiple"]
    # No peer can be sent more than the kernel carries.
    if "max_msg_fds" in known:
        known["max_msg_fds"] = min(known["max_msg_fds"], SCM_MAX_FD)
    return Capabilities(raw=raw, **known)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def encode_version(major: int, minor: int, capabilities: Mapping[str, Any]) -> bytes:
    """VERSION, either way. Compact, because QEMU takes no reply longer than its own request."""
    text = json.dumps({"capabilities": dict(capabilities)}, separators=(",", ":"), allow_nan=False)
    return VersionFixed(major=major, minor=minor).pack() + text.encode() + b"\0"

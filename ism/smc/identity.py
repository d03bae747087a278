# SPDX-License-Identifier: Apache-2.0
"""Who this side of a CLC handshake is: device, fabric, EIDs and host name, as values.

Owns the rules for these values (ranges, EID alphabet) and nothing else: it asks neither the operating system nor a
device, the caller passes everything in. The 128-bit GID of an emulated ISM device is (gid, devid): the domain in the
high half, the device in the low half (virtio-ism device configuration; SMC version 2.1 Emulated-ISM).
"""

from __future__ import annotations

import string
from dataclasses import dataclass

from ism.ids import DevId, Gid

CHID_FIRST = 0xFF00
"""First CHID that means a virtio-ism fabric (SMC version 2.1; 0xFFFF is loopback-ism)."""
CHID_LAST = 0xFFFE
DEFAULT_CHID = CHID_FIRST
DEFAULT_EID = "VIRTIO-ISM"
EID_SIZE = 32
MAX_EIDS = 8
_EID_FIRST = frozenset(string.ascii_uppercase + string.digits)
_EID_REST = _EID_FIRST | frozenset(".-")


def valid_eid(text: str) -> bool:
    """True for a user EID: 1..32 of A-Z 0-9 . - with a letter or digit first."""
    return 0 < len(text) <= EID_SIZE and text[0] in _EID_FIRST and _EID_REST.issuperset(text)


@dataclass(frozen=True)
class Identity:
    """What one side says of itself in a handshake.

    Args:
        gid, devid: of the local virtio-ism device, 1..2**64-1.
        chid: fabric, 0xFF00..0xFFFE; only devices with equal CHIDs connect.
        eids: 1..8 user EIDs in order of preference; two sides need one in common.
        host: host name for the peer's diagnostics; cut to 32 ASCII characters on the wire.
        link_id: 32-bit name of the link group on this side; any value, shown to the peer only.
    Raises:
        ValueError: a value outside these ranges.
    """

    gid: Gid
    devid: DevId
    chid: int = DEFAULT_CHID
    eids: tuple[str, ...] = (DEFAULT_EID,)
    host: str = ""
    link_id: int = 0

    def __post_init__(self) -> None:
        for name, value in (("gid", self.gid), ("devid", self.devid)):
            if not 0 < value < 1 << 64:
                raise ValueError(f"{name} is {value}, must be 1..2**64-1")
        if not CHID_FIRST <= self.chid <= CHID_LAST:
            raise ValueError(f"CHID is 0x{self.chid:04x}, must be 0x{CHID_FIRST:04x}..0x{CHID_LAST:04x}")
        if not 0 <= self.link_id < 1 << 32:
            raise ValueError(f"link id is {self.link_id}, must fit 32 bits")
        if not 0 < len(self.eids) <= MAX_EIDS or len(set(self.eids)) != len(self.eids):
            raise ValueError(f"{len(self.eids)} EIDs given, must be 1..{MAX_EIDS} different ones")
        for eid in self.eids:
            if not valid_eid(eid):
                raise ValueError(f"EID {eid!r} must be 1..32 of A-Z 0-9 . - and start with a letter or digit")

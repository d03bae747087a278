# SPDX-License-Identifier: Apache-2.0
"""CLC messages of SMC-D version 2.1 (RFC 7609 section 3 as extended by SMC version 2): bytes to values and back.

Owns the layout of PROPOSAL, ACCEPT, CONFIRM and DECLINE and every check that needs one message only. Never decides
whether an offer suits (`handshake_machine`) and never reads a byte behind the message: `message_length` judges the
8-byte header first, so that application data stays in the TCP stream. Emitted is the SMC-D version 2 subset with the
128-bit GID of an emulated ISM device; accepted is whatever a correct peer may send, of which the SMC-R and version 1
parts are measured and skipped. Every byte received may lie: counts, offsets and lengths must add up exactly, reserved
bytes are ignored, and anything else is `HandshakeError`. Four messages, one file: their parts and checks are shared.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

from ism.errors import LocalProtocolError
from ism.ids import DevId, Gid, Token
from ism.layout import Struct, field
from ism.smc.diagnosis import Diagnosis, HandshakeError
from ism.smc.identity import EID_SIZE, MAX_EIDS

SMCR = bytes.fromhex("e2d4c3d9")
"""Eyecatcher "SMCR" in EBCDIC: PROPOSAL and DECLINE, whatever is proposed."""
SMCD = bytes.fromhex("e2d4c3c4")
"""Eyecatcher "SMCD" in EBCDIC: ACCEPT and CONFIRM of SMC-D."""
EYECATCHERS = (SMCR, SMCD)
HEADER_SIZE = 8
TRAILER_SIZE = 4
VERSION = 2
RELEASE = 1
FEATURE_EMULATED_ISM = 0x0001
OS_LINUX = 2
MAX_GID_ENTRIES = 8
MAX_IPV6_PREFIXES = 8
EMULATED_CHIDS = 0xFF00
"""A CHID whose high byte is FF belongs to an emulated device, whose GID takes two entries."""

TYPE_R, TYPE_D, TYPE_NONE, TYPE_BOTH = range(4)
FIRST_CONTACT = OUT_OF_SYNC = 0x08

DMB_UNIT = 16 * 1024
MAX_SIZE_CODE = 6
DMB_SIZES = tuple(DMB_UNIT << code for code in range(MAX_SIZE_CODE + 1))
"""Sizes a DMB can have on the wire, bytes: 16 KiB to 1 MiB in powers of two."""

_IP_AREA_BASE = 40
_V2_BASE = 52
_SMCD_V2_BASE = 8
_IP_AREA_SIZE = 8
_IPV6_PREFIX_SIZE = 17


class MessageType(IntEnum):
    """Header byte 4."""

    PROPOSAL = 1
    ACCEPT = 2
    CONFIRM = 3
    DECLINE = 4


class _Wire(Struct, size=0, byte_order=">"):
    """Base of all CLC structures: big-endian, said once."""

    def __init_subclass__(cls, *, size: int) -> None:
        super().__init_subclass__(size=size, byte_order=">")


class Header(_Wire, size=HEADER_SIZE):
    """First bytes of every message."""

    eyecatcher: bytes = field("4s", 0, "SMCR or SMCD in EBCDIC", default=SMCR)
    kind: int = field("B", 4, "1 proposal, 2 accept, 3 confirm, 4 decline")
    length: int = field("H", 5, "whole message with header and trailer, bytes")
    flags: int = field("B", 7, "bits 7-4 version; 3-2 version 2 type; 1-0 version 1 type; bit 3 see text")


class ProposalHead(Header, size=80):
    """Fixed part of a PROPOSAL of version 2; the SMC-R and version 1 fields are zero and not listed."""

    peer_id: int = field("Q", 8, "nonce of the client's intent in the directory; 0 without one")
    ip_area_offset: int = field("H", 38, "IP prefix area, bytes from 40; 0 without one", default=0)
    v2_offset: int = field("H", 50, "version 2 extension, bytes from 52; 0 without one")


class V2Extension(_Wire, size=40):
    """Version 2 extension of a PROPOSAL; the user EIDs follow it."""

    eid_count: int = field("B", 0, "user EIDs behind this extension, 0..8")
    gid_count: int = field("B", 1, "GID entries behind the SMC-D extension, 0..8")
    release: int = field("B", 3, "bits 7-4 release, 1 = version 2.1; bit 0 a system EID is given")
    smcd_offset: int = field("H", 6, "SMC-D version 2 extension, bytes from 8 of this one")
    features: int = field("H", 26, "feature mask; bit 0 Emulated-ISM")


class SmcdV2Extension(_Wire, size=48):
    """SMC-D version 2 extension of a PROPOSAL; the GID entries follow it."""

    system_eid: bytes = field("32s", 0, "system EID; zero without one", default=bytes(EID_SIZE))


class GidEntry(_Wire, size=10):
    """One GID entry; an emulated device takes two in a row with the same CHID, high half first."""

    gid: int = field("Q", 0, "gid (first entry of a pair) or devid (second)")
    chid: int = field("H", 8, "fabric of the device")


class AnswerHead(Header, size=74):
    """Fixed part of ACCEPT and CONFIRM, SMC-D version 2."""

    gid: int = field("Q", 8, "gid of the sender")
    token: int = field("Q", 16, "region the other side shall write to")
    index: int = field("B", 24, "element inside the DMB, always 0", default=0)
    size_code: int = field("B", 25, "bits 7-4 n, 0..6: the DMB has 16 KiB << n bytes")
    link_id: int = field("I", 28, "name of the link group on the sender's side")
    chid: int = field("H", 32, "chosen fabric")
    eid: bytes = field("32s", 34, "chosen EID, blank padded")
    devid: int = field("Q", 66, "devid of the sender (GID extension)")


class FirstContactHead(_Wire, size=36):
    """First contact extension, release 0."""

    os_release: int = field("B", 1, "bits 7-4 system, 2 = Linux; bits 3-0 agreed release")
    host: bytes = field("32s", 4, "host name, blank padded")


class FirstContactV21(FirstContactHead, size=52):
    """First contact extension, release 1."""

    features: int = field("H", 38, "feature mask both sides have in common; bit 0 Emulated-ISM")


class DeclineV1(Header, size=24):
    """DECLINE of version 1, without its trailer."""

    peer_id: int = field("Q", 8, "nonce of the client's intent in the directory; 0 without one")
    diagnosis: int = field("I", 16, "diagnosis code")


class DeclineV2(DeclineV1, size=40):
    """DECLINE of version 2, without its trailer."""

    os: int = field("B", 20, "bits 7-4 system, 2 = Linux")


_V1_PROPOSAL_LENGTHS = range(_IP_AREA_BASE + 12, 228 + 1)
_V2_PROPOSAL_LENGTHS = range(ProposalHead.SIZE + TRAILER_SIZE, 652 + 1)
_ANSWER_LENGTH = AnswerHead.SIZE + TRAILER_SIZE
_FIRST_CONTACT_LENGTHS = (_ANSWER_LENGTH + FirstContactHead.SIZE, _ANSWER_LENGTH + FirstContactV21.SIZE)
_SMCR_V2_LENGTHS = range(108, 304 + 1)
"""108 bytes plus a first contact extension plus a list of up to 8 GIDs; read only to be declined."""


def size_code(size: int) -> int:
    """Compress a DMB size to its four bits on the wire.

    Args:
        size: bytes, one of `DMB_SIZES`.
    Raises:
        LocalProtocolError: any other size.
    """
    if size not in DMB_SIZES:
        raise LocalProtocolError(f"a DMB of {size} bytes cannot be announced; use one of {DMB_SIZES}")
    return DMB_SIZES.index(size)


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A device a PROPOSAL offers: `devid` is 0 for a device that is not emulated."""

    gid: Gid
    devid: DevId
    chid: int


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The client's first message.

    Attributes: `offers` (in the client's order), `eids` (likewise; text that is no EID shows "?" and matches
    nothing), `release` and `features` of the client, `version` of the message, `absent` (why the message offers
    no SMC-D version 2 at all; None when it does), `nonce` (of the directory's intent, in the field of the SMC-R
    peer id; 0 without one).
    """

    kind: ClassVar[MessageType] = MessageType.PROPOSAL
    offers: tuple[Offer, ...] = ()
    eids: tuple[str, ...] = ()
    release: int = RELEASE
    features: int = FEATURE_EMULATED_ISM
    version: int = VERSION
    absent: Diagnosis | None = None
    nonce: int = dataclasses.field(default=0, compare=False)

    def encode(self) -> bytes:
        """Return the message: SMC-D version 2 only, no IP area, no system EID.

        Raises:
            LocalProtocolError: more than 8 EIDs, more than 8 GID entries, or not a version 2 offer.
        """
        if self.version != VERSION or self.absent is not None:
            raise LocalProtocolError("only proposals of SMC-D version 2 can be sent")
        entries: list[GidEntry] = []
        for offer in self.offers:
            entries.append(GidEntry(gid=offer.gid, chid=offer.chid))
            if _emulated(offer.chid):
                entries.append(GidEntry(gid=offer.devid, chid=offer.chid))
        if len(entries) > MAX_GID_ENTRIES or len(self.eids) > MAX_EIDS:
            raise LocalProtocolError(f"{len(entries)} GID entries and {len(self.eids)} EIDs; 8 of each at most")
        eids = b"".join(_padded(eid) for eid in self.eids)
        extension = V2Extension(
            eid_count=len(self.eids),
            gid_count=len(entries),
            release=self.release << 4,
            smcd_offset=V2Extension.SIZE + len(eids) - _SMCD_V2_BASE,
            features=self.features,
        )
        parts = [extension.pack(), eids, SmcdV2Extension().pack(), *(entry.pack() for entry in entries), SMCR]
        head = ProposalHead(
            kind=self.kind,
            length=ProposalHead.SIZE + sum(map(len, parts)),
            flags=_flags(VERSION, TYPE_D, TYPE_NONE),
            peer_id=self.nonce,
            v2_offset=ProposalHead.SIZE - _V2_BASE,
        )
        return b"".join([head.pack(), *parts])


@dataclass(frozen=True, kw_only=True)
class FirstContact:
    """What the first connection of a link group says in addition."""

    release: int = RELEASE
    features: int = FEATURE_EMULATED_ISM
    host: str = ""
    os: int = OS_LINUX

    def encode(self) -> bytes:
        """Return the extension: 36 bytes at release 0, 52 from release 1 on."""
        os_release, host = self.os << 4 | self.release, _padded(self.host)
        if self.release == 0:
            return FirstContactHead(os_release=os_release, host=host).pack()
        return FirstContactV21(os_release=os_release, host=host, features=self.features).pack()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What ACCEPT and CONFIRM of SMC-D version 2 have in common. `size` is in bytes, one of `DMB_SIZES`."""

    kind: ClassVar[MessageType]
    gid: Gid
    devid: DevId
    token: Token
    size: int
    chid: int
    eid: str
    link_id: int = 0
    first_contact: FirstContact | None = None

    def encode(self) -> bytes:
        """Return the message, 78 bytes, or 130 (114 at release 0) with first contact.

        Raises:
            LocalProtocolError: a size that has no code, or token 0.
        """
        if self.token == 0:
            raise LocalProtocolError("token 0 names no region")
        extension, first = b"", 0
        if self.first_contact is not None:
            extension, first = self.first_contact.encode(), FIRST_CONTACT
        head = AnswerHead(
            eyecatcher=SMCD,
            kind=self.kind,
            length=AnswerHead.SIZE + len(extension) + TRAILER_SIZE,
            flags=_flags(VERSION, 0, TYPE_D) | first,
            gid=self.gid,
            token=self.token,
            size_code=size_code(self.size) << 4,
            link_id=self.link_id,
            chid=self.chid,
            eid=_padded(self.eid),
            devid=self.devid,
        )
        return head.pack() + extension + SMCD


@dataclass(frozen=True, kw_only=True)
class Accept(Answer):
    """The server's answer: where the client shall write."""

    kind: ClassVar[MessageType] = MessageType.ACCEPT


@dataclass(frozen=True, kw_only=True)
class Confirm(Answer):
    """The client's last message: where the server shall write."""

    kind: ClassVar[MessageType] = MessageType.CONFIRM


@dataclass(frozen=True, kw_only=True)
class ForeignAnswer:
    """A well-formed ACCEPT or CONFIRM of SMC-R or of version 1. Its body is not looked at; `code` says why."""

    kind: MessageType
    code: Diagnosis


@dataclass(frozen=True, kw_only=True)
class Decline:
    """Either side's way out: the TCP connection carries the data. `diagnosis` may be any 32-bit number.

    `nonce`: of the directory's intent, as in `Proposal`.
    """

    kind: ClassVar[MessageType] = MessageType.DECLINE
    diagnosis: int
    out_of_sync: bool = False
    version: int = VERSION
    nonce: int = dataclasses.field(default=0, compare=False)

    def encode(self) -> bytes:
        """Return the message, 44 bytes, or 28 in version 1."""
        sync = OUT_OF_SYNC if self.out_of_sync else 0
        if self.version == 1:
            length = DeclineV1.SIZE + TRAILER_SIZE
            head: DeclineV1 = DeclineV1(
                kind=self.kind,
                length=length,
                flags=_flags(1, 0, 0) | sync,
                peer_id=self.nonce,
                diagnosis=self.diagnosis,
            )
        else:
            head = DeclineV2(
                kind=self.kind,
                length=DeclineV2.SIZE + TRAILER_SIZE,
                flags=_flags(VERSION, 0, 0) | sync,
                peer_id=self.nonce,
                diagnosis=self.diagnosis,
                os=OS_LINUX << 4,
            )
        return head.pack() + SMCR


Message = Proposal | Accept | Confirm | ForeignAnswer | Decline


def message_length(header: bytes | bytearray | memoryview) -> int:
    """Judge a message's first `HEADER_SIZE` bytes and return the length of the whole message, bytes.

    Args:
        header: exactly 8 bytes from the peer.
    Raises:
        HandshakeError: wrong size, eyecatcher, type, version or variant, or a length such a message never has.
    """
    if len(header) != HEADER_SIZE:
        raise HandshakeError(f"a CLC header has {HEADER_SIZE} bytes, not {len(header)}")
    head = Header.unpack(header)
    if head.eyecatcher not in EYECATCHERS:
        raise HandshakeError(f"no CLC message: it starts with {head.eyecatcher.hex()}")
    try:
        kind = MessageType(head.kind)
    except ValueError:
        raise HandshakeError(f"unknown CLC message type {head.kind}") from None
    version = head.flags >> 4
    if version not in (1, VERSION):
        raise HandshakeError(f"{kind.name} of SMC version {version}, this side speaks 2", Diagnosis.VERSMISMAT)
    if head.length not in _lengths(kind, head.flags):
        raise HandshakeError(f"{kind.name} (type byte 0x{head.flags:02x}) with impossible length {head.length}")
    return head.length


def decode(data: bytes | bytearray | memoryview) -> Message:
    """Decode one whole message.

    Args:
        data: `message_length` bytes from the peer; they are copied before they are judged.
    Returns: the message; `ForeignAnswer` for an answer of another kind of SMC.
    Raises:
        HandshakeError: anything in it contradicts the format.
    """
    raw = bytes(data)
    if message_length(raw[:HEADER_SIZE]) != len(raw):
        raise HandshakeError(f"the message has {len(raw)} bytes, its header says another number")
    head = Header.unpack(raw)
    kind, version = MessageType(head.kind), head.flags >> 4
    if kind is MessageType.DECLINE:
        decline = DeclineV1.unpack(raw)
        return Decline(
            diagnosis=decline.diagnosis,
            out_of_sync=bool(head.flags & OUT_OF_SYNC),
            version=version,
            nonce=decline.peer_id,
        )
    if raw[-TRAILER_SIZE:] not in EYECATCHERS:
        raise HandshakeError(f"{kind.name} ends with {raw[-TRAILER_SIZE:].hex()}, not with an eyecatcher")
    if kind is MessageType.PROPOSAL:
        return _decode_proposal_v1(raw) if version == 1 else _decode_proposal_v2(raw, head.flags)
    if head.flags & 3 == TYPE_R:
        return ForeignAnswer(kind=kind, code=Diagnosis.MODEUNSUPP)
    if version == 1:
        return ForeignAnswer(kind=kind, code=Diagnosis.VERSMISMAT)
    return _decode_answer(raw, Accept if kind is MessageType.ACCEPT else Confirm)


NONCE_END = 16
"""A message that carries a nonce has shown it after so many bytes."""


def carries_nonce(first: bytes, nonce: int) -> bool | None:
    """Tell whether bytes begin a PROPOSAL or DECLINE with the given nonce, which only the one who was told it can send.

    Args:
        first: what has come so far, at least one byte.
        nonce: 1..2**64-1, known to both ends through the device manager and to nobody else.
    Returns: None while it cannot be told: `NONCE_END` bytes always tell.
    """
    if first[:4] not in (SMCR[: len(first)], SMCD[: len(first)]):
        return False
    if len(first) < NONCE_END:
        return None
    kind = first[4]
    return kind in (MessageType.PROPOSAL, MessageType.DECLINE) and first[8:NONCE_END] == nonce.to_bytes(8)


class MessageReader:
    """Collects one message after the other from pieces of any size, and never wants a byte more than that."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._length = HEADER_SIZE

    @property
    def bytes_wanted(self) -> int:
        """How many bytes to read next at most: the rest of the header, then the rest of the message."""
        return self._length - len(self._data)

    @property
    def in_message(self) -> bool:
        """Whether a message has begun to come, and its rest has not."""
        return bool(self._data)

    def feed(self, data: bytes | bytearray | memoryview) -> Message | None:
        """Take bytes from the peer; return the message they complete, else None.

        Args:
            data: 1..`bytes_wanted` bytes, copied.
        Raises:
            HandshakeError: the peer's bytes are no CLC message.
            LocalProtocolError: no bytes, or more than wanted.
        """
        if not 0 < len(data) <= self.bytes_wanted:
            raise LocalProtocolError(f"{len(data)} bytes given, 1..{self.bytes_wanted} wanted")
        self._data += data
        if len(self._data) == HEADER_SIZE:
            self._length = message_length(self._data)
        if len(self._data) < self._length:
            return None
        whole, self._data, self._length = self._data, bytearray(), HEADER_SIZE
        return decode(whole)


def _emulated(chid: int) -> bool:
    return chid & EMULATED_CHIDS == EMULATED_CHIDS


def _flags(version: int, type_v2: int, type_v1: int) -> int:
    return version << 4 | type_v2 << 2 | type_v1


def _padded(text: str) -> bytes:
    return text.encode("ascii", "replace")[:EID_SIZE].ljust(EID_SIZE)


def _text(raw: bytes) -> str:
    """Peer's text made safe to show and compare: a byte that is not printable becomes "?", which no EID contains."""
    return "".join(chr(byte) if 0x20 < byte < 0x7F else "?" for byte in raw.rstrip(b" "))


def _lengths(kind: MessageType, flags: int) -> range | tuple[int, ...]:
    """All lengths, bytes, a message of this kind, version and variant can have."""
    version, type_v1 = flags >> 4, flags & 3
    if kind is MessageType.PROPOSAL:
        return _V1_PROPOSAL_LENGTHS if version == 1 else _V2_PROPOSAL_LENGTHS
    if kind is MessageType.DECLINE:
        return ((DeclineV1 if version == 1 else DeclineV2).SIZE + TRAILER_SIZE,)
    if type_v1 == TYPE_R:
        return (68,) if version == 1 else _SMCR_V2_LENGTHS
    if type_v1 == TYPE_D:
        if version == 1:
            return (48,)
        return _FIRST_CONTACT_LENGTHS if flags & FIRST_CONTACT else (_ANSWER_LENGTH,)
    return ()


def _ip_area_size(raw: bytes, start: int) -> int:
    """Size, bytes, of the IP prefix area at `start`, which must lie inside the message."""
    if start + _IP_AREA_SIZE > len(raw) - TRAILER_SIZE:
        raise HandshakeError(f"PROPOSAL of {len(raw)} bytes with its IP area at {start}")
    prefixes = raw[start + _IP_AREA_SIZE - 1]
    if prefixes > MAX_IPV6_PREFIXES:
        raise HandshakeError(f"PROPOSAL with {prefixes} IPv6 prefixes, {MAX_IPV6_PREFIXES} at most")
    return _IP_AREA_SIZE + prefixes * _IPV6_PREFIX_SIZE


def _decode_proposal_v1(raw: bytes) -> Proposal:
    """Measure a version 1 proposal, which older SMC-R peers send without the SMC-D part (IP area at 40)."""
    start = _IP_AREA_BASE + int.from_bytes(raw[38:40])
    if start + _ip_area_size(raw, start) + TRAILER_SIZE != len(raw):
        raise HandshakeError(f"PROPOSAL of version 1: parts and length {len(raw)} do not add up")
    return Proposal(release=0, features=0, version=1, absent=Diagnosis.NOV2EXT)


def _decode_proposal_v2(raw: bytes, flags: int) -> Proposal:
    head = ProposalHead.unpack(raw)
    type_v2, type_v1 = flags >> 2 & 3, flags & 3
    end = len(raw) - TRAILER_SIZE
    parts: list[tuple[int, int]] = []
    absent: Diagnosis | None = Diagnosis.NOV2EXT
    release = features = 0
    eids: tuple[str, ...] = ()
    offers: tuple[Offer, ...] = ()
    if type_v1 != TYPE_NONE:
        start = _IP_AREA_BASE + head.ip_area_offset
        parts.append((start, _ip_area_size(raw, start)))
    if type_v2 != TYPE_NONE:
        absent = Diagnosis.NOV2DEXT
        start = _V2_BASE + head.v2_offset
        if start + V2Extension.SIZE > end:
            raise HandshakeError(f"PROPOSAL of {len(raw)} bytes with its version 2 extension at {start}")
        v2 = V2Extension.unpack(raw, start)
        release, features = v2.release >> 4, v2.features
        if v2.eid_count > MAX_EIDS:
            raise HandshakeError(f"PROPOSAL with {v2.eid_count} EIDs, {MAX_EIDS} at most")
        parts.append((start, V2Extension.SIZE + v2.eid_count * EID_SIZE))
        eids = tuple(
            _text(raw[at : at + EID_SIZE]) for at in range(start + V2Extension.SIZE, start + parts[-1][1], EID_SIZE)
        )
        if type_v2 in (TYPE_D, TYPE_BOTH):
            absent = None
            start += _SMCD_V2_BASE + v2.smcd_offset
            if v2.gid_count > MAX_GID_ENTRIES:
                raise HandshakeError(f"PROPOSAL with {v2.gid_count} GID entries, {MAX_GID_ENTRIES} at most")
            parts.append((start, SmcdV2Extension.SIZE + v2.gid_count * GidEntry.SIZE))
            if start + parts[-1][1] > end:
                raise HandshakeError(f"PROPOSAL of {len(raw)} bytes with its SMC-D extension at {start}")
            offers = _offers(raw, start + SmcdV2Extension.SIZE, v2.gid_count)
    at = ProposalHead.SIZE
    for start, size in sorted(parts):
        if start != at:
            raise HandshakeError(f"PROPOSAL with a part at {start} where {at} was expected: overlap or hole")
        at += size
    if at != end:
        raise HandshakeError(f"PROPOSAL of {len(raw)} bytes whose parts end at {at}")
    return Proposal(offers=offers, eids=eids, release=release, features=features, absent=absent, nonce=head.peer_id)


def _offers(raw: bytes, start: int, count: int) -> tuple[Offer, ...]:
    """Pair the GID entries; an emulated device without its second half is no offer."""
    entries = [GidEntry.unpack(raw, start + i * GidEntry.SIZE) for i in range(count)]
    offers: list[Offer] = []
    while entries:
        entry = entries.pop(0)
        devid = 0
        if _emulated(entry.chid):
            if not entries or entries[0].chid != entry.chid:
                continue
            devid = entries.pop(0).gid
        offers.append(Offer(gid=Gid(entry.gid), devid=DevId(devid), chid=entry.chid))
    return tuple(offers)


def _decode_answer(raw: bytes, message: type[Accept] | type[Confirm]) -> Accept | Confirm:
    head = AnswerHead.unpack(raw)
    name = message.kind.name
    code = head.size_code >> 4
    if code > MAX_SIZE_CODE:
        raise HandshakeError(f"{name} with DMB size code {code}, {MAX_SIZE_CODE} at most")
    if head.index != 0:
        raise HandshakeError(f"{name} with DMB element {head.index}; there is only element 0")
    if head.token == 0:
        raise HandshakeError(f"{name} with token 0, which names no region")
    first_contact = None
    if head.flags & FIRST_CONTACT:
        extension = FirstContactHead.unpack(raw, AnswerHead.SIZE)
        release, features = extension.os_release & 15, 0
        if len(raw) != _FIRST_CONTACT_LENGTHS[release > 0]:
            raise HandshakeError(f"{name} of release {release} with {len(raw)} bytes", Diagnosis.RELEASEERR)
        if release > 0:
            features = FirstContactV21.unpack(raw, AnswerHead.SIZE).features
        first_contact = FirstContact(
            release=release, features=features, host=_text(extension.host), os=extension.os_release >> 4
        )
    return message(
        gid=Gid(head.gid),
        devid=DevId(head.devid),
        token=Token(head.token),
        size=DMB_UNIT << code,
        chid=head.chid,
        eid=_text(head.eid),
        link_id=head.link_id,
        first_contact=first_contact,
    )

# SPDX-License-Identifier: Apache-2.0
"""The map channel: memory descriptors in and out of a client's window, beside a vfio-user connection.

Owns the packet, its checks, and the capability by which a client asks for the channel. No I/O: the two ends are
`map_channel` (maps) and `map_channel_server` (says what to map). vfio-user maps a region once and cannot change
it, hence this extension; it is this project's own and negotiated, so other clients and servers never see it.

A SEQPACKET UNIX socket carries packets of 40 bytes, little-endian, one each way per request. Requests come from the
server only and are answered in order. MAP and DOORBELL carry exactly one descriptor, everything else none. Neither side
believes the other: a request that does not fit the window announced by HELLO is answered EINVAL and changes nothing;
an answer that is not the next one expected ends the channel.

QEMU, whose vfio-user client asks for no channel, has a map agent beside it (`ism/vmm/agent.c`), another peer with the
same packets. It connects to a socket beside the vfio-user socket, before that, and sends INTRODUCE, the only packet
that is no answer of its own; the manager then knows that this process has an agent, and makes requests as ever. Its
HELLO also carries, as the file offset, the inode number (not 0) of the memory file the manager will give QEMU as the
BAR: what maps that file is the window. MAP before it is mapped is answered ENODEV, doorbells ENOSYS, a descriptor
that is not sealed against shrinking EPERM. Process clients refuse such a HELLO (EINVAL) and INTRODUCE (ENOSYS).
"""

from __future__ import annotations

import enum
import errno
import struct
from collections.abc import Mapping
from typing import Any, Final

from ism.layout import Buffer, Struct, field
from ism.vfio_user.errors import MalformedMessageError

CAPABILITY: Final = "map_channel"
"""Key in the capabilities of the VERSION messages."""

VERSION: Final = 1
REPLY: Final = 0x8000
"""Bit of `Packet.type`: an answer."""

RIGHT_READ: Final = 1
RIGHT_WRITE: Final = 2

_OFFSET_LIMIT: Final = 1 << 63

_SEQUENCE = struct.Struct("<I")


class PacketType(enum.IntEnum):
    """What a request asks for; INTRODUCE is none, and goes the other way."""

    HELLO = 1
    MAP = 2
    UNMAP = 3
    DOORBELL = 4
    UNDOORBELL = 5
    INTRODUCE = 6


class Packet(Struct, size=40):
    """Every packet, both ways. Fields a request does not use are 0; an answer's are ignored but for the first three and
    the status."""

    type: int = field("H", 0, "PacketType; bit 15 = answer", default=0)
    version: int = field("H", 2, "1", default=VERSION)
    sequence: int = field("I", 4, "counts up by one per request, modulo 2^32; repeated in the answer", default=0)
    offset: int = field("Q", 8, "in the window, bytes; (UN)DOORBELL: slot; HELLO: page size, bytes", default=0)
    length: int = field("Q", 16, "bytes; HELLO: of the window", default=0)
    file_offset: int = field("Q", 24, "MAP: in the file of the descriptor, bytes", default=0)
    rights: int = field("I", 32, "MAP: 1 read, 2 write", default=0)
    status: int = field("I", 36, "answer: 0 or errno", default=0)

    def numbered(self, sequence: int) -> bytes:
        """Encode with another sequence number."""
        data = bytearray(self.pack())
        _SEQUENCE.pack_into(data, Packet.offset_of("sequence"), sequence)
        return bytes(data)


PACKET_SIZE: Final = Packet.SIZE

REQUESTS: Final = frozenset(int(kind) for kind in PacketType if kind is not PacketType.INTRODUCE)
TAKES_FD: Final = frozenset({int(PacketType.MAP), int(PacketType.DOORBELL)})


class Window:
    """The window as HELLO announced it: `page_size` and `length`, bytes. Checks requests against it."""

    def __init__(self, page_size: int, length: int) -> None:
        """Raises: MalformedMessageError unless the page size is a power of two from 4096 and divides the length."""
        if page_size < 4096 or page_size & (page_size - 1) or page_size > 1 << 40:
            raise MalformedMessageError(f"page size {page_size}: a power of two from 4096 needed")
        if length == 0 or length % page_size or length > _OFFSET_LIMIT:
            raise MalformedMessageError(f"window of {length:#x} bytes: a multiple of the page size {page_size} needed")
        self.page_size, self.length = page_size, length

    def check_range(self, offset: int, length: int) -> None:
        """Raise MalformedMessageError (EINVAL) unless the range is page-aligned, not empty and inside."""
        if length == 0 or (offset | length) % self.page_size or offset + length > self.length:
            raise MalformedMessageError(
                f"{length:#x} bytes at {offset:#x}: not aligned to {self.page_size}, empty, or beyond the window of "
                f"{self.length:#x}"
            )

    def check_map(self, offset: int, length: int, file_offset: int, rights: int) -> None:
        """Raise MalformedMessageError (EINVAL) unless the range is right and file offset and rights make sense."""
        self.check_range(offset, length)
        if file_offset % self.page_size or file_offset + length > _OFFSET_LIMIT:
            raise MalformedMessageError(f"file offset {file_offset:#x}: not aligned to {self.page_size}, or too large")
        if rights == 0 or rights & ~(RIGHT_READ | RIGHT_WRITE):
            raise MalformedMessageError(f"rights {rights:#x}: read (1), write (2) or both needed")


def parse_packet(data: Buffer) -> Packet:
    """One packet, either way. Raises MalformedMessageError, fatal, unless it is 40 bytes of version 1."""
    if len(data) != PACKET_SIZE:
        raise MalformedMessageError(f"map channel packet of {len(data)} bytes, {PACKET_SIZE} expected", fatal=True)
    packet = Packet.unpack(data)
    if packet.version != VERSION:
        raise MalformedMessageError(f"map channel version {packet.version}, {VERSION} expected", fatal=True)
    return packet


def check_request(packet: Packet, fd_count: int, window: Window | None, *, to_agent: bool = False) -> Window | None:
    """Check a request against what came before.

    Args:
        fd_count: descriptors that came with it.
        window: None before HELLO.
        to_agent: HELLO may carry an inode number.
    Returns: the new window for HELLO, else None.
    Raises: MalformedMessageError with the errno to answer: ENOSYS for an unknown type, else EINVAL.
    """
    if packet.type not in REQUESTS:
        raise MalformedMessageError(f"map channel request {packet.type:#x}", errno=errno.ENOSYS)
    kind = PacketType(packet.type)
    if fd_count != (1 if kind in TAKES_FD else 0):
        raise MalformedMessageError(f"{kind.name} with {fd_count} descriptors")
    offset_used = kind is PacketType.MAP or (to_agent and kind is PacketType.HELLO)
    rights_used = kind is PacketType.MAP
    if packet.status or (packet.file_offset and not offset_used) or (packet.rights and not rights_used):
        raise MalformedMessageError(f"{kind.name} with fields set that it does not use")
    if kind is PacketType.HELLO:
        if window is not None:
            raise MalformedMessageError("a second HELLO")
        return Window(packet.offset, packet.length)
    if window is None:
        raise MalformedMessageError(f"{kind.name} before HELLO")
    if kind is PacketType.MAP:
        window.check_map(packet.offset, packet.length, packet.file_offset, packet.rights)
    elif kind is PacketType.UNMAP:
        window.check_range(packet.offset, packet.length)
    elif packet.length:
        raise MalformedMessageError(f"{kind.name} with fields set that it does not use")
    return None


def parse_introduction(data: Buffer) -> None:
    """Check what a map agent sent first. Raises MalformedMessageError, fatal, unless it is exactly an introduction."""
    packet = parse_packet(data)
    if packet != Packet(type=PacketType.INTRODUCE):
        raise MalformedMessageError(f"map channel packet {packet.type:#x} where an introduction is due", fatal=True)


def encode_answer(request: Packet, status: int) -> bytes:
    """The answer to a request: 0 or an errno."""
    return Packet(type=request.type | REPLY, sequence=request.sequence, status=status).pack()


def parse_answer(data: Buffer, fd_count: int, expected_type: int, expected_sequence: int) -> int:
    """The status of the answer to one request.

    Raises: MalformedMessageError, fatal, unless it is the answer expected, without descriptors, and its status is 0 or
        an errno (1..4095).
    """
    packet = parse_packet(data)
    if packet.type != expected_type | REPLY or packet.sequence != expected_sequence:
        raise MalformedMessageError(
            f"map channel packet {packet.type:#x} number {packet.sequence}; the answer to {expected_type:#x} number "
            f"{expected_sequence} expected",
            fatal=True,
        )
    if fd_count or packet.status > 4095:
        raise MalformedMessageError(
            f"map channel answer with {fd_count} descriptors and status {packet.status}", fatal=True
        )
    return packet.status


def client_capability() -> dict[str, Any]:
    """What a client adds to its VERSION capabilities to ask for the channel."""
    return {CAPABILITY: {"version": VERSION}}


def is_proposed(capabilities: Mapping[str, Any]) -> bool:
    """Whether a VERSION message's capabilities ask for (server) or grant (client) this version of the channel."""
    value = capabilities.get(CAPABILITY)
    return isinstance(value, dict) and type(value.get("version")) is int and value["version"] == VERSION

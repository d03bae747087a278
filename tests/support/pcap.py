# SPDX-License-Identifier: Apache-2.0
"""Writes what two ends of a TCP connection said as a capture file, and reads it back through tshark.

`write_pcap` turns pieces of a byte stream into a complete TCP conversation (Ethernet, IPv4, three-way handshake,
one segment per piece, acknowledgements, FINs) with correct checksums, so that a dissector has nothing to complain
about except the payload. It needs no rights: nothing is captured from an interface.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

Direction = Literal["client", "server"]
"""Who sent a piece."""

TSHARK = shutil.which("tshark")
ERRORS = "_ws.malformed || _ws.expert.severity >= 0x00600000"
"""Display filter: frames tshark cannot dissect, or that carry an expert note of level warning or error."""

_MAC = {"client": bytes.fromhex("020000000001"), "server": bytes.fromhex("020000000002")}
_IP = {"client": bytes((192, 0, 2, 1)), "server": bytes((192, 0, 2, 2))}
_PORT = {"client": 40000, "server": 5000}
_FIN, _SYN, _PSH, _ACK = 0x01, 0x02, 0x08, 0x10
_MSS = 1448


def _checksum(data: bytes) -> int:
    """Internet checksum of RFC 1071."""
    total: int = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


class _Conversation:
    """Frames of one TCP connection; keeps the sequence number of both sides."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self._next = {"client": 1000, "server": 0xFFFFFFF0}  # the server's wraps on the way

    def send(self, sender: Direction, flags: int, data: bytes = b"") -> None:
        receiver: Direction = "server" if sender == "client" else "client"
        acknowledged = self._next[receiver] if flags & _ACK else 0
        ports = struct.pack(">HH", _PORT[sender], _PORT[receiver])
        rest = struct.pack(">IIBBH", self._next[sender], acknowledged, 5 << 4, flags, 65535)
        size = len(ports) + len(rest) + 4 + len(data)
        pseudo = _IP[sender] + _IP[receiver] + struct.pack(">BBH", 0, 6, size)
        checksum = _checksum(pseudo + ports + rest + bytes(4) + data)
        segment = ports + rest + struct.pack(">HH", checksum, 0) + data
        head = struct.pack(">BBHHHBB", 0x45, 0, 20 + size, len(self.frames) + 1, 0x4000, 64, 6)
        addresses = _IP[sender] + _IP[receiver]
        ip = head + struct.pack(">H", _checksum(head + bytes(2) + addresses)) + addresses
        self.frames.append(_MAC[receiver] + _MAC[sender] + b"\x08\x00" + ip + segment)
        self._next[sender] = (self._next[sender] + len(data) + bool(flags & (_SYN | _FIN))) & 0xFFFFFFFF


def write_pcap(path: Path, pieces: Iterable[tuple[Direction, bytes]]) -> None:
    """Write the conversation as a classic pcap file.

    Args:
        path: file to write.
        pieces: who sent which bytes, in order; each piece becomes one segment (more when longer than 1448 bytes).
    """
    talk = _Conversation()
    talk.send("client", _SYN)
    talk.send("server", _SYN | _ACK)
    talk.send("client", _ACK)
    for sender, data in pieces:
        for at in range(0, len(data), _MSS):
            talk.send(sender, _PSH | _ACK, data[at : at + _MSS])
            talk.send("server" if sender == "client" else "client", _ACK)
    talk.send("client", _FIN | _ACK)
    talk.send("server", _FIN | _ACK)
    talk.send("client", _ACK)
    with path.open("wb") as file:
        file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1))
        for number, frame in enumerate(talk.frames):
            file.write(struct.pack("<IIII", 1_700_000_000, number * 1000, len(frame), len(frame)))
            file.write(frame)


def dissect(path: Path, fields: Sequence[str], display_filter: str = "") -> list[dict[str, list[str]]]:
    """Run tshark over a capture.

    Args:
        path: capture file.
        fields: tshark field names.
        display_filter: which frames; all when empty.
    Returns: one row a frame; each field's values in order of occurrence, an empty list when it does not occur.
    Raises:
        subprocess.CalledProcessError: tshark refused the file, a field or the filter.
    """
    assert TSHARK is not None, "tshark is not installed"
    command = [TSHARK, "-n", "-r", str(path), "-o", "tcp.check_checksum:TRUE", "-o", "ip.check_checksum:TRUE"]
    command += ["-T", "fields", "-E", "separator=/t", "-E", "occurrence=a", "-E", "aggregator=|"]
    command += [argument for name in fields for argument in ("-e", name)]
    if display_filter:
        command += ["-Y", display_filter]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    rows = [line.split("\t") for line in output.splitlines()]
    return [{name: value.split("|") if value else [] for name, value in zip(fields, row, strict=True)} for row in rows]

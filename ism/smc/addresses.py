# SPDX-License-Identifier: Apache-2.0
"""IP addresses as the directory writes them, and those of this host (rtnetlink RTM_GETADDR; rtnetlink(7))."""

from __future__ import annotations

import contextlib
import socket
import struct
from functools import lru_cache

_V4_MAPPED = bytes(10) + b"\xff\xff"
_RTM_GETADDR, _RTM_NEWADDR = 22, 20
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NETLINK_ROUTE = 0
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence, port."""
_IFADDRMSG = struct.Struct("=BBBBI")
"""struct ifaddrmsg: family, prefix length, flags, scope, index."""
_RTATTR = struct.Struct("=HH")
"""struct rtattr: length, type."""
_BUFFER = 1 << 16


@lru_cache(maxsize=4096)
def packed(host: str) -> bytes:
    """Return a numeric address as 16 bytes in network order, IPv4 as v4-mapped IPv6. Raises OSError, ValueError."""
    text = host.partition("%")[0]
    if ":" in text:
        return socket.inet_pton(socket.AF_INET6, text)
    return _V4_MAPPED + socket.inet_pton(socket.AF_INET, text)


def local_addresses() -> list[bytes]:
    """Return every address of this network namespace's interfaces, packed; [] when the kernel does not say."""
    found: list[bytes] = []
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    try:
        with contextlib.closing(socket.SocketType(socket.AF_NETLINK, kind, _NETLINK_ROUTE)) as sock:
            request = _IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
            length = _HEADER.size + len(request)
            sock.send(_HEADER.pack(length, _RTM_GETADDR, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0) + request)
            while _take(sock.recv(_BUFFER), found):
                pass
    except (OSError, struct.error):
        pass  # what was found by then is better than nothing
    return list(dict.fromkeys(found))


def _take(data: bytes, found: list[bytes]) -> bool:
    """Collect the addresses of one datagram of the kernel; tell whether more come."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _flags, _sequence, _port = _HEADER.unpack_from(data, at)
        if kind in (_NLMSG_DONE, _NLMSG_ERROR) or length < _HEADER.size:
            return False
        if kind == _RTM_NEWADDR:
            address = _address(data[at + _HEADER.size : at + length])
            if address is not None:
                found.append(address)
        at += -(-length // 4) * 4
    return True


def _address(message: bytes) -> bytes | None:
    family = message[0]
    attributes: dict[int, bytes] = {}
    at = _IFADDRMSG.size
    while at + _RTATTR.size <= len(message):
        length, kind = _RTATTR.unpack_from(message, at)
        if length < _RTATTR.size:
            break
        attributes[kind] = message[at + _RTATTR.size : at + length]
        at += -(-length // 4) * 4
    raw = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)
    if raw is None:
        return None
    if family == socket.AF_INET and len(raw) == 4:
        return _V4_MAPPED + raw
    return raw if family == socket.AF_INET6 and len(raw) == 16 else None

# SPDX-License-Identifier: Apache-2.0
"""What makes sockets shaped as trio's: the functions of `trio.socket` that do, and a factory for trio's own helpers.

For TCP over IPv4 and IPv6 they make `SmcSocket`s, for everything else they pass on what trio makes. The trio sockets
underneath never come from a factory that a program has set, which may be the one here.
"""

from __future__ import annotations

import socket as _std
from operator import index
from typing import Any

import trio

from ism.driver import Device
from ism.smc.policy import Mode
from ism.smc.trio_socket import SmcSocket, is_for_smc, policy_for


def _plain(family: int, type: int, proto: int) -> _std.socket:
    """Make a standard socket; where a program's are those of `ism.smc.blocking` (`ism run`), one that is plain TCP."""
    kind: Any = _std.socket
    made: _std.socket = kind(family, type, proto, **({"smc": "off"} if hasattr(kind, "smc_info") else {}))
    return made


def _shared(sock: trio.socket.SocketType, **options: Any) -> trio.socket.SocketType:
    if not is_for_smc(sock):
        return sock
    try:
        return SmcSocket(sock, **options)
    except BaseException:
        sock.close()
        raise


def socket(
    family: int = _std.AF_INET,
    type: int = _std.SOCK_STREAM,
    proto: int = 0,
    fileno: int | None = None,
    *,
    smc: Mode | None = None,
    device: Device | None = None,
    buffer_size: int | None = None,
) -> trio.socket.SocketType:
    """Make a socket as `trio.socket.socket`: an `SmcSocket` for TCP, trio's own for everything else.

    Args: `smc`, `device`, `buffer_size`: as `SmcSocket`. A factory that was set for `trio.socket` is not asked.
    """
    if fileno is None:
        sock = trio.socket.from_stdlib_socket(_plain(family, type, proto))
    else:
        sock = trio.socket.socket(family, type, proto, fileno)  # never asks the factory either
    return _shared(sock, smc=smc, device=device, buffer_size=buffer_size)


def from_stdlib_socket(sock: _std.socket, *, smc: Mode | None = None) -> trio.socket.SocketType:
    """Convert a `socket.socket`; see `SmcSocket` for what becomes of one that listens or is connected."""
    return _shared(trio.socket.from_stdlib_socket(sock), smc=smc)


def fromfd(
    fd: Any, family: int = _std.AF_INET, type: int = _std.SOCK_STREAM, proto: int = 0, *, smc: Mode | None = None
) -> trio.socket.SocketType:
    """Convert a duplicate of a descriptor, as `trio.socket.fromfd`."""
    return _shared(trio.socket.fromfd(index(fd), family, type, proto), smc=smc)


class SocketFactory(trio.abc.SocketFactory):
    """Makes `SmcSocket`s for TCP: `trio.socket.set_custom_socket_factory(SocketFactory())` changes a whole program.

    Args: as `SmcSocket`.
    """

    def __init__(
        self, *, smc: Mode | None = None, device: Device | None = None, buffer_size: int | None = None
    ) -> None:
        self._options: dict[str, Any] = {"smc": smc, "device": device, "buffer_size": buffer_size}
        policy_for(smc, buffer_size)

    def socket(self, family: int = _std.AF_INET, type: int = _std.SOCK_STREAM, proto: int = 0) -> Any:
        """Make a socket."""
        return socket(family, type, proto, **self._options)

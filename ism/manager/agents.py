# SPDX-License-Identifier: Apache-2.0
"""Where the map agents of virtual machines introduce themselves: a socket beside each device socket, `PATH.map`.

It owns the listening socket and the connections that nobody has asked for yet. QEMU's vfio-user client maps a BAR once;
the agent in its process (`ism.vmm`) connects here first, and then the device is offered for mapping, since somebody is
there to change the mapping. Which agent belongs to which vfio-user client is what the kernel says: the process that
connected (SO_PEERCRED). So nobody can stand in for the agent of another process.

Whoever may connect is whoever may have the device, and as hostile: introductions are checked, few are kept, and the
oldest goes first.
"""

from __future__ import annotations

import logging
import socket
import struct

import trio

from ism.manager.config import SocketConfig
from ism.manager.sockets import listen
from ism.vfio_user.errors import MalformedMessageError
from ism.vfio_user.map_channel_wire import PACKET_SIZE, parse_introduction

logger = logging.getLogger("ism.manager")

MAX_KEPT = 16
ACCEPTS_PER_TURN = 64
_PAUSE_S = 0.1
_UCRED = struct.Struct("3i")


class AgentSocket:
    """The socket of one device, or of fresh devices, for map agents. Close it."""

    def __init__(self, device: SocketConfig, file: str) -> None:
        """Listen beside the device's socket, with its owner and permissions. Raises: as `sockets.listen`."""
        self._listener = listen(device.for_agents(), file, kind=socket.SOCK_SEQPACKET)
        self._kept: dict[int, socket.socket] = {}

    def take(self, pid: int) -> socket.socket | None:
        """Return the connection of the agent in the process `pid`, which passes to the caller; None: it has none.

        An agent connects and introduces itself before its process connects to the device, so it has by then, or never
        will.
        """
        self._accept()
        sock = self._kept.pop(pid, None) if pid else None  # 0: outside this PID namespace, as others are
        if sock is None:
            return None
        try:
            parse_introduction(sock.recv(PACKET_SIZE + 1))
        except (OSError, MalformedMessageError) as error:
            logger.info("pid %d has connected as a map agent and is none: %s", pid, error)
            sock.close()
            return None
        return sock

    async def serve(self) -> None:
        """Accept what comes, so that the backlog never fills. Never returns."""
        while True:
            await trio.lowlevel.wait_readable(self._listener.sock.fileno())
            if not self._accept():
                await trio.sleep(_PAUSE_S)

    def close(self) -> None:
        """Stop listening, remove the path, and hang up on agents that nobody has asked for."""
        self._listener.close()
        while self._kept:
            self._kept.popitem()[1].close()

    def _accept(self) -> bool:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, _ = self._listener.sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return True
            except OSError as error:
                logger.error("cannot accept a map agent: %s", error.strerror)
                return False
            self._keep(sock)
        return True

    def _keep(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        try:
            pid, _, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        except OSError as error:
            logger.info("somebody has connected as a map agent and is gone: %s", error)
            sock.close()
            return
        former = self._kept.pop(pid, None)
        if former is not None:
            former.close()
        self._kept[pid] = sock
        while len(self._kept) > MAX_KEPT:
            oldest = next(iter(self._kept))
            logger.warning("the map agent of pid %d is forgotten: %d are kept", oldest, MAX_KEPT)
            self._kept.pop(oldest).close()

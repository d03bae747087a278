# SPDX-License-Identifier: Apache-2.0
"""A vfio-user server on trio: accepts clients and serves each with a device handler of its own.

Owns the accept loop and one nursery per client, so that no client's failure reaches another. Follows the vfio-user
specification. What happens on one connection is in `connection` (the socket) and `dispatch` (the commands).
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from typing import Protocol

import trio

from ism.errors import TransportError
from ism.vfio_user.connection import Connection, logger
from ism.vfio_user.dispatch import Session
from ism.vfio_user.handler import DeviceHandler, Limits, Peer, Stats
from ism.vfio_user.listener import UnixListener

__all__ = ["serve_unix", "serve_connection", "DeviceHandler", "HandlerFactory", "Connection", "Limits", "Peer", "Stats"]

HandlerFactory = Callable[[Connection], DeviceHandler]
"""Makes the handler of a client that just connected; what it raises ends that connection alone."""


class StartedStatus(Protocol):
    """What `nursery.start` passes in."""

    def started(self, value: Stats, /) -> None: ...


_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_ACCEPT_PAUSE_S = 0.1


async def serve_connection(
    sock: socket.socket,
    handler_factory: HandlerFactory,
    *,
    limits: Limits | None = None,
    stats: Stats | None = None,
) -> None:
    """Serve one connected client until it is gone. Its misbehaviour is logged and counted, never raised.

    Args:
        sock: a connected UNIX stream socket; its ownership passes here.
        handler_factory: called once; a caller that has a handler already passes `lambda connection: handler`.
    Raises: nothing but cancellation.
    Cancellation: closes the connection; the handler's `closed` still runs.
    """
    try:
        connection = Connection(sock, limits or Limits(), stats or Stats())
    except OSError:
        sock.close()  # it was gone before it was looked at
        return
    connection.stats.connections += 1

    async def session() -> None:
        try:
            handler = handler_factory(connection)
        except Exception:
            connection.stats.failures += 1
            logger.exception("no device handler for the client pid %d", connection.peer.pid)
            return
        await Session(connection, handler).run()

    try:
        await connection.run(session)
    finally:
        connection.close()


async def serve_unix(
    path_or_listener: str | os.PathLike[str] | socket.socket,
    handler_factory: HandlerFactory,
    *,
    limits: Limits | None = None,
    stats: Stats | None = None,
    mode: int = 0o600,
    max_clients: int = 1024,
    task_status: StartedStatus = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve every client of a UNIX socket, for ever.

    Args:
        path_or_listener: a path to listen on, removed at the end; or a listening socket, whose ownership passes here.
        handler_factory: called for each client.
        mode: permission bits of a socket made at a path.
        max_clients: clients served at once; further ones are turned away.
        task_status: `await nursery.start(serve_unix, ...)` returns the `Stats` once clients can connect.
    Raises: TransportError when the path cannot be listened on.
    Cancellation: ends all connections; each handler's `closed` still runs.
    """
    limits, stats = limits or Limits(), stats or Stats()
    if isinstance(path_or_listener, socket.socket):
        path_or_listener.setblocking(False)
        with path_or_listener:
            await _accept(path_or_listener, handler_factory, limits, stats, max_clients, task_status)
    else:
        with UnixListener(path_or_listener, mode=mode) as listener:
            await _accept(listener.sock, handler_factory, limits, stats, max_clients, task_status)


async def _accept(
    listener: socket.socket,
    handler_factory: HandlerFactory,
    limits: Limits,
    stats: Stats,
    max_clients: int,
    task_status: StartedStatus,
) -> None:
    clients = 0

    async def serve_one(sock: socket.socket) -> None:
        nonlocal clients
        try:
            await serve_connection(sock, handler_factory, limits=limits, stats=stats)
        except Exception:
            stats.failures += 1
            logger.exception("a vfio-user connection failed")
        finally:
            clients -= 1

    async with trio.open_nursery() as nursery:
        task_status.started(stats)
        while True:
            await trio.lowlevel.wait_readable(listener.fileno())
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError as error:
                if error.errno not in _OUT_OF_RESOURCES:
                    raise TransportError(f"cannot accept clients: {error.strerror}", error.errno or 0) from error
                logger.error("cannot accept a client: %s; trying again in %g s", error.strerror, _ACCEPT_PAUSE_S)
                await trio.sleep(_ACCEPT_PAUSE_S)
                continue
            if clients >= max_clients:
                stats.dropped += 1
                logger.warning("a client was turned away: %d are being served", clients)
                sock.close()
                continue
            clients += 1
            nursery.start_soon(serve_one, sock)

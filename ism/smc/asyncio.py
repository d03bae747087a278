# SPDX-License-Identifier: Apache-2.0
"""The asyncio surface: `open_connection`, `start_server`, and the event loop whose TCP transports use shared memory.

    reader, writer = await ism.smc.asyncio.open_connection(host, port)      # on any selector loop
    asyncio.run(main(), loop_factory=ism.smc.asyncio.EventLoop)             # every TCP connection of a program

The transports are asyncio's own, and so are their flow control, half-close, TLS and errors. What they take for a socket
is a `Carrier` (`ism.smc.carrier`); a plain socket, and one without a link, gets the transport that it always got.

asyncio has no public place for another transport over a selector: the methods that are overridden here
(`_make_socket_transport`, `_add_reader` and the like) are the same in Python 3.11 to 3.13.
"""

from __future__ import annotations

import asyncio
import socket as _std
import types
from asyncio import base_events, constants, selector_events, sslproto, trsock
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, cast

from ism.errors import IsmError
from ism.smc import blocking, default
from ism.smc.carrier import Carrier, decided, tell
from ism.smc.info import Info

_Plain = _std.SocketType
_Selector: Any = selector_events.BaseSelectorEventLoop
_StockTransport: Any = selector_events._SelectorSocketTransport  # type: ignore[attr-defined]
_SendfileMode: Any = constants._SendfileMode
_STREAM_LIMIT = 1 << 16


# -- transports ------------------------------------------------------------------------------------------------------


class TransportSocket(trsock.TransportSocket):
    """What `get_extra_info("socket")` gives: as asyncio's, and it tells how the bytes travel."""

    __slots__ = ()

    def smc_info(self) -> Info:
        """Tell how the bytes of this connection travel, and why."""
        info: Info = self._sock.smc_info()  # type: ignore[attr-defined]
        return info


class _Transport(_StockTransport):  # type: ignore[misc]
    """asyncio's transport; `sock` is a carrier, or a socket of `ism.smc.blocking` that is plain TCP."""

    _sock: Any = None

    def __init__(self, loop: Any, sock: Any, protocol: Any, waiter: Any, extra: Any, server: Any) -> None:
        super().__init__(loop, sock, protocol, waiter, extra, server)
        self._extra["socket"] = TransportSocket(sock)
        self._informant = sock

    @property
    def _sendfile_compatible(self) -> Any:
        uses_tcp = getattr(self._informant, "uses_tcp", True)
        return _SendfileMode.TRY_NATIVE if uses_tcp else _SendfileMode.FALLBACK

    def write(self, data: Any) -> None:
        """As asyncio's. What cannot be sent at once is copied if it can change: asyncio's `sendfile` counts on that."""
        super().write(data)
        if type(data) is not bytes and self._buffer and isinstance(self._buffer, deque):  # Python 3.12 and later
            self._buffer[-1] = bytes(self._buffer[-1])

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As asyncio's; "smc_info" tells how the bytes travel, as of now."""
        return self._informant.smc_info() if name == "smc_info" else super().get_extra_info(name, default)

    def __del__(self) -> None:
        if self._sock is not None and isinstance(self._informant, Carrier):
            self._informant.bury()
            self._sock = types.SimpleNamespace(close=lambda: None)
        super().__del__()


# -- loops -----------------------------------------------------------------------------------------------------------


class _Server(base_events.Server):
    def get_loop(self) -> asyncio.AbstractEventLoop:
        return cast("asyncio.AbstractEventLoop", _real(super().get_loop()))


def _with_our_sockets(function: Any) -> Any:
    """Return a method of asyncio's loop that makes its sockets in `ism.smc.blocking`."""
    namespace = {**function.__globals__, "socket": blocking, "Server": _Server}
    made = types.FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__, made.__doc__ = function.__kwdefaults__, function.__doc__
    return made


_create_server = _with_our_sockets(base_events.BaseEventLoop.create_server)


class _Unmirrored:
    """A socket that is connected by the loop: asking for its descriptor does not mean that the program polls it."""

    def __init__(self, sock: blocking.socket) -> None:
        self._sock = sock

    def fileno(self) -> int:
        return _Plain.fileno(self._sock)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


class _Methods:
    """What a selector loop does otherwise here."""

    _connect_sock = _with_our_sockets(base_events.BaseEventLoop._connect_sock)  # type: ignore[attr-defined]

    def _make_socket_transport(
        self, sock: Any, protocol: Any, waiter: Any = None, *, extra: Any = None, server: Any = None
    ) -> Any:
        loop = _real(self)
        if not isinstance(sock, blocking.socket):
            return _StockTransport(loop, sock, protocol, waiter, extra, server)
        link = sock._link
        if link is None:
            return _Transport(loop, sock, protocol, waiter, extra, server)
        loop._ensure_fd_no_transport(_Plain.fileno(sock))
        carrier = Carrier(loop, sock, link)
        return _Transport(carrier.loop, carrier, protocol, waiter, extra, server)

    def _make_ssl_transport(
        self,
        rawsock: Any,
        protocol: Any,
        sslcontext: Any,
        waiter: Any = None,
        *,
        server_side: bool = False,
        server_hostname: Any = None,
        extra: Any = None,
        server: Any = None,
        **options: Any,
    ) -> Any:
        tls: Any = sslproto.SSLProtocol(
            _real(self),
            protocol,
            sslcontext,
            waiter,
            server_side,
            server_hostname,
            **options,
        )
        self._make_socket_transport(rawsock, tls, extra=extra, server=server)
        return tls._app_transport

    async def create_server(self, *arguments: Any, **options: Any) -> asyncio.Server:
        """As asyncio's; the address is published in the device manager's directory."""
        await _open_device(self)
        server: asyncio.Server = await _create_server(self, *arguments, **options)
        return server

    async def sock_connect(self, sock: Any, address: Any) -> None:
        """As asyncio's."""
        if isinstance(sock, blocking.socket):
            if sock._policy.mode != "off":
                await _open_device(self)
            sock = _Unmirrored(sock)
        await _Selector.sock_connect(self, sock, address)


class EventLoop(_Methods, asyncio.SelectorEventLoop):
    """asyncio's selector loop, whose TCP connections use shared memory where both ends do."""

    async def sock_recv(self, sock: Any, nbytes: int) -> bytes:
        """As asyncio's."""
        await decided(self, sock, sending=False)
        return await super().sock_recv(sock, nbytes)

    async def sock_recv_into(self, sock: Any, buf: Any) -> int:
        """As asyncio's."""
        await decided(self, sock, sending=False)
        return await super().sock_recv_into(sock, buf)

    async def sock_sendall(self, sock: Any, data: Any) -> None:
        """As asyncio's."""
        await decided(self, sock, sending=True)
        channel = sock._decided(True, 0.0) if isinstance(sock, blocking.socket) else None
        if channel is None:
            await super().sock_sendall(sock, data)
            return
        sock.fileno()  # the driver's thread takes the doorbells, and tells
        view = memoryview(data).cast("B")
        while True:
            view = view[channel.send_now(view) :]
            if not view:
                return
            await self._room(channel)

    async def _room(self, channel: Any) -> None:
        room: asyncio.Future[None] = self.create_future()

        def found() -> None:
            if not room.done():
                room.set_result(None)

        def wake() -> None:
            tell(self, found)

        if not channel.on_room(wake):
            await asyncio.sleep(0)
            return
        try:
            await room
        finally:
            channel.forget_room(wake)

    async def _sock_sendfile_native(self, sock: Any, file: Any, offset: int, count: int | None) -> int:
        if isinstance(sock, blocking.socket):
            await decided(self, sock, sending=True)
            if sock._decided(True, 0.0) is not None:
                raise asyncio.SendfileNotAvailableError("os.sendfile() does not reach shared memory")
        sent: int = await super()._sock_sendfile_native(sock, file, offset, count)  # type: ignore[misc]
        return sent


class EventLoopPolicy(asyncio.DefaultEventLoopPolicy):
    """Makes every new loop an `EventLoop`; `ism run` installs it."""

    _loop_factory = EventLoop


class _Guest(_Methods):
    """Another selector loop, on which connections and servers are made as on an `EventLoop`."""

    create_connection: Any = base_events.BaseEventLoop.create_connection
    _create_connection_transport: Any = base_events.BaseEventLoop._create_connection_transport  # type: ignore[attr-defined]
    _start_serving: Any = _Selector._start_serving
    _accept_connection: Any = _Selector._accept_connection
    _accept_connection2: Any = _Selector._accept_connection2

    def __init__(self, loop: Any) -> None:
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)


def _real(loop: Any) -> Any:
    return loop._loop if isinstance(loop, _Guest) else loop


async def _open_device(loop: Any) -> None:
    """Open the process's device without blocking the loop; what fails, connecting or listening says."""
    try:
        if default.opened() is None:
            await loop.run_in_executor(None, default.open_default)
    except (IsmError, OSError):
        pass


# -- streams ---------------------------------------------------------------------------------------------------------


def _for_smc() -> Any:
    """Return the running loop, as one that uses shared memory if that can be."""
    loop = asyncio.get_running_loop()
    if isinstance(loop, EventLoop) or not isinstance(loop, _Selector):
        return loop
    return _Guest(loop)


async def open_connection(
    host: Any = None, port: Any = None, *, limit: int = _STREAM_LIMIT, **options: Any
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect and return a pair of streams, as `asyncio.open_connection`, in any selector loop.

    Args: as `asyncio.open_connection`.
    Returns: (reader, writer); `writer.get_extra_info("smc_info")` tells how the bytes travel.
    Raises: OSError, ValueError, as asyncio's. In a loop of another kind (uvloop) the connection is TCP.
    Cancellation: safe to retry.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await _for_smc().create_connection(lambda: protocol, host, port, **options)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def start_server(
    client_connected_cb: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None],
    host: Any = None,
    port: Any = None,
    *,
    limit: int = _STREAM_LIMIT,
    **options: Any,
) -> asyncio.Server:
    """Listen, and call back with a pair of streams for each client, as `asyncio.start_server`, in any selector loop.

    Args: as `asyncio.start_server`. Returns: the server. Raises: OSError, ValueError, as asyncio's.
    """
    loop = asyncio.get_running_loop()

    def factory() -> asyncio.StreamReaderProtocol:
        reader = asyncio.StreamReader(limit=limit, loop=loop)
        return asyncio.StreamReaderProtocol(reader, client_connected_cb, loop=loop)

    server: asyncio.Server = await _for_smc().create_server(factory, host, port, **options)
    return server

# SPDX-License-Identifier: Apache-2.0
"""The end of the map channel that maps: blocking calls, no event loop, one thread at a time.

Owns the socket and the window as announced. Never maps anything itself: the handler does. Follows `map_channel_wire`.
The server is believed in nothing: each request is checked against the window before the handler sees it, every
descriptor that comes is handed over or closed, and a packet that is no request at all ends the channel.
"""

from __future__ import annotations

import errno
import socket
from types import TracebackType
from typing import Final, Protocol, Self

from ism.errors import DeviceGoneError, RemoteProtocolError
from ism.vfio_user import map_channel_wire
from ism.vfio_user.client import Client
from ism.vfio_user.errors import MalformedMessageError, VfioUserError, VfioUserTimeoutError
from ism.vfio_user.fds import Fd, close_all, recv_message, send_message
from ism.vfio_user.map_channel_wire import RIGHT_READ, RIGHT_WRITE, Packet, PacketType, Window, client_capability

__all__ = [
    "MapChannelClient",
    "MapHandler",
    "client_capability",
    "take_channel",
    "RIGHT_READ",
    "RIGHT_WRITE",
]

_PACKETS_PER_CALL: Final = 1024


class MapHandler(Protocol):
    """What a client does with its window. Everything it is given fits the window.

    Raises, for every verb: OSError or VfioUserError to refuse; the errno becomes the answer's status.
    Ownership of `fd` passes to the handler, unless it raises.
    """

    def hello(self, page_size: int, window: int, /) -> None:
        """Learn the page size and the window's length, bytes. Called once, first."""
        ...

    def map(self, offset: int, length: int, file_offset: int, rights: int, fd: Fd, /) -> None:
        """Map a part of a file at `offset` of the window, in place of what is there. In place when this returns."""
        ...

    def unmap(self, offset: int, length: int, /) -> None:
        """Take away what is mapped there; gone when this returns."""
        ...

    def doorbell(self, slot: int, fd: Fd, /) -> None:
        """From now on ring `slot` by this eventfd."""
        ...

    def undoorbell(self, slot: int, /) -> None:
        """No longer use the eventfd of `slot`."""
        ...


def take_channel(client: Client) -> socket.socket | None:
    """The socket of the channel that `client` asked for with `client_capability()`; the caller owns it.

    Returns: None when the server does not offer it.
    Raises: RemoteProtocolError when the server grants it without sending a socket.
    """
    if not map_channel_wire.is_proposed(client.capabilities.raw):
        return None
    fds = client.take_version_fds()
    try:
        if not fds:
            raise RemoteProtocolError("the server grants the map channel but sent no socket with its VERSION reply")
        # The first descriptor of the reply is the channel's; nothing else is negotiated with one.
        try:
            sock = socket.socket(fileno=fds[0].fileno())
        except OSError as error:
            raise RemoteProtocolError("the server sent something that is no socket as its map channel") from error
        fds[0].detach()
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_SEQPACKET:
            sock.close()
            raise RemoteProtocolError("the server sent a socket that is not UNIX SEQPACKET as its map channel")
        return sock
    finally:
        close_all(fds)


class MapChannelClient:
    """Serve the requests of one map channel.

    Args:
        sock: a connected UNIX SEQPACKET socket; its ownership passes here.
        handler: does the mapping.
        send_timeout_s: how long an answer may wait for a server that does not read, seconds.

    Attributes: `window` (None before HELLO).
    """

    def __init__(self, sock: socket.socket, handler: MapHandler, *, send_timeout_s: float = 5.0) -> None:
        sock.setblocking(False)
        self.window: Window | None = None
        self._sock, self._handler, self._send_timeout_s = sock, handler, send_timeout_s
        self._inbox = bytearray(map_channel_wire.PACKET_SIZE)
        self._over = False

    def fileno(self) -> int:
        """The socket, to wait for; -1 when closed."""
        return self._sock.fileno()

    def process(self) -> bool:
        """Handle and answer every packet that is there, without waiting for more.

        Returns: False at the end of the channel; True after many packets even when more are there.
        Raises: RemoteProtocolError for a packet that is no request, VfioUserTimeoutError when the server does not read
            answers: the channel is closed then. Anything else a handler raises passes through, after EIO was answered.
        """
        for _ in range(_PACKETS_PER_CALL):
            if self._over:
                return False
            try:
                received = recv_message(self._sock, self._inbox, 1)
            except BlockingIOError:
                return True
            except OSError:
                self.close()
                return False
            if received.size == 0:
                close_all(received.fds)
                self.close()
                return False
            self._take(self._inbox, received.size, received.fds, received.problem is not None)
        return True

    def close(self) -> None:
        """Close the channel. What is mapped stays the handler's."""
        self._over = True
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, inbox: bytearray, size: int, fds: list[Fd], lost: bool) -> None:
        try:
            if size != map_channel_wire.PACKET_SIZE:
                raise MalformedMessageError(f"map channel packet of the wrong size ({size})", fatal=True)
            packet = map_channel_wire.parse_packet(inbox)
            if packet.type & map_channel_wire.REPLY:
                raise MalformedMessageError("an answer where requests are expected", fatal=True)
        except MalformedMessageError:
            close_all(fds)
            self.close()
            raise
        status = errno.EIO
        try:
            status = errno.EMFILE if lost else self._handle(packet, fds)
        finally:
            if status:
                close_all(fds)
            self._answer(packet, status)

    def _handle(self, packet: Packet, fds: list[Fd]) -> int:
        handler = self._handler
        try:
            window = map_channel_wire.check_request(packet, len(fds), self.window)
            if window is not None:
                handler.hello(window.page_size, window.length)
                self.window = window
            elif packet.type == PacketType.MAP:
                handler.map(packet.offset, packet.length, packet.file_offset, packet.rights, fds[0])
            elif packet.type == PacketType.UNMAP:
                handler.unmap(packet.offset, packet.length)
            elif packet.type == PacketType.DOORBELL:
                handler.doorbell(packet.offset, fds[0])
            else:
                handler.undoorbell(packet.offset)
        except (OSError, VfioUserError, MalformedMessageError) as error:
            return error.errno if error.errno and 0 < error.errno < 4096 else errno.EIO
        return 0

    def _answer(self, packet: Packet, status: int) -> None:
        try:
            send_message(self._sock, map_channel_wire.encode_answer(packet, status), timeout_s=self._send_timeout_s)
        except (DeviceGoneError, OSError):
            self.close()
        except VfioUserTimeoutError:
            self.close()
            raise

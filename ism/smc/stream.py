# SPDX-License-Identifier: Apache-2.0
"""trio streams over SMC: `SmcStream`, `SmcListener`, `open_tcp_stream`, `open_tcp_listeners`, `serve_tcp`.

A stream is a TCP connection that moves its bytes through shared memory. The handshake is lazy, as in TLS: it runs in
the first send or receive (or in `do_handshake`), so neither connecting nor accepting ever waits for the other program.

Rules are trio's: every call is a checkpoint, also one that raises; one task may send and one receive at a time
(BusyResourceError), a closed stream gives ClosedResourceError, a broken one BrokenResourceError, the end of the stream
is b"". A call first checks for cancellation, then moves bytes, then yields: so the peer works while this task is
rescheduled.
"""

from __future__ import annotations

import contextlib
import operator
import os
import sys
import time
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import trio

from ism.driver import Device
from ism.errors import IsmError
from ism.smc import handshake
from ism.smc.connection import Connection
from ism.smc.default import default_device

_DEFAULT_RECEIVE = 65536
_LONGEST_TURN_S = 0.001
"""A send that the peer keeps up with yields this often, so that other tasks run and cancellation is seen."""


class _Sleeper:
    """Lets up to two tasks of one connection sleep on its one descriptor: one waits on it, the other on that one."""

    __slots__ = ("_lot", "_waiting")

    def __init__(self) -> None:
        self._waiting = False
        self._lot = trio.lowlevel.ParkingLot()

    async def sleep(self, connection: Connection) -> None:
        """Wait until the descriptor was readable, and reset it. May return for nothing: look again."""
        if self._waiting:
            await self._lot.park()
            return
        self._waiting = True
        try:
            try:
                await trio.lowlevel.wait_readable(connection.fd)
            except trio.ClosedResourceError:
                if connection.closed:
                    raise
                return  # a `_Waker` it was: the peer is gone
            if not connection.closed:
                connection.drain()
        finally:
            self._waiting = False
            self._lot.unpark_all()


class _Waker:
    """Wakes the task that sleeps on a connection's descriptor, from any thread, whatever state the descriptor is in."""

    __slots__ = ("_connection", "_token")

    def __init__(self, connection: Connection) -> None:
        self._connection, self._token = weakref.ref(connection), trio.lowlevel.current_trio_token()

    def __call__(self) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._wake)

    def _wake(self) -> None:
        connection = self._connection()
        if connection is not None and not connection.closed:  # else the number may be somebody else's by now
            trio.lowlevel.notify_closing(connection.fd)


class SmcStream(trio.abc.HalfCloseableStream):
    """A bidirectional byte stream through shared memory.

    Made by `open_tcp_stream` and by `SmcListener.accept`.
    Attributes: `socket` (the trio TCP socket underneath: addresses and options; never read or write it).
    """

    def __init__(
        self, socket: trio.socket.SocketType, *, server_side: bool, device: Device | None, buffer_size: int
    ) -> None:
        self.socket = socket
        self._server_side, self._device, self._buffer_size = server_side, device, buffer_size
        self._connection: Connection | None = None
        self._handshake: handshake.Client | handshake.Server | None = None
        self._handshake_lock = trio.Lock()
        self._broken: BaseException | None = None
        self._ended = False
        self._write_ended = False
        self._closed = False
        self._sleeper = _Sleeper()
        self._sending = self._receiving = False

    # -- handshake ----------------------------------------------------------------------------------------------

    async def do_handshake(self) -> None:
        """Run the handshake now, if it has not run yet. Returns as well when the peer closed before it.

        Raises: BrokenResourceError (declined, lies, connection lost), ClosedResourceError.
        Cancellation: nothing is lost; the next call goes on with the handshake.
        """
        await trio.lowlevel.checkpoint()
        await self._established()

    async def _established(self) -> Connection | None:
        """Return the connection, made now if need be; None when the peer closed before the handshake."""
        self._check_usable()
        if self._connection is not None or self._ended:
            return self._connection
        async with self._handshake_lock:
            try:
                self._check_usable()
                if self._connection is None and not self._ended:
                    self._connection = await self._shake_hands()
            except handshake.ClosedByPeerError:
                self._ended = True
            except (IsmError, OSError) as exc:
                self._broken = exc
            except trio.Cancelled:
                raise  # the next call goes on with it
            except BaseException as exc:
                self._broken = exc
                raise
            finally:
                if self._closed:
                    self._let_go()  # closed by another task meanwhile
        self._check_usable()
        return self._connection

    async def _shake_hands(self) -> Connection:
        if self._handshake is None:
            device = self._device or await default_device()
            end = handshake.Server if self._server_side else handshake.Client
            self._handshake = end(self.socket, device, self._buffer_size)
        connection = await self._handshake.run()
        self._handshake = None
        connection.on_peer_gone(_Waker(connection))
        return connection

    def _check_usable(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream is closed")
        if self._broken is not None:
            raise trio.BrokenResourceError(f"this connection is broken: {self._broken}") from self._broken

    async def _break(self, exc: Exception) -> NoReturn:
        """Turn what the connection raised into trio's error."""
        await trio.lowlevel.cancel_shielded_checkpoint()
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed by another task") from None
        if isinstance(exc, ConnectionError) and not isinstance(exc, BrokenPipeError):
            self._broken = exc
        raise trio.BrokenResourceError(f"the connection is broken: {exc}") from exc

    @staticmethod
    async def _busy(what: str) -> NoReturn:
        await trio.lowlevel.checkpoint()
        raise trio.BusyResourceError(f"another task is {what} this stream")

    # -- sending ------------------------------------------------------------------------------------------------

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data` (any contiguous buffer, not changed meanwhile).

        Returns when all bytes are in the peer's memory. Raises: ClosedResourceError, BrokenResourceError,
        BusyResourceError, TypeError. Cancellation: an unknown part was sent; close the stream.
        """
        if self._sending:
            await self._busy("sending on")
        self._sending = True
        try:
            connection = self._connection
            if connection is None or self._closed or self._write_ended:
                connection = await self._sendable()
            await trio.lowlevel.checkpoint_if_cancelled()
            sent = connection.send(data)
            if sent != (len(data) if type(data) is bytes else memoryview(data).nbytes):
                await self._send_rest(connection, data, sent)
            await trio.lowlevel.cancel_shielded_checkpoint()
        except (IsmError, OSError) as exc:
            await self._break(exc)
        finally:
            self._sending = False

    async def _send_rest(self, connection: Connection, data: bytes | bytearray | memoryview, sent: int) -> None:
        view = memoryview(data).cast("B")
        turn_ends_s = time.perf_counter() + _LONGEST_TURN_S
        while sent < len(view):
            taken = connection.send(view[sent:])
            sent += taken
            if taken or not await self._wait_writable(connection):
                if time.perf_counter() < turn_ends_s:
                    continue
                await trio.lowlevel.checkpoint()
            turn_ends_s = time.perf_counter() + _LONGEST_TURN_S

    async def _sendable(self) -> Connection:
        await trio.lowlevel.checkpoint()
        if self._write_ended and not self._closed:
            raise trio.ClosedResourceError("this side of the stream has sent its end")
        connection = await self._established()
        if connection is None:
            raise trio.BrokenResourceError("the peer closed the connection before the handshake")
        return connection

    async def _wait_writable(self, connection: Connection) -> bool:
        """Sleep for room, unless there is some by now; returns whether it slept."""
        if not connection.must_wait_to_write():
            return False
        try:
            await self._sleeper.sleep(connection)
        finally:
            connection.awake(writer=True)
        return True

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until some bytes could be sent at once, or the stream is broken or closed by the peer.

        Raises: ClosedResourceError, BrokenResourceError, BusyResourceError.
        """
        if self._sending:
            await self._busy("sending on")
        self._sending = True
        try:
            connection = await self._sendable()
            while not connection.writable():
                await self._wait_writable(connection)
        except (IsmError, OSError) as exc:
            await self._break(exc)
        finally:
            self._sending = False

    async def send_eof(self) -> None:
        """Tell the peer that no more bytes come; receiving goes on. Idempotent.

        Raises: ClosedResourceError, BrokenResourceError, BusyResourceError.
        """
        if self._sending:
            await self._busy("sending on")
        self._sending = True
        try:
            if self._write_ended:
                await trio.lowlevel.checkpoint()
                self._check_usable()
                return
            connection = await self._sendable()
            connection.shutdown_write()
            self._write_ended = True
        except (IsmError, OSError) as exc:
            await self._break(exc)
        finally:
            self._sending = False

    # -- receiving ----------------------------------------------------------------------------------------------

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive at least one byte, at most `max_bytes` (64 KiB by default).

        Returns: bytes, or b"" at the end of the stream. Raises: ClosedResourceError, BrokenResourceError (once all
        bytes that came before were read), BusyResourceError, ValueError, TypeError. Cancellation: nothing is lost.
        """
        if max_bytes is None:
            max_bytes = _DEFAULT_RECEIVE
        else:
            max_bytes = min(operator.index(max_bytes), sys.maxsize)
            if max_bytes < 1:
                await trio.lowlevel.checkpoint()
                raise ValueError(f"max_bytes is {max_bytes}, must be 1 or more")
        if self._receiving:
            await self._busy("receiving from")
        self._receiving = True
        try:
            connection = self._connection
            if connection is None or self._closed:
                await trio.lowlevel.checkpoint()
                connection = await self._established()
                if connection is None:
                    return b""
            await trio.lowlevel.checkpoint_if_cancelled()
            while (data := connection.recv(max_bytes)) is None:
                await self._wait_readable(connection)
            await trio.lowlevel.cancel_shielded_checkpoint()
        except (IsmError, OSError) as exc:
            await self._break(exc)
        finally:
            self._receiving = False
        if not data:
            self._check_usable()  # an end that the other direction has found to be a reset is no end of file
        return data

    async def _wait_readable(self, connection: Connection) -> None:
        if connection.must_wait_to_read():
            try:
                await self._sleeper.sleep(connection)
            finally:
                connection.awake(writer=False)

    # -- the end ------------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Close the stream. The peer reads what was sent, then the end; unread bytes here make that a reset."""
        if not self._closed:
            self._closed = True
            if self._connection is not None:
                trio.lowlevel.notify_closing(self._connection.fd)
            if not self._handshake_lock.locked():
                self._let_go()  # else the task that runs the handshake does it
            self.socket.close()
        await trio.lowlevel.checkpoint()

    def _let_go(self) -> None:
        if self._connection is not None:
            self._connection.close()
        elif self._handshake is not None:
            self._handshake.close()
        elif self._server_side:
            # a client that only receives has sent an offer, not data: it gets an end of file, not a reset
            with contextlib.suppress(OSError):
                os.read(self.socket.fileno(), 4096)

    # -- information --------------------------------------------------------------------------------------------

    def setsockopt(self, level: int, option: int, value: int | bytes) -> None:
        """Set an option of the TCP socket underneath."""
        self.socket.setsockopt(level, option, value)

    def getsockopt(self, level: int, option: int, buffersize: int = 0) -> int | bytes:
        """Get an option of the TCP socket underneath."""
        return (
            self.socket.getsockopt(level, option, buffersize) if buffersize else self.socket.getsockopt(level, option)
        )

    @property
    def connection(self) -> Connection | None:
        """The established connection (rings, regions, peer), None before the handshake."""
        return self._connection


def _checked(buffer_size: int) -> int:
    if not 1 <= buffer_size <= sys.maxsize:
        raise ValueError(f"buffer_size is {buffer_size} bytes, must be 1 or more")
    return buffer_size


class SmcListener(trio.abc.Listener[SmcStream]):
    """Accepts TCP connections that become SMC streams.

    Attributes: `socket` (the listening trio socket).
    """

    def __init__(
        self,
        listener: trio.SocketListener,
        *,
        device: Device | None = None,
        buffer_size: int = handshake.DEFAULT_BUFFER,
    ) -> None:
        self._listener, self._device = listener, device
        self._buffer_size = _checked(buffer_size)
        self.socket = listener.socket

    async def accept(self) -> SmcStream:
        """Accept a connection; its handshake runs in its first send or receive. Raises ClosedResourceError, OSError."""
        accepted = await self._listener.accept()
        return SmcStream(accepted.socket, server_side=True, device=self._device, buffer_size=self._buffer_size)

    async def aclose(self) -> None:
        """Stop listening."""
        await self._listener.aclose()


async def open_tcp_stream(
    host: str,
    port: int,
    *,
    device: Device | None = None,
    buffer_size: int = handshake.DEFAULT_BUFFER,
    **options: Any,
) -> SmcStream:
    """Connect to an SMC server.

    Args:
        host, port, options: as `trio.open_tcp_stream`.
        device: virtio-ism device to use; by default the process's (`ISM_DEVICE`, or the user's manager).
        buffer_size: bytes of the region this side receives in.
    Raises: OSError when TCP cannot connect, ValueError. The device is opened by the first send or receive.
    """
    _checked(buffer_size)
    stream = await trio.open_tcp_stream(host, port, **options)
    return SmcStream(stream.socket, server_side=False, device=device, buffer_size=buffer_size)


async def open_tcp_listeners(
    port: int,
    *,
    host: str | None = None,
    backlog: int | None = None,
    device: Device | None = None,
    buffer_size: int = handshake.DEFAULT_BUFFER,
) -> list[SmcListener]:
    """Listen on a TCP port for SMC clients; arguments as `trio.open_tcp_listeners`. Raises OSError, ValueError."""
    _checked(buffer_size)
    listeners = await trio.open_tcp_listeners(port, host=host, backlog=backlog)
    return [SmcListener(listener, device=device, buffer_size=buffer_size) for listener in listeners]


async def serve_tcp(
    handler: Callable[[SmcStream], Awaitable[object]],
    port: int,
    *,
    host: str | None = None,
    backlog: int | None = None,
    handler_nursery: trio.Nursery | None = None,
    device: Device | None = None,
    buffer_size: int = handshake.DEFAULT_BUFFER,
    task_status: trio.TaskStatus[list[SmcListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Accept SMC connections for ever and run `handler(stream)` for each, as `trio.serve_tcp` does."""
    listeners = await open_tcp_listeners(port, host=host, backlog=backlog, device=device, buffer_size=buffer_size)
    await trio.serve_listeners(handler, listeners, handler_nursery=handler_nursery, task_status=task_status)

# SPDX-License-Identifier: Apache-2.0
"""trio streams over SMC: `SmcStream`, `SmcListener`, `open_tcp_stream`, `open_tcp_listeners`, `serve_tcp`.

A stream is a TCP connection that moves its bytes through shared memory when both ends can; else it is a
`trio.SocketStream` over that connection, and does what that does. Which of them it is shows with the first send or
receive, so neither connecting nor accepting ever waits for the other program.

Rules are trio's: every call is a checkpoint, also one that raises; one task may send and one receive at a time
(BusyResourceError), a closed stream gives ClosedResourceError, a broken one BrokenResourceError, the end of the stream
is b"". A call first checks for cancellation, then moves bytes, then yields: so the peer works while this task is
rescheduled.
"""

from __future__ import annotations

import contextlib
import errno
import operator
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, cast

import trio

from ism.driver import Device
from ism.errors import IsmError
from ism.smc.connection import Connection
from ism.smc.info import Info
from ism.smc.lending import room_size, view_size
from ism.smc.policy import Mode
from ism.smc.rendezvous import OFF
from ism.smc.trio_channel import BrokenLinkError, TrioChannel
from ism.smc.trio_factory import socket
from ism.smc.trio_lending import ReceiveView, SendBuffer
from ism.smc.trio_socket import SmcSocket, policy_for
from ism.smc.trio_wait import default_device

_DEFAULT_RECEIVE = 65536
_LONGEST_TURN_S = 0.001
"""A send that the peer keeps up with yields this often, so that other tasks run and cancellation is seen."""
_LARGEST_PIECE = 1 << 20
"""One call of the connection goes on for as long as the peer makes room, so it is given no more at once."""
_ATTEMPT_DELAY_S = 0.25
"""How long one address is tried before the next is tried beside it (RFC 8305)."""
_LARGEST_BACKLOG = 0xFFFF


class SmcStream(trio.abc.HalfCloseableStream):
    """A bidirectional byte stream, through shared memory where both ends can, else over TCP.

    Made by `open_tcp_stream`, by `SmcListener.accept`, and, as `trio.SocketStream`, from a connected socket.
    Attributes: `socket` (an `SmcSocket`, or whatever trio socket it was made from: addresses and options).
    """

    def __init__(self, socket: trio.socket.SocketType) -> None:
        """Take over a connected trio socket. Raises: TypeError, ValueError."""
        if isinstance(socket, SmcSocket):
            self._channel = socket.channel
            self._over_tcp = trio.SocketStream(socket.channel.tcp)
        else:
            self._over_tcp = trio.SocketStream(socket)
            self._channel = TrioChannel(socket, policy_for("off"), None, OFF)
        self.socket = socket
        self._plain = self._over_tcp if self._channel.link is None and self._channel.policy.mode != "require" else None
        self._broken: BaseException | None = None
        self._sending = self._receiving = False
        self._view: ReceiveView | None = None
        self._buffer: SendBuffer | None = None

    def smc_info(self) -> Info:
        """Tell how the bytes of this stream travel, and why."""
        return self._channel.smc_info()

    @property
    def amortise_checkpoints(self) -> bool:
        """Whether a call that need not wait yields only if its task has run for 100 us. Every call sees cancellation.

        Round trips take a third of the time then. In return other tasks wait up to 100 us longer for their turn, and a
        task that is never made to wait does not let others run at each call. False unless it is set; over TCP it
        changes nothing.
        """
        return self._channel.amortise_checkpoints

    @amortise_checkpoints.setter
    def amortise_checkpoints(self, wanted: bool) -> None:
        self._channel.amortise_checkpoints = wanted

    # -- handshake ----------------------------------------------------------------------------------------------

    async def do_handshake(self) -> None:
        """Find out now how the bytes travel, if it is not known yet.

        Raises: BrokenResourceError (lies, connection lost, shared memory required and declined), ClosedResourceError.
        Cancellation: nothing is lost; the next call goes on with it.
        """
        await trio.lowlevel.checkpoint()
        await self._decided(self._channel.to_know)

    async def _decided(self, known: Callable[[], Awaitable[Connection | None]]) -> Connection | None:
        """Return the connection, as soon as there is one; None when it is TCP."""
        self._check_usable()
        try:
            connection = await known()
        except BrokenLinkError as exc:
            self._broken = exc.error
        except OSError as exc:
            if exc.errno != errno.EBADF:
                raise
        else:
            self._check_usable()
            if connection is None and self._channel.drained:
                self._plain = self._over_tcp
            return connection
        self._check_usable()
        raise trio.ClosedResourceError("this stream is closed")

    def _check_usable(self) -> None:
        if self._channel.closed:
            raise trio.ClosedResourceError("this stream is closed")
        if self._broken is not None:
            raise trio.BrokenResourceError(f"this connection is broken: {self._broken}") from self._broken

    async def _break(self, exc: Exception) -> NoReturn:
        """Turn what the connection raised into trio's error."""
        self._channel.send_turns.forget()
        await trio.lowlevel.cancel_shielded_checkpoint()
        if self._channel.closed:
            raise trio.ClosedResourceError("this stream was closed by another task") from None
        if isinstance(exc, ConnectionError) and not isinstance(exc, BrokenPipeError):
            self._broken = exc
        raise trio.BrokenResourceError(f"the connection is broken: {exc}") from exc

    async def _turn(self, loan: ReceiveView | SendBuffer | None, what: str) -> None:
        """Refuse a second task. A loan whose block is over is ended now, if nobody looks at its memory any more."""
        if loan is not None and loan.pinned:
            await trio.lowlevel.checkpoint_if_cancelled()
            return await loan.__aexit__(None, None, None)
        await trio.lowlevel.checkpoint()
        raise trio.BusyResourceError(f"another task is {what} this stream, or has its memory lent")

    # -- sending ------------------------------------------------------------------------------------------------

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data` (any contiguous buffer, not changed meanwhile).

        Returns when all bytes are in the peer's memory, or the kernel's. Raises: ClosedResourceError,
        BrokenResourceError, BusyResourceError, TypeError. Cancellation: an unknown part was sent; close the stream.
        """
        if self._plain is not None and not self._sending:
            return await self._plain.send_all(data)
        if self._sending:
            await self._turn(self._buffer, "sending on")
        self._sending = True
        try:
            channel = self._channel
            connection = channel.connection
            if connection is None or channel.closed or channel.write_ended:
                connection = await self._sendable()
                if connection is None:
                    return await self._over_tcp.send_all(data)
            await trio.lowlevel.checkpoint_if_cancelled()
            size = len(data) if type(data) is bytes else memoryview(data).nbytes
            sent = connection.send(data) if size <= _LARGEST_PIECE else 0
            if sent != size:
                await self._send_rest(connection, data, sent)
            turns = channel.send_turns
            if turns.due():
                await turns.over()
        except (IsmError, OSError) as exc:
            await self._break(exc)
        finally:
            self._sending = False

    async def _send_rest(self, connection: Connection, data: bytes | bytearray | memoryview, sent: int) -> None:
        view = memoryview(data).cast("B")
        turn_ends_s = time.perf_counter() + _LONGEST_TURN_S
        while sent < len(view):
            taken = connection.send(view[sent : sent + _LARGEST_PIECE])
            sent += taken
            if taken or not await self._channel.wait_writable(connection):
                if time.perf_counter() < turn_ends_s:
                    continue
                await trio.lowlevel.checkpoint()
            turn_ends_s = time.perf_counter() + _LONGEST_TURN_S

    async def _sendable(self) -> Connection | None:
        await trio.lowlevel.checkpoint()
        if self._channel.write_ended and not self._channel.closed:
            raise trio.ClosedResourceError("this side of the stream has sent its end")
        return await self._decided(self._channel.to_send)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until some bytes could be sent at once, or the stream is broken or closed by the peer.

        Raises: ClosedResourceError, BrokenResourceError, BusyResourceError.
        """
        if self._plain is not None and not self._sending:
            return await self._plain.wait_send_all_might_not_block()
        if self._sending:
            await self._turn(self._buffer, "sending on")
        self._sending = True
        try:
            connection = await self._sendable()
            if connection is None:
                return await self._over_tcp.wait_send_all_might_not_block()
            while not connection.writable():
                await self._channel.wait_writable(connection)
            await self._channel.send_turns.over()
        except (IsmError, OSError) as exc:
            await self._break(exc)
        finally:
            self._sending = False

    async def send_eof(self) -> None:
        """Tell the peer that no more bytes come; receiving goes on. Idempotent.

        Raises: ClosedResourceError, BrokenResourceError, BusyResourceError.
        """
        if self._plain is not None and not self._sending:
            return await self._plain.send_eof()
        if self._sending:
            await self._turn(self._buffer, "sending on")
        self._sending = True
        try:
            if self._channel.write_ended:
                await trio.lowlevel.checkpoint()
                self._check_usable()
                return None
            connection = await self._sendable()
            if connection is None:
                return await self._over_tcp.send_eof()
            connection.shutdown_write()
            self._channel.write_ended = True
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
        if self._plain is not None and not self._receiving:
            return await self._plain.receive_some(max_bytes)
        if max_bytes is None:
            max_bytes = _DEFAULT_RECEIVE
        else:
            max_bytes = min(operator.index(max_bytes), sys.maxsize)
            if max_bytes < 1:
                await trio.lowlevel.checkpoint()
                raise ValueError(f"max_bytes is {max_bytes}, must be 1 or more")
        if self._receiving:
            await self._turn(self._view, "receiving from")
        self._receiving = True
        try:
            channel = self._channel
            connection = channel.connection
            if connection is None or channel.closed:
                connection = await self._receivable()
                if connection is None:
                    return await self._over_tcp.receive_some(max_bytes)
            turns = channel.receive_turns
            if turns.due():
                await channel.yield_to_receive()
            else:
                await trio.lowlevel.checkpoint_if_cancelled()
            while (data := connection.recv(max_bytes, turns.alone)) is None:
                await channel.wait_readable(connection)
            if not data:
                await self._before_the_end()
        except (IsmError, OSError) as exc:
            await self._break(exc)
        finally:
            self._receiving = False
        if not data:
            self._check_usable()  # an end that the other direction has found to be a reset is no end of file
        return data

    async def receive_some_into(self, buffer: bytearray | memoryview) -> int:
        """Receive at least one byte into a writable contiguous buffer: one copy, from shared memory into it.

        Returns: bytes received, 0 at the end of the stream. Raises: as `receive_some`; ValueError for an empty buffer,
        TypeError, BufferError for one that cannot be written. Cancellation: nothing is lost.
        """
        view = memoryview(buffer).cast("B")
        if view.readonly:
            raise TypeError(f"cannot receive into a read-only {type(buffer).__name__}")
        if not len(view):
            await trio.lowlevel.checkpoint()
            raise ValueError("the buffer is empty, must have room for 1 byte or more")
        if self._receiving:
            await self._turn(self._view, "receiving from")
        self._receiving = True
        try:
            connection = self._channel.connection
            if connection is None or self._channel.closed:
                connection = None if self._plain is not None else await self._receivable()
                if connection is None:
                    return await self._channel.tcp.recv_into(view)
            await self._channel.begin_receiving()
            while (count := connection.recv_into(view, self._channel.receive_turns.alone)) is None:
                await self._channel.wait_readable(connection)
            if not count:
                await self._before_the_end()
        except (IsmError, OSError) as exc:
            if self._plain is not None and isinstance(exc, OSError) and exc.errno == errno.EBADF:
                raise trio.ClosedResourceError("this stream is closed") from None
            await self._break(exc)
        finally:
            self._receiving = False
        if not count:
            self._check_usable()
        return count

    @staticmethod
    async def _before_the_end() -> None:
        """Yield before the end of the stream is believed: a sleeping sender finds out now if it is none."""
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def _receivable(self) -> Connection | None:
        await trio.lowlevel.checkpoint()
        return await self._decided(self._channel.to_receive)

    # -- without a copy -----------------------------------------------------------------------------------------

    def receive_view(self, max_bytes: int | None = None) -> ReceiveView:
        """Receive without a copy: `async with stream.receive_view() as lent:`, then look at `lent.view`.

        Entering waits for a byte or more, and lends them where they lie in the ring: up to `max_bytes`, as far as they
        are contiguous (over TCP a copy, of 64 KiB if `max_bytes` is None). `len(lent)` is 0 at the end of the stream.
        Leaving consumes all of them, or as `lent.consume(count)` said; with an exception nothing. What a loan is, and
        when leaving it is a BufferError, is in `ism.smc.lending`.
        Raises: ValueError, TypeError; entering and leaving: as `receive_some`. Cancellation: nothing is lost.
        """
        return ReceiveView(self, view_size(max_bytes))

    def send_buffer(self, size: int) -> SendBuffer:
        """Send without a copy: `async with stream.send_buffer(size) as lent:`, then write into `lent.view`.

        Entering waits for room, and lends 1 to `size` contiguous bytes of the peer's ring (over TCP, ordinary memory).
        Leaving sends all of them, or as `lent.commit(count)` said; with an exception, Cancelled too, nothing.
        Raises: ValueError, TypeError; entering and leaving: as `send_all`, and BufferError. Cancellation: nothing was
        sent; over TCP, when it comes while the block is left, an unknown part.
        """
        return SendBuffer(self, room_size(size))

    # -- the end ------------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Close the stream. The peer reads what was sent, then the end; unread bytes here make that a reset."""
        self.socket.close()
        self._channel.closed = True
        await trio.lowlevel.checkpoint()

    # -- information --------------------------------------------------------------------------------------------

    def setsockopt(self, level: int, option: int, value: Any, length: int | None = None) -> None:
        """Set an option of the socket, as `trio.SocketStream.setsockopt`."""
        if length is None:
            self.socket.setsockopt(level, option, value)
        else:
            self.socket.setsockopt(level, option, value, length)

    def getsockopt(self, level: int, option: int, buffersize: int = 0) -> int | bytes:
        """Get an option of the socket, as `trio.SocketStream.getsockopt`."""
        return (
            self.socket.getsockopt(level, option, buffersize) if buffersize else self.socket.getsockopt(level, option)
        )

    @property
    def connection(self) -> Connection | None:
        """The established connection (rings, regions, peer); None before the handshake, and in TCP."""
        with contextlib.suppress(BrokenLinkError):
            return self._channel.settled_connection()
        return None


class SmcListener(trio.abc.Listener[SmcStream]):
    """Accepts connections as `SmcStream`s.

    Attributes: `socket` (the listening socket: an `SmcSocket`, or whatever trio socket it was made from),
    `amortise_checkpoints` (what the streams begin with).
    """

    def __init__(self, socket: trio.socket.SocketType) -> None:
        """Take over a listening trio socket. Raises: TypeError, ValueError."""
        self._listener = trio.SocketListener(socket)
        self.socket = socket
        self.amortise_checkpoints = False

    async def accept(self) -> SmcStream:
        """Accept a connection; it never waits for the client. Raises ClosedResourceError, OSError."""
        accepted = await self._listener.accept()
        stream = SmcStream(accepted.socket)
        stream.amortise_checkpoints = self.amortise_checkpoints
        return stream

    async def aclose(self) -> None:
        """Stop listening."""
        await self._listener.aclose()


async def open_tcp_stream(
    host: str | bytes,
    port: int,
    *,
    happy_eyeballs_delay: float | None = _ATTEMPT_DELAY_S,
    local_address: str | None = None,
    smc: Mode | None = None,
    device: Device | None = None,
    buffer_size: int | None = None,
    amortise_checkpoints: bool = False,
) -> SmcStream:
    """Connect to a server.

    Args:
        host, port, happy_eyeballs_delay, local_address: as `trio.open_tcp_stream`.
        smc: "auto": shared memory where both ends can, else TCP; "require"; "off". None: what ISM_SMC says.
        device: virtio-ism device to use; by default the process's (`ISM_DEVICE`, or the user's manager).
        buffer_size: bytes of the region this side receives in; None: what ISM_SMC_BUFFER says.
        amortise_checkpoints: see `SmcStream`.
    Raises: OSError when TCP cannot connect, or shared memory is required and impossible; ValueError, TypeError.
    """
    policy_for(smc, buffer_size)
    if not isinstance(host, str | bytes):
        raise ValueError(f"host must be str or bytes, not {host!r}")
    if not isinstance(port, int):
        raise TypeError(f"port must be int, not {port!r}")

    async def connect(family: int, kind: int, proto: int, address: Any) -> SmcSocket:
        sock = cast("SmcSocket", socket(family, kind, proto, smc=smc, device=device, buffer_size=buffer_size))
        try:
            if local_address is not None:
                await _bind_to(sock, local_address, address)
            await sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return sock

    found = await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_STREAM)
    targets = _alternating([(family, kind, proto, address) for family, kind, proto, _, address in found])
    delay_s = _ATTEMPT_DELAY_S if happy_eyeballs_delay is None else happy_eyeballs_delay
    stream = SmcStream(await _first_to_connect(connect, targets, delay_s, f"{_text(host)}:{port}"))
    stream.amortise_checkpoints = amortise_checkpoints
    return stream


async def _bind_to(sock: SmcSocket, local_address: str, remote: Any) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(trio.socket.IPPROTO_IP, trio.socket.IP_BIND_ADDRESS_NO_PORT, 1)
    try:
        await sock.bind((local_address, 0))
    except OSError:
        raise OSError(f"local_address={local_address!r} is incompatible with remote address {remote!r}") from None


def _alternating(targets: list[tuple[int, int, int, Any]]) -> list[tuple[int, int, int, Any]]:
    """Put the first address of another family second: if one family does not work here the other is tried early."""
    for index, target in enumerate(targets):
        if target[0] != targets[0][0]:
            return [targets[0], target, *targets[1:index], *targets[index + 1 :]]
    return targets


async def _first_to_connect(
    connect: Callable[..., Awaitable[SmcSocket]], targets: list[tuple[int, int, int, Any]], delay_s: float, name: str
) -> SmcSocket:
    """Try addresses one after the other, the next when one has failed or takes long; keep the first that connects."""
    winners: list[SmcSocket] = []
    failures: list[OSError] = []

    async def attempt(target: tuple[int, int, int, Any], failed: trio.Event) -> None:
        try:
            sock = await connect(*target)
        except OSError as exc:
            failures.append(exc)
            failed.set()
            return
        if winners:
            sock.close()
        winners.append(sock)
        nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            for target in targets:
                failed = trio.Event()
                nursery.start_soon(attempt, target, failed)
                with trio.move_on_after(delay_s):
                    await failed.wait()
    except BaseException:
        for sock in winners:
            sock.close()
        raise
    if not winners:
        message = f"all attempts to connect to {name} failed"
        raise OSError(message) from ExceptionGroup(message, failures)
    return winners[0]


def _text(host: str | bytes) -> str:
    text = host.decode("ascii") if isinstance(host, bytes) else host
    return f"[{text}]" if ":" in text else text


async def open_tcp_listeners(
    port: int,
    *,
    host: str | bytes | None = None,
    backlog: int | None = None,
    smc: Mode | None = None,
    device: Device | None = None,
    buffer_size: int | None = None,
    amortise_checkpoints: bool = False,
) -> list[SmcListener]:
    """Listen on a TCP port; clients that ask the device manager find it there when this returns.

    Args: as `trio.open_tcp_listeners` and `open_tcp_stream`.
    Raises: OSError, also when shared memory is required and there is no device; ValueError, TypeError.
    """
    policy = policy_for(smc, buffer_size)
    if not isinstance(port, int):
        raise TypeError(f"port must be an int not {port!r}")
    if backlog is not None and not isinstance(backlog, int):
        raise TypeError(f"backlog must be an int or None, not {backlog!r}")
    if policy.mode != "off" and device is None:
        try:
            await default_device()
        except (IsmError, OSError) as exc:
            if policy.mode == "require":
                raise OSError(errno.ECONNABORTED, f"shared memory is required, but there is no device: {exc}") from exc
    addresses = await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_STREAM, flags=trio.socket.AI_PASSIVE)
    listeners: list[SmcListener] = []
    unsupported: list[OSError] = []
    try:
        for family, kind, proto, _, address in addresses:
            try:
                sock = cast("SmcSocket", socket(family, kind, proto, smc=smc, device=device, buffer_size=buffer_size))
            except OSError as exc:
                if exc.errno != errno.EAFNOSUPPORT:
                    raise
                unsupported.append(exc)
                continue
            try:
                sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_REUSEADDR, 1)
                if family == trio.socket.AF_INET6:
                    sock.setsockopt(trio.socket.IPPROTO_IPV6, trio.socket.IPV6_V6ONLY, 1)
                await sock.bind(address)
                sock.listen(_LARGEST_BACKLOG if backlog is None else min(backlog, _LARGEST_BACKLOG))
                await sock.published()
            except BaseException:
                sock.close()
                raise
            listeners.append(SmcListener(sock))
            listeners[-1].amortise_checkpoints = amortise_checkpoints
    except BaseException:
        for listener in listeners:
            listener.socket.close()
        raise
    if unsupported and not listeners:
        message = "this system supports none of the kinds of socket that the address could use"
        raise OSError(errno.EAFNOSUPPORT, message) from ExceptionGroup(message, unsupported)
    return listeners


async def serve_tcp(
    handler: Callable[[SmcStream], Awaitable[object]],
    port: int,
    *,
    host: str | bytes | None = None,
    backlog: int | None = None,
    handler_nursery: trio.Nursery | None = None,
    smc: Mode | None = None,
    device: Device | None = None,
    buffer_size: int | None = None,
    amortise_checkpoints: bool = False,
    task_status: trio.TaskStatus[list[SmcListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Accept connections for ever and run `handler(stream)` for each, as `trio.serve_tcp` does."""
    listeners = await open_tcp_listeners(
        port,
        host=host,
        backlog=backlog,
        smc=smc,
        device=device,
        buffer_size=buffer_size,
        amortise_checkpoints=amortise_checkpoints,
    )
    await trio.serve_listeners(handler, listeners, handler_nursery=handler_nursery, task_status=task_status)

# SPDX-License-Identifier: Apache-2.0
"""The server's end of one vfio-user connection: its socket, in order, and DMA requests the other way.

Owns the socket and what is under way on it: messages received and not yet handled, replies awaited, bytes half sent.
Never interprets a command (`dispatch`). Follows the vfio-user specification, "Header" and "Command Concurrency".
The client is hostile: what is kept for it is bounded by `Limits`, and a client that floods, stalls or sends garbage
loses its own connection only.

Whoever needs something from the socket reads it: the main loop its next command, a `dma_read` its reply, also while
the main loop is in the middle of a command. One task reads at a time; the others are parked and look again after
each receive. So the common path is one task, one wait and no cancel scope per message.
"""

from __future__ import annotations

import errno
import itertools
import logging
import socket
import struct
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import trio

from ism.errors import LocalProtocolError
from ism.vfio_user import payloads, wire
from ism.vfio_user.capabilities import MAX_VERSION_DATA, Capabilities, VersionFixed
from ism.vfio_user.dma import DmaTable
from ism.vfio_user.errors import ClientGoneError, MalformedMessageError, VfioUserError, VfioUserTimeoutError
from ism.vfio_user.fds import Fd, close_all, recv_message, send_some
from ism.vfio_user.handler import Limits, Peer, Stats
from ism.vfio_user.payloads import DmaMap
from ism.vfio_user.wire import Command, FdLike, Message, MessageReader

logger = logging.getLogger("ism.vfio_user")

_RECEIVE_BYTES: Final = 1 << 16
_UCRED: Final = struct.Struct("iII")


class _Inbox(threading.local):
    """Where the connections of this thread receive, in turn: what comes is copied out before anything else runs."""

    def __init__(self) -> None:
        self.buffer = bytearray(_RECEIVE_BYTES)


_inbox = _Inbox()


class _Call:
    __slots__ = ("command", "reply")

    def __init__(self, command: int) -> None:
        self.command = command
        self.reply: Message[Fd] | None = None


class Connection:
    """One client. A handler keeps it to reach the client's memory.

    Attributes: `peer` (who connected); `capabilities` (the client's, once VERSION is through); `limits`; `stats`;
    `dma_maps` (what the client has mapped, for looking up only).
    """

    def __init__(self, sock: socket.socket, limits: Limits, stats: Stats) -> None:
        sock.setblocking(False)
        self.limits, self.stats = limits, stats
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        self.peer = Peer(*_UCRED.unpack(credentials))
        self.capabilities = Capabilities()
        self.dma_maps: DmaTable[DmaMap] = DmaTable(limits.max_dma_maps)
        self._sock, self._number = sock, sock.fileno()
        self._nursery: trio.Nursery | None = None
        # Until VERSION is through, no message is longer than VERSION may be.
        self._reader: MessageReader[Fd] = MessageReader(
            max_message=wire.HEADER_SIZE + VersionFixed.SIZE + MAX_VERSION_DATA, max_fds=limits.max_msg_fds
        )
        self._queue: deque[Message[Fd]] = deque()
        self._queued_bytes = 0
        self._malformed: MalformedMessageError | None = None
        self._reading = False
        self._parked = trio.lowlevel.ParkingLot()
        self._sending = trio.Lock()
        self._calls: dict[int, _Call] = {}
        self._ids = itertools.count(1)
        self._over: ClientGoneError | None = None
        self._dropped = False

    # For handlers

    async def dma_read(self, address: int, count: int) -> bytes:
        """Read the client's memory by message, in as many messages as its limit asks for.

        Args:
            address: where the device sees it; all of it inside one DMA map.
            count: bytes.
        Raises: VfioUserError (EFAULT outside a map, EPERM against its flags, or the client's errno);
            VfioUserTimeoutError; ClientGoneError; MalformedMessageError for a reply that does not fit.
        Cancellation: safe to retry.
        """
        self._check_mapped(address, count, payloads.DMA_MAP_READ)
        chunks = []
        for start, size in self._pieces(address, count):
            reply = await self._call(Command.DMA_READ, payloads.DMA_ACCESS.pack(start, size))
            chunks.append(payloads.parse_dma_read_reply(reply.payload, start, size))
        return b"".join(chunks)

    async def dma_write(self, address: int, data: bytes) -> None:
        """Write the client's memory by message. Args, Raises, Cancellation: as `dma_read`; after a cancellation or an
        error part of the data may be written."""
        self._check_mapped(address, len(data), payloads.DMA_MAP_WRITE)
        for start, size in self._pieces(address, len(data)):
            piece = data[start - address : start - address + size]
            reply = await self._call(Command.DMA_WRITE, payloads.DMA_ACCESS.pack(start, size) + piece)
            payloads.parse_dma_write_reply(reply.payload, start, size)

    def drop(self, reason: str, *, departed: bool = False) -> None:
        """End the connection; the main loop notices, and `closed` of the handler follows.

        Args: `departed`: the client has left of its own accord, which is no reason for a warning.
        """
        if self._over is None:
            self._dropped = True
            if departed:
                logger.debug("vfio-user client pid %d left: %s", self.peer.pid, reason)
            else:
                self.stats.dropped += 1
                logger.warning("vfio-user client pid %d dropped: %s", self.peer.pid, reason)
            self._end(ClientGoneError(f"client dropped: {reason}", errno.ECONNABORTED))
            self._forget_queue()

    def start_soon(self, async_fn: Callable[..., Awaitable[object]], *args: Any) -> None:
        """Run a background task of the handler for as long as the client stays.

        It is cancelled after the handler's `closed`. An Exception of it is logged and drops this client alone.
        Possible from the handler's factory on. Raises LocalProtocolError when the connection is not served (any more).
        """
        if self._nursery is None:
            raise LocalProtocolError("a connection has background tasks only while it is served")
        self._nursery.start_soon(self._background, async_fn, args)

    # For the main loop

    @property
    def over(self) -> ClientGoneError | None:
        """Why the connection ended, None while it lasts."""
        return self._over

    def negotiated(self, capabilities: Capabilities) -> None:
        """Note what VERSION brought; from now on data messages may be as long as the limits say."""
        self.capabilities = capabilities
        longest = wire.HEADER_SIZE + payloads.DmaAccess.SIZE + self.limits.max_data_xfer_size
        self._reader.max_message = max(longest, self._reader.max_message)

    async def next_request(self) -> Message[Fd] | None:
        """The next command, in order; None when the client is gone.

        Raises: MalformedMessageError, fatal, after the last usable message of a stream that cannot be followed.
        """
        while not self._queue:
            if self._malformed is not None:
                raise self._malformed
            if self._over is not None:
                return None
            await self._receive_or_wait()
        if self._dropped:
            return None
        message = self._queue.popleft()
        self._queued_bytes -= len(message.payload)
        return message

    async def send(self, data: bytes, fds: Sequence[FdLike] = ()) -> None:
        """Send one whole message.

        Raises: ClientGoneError, also for a client that does not read in time; VfioUserError (EBADF, ETOOMANYREFS) when
            `fds` cannot be sent: then nothing was.
        """
        if self._over is not None:
            raise self._gone()
        sent = 0
        if not self._sending.locked():
            sent = self._send_now(data, fds)
            if sent == len(data):
                return
            # Nobody else may send before the rest is out.
            self._sending.acquire_nowait()
        else:
            await self._sending.acquire()
        try:
            await self._send_rest(data, sent, fds)
        finally:
            self._sending.release()

    async def run(self, session: Callable[[], Awaitable[None]]) -> None:
        """Run `session` with a nursery for background tasks around it, which ends with it."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await session()
            finally:
                self._nursery = None
            nursery.cancel_scope.cancel()

    async def _background(self, async_fn: Callable[..., Awaitable[object]], args: tuple[Any, ...]) -> None:
        try:
            await async_fn(*args)
        except Exception:
            self.stats.failures += 1
            logger.exception("a background task of the device handler failed")
            self.drop("its device failed")

    def close(self) -> None:
        """Close the socket and everything received that nobody took."""
        self._end(ClientGoneError("the connection was closed", errno.ECONNABORTED))
        self._forget_queue()
        close_all(self._reader.abandon())
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._number)
            self._sock.close()

    def _forget_queue(self) -> None:
        for message in self._queue:
            close_all(message.fds)
        self._queue.clear()

    # Sending

    def _send_now(self, data: bytes | memoryview, fds: Sequence[FdLike]) -> int:
        try:
            return send_some(self._sock, data, fds)
        except BlockingIOError:
            return 0
        except OSError as error:
            if fds and self._over is None and error.errno in (errno.ETOOMANYREFS, errno.EBADF):
                # Nothing was sent; the descriptors are at fault, not the connection.
                raise VfioUserError(
                    error.errno, "the descriptors to send are closed, or too many are under way"
                ) from error
            raise self._lost(error) from error

    async def _send_rest(self, data: bytes, sent: int, fds: Sequence[FdLike]) -> None:
        with trio.move_on_after(self.limits.send_timeout_s) as scope:
            try:
                while sent < len(data):
                    if self._over is not None:
                        raise self._gone()
                    more = self._send_now(memoryview(data)[sent:], fds if sent == 0 else ())
                    sent += more
                    if not more:
                        await trio.lowlevel.wait_writable(self._number)
            except trio.ClosedResourceError:
                raise self._gone() from None
            except trio.Cancelled:
                if sent and not scope.cancel_called:  # the rest of the stream would be garbage
                    self.drop("a message to it was cut off")
                raise
        if scope.cancelled_caught:
            self.drop(f"it read nothing for {self.limits.send_timeout_s:g} s")
            raise self._gone()

    # Receiving

    async def _receive_or_wait(self) -> None:
        if self._reading:
            await self._parked.park()
            return
        self._reading = True
        try:
            await trio.lowlevel.wait_readable(self._number)
            self._receive()
        except trio.ClosedResourceError:
            self._gone()
        finally:
            self._reading = False
            if self._parked:
                self._parked.unpark_all()

    def _receive(self) -> None:
        try:
            received = recv_message(self._sock, _inbox.buffer, self.limits.max_msg_fds)
        except BlockingIOError:
            return
        except OSError as error:
            self._lost(error)
            return
        if received.size == 0:
            if self._reader.buffered:
                logger.info("vfio-user client pid %d left in the middle of a message", self.peer.pid)
            self._end(ClientGoneError("the client closed the connection", errno.ECONNRESET))
            return
        reader = self._reader
        with memoryview(_inbox.buffer) as inbox:
            reader.feed(inbox[: received.size], received.fds, received.problem)
        try:
            while (message := reader.next_message()) is not None:
                if message.flags & wire.FLAG_TYPE_MASK == wire.FLAG_TYPE_REPLY:
                    self._take_reply(message)
                else:
                    self._queue.append(message)
                    self._queued_bytes += len(message.payload)
        except MalformedMessageError as error:
            self._malformed = error
        limits = self.limits
        if self._calls and (
            len(self._queue) > limits.max_queued_messages or self._queued_bytes > limits.max_queued_bytes
        ):
            self.drop(f"{len(self._queue)} messages, {self._queued_bytes} bytes sent ahead of a DMA reply")

    def _take_reply(self, message: Message[Fd]) -> None:
        call = self._calls.get(message.id)
        if message.fds or message.problem is not None or call is None or call.command != message.command:
            close_all(message.fds)
            self.stats.stray_replies += 1
            logger.info(
                "vfio-user client pid %d sent a reply nobody waits for: %s, id %d",
                self.peer.pid,
                wire.command_name(message.command),
                message.id,
            )
            return
        call.reply = message

    # DMA

    def _check_mapped(self, address: int, count: int, right: int) -> None:
        entry = self.dma_maps.find(address, count)
        if entry is None:
            raise VfioUserError(errno.EFAULT, f"{count} bytes at {address:#x} are not inside one DMA map")
        if not entry.value.flags & right:
            raise VfioUserError(errno.EPERM, f"the DMA map at {entry.address:#x} does not allow this access")

    def _pieces(self, address: int, count: int) -> list[tuple[int, int]]:
        # The reply of a read must fit what this side accepts, too.
        step = min(self.capabilities.max_data_xfer_size, self.limits.max_data_xfer_size)
        return [(address + done, min(step, count - done)) for done in range(0, count, step)]

    async def _call(self, command: Command, payload: bytes) -> Message[Fd]:
        id = next(id & 0xFFFF for id in self._ids if id & 0xFFFF not in self._calls)
        call = _Call(command)
        self._calls[id] = call
        try:
            with trio.move_on_after(self.limits.dma_timeout_s):
                await self.send(wire.encode(id, command, payload))
                while call.reply is None:
                    if self._over is not None:
                        raise self._gone()
                    if self._malformed is not None:
                        raise ClientGoneError("the client sent garbage", errno.EPROTO)
                    await self._receive_or_wait()
        finally:
            del self._calls[id]
        if call.reply is None:
            raise VfioUserTimeoutError(f"the client did not answer {command.name} in {self.limits.dma_timeout_s:g} s")
        if call.reply.flags & wire.FLAG_ERROR:
            raise VfioUserError(call.reply.error or errno.EIO, "refused by the client", command=command.name)
        return call.reply

    # The end

    def _lost(self, error: OSError) -> ClientGoneError:
        self._end(ClientGoneError(f"the connection broke: {error.strerror or error}", error.errno or 0))
        return self._gone()

    def _gone(self) -> ClientGoneError:
        self._end(ClientGoneError("the connection was closed", errno.ECONNABORTED))
        assert self._over is not None
        return ClientGoneError(str(self._over), self._over.errno)  # one per task that raises it

    def _end(self, reason: ClientGoneError) -> None:
        if self._over is None:
            self._over = reason
            try:
                self._sock.shutdown(socket.SHUT_RDWR)  # wakes whoever reads
            except OSError:
                pass  # the client was faster
        if self._parked:
            self._parked.unpark_all()

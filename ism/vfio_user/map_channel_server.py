# SPDX-License-Identifier: Apache-2.0
"""The end of the map channel that says what to map, on trio.

Owns the socket, the requests that are not answered yet and the descriptors that wait to be sent. Never maps anything.
Follows `map_channel_wire`. The client is hostile: it may be silent, answer out of turn or die; each ends the channel,
within the timeout, and fails everybody who waits. What waits for a client is bounded by `max_outstanding`.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import trio

from ism.errors import LocalProtocolError, TransportError
from ism.vfio_user import map_channel_wire
from ism.vfio_user.errors import MalformedMessageError, MapChannelClosedError, VfioUserError
from ism.vfio_user.fds import Fd, close_all, recv_message, send_some
from ism.vfio_user.map_channel_wire import Packet, PacketType, Window
from ism.vfio_user.wire import FdLike

logger = logging.getLogger("ism.vfio_user")

GONE: Final = frozenset({errno.ECONNRESET, errno.EPIPE})
"""Errnos of a channel that ended because the client closed it or went away: nothing to worry about."""

_SEQUENCE_MASK: Final = 0xFFFFFFFF


class PendingAnswer:
    """A request under way. Wait for it any time, any number of times, from any task, or be called when it is done."""

    __slots__ = ("_done", "_event", "_failure", "_status", "_then", "deadline", "sequence", "type")

    def __init__(self, type: int, sequence: int, deadline: float) -> None:
        self.type, self.sequence, self.deadline = type, sequence, deadline
        self._done = False
        self._status = 0
        self._failure: MapChannelClosedError | None = None
        self._event: trio.Event | None = None
        self._then: Callable[[], None] | None = None

    @property
    def done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self._done

    def then(self, callback: Callable[[], None]) -> None:
        """Call `callback` once: when the answer is there, by whoever receives it; now, when it is. One at most."""
        if self._done:
            callback()
        else:
            self._then = callback

    @property
    def error(self) -> VfioUserError | MapChannelClosedError | None:
        """What `wait` would raise; None as long as it is not done, and when the client agreed."""
        if self._failure is not None:
            return MapChannelClosedError(str(self._failure), self._failure.errno)
        if self._status:
            return VfioUserError(self._status, "refused by the client", command=PacketType(self.type).name)
        return None

    async def wait(self) -> None:
        """Wait until the client answered.

        Raises: VfioUserError with the status when the client refused; MapChannelClosedError when the channel ended.
        Cancellation: safe to retry; the request itself is not undone.
        """
        if not self._done:
            if self._event is None:
                self._event = trio.Event()
            await self._event.wait()
        else:
            await trio.lowlevel.checkpoint()
        if (error := self.error) is not None:
            raise error

    def _finish(self, status: int, failure: MapChannelClosedError | None = None) -> None:
        self._done, self._status, self._failure = True, status, failure
        if self._event is not None:
            self._event.set()
        then, self._then = self._then, None
        if then is not None:
            then()


class _Unsent(NamedTuple):
    data: bytes
    fds: list[Fd]


class MapChannelServer:
    """One client's map channel.

    Args:
        sock: a connected UNIX SEQPACKET socket; its ownership passes here.
        timeout_s: within which every request must be answered, else the channel ends, seconds.
        max_outstanding: requests that may be unanswered at once.

    Attributes: `since_s` (trio time from which the requests made now have `timeout_s`; None: from now on).

    Start `run` in a nursery; close the channel, or cancel `run`, to end it. Every verb has a variant that returns
    at once: requests go out, and are done by the client, in the order of the calls.
    """

    def __init__(self, sock: socket.socket, *, timeout_s: float = 10.0, max_outstanding: int = 1024) -> None:
        sock.setblocking(False)
        self._sock, self._number = sock, sock.fileno()
        self._timeout_s, self._max_outstanding = timeout_s, max_outstanding
        self._window: Window | None = None
        self._sequence = 0
        self.since_s: float | None = None
        self._pending: deque[PendingAnswer] = deque()
        self._unsent: deque[_Unsent] = deque()
        self._failure: MapChannelClosedError | None = None
        self._inbox = bytearray(map_channel_wire.PACKET_SIZE)
        # A task that has nothing to do sleeps on its event, which the next request sets.
        self._something_pending = trio.Event()
        self._something_unsent = trio.Event()

    @property
    def failure(self) -> MapChannelClosedError | None:
        """Why the channel ended; None while it is open."""
        return self._failure

    async def hello(self, page_size: int, window: int, inode: int = 0) -> None:
        """Announce the window; comes first, once. Args: bytes; a map agent is told the `inode` of what it stands for.

        Raises: as `map`.
        """
        await self.hello_nowait(page_size, window, inode).wait()

    async def map(self, offset: int, length: int, file_offset: int, rights: int, fd: FdLike) -> None:
        """Have a part of a file mapped in the window; it is in place when this returns.

        Args:
            offset, length, file_offset: bytes, page multiples, inside the window.
            rights: 1 read, 2 write, or both.
            fd: borrowed.
        Raises: VfioUserError with the client's errno; MapChannelClosedError; LocalProtocolError for a range that does
            not fit the window; TransportError (EBUSY) when too many requests are unanswered, (ETOOMANYREFS).
        Cancellation: the client may have done it all the same.
        """
        await self.map_nowait(offset, length, file_offset, rights, fd).wait()

    async def unmap(self, offset: int, length: int) -> None:
        """Have a part of the window emptied; it is gone when this returns. Args, Raises: as `map`."""
        await self.unmap_nowait(offset, length).wait()

    async def doorbell(self, slot: int, fd: FdLike) -> None:
        """Give the client the eventfd of a slot. Args, Raises: as `map`."""
        await self.doorbell_nowait(slot, fd).wait()

    async def undoorbell(self, slot: int) -> None:
        """Take the eventfd of a slot away. Args, Raises: as `map`."""
        await self.undoorbell_nowait(slot).wait()

    def hello_nowait(self, page_size: int, window: int, inode: int = 0) -> PendingAnswer:
        """`hello`, to be waited for later. Raises: at once what `map` raises but for the client's answer."""
        return self._submit(Packet(type=PacketType.HELLO, offset=page_size, length=window, file_offset=inode), None)

    def map_nowait(self, offset: int, length: int, file_offset: int, rights: int, fd: FdLike) -> PendingAnswer:
        """`map`, to be waited for later; `fd` may be closed at once. Raises: as `hello_nowait`."""
        packet = Packet(type=PacketType.MAP, offset=offset, length=length, file_offset=file_offset, rights=rights)
        return self._submit(packet, fd)

    def unmap_nowait(self, offset: int, length: int) -> PendingAnswer:
        """`unmap`, to be waited for later. Raises: as `hello_nowait`."""
        return self._submit(Packet(type=PacketType.UNMAP, offset=offset, length=length), None)

    def doorbell_nowait(self, slot: int, fd: FdLike) -> PendingAnswer:
        """`doorbell`, to be waited for later; `fd` may be closed at once. Raises: as `hello_nowait`."""
        return self._submit(Packet(type=PacketType.DOORBELL, offset=slot), fd)

    def undoorbell_nowait(self, slot: int) -> PendingAnswer:
        """`undoorbell`, to be waited for later. Raises: as `hello_nowait`."""
        return self._submit(Packet(type=PacketType.UNDOORBELL, offset=slot), None)

    async def run(self) -> None:
        """Receive answers and watch over their time until the channel ends; `failure` then says why.

        Raises: nothing but cancellation. Cancellation: closes the channel.
        """
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch)
                nursery.start_soon(self._send_queued)
                await self._receive_answers()
                nursery.cancel_scope.cancel()
        finally:
            self.close()

    def close(self) -> None:
        """End the channel; everybody who waits gets MapChannelClosedError. Nothing happens the second time."""
        self._fail("it was closed", errno.ESHUTDOWN, quiet=True)

    def _submit(self, packet: Packet, fd: FdLike | None) -> PendingAnswer:
        if self._failure is not None:
            raise MapChannelClosedError(str(self._failure), self._failure.errno)
        if len(self._pending) >= self._max_outstanding:
            raise TransportError(f"{len(self._pending)} map channel requests are unanswered", errno.EBUSY)
        try:
            window = map_channel_wire.check_request(packet, 0 if fd is None else 1, self._window, to_agent=True)
        except MalformedMessageError as error:
            raise LocalProtocolError(str(error)) from error
        sequence = (self._sequence + 1) & _SEQUENCE_MASK
        self._send(packet.numbered(sequence), () if fd is None else (fd,))
        self._sequence = sequence
        self._window = window or self._window
        since_s = trio.current_time() if self.since_s is None else self.since_s
        pending = PendingAnswer(packet.type, sequence, since_s + self._timeout_s)
        self._pending.append(pending)
        self._something_pending.set()
        return pending

    def _send(self, data: bytes, fds: tuple[FdLike, ...]) -> None:
        if not self._unsent:
            try:
                send_some(self._sock, data, fds)
                return
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS:
                    raise TransportError(
                        "too many descriptors of this user are under way; raise RLIMIT_NOFILE (ulimit -n)",
                        errno.ETOOMANYREFS,
                    ) from error
                raise self._fail(
                    f"the client is gone: {error.strerror or error}", error.errno or errno.EPIPE
                ) from error
        self._unsent.append(_Unsent(data, [Fd.copy_of(fd) for fd in fds]))
        self._something_unsent.set()

    async def _send_queued(self) -> None:
        while self._failure is None:
            if not self._unsent:
                self._something_unsent = trio.Event()
                await self._something_unsent.wait()
            try:
                await trio.lowlevel.wait_writable(self._number)
                while self._unsent:
                    data, fds = self._unsent[0]
                    send_some(self._sock, data, fds)
                    close_all(fds)
                    self._unsent.popleft()
            except BlockingIOError:
                continue
            except trio.ClosedResourceError:
                return
            except OSError as error:
                self._fail(f"the client is gone: {error.strerror or error}", error.errno or errno.EPIPE)

    async def _receive_answers(self) -> None:
        while self._failure is None:
            try:
                await trio.lowlevel.wait_readable(self._number)
            except trio.ClosedResourceError:
                return
            # Several answers are often there at once; a client has no more than were asked for.
            for _ in range(len(self._pending) + 1):
                try:
                    received = recv_message(self._sock, self._inbox, 1)
                except BlockingIOError:
                    break
                except OSError as error:
                    self._fail(f"the client is gone: {error.strerror or error}", error.errno or errno.EPIPE)
                    return
                close_all(received.fds)
                if received.size == 0:
                    self._fail("the client closed it", errno.ECONNRESET)
                    return
                if not self._take(received.size, len(received.fds) + (received.problem is not None)):
                    return
                if not self._pending:
                    break

    def _take(self, size: int, fd_count: int) -> bool:
        try:
            if size != map_channel_wire.PACKET_SIZE or not self._pending:
                raise MalformedMessageError(f"{size} bytes that answer nothing", fatal=True)
            head = self._pending[0]
            status = map_channel_wire.parse_answer(self._inbox, fd_count, head.type, head.sequence)
        except MalformedMessageError as error:
            self._fail(f"the client sent garbage: {error}", errno.EPROTO)
            return False
        self._pending.popleft()._finish(status)
        return True

    async def _watch(self) -> None:
        while self._failure is None:
            if not self._pending:
                self._something_pending = trio.Event()
                await self._something_pending.wait()
                continue
            head = self._pending[0]
            await trio.sleep_until(head.deadline)
            if not head.done and trio.current_time() >= head.deadline:
                self._fail(
                    f"the client did not answer {PacketType(head.type).name} within {self._timeout_s:g} s",
                    errno.ETIMEDOUT,
                )

    def _fail(self, reason: str, number: int, *, quiet: bool = False) -> MapChannelClosedError:
        if self._failure is None:
            self._failure = MapChannelClosedError(f"the map channel is over: {reason}", number)
            if not quiet:
                logger.log(logging.DEBUG if number in GONE else logging.WARNING, "%s", self._failure)
            trio.lowlevel.notify_closing(self._number)
            self._sock.close()
            while self._unsent:
                close_all(self._unsent.popleft().fds)
            while self._pending:
                self._pending.popleft()._finish(0, self._failure)
            self._something_pending.set()
            self._something_unsent.set()
        return MapChannelClosedError(str(self._failure), self._failure.errno)


def offer_channel(
    capabilities: Mapping[str, Any], *, timeout_s: float = 10.0
) -> tuple[dict[str, Any], list[Fd], MapChannelServer] | None:
    """Grant the channel to a client that asks for it; for a handler's `version`.

    Returns: the capability and the descriptor for the VERSION reply, and this side's end, to be `run`, or
        closed, by the caller; None when the client did not ask.
    Raises: OSError when no socket pair can be made.
    """
    if not map_channel_wire.is_proposed(capabilities):
        return None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return map_channel_wire.client_capability(), [Fd(theirs.detach())], MapChannelServer(ours, timeout_s=timeout_s)

# SPDX-License-Identifier: Apache-2.0
"""Commands and their replies over one socket, for blocking callers in any number of threads.

Owns the client's socket, the commands under way and the error of a connection that is over. Interprets no payload.
Follows the vfio-user specification, "Header" and "Command Concurrency". The server may lie in every byte: a reply is
taken only by id and command, and a server that breaks the framing ends the connection for every caller at once.

How threads share it: sending takes a short lock of its own, so a posted command never waits for somebody's reply.
Of the threads that wait for replies one reads the socket, hands replies to their owners and serves the server's
requests; when it has its own reply it passes the reading on.
"""

from __future__ import annotations

import errno
import itertools
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, NoReturn

from ism.errors import DeviceGoneError, LocalProtocolError, RemoteProtocolError, TransportError
from ism.vfio_user import wire
from ism.vfio_user.errors import MalformedMessageError, VfioUserError, VfioUserTimeoutError
from ism.vfio_user.fds import Fd, PartialSendError, close_all, recv_message, send_message, send_some
from ism.vfio_user.wire import Command, FdLike, Message, MessageReader

_RECEIVE_BYTES: Final = 1 << 16
_NO_FDS: Final[tuple[FdLike, ...]] = ()


class _Call:
    __slots__ = ("command", "failed", "reply")

    def __init__(self, command: int) -> None:
        self.command = command
        self.reply: Message[Fd] | None = None
        self.failed = False

    def pending(self) -> bool:
        return self.reply is None and not self.failed


class RequestChannel:
    """One connection from the client's side.

    Args:
        sock: a connected UNIX stream socket; its ownership passes to the channel.
        name: how errors call the server.
        timeout_s: how long each call may take unless it says otherwise, seconds.
        max_message, max_fds: limits on what the server may send in one message.
        answer: called with each request of the server, in the thread that reads; returns the payload of the reply,
            or raises an error with an `errno` (VfioUserError, MalformedMessageError, OSError) for an error reply.

    Attributes: `peer_max_fds` (descriptors the server takes in one message; set once it is known).
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        name: str,
        timeout_s: float,
        max_message: int,
        max_fds: int,
        answer: Callable[[Message[Fd]], bytes],
    ) -> None:
        sock.setblocking(False)
        self._sock, self._name, self._timeout_s = sock, name, timeout_s
        self._max_fds, self._answer = max_fds, answer
        self.peer_max_fds = 0
        self._send_lock = threading.Lock()
        self._cond = threading.Condition(threading.Lock())
        self._reading = False
        self._waiters = 0
        self._calls: dict[int, _Call] = {}
        self._given_up: set[int] = set()
        self._ids = itertools.count(1)
        self._failure: Exception | None = None
        self._closed = False
        self._poller = select.poll()
        self._poller.register(sock, select.POLLIN)
        self._inbox = bytearray(_RECEIVE_BYTES)
        self._reader: MessageReader[Fd] = MessageReader(max_message=max_message, max_fds=max_fds)

    def fileno(self) -> int:
        """The socket; -1 when closed."""
        return self._sock.fileno()

    def send(self, data: bytes, fds: Sequence[FdLike] = _NO_FDS, *, timeout_s: float | None = None) -> None:
        """Send one whole message for which no reply is awaited here.

        Args:
            fds: borrowed.
            timeout_s: seconds; None = the channel's.
        Raises: DeviceGoneError, RemoteProtocolError (the connection is over), VfioUserTimeoutError, TransportError
            when the kernel takes no more descriptors of this user.
        """
        if timeout_s is None:
            timeout_s = self._timeout_s
        lock = self._send_lock
        if not lock.acquire(blocking=False) and not lock.acquire(timeout=timeout_s):
            raise VfioUserTimeoutError(f"{self._name} read nothing for {timeout_s:g} s")
        try:
            if self._failure is not None:
                self._raise_failure()
            try:
                sent = send_some(self._sock, data, fds)
            except BlockingIOError:
                sent = 0
            if sent != len(data):
                self._send_rest(data, sent, fds, timeout_s)
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                raise TransportError(
                    "too many descriptors of this user are under way; raise RLIMIT_NOFILE (ulimit -n)",
                    errno.ETOOMANYREFS,
                ) from error
            self._fail(self._gone(error))
            self._raise_failure()
        finally:
            lock.release()

    def _send_rest(self, data: bytes, sent: int, fds: Sequence[FdLike], timeout_s: float) -> None:
        try:
            send_message(self._sock, memoryview(data)[sent:], fds if sent == 0 else (), timeout_s=timeout_s)
        except DeviceGoneError as error:
            self._fail(error)
            raise
        except PartialSendError as error:
            if sent or error.sent:
                self._fail(DeviceGoneError(f"{self._name} stopped reading in the middle of a message"))
            raise

    def _gone(self, error: OSError) -> DeviceGoneError:
        return DeviceGoneError(f"the connection to {self._name} broke: {error.strerror or error}", error.errno or 0)

    # Requests and their replies

    def request(
        self,
        command: Command,
        payload: bytes,
        fds: Sequence[FdLike] = _NO_FDS,
        *,
        timeout_s: float | None = None,
    ) -> Message[Fd]:
        """Send a command and wait for its reply.

        Args:
            fds: borrowed, at most `peer_max_fds`.
            timeout_s: for all of it, seconds; None = the channel's.
        Returns: a positive reply; its descriptors, possible with VERSION and GET_REGION_INFO only, are the caller's.
        Raises: VfioUserError with the errno of an error reply; DescriptorLimitError; and as `send`;
            LocalProtocolError for too many descriptors.
        """
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        if len(fds) > self.peer_max_fds:
            raise LocalProtocolError(f"{len(fds)} descriptors in one message; {self._name} takes {self.peer_max_fds}")
        deadline = time.monotonic() + limit_s
        call = _Call(command)
        with self._cond:
            if self._failure is not None:
                self._raise_failure()
            id = self._free_id()
            self._calls[id] = call
        try:
            self.send(wire.encode(id, command, payload), fds, timeout_s=limit_s)
            reply = self._wait(call, deadline, limit_s)
        except BaseException:
            with self._cond:
                if self._calls.pop(id, None) is not None:
                    self._given_up.add(id)
            if call.reply is not None:
                close_all(call.reply.fds)
            raise
        if reply.problem is not None:
            raise reply.problem
        if reply.flags & wire.FLAG_ERROR:
            close_all(reply.fds)
            raise VfioUserError(reply.error or errno.EIO, f"refused by {self._name}", command=command.name)
        if reply.fds and command not in (Command.VERSION, Command.DEVICE_GET_REGION_INFO):
            close_all(reply.fds)
            raise RemoteProtocolError(f"{self._name} sent {len(reply.fds)} descriptors with its {command.name} reply")
        return reply

    def _free_id(self) -> int:
        for id in itertools.islice(self._ids, 1 << 16):
            if (id & 0xFFFF) not in self._calls and (id & 0xFFFF) not in self._given_up:
                return id & 0xFFFF
        raise LocalProtocolError(f"65536 requests to {self._name} are unanswered; close the connection")

    def _wait(self, call: _Call, deadline: float, limit_s: float) -> Message[Fd]:
        while call.pending():
            with self._cond:
                while self._reading and call.pending():
                    self._waiters += 1
                    try:
                        self._cond.wait(self._left(deadline, call, limit_s))
                    finally:
                        self._waiters -= 1
                if not call.pending():
                    break
                self._reading = True
            try:
                while call.pending():
                    self._receive(self._left(deadline, call, limit_s))
            except VfioUserTimeoutError:
                raise
            except (TransportError, RemoteProtocolError) as error:
                self._fail(error)
            finally:
                self._stop_reading()
        if call.reply is None:
            self._raise_failure()
        return call.reply

    def _left(self, deadline: float, call: _Call, limit_s: float) -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise VfioUserTimeoutError(
                f"{self._name} did not answer {wire.command_name(call.command)} within {limit_s:g} s"
            )
        return left

    def _stop_reading(self) -> None:
        with self._cond:
            self._reading = False
            if self._waiters:
                self._cond.notify_all()

    def _fail(self, error: Exception) -> None:
        with self._cond:
            if self._failure is None:
                self._failure = error
                try:
                    self._sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # the other side was faster
            for call in self._calls.values():
                call.failed = True
            self._calls.clear()
            self._cond.notify_all()

    def _raise_failure(self) -> NoReturn:
        error = self._failure
        assert error is not None
        # Several threads raise it: each gets an error of its own.
        if isinstance(error, TransportError):
            raise DeviceGoneError(str(error), error.errno) from error
        raise RemoteProtocolError(str(error)) from error

    # Receiving; only the thread that set `_reading` gets here

    def _receive(self, timeout_s: float) -> bool:
        if not self._poller.poll(timeout_s * 1000):
            return False
        try:
            received = recv_message(self._sock, self._inbox, self._max_fds)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._gone(error) from error
        if received.size == 0:
            raise DeviceGoneError(f"{self._name} closed the connection", errno.ECONNRESET)
        reader = self._reader
        with memoryview(self._inbox) as inbox:
            reader.feed(inbox[: received.size], received.fds, received.problem)
        while (message := reader.next_message()) is not None:
            if message.is_reply:
                self._take_reply(message)
            else:
                self._serve(message)
        return True

    def _take_reply(self, message: Message[Fd]) -> None:
        with self._cond:
            call = self._calls.pop(message.id, None)
            if call is None:
                close_all(message.fds)
                if message.id in self._given_up:
                    self._given_up.discard(message.id)
                    return
                if self._failure is not None:
                    return
                raise RemoteProtocolError(f"{self._name} answered a request that was never made (id {message.id})")
            if call.command != message.command:
                self._calls[message.id] = call
                close_all(message.fds)
                raise RemoteProtocolError(
                    f"{self._name} answered {wire.command_name(call.command)} with {wire.command_name(message.command)}"
                )
            call.reply = message
            if self._waiters:
                self._cond.notify_all()

    def _serve(self, message: Message[Fd]) -> None:
        surplus = bool(message.fds) or message.problem is not None
        close_all(message.fds)
        try:
            wire.check_command(message)
            if surplus:
                raise VfioUserError(errno.EINVAL, "a server's request carries no descriptors")
            answer = wire.encode_reply(message.id, message.command, self._answer(message))
        except (VfioUserError, MalformedMessageError, OSError) as error:
            answer = wire.encode_error(message.id, message.command, error.errno or errno.EIO)
        if message.wants_reply:
            try:
                self.send(answer)
            except VfioUserTimeoutError as error:
                raise DeviceGoneError(f"{self._name} does not read the answers to its DMA requests") from error

    def process(self) -> bool:
        """Serve what the server sent, without waiting; for when `fileno()` is readable and no call is under way.

        Returns: False when the connection is over. When another thread is reading, that one serves.
        Raises: RemoteProtocolError when the server broke the protocol.
        """
        with self._cond:
            if self._failure is not None:
                return False
            if self._reading:
                return True
            self._reading = True
        try:
            for _ in range(64):  # a server that never stops sending is come back to
                if not self._receive(0):
                    break
        except (TransportError, RemoteProtocolError) as error:
            self._fail(error)
            if isinstance(error, RemoteProtocolError):
                raise
            return False
        finally:
            self._stop_reading()
        return self._failure is None

    def close(self) -> None:
        """End the connection; every call under way fails at once. Nothing happens the second time."""
        with self._cond:
            if self._closed:
                return
            self._closed = True
        self._fail(DeviceGoneError(f"the connection to {self._name} was closed here"))
        deadline = time.monotonic() + self._timeout_s
        with self._cond:
            self._waiters += 1
            while self._reading and (left := deadline - time.monotonic()) > 0:
                self._cond.wait(left)
            self._waiters -= 1
            self._reading = True
        with self._send_lock:
            self._sock.close()
        close_all(self._reader.abandon())

# SPDX-License-Identifier: Apache-2.0
"""An SMC connection as threads use it: blocking calls with timeouts, and a TCP descriptor that mirrors readability.

Two ways to wait. *Direct*: the thread that waits sleeps on the region's eventfd itself. *Mirrored*, from the moment the
program asks for `fileno()` (for select, poll, epoll, an event loop): the driver's thread listens to the eventfd and
makes the TCP descriptor, which the program polls, readable whenever a receive would not wait, and only then; threads
that wait are told by a condition.

The mirror. Nothing travels over TCP after the handshake but one byte from each side, which stays unread. With
SO_RCVLOWAT 2 it does not make the socket readable, with 1 it does, and lowering the value wakes whoever polls
(tcp(7), socket(7)). So the descriptor is the same before, during and after the handshake, registrations made at any
time hold, and the end of TCP shows by itself. For writing the descriptor is always ready, whatever room there is: a
non-blocking send that finds no room waits `NONBLOCKING_WAIT_S` for some before it gives up, so that a loop around
select sleeps instead of burning a processor.

When both ends are in this process, the sender sees to the receiver's mirror itself, as the kernel does with TCP on
loopback: what was sent shows before the send returns. From another process it shows a moment later.

Order: readability is taken back first, then the reader is announced asleep, then the ring is looked at once more: so
either the look or the peer's doorbell sees new bytes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from ism.driver import Region
from ism.errors import DeviceGoneError, TransportError
from ism.shm.state import HELD
from ism.smc.connection import Connection, os_error
from ism.smc.lending import Loan, ReceiveLoan, SendLoan, check_turn, give_back, publish
from ism.smc.states import Outcome

NONBLOCKING_WAIT_S = 0.002
_PEEK_PAUSE_S = 0.0005
_STRAY_BYTES = 1 << 16
_URGENT_BYTES = 1 << 10
_FOREVER = float("inf")
_Buffer = Any

_mirrored_here: weakref.WeakValueDictionary[tuple[int, int], Channel] = weakref.WeakValueDictionary()
"""The mirrored channels of this process, by the device and token of the region they receive in."""


def would_block() -> BlockingIOError:
    """Return the error of a non-blocking call that would have to wait."""
    return BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def deadline_of(timeout_s: float | None) -> float:
    """Return when a call with this timeout gives up, on the clock of `time.monotonic`."""
    return _FOREVER if timeout_s is None else time.monotonic() + timeout_s


def left_ms(deadline_s: float) -> float | None:
    """Return the rest of the time for `poll`, None for ever. Raises TimeoutError when it is over."""
    if deadline_s == _FOREVER:
        return None
    left = deadline_s - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left * 1000


_BOTH_HERE, _LENT, _MIRRORED, _PEEKED = 8, 16, 32, 128
"""Why short sends or receives of a connection must not go past its channel, besides those of `ism.shm.state`."""


class _Sleeper:
    """Lets any number of threads sleep on one eventfd: one polls it, the others are told by that one."""

    def __init__(self, connection: Connection, tcp_fd: int, drained: Callable[[], None]) -> None:
        """Args: `drained`: called after the eventfd was reset: it may have been raised for others than threads."""
        self._connection, self._drained = connection, drained
        self._changed = threading.Condition(threading.Lock())
        self._poll = select.poll()
        self._poll.register(connection.fd, select.POLLIN)
        self._poll.register(tcp_fd, select.POLLRDHUP)
        self._tcp_fd = tcp_fd
        self.polling = False

    def move(self, tcp_fd: int) -> None:
        """Look for the end of TCP at another descriptor from now on."""
        self._poll.register(tcp_fd, select.POLLRDHUP)
        self._poll.unregister(self._tcp_fd)
        self._tcp_fd = tcp_fd

    def sleep(self, deadline_s: float, *, mirrored: Callable[[], bool], done: Callable[[], bool]) -> None:
        """Wait until something may have changed. Raises TimeoutError."""
        timeout = left_ms(deadline_s)
        with self._changed:
            if mirrored() or self.polling:
                if not done():
                    self._changed.wait(None if timeout is None else timeout / 1000)
                return
            self.polling = True
        try:
            self._poll.poll(timeout)
            if not self._connection.closed:
                self._connection.drain()
        finally:
            with self._changed:
                self.polling = False
                self._changed.notify_all()
            self._drained()

    def wake(self) -> None:
        """Have the threads that are told look again."""
        with self._changed:
            self._changed.notify_all()


class Channel:
    """Send and receive over one established connection, from any thread. Closing is the owner's.

    Attributes: `connection`; `raw` (the TCP socket); `peername` (of TCP, which may be gone when it is asked for).
    """

    def __init__(self, connection: Connection, raw: socket.SocketType, *, max_spin_ns: int, mirrored: bool) -> None:
        """Args: `raw`: the TCP socket, borrowed; `mirrored`: whether the program polls its descriptor already."""
        self.connection = connection
        self.peername: Any = None
        with contextlib.suppress(OSError):
            self.peername = raw.getpeername()
        self.raw = raw
        self._service = connection.rx.device.service
        self._sleeper = _Sleeper(connection, raw.fileno(), self._tell_room)
        self._reading, self._writing = threading.Lock(), threading.Lock()
        self._receive_loan: ReceiveLoan | None = None
        self._send_loan: SendLoan | None = None
        self._mirror = threading.RLock()
        self._lowat = 0
        self.mirrored = False
        self.ended = False
        self._want_room: list[Callable[[], None]] = []
        connection.endpoint.max_spin_ns = max_spin_ns
        if connection.peer.devid == connection.rx.device.devid:
            connection.endpoint.change_gates(tx_shut=_BOTH_HERE)  # what is sent may have to be shown in this process
        connection.on_peer_gone(self._on_end)
        self._set_lowat(2)
        if mirrored:
            self.start_mirror()

    def renew_locks(self) -> None:
        """Forget who held them: after a fork, in the child, where the connection is closed."""
        self._reading, self._writing, self._mirror = threading.Lock(), threading.Lock(), threading.RLock()
        self._receive_loan = self._send_loan = None
        self._sleeper = _Sleeper(self.connection, self.raw.fileno(), self._tell_room)
        self.ended = True

    # -- the mirror -------------------------------------------------------------------------------------------------

    def start_mirror(self) -> None:
        """Make the TCP descriptor show from now on whether a receive would wait."""
        with self._mirror:
            if self.mirrored or self.connection.closed:
                return
            self.mirrored = True
            self.connection.endpoint.change_gates(rx_shut=_MIRRORED)
            try:
                self._service.add(self.connection.fd, self._on_doorbell)
            except (DeviceGoneError, TransportError, OSError):
                self._set_lowat(1)  # nobody can watch: better too often than never
                return
            rx = self.connection.rx
            _mirrored_here[rx.device.devid, rx.token] = self
            self._refresh()

    def move(self, raw: socket.SocketType) -> None:
        """End the mirror, and know TCP by another descriptor from now on: the program's is given away."""
        with self._mirror:
            if self.mirrored:
                self.mirrored = False
                self.connection.endpoint.change_gates(rx_open=_MIRRORED)
                self._service.remove(self.connection.fd)
            self._sleeper.move(raw.fileno())
            self.raw = raw
        self._sleeper.wake()

    def stop(self) -> None:
        """End the mirror; the connection is about to be closed."""
        with self._mirror:
            if self.mirrored:
                self._service.remove(self.connection.fd)
        self.ended = True
        self._sleeper.wake()
        self._tell_room()

    def _on_doorbell(self) -> None:
        if self._sleeper.polling:
            return  # a thread that began to sleep before the mirror did: it drains, looks, and tells
        with self._mirror:
            if not self.mirrored:
                return  # ended by `move`: whoever waits from then on polls himself, and must not be robbed of it
            if not self.connection.closed:
                self.connection.drain()  # before anybody looks: what is rung after that is not swallowed
                self._refresh()
        self._tell_room()
        self._sleeper.wake()

    def _on_end(self) -> None:
        if self.mirrored:
            self._set_lowat(1)
        self._sleeper.wake()
        self._tell_room()

    def _refresh(self) -> None:
        """Make the descriptor readable if a receive would not wait; else have the peer ring when it would not."""
        with self._mirror:
            if self.connection.closed:
                return
            if not self.connection.readable():
                self._set_lowat(2)
                if self.connection.must_wait_to_read():
                    return
                if not self.connection.readable():
                    # it may not sleep: neither the peer nor the device can ring any more
                    self._set_lowat(1)
                    return
            self._set_lowat(1)

    def _tell_peer_here(self) -> None:
        """Have what was sent show at the peer's descriptor, if that is this process's too."""
        connection = self.connection
        device, tx = connection.rx.device, connection.tx
        if connection.peer.devid == device.devid and isinstance(tx, Region):
            peer = _mirrored_here.get((device.devid, tx.token))
            if peer is not None and peer._lowat != 1 and peer.connection.rx.device is device:
                peer._refresh()

    def _set_lowat(self, count: int) -> None:
        if count != self._lowat:
            self._lowat = count
            with contextlib.suppress(OSError):
                self.raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)

    # -- receiving --------------------------------------------------------------------------------------------------

    def _turn_to_receive(self, timeout_s: float | None) -> _Held:
        return _Held(self._reading, lambda: self._receive_loan, timeout_s)

    def _turn_to_send(self, timeout_s: float | None) -> _Held:
        return _Held(self._writing, lambda: self._send_loan, timeout_s)

    def recv(self, max_bytes: int, timeout_s: float | None) -> bytes:
        """Receive 1 to `max_bytes` bytes; b"" at the end. Raises OSError: as TCP."""
        with self._turn_to_receive(timeout_s):
            data = self.connection.recv(max_bytes, timeout_s != 0.0)
            if data is None:
                data = self._wait_for(lambda: self.connection.recv(max_bytes), timeout_s)
            if self.mirrored:
                self._refresh()
            return data

    def recv_into(self, buffer: _Buffer, timeout_s: float | None) -> int:
        """Receive into a writable buffer of at least one byte; 0 at the end. Raises OSError: as TCP."""
        with self._turn_to_receive(timeout_s):
            count = self.connection.recv_into(buffer, timeout_s != 0.0)
            if count is None:
                count = self._wait_for(lambda: self.connection.recv_into(buffer), timeout_s)
            if self.mirrored:
                self._refresh()
            return count

    def peek(self, max_bytes: int, timeout_s: float | None, *, all_of_it: bool = False) -> bytes:
        """Copy up to `max_bytes` that stay to be received; with `all_of_it` so many, or what there is at the end."""

        def look() -> bytes | None:
            data = self.connection.peek(max_bytes)
            if all_of_it and data and len(data) < max_bytes and not self._nothing_comes(len(data)):
                return None
            return data

        gates = self.connection.endpoint
        with self._turn_to_receive(timeout_s):
            gates.change_gates(rx_shut=_PEEKED)  # else the peer may write over what is looked at
            try:
                data = look()
                return self._wait_for(look, timeout_s) if data is None else data
            finally:
                gates.change_gates(rx_open=_PEEKED)

    def lend_unread(self, max_bytes: int, timeout_s: float | None) -> ReceiveLoan:
        """Lend bytes where they lie; empty at the end. Raises OSError: as a receive; BufferError."""
        held = self._turn_to_receive(timeout_s)
        try:
            self.connection.endpoint.change_gates(rx_shut=_LENT)  # before the look: what it shows is nobody else's
            view = self.connection.lend_unread(max_bytes, timeout_s != 0.0)
            if view is None:
                view = self._wait_for(lambda: self.connection.lend_unread(max_bytes), timeout_s)
            made = ReceiveLoan(view, self._give_back, check_open=self._check_open, lock=self._reading)
            self._receive_loan = made
        except BaseException:
            self.connection.endpoint.change_gates(rx_open=_LENT)
            held.release()
            raise
        return made

    def _give_back(self, count: int) -> None:
        self._receive_loan = None
        give_back(self.connection, count)
        self.connection.endpoint.change_gates(rx_open=_LENT)
        if self.mirrored:
            self._refresh()

    def _check_open(self) -> None:
        if self.connection.closed:
            raise os_error(Outcome.EBADF)

    @property
    def lent(self) -> bool:
        """Whether the program has memory of either direction lent."""
        return self._receive_loan is not None or self._send_loan is not None

    def _nothing_comes(self, beyond: int) -> bool:
        """Whether no more than so many bytes will ever be there: the ring holds no more, or the peer has finished."""
        endpoint = self.connection.endpoint
        return beyond >= endpoint.rx_ring_bytes or (
            bool(endpoint.peer_flags()) and endpoint.all_readable_bytes() == beyond
        )

    def _drop_stray(self) -> None:
        """Drop what has come over TCP besides the ballast: it would make the descriptor readable for ever.

        A little is urgent data, or a hostile peer's. More was sent past the peer's socket and is lost: an error.
        """
        there = 0
        with contextlib.suppress(OSError):
            there = len(self.raw.recv(_STRAY_BYTES, socket.MSG_DONTWAIT | socket.MSG_PEEK))
            if there > 1:
                self.raw.recv(there - 1, socket.MSG_DONTWAIT)
        if there > _URGENT_BYTES:
            self.connection.fail()

    def _wait_for(self, attempt: Callable[[], Any], timeout_s: float | None) -> Any:
        if self.mirrored:
            self._drop_stray()  # nothing is there: was it that which woke whoever polls?
        if timeout_s == 0.0:
            if self.mirrored:
                self._refresh()
                if self._lowat == 1 and (result := attempt()) is not None:
                    return result
            raise would_block()
        deadline = deadline_of(timeout_s)
        connection = self.connection
        while True:
            if connection.must_wait_to_read():
                try:
                    self._sleeper.sleep(deadline, mirrored=self._is_mirrored, done=connection.readable)
                finally:
                    connection.awake(writer=False)
                    if self.mirrored:
                        self._refresh()
            elif (result := attempt()) is None:
                left_ms(deadline)
                time.sleep(_PEEK_PAUSE_S)  # for more than is there to peek at nobody can be made to ring
                continue
            else:
                return result
            result = attempt()
            if result is not None:
                return result

    def _is_mirrored(self) -> bool:
        return self.mirrored

    # -- sending ----------------------------------------------------------------------------------------------------

    def send(self, data: _Buffer, timeout_s: float | None) -> int:
        """Send some of `data`, without a timeout all of it. Returns bytes sent. Raises OSError: as TCP."""
        with self._turn_to_send(timeout_s):
            sent = self.connection.send(data)
            if _mirrored_here:
                self._tell_peer_here()
            size = len(data) if type(data) is bytes else memoryview(data).nbytes
            if sent == size:
                return sent
            if sent and timeout_s is not None:
                self.connection.endpoint.change_gates(tx_open=HELD)
                return sent
            return self._send_rest(data, sent, timeout_s, everything=timeout_s is None)

    def send_all(self, data: _Buffer, timeout_s: float | None) -> None:
        """Send all of `data`. Raises OSError: as TCP; then nobody knows how much was sent."""
        with self._turn_to_send(timeout_s):
            sent = self.connection.send(data)
            if _mirrored_here:
                self._tell_peer_here()
            if sent != (len(data) if type(data) is bytes else memoryview(data).nbytes):
                self._send_rest(data, sent, timeout_s, everything=True)

    def _send_rest(self, data: _Buffer, sent: int, timeout_s: float | None, *, everything: bool) -> int:
        try:
            return self._send_in_pieces(data, sent, timeout_s, everything=everything)
        finally:
            self.connection.endpoint.change_gates(tx_open=HELD)  # other threads' bytes did not come in between

    def _send_in_pieces(self, data: _Buffer, sent: int, timeout_s: float | None, *, everything: bool) -> int:
        view = memoryview(data).cast("B")
        deadline = deadline_of(NONBLOCKING_WAIT_S if timeout_s == 0.0 else timeout_s)
        while sent < len(view):
            self._sleep_for_room(deadline, timeout_s)
            taken = self.connection.send(view[sent:])
            sent += taken
            if _mirrored_here:
                self._tell_peer_here()
            if taken and not everything:
                break
            if not taken:
                _check_time(deadline, timeout_s)
        return sent

    def _sleep_for_room(self, deadline: float, timeout_s: float | None) -> None:
        """Wait until there may be room. Raises OSError: the time is over."""
        connection = self.connection
        try:
            if connection.must_wait_to_write():
                try:
                    self._sleeper.sleep(deadline, mirrored=self._is_mirrored, done=self._may_write)
                finally:
                    connection.awake(writer=True)
        except TimeoutError:
            if timeout_s == 0.0:
                raise would_block() from None
            raise

    def lend_room(self, size: int, timeout_s: float | None) -> SendLoan:
        """Lend room for up to `size` bytes in the peer's ring. Raises OSError: as a send; BufferError."""
        held = self._turn_to_send(timeout_s)
        try:
            view = self.connection.lend_room(size)
            if not view:
                deadline = deadline_of(NONBLOCKING_WAIT_S if timeout_s == 0.0 else timeout_s)
                while not view:
                    self._sleep_for_room(deadline, timeout_s)
                    view = self.connection.lend_room(size)
                    if not view:
                        _check_time(deadline, timeout_s)
            made = self._send_loan = SendLoan(view, self._publish, check_open=self._check_open, lock=self._writing)
            self.connection.endpoint.change_gates(tx_shut=_LENT)
        except BaseException:
            held.release()
            raise
        return made

    def _publish(self, count: int) -> None:
        self._send_loan = None
        self.connection.endpoint.change_gates(tx_open=_LENT)
        publish(self.connection, count)
        if count and _mirrored_here:
            self._tell_peer_here()

    def send_now(self, data: _Buffer) -> int:
        """Send what fits of `data`, without waiting. Returns bytes sent, 0 for none. Raises OSError: as TCP."""
        with self._turn_to_send(0.0):
            sent = self.connection.send(data)
            self.connection.endpoint.change_gates(tx_open=HELD)
            if _mirrored_here:
                self._tell_peer_here()
            return sent

    def on_room(self, wake: Callable[[], None]) -> bool:
        """Have `wake` called once, from any thread, when a send may find room, or fail; needs the mirror.

        Returns: False: it need not be waited for. Take it back by `forget_room`, also after it was called.
        """
        with self._mirror:
            if not self.mirrored or self.ended or not self.connection.must_wait_to_write():
                return False
            self._want_room.append(wake)
            return True

    def forget_room(self, wake: Callable[[], None]) -> None:
        """Take back `on_room`, for which it returned True."""
        with self._mirror:
            if wake in self._want_room:
                self._want_room.remove(wake)
            if not self._want_room:
                self.connection.awake(writer=True)

    def _tell_room(self) -> None:
        with self._mirror:
            wakes, self._want_room = self._want_room, []
        for wake in wakes:
            wake()

    def _may_write(self) -> bool:
        try:
            return self.connection.writable()
        except OSError:
            return True

    # -- the end ----------------------------------------------------------------------------------------------------

    def shutdown(self, how: int) -> None:
        """As `socket.shutdown`, but for what TCP itself checks. Raises OSError (EBADF, ENOTCONN)."""
        if how in (socket.SHUT_WR, socket.SHUT_RDWR):
            self.connection.shutdown_write()
            if _mirrored_here:
                self._tell_peer_here()
        if how in (socket.SHUT_RD, socket.SHUT_RDWR):
            self.connection.shutdown_read()
            if self.mirrored:
                self._refresh()
        self._sleeper.wake()


def _check_time(deadline: float, timeout_s: float | None) -> None:
    """Raise what a call raises whose time is over, if it is. A non-blocking call has a deadline too."""
    if deadline != _FOREVER and time.monotonic() > deadline:
        if timeout_s == 0.0:
            raise would_block()
        raise TimeoutError("timed out")


def wait_for_turn(lock: threading.Lock, loan: Loan | None, timeout_s: float | None) -> None:
    """Acquire the lock of a direction that another thread uses, or has a loan of, within the timeout.

    Raises OSError: as TCP; EDEADLK when this thread has the loan.
    """
    check_turn(loan)
    if timeout_s == 0.0:
        raise would_block()
    if not lock.acquire(timeout=-1 if timeout_s is None else timeout_s):
        raise TimeoutError("timed out")


class _Held:
    """One thread at a time in one direction; whoever comes second waits within its timeout. A pinned loan is ended."""

    __slots__ = ("release",)

    def __init__(self, lock: threading.Lock, loan: Callable[[], Loan | None], timeout_s: float | None) -> None:
        """Args: `loan`: returns the loan of the direction. Raises OSError: as TCP; BufferError."""
        if not lock.acquire(blocking=False):
            wait_for_turn(lock, loan(), timeout_s)
        self.release = lock.release
        left = loan()
        if left is not None:
            try:
                left.settle()
            except BaseException:
                lock.release()
                raise

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.release()

# SPDX-License-Identifier: Apache-2.0
"""One established connection, without an event loop: rings, state machine, regions, and the watch on TCP.

Calls never block (beyond the ring's bounded spin); they raise OSError with the errno that a TCP socket would give.
Whoever waits parks (`must_wait_to_read`, `must_wait_to_write`), sleeps until `fileno()` is readable, calls `awake` and
tries again. Two sleepers, one reading and one writing, share the descriptor: one waits on it, and wakes the other.

How the end is noticed. The peer publishes DONE_WRITING, CLOSED or ABNORMAL_CLOSE in this side's region before it lets
go; a peer that dies cannot, but its kernel closes the TCP connection underneath, and its device detaches. The driver's
service thread watches both and makes the descriptor readable. `peer_gone` is looked at before the flags, the flags
before the producer cursor: so nothing is reported before the bytes and flags that came before it.

How it is let go. The driver and the service thread hold a connection weakly: one that is dropped without `close` is
closed all the same, from a thread of its own, since a destructor may run anywhere, also inside the driver's locks.
After a fork the connection stays the parent's; the child's copy is dead and touches nothing that is shared.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import errno
import os
import select
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from ism.driver import Region
from ism.driver.events import Event
from ism.errors import IsmError, LocalProtocolError, ProtocolError, RemoteProtocolError
from ism.eventfd import drain
from ism.memory import PAGE_SIZE, Mapping
from ism.shm import HEADER_BYTES, Endpoint, RxState
from ism.shm.header import FLAGS
from ism.smc.handshake_machine import PeerAnswer
from ism.smc.states import ConnectionStates, Outcome, State, Step
from ism.virtio.ism_spec import EventType

_live: weakref.WeakSet[Connection] = weakref.WeakSet()


def os_error(outcome: Outcome) -> OSError:
    """Return the OSError (BrokenPipeError, ConnectionResetError, ...) for an outcome named after its errno."""
    code = getattr(errno, outcome.value)
    return OSError(code, os.strerror(code))


class HasFileno(Protocol):
    """A socket."""

    def fileno(self) -> int:
        """Descriptor, -1 when closed."""


class Nowhere:
    """Stands for the region of a peer that has let it go before it could be attached: memory that nobody reads."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._mapping = Mapping(HEADER_BYTES + PAGE_SIZE)
        self.address, self.length = self._mapping.address, self._mapping.length

    def ring(self) -> None:
        """Nobody is there to wake."""

    def close(self) -> None:
        """Nothing is held."""


class _Doorbell:
    """Rings the peer. A failure is kept: what was to be announced has happened, and must not be lost for it."""

    __slots__ = ("_tx", "lost")

    def __init__(self, tx: Region | Nowhere) -> None:
        self._tx = tx
        self.lost: Exception | None = None

    def __call__(self) -> None:
        try:
            self._tx.ring()
        except (IsmError, OSError) as exc:
            self.lost = exc


class Connection:
    """A connection over two regions. Not thread-safe beyond one sender and one receiver, and `close` from anywhere.

    Attributes: `peer` (what the peer said of itself), `endpoint` (for zero-copy use), `rx`, `tx` (regions), `fd`
    (see `fileno`).
    """

    def __init__(self, tcp: HasFileno, rx: Region, tx: Region | Nowhere, peer: PeerAnswer) -> None:
        """Take over both regions; the TCP socket stays the caller's, who closes it after `close`.

        Args: `tx`: `Nowhere` when the region that the peer named does not exist (any more), as when it sent, and closed
            or died, before this side came to attach it: what it sent is received as ever, and then its end.
        Raises: ValueError (a region too small for a ring), StaleRegionError; then the regions stay the caller's.
        """
        self.peer, self.rx, self.tx = peer, rx, tx
        self._tcp, self._tcp_fd = tcp, tcp.fileno()
        self._service = rx.device.service
        self._pid = os.getpid()
        self._peer_gone = isinstance(tx, Nowhere)
        self._started = False
        self._end_lock = threading.Lock()  # held by the service thread, so never while waiting for the device
        self._state_lock = threading.RLock()
        self._states = ConnectionStates()
        self._send_outcome = self._receive_outcome = Outcome.ENOTCONN
        self.fd = rx.fileno()
        self._doorbell = _Doorbell(tx)
        self._device_lost = False
        self._local_wake: Callable[[], None] | None = None
        self.endpoint = Endpoint(rx, tx, doorbell=self._doorbell)
        self._flags_word = rx.view[FLAGS : FLAGS + 4].cast("I")
        self._flags_seen = 0
        self._closed = False

    def start(self) -> None:
        """Enter the established state and begin to watch for the peer's end.

        Raises: OSError (EBADF: the socket was closed), DeviceGoneError.
        """
        self.rx.device.check_usable()
        if self._tcp.fileno() != self._tcp_fd or self._tcp_fd < 0:
            raise os_error(Outcome.EBADF)
        self._service.add(self._tcp_fd, _weak(self._on_tcp, keep=self._tcp))
        self._started = True
        self.rx.on_event(_weak(self._on_event))
        self._take(self._states.established())
        _live.add(self)

    # -- service thread -----------------------------------------------------------------------------------------

    def _on_tcp(self) -> None:
        """Nothing is ever sent over TCP after the handshake: whatever comes is the end of the peer."""
        with self._end_lock:
            if self._closed or not _readable(self._tcp_fd):
                return  # what woke us was about an earlier socket of the same number
            self._service.remove(self._tcp_fd)
            self._note_gone()

    def _on_event(self, event: Event) -> None:
        if event.kind == EventType.DETACH and event.devid == self.peer.devid:
            self._note_gone()

    def _note_gone(self) -> None:
        self._peer_gone = True
        self.rx.wake()
        wake = self._local_wake
        if wake is not None:
            wake()

    def on_peer_gone(self, wake: Callable[[], None]) -> None:
        """Call `wake` from the driver's thread when the peer is gone.

        `fileno()` becomes readable too, but the peer has a copy of that eventfd: a hostile one can empty it at once,
        and pass it on before it dies. Who must not sleep through the end is woken this way.
        """
        self._local_wake = wake
        if self._peer_gone:
            wake()

    # -- state --------------------------------------------------------------------------------------------------

    def _take(self, step: Step) -> Step:
        self._send_outcome, self._receive_outcome = step.send, step.receive
        return step

    def _look(self) -> None:
        """Bring the state up to date with the peer's flags, then with its disappearance."""
        with self._state_lock:
            gone = self._peer_gone
            flags = self.endpoint.peer_flags()
            if flags != self._flags_seen:
                self._flags_seen = flags
                self._publish(self._take(self._states.receive_flags(flags)))
            if gone:
                self._publish(self._take(self._states.peer_gone()))

    def _raise(self, outcome: Outcome) -> None:
        with self._state_lock:
            if self._states.state in (State.PROCESSABORT, State.PEERABORTWAIT):
                self._take(self._states.error_reported())
        raise os_error(outcome)

    def _fail(self) -> None:
        """This side cannot go on: abort, and tell the peer."""
        with self._state_lock:
            self._publish(self._take(self._states.fail()))

    def _refuse(self, problem: ProtocolError) -> NoReturn:
        """Raise what the application is told when the endpoint raised `problem`: closed here, or the peer lies."""
        if self._closed:
            raise os_error(Outcome.EBADF) from None  # another thread closed; what the endpoint saw then means nothing
        if isinstance(problem, LocalProtocolError):
            raise problem
        self._fail()
        raise os_error(Outcome.ECONNABORTED) from problem

    def _publish(self, step: Step) -> None:
        if step.publish:
            try:
                self.endpoint.set_flags(step.publish)
            except IsmError:
                pass  # closed meanwhile

    @property
    def closed(self) -> bool:
        """Whether this side has closed."""
        return self._closed

    # -- data ---------------------------------------------------------------------------------------------------

    def send(self, data: Any) -> int:
        """Copy what fits of `data` to the peer.

        Returns: bytes taken; 0 when the ring is full.
        Raises: OSError (EPIPE, ECONNRESET, ECONNABORTED, EBADF), TypeError.
        """
        if self._flags_word[0] != self._flags_seen or self._peer_gone or self._send_outcome is not Outcome.GOES:
            self._check_sendable()
        try:
            return self.endpoint.send(data)
        except ProtocolError as exc:
            self._refuse(exc)

    def writable(self) -> bool:
        """Whether a send would take bytes, or fail, at once. Raises OSError as `send`."""
        self._check_sendable()
        try:
            return self.endpoint.writable_bytes() > 0
        except ProtocolError as exc:
            self._refuse(exc)

    def _check_sendable(self) -> None:
        if not self._closed:
            try:
                self._look()
            except ProtocolError as exc:
                self._refuse(exc)
        if self._send_outcome is not Outcome.GOES:
            self._raise(self._send_outcome)

    def recv(self, max_bytes: int) -> bytes | None:
        """Copy out up to `max_bytes` (1 or more).

        Returns: bytes; b"" at the end of the stream; None when nothing is there yet.
        Raises: OSError (ECONNRESET, ECONNABORTED, EBADF), once all bytes that came before were read.
        """
        if self._closed:
            raise os_error(Outcome.EBADF)
        try:
            while True:
                data = self.endpoint.recv(max_bytes)
                if data is not None:
                    if self._closed:  # by another thread: the bytes may be those of the pages put in place
                        raise os_error(Outcome.EBADF)
                    return data
                self._look()
                outcome = self._receive_outcome  # before the ring: a sender's thread may learn of the end meanwhile
                if self.endpoint.rx_state() != RxState.DATA:
                    break
        except ProtocolError as exc:
            self._refuse(exc)
        if outcome is Outcome.GOES:
            return None
        if outcome is not Outcome.EOF:
            self._raise(outcome)
        return b""

    def shutdown_write(self) -> None:
        """Tell the peer that no more bytes come. Raises OSError (EBADF, ENOTCONN)."""
        with self._state_lock:
            if self._closed:
                raise os_error(Outcome.EBADF)
            self._publish(self._take(self._states.shutdown_wr()))

    # -- waiting ------------------------------------------------------------------------------------------------

    def must_wait_to_read(self) -> bool:
        """Announce that the reader sleeps. True: wait for `fileno()`, then call `awake`. False: try again at once."""
        return self._park(self.endpoint.park_reader, self.endpoint.unpark_reader)

    def must_wait_to_write(self) -> bool:
        """Announce that the writer sleeps; as `must_wait_to_read`."""
        return self._park(self.endpoint.park_writer, self.endpoint.unpark_writer)

    def _park(self, park: Any, unpark: Any) -> bool:
        try:
            if not park():
                return False
        except RemoteProtocolError:
            return False  # the next send or recv reports it
        if not self._device_lost and self.rx.device.gone is not None:
            self._device_lost = True
            self._doorbell()  # does it go to the peer directly, or did it need the device?
        if self._doorbell.lost is not None:
            self._fail()  # neither side can wake the other any more: so none may sleep
        elif not self._peer_gone:
            return True
        unpark()
        return False

    def awake(self, *, writer: bool) -> None:
        """Announce that the reader (or the writer) is awake again."""
        if not self._closed:
            try:
                if writer:
                    self.endpoint.unpark_writer()
                else:
                    self.endpoint.unpark_reader()
            except RemoteProtocolError:
                pass  # the next send or recv reports it

    def drain(self) -> None:
        """Reset `fileno()`; call it after waking and before looking at the rings again."""
        drain(self.fd)

    def fileno(self) -> int:
        """Descriptor that becomes readable when the peer may have done something. Owned by the region."""
        return self.fd

    # -- the end ------------------------------------------------------------------------------------------------

    def close(self, *, abort: bool = False) -> None:
        """Close at once: the peer reads what was sent. With unread bytes, or `abort`, it gets a reset. Idempotent."""
        if self._pid != os.getpid():
            self._closed = True  # a copy made by fork: epoll set, rings and regions are the parent's
            return
        with self._state_lock:
            if self._closed:
                return
            if not abort and self._started:
                try:
                    abort = self.endpoint.readable_bytes() > 0
                except RemoteProtocolError:
                    abort = True
                except LocalProtocolError:
                    pass  # a receive is under way in another thread: what there is, is its
            self._publish(self._take(self._states.close(abort=abort)))
            with self._end_lock:
                self._closed = True
                if self._started:
                    self._service.remove(self._tcp_fd)
        _live.discard(self)
        if self._started:
            self.rx.on_event(None)
        self._flags_word = memoryview(bytes(4)).cast("I")
        self._local_wake = None
        self.endpoint.close()
        self.tx.close()
        self.rx.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and self._pid == os.getpid():
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=1)
            _thread.start_new_thread(self.close, ())


def _readable(fd: int) -> bool:
    """Whether a read of the descriptor would give bytes, the end or an error at once."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _weak(method: Callable[..., None], keep: object = None) -> Callable[..., None]:
    """Return a callable that calls the bound method for as long as its object lives.

    It keeps `keep` alive: so the garbage collector does not close TCP before a forgotten connection said its end.
    """
    reference = weakref.WeakMethod(method)

    def call(*arguments: object, _keep: object = keep) -> None:
        alive = reference()
        if alive is not None:
            alive(*arguments)

    return call


@atexit.register
def _close_all() -> None:
    """A program that ends without closing ends its connections as TCP's would: the peer reads everything, then EOF."""
    for connection in list(_live):
        with contextlib.suppress(Exception):  # one that fails is no reason to forget the others
            connection.close()


os.register_at_fork(after_in_child=_live.clear)

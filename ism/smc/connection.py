# SPDX-License-Identifier: Apache-2.0
"""One established connection, without an event loop: rings, state machine, regions, and the watch on TCP.

Calls never block (beyond the ring's bounded spin); they raise OSError with the errno that a TCP socket would give.
Whoever waits parks (`must_wait_to_read`, `must_wait_to_write`), sleeps until `fileno()` is readable, calls `awake` and
tries again. Two sleepers, one reading and one writing, share the descriptor: one waits on it, and wakes the other.

How the end is noticed. The peer publishes DONE_WRITING, CLOSED or ABNORMAL_CLOSE in this side's region before it lets
go; a peer that dies cannot, but its kernel closes the TCP connection underneath, and its device detaches. The driver's
service thread watches both and makes the descriptor readable. `peer_gone` is looked at before the flags, the flags
before the producer cursor: so nothing is reported before the bytes and flags that came before it. Only the end of the
TCP connection counts: bytes on it after the handshake (the ballast byte of each side, urgent data) are no business of
this module.

How it is let go. With a clean close both regions go to the link group (`group`), for the next connection with the same
peer. The driver and the service thread hold a connection weakly: one that is dropped without `close` is
closed all the same, from a thread of its own, since a destructor may run anywhere, also inside the driver's locks.
After a fork the connection stays the parent's; the child's copy is dead and touches nothing that is shared.

The file is long because data, state and end share their locks and what they know of the peer. What could be told apart
is elsewhere: rings (`ism.shm`), states (`states`), larger buffers (`tuning`), loans (`lending`).
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
from ism.errors import DeviceGoneError, IsmError, LocalProtocolError, ProtocolError, RemoteProtocolError
from ism.eventfd import drain
from ism.memory import PAGE_SIZE, Mapping
from ism.shm import HEADER_BYTES, Endpoint, RxState, offer
from ism.shm.endpoint import QUICK
from ism.shm.header import FLAGS, Flags
from ism.shm.kernels import load_kernels
from ism.shm.state import FAILED_LOOK, GATED, NOT_SENDING, PEER_GONE, SPIN
from ism.smc.group import Address, link_groups
from ism.smc.handshake_machine import PeerAnswer
from ism.smc.states import ConnectionStates, Outcome, State, Step
from ism.smc.tuning import Tuner
from ism.virtio.ism_spec import EventType

_SPIN_GATED = SPIN | GATED
_PARENTS = 64
"""Why a gate is shut; the other reasons are in `ism.smc.channel` and `ism.shm.state`."""
_REATTACH_S = 0.05
"""How long after a DETACH the peer's ATTACH may come: the device has sent both by the time a connection begins."""

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
    (see `fileno`), `client_side` (this side has connected), `client_address` (of the client, when the manager has said
    that it is the peer's), `closed_first` (this side has closed in good order, before the peer did),
    `unread_lent`, `room_lent` (a view that `lend_unread` or `lend_room` gave may be in use; cleared by whoever has it).
    """

    def __init__(
        self,
        tcp: HasFileno,
        rx: Region,
        tx: Region | Nowhere,
        peer: PeerAnswer,
        *,
        client_side: bool = False,
        buffer_limit: int = 0,
    ) -> None:
        """Take over both regions; the TCP socket stays the caller's, who closes it after `close`.

        Args: `tx`: `Nowhere` when the region that the peer named does not exist (any more), as when it sent, and closed
            or died, before this side came to attach it: what it sent is received as ever, and then its end.
            `buffer_limit`: bytes up to which the ring that is received in may grow, 0: not at all.
        Raises: ValueError (a region too small for a ring), StaleRegionError; then the regions stay the caller's.
        """
        self.peer, self.rx, self.tx, self.client_side = peer, rx, tx, client_side
        self.client_address: Address | None = None
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
        self.endpoint = endpoint = Endpoint(rx, tx, doorbell=self._doorbell)
        endpoint.change_gates(tx_shut=NOT_SENDING | (PEER_GONE if self._peer_gone else 0))
        self._quick_send, self._quick_recv, self._quick_recv_into = (
            endpoint.quick_send,
            endpoint.quick_recv,
            endpoint.quick_recv_into,
        )
        self._rx_owed = endpoint.owed
        self._tuner = Tuner(self.endpoint, rx.device, peer.devid, buffer_limit)
        self._flags_word = rx.view[FLAGS : FLAGS + 4].cast("I")
        self._flags_seen = 0
        self._outcome_seen = Outcome.GOES
        self._closed = False
        self._spoilt = self._was_reset = self._detached = False
        self._read_ended = self._write_ended = False
        self.closed_first = self.unread_lent = self.room_lent = False

    def start(self) -> None:
        """Enter the established state and begin to watch for the peer's end.

        Raises: OSError (EBADF: the socket was closed), DeviceGoneError.
        """
        # not whether the device is gone: the peer counts on the connection by now, and regions work without it
        if self._tcp.fileno() != self._tcp_fd or self._tcp_fd < 0:
            raise os_error(Outcome.EBADF)
        self._service.add(self._tcp_fd, _weak(self._on_tcp, keep=self._tcp), hangup_only=True)
        self._started = True
        self.rx.on_event(_weak(self._on_event))
        self._take(self._states.established())
        _live.add(self)

    def move(self, tcp: HasFileno) -> None:
        """Watch the TCP connection by another descriptor from now on. Raises OSError, DeviceGoneError."""
        with self._state_lock, self._end_lock:
            if self._closed or not self._started:
                raise os_error(Outcome.EBADF)
            with contextlib.suppress(DeviceGoneError):  # nobody watches then, as before
                self._service.add(tcp.fileno(), _weak(self._on_tcp, keep=tcp), hangup_only=True)
            self._service.remove(self._tcp_fd)
            self._tcp, self._tcp_fd = tcp, tcp.fileno()

    # -- service thread -----------------------------------------------------------------------------------------

    def _on_tcp(self) -> None:
        """The TCP connection ended, or was reset: the end of the peer."""
        with self._end_lock:
            if self._closed or not hung_up(self._tcp_fd):
                return  # what woke us was about an earlier socket of the same number
            self._service.remove(self._tcp_fd)
        self._note_gone()  # whoever is told takes locks of its own

    def _on_event(self, event: Event) -> None:
        if event.devid != self.peer.devid:
            return
        if event.kind == EventType.ATTACH:
            self._detached = False
        elif event.kind == EventType.DETACH:
            # it may be of an earlier connection over this region: then the ATTACH for this one is on its way
            self._detached = True
            later = threading.Timer(_REATTACH_S, _weak(self._note_detached))
            later.daemon = True
            try:
                later.start()
            except RuntimeError:
                self._note_detached()

    def _note_detached(self) -> None:
        if self._detached and not self._closed:
            self._spoilt = True  # nobody is left to share the region with
            self._note_gone()

    def _note_gone(self) -> None:
        self._peer_gone = True
        self.endpoint.change_gates(tx_shut=PEER_GONE)
        self._wake_locally()

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
        self._set_gate()
        return step

    def _set_gate(self) -> None:
        """Let sends go by without a look at the state, as long as nothing is known that speaks against it."""
        self.endpoint.tell_flags(self._flags_seen)
        if self._send_outcome is Outcome.GOES:
            self.endpoint.change_gates(tx_open=NOT_SENDING)
        else:
            self.endpoint.change_gates(tx_shut=NOT_SENDING)

    def _look(self) -> None:
        """Bring the state up to date with the peer's flags, then with its disappearance."""
        with self._state_lock:
            gone = self._peer_gone
            flags = self.endpoint.peer_flags()
            if flags != self._flags_seen:
                self._flags_seen = flags
                self._publish(self._take(self._states.receive_flags(flags)))
            if gone:
                if not flags and self._never_met():
                    self._spoilt = True
                    self._take(self._states.receive_flags(Flags.DONE_WRITING | Flags.CLOSED))
                self._publish(self._take(self._states.peer_gone()))

    def _never_met(self) -> bool:
        """Whether the peer ended before it used its side, and before anything was sent to it: in TCP that is an end."""
        hello = int.from_bytes(self.rx.view[:8], "little")
        unsent = not isinstance(self.tx, Nowhere) and not self.endpoint.sent_bytes
        return not hello and unsent and self._states.state is State.ACTIVE

    @property
    def state(self) -> State:
        """The state as far as it is known here; the peer's flags are looked at when bytes are sent or received."""
        return self._states.state

    @property
    def reset_seen(self) -> bool:
        """Whether the connection has ended in a reset, or by a failure of this side, as far as is known here."""
        return self._was_reset

    @property
    def peer_finished(self) -> bool:
        """Whether the peer has said that it sends no more."""
        if not self._closed:
            with contextlib.suppress(ProtocolError):
                self._look()
        return bool(self._flags_seen & Flags.DONE_WRITING)

    @property
    def disconnected(self) -> bool:
        """Whether TCP would call the socket not connected: it was reset, or both sides have finished writing."""
        if not self._closed and not self._was_reset:
            with contextlib.suppress(ProtocolError):
                self._look()
        reset = self._was_reset or self._states.state in (State.PROCESSABORT, State.PEERABORTWAIT)
        return reset or bool(self._flags_seen & Flags.ABNORMAL_CLOSE) or (self._write_ended and self._flags_seen != 0)

    def _raise(self, outcome: Outcome) -> None:
        self._was_reset = self._was_reset or outcome in (Outcome.ECONNRESET, Outcome.ECONNABORTED)
        with self._state_lock:
            if self._states.state in (State.PROCESSABORT, State.PEERABORTWAIT):
                self._take(self._states.error_reported())
        raise os_error(outcome)

    def fail(self) -> None:
        """This side cannot go on: abort, and tell the peer. What comes next here is ECONNABORTED, and there a reset."""
        self._spoilt = True
        with self._state_lock:
            self._publish(self._take(self._states.fail()))

    def _refuse(self, problem: ProtocolError) -> NoReturn:
        """Raise what the application is told when the endpoint raised `problem`: closed here, or the peer lies."""
        if self._closed:
            raise os_error(Outcome.EBADF) from None  # another thread closed; what the endpoint saw then means nothing
        if isinstance(problem, LocalProtocolError):
            raise problem
        self.fail()
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
        sent: int = self._quick_send(data, _SPIN_GATED)
        return sent if 0 <= sent < QUICK else self._sent(sent, data)

    def _sent(self, result: int, data: Any) -> int:
        """End a send of which the kernel did not say that all is well."""
        try:
            if result != FAILED_LOOK:
                return self.endpoint.finish(result)
            self._check_sendable()
            return self.endpoint.send(data)
        except ProtocolError as exc:
            self._refuse(exc)

    def lend_room(self, size: int) -> memoryview:
        """Lend up to `size` contiguous bytes of the peer's ring to write in; `commit` sends them.

        Returns: a view, empty when the ring is full. Nothing is sent before `commit`. Raises OSError as `send`.
        """
        if self._flags_word[0] != self._flags_seen or self._peer_gone or self._send_outcome is not Outcome.GOES:
            self._check_sendable()
        self.room_lent = True  # before the look: `close`, in another thread, must see it
        try:
            view = self.endpoint.lend_room(size)
            if not view and self.endpoint.writable_bytes(wait=True):
                view = self.endpoint.lend_room(size)
        except BaseException as exc:
            self.room_lent = False
            if isinstance(exc, ProtocolError):
                self._refuse(exc)
            raise
        if not view:
            self.room_lent = False
        return view

    def commit(self, count: int) -> None:
        """Send the first `count` bytes of what `lend_room` lent, the rest is withdrawn. Raises OSError as `send`."""
        changed = self._flags_word[0] != self._flags_seen or self._peer_gone
        if count and (changed or self._send_outcome is not Outcome.GOES):
            self._check_sendable()
        try:
            self.endpoint.commit(count)
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

    def recv(self, max_bytes: int, wait: bool = True) -> bytes | None:
        """Copy out up to `max_bytes` (1 or more); spin a little when there are none, unless `wait` is False.

        Returns: bytes; b"" at the end of the stream; None when nothing is there yet.
        Raises: OSError (ECONNRESET, ECONNABORTED, EBADF), once all bytes that came before were read.
        """
        if self._closed:
            raise os_error(Outcome.EBADF)
        data: bytes | None = self._quick_recv(max_bytes, wait)
        if data is None or self._rx_owed[0]:
            return self._received(data, max_bytes)
        if self._closed:  # by another thread: the bytes may be those of the pages put in place
            raise os_error(Outcome.EBADF)
        return data

    def _received(self, data: bytes | None, max_bytes: int) -> bytes | None:
        """End a receive of which the kernel did not say that all is well."""
        try:
            self.endpoint.take_owed()
            while data is None and not self._nothing_more():
                data = self.endpoint.recv(max_bytes, False)
        except ProtocolError as exc:
            self._refuse(exc)
        if data is not None:
            if self._closed:
                raise os_error(Outcome.EBADF)
            return data
        return b"" if self._at_end() else None

    def recv_into(self, buffer: Any, wait: bool = True) -> int | None:
        """Copy what is there into a writable contiguous buffer, of at least one byte.

        Returns: bytes; 0 at the end of the stream; None when nothing is there yet.
        Raises: as `recv`; TypeError, BufferError, ValueError when the buffer cannot be written in place.
        """
        if self._closed:
            raise os_error(Outcome.EBADF)
        count: int = self._quick_recv_into(buffer, wait)
        if not 0 < count < QUICK:
            return self._received_into(count, buffer)
        if self._closed:
            raise os_error(Outcome.EBADF)
        return count

    def _received_into(self, count: int, buffer: Any) -> int | None:
        try:
            if count:
                count = self.endpoint.finish(count)
            elif not memoryview(buffer).nbytes:
                return 0
            while not count and not self._nothing_more():
                count = self.endpoint.recv_into(buffer, False)
        except ProtocolError as exc:
            self._refuse(exc)
        if count:
            if self._closed:
                raise os_error(Outcome.EBADF)
            return count
        return 0 if self._at_end() else None

    def peek(self, max_bytes: int) -> bytes | None:
        """Copy up to `max_bytes` without consuming them. Returns and raises as `recv`."""
        if self._closed:
            raise os_error(Outcome.EBADF)
        try:
            while True:
                data = self.endpoint.peek_copy(max_bytes)
                if data:
                    return data
                if self._nothing_more():
                    break
        except ProtocolError as exc:
            self._refuse(exc)
        return b"" if self._at_end() else None

    def lend_unread(self, max_bytes: int, wait: bool = True) -> memoryview | None:
        """Lend the contiguous bytes that come first, up to `max_bytes`, until `consume`, and no receive before that.

        Returns: a read-only view, empty at the end of the stream; None when nothing is there yet. Raises as `recv`.
        """
        if self._closed:
            raise os_error(Outcome.EBADF)
        self.unread_lent = True  # before the look: `close`, in another thread, must see it
        try:
            while not (view := self.endpoint.lend_unread(max_bytes, wait)):
                if self._nothing_more():
                    self.unread_lent = False
                    return view if self._at_end() else None
        except BaseException as exc:
            self.unread_lent = False
            if isinstance(exc, ProtocolError):
                self._refuse(exc)
            raise
        return view

    def consume(self, count: int) -> None:
        """Give back the first `count` of the bytes that were lent. Raises OSError (EBADF, ECONNABORTED)."""
        if self._closed:
            raise os_error(Outcome.EBADF)
        try:
            self.endpoint.consume(count)
        except ProtocolError as exc:
            self._refuse(exc)

    def readable(self) -> bool:
        """Whether a receive would give bytes, the end or an error at once. Raises nothing."""
        try:
            if self._closed or self.endpoint.readable_bytes() > 0:
                return True
            self._look()
            return self._receive_outcome is not Outcome.GOES or self.endpoint.rx_state() != RxState.EMPTY
        except ProtocolError:
            return True

    def _nothing_more(self) -> bool:
        """Whether the ring is empty still, after the state was brought up to date; sets the outcome to go by."""
        self._look()
        self._outcome_seen = self._receive_outcome  # before the ring: a sender's thread may learn of the end meanwhile
        return self.endpoint.rx_state() != RxState.DATA

    def _at_end(self) -> bool:
        """Whether the stream has ended; False: more may come. Raises what the end was if it was none of files."""
        outcome = self._outcome_seen
        if outcome is Outcome.GOES:
            return self._read_ended
        if outcome is not Outcome.EOF and not self._read_ended:
            self._raise(outcome)
        return True

    def shutdown_write(self) -> None:
        """Tell the peer that no more bytes come. Raises OSError (EBADF, ENOTCONN)."""
        with self._state_lock:
            if self._closed:
                raise os_error(Outcome.EBADF)
            self._write_ended = True
            self._publish(self._take(self._states.shutdown_wr()))

    def shutdown_read(self) -> None:
        """Receive what is there, then the end; the peer is not told, and whoever waits here is woken."""
        self._read_ended = True
        self._wake_locally()

    def _wake_locally(self) -> None:
        self.rx.wake()
        wake = self._local_wake
        if wake is not None:
            wake()

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
            self.fail()  # neither side can wake the other any more: so none may sleep
        elif not self._peer_gone and not self._read_ended:
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
            if not abort and self._started:
                with contextlib.suppress(ProtocolError):
                    self._look()
                self.closed_first = not self._peer_gone and not self._flags_seen & Flags.CLOSED
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
        quiet = self.endpoint.close() and not (self.endpoint.lent or self.unread_lent or self.room_lent)
        self._tuner.close()
        self._let_go(reusable=quiet and self._started and not self._spoilt and not self._detached)

    def _let_go(self, *, reusable: bool) -> None:
        rx, tx = self.rx, self.tx
        if not reusable or not isinstance(tx, Region) or rx.device.gone is not None or rx.closed or tx.closed:
            tx.close()
            rx.close()
            return
        rx.wake()  # whoever sleeps on it must see that this is over
        offer.release(rx, load_kernels().exchange)  # before the peer can know that it may offer the pair again
        link_groups(rx.device).keep(
            self.peer.devid, rx, tx, self.peer, client=self.client_side, address=self.client_address
        )

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and self._pid == os.getpid():
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=1)
            _thread.start_new_thread(self.close, ())


def hung_up(fd: int) -> bool:
    """Whether the other side of a TCP connection has ended it."""
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
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


def _after_fork() -> None:
    """The connections are the parent's: here they are closed, and nothing that is shared is touched."""
    for connection in list(_live):
        connection._closed, connection._send_outcome = True, Outcome.EBADF
        connection.endpoint.change_gates(tx_shut=NOT_SENDING, rx_shut=_PARENTS)
        connection._state_lock, connection._end_lock = threading.RLock(), threading.Lock()  # held by nobody here
    _live.clear()


os.register_at_fork(after_in_child=_after_fork)

# SPDX-License-Identifier: Apache-2.0
"""One TCP connection as trio's tasks use it: a `Link` while it is undecided, then a `Connection`, or plain TCP.

It owns the trio TCP socket, and the order in which things end: the link before TCP. `trio_socket` and `stream` stand
on it, each with its own errors; here errors are OSError with an errno, and `BrokenLinkError` for a handshake that
failed. Calls that must sleep are awaited one by one: whoever sends or receives tries first and sleeps only then.

One task may wait in each direction (BusyResourceError), as on a trio socket. A connection may be settled while no task
looks, by the driver's thread: what has to be done at that moment is in `_on_settled`, the rest when a task comes by.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import trio

from ism.driver import Device
from ism.errors import IsmError
from ism.smc import info, monitor
from ism.smc.channel import Channel
from ism.smc.connection import Connection
from ism.smc.diagnosis import Diagnosis
from ism.smc.info import Info
from ism.smc.link import Link, Stage
from ism.smc.policy import Policy
from ism.smc.relay import Relay
from ism.smc.rendezvous import OFF, Fallback, Publication, connect_steps, no_device
from ism.smc.trio_wait import LinkWaiter, Sleeper, Turns, Waker, default_device, run_steps

ELSEWHERE = Fallback(Diagnosis.CNFERR, "the connection was not made by this socket")
DUPLICATED = Fallback(Diagnosis.OPTUNSUPP, "the descriptor was duplicated")
_LINGER_BYTES = 8
_GIVE_AWAY_S = 1.0


class BrokenLinkError(IsmError):
    """The connection cannot be used: its handshake failed, or shared memory is required and not possible.

    Attributes: `error` (why).
    """

    def __init__(self, error: Exception) -> None:
        self.error = error
        super().__init__(str(error))


def closed_error() -> OSError:
    """Return the error of a call on a closed socket."""
    return OSError(errno.EBADF, os.strerror(errno.EBADF))


class Borrowed(socket.SocketType):
    """A TCP socket by its descriptor, which stays its owner's: for calls that trio's sockets wrap."""

    def __del__(self) -> None:
        self.detach()


class TrioChannel:
    """A TCP socket, and what has become of it.

    Attributes: `tcp` (trio's socket), `policy`, `device` (None: the process's), `link`, `fallback` (why there is no
    link), `connection` (once a task knows it), `is_tcp` (a task knows that it is TCP, in both directions), `plain` (it
    is never to be anything else), `relay` (behind the descriptor, once that was given away), `closed`, `write_ended`,
    `read_ended` (shut down here), `receive_turns`, `send_turns` (when calls yield).
    """

    def __init__(
        self, tcp: trio.socket.SocketType, policy: Policy, device: Device | None, fallback: Fallback | None = None
    ) -> None:
        """`fallback`: why the socket is plain TCP for ever."""
        self.tcp, self.policy, self.device, self.fallback = tcp, policy, device, fallback
        self.link: Link | None = None
        self.connection: Connection | None = None
        self.closed = self.write_ended = self.read_ended = self.is_tcp = False
        self.plain = fallback is not None
        self._peername: Any = None
        self._abort = False
        self._waiter: LinkWaiter | None = None
        self.relay: Relay | None = None
        self._sleeper = Sleeper()
        self._receiving = self._sending = False
        self._beginning = 0
        self._yielded_twice = False
        self.receive_turns, self.send_turns = Turns(), Turns()
        if policy.mode != "off":
            monitor.track(self)

    # -- how it begins ------------------------------------------------------------------------------------------

    def raw(self) -> Borrowed:
        """Return the TCP socket without trio around it, for the moment."""
        tcp = self.tcp
        return Borrowed(tcp.family, tcp.type, tcp.proto, tcp.fileno())

    async def prepare(self, address: Any) -> None:
        """Make the link of a connection about to be made to a numeric address, unless there can be none.

        Raises: OSError (ECONNABORTED: shared memory is required). Cancellation: close the channel.
        """
        if self.plain or self.policy.mode == "off":
            return
        self.fallback = None
        try:
            device = self.device or await default_device()
        except (IsmError, OSError) as exc:
            self._fall_back(no_device(exc), address)
            return
        outcome = await run_steps(connect_steps(device, self.raw(), address, self.policy, self._client_link))
        if isinstance(outcome, Fallback):
            self.drop_link()
            self._fall_back(outcome, address)

    def _client_link(self, device: Device, /) -> Link:
        return self._make_link(device, server_side=False)

    def _server_link(self, device: Device, /) -> Link:
        return self._make_link(device, server_side=True)

    def _make_link(self, device: Device, *, server_side: bool) -> Link:
        self.is_tcp = False
        link = self.link = Link(
            self.tcp.fileno(),
            self.tcp.family,
            owner=self.tcp,
            server_side=server_side,
            device=device,
            buffer_size=self.policy.buffer_size,
            buffer_limit=self.policy.buffer_limit,
            required=self.policy.mode == "require",
            settled=_weakly(self),
        )
        self._waiter = LinkWaiter(link, self.tcp)
        return link

    def drop_link(self) -> None:
        """Forget a connection that could not be made."""
        link, self.link, self._waiter = self.link, None, None
        if link is not None:
            link.close()

    def connected(self) -> None:
        """TCP is connected."""
        with contextlib.suppress(OSError):
            self._peername = self.tcp.getpeername()
        if self.link is not None:
            self.link.connected()

    def accepted(self, publication: Publication, peer: Any) -> None:
        """Begin to decide about a connection that came to what was published; never waits."""
        self._peername = peer
        try:
            outcome = publication.accepted(self.raw(), peer, self._server_link)
        except (OSError, ValueError) as exc:  # the client has gone already: what follows shows it
            outcome = Fallback(Diagnosis.INTERR, f"the connection cannot be looked up: {exc}")
        if isinstance(outcome, Fallback):
            with contextlib.suppress(OSError):
                self._fall_back(outcome, peer)

    def not_shared(self, fallback: Fallback, peer: Any) -> None:
        """Note why a connection that was accepted is plain TCP; where shared memory is required it is broken."""
        self._peername = peer
        with contextlib.suppress(OSError):
            self._fall_back(fallback, peer)

    def _fall_back(self, fallback: Fallback, peer: Any) -> None:
        self.fallback = fallback
        if self.policy.mode == "require":
            raise OSError(errno.ECONNABORTED, f"shared memory is required, but {fallback.why}")
        if self.policy.mode != "off":  # that there is no device is no peer's doing: it is logged once
            info.count_fallback(fallback.code, fallback.why, None if fallback.code == Diagnosis.NOSMCDDEV else peer)

    def _on_settled(self, link: Link) -> None:
        """In any thread, with the link's lock held."""
        if link.stage is Stage.SMC and link.connection is not None:
            link.connection.endpoint.max_spin_ns = self.policy.spin_us * 1000
            if self.write_ended:
                link.connection.shutdown_write()
            if self.read_ended:
                link.connection.shutdown_read()
        elif link.stage is Stage.TCP:
            info.count_fallback(link.code, link.why, self._peername)
            for ended, how in ((self.write_ended, socket.SHUT_WR), (self.read_ended, socket.SHUT_RD)):
                if ended:
                    with contextlib.suppress(OSError):
                        link.raw.shutdown(how)

    # -- what has become of it ----------------------------------------------------------------------------------

    async def to_send(self) -> Connection | None:
        """Wait until it is known how bytes are sent. Returns None for TCP. Not always a checkpoint.

        Raises: BrokenLinkError, OSError (EBADF), ClosedResourceError (by another task meanwhile), BusyResourceError.
        Cancellation: nothing is lost, the handshake goes on.
        """
        return self.connection or await self._decided(sending=True)

    async def to_receive(self) -> Connection | None:
        """Wait until it is known how bytes are received; as `to_send`."""
        return self.connection or await self._decided(sending=False)

    async def to_know(self) -> Connection | None:
        """As `to_send`, for whoever does not send: any number of tasks may wait."""
        return self.connection or await self._decided(sending=True, many=True)

    async def _decided(self, *, sending: bool, many: bool = False) -> Connection | None:
        link = self.link
        if self.closed:
            raise closed_error()
        if link is None:
            self._check_allowed()
            self.is_tcp = True
            return None
        link.start(sending=sending)
        if not (link.settled if sending else link.may_receive):
            assert self._waiter is not None
            with contextlib.nullcontext() if many else self._only_one(sending=sending):
                await self._waiter.until(lambda: link.settled if sending else link.may_receive)
            if self.closed:
                raise trio.ClosedResourceError("another task closed this socket")
        connection = self.settled_connection()
        self.is_tcp = connection is None and self.drained
        return connection

    def _check_allowed(self) -> None:
        if self.fallback is not None and self.policy.mode == "require":
            raise BrokenLinkError(OSError(errno.ECONNABORTED, f"shared memory is required, but {self.fallback.why}"))

    def settled_connection(self) -> Connection | None:
        """Return the connection if there is one by now, None otherwise. Raises BrokenLinkError."""
        link = self.link
        if self.connection is not None or link is None:
            return self.connection
        if link.stage is Stage.BROKEN:
            assert link.error is not None
            raise BrokenLinkError(link.error)
        connection = link.connection
        if link.stage is Stage.SMC and connection is not None:
            connection.on_peer_gone(Waker(connection))
            self.connection = connection
        return self.connection

    @property
    def amortise_checkpoints(self) -> bool:
        """Whether calls over shared memory yield only once in a while."""
        return self.receive_turns.amortised

    @amortise_checkpoints.setter
    def amortise_checkpoints(self, wanted: bool) -> None:
        self.receive_turns.amortised = self.send_turns.amortised = wanted

    @property
    def undecided(self) -> bool:
        """Whether it is not known yet how bytes travel."""
        return self.link is not None and not self.link.settled

    @property
    def peername(self) -> Any:
        """The peer's address as it was when the connection was made."""
        return self._peername

    def smc_info(self) -> Info:
        """Describe the connection."""
        if self.relay is not None and not self.closed:
            return self.relay.smc_info()
        local = None
        with contextlib.suppress(OSError):
            local = self.tcp.getsockname()
        off = OFF if self.policy.mode == "off" else None
        return info.describe(self.link, self.fallback or off, local, self._peername)

    # -- waiting ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _only_one(self, *, sending: bool) -> Iterator[None]:
        if self._sending if sending else self._receiving:
            raise trio.BusyResourceError(f"another task is already {'writing to' if sending else 'reading from'} it")
        self._note_waiting(sending, True)
        try:
            yield
        finally:
            self._note_waiting(sending, False)

    def _note_waiting(self, sending: bool, waiting: bool) -> None:
        if sending:
            self._sending = waiting
        else:
            self._receiving = waiting

    async def begin_receiving(self) -> None:
        """See cancellation and yield, if it is time to, before a receive. The descriptor stays here meanwhile."""
        if self.receive_turns.due():
            await self.yield_to_receive()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()

    async def yield_to_receive(self) -> None:
        """Yield before a receive. Raises Cancelled; then nothing has been done."""
        turns = self.receive_turns
        left = turns.leave()
        self._yielded_twice = False
        self._beginning += 1
        try:
            await trio.lowlevel.checkpoint()
        finally:
            self._beginning -= 1
        turns.back(left)

    async def wait_readable(self, connection: Connection) -> None:
        """Sleep until a receive may give something; may return for nothing, and without having slept.

        Raises: BusyResourceError; ClosedResourceError when another task closes it.
        """
        if self._receiving:
            raise trio.BusyResourceError("another task is already reading from it")
        if not self.receive_turns.alone and not self._yielded_twice:
            await self.yield_to_receive()  # the others may be done by then, and what is waited for may have come
            self._yielded_twice = True
            return
        if connection.must_wait_to_read():
            self._receiving = True
            left = self.receive_turns.leave()
            try:
                await self._sleeper.sleep(connection)
                self.receive_turns.back(left)
            finally:
                self._receiving = False
                connection.awake(writer=False)

    async def wait_writable(self, connection: Connection) -> bool:
        """Sleep for room, unless there is some by now; tells whether it slept. Raises as `wait_readable`."""
        if self._sending:
            raise trio.BusyResourceError("another task is already writing to it")
        if not connection.must_wait_to_write():
            return False
        self._sending = True
        try:
            await self._sleeper.sleep(connection)
            self.send_turns.slept()
        finally:
            self._sending = False
            connection.awake(writer=True)
        return True

    # -- giving it away -----------------------------------------------------------------------------------------

    def become_plain(self, why: Fallback) -> None:
        """Let the socket be the plain one that its descriptor is: TCP if that is still possible, else a relay's.

        Waits, if at all, for what threads of the library see to, and at most `_GIVE_AWAY_S`.
        Raises: BusyResourceError; OSError (EAGAIN; EOPNOTSUPP: it is not connected, and must use shared memory then).
        """
        link = self.link
        if link is None:
            if self.policy.mode == "require":
                raise OSError(errno.EOPNOTSUPP, f"shared memory is required, but {why.why}")
            self.fallback = self.fallback if self.plain and self.fallback is not None else why
            self.plain = True
            return
        if link.required:
            link.start(sending=True)
        elif not link.settled:
            link.give_away()
        _until(link, lambda: link.may_receive)
        if not link.may_receive:
            raise OSError(errno.EAGAIN, "it cannot be told yet whether this connection uses shared memory")
        if link.stage is Stage.SMC:
            self._put_relay(link)

    def _put_relay(self, link: Link) -> None:
        if self._receiving or self._sending or self._beginning:
            raise trio.BusyResourceError("another task is using this socket")
        connection = link.connection
        assert connection is not None
        if connection.unread_lent or connection.room_lent:
            raise trio.BusyResourceError("memory of this connection is lent")
        self.relay = Relay(self.tcp.fileno(), link, Channel(connection, link.raw, max_spin_ns=0, mirrored=False))
        self.link = self.connection = self._waiter = None
        self.plain = True
        monitor.forget(self)  # the relay is shown in its place

    @property
    def drained(self) -> bool:
        """Whether the next byte of TCP is the program's."""
        return self.link is None or (self.link.stage is Stage.TCP and self.link.may_receive)

    def detach(self) -> int:
        """Give the descriptor away; `become_plain` was called."""
        self.closed = True
        self.drop_link()
        return self.tcp.detach()

    # -- the end ------------------------------------------------------------------------------------------------

    def shutdown(self, how: int) -> None:
        """As `socket.shutdown`. What is not decided yet is shut down when it is.

        Raises: OSError.
        """
        link = self.link
        if link is None:
            self.tcp.shutdown(how)
            self._note_shutdown(how)
            return
        with link.lock:
            if not link.settled:
                self.tcp.getpeername()  # not connected: raises
                self._note_shutdown(how)
                if self.write_ended:
                    link.start(sending=True)
                    link.hurry()
                    self._see_to_it(link)
                return
        connection = self.settled_connection()
        if connection is None:
            self.tcp.shutdown(how)
        else:
            if connection.disconnected:
                raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
            if how in (socket.SHUT_WR, socket.SHUT_RDWR):
                connection.shutdown_write()
            if how in (socket.SHUT_RD, socket.SHUT_RDWR):
                connection.shutdown_read()
        self._note_shutdown(how)

    def _note_shutdown(self, how: int) -> None:
        self.write_ended |= how in (socket.SHUT_WR, socket.SHUT_RDWR)
        self.read_ended |= how in (socket.SHUT_RD, socket.SHUT_RDWR)

    def _see_to_it(self, link: Link) -> None:
        """Have a link settled though no task waits for it."""

        async def wait() -> None:
            with contextlib.suppress(Exception):
                await LinkWaiter(link, self.tcp).until(lambda: link.settled)

        if not link.settled:
            with contextlib.suppress(RuntimeError):  # not in trio: the next call sees to it
                trio.lowlevel.spawn_system_task(wait)

    def set_linger(self) -> None:
        """Look what SO_LINGER says: with a time of 0 a close is a reset."""
        onoff, seconds = (
            int.from_bytes(part, "little")
            for part in _halves(self.tcp.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_BYTES))
        )
        self._abort = bool(onoff) and not seconds

    def close(self) -> None:
        """End it: the peer reads what was sent. Wakes the tasks that wait here. Idempotent, never waits."""
        if self.closed:
            return
        self.closed = True
        link = self.link
        if link is not None:
            connection = link.connection
            if connection is not None and not connection.closed:
                trio.lowlevel.notify_closing(connection.fd)
                if self._abort:
                    connection.close(abort=True)
            link.close()
        self.tcp.close()

    def __del__(self) -> None:
        link: Link | None = getattr(self, "link", None)
        if link is not None and not self.closed and link.stage is not Stage.CLOSED and not sys.is_finalizing():
            # not here: a destructor may run inside the driver's locks
            _thread.start_new_thread(_bury, (link, self.tcp))


def _bury(link: Link, tcp: trio.socket.SocketType) -> None:
    """End what was dropped without `close`; TCP, whose own destructor warns, after it."""
    link.close()


def _halves(data: bytes) -> tuple[bytes, bytes]:
    return data[: len(data) // 2], data[len(data) // 2 :]


def _weakly(channel: TrioChannel) -> Callable[[Link], None]:
    reference = weakref.ref(channel)

    def call(link: Link) -> None:
        alive = reference()
        if alive is not None:
            alive._on_settled(link)

    return call


def _until(link: Link, done: Callable[[], bool]) -> None:
    """Wait in this thread, but not for long: for the manager's word, and a handshake under way."""
    changed = threading.Event()
    end_s = time.monotonic() + _GIVE_AWAY_S
    while not done() and (left_s := end_s - time.monotonic()) > 0:
        changed.clear()
        link.on_change(changed.set)
        if not done():
            changed.wait(left_s)
        link.forget(changed.set)

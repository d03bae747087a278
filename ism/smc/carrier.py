# SPDX-License-Identifier: Apache-2.0
"""What a transport of asyncio takes for its socket: `Carrier` moves the bytes where the connection's `Link` says.

It, not the selector, knows when there are bytes, or room for more. Phases:

    undecided   nothing can be received, and what is written stays in the transport's buffer; the link is followed.
                Reading begins the handshake, writing says that it is urgent: see `Link.start`
    SMC         the loop watches the region's eventfd. A direction in which the transport waits is parked, so that the
                peer rings; a carrier that nobody waits for costs nothing
    TCP         the descriptor is the selector's again, as for any other socket
    broken      every call raises what the connection broke of
    closed

Everything happens in the loop's thread; what other threads notice is passed on by `call_soon_threadsafe`.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import errno
import os
import socket as _std
import sys
import types
from asyncio import events
from collections.abc import Callable
from enum import Enum
from typing import Any, cast

from ism.smc import blocking
from ism.smc.channel import would_block
from ism.smc.connection import Connection
from ism.smc.info import Info
from ism.smc.link import Link, Stage

_Plain = _std.SocketType


def tell(loop: Any, callback: Callable[[], object]) -> None:
    """Have the loop call back, from any thread; a loop that is closed has nobody who waits."""
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        pass


class Watch:
    """Follows a link from an event loop: calls back in the loop after each change, and keeps the link's deadline."""

    def __init__(self, loop: Any, link: Link, on_change: Callable[[], None]) -> None:
        self._loop, self._link, self._on_change = loop, link, on_change
        self._asked = self._stopped = False
        self._timer: asyncio.TimerHandle | None = None
        # a link is held by its socket alone: as with the selector, what is waited for is held by the loop
        self._held: set[Watch] = vars(loop).setdefault("_ism_watches", set())
        self._held.add(self)

    def look(self) -> None:
        """Call back now, and after the next change."""
        if self._stopped:
            return
        if not self._asked:
            self._asked = True
            self._link.on_change(self._tell)
        self._on_change()
        if not self._stopped:
            self._keep_deadline()

    def _tell(self) -> None:
        """Any thread, with the link's lock held."""
        tell(self._loop, self._told)

    def _told(self) -> None:
        self._asked = False
        self.look()

    def _keep_deadline(self) -> None:
        deadline_s, timer = self._link.deadline_s, self._timer
        if timer is not None:
            if timer.when() == deadline_s:
                return
            timer.cancel()
            self._timer = None
        if deadline_s != float("inf"):
            self._timer = self._loop.call_at(deadline_s, self._expire)

    def _expire(self) -> None:
        self._timer = None
        self._link.expire()
        self.look()

    def stop(self) -> None:
        """Follow no longer."""
        self._stopped = True
        self._held.discard(self)
        self._link.forget(self._tell)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


async def decided(loop: Any, sock: Any, *, sending: bool) -> None:
    """Wait until it is known how the bytes of a socket travel, so that no call on it has to."""
    link = sock._link if isinstance(sock, blocking.socket) else None
    if link is None:
        return

    def done() -> bool:
        return link.settled if sending else link.may_receive

    link.start(sending=sending)
    if done():
        return
    waiter = loop.create_future()

    def look() -> None:
        if done() and not waiter.done():
            waiter.set_result(None)

    watch = Watch(loop, link, look)
    try:
        watch.look()
        await waiter
    finally:
        watch.stop()


class Phase(Enum):
    """Where a carrier stands; see the module's text."""

    UNDECIDED = "undecided"
    SMC = "SMC"
    TCP = "TCP"
    BROKEN = "broken"
    CLOSED = "closed"


class Carrier:
    """Moves the bytes of one connection for a transport, and tells it when there are some, or room for more.

    All in the loop's thread. Attributes: `fd` (TCP's, which names the transport), `loop` (for the transport); `send`,
    `sendmsg`, `recv`, `recv_into`, as of a non-blocking socket, which change with the phase.
    """

    send: Callable[[Any], int]
    sendmsg: Callable[[Any], int]
    recv: Callable[[int], bytes]
    recv_into: Callable[[Any], int]

    def __init__(self, loop: Any, sock: blocking.socket, link: Link) -> None:
        self.fd = _Plain.fileno(sock)
        self.family, self.type, self.proto = sock.family, sock.type, sock.proto
        self.loop = LoopOfTransport(loop, self)
        self._loop, self._sock, self._link = loop, sock, link
        sock._carried = True
        self._phase = Phase.UNDECIDED
        self._connection: Connection | None = None
        self._reader: asyncio.Handle | None = None
        self._writer: asyncio.Handle | None = None
        self._reader_parked = self._writer_parked = False
        self._may_send = self._turn_due = self._end_due = self._lingers = False
        self.send, self.sendmsg = self._send_later, self._sendmsg_later
        self.recv, self.recv_into = self._receive_later, self._receive_later
        self._watch = Watch(loop, link, self._on_change)
        self._take_over()
        self._watch.look()

    def _take_over(self) -> None:
        """Have nobody else move the socket's bytes, or show on its descriptor whether there are some."""
        sock, link = self._sock, self._link
        with link.lock:
            sock._mirrored = False
            channel = sock._take_channel()
        if channel is not None:
            channel.stop()
            # a doorbell that the mirror has taken already, and does not pass on, must not be lost
            link.device.service.soon(lambda: tell(self._loop, self._on_doorbell))

    @property
    def uses_tcp(self) -> bool:
        """Whether the bytes are known to go over TCP."""
        return self._phase is Phase.TCP

    def smc_info(self) -> Info:
        """Tell how the bytes travel, and why."""
        return self._sock.smc_info()

    # -- whether it is decided --------------------------------------------------------------------------------------

    def _on_change(self) -> None:
        link = self._link
        match link.stage:
            case Stage.SMC:
                self._enter_smc()
            case Stage.TCP:
                self._send_over_tcp()
                if link.may_receive:
                    self._enter_tcp()
            case Stage.BROKEN | Stage.CLOSED:
                self._enter(Phase.BROKEN)
                self._may_send = True
                self.send = self.sendmsg = self.recv = self.recv_into = self._fail
                self._end_writing(lambda: None)
                self._take_turn_soon()

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._watch.stop()

    def _want(self, *, sending: bool) -> None:
        self._link.start(sending=sending)
        self._watch.look()

    def _send_later(self, data: Any) -> int:
        self._want(sending=True)
        if self._may_send:
            return self.send(data)
        raise would_block()

    def _sendmsg_later(self, buffers: Any) -> int:
        self._want(sending=True)
        if self._may_send:
            return self.sendmsg(buffers)
        raise would_block()

    def _receive_later(self, *_: Any) -> Any:
        raise would_block()

    def _fail(self, *_: Any) -> Any:
        error = self._link.error
        if error is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        raise ConnectionResetError(errno.ECONNRESET, f"{os.strerror(errno.ECONNRESET)} ({error})") from error

    # -- TCP --------------------------------------------------------------------------------------------------------

    def _send_over_tcp(self) -> None:
        if self._may_send:
            return
        sock = self._sock
        self._may_send = True
        self.send = types.MethodType(_Plain.send, sock)
        self.sendmsg = types.MethodType(_Plain.sendmsg, sock)
        self._end_writing(lambda: _Plain.shutdown(sock, _std.SHUT_WR))
        writer, self._writer = self._writer, None
        if writer is not None:
            self._loop._add_writer(self.fd, writer._run)

    def _enter_tcp(self) -> None:
        self._enter(Phase.TCP)
        self.recv = types.MethodType(_Plain.recv, self._sock)
        self.recv_into = types.MethodType(_Plain.recv_into, self._sock)
        reader, self._reader = self._reader, None
        if reader is not None:
            self._loop._add_reader(self.fd, reader._run)

    # -- shared memory ----------------------------------------------------------------------------------------------

    def _enter_smc(self) -> None:
        connection = self._link.connection
        assert connection is not None
        self._enter(Phase.SMC)
        self._connection, self._may_send = connection, True
        connection.endpoint.max_spin_ns = self._sock._policy.spin_us * 1000
        self.send, self.sendmsg, self.recv, self.recv_into = self._send, self._sendmsg, self._recv, self._recv_into
        # whoever polls the descriptor, to see whether the peer has gone, must not take the byte left on TCP for data
        with contextlib.suppress(OSError):
            _Plain.setsockopt(self._sock, _std.SOL_SOCKET, _std.SO_RCVLOWAT, 2)
        self._loop._add_reader(connection.fd, self._on_doorbell)
        connection.on_peer_gone(lambda: tell(self._loop, self._take_turn))
        self._end_writing(connection.shutdown_write)
        self._take_turn_soon()

    def _send(self, data: Any) -> int:
        assert self._connection is not None
        sent = self._connection.send(data)
        if not sent:
            raise would_block()
        return sent

    def _sendmsg(self, buffers: Any) -> int:
        assert self._connection is not None
        total = 0
        for buffer in buffers:
            sent = self._connection.send(buffer)
            total += sent
            if sent < memoryview(buffer).nbytes:
                break
        if not total:
            raise would_block()
        return total

    def _recv(self, max_bytes: int) -> bytes:
        assert self._connection is not None
        data = self._connection.recv(max_bytes)
        if data is None:
            raise would_block()
        return data

    def _recv_into(self, buffer: Any) -> int:
        assert self._connection is not None
        count = self._connection.recv_into(buffer)
        if count is None:
            raise would_block()
        return count

    def _on_doorbell(self) -> None:
        connection = self._connection
        if connection is not None:
            connection.drain()
            self._take_turn()

    def _take_turn_soon(self) -> None:
        if not self._turn_due:
            self._turn_due = True
            self._loop.call_soon(self._take_turn)

    def _take_turn(self) -> None:
        """Run the callbacks of the directions that can go on, and park those that cannot.

        A reader that received is parked a turn later. By then the program has sent what it had to say, and if the loop
        has nothing else to do, a receive waits awake for the answer, as long as that has paid off lately.
        """
        self._turn_due = False
        self._unpark()
        lingers, self._lingers = self._lingers, False
        try:
            if self._reader is not None:
                if self._may_read():
                    self._lingers = True
                    self._reader._run()
                elif lingers and not self._loop._ready:
                    self._reader._run()
            if self._writer is not None and self._may_write():
                self._writer._run()
        except BaseException:  # KeyboardInterrupt: the loop may yet run again
            self._take_turn_soon()
            raise
        if self._reader is not None and (self._lingers or not self._park_reader()):
            self._take_turn_soon()
        if self._writer is not None and not self._park_writer():
            self._take_turn_soon()

    def _may_read(self) -> bool:
        return self._connection is None or self._connection.readable()

    def _may_write(self) -> bool:
        try:
            return self._connection is None or self._connection.writable()
        except OSError:
            return True  # the next send raises it

    def _park_reader(self) -> bool:
        if not self._reader_parked and not self._may_read():
            assert self._connection is not None
            self._reader_parked = self._connection.must_wait_to_read()
        return self._reader_parked

    def _park_writer(self) -> bool:
        if not self._writer_parked and not self._may_write():
            assert self._connection is not None
            self._writer_parked = self._connection.must_wait_to_write()
        return self._writer_parked

    def _unpark(self) -> None:
        connection = self._connection
        if connection is not None:
            if self._reader_parked:
                connection.awake(writer=False)
            if self._writer_parked:
                connection.awake(writer=True)
        self._reader_parked = self._writer_parked = False

    # -- what the transport asks of its loop ------------------------------------------------------------------------

    def add_reader(self, fd: int, callback: Callable[..., object], *args: Any) -> asyncio.Handle:
        """Call back whenever a receive would not wait."""
        if self._phase is Phase.TCP:
            return cast("asyncio.Handle", self._loop._add_reader(fd, callback, *args))
        self._reader = events.Handle(callback, args, self._loop, None)
        handle = self._reader
        if self._phase is Phase.UNDECIDED:
            self._want(sending=False)
        else:
            self._take_turn_soon()
        return handle

    def remove_reader(self, fd: int) -> bool:
        """Call back no more."""
        if self._phase is Phase.TCP:
            return bool(self._loop._remove_reader(fd))
        reader, self._reader = self._reader, None
        if self._reader_parked and self._connection is not None:
            self._connection.awake(writer=False)
        self._reader_parked = False
        if reader is not None:
            reader.cancel()
        return reader is not None

    def add_writer(self, fd: int, callback: Callable[..., object], *args: Any) -> asyncio.Handle:
        """Call back whenever a send would not wait."""
        if self._may_send and self._connection is None and self._phase is not Phase.BROKEN:
            return cast("asyncio.Handle", self._loop._add_writer(fd, callback, *args))
        self._writer = events.Handle(callback, args, self._loop, None)
        handle = self._writer
        if self._phase is Phase.UNDECIDED:
            self._want(sending=True)
        else:
            self._take_turn_soon()
        return handle

    def remove_writer(self, fd: int) -> bool:
        """Call back no more."""
        writer, self._writer = self._writer, None
        if self._writer_parked and self._connection is not None:
            self._connection.awake(writer=True)
        self._writer_parked = False
        if writer is None:
            return bool(self._loop._remove_writer(fd))
        writer.cancel()
        return True

    # -- what else it asks of its socket ----------------------------------------------------------------------------

    def shutdown(self, how: int) -> None:
        """As `socket.shutdown`; one that comes before it is decided is carried out then. Raises OSError."""
        connection = self._connection
        if how != _std.SHUT_WR:
            raise OSError(errno.EOPNOTSUPP, "a transport's socket is closed, or shut down for writing")
        if connection is not None:
            connection.shutdown_write()
        elif not self._may_send:
            self._end_due = True
            self._want(sending=True)
        else:
            _Plain.shutdown(self._sock, how)

    def _end_writing(self, shutdown: Callable[[], None]) -> None:
        """Carry out a shutdown that came before it was decided; what fails, receiving tells."""
        if self._end_due:
            self._end_due = False
            try:
                shutdown()
            except OSError:
                pass

    def close(self) -> None:
        """Close the socket; nothing of it is in the selector afterwards, whose descriptors others may get next."""
        if self._let_go():
            self._sock.close()

    def bury(self) -> None:
        """Close from a destructor, which may run in any thread, and inside the driver's locks: soon, elsewhere."""
        if self._phase is Phase.CLOSED or sys.is_finalizing():
            return
        try:
            self._loop.call_soon_threadsafe(self.close)
        except RuntimeError:  # the loop is closed
            self._let_go()
            if (fd := _Plain.detach(self._sock)) >= 0:
                _thread.start_new_thread(blocking._bury, (None, self._link, None, fd))

    def _let_go(self) -> bool:
        if self._phase is Phase.CLOSED:
            return False
        self._enter(Phase.CLOSED)
        self._reader = self._writer = None
        connection, self._connection = self._connection, None
        if connection is not None:
            self._loop._remove_reader(connection.fd)
        return True

    def fileno(self) -> int:
        """The TCP descriptor, which tells nothing of the bytes in shared memory; -1 when closed."""
        return _Plain.fileno(self._sock)

    def gettimeout(self) -> float | None:
        """As `socket.gettimeout`."""
        return self._sock.gettimeout()

    def setblocking(self, flag: bool) -> None:
        """As `socket.setblocking`."""
        self._sock.setblocking(flag)

    def getsockname(self) -> Any:
        """As `socket.getsockname`."""
        return self._sock.getsockname()

    def getpeername(self) -> Any:
        """As `socket.getpeername`."""
        return self._sock.getpeername()

    def getsockopt(self, *arguments: Any) -> Any:
        """As `socket.getsockopt`."""
        return self._sock.getsockopt(*arguments)

    def setsockopt(self, *arguments: Any) -> None:
        """As `socket.setsockopt`."""
        self._sock.setsockopt(*arguments)

    def get_inheritable(self) -> bool:
        """As `socket.get_inheritable`."""
        return self._sock.get_inheritable()

    def dup(self) -> Any:
        """As `socket.dup`. Raises OSError (EOPNOTSUPP) for a connection that uses shared memory, or may yet."""
        if not self.uses_tcp:
            raise OSError(errno.EOPNOTSUPP, "this connection cannot be duplicated: its bytes are in shared memory")
        return self._sock.dup()


class LoopOfTransport:
    """The loop as a transport sees it: whether its descriptor is ready is the carrier's to say."""

    def __init__(self, loop: Any, carrier: Carrier) -> None:
        self._loop = loop
        self._add_reader, self._remove_reader = carrier.add_reader, carrier.remove_reader
        self._add_writer, self._remove_writer = carrier.add_writer, carrier.remove_writer
        self.call_soon = loop.call_soon

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

# SPDX-License-Identifier: Apache-2.0
"""Giving the descriptor of a connection over shared memory away: `detach`, `dup`, `fromfd`, TLS that takes it.

Whoever gets a descriptor reads and writes it with the system's own calls, so its bytes must be behind it. A `Relay`
puts one end of a local TCP connection in the descriptor's place (the number stays), and two threads carry the bytes
between the other end and the rings. Slower than either alone, but it works at any time, in the middle of a stream too.

    program --- F (was TCP; now `outer`) === `inner` --- two threads --- rings --- peer
                                              kept: TCP to the peer, under another number, as the connection's witness

Urgent data (MSG_OOB) goes over TCP, past the rings; a third thread passes on what the peer sends, after what is in the
ring by then. So SO_OOBINLINE works behind a relay, though the place of the byte is not kept exactly.

States: both directions run -> one has ended -> both have -> closed. An end of file in one direction is passed on as one
(half-close), a reset as a reset, once what came before it is through. The program may close its end, or a process that
inherited it may go on using it: the relay lives until both directions have ended, and no longer than this process,
which at its exit waits a little for what is on its way.

The names of the connection are the relay's: the descriptor itself would tell those of the local connection.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import select
import socket
import struct
import termios
import threading
import time
from typing import Any

from ism.eventfd import make_eventfd, raise_eventfd
from ism.smc import info, monitor
from ism.smc.channel import Channel
from ism.smc.link import Link

_CHUNK = 1 << 18
_EXIT_S = 5.0
_URGENT_S = 0.1
_LOOK_S = 0.001
_SIOCATMARK = 0x8905
"""linux/sockios.h."""
_Plain = socket.SocketType

_live: set[Relay] = set()
_lock = threading.Lock()


class Relay:
    """Carries the bytes of one connection for a descriptor that was given away.

    Attributes: `local`, `remote` (names of the connection), `inode` (of the socket that is behind the descriptor).
    """

    def __init__(self, fd: int, link: Link, channel: Channel) -> None:
        """Put a local TCP connection in the place of the descriptor `fd`, and take link and channel over.

        Raises: OSError; then nothing has changed.
        """
        inheritable, blocking = os.get_inheritable(fd), os.get_blocking(fd)
        self.local = _name_of(link.raw.getsockname)
        self.remote = channel.peername
        self._link, self._channel = link, channel
        assert link.connection is not None
        self._delivered = link.connection.endpoint.received_bytes
        inner, outer = _connected_pair(link.raw.family)
        with contextlib.ExitStack() as undo:
            undo.callback(inner.close)
            undo.callback(outer.close)
            self._over = make_eventfd()
            undo.callback(os.close, self._over)
            self._kept = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
            undo.callback(os.close, self._kept)
            link.move(self._kept)
            undo.pop_all()
        self._inner = inner
        self._busy = False
        self._left = 2
        self._received, self._sent = threading.Event(), threading.Event()
        self._ending = threading.Lock()
        self.inode = os.fstat(outer.fileno()).st_ino
        channel.move(link.raw)
        os.set_blocking(outer.fileno(), blocking)
        inner.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)  # so that its place shows
        link.raw.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 0)
        os.dup2(outer.fileno(), fd, inheritable)
        outer.close()
        with _lock:
            _live.add(self)
        monitor.track(self)
        for direction in (self._to_program, self._to_peer, self._urgent):
            threading.Thread(target=direction, name="ism-smc relay", daemon=True).start()

    def smc_info(self) -> info.Info:
        """Tell how the bytes travel."""
        return info.describe(self._link, None, self.local, self.remote)

    def _to_program(self) -> None:
        try:
            while data := self._channel.recv(_CHUNK, None):
                try:
                    self._inner.sendall(data)
                    self._delivered += len(data)
                except OSError:  # the program has closed: what it wrote goes on, then the peer learns that nobody reads
                    self._received.set()
                    self._sent.wait()
                    self._abort_connection()
                    break
            else:
                with contextlib.suppress(OSError):
                    self._inner.shutdown(socket.SHUT_WR)
        except OSError:
            self._reset_program()
        finally:
            self._received.set()
            self._one_ended()

    def _to_peer(self) -> None:
        readable = select.poll()
        readable.register(self._inner.fileno(), select.POLLIN)
        try:
            while True:
                try:
                    readable.poll()
                    urgent = fcntl.ioctl(self._inner.fileno(), _SIOCATMARK, bytes(4)) != bytes(4)
                    data = self._inner.recv(1 if urgent else _CHUNK)
                except (OSError, ValueError):
                    self._abort_connection()
                    break
                self._busy = True
                if urgent and data:
                    self._link.raw.send(data, socket.MSG_OOB)
                    self._busy = False
                    continue
                if not data:
                    self._channel.shutdown(socket.SHUT_WR)
                    break
                self._channel.send_all(data, None)
                self._busy = False
        except OSError:
            self._sent.set()
            self._received.wait()  # what the peer has sent before it ended is the program's
            self._reset_program()
        finally:
            self._busy = False
            self._sent.set()
            self._one_ended()

    def _urgent(self) -> None:
        """Pass the peer's urgent data on, after what it had sent before, until the relay ends."""
        poll = select.poll()
        poll.register(self._over, select.POLLIN)
        poll.register(self._kept, select.POLLPRI)
        while True:
            for fd, events in poll.poll():
                if fd == self._over:
                    os.close(fd)
                    return
                passed = False
                if events & select.POLLPRI:
                    with contextlib.suppress(OSError):
                        self._pass_urgent()
                        passed = True
                if not passed:
                    poll.unregister(fd)  # one of the two has ended

    def _pass_urgent(self) -> None:
        byte = self._link.raw.recv(1, socket.MSG_OOB | socket.MSG_DONTWAIT)
        end = time.monotonic() + _URGENT_S
        while not self._nothing_to_program() and time.monotonic() < end:
            time.sleep(_LOOK_S)
        self._inner.send(byte, socket.MSG_OOB)

    def _nothing_to_program(self) -> bool:
        connection = self._link.connection
        if connection is None:
            return True
        return not connection.readable() and connection.endpoint.received_bytes == self._delivered

    def _abort_connection(self) -> None:
        connection = self._link.connection
        if connection is not None:
            connection.close(abort=True)

    def _reset_program(self) -> None:
        with contextlib.suppress(OSError):
            self._inner.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._inner.shutdown(socket.SHUT_RD)  # so that the other thread, should it wait there, ends too

    def _one_ended(self) -> None:
        with self._ending:
            self._left -= 1
            if self._left:
                return
        with _lock:
            _live.discard(self)
        raise_eventfd(self._over)
        self._channel.stop()
        self._link.close()
        os.close(self._kept)
        self._inner.close()

    def idle(self) -> bool:
        """Whether nothing of the program's is on its way."""
        if self._busy:
            return False
        try:
            return fcntl.ioctl(self._inner.fileno(), termios.FIONREAD, bytes(4)) == bytes(4)
        except (OSError, ValueError):
            return True

    def left_by_fork(self) -> None:
        """Close, in a forked child, what only the parent's threads use."""
        for fd in (self._kept, self._over):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._inner.close()


def relay_of(fd: int) -> Relay | None:
    """Return the relay behind a descriptor of this process."""
    if not _live:
        return None
    try:
        inode = os.fstat(fd).st_ino
    except OSError:
        return None
    with _lock:
        return next((relay for relay in _live if relay.inode == inode), None)


def _connected_pair(family: int) -> tuple[socket.SocketType, socket.SocketType]:
    """Connect two TCP sockets of this host with each other. Raises OSError."""
    listener = _Plain(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    one = _Plain(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        listener.listen(1)
        one.settimeout(None)
        one.connect(listener.getsockname())
        while True:
            fd, peer = listener._accept()  # type: ignore[attr-defined]
            if peer == one.getsockname():
                break
            os.close(fd)  # somebody else was first
        other = _Plain(family, socket.SOCK_STREAM, 0, fd)
        other.settimeout(None)
        for end in (one, other):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        one.close()
        raise
    finally:
        listener.close()
    return one, other


def _name_of(get: Any) -> Any:
    try:
        return get()
    except OSError:
        return None


@atexit.register
def _let_through() -> None:
    """Before the program ends: what it has written to a relayed descriptor goes to the peer, as TCP's would."""
    end = time.monotonic() + _EXIT_S
    quiet = 0
    while quiet < 2 and time.monotonic() < end:
        with _lock:
            relays = list(_live)
        if not relays:
            return
        quiet = quiet + 1 if all(relay.idle() for relay in relays) else 0
        time.sleep(_LOOK_S)


def _after_fork() -> None:
    global _lock  # noqa: PLW0603 (a lock belongs to one process)
    _lock = threading.Lock()
    for relay in list(_live):
        relay.left_by_fork()
    _live.clear()


os.register_at_fork(after_in_child=_after_fork)

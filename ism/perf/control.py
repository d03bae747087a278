# SPDX-License-Identifier: Apache-2.0
"""The connection on which client and server of `ism perf` talk: plain TCP, whatever is measured beside it.

Nothing here sleeps in anything but one poll, which other descriptors can end.
"""

from __future__ import annotations

import importlib
import select
import socket
import time
from collections.abc import Callable, Iterable
from typing import Final

from ism.errors import IsmError
from ism.perf.flows import PerfError, Run, Where
from ism.perf.parameters import Parameters
from ism.perf.protocol import Conversation, Failed, Message, printable

OPEN_S: Final = 120.0
"""Longest preparation: in a slow virtual machine, with kernels to compile first."""
IDLE_S: Final = 60.0
"""A test in which nothing moves for so long is given up."""
_SEND_S: Final = 10.0
_PART: Final = 1 << 16


class Control:
    """One end of the talk. Attributes: `sock`, `peer` (its numeric host)."""

    def __init__(self, sock: socket.socket, *, client: bool) -> None:
        """Take over a connected socket."""
        self.sock = sock
        self._talk = Conversation(client=client)
        self._other = "server" if client else "client"
        sock.settimeout(_SEND_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer = numeric_host(sock.getpeername())

    def send(self, message: Message) -> None:
        """Say it. Raises PerfError when the other end is gone, LocalProtocolError."""
        try:
            self.sock.sendall(self._talk.send(message))
        except OSError as exc:
            raise PerfError(f"the {self._other} went away ({reason_of(exc)})") from exc

    def give_up(self, exc: BaseException) -> None:
        """Say why this end gives up, if that can be said."""
        try:
            self.send(Failed(reason_of(exc)))
        except PerfError:
            pass

    def receive(self, until_s: float, others: Iterable[int] = ()) -> Message | None:
        """Wait for a message, until a moment of `time.monotonic`; None: not yet, or one of `others` is readable.

        Raises: PerfError (the other end is gone, or gives up), RemoteProtocolError.
        """
        others = [fd for fd in others if fd >= 0]
        while True:
            message = self._talk.next()
            if isinstance(message, Failed):
                raise PerfError(f"the {self._other} gave up: {message.reason}")
            if message is not None:
                return message
            if self.sock.fileno() not in wait([self.sock.fileno(), *others], until_s - time.monotonic()):
                return None
            try:
                data = self.sock.recv(_PART, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError as exc:
                raise PerfError(f"the {self._other} went away ({reason_of(exc)})") from exc
            if not data:
                raise PerfError(f"the {self._other} went away")
            self._talk.feed(data)

    def finish(self, patience_s: float = 2.0) -> None:
        """Close so that what was said last arrives: nothing may be left unread."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
            self.sock.settimeout(patience_s)
            end_s = time.monotonic() + patience_s
            while self.sock.recv(_PART) and time.monotonic() < end_s:
                pass
        except OSError:
            pass
        self.sock.close()


def wait(fds: Iterable[int], timeout_s: float) -> list[int]:
    """Wait until one of some descriptors is readable; return those that are."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(max(0.0, timeout_s) * 1000)]


def numeric_host(address: tuple[object, ...]) -> str:
    """Return the host of a socket address; an IPv4 one as such, also where it came by an IPv6 socket."""
    host = str(address[0])
    if host.startswith("::ffff:") and "." in host:
        return host.removeprefix("::ffff:")
    scope = address[3] if len(address) == 4 else 0
    return f"{host}%{scope}" if scope and "%" not in host else host


def surface(parameters: Parameters) -> Callable[[Run, Where], None]:
    """Import the module that moves bytes by the surface that is asked for, and return its `work`."""
    work: Callable[[Run, Where], None] = importlib.import_module(f"ism.perf.on_{parameters.api}").work
    return work


def reason_of(exc: BaseException) -> str:
    """Return an exception in one line, for people."""
    if isinstance(exc, OSError) and exc.strerror:
        return printable(exc.strerror)
    if isinstance(exc, OSError | IsmError) or type(exc).__module__.startswith("trio"):
        return printable(exc) or type(exc).__name__
    return printable(f"{type(exc).__name__}: {exc}")


class Idle:
    """Notices that nothing has moved for a long time."""

    def __init__(self, run: Run) -> None:
        self._run, self._moved, self._since_s = run, -1, time.monotonic()

    def check(self) -> None:
        """Look. Raises PerfError."""
        now, moved = time.monotonic(), self._run.moved()
        if moved != self._moved:
            self._moved, self._since_s = moved, now
        elif now > self._since_s + IDLE_S:
            raise PerfError(f"nothing has moved for {IDLE_S:g} s")

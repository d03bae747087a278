# SPDX-License-Identifier: Apache-2.0
"""Pairs of connected blocking sockets for tests: plain TCP, which is the reference, and `ism.smc.blocking`.

A maker lends the module whose sockets it makes, so that a test can also make sockets of its own there. `Twins` holds
a pair of each of two makers and runs every operation on both, TCP first: the kernel tells what is on its way there.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import importlib.util
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest

from ism.driver import open_device
from ism.errors import IsmError

LIMIT_S = 20
LOOPBACK = "127.0.0.1"
UNDER_TEST = "ism.smc.blocking"


class PairMaker(Protocol):
    """Makes connected sockets.

    Attributes: `name`, `module` (with `socket`, `create_server`, `create_connection`),
    `in_kernel` (whether the kernel carries the bytes).
    """

    name: str
    module: Any
    in_kernel: bool

    def make(self) -> tuple[Any, Any]:
        """Connect two sockets: (client, server). The caller closes them."""

    def close(self) -> None:
        """Let go of what the maker itself holds open."""


class TcpPairs:
    """The standard library's sockets over loopback TCP."""

    name = "TCP"
    in_kernel = True

    def __init__(self, module: Any = socket) -> None:
        self.module = module
        self._listener = module.create_server((LOOPBACK, 0))

    def make(self) -> tuple[Any, Any]:
        client = self.module.create_connection(self._listener.getsockname())
        server, _ = self._listener.accept()
        return client, server

    def close(self) -> None:
        self._listener.close()


class ChangedTcpPairs(TcpPairs):
    """TCP pairs of another class of socket."""

    def __init__(self, kind: type[socket.socket]) -> None:
        super().__init__()
        self.name = kind.__name__
        self._kind = kind

    def make(self) -> tuple[Any, Any]:
        client, server = (self._kind(fileno=end.detach()) for end in super().make())
        client.settimeout(None)
        server.settimeout(None)
        return client, server


class SmcPairs(TcpPairs):
    """Sockets of `ism.smc.blocking` that have found shared memory; a manager must run."""

    name = "SMC"
    in_kernel = False

    def __init__(self) -> None:
        super().__init__(importlib.import_module(UNDER_TEST))

    def make(self) -> tuple[Any, Any]:
        client, server = super().make()
        greet(client, server)
        for end in (client, server):
            assert end.smc_info().mode == "SMC", end.smc_info()
        return client, server


def greet(client: Any, server: Any) -> None:
    """Send a byte each way, each end in a thread of its own: afterwards both know how the bytes travel."""

    def answer() -> None:
        server.settimeout(LIMIT_S)
        if server.recv(1) == b"c":
            server.sendall(b"s")
        server.settimeout(None)

    other = threading.Thread(target=answer)
    other.start()
    try:
        client.settimeout(LIMIT_S)
        client.sendall(b"c")
        assert client.recv(1) == b"s"
        client.settimeout(None)
    finally:
        other.join()


def skip_unless_written() -> None:
    """Skip the test when there is no module to test."""
    if importlib.util.find_spec(UNDER_TEST) is None:
        pytest.skip(f"there is no {UNDER_TEST}")


@contextlib.contextmanager
def manager_process(directory: Path) -> Iterator[dict[str, str]]:
    """Run a manager in a process of its own. Lends the environment in which programs find it, and no other."""
    command = [sys.executable, "-m", "ism", "manager", "--quiet", "--run-dir", str(directory)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as manager:
        try:
            _wait_until_it_serves(manager, f"vfio-user:{directory / 'device.sock'}")
            yield {"ISM_RUN_DIR": str(directory), "ISM_DEVICE": ""}
        finally:
            manager.terminate()


def _wait_until_it_serves(manager: subprocess.Popen[bytes], device: str) -> None:
    patience = time.monotonic() + LIMIT_S
    while True:
        try:
            open_device(device).close()
        except IsmError:
            assert manager.poll() is None, "the manager ended"
            assert time.monotonic() < patience, "the manager does not serve"
            time.sleep(0.01)
        else:
            return


@contextlib.contextmanager
def smc_pairs(directory: Path) -> Iterator[SmcPairs]:
    """Lend a maker of SMC pairs with a manager of its own; this process uses that manager meanwhile."""
    from ism.smc.default import close_default

    with manager_process(directory) as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value) if value else patch.delenv(name, raising=False)
        close_default()
        pairs = SmcPairs()
        try:
            yield pairs
        finally:
            pairs.close()
            close_default()


# Two pairs, one operation --------------------------------------------------------------------------------------


END_NAMES = ("the client", "the server")


class Difference(AssertionError):
    """The pair under test did something else than TCP."""


@dataclass(frozen=True)
class Raised:
    """What an operation raised: the class of the exception and, for an OSError, its number."""

    kind: type[BaseException]
    errno: int | None = None

    def __repr__(self) -> str:
        return self.kind.__name__ if self.errno is None else f"{self.kind.__name__} {self.errno}"


def outcome(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or what it raises as `Raised`."""
    try:
        value = call()
    except Difference:
        raise
    except Exception as exc:
        return Raised(type(exc), exc.errno if isinstance(exc, OSError) else None)
    return bytes(value) if isinstance(value, (bytearray, memoryview)) else value


def is_broken(found: Any) -> bool:
    return isinstance(found, Raised) and found.kind in (BrokenPipeError, ConnectionResetError)


def either_breaks(one: Any, other: Any) -> bool:
    return is_broken(one) and is_broken(other)


@contextlib.contextmanager
def time_limit(seconds: float = LIMIT_S) -> Iterator[None]:
    """Turn what hangs, in the main thread, into a `Difference`."""

    def ring(*_: Any) -> None:
        raise Difference(f"hangs for more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


_TCP_INFO = struct.Struct("<B7x 24I 4Q 6I 4Q 2I 2Q")
_CLOSED = 7
_READABLE = select.POLLIN | select.POLLHUP | select.POLLERR | select.POLLRDHUP


def tcp_info(sock: socket.socket) -> tuple[int, int, int]:
    """Return the state of a TCP connection, how many bytes it was given to send, and how many have come."""
    info = _TCP_INFO.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size))
    return info[0], info[41] - info[42] + info[31], info[28]


def is_open(sock: Any) -> bool:
    """Whether a socket still has its descriptor: open files keep that of a closed one."""
    return int(socket.SocketType.fileno(sock)) >= 0


def unread_bytes(sock: socket.socket) -> int:
    """Return how many bytes wait in a TCP socket."""
    return int(struct.unpack("i", fcntl.ioctl(socket.SocketType.fileno(sock), termios.FIONREAD, b"1234"))[0])


def poll(sock: Any, timeout_s: float = 0) -> int:
    """Return the events of a socket, once it is readable or the time is over."""
    poller = select.poll()
    poller.register(socket.SocketType.fileno(sock), select.POLLIN | select.POLLRDHUP)
    return dict(poller.poll(timeout_s * 1000)).get(socket.SocketType.fileno(sock), 0)


def is_readable(sock: Any) -> bool:
    return bool(poll(sock) & _READABLE)


@dataclass
class Side:
    """A pair: `ends` are client and server, `files` what `makefile` gave for each."""

    module: Any
    ends: list[Any]
    files: list[Any] = field(default_factory=lambda: [None, None])
    extra: list[Any] = field(default_factory=list)

    def close(self) -> None:
        for one in [*self.files, *self.ends, *self.extra]:
            if one is not None:
                with contextlib.suppress(OSError, ValueError):
                    one.close()


class Twins:
    """A TCP pair and a pair under test, in which the same has happened."""

    def __init__(self, reference: PairMaker, tested: PairMaker) -> None:
        self.reference = Side(reference.module, list(reference.make()))
        self.tested = Side(tested.module, list(tested.make()))
        for end in [*self.reference.ends, *self.tested.ends]:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # so that nothing waits to be sent
        self.connected = True  # to each other
        self._both_in_kernel = tested.in_kernel
        self._finished = [False, False]
        self._deaf = [False, False]
        self._doomed = [False, False]

    def close(self) -> None:
        self.reference.close()
        self.tested.close()

    # What TCP knows

    def tcp(self, end: int) -> socket.socket:
        found: socket.socket = self.reference.ends[end]
        return found

    def would_block(self, end: int) -> bool:
        """Whether a receive on this end of TCP would wait."""
        return is_open(self.tcp(end)) and not is_readable(self.tcp(end))

    def unread(self, end: int) -> int:
        return unread_bytes(self.tcp(end)) if is_open(self.tcp(end)) else 0

    def at_end(self, end: int) -> bool:
        """Whether no more bytes can come."""
        return not is_open(self.tcp(end)) or bool(poll(self.tcp(end)) & ~select.POLLIN)

    def sends_into_nothing(self, end: int) -> bool:
        """Whether the peer has closed and this end of TCP has not noticed: the next send goes, and is refused."""
        end_is_open, peer_is_open = is_open(self.tcp(end)), is_open(self.tcp(1 - end))
        return self.connected and end_is_open and not peer_is_open and not self.is_over(end)

    def is_over(self, end: int) -> bool:
        """Whether TCP has ended in both directions, or by a reset."""
        return is_open(self.tcp(end)) and tcp_info(self.tcp(end))[0] == _CLOSED

    def resets_the_sender(self, end: int) -> bool:
        """Whether the peer of this end has shut down both directions: TCP answers what still comes with a reset."""
        return self.connected and self._finished[1 - end] and self._deaf[1 - end] and is_open(self.tcp(1 - end))

    # Operations

    def both(self, what: str, call: Callable[[Side], Any], *, allow: Callable[[Any, Any], bool] | None = None) -> Any:
        """Run an operation on both pairs and compare. Returns the outcome.

        `allow` is given both outcomes when they differ, and says whether they may.
        """
        before = [self._about_to_close(end) for end in (0, 1)] if self.connected else []
        try:
            with time_limit():
                expected = outcome(lambda: call(self.reference))
        except Difference:
            raise AssertionError(f"{what} hangs on TCP: the test must not do it here") from None
        if before:
            for end in (0, 1):
                self._note_close(end, *before[end])
            self.settle(what)
        try:
            with time_limit():
                found = outcome(lambda: call(self.tested))
        except Difference as exc:
            raise Difference(f"{what}: TCP gives {expected!r}, this {exc}") from None
        if self.connected and self._both_in_kernel:
            self._catch_up()
        if (type(found), found) != (type(expected), expected) and not (allow and allow(expected, found)):
            raise Difference(f"{what}: TCP gives {_short(expected)}, this {_short(found)}{_where(expected, found)}")
        return expected

    def shut(self, end: int, how: int) -> Any:
        """Shut down an end on both."""
        return self.both(f"shutdown({how}) of {END_NAMES[end]}", lambda side: self._shut(side, end, how))

    def _shut(self, side: Side, end: int, how: int) -> Any:
        found = side.ends[end].shutdown(how)
        if side is self.reference:
            self._deaf[end] |= how != socket.SHUT_WR
            self._finished[end] |= how != socket.SHUT_RD
        return found

    def send(self, what: str, end: int, call: Callable[[Any], Any], *, nothing: bool = False) -> Any:
        """Run an operation that sends at least a byte, or nothing, whatever has become of the peer."""
        what = f"{what} by {END_NAMES[end]}"
        if not self.sends_into_nothing(end):
            which = either_breaks if what.startswith("sendfile") else None  # the kernel's own gives EPIPE after a reset
            return self.both(what, lambda side: call(side.ends[end]), allow=which)

        def refused(expected: Any, found: Any) -> bool:
            return is_broken(found) and not isinstance(expected, Raised)

        first = self.both(f"{what}, first after the close", lambda side: call(side.ends[end]), allow=refused)
        if not isinstance(first, Raised) and not nothing:
            self._again(f"{what}, second after the close", end)
            self._again(f"{what}, third after the close", end)
        return first

    def _again(self, what: str, end: int) -> None:
        self.both(what, lambda side: side.ends[end].send(b"again"), allow=either_breaks)

    def same_readiness(self, end: int, patience_s: float = 2) -> None:
        """Check that an end is ready for reading on both, or on neither."""
        if not is_open(self.tcp(end)) or self.tested.ends[end].fileno() < 0:
            return
        expected = is_readable(self.tcp(end))
        deadline = time.monotonic() + patience_s
        while is_readable(self.tested.ends[end]) != expected:
            if time.monotonic() > deadline:
                raise Difference(
                    f"readiness of {END_NAMES[end]}: TCP is {'' if expected else 'not '}readable, this not so"
                )
            time.sleep(0.001)

    # Waiting for the kernel

    def _about_to_close(self, end: int) -> tuple[bool, bool, int]:
        sock = self.tcp(end)
        if not is_open(sock):
            return False, False, 0
        lingers = struct.unpack("ii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)) == (1, 0)
        return True, lingers or unread_bytes(sock) > 0, tcp_info(sock)[1]

    def _note_close(self, end: int, was_open: bool, aborts: bool, sent_before: int) -> None:
        if was_open and not is_open(self.tcp(end)):
            self._finished[end] = True
            self._doomed[1 - end] |= aborts
        elif was_open and tcp_info(self.tcp(end))[1] > sent_before:
            nobody = not is_open(self.tcp(1 - end))
            deaf = self._finished[1 - end] and self._deaf[1 - end]
            self._doomed[end] |= nobody or deaf
            self._doomed[1 - end] |= deaf

    def settle(self, what: str) -> None:
        """Wait until all that was sent by TCP has come: bytes, ends and resets."""
        deadline = time.monotonic() + LIMIT_S
        while not (self._settled(0) and self._settled(1)):
            assert time.monotonic() < deadline, f"{what}: TCP does not deliver; expected {vars(self)}"
            time.sleep(0.0002)

    def _catch_up(self) -> None:
        """Give a second TCP pair time to be where the first is; what it never comes to is a difference to be found."""
        deadline = time.monotonic() + 0.05
        for one, other in zip(self.reference.ends, self.tested.ends, strict=True):
            while is_open(one) and is_open(other) and time.monotonic() < deadline:
                if unread_bytes(one) == unread_bytes(other) and poll(one) == poll(other):
                    break
                time.sleep(0.0002)

    def _settled(self, end: int) -> bool:
        sock, peer = self.tcp(end), self.tcp(1 - end)
        if not is_open(sock):
            return True
        state, _, received = tcp_info(sock)
        if state == _CLOSED:
            return True
        if self._doomed[end] or (self._finished[0] and self._finished[1]):
            return False
        if is_open(peer) and received < tcp_info(peer)[1]:
            return False
        return not self._finished[1 - end] or bool(poll(sock) & select.POLLRDHUP)


def _short(found: Any) -> str:
    text = repr(found)
    return text if len(text) < 100 else f"{text[:80]}... ({len(found)} in all)"


def _where(one: Any, other: Any) -> str:
    """Tell where two byte strings begin to differ."""
    if not isinstance(one, bytes) or not isinstance(other, bytes):
        return ""
    same = next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), "none")
    return f", different from byte {same}"

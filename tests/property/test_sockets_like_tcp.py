# SPDX-License-Identifier: Apache-2.0
"""The same operations, in the same order, on two TCP sockets and on two of `ism.smc.blocking`: the same results.

One thread drives both pairs. The kernel is the model: each operation runs on TCP first, which tells whether it would
block and what is on its way, then on the pair under test. Compared are values, classes of exceptions, errno and
readiness for reading. To check the check, it also runs on TCP against TCP, and against TCP with a fault in it.

Left out, since it may differ: how much the buffers hold, urgent data, the buffer sizes that the kernel chooses itself,
and the first send after the peer's close, which TCP cannot refuse and we do.

One file: single calls and random sequences use the same pairs, calls and comparison.
"""

from __future__ import annotations

import array
import contextlib
import copy
import errno
import functools
import io
import os
import pickle
import random
import select
import socket
import struct
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from socket_pairs import (
    END_NAMES,
    LIMIT_S,
    LOOPBACK,
    ChangedTcpPairs,
    Difference,
    PairMaker,
    Raised,
    Side,
    SmcPairs,
    TcpPairs,
    Twins,
    is_open,
    outcome,
    skip_unless_written,
    smc_pairs,
    time_limit,
)

SHORT_S = 0.02
IN_FLIGHT = 32768
"""Bytes that every TCP socket takes without waiting for its reader."""
_BYTES = random.Random(2).randbytes(1 << 17)
PEEK, WAIT_ALL, DONT_WAIT = socket.MSG_PEEK, socket.MSG_WAITALL, socket.MSG_DONTWAIT


@pytest.fixture(scope="module")
def tcp() -> Iterator[TcpPairs]:
    pairs = TcpPairs()
    yield pairs
    pairs.close()


@pytest.fixture(scope="module")
def smc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmcPairs]:
    skip_unless_written()
    with smc_pairs(tmp_path_factory.mktemp("manager")) as pairs:
        yield pairs


@pytest.fixture(params=["tcp", "smc"])
def tested(request: pytest.FixtureRequest) -> PairMaker:
    found: PairMaker = request.getfixturevalue(request.param)
    return found


# Faults that must be found --------------------------------------------------------------------------------------


class PeekTakes(socket.socket):
    def recv(self, size: int, flags: int = 0) -> bytes:  # type: ignore[override]
        return super().recv(size, flags & ~PEEK)


class ShutdownIsForgotten(socket.socket):
    def shutdown(self, how: int) -> None:
        if how != socket.SHUT_WR:
            super().shutdown(how)


class TimeoutIsAnotherError(socket.socket):
    def recv(self, *arguments: Any) -> bytes:
        try:
            return super().recv(*arguments)
        except TimeoutError:
            raise BlockingIOError from None


class LastByteIsLost(socket.socket):
    def sendall(self, data: Any, flags: int = 0) -> None:  # type: ignore[override]
        super().sendall(memoryview(data).cast("B")[:-1], flags)


class CloseIsAlwaysOrderly(socket.socket):
    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.setblocking(False)
            while super().recv(1 << 20):
                pass
        super().close()


class NegativeSizeIsTaken(socket.socket):
    def recv(self, size: int, flags: int = 0) -> bytes:  # type: ignore[override]
        return b"" if isinstance(size, int) and size < 0 else super().recv(size, flags)


class ClosedIsAValueError(socket.socket):
    def send(self, *arguments: Any) -> int:
        if self.fileno() < 0:
            raise ValueError("closed")
        return super().send(*arguments)


FAULTS = [
    PeekTakes,
    ShutdownIsForgotten,
    TimeoutIsAnotherError,
    LastByteIsLost,
    CloseIsAlwaysOrderly,
    NegativeSizeIsTaken,
    ClosedIsAValueError,
]


# Single calls ---------------------------------------------------------------------------------------------------


def reuse(s: Any, level: int, option: int, value: Any) -> Any:
    s.setsockopt(level, option, value)
    return s.getsockopt(level, option)


def with_file(call: Callable[[Any], Any], *, text: bool = False, at: int = 0) -> Any:
    with tempfile.TemporaryFile("w+" if text else "w+b") as file:
        file.write("a file" if text else b"a file")
        file.seek(at)
        return call(file), file.tell()


def of_file(s: Any, call: Callable[[Any], Any], mode: str = "rb", **options: Any) -> Any:
    with contextlib.ExitStack() as stack:
        file = s.makefile(mode, **options)
        stack.callback(outcome, file.close)
        return call(file)


def address(found: Any) -> Any:
    return [bool(part) if isinstance(part, int) else part for part in found]


def closing(made: Any, call: Callable[[Any], Any]) -> Any:
    with made:
        return call(made)


def copied(s: Any) -> Any:
    return closing(s.dup(), lambda d: (d.family, d.type, d.proto, d.gettimeout(), d.get_inheritable(), d.fileno() >= 0))


def rewrapped(module: Any, s: Any) -> Any:
    fd = s.detach()
    return s.fileno(), closing(module.socket(fileno=fd), lambda d: (d.family, d.type, d.proto, d.gettimeout()))


def used(module: Any) -> Any:
    return module.create_server((LOOPBACK, 0))


def refused(module: Any) -> tuple[str, int]:
    with used(module) as server:
        return server.getsockname()


def ready(s: Any) -> Any:
    return [len(found) for found in select.select([s], [], [], 0)]


SOL, TCP_LEVEL = socket.SOL_SOCKET, socket.IPPROTO_TCP
LINGER = struct.Struct("ii")
NEAR = (LOOPBACK, 9)
SPACED = memoryview(bytearray(6))[::2]

# name: what to call with the module and the socket. None of them waits longer than the socket's timeout.
RECEIVES: dict[str, Callable[[Any, Any], Any]] = {
    "recv(5)": lambda m, s: s.recv(5),
    "recv(0)": lambda m, s: s.recv(0),
    "recv(5, MSG_PEEK) twice": lambda m, s: (s.recv(5, PEEK), s.recv(5, PEEK)),
    "recv(2, MSG_DONTWAIT)": lambda m, s: s.recv(2, DONT_WAIT),
    "recv(4, MSG_WAITALL)": lambda m, s: s.recv(4, WAIT_ALL),
    "recv(4, MSG_WAITALL | MSG_PEEK)": lambda m, s: s.recv(4, WAIT_ALL | PEEK),
    "recv(1, MSG_OOB)": lambda m, s: s.recv(1, socket.MSG_OOB),
    "recv(1, MSG_ERRQUEUE)": lambda m, s: s.recv(1, socket.MSG_ERRQUEUE),
    "recv_into(5)": lambda m, s: (s.recv_into(b := bytearray(5)), b),
    "recv_into(5, 3)": lambda m, s: (s.recv_into(b := bytearray(5), 3), b),
    "recv_into(5, 0)": lambda m, s: (s.recv_into(b := bytearray(5), 0), b),
    "recv_into(nothing)": lambda m, s: s.recv_into(bytearray()),
    "recv_into(array)": lambda m, s: (s.recv_into(b := array.array("H", [0, 0])), b),
    "recv_into(flags)": lambda m, s: (s.recv_into(b := bytearray(2), 0, PEEK), b),
    "recvfrom(5)": lambda m, s: s.recvfrom(5),
    "recvfrom_into(5)": lambda m, s: (s.recvfrom_into(b := bytearray(5)), b),
    "recvmsg(5)": lambda m, s: s.recvmsg(5),
    "recvmsg(0)": lambda m, s: s.recvmsg(0),
    "recvmsg(5, 100)": lambda m, s: s.recvmsg(5, 100),
    "recvmsg(2, 0, MSG_PEEK)": lambda m, s: s.recvmsg(2, 0, PEEK),
    "recvmsg_into": lambda m, s: (s.recvmsg_into([a := bytearray(2), b := bytearray(3)]), a, b),
    "recvmsg_into([])": lambda m, s: s.recvmsg_into([]),
    "makefile.read(3)": lambda m, s: of_file(s, lambda f: f.read(3)),
    "makefile.read1(3)": lambda m, s: of_file(s, lambda f: f.read1(3)),
    "makefile.readline": lambda m, s: of_file(s, lambda f: f.readline()),
    "makefile unbuffered.read(3)": lambda m, s: of_file(s, lambda f: f.read(3), buffering=0),
    "makefile unbuffered.readinto": lambda m, s: of_file(s, lambda f: f.readinto(bytearray(3)), buffering=0),
    "makefile, read twice": lambda m, s: of_file(s, lambda f: (outcome(lambda: f.read(9)), f.read(9))),
}
SENDS: dict[str, Callable[[Any, Any], Any]] = {
    "send": lambda m, s: s.send(b"x"),
    "send(bytearray)": lambda m, s: s.send(bytearray(b"xy")),
    "send(array)": lambda m, s: s.send(array.array("I", [1, 2])),
    "send(view of words)": lambda m, s: s.send(memoryview(b"12345678").cast("I")),
    "send(flags)": lambda m, s: s.send(b"x", DONT_WAIT | socket.MSG_NOSIGNAL),
    "sendall": lambda m, s: s.sendall(b"all"),
    "sendto": lambda m, s: s.sendto(b"x", NEAR),
    "sendto(flags)": lambda m, s: s.sendto(b"x", 0, NEAR),
    "sendmsg": lambda m, s: s.sendmsg([b"a", bytearray(b"b"), memoryview(b"")]),
    "sendmsg(address)": lambda m, s: s.sendmsg([b"a"], [], 0, NEAR),
    "sendmsg(descriptor)": lambda m, s: s.sendmsg([b"a"], [(SOL, socket.SCM_RIGHTS, array.array("i", [0]))]),
    "sendfile": lambda m, s: with_file(s.sendfile),
    "sendfile of a file that was read": lambda m, s: with_file(s.sendfile, at=3),
    "sendfile(offset, count)": lambda m, s: with_file(lambda f: s.sendfile(f, 2, 3)),
    "sendfile(BytesIO)": lambda m, s: s.sendfile(io.BytesIO(b"bytes")),
    "makefile.write": lambda m, s: of_file(s, lambda f: (f.write(b"x"), f.flush()), "wb"),
    "makefile unbuffered.write": lambda m, s: of_file(s, lambda f: f.write(b"x"), "wb", buffering=0),
    "makefile text.write": lambda m, s: of_file(s, lambda f: (f.write("\n"), f.flush()), "w"),
}
SENDS_OF_NOTHING: dict[str, Callable[[Any, Any], Any]] = {
    "send(nothing)": lambda m, s: s.send(b""),
    "sendall(nothing)": lambda m, s: s.sendall(b""),
    "sendmsg([])": lambda m, s: s.sendmsg([]),
    "sendfile(offset past the end)": lambda m, s: with_file(lambda f: s.sendfile(f, 100)),
}
OTHERS: dict[str, Callable[[Any, Any], Any]] = {
    **{f"recv({size!r})": lambda m, s, size=size: s.recv(size) for size in (-1, "x", None, 1.5, 2**63)},
    "recv()": lambda m, s: s.recv(),
    "recv(1, 'x')": lambda m, s: s.recv(1, "x"),
    "recv_into(bytes)": lambda m, s: s.recv_into(b"12345"),
    "recv_into(None)": lambda m, s: s.recv_into(None),
    "recv_into(too small)": lambda m, s: s.recv_into(bytearray(5), 6),
    "recv_into(negative)": lambda m, s: s.recv_into(bytearray(5), -1),
    "recv_into(spaced)": lambda m, s: s.recv_into(SPACED),
    "recvfrom(-1)": lambda m, s: s.recvfrom(-1),
    "recvfrom_into(too small)": lambda m, s: s.recvfrom_into(bytearray(5), 9),
    "recvmsg(-1)": lambda m, s: s.recvmsg(-1),
    "recvmsg(1, -1)": lambda m, s: s.recvmsg(1, -1),
    "recvmsg('x')": lambda m, s: s.recvmsg("x"),
    "recvmsg_into(bytes)": lambda m, s: s.recvmsg_into([b"no"]),
    "recvmsg_into(bytearray)": lambda m, s: s.recvmsg_into(bytearray(3)),
    "recvmsg_into(None)": lambda m, s: s.recvmsg_into(None),
    **{f"send({bad!r})": lambda m, s, bad=bad: s.send(bad) for bad in ("text", None, 7, [b"x"])},
    **{f"sendall({bad!r})": lambda m, s, bad=bad: s.sendall(bad) for bad in ("text", None, 7)},
    "send()": lambda m, s: s.send(),
    "send(spaced)": lambda m, s: s.send(SPACED),
    "send(bad flags)": lambda m, s: s.send(b"x", "flags"),
    "sendto(nowhere)": lambda m, s: s.sendto(b"x", "address"),
    "sendto(one argument)": lambda m, s: s.sendto(b"x"),
    "sendto(text)": lambda m, s: s.sendto("x", NEAR),
    "sendmsg(bytes)": lambda m, s: s.sendmsg(b"x"),
    "sendmsg([1])": lambda m, s: s.sendmsg([1]),
    "sendmsg(bad ancillary)": lambda m, s: s.sendmsg([b"x"], [(1,)]),
    "sendfile(None)": lambda m, s: s.sendfile(None),
    "sendfile(text)": lambda m, s: with_file(s.sendfile, text=True),
    "sendfile(count 0)": lambda m, s: with_file(lambda f: s.sendfile(f, 0, 0)),
    "sendfile(count -1)": lambda m, s: with_file(lambda f: s.sendfile(f, 0, -1)),
    **{f"shutdown({how!r})": lambda m, s, how=how: s.shutdown(how) for how in (0, 1, 2, 7, -1, "x")},
    "shutdown twice": lambda m, s: (s.shutdown(1), s.shutdown(1)),
    "shutdown, then send": lambda m, s: (s.shutdown(1), s.send(b"x")),
    "shutdown, then send nothing": lambda m, s: (s.shutdown(1), s.send(b"")),
    "shutdown, then recv": lambda m, s: (s.shutdown(0), s.recv(9), s.recv(9)),
    "close": lambda m, s: (s.close(), s.fileno(), s.close()),
    "with": lambda m, s: closing(s, lambda s: s.fileno() >= 0),
    "fileno": lambda m, s: s.fileno() >= 0,
    "inheritable": lambda m, s: (s.get_inheritable(), s.set_inheritable(True), s.get_inheritable()),
    **{
        f"settimeout({limit!r})": lambda m, s, limit=limit: (s.settimeout(limit), s.gettimeout(), s.getblocking())
        for limit in (None, 0, 0.0, 1.5, 3, -1, float("nan"), float("inf"), "x", 1e100)
    },
    **{
        f"setblocking({flag!r})": lambda m, s, flag=flag: (s.setblocking(flag), s.gettimeout(), s.getblocking())
        for flag in (True, False, 2, "x", None)
    },
    "timeout": lambda m, s: (s.timeout, s.gettimeout()),
    "getpeername": lambda m, s: address(s.getpeername()),
    "getsockname": lambda m, s: address(s.getsockname()),
    "family, type, proto": lambda m, s: (s.family, s.type, s.proto),
    "connect": lambda m, s: closing(used(m), lambda server: s.connect(server.getsockname())),
    "connect_ex": lambda m, s: closing(used(m), lambda server: s.connect_ex(server.getsockname())),
    "connect(refused)": lambda m, s: s.connect(refused(m)),
    "connect_ex(refused)": lambda m, s: s.connect_ex(refused(m)),
    **{
        f"connect({bad!r})": lambda m, s, bad=bad: s.connect(bad)
        for bad in ("x", None, (LOOPBACK,), (LOOPBACK, "x"), (LOOPBACK, 99999))
    },
    "bind": lambda m, s: s.bind((LOOPBACK, 0)),
    "bind(used)": lambda m, s: closing(used(m), lambda server: s.bind(server.getsockname())),
    "bind(elsewhere)": lambda m, s: s.bind(("192.0.2.1", 0)),
    "bind('x')": lambda m, s: s.bind("x"),
    "listen": lambda m, s: s.listen(),
    "listen(-1)": lambda m, s: s.listen(-1),
    "listen('x')": lambda m, s: s.listen("x"),
    "accept": lambda m, s: closing(s.accept()[0], lambda made: (made.family, made.gettimeout(), made.fileno() >= 0)),
    **{f"makefile({mode!r})": lambda m, s, mode=mode: of_file(s, lambda f: f.mode, mode) for mode in ("x", "rb+", "r")},
    "makefile(text, unbuffered)": lambda m, s: s.makefile("r", buffering=0),
    "makefile attributes": lambda m, s: of_file(s, lambda f: (f.readable(), f.writable(), f.seekable()), "rwb"),
    "makefile.seek": lambda m, s: of_file(s, lambda f: f.seek(0)),
    "makefile.write to a reader": lambda m, s: of_file(s, lambda f: f.write(b"x"), "rb"),
    "makefile.read of a writer": lambda m, s: of_file(s, lambda f: f.read(1), "wb"),
    "makefile outlives the socket": lambda m, s: of_file(
        s, lambda f: (s.close(), s.fileno() >= 0, f.read(1)), buffering=2
    ),
    "select": lambda m, s: ready(s),
    "getsockopt(SO_ERROR)": lambda m, s: (s.getsockopt(SOL, socket.SO_ERROR), s.getsockopt(SOL, socket.SO_ERROR)),
    **{
        f"getsockopt({name})": lambda m, s, name=name: s.getsockopt(SOL, getattr(socket, name))
        for name in ("SO_TYPE", "SO_PROTOCOL", "SO_DOMAIN", "SO_ACCEPTCONN", "SO_KEEPALIVE", "SO_REUSEADDR")
    },
    "getsockopt(TCP_NODELAY)": lambda m, s: s.getsockopt(TCP_LEVEL, socket.TCP_NODELAY),
    "getsockopt(SO_LINGER)": lambda m, s: LINGER.unpack(s.getsockopt(SOL, socket.SO_LINGER, LINGER.size)),
    "getsockopt(nonsense)": lambda m, s: s.getsockopt(SOL, 9999),
    "getsockopt(bad level)": lambda m, s: s.getsockopt(9999, 1),
    "getsockopt(too long)": lambda m, s: s.getsockopt(SOL, socket.SO_TYPE, 9999),
    "setsockopt(SO_RCVBUF)": lambda m, s: reuse(s, SOL, socket.SO_RCVBUF, 100_000),
    "setsockopt(SO_SNDBUF)": lambda m, s: reuse(s, SOL, socket.SO_SNDBUF, 100_000),
    "setsockopt(SO_RCVBUF, 1)": lambda m, s: reuse(s, SOL, socket.SO_RCVBUF, 1),
    "setsockopt(SO_KEEPALIVE)": lambda m, s: reuse(s, SOL, socket.SO_KEEPALIVE, 1),
    "setsockopt(SO_REUSEADDR)": lambda m, s: reuse(s, SOL, socket.SO_REUSEADDR, 1),
    "setsockopt(TCP_NODELAY)": lambda m, s: reuse(s, TCP_LEVEL, socket.TCP_NODELAY, 1),
    "setsockopt(TCP_KEEPIDLE)": lambda m, s: reuse(s, TCP_LEVEL, socket.TCP_KEEPIDLE, 7),
    "setsockopt(SO_LINGER)": lambda m, s: s.setsockopt(SOL, socket.SO_LINGER, LINGER.pack(1, 3)),
    "setsockopt(short SO_LINGER)": lambda m, s: s.setsockopt(SOL, socket.SO_LINGER, b"x"),
    "setsockopt(text)": lambda m, s: s.setsockopt(SOL, socket.SO_KEEPALIVE, "x"),
    "setsockopt(None)": lambda m, s: s.setsockopt(SOL, socket.SO_KEEPALIVE, None),
    "setsockopt(nonsense)": lambda m, s: s.setsockopt(SOL, 9999, 1),
    "is a socket": lambda m, s: isinstance(s, socket.socket),
    "pickle": lambda m, s: pickle.dumps(s),
    "copy": lambda m, s: copy.copy(s),
    "weak reference": lambda m, s: weakref.ref(s)() is s,
    "unknown attribute": lambda m, s: s.unknown,
}
GIVEN_AWAY: dict[str, Callable[[Any, Any], Any]] = {
    "detach, then recv": lambda m, s: (os.close(s.detach()), s.recv(1)),
    "detach and wrap": rewrapped,
    "dup": lambda m, s: copied(s),
}
LEAVES_A_MARK = (
    "close",
    "with",
    "makefile outlives",
    "shutdown",
    "listen",
    "connect",
    "bind",
    "settimeout",
    "setblocking",
)
HARMLESS = sorted(
    name for name in OTHERS if not name.startswith((*LEAVES_A_MARK, "setsockopt(SO_", "select"))
)  # the pair is as useful after such a call as before
CALLS = {**RECEIVES, **SENDS, **SENDS_OF_NOTHING, **OTHERS, **GIVEN_AWAY}


def subject(twins: Twins, state: str) -> None:
    """Bring the client of both sides into a state."""

    def replace(call: Callable[[Any, Any], Any]) -> None:
        twins.connected = False
        for side in (twins.reference, twins.tested):
            side.extra += side.ends
            made = side.module.socket(socket.AF_INET, socket.SOCK_STREAM)
            call(side, made)
            side.ends = [made, side.module.socket()]

    def listen(side: Side, s: Any) -> None:
        s.bind((LOOPBACK, 0))
        s.listen()

    def listen_and_connect(side: Side, s: Any) -> None:
        listen(side, s)
        side.extra.append(side.module.create_connection(s.getsockname()))

    def send(end: int, data: bytes) -> None:
        twins.both("send", lambda side: side.ends[end].send(data))

    steps: dict[str, Callable[[], Any]] = {
        "new": lambda: replace(lambda side, s: None),
        "bound": lambda: replace(lambda side, s: s.bind((LOOPBACK, 0))),
        "listening": lambda: replace(listen),
        "listening, one waits": lambda: replace(listen_and_connect),
        "after a refused connect": lambda: replace(lambda side, s: outcome(lambda: s.connect(refused(side.module)))),
        "connected": lambda: None,
        "bytes wait": lambda: send(1, b"wai\nting"),
        "writing shut": lambda: twins.shut(0, 1),
        "reading shut": lambda: twins.shut(0, 0),
        "both shut": lambda: twins.shut(0, 2),
        "reset": lambda: (send(0, b"unread"), twins.both("close", lambda side: side.ends[1].close())),
        "the peer's writing shut": lambda: twins.shut(1, 1),
        "the peer closed": lambda: twins.both("close", lambda side: side.ends[1].close()),
        "closed": lambda: twins.both("close", lambda side: side.ends[0].close()),
    }
    for part in state.split(" + "):
        steps[part]()


STATES = [
    "new",
    "bound",
    "listening",
    "listening, one waits",
    "after a refused connect",
    "connected",
    "bytes wait",
    "writing shut",
    "reading shut",
    "reading shut + bytes wait",
    "both shut",
    "the peer's writing shut",
    "bytes wait + the peer's writing shut",
    "the peer's writing shut + writing shut",
    "the peer closed",
    "bytes wait + the peer closed",
    "writing shut + the peer closed",
    "reset",
    "bytes wait + reset",
    "writing shut + reset",
    "the peer's writing shut + reset",
    "closed",
]


MEANT: dict[str, Callable[[Any], bool]] = {
    # TCP stays open and idle below, so it can neither be bound again nor is it readable when only reading is shut
    **dict.fromkeys(["bind", "bind(used)"], lambda found: found == Raised(OSError, errno.EINVAL)),
    **dict.fromkeys(["accept", "recv(1, MSG_OOB)"], lambda found: found == Raised(TimeoutError)),
}
"""What a call on connected sockets may give that TCP does not."""


def is_meant(name: str, connected: bool) -> Callable[[Any, Any], bool]:
    return lambda _, found: connected and MEANT.get(name, lambda _: False)(found)


@pytest.mark.parametrize("mode", ["with a timeout", "non-blocking"])
@pytest.mark.parametrize("state", STATES)
def test_every_single_call_in_a_state_gives_what_it_gives_on_tcp(
    tcp: TcpPairs, tested: PairMaker, state: str, mode: str
) -> None:
    differences = []
    for name, call in CALLS.items():
        twins = Twins(tcp, tested)
        try:
            subject(twins, state)
            for side in (twins.reference, twins.tested):
                if state != "closed":
                    side.ends[0].settimeout(SHORT_S if mode == "with a timeout" else 0)
            if name in SENDS or name in SENDS_OF_NOTHING:
                twins.send(name, 0, functools.partial(call, socket), nothing=name in SENDS_OF_NOTHING)
            else:
                one = functools.partial(lambda call, side: call(side.module, side.ends[0]), call)
                twins.both(name, one, allow=is_meant(name, twins.connected))
        except Difference as exc:
            differences.append(str(exc))
        finally:
            twins.close()
    assert not differences, "\n".join([f"{len(differences)} of {len(CALLS)} calls:", *differences])


# Random sequences -----------------------------------------------------------------------------------------------

ends = st.sampled_from([0, 1])
sizes = st.one_of(st.integers(0, 40), st.integers(0, IN_FLIGHT // 2), st.sampled_from([1, 2, 1000]))
small_sizes = st.one_of(st.integers(0, 40), st.integers(0, 2 * IN_FLIGHT))
recv_flags = st.sampled_from([0, 0, PEEK, DONT_WAIT, WAIT_ALL, PEEK | DONT_WAIT, PEEK | WAIT_ALL])
seldom = st.integers(0, 5).map(lambda number: number == 0)
HOW_TO_SEND: dict[str, Callable[[Any, bytes], Any]] = {
    "send": lambda s, data: s.send(data),
    "send without waiting": lambda s, data: s.send(data, DONT_WAIT | socket.MSG_NOSIGNAL),
    "sendall": lambda s, data: s.sendall(data),
    "sendall of a view": lambda s, data: s.sendall(memoryview(b"<" + data + b">")[1:-1]),
    "send of an array": lambda s, data: s.send(array.array("B", data)),
    "sendto": lambda s, data: s.sendto(data, NEAR),
    "sendmsg": lambda s, data: s.sendmsg([data[:3], bytearray(data[3:9]), b"", memoryview(data[9:])]),
}
HOW_TO_RECEIVE: dict[str, Callable[[Any, int, int], Any]] = {
    "recv": lambda s, size, flags: s.recv(size, flags),
    "recv_into": lambda s, size, flags: (s.recv_into(b := bytearray(size), 0, flags), bytes(b)),
    "recv_into a part": lambda s, size, flags: (s.recv_into(b := bytearray(size + 9), size, flags), bytes(b)),
    "recvfrom": lambda s, size, flags: s.recvfrom(size, flags),
    "recvfrom_into": lambda s, size, flags: (s.recvfrom_into(b := bytearray(size), 0, flags), bytes(b)),
    "recvmsg": lambda s, size, flags: s.recvmsg(size, 0, flags),
    "recvmsg_into": lambda s, size, flags: (
        s.recvmsg_into([a := bytearray(size // 2), b := bytearray(size - size // 2)], 0, flags),
        bytes(a + b),
    ),
}
OPTIONS = {
    "SO_RCVBUF": (SOL, socket.SO_RCVBUF, st.sampled_from([65536, 200_000])),
    "SO_SNDBUF": (SOL, socket.SO_SNDBUF, st.sampled_from([65536, 200_000])),
    "SO_KEEPALIVE": (SOL, socket.SO_KEEPALIVE, st.integers(0, 1)),
    "SO_REUSEADDR": (SOL, socket.SO_REUSEADDR, st.integers(0, 1)),
    "TCP_NODELAY": (TCP_LEVEL, socket.TCP_NODELAY, st.integers(0, 1)),
    "TCP_KEEPCNT": (TCP_LEVEL, socket.TCP_KEEPCNT, st.integers(1, 9)),
}
FILES = st.sampled_from([("rb", None), ("rb", 0), ("rb", 10), ("wb", None), ("wb", 0), ("rwb", None), ("r", None)])


class Sequences(RuleBasedStateMachine):
    """Both pairs, driven at random. What it runs on is set by `compare`."""

    reference: PairMaker
    pairs: PairMaker

    def __init__(self) -> None:
        super().__init__()
        self.twins = Twins(self.reference, self.pairs)
        self.sent = 0

    def teardown(self) -> None:
        self.twins.close()

    # What may be done without waiting for ever

    def may_receive(self, end: int, size: int = 0, flags: int = 0) -> bool:
        tcp = self.twins.tcp(end)
        if tcp.gettimeout() is not None:
            return True
        if flags & WAIT_ALL:
            return self.twins.unread(end) >= max(size, 1) or self.twins.at_end(end)
        return bool(flags & DONT_WAIT) or not self.twins.would_block(end)

    def room(self, end: int, size: int) -> bool:
        """Whether an end may send so much: TCP does not wait then, nor does it reset what we deliver."""
        return not self.twins.resets_the_sender(end) and self.twins.unread(1 - end) + size <= IN_FLIGHT

    def fresh(self, size: int) -> bytes:
        at = self.sent % (len(_BYTES) - size)
        self.sent += size
        return _BYTES[at : at + size]

    def run(self, what: str, end: int, call: Callable[[Any], Any]) -> Any:
        return self.twins.both(f"{what} by {END_NAMES[end]}", lambda side: call(side.ends[end]))

    # Rules

    @rule(end=ends, how=st.sampled_from(sorted(HOW_TO_SEND)), size=sizes)
    def send(self, end: int, how: str, size: int) -> None:
        if not self.room(end, size):
            return
        data = self.fresh(size)
        call = HOW_TO_SEND[how]
        self.twins.send(f"{how} of {size} bytes", end, lambda s: call(s, data), nothing=not size)

    @rule(end=ends, size=st.integers(1, 9000), offset=st.integers(0, 20), some=st.booleans())
    def send_a_file(self, end: int, size: int, offset: int, some: bool) -> None:
        if not self.room(end, size) or self.twins.sends_into_nothing(end) or self.twins.is_over(end):
            return
        data = self.fresh(size)

        def call(s: Any) -> Any:
            with tempfile.TemporaryFile() as file:
                file.write(data)
                file.seek(0)
                return s.sendfile(file, offset, size // 2 + 1 if some else None), file.tell()

        self.run("sendfile", end, call)

    @rule(end=ends, how=st.sampled_from(sorted(HOW_TO_RECEIVE)), size=small_sizes, flags=recv_flags)
    def receive(self, end: int, how: str, size: int, flags: int) -> None:
        if self.may_receive(end, size, flags):
            self.run(f"{how} of {size}, flags {flags:#x}", end, lambda s: HOW_TO_RECEIVE[how](s, size, flags))

    @rule(end=ends)
    def receive_all(self, end: int) -> None:
        if self.may_receive(end):
            self.run("recv of all", end, lambda s: s.recv(2 * IN_FLIGHT))

    @rule(end=ends)
    def readiness(self, end: int) -> None:
        self.twins.same_readiness(end)

    @rule(end=ends, limit=st.sampled_from([None, None, 0.0, SHORT_S]))
    def settimeout(self, end: int, limit: float | None) -> None:
        self.run(f"settimeout({limit})", end, lambda s: (s.settimeout(limit), s.gettimeout(), s.getblocking()))

    @rule(end=ends, how=st.sampled_from([0, 1, 2]), really=seldom)
    def shutdown(self, end: int, how: int, really: bool) -> None:
        if really:
            self.twins.shut(end, how)

    @rule(end=ends, really=seldom, reset=seldom)
    def close(self, end: int, really: bool, reset: bool) -> None:
        if not really:
            return
        if reset and is_open(self.twins.tcp(end)):
            self.run("SO_LINGER 0", end, lambda s: s.setsockopt(SOL, socket.SO_LINGER, LINGER.pack(1, 0)))
        self.run("close", end, lambda s: s.close())

    @precondition(lambda self: not any(is_open(self.twins.tcp(end)) for end in (0, 1)))
    @rule()
    def connect_anew(self) -> None:
        self.twins.close()
        self.twins = Twins(self.reference, self.pairs)

    @rule(end=ends, name=st.sampled_from(sorted(OPTIONS)), data=st.data())
    def option(self, end: int, name: str, data: Any) -> None:
        level, option, values = OPTIONS[name]
        value = data.draw(values)
        self.run(f"{name} = {value}", end, lambda s: reuse(s, level, option, value))

    @rule(end=ends, name=st.sampled_from(HARMLESS))
    def odd_call(self, end: int, name: str) -> None:
        if self.twins.tcp(end).gettimeout() is None and name == "accept":
            return
        call = OTHERS[name]
        what = f"{name} by {END_NAMES[end]}"
        self.twins.both(what, lambda side: call(side.module, side.ends[end]), allow=is_meant(name, True))

    # Files of a socket

    @rule(end=ends, what=FILES)
    def makefile(self, end: int, what: tuple[str, int | None]) -> None:
        def call(side: Side) -> None:
            side.files[end] = side.ends[end].makefile(what[0], buffering=what[1])

        if self.twins.reference.files[end] is None:
            self.twins.both(f"makefile{what} by {END_NAMES[end]}", call)

    @rule(end=ends, method=st.sampled_from(["read", "read1", "peek", "readline", "readinto"]), size=sizes)
    def read_file(self, end: int, method: str, size: int) -> None:
        def call(side: Side) -> Any:
            if method == "readinto":
                return side.files[end].readinto(b := bytearray(size)), bytes(b)
            return getattr(side.files[end], method)(size)

        file = self.twins.reference.files[end]
        once = isinstance(file, io.RawIOBase) and method != "readline"  # others go on until they have got all
        flags = 0 if once else WAIT_ALL
        if file is not None and self.may_receive(end, 1 << 30, flags):
            self.twins.both(f"{method}({size}) of a file of {END_NAMES[end]}", call)

    @rule(end=ends, size=sizes)
    def write_file(self, end: int, size: int) -> None:
        file = self.twins.reference.files[end]
        if file is None or not self.room(end, size) or self.twins.sends_into_nothing(end):
            return
        data: Any = "x" * size if isinstance(file, io.TextIOBase) else self.fresh(size)

        def call(side: Side) -> Any:
            return outcome(lambda: side.files[end].write(data)), outcome(lambda: side.files[end].flush())

        self.twins.both(f"write of {size} to a file of {END_NAMES[end]}", call)

    @rule(end=ends)
    def close_file(self, end: int) -> None:
        def call(side: Side) -> Any:
            file, side.files[end] = side.files[end], None
            return outcome(file.close), file.closed

        if self.twins.reference.files[end] is not None and not self.twins.sends_into_nothing(end):
            self.twins.both(f"close of a file of {END_NAMES[end]}", call)


def compare(reference: PairMaker, pairs: PairMaker, *, examples: int, steps: int = 50, **more: Any) -> None:
    """Run random sequences on both. Raises Difference."""
    machine = type("Sequences", (Sequences,), {"reference": reference, "pairs": pairs})
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        **more,
    )
    run_state_machine_as_test(machine, settings=chosen)


def test_random_sequences_give_what_they_give_on_tcp(tcp: TcpPairs, tested: PairMaker) -> None:
    compare(tcp, tested, examples=60, phases=[Phase.generate], derandomize=True, database=None)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_random_sequences_find_a_fault(tcp: TcpPairs, fault: type[socket.socket]) -> None:
    broken = ChangedTcpPairs(fault)
    try:
        with pytest.raises(Difference):
            compare(tcp, broken, examples=1000, phases=[Phase.generate], derandomize=True, database=None)
    finally:
        broken.close()


# Two threads ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0, 1], ids=["from the client", "from the server"])
def pair(request: pytest.FixtureRequest, tested: PairMaker) -> Iterator[tuple[Any, Any]]:
    """Two connected sockets; the first of them acts."""
    made = tested.make()
    with made[0], made[1], time_limit():
        yield made[request.param], made[1 - request.param]


@contextlib.contextmanager
def meanwhile(call: Callable[[], Any]) -> Iterator[list[Any]]:
    """Run a call in a thread of its own; its outcome is in the list afterwards."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(outcome(call)))
    thread.start()
    try:
        yield found
    finally:
        thread.join(LIMIT_S)
        assert found, "the other thread hangs"


def received(s: Any, source: random.Random) -> bytes:
    data = bytearray()
    while part := s.recv(source.randint(1, 300_000)):
        data += part
    return bytes(data)


def test_more_than_all_buffers_hold_arrives_whole_in_both_directions_at_once(pair: tuple[Any, Any]) -> None:
    one, other = pair
    there, back = random.Random(3).randbytes(1 << 22), random.Random(4).randbytes(1 << 22)
    with (
        meanwhile(lambda: (one.sendall(there), one.shutdown(socket.SHUT_WR))),
        meanwhile(lambda: (other.sendall(back), other.shutdown(socket.SHUT_WR))),
        meanwhile(lambda: received(one, random.Random(5))) as came_back,
    ):
        assert received(other, random.Random(6)) == there
    assert came_back == [back]


def test_what_a_full_connection_took_arrives_and_then_it_takes_more(pair: tuple[Any, Any]) -> None:
    one, other = pair
    one.setblocking(False)
    taken = 0
    with pytest.raises(BlockingIOError):  # noqa: PT012
        while True:
            taken += one.send(bytes(100_000))
    one.settimeout(SHORT_S)
    with pytest.raises(TimeoutError):
        one.sendall(bytes(1 << 24))
    first = min(taken, 100_000)  # how much fits may differ
    assert len(other.recv(first, WAIT_ALL)) == first
    with meanwhile(lambda: received(other, random.Random(7))) as found:
        one.settimeout(None)
        one.sendall(b"end")
        one.close()
    assert found[0].endswith(b"end")
    assert len(found[0]) + first >= taken + 3


ENDS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "bytes": (lambda s: s.send(b"x"), b"x"),
    "shutdown": (lambda s: s.shutdown(socket.SHUT_WR), b""),
    "close": (lambda s: s.close(), b""),
    "a reset": (
        lambda s: (s.setsockopt(SOL, socket.SO_LINGER, LINGER.pack(1, 0)), s.close()),
        Raised(ConnectionResetError, errno.ECONNRESET),
    ),
}
WAITS: dict[str, Callable[[Any], Any]] = {
    "recv": lambda s: s.recv(9),
    "recv with a timeout": lambda s: (s.settimeout(LIMIT_S), s.recv(9))[1],
    "select": lambda s: (select.select([s], [], []), s.recv(9))[1],
    "poll": lambda s: (polled(s, select.poll()), s.recv(9, DONT_WAIT))[1],
    "epoll": lambda s: (closing(select.epoll(), lambda epoll: polled(s, epoll)), s.recv(9, DONT_WAIT))[1],
}


def polled(s: Any, poller: Any) -> None:
    poller.register(s, select.POLLIN)
    assert poller.poll()


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("how", WAITS)
def test_who_waits_is_woken(pair: tuple[Any, Any], how: str, end: str) -> None:
    one, other = pair
    with meanwhile(lambda: WAITS[how](other)) as found:
        time.sleep(SHORT_S)
        ENDS[end][0](one)
    assert found == [ENDS[end][1]]

# SPDX-License-Identifier: Apache-2.0
"""`ism perf -s`: serves one test at a time, over whatever the client asks for, and outlives every client.

The main thread talks (`control`), also to those who come while it is busy; a thread of the test moves the bytes. Of a
client that lies, dies or does nothing one line is printed.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Callable
from typing import Final, TypeVar

import ism
from ism.errors import IsmError
from ism.perf.control import OPEN_S, Control, Idle, numeric_host, reason_of, surface, wait
from ism.perf.flows import PerfError, Run, Where, unix_name
from ism.perf.parameters import Parameters
from ism.perf.protocol import COOKIE_BYTES, Ask, Busy, Count, Go, Listen, Message, Ready, Result, Stop, encode
from ism.perf.report import describe, streams_line, summary_line

PROGRAM: Final = f"ism perf {ism.__version__}"
_ASK_S: Final = 10.0
_GO_S: Final = 30.0
_STOP_S: Final = 5.0
_GRACE_S: Final = 30.0
_TICK_S: Final = 1.0
_BUSY_S: Final = 0.2
Say = Callable[[str], None]
M = TypeVar("M", bound=Message)


def listen(host: str | None, port: int) -> socket.socket:
    """Listen for clients: on one address, or on all of either family. Raises PerfError."""
    try:
        if host is not None:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            return socket.create_server(address, family=family)
        if socket.has_dualstack_ipv6():
            with contextlib.suppress(OSError):  # IPv6 may be there, and switched off
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as exc:
        raise PerfError(f"cannot listen on {host or '*'} port {port}: {exc.strerror or exc}") from exc


def serve(listener: socket.socket, say: Say, *, one_off: bool = False) -> bool:
    """Serve tests until interrupted, or one; returns whether the last one went well.

    A client without a proper request is no test.
    """
    while True:
        sock, _ = listener.accept()
        with sock:
            good = _serve_one(sock, listener, say)
        if one_off and good is not None:
            return good


def _serve_one(sock: socket.socket, listener: socket.socket, say: Say) -> bool | None:
    try:
        control = Control(sock, client=False)
    except OSError:
        return None  # it has gone already
    run: Run | None = None
    try:
        ask = _expect(control, Ask, _ASK_S, listener)
        run = Run(ask.parameters, secrets.token_bytes(COOKIE_BYTES), client=False)
        say(f"{control.peer}: {describe(ask.parameters)}")
        _test(control, ask.parameters, run, listener, say)
    except (IsmError, OSError) as exc:
        say(f"{control.peer}: {reason_of(exc)}")
        control.give_up(exc)
        return None if run is None else False
    finally:
        if run is not None:
            run.close()
        control.finish()
    return True


def _test(control: Control, parameters: Parameters, run: Run, listener: socket.socket, say: Say) -> None:
    where = Where(numeric_host(control.sock.getsockname()), 0, unix_name(run.cookie))
    run.start(surface(parameters), where)
    _wait_for(control, run, lambda: run.port is not None, listener)
    control.send(Listen(run.port or 0, run.cookie.hex(), PROGRAM, socket.gethostname()))
    _wait_for(control, run, lambda: run.ways is not None, listener)
    assert run.ways is not None
    control.send(Ready(run.ways))
    for tally, way in zip(run.tallies, run.ways, strict=True):
        say(streams_line(tally.flow, way))
    _expect(control, Go, _GO_S, listener)
    run.begin()
    _attend(control, parameters, run, listener)
    cpu = run.cpu()
    control.send(Result(tuple(Count(one.bytes, one.seconds) for one in run.tallies), cpu.user_s, cpu.system_s))
    say(summary_line(run.moved(), max(tally.seconds for tally in run.tallies), cpu.user_s + cpu.system_s))


def _attend(control: Control, parameters: Parameters, run: Run, listener: socket.socket) -> None:
    """See a test through to its end. Raises PerfError, or what its threads raised."""
    idle, limit_s = Idle(run), None if parameters.seconds is None else parameters.seconds + _GRACE_S
    while not run.done:
        if isinstance(_receive(control, time.monotonic() + _TICK_S, run, listener), Stop):
            run.stop()
        idle.check()
        if limit_s is not None and run.seconds() > limit_s:
            raise PerfError(f"the client should have ended the test {_GRACE_S:g} s ago")
    if run.error is not None:
        raise _raisable(control, run.error)
    early = not run.stopping and any(tally.bytes != tally.flow.quota for tally in run.tallies)
    if early and not isinstance(control.receive(time.monotonic() + _STOP_S), Stop):  # it may have been killed
        raise PerfError("the client ended its streams before their time")


def _raisable(control: Control, error: BaseException) -> Exception:
    """Return what went wrong; when the client went away as well, that is the reason."""
    with contextlib.suppress(IsmError):
        control.receive(time.monotonic() + _BUSY_S)
        return error if isinstance(error, IsmError | OSError) else PerfError(reason_of(error))
    return PerfError("the client went away")


def _wait_for(control: Control, run: Run, done: Callable[[], bool], listener: socket.socket) -> None:
    end_s = time.monotonic() + OPEN_S
    while not done():
        if run.error is not None:
            raise PerfError(reason_of(run.error)) from run.error
        if time.monotonic() > end_s:
            raise PerfError(f"the streams were not open after {OPEN_S:g} s")
        _receive(control, min(end_s, time.monotonic() + _TICK_S), run, listener)


def _expect(control: Control, kind: type[M], patience_s: float, listener: socket.socket) -> M:
    end_s = time.monotonic() + patience_s
    while True:
        message = _receive(control, end_s, None, listener)
        if isinstance(message, kind):
            return message
        if time.monotonic() >= end_s:
            raise PerfError(f"the client said nothing for {patience_s:g} s")


def _receive(control: Control, until_s: float, run: Run | None, listener: socket.socket) -> Message | None:
    """Receive, and see to those who come meanwhile. None: not yet."""
    message = control.receive(until_s, [listener.fileno(), -1 if run is None else run.fd])
    if run is not None:
        run.news()
    _turn_away(listener)
    return message


def _turn_away(listener: socket.socket) -> None:
    """Tell whoever comes now that this server is busy."""
    if not wait([listener.fileno()], 0):
        return
    with contextlib.suppress(OSError):
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(_BUSY_S)
            with contextlib.suppress(TimeoutError):
                sock.recv(1 << 16)  # what is unread would make a reset of the close, and that may overtake the answer
            sock.sendall(encode(Busy()))

# SPDX-License-Identifier: Apache-2.0
"""Streams by blocking sockets, a thread each: the standard library's, or `ism.smc.blocking`'s."""

from __future__ import annotations

import contextlib
import socket as std
import threading
import time
from typing import Any

from ism.perf.flows import ACCEPT_TICK_S, HELLO_WAIT_S, THREAD_TIMER_NS, PerfError, Run, Tally, Where, way_of
from ism.perf.protocol import HELLO_BYTES, WELCOME


def work(run: Run, where: Where) -> None:
    """Open the streams, wait for the beginning, move the bytes. Raises OSError, PerfError."""
    with contextlib.ExitStack() as stack:
        socks: list[Any] = []
        run.on_abort(lambda: _shut(socks))
        if run.client:
            _connect(run, where, socks, stack)
        else:
            _accept(run, where, socks, stack)
        smc = run.parameters.transport == "smc"
        run.ready([way_of(sock, sock.smc_info() if smc else None) for sock in socks])
        run.wait()
        _all_of(run, socks)


def _shut(socks: list[Any]) -> None:
    """Wake whoever waits in one of the sockets: it finds the end."""
    for sock in socks:
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(std.SHUT_RDWR)


def _module(run: Run) -> Any:
    if run.parameters.transport != "smc":
        return std
    from ism.smc import blocking

    return blocking


def _connect(run: Run, where: Where, socks: list[Any], stack: contextlib.ExitStack) -> None:
    for tally in run.tallies:
        if run.parameters.transport == "unix":
            sock: Any = stack.enter_context(std.socket(std.AF_UNIX))
            sock.connect(where.name)
        else:
            sock = stack.enter_context(_module(run).create_connection((where.host, where.port), HELLO_WAIT_S))
            sock.setsockopt(std.IPPROTO_TCP, std.TCP_NODELAY, 1)
        socks.append(sock)
        run.on_abort(lambda: _shut(socks))  # again, for the one that was not there
        sock.settimeout(HELLO_WAIT_S)
        sock.sendall(run.hello(tally))
        if sock.recv(len(WELCOME)) != WELCOME:
            raise PerfError("the server refused a stream")
        sock.settimeout(None)


def _accept(run: Run, where: Where, socks: list[Any], stack: contextlib.ExitStack) -> None:
    if run.parameters.transport == "unix":
        listener: Any = std.socket(std.AF_UNIX)
        listener.bind(where.name)
        listener.listen(len(run.tallies))
    else:
        family = std.AF_INET6 if ":" in where.host else std.AF_INET
        listener = _module(run).create_server((where.host, 0), family=family, backlog=len(run.tallies))
    found: dict[int, Any] = {}
    with listener:
        listener.settimeout(ACCEPT_TICK_S)
        run.listening(0 if run.parameters.transport == "unix" else listener.getsockname()[1])
        while len(found) < len(run.tallies):
            if run.aborted:
                raise PerfError("aborted")
            try:
                sock, _ = listener.accept()
            except TimeoutError:
                continue
            index = _greet(run, sock)
            if index is None or index in found:
                sock.close()
                continue
            found[index] = stack.enter_context(sock)
    socks += (found[index] for index in range(len(found)))
    run.on_abort(lambda: _shut(socks))


def _greet(run: Run, sock: Any) -> int | None:
    """Read who it is, and answer. Returns the index of the stream, None when it is none of ours."""
    try:
        sock.settimeout(HELLO_WAIT_S)
        hello = b""
        while len(hello) < HELLO_BYTES and (data := sock.recv(HELLO_BYTES - len(hello))):
            hello += data
        index = run.greeted(hello)
        if index is not None:
            if sock.family != std.AF_UNIX:
                sock.setsockopt(std.IPPROTO_TCP, std.TCP_NODELAY, 1)
            sock.sendall(WELCOME)
            sock.settimeout(None)
    except OSError:
        return None
    return index


def _all_of(run: Run, socks: list[Any]) -> None:
    """Move the bytes of every stream in a thread of its own; this one takes the last."""
    failures: list[BaseException] = []

    def one(tally: Tally, sock: Any) -> None:
        try:
            _one(run, tally, sock)
        except BaseException as exc:
            failures.append(exc)
            _shut(socks)  # the others go on for nobody

    pairs = list(zip(run.tallies, socks, strict=True))
    threads = [threading.Thread(target=one, args=pair, daemon=True) for pair in pairs[:-1]]
    for thread in threads:
        thread.start()
    one(*pairs[-1])
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _one(run: Run, tally: Tally, sock: Any) -> None:
    if run.parameters.latency:
        if run.client:
            _ask(run, tally, sock)
        else:
            _answer(run, tally, sock)
    elif tally.sends:
        send = sock.sendall
        for piece in run.pieces(tally, run.block()):
            send(piece)
        _finish(sock)
    else:
        view, receive = memoryview(bytearray(run.receive_bytes())), sock.recv_into
        while count := receive(view):
            tally.bytes += count
        sock.shutdown(std.SHUT_WR)
    run.ended(tally)


def _finish(sock: Any) -> None:
    """Send the end, and wait until the other end has it: it has everything then."""
    sock.shutdown(std.SHUT_WR)
    if sock.recv(1):
        raise PerfError("the other end sent what it was not asked for")


def _exactly(sock: Any, view: memoryview) -> bool:
    """Fill `view`; False at the end of the stream, if that is before its first byte. Raises PerfError."""
    at = 0
    while at < len(view):
        count = sock.recv_into(view[at:])
        if not count:
            if at:
                raise PerfError("a stream ended within a message")
            return False
        at += count
    return True


def _ask(run: Run, tally: Tally, sock: Any) -> None:
    message, answer = run.block(), memoryview(bytearray(run.parameters.length))
    clock, size = time.perf_counter_ns, len(answer)
    for moment in run.intended(tally):
        if moment and not _wait_until(run, moment):
            break
        began = moment or clock()
        sock.sendall(message)
        if not _exactly(sock, answer):
            raise PerfError("the other end ended a stream early")
        tally.trip(clock() - began, size)
    _finish(sock)


def _answer(run: Run, tally: Tally, sock: Any) -> None:
    message = memoryview(bytearray(run.parameters.length))
    while _exactly(sock, message):
        sock.sendall(message)
        tally.bytes += len(message)
    sock.shutdown(std.SHUT_WR)


def _wait_until(run: Run, moment_ns: int) -> bool:
    """Wait for a moment, the last part of it awake; False: it is not wanted any more."""
    while (left_s := run.sleep_s(moment_ns, THREAD_TIMER_NS)) and not run.stopping:
        time.sleep(left_s)
    while time.perf_counter_ns() < moment_ns and not run.stopping:
        time.sleep(0)  # the other streams' threads have their turn
    return not run.stopping

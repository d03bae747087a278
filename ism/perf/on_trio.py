# SPDX-License-Identifier: Apache-2.0
"""Streams by trio, a task each in one thread: trio's own, or those of `ism.smc`. `on_view` puts its own loops in."""

from __future__ import annotations

import contextlib
import socket as std
import time
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from ism.perf.flows import HELLO_WAIT_S, PerfError, Run, Tally, Where, way_of
from ism.perf.protocol import HELLO_BYTES, WELCOME

Mover = Callable[[Run, Tally, Any], Awaitable[None]]
"""Moves the bytes of one stream, in whichever direction, until its end."""


def work(run: Run, where: Where) -> None:
    """Open the streams, wait for the beginning, move the bytes. Raises OSError, PerfError, trio's stream errors."""
    work_with(run, where, move)


def work_with(run: Run, where: Where, mover: Mover) -> None:
    """The same, with other loops. Raises what they raise; of several errors, the first."""
    try:
        trio.run(_main, run, where, mover)
    except BaseExceptionGroup as group:
        raise _first(group) from None


def _first(exc: BaseException) -> BaseException:
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc


async def _main(run: Run, where: Where, mover: Mover) -> None:
    token, scope = trio.lowlevel.current_trio_token(), trio.CancelScope()

    def abort() -> None:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(scope.cancel)

    run.on_abort(abort)
    async with contextlib.AsyncExitStack() as stack:
        with scope:
            streams = await (_connect if run.client else _accept)(run, where, stack)
            smc = run.parameters.transport == "smc"
            run.ready([way_of(stream.socket, stream.smc_info() if smc else None) for stream in streams])
            await trio.to_thread.run_sync(run.wait)
            async with trio.open_nursery() as nursery:
                for tally, stream in zip(run.tallies, streams, strict=True):
                    nursery.start_soon(mover, run, tally, stream)
    if scope.cancelled_caught:
        raise PerfError("aborted")


# -- opening ---------------------------------------------------------------------------------------------------------


async def _connect(run: Run, where: Where, stack: contextlib.AsyncExitStack) -> list[Any]:
    streams = []
    for tally in run.tallies:
        stream = await stack.enter_async_context(await _open(run, where))
        with trio.move_on_after(HELLO_WAIT_S):
            await stream.send_all(run.hello(tally))
            if await stream.receive_some(len(WELCOME)) == WELCOME:
                streams.append(stream)
                continue
        raise PerfError("the server refused a stream")
    return streams


async def _open(run: Run, where: Where) -> Any:
    if run.parameters.transport == "unix":
        sock = trio.socket.socket(std.AF_UNIX)
        await sock.connect(where.name)
        return trio.SocketStream(sock)
    if run.parameters.transport == "tcp":
        return await trio.open_tcp_stream(where.host, where.port)
    from ism.smc import open_tcp_stream

    return await open_tcp_stream(where.host, where.port)


async def _listen(run: Run, where: Where) -> Any:
    if run.parameters.transport == "unix":
        sock = trio.socket.socket(std.AF_UNIX)
        await sock.bind(where.name)
        sock.listen(len(run.tallies))
        return trio.SocketListener(sock)
    if run.parameters.transport == "tcp":
        return (await trio.open_tcp_listeners(0, host=where.host))[0]
    from ism.smc import open_tcp_listeners

    return (await open_tcp_listeners(0, host=where.host))[0]


async def _accept(run: Run, where: Where, stack: contextlib.AsyncExitStack) -> list[Any]:
    found: dict[int, Any] = {}
    async with await _listen(run, where) as listener:
        run.listening(0 if run.parameters.transport == "unix" else listener.socket.getsockname()[1])
        while len(found) < len(run.tallies):
            stream = await listener.accept()
            index = await _greet(run, stream)
            if index is None or index in found:
                await stream.aclose()
            else:
                found[index] = await stack.enter_async_context(stream)
    return [found[index] for index in range(len(found))]


async def _greet(run: Run, stream: Any) -> int | None:
    """Read who it is, and answer. Returns the index of the stream, None when it is none of ours."""
    hello, index = b"", None
    with contextlib.suppress(trio.BrokenResourceError), trio.move_on_after(HELLO_WAIT_S):
        while len(hello) < HELLO_BYTES and (data := await stream.receive_some(HELLO_BYTES - len(hello))):
            hello += data
        index = run.greeted(hello)
        if index is not None:
            await stream.send_all(WELCOME)
            return index
    return None


# -- moving ----------------------------------------------------------------------------------------------------------


async def move(run: Run, tally: Tally, stream: Any) -> None:
    """Move the bytes of one stream until its end."""
    if run.parameters.latency:
        await (_ask if run.client else _answer)(run, tally, stream)
    elif tally.sends:
        send = stream.send_all
        for piece in run.pieces(tally, run.block()):
            await send(piece)
        await finish(stream)
    else:
        size, receive = run.receive_bytes(), stream.receive_some
        while data := await receive(size):
            tally.bytes += len(data)
        await stream.send_eof()
    run.ended(tally)


async def finish(stream: Any) -> None:
    """Send the end, and wait until the other end has it: it has everything then."""
    await stream.send_eof()
    if await stream.receive_some(1):
        raise PerfError("the other end sent what it was not asked for")


async def _exactly(stream: Any, size: int) -> bytes:
    """Receive `size` bytes; b"" at the end of the stream, if that is before the first. Raises PerfError."""
    data: bytes = await stream.receive_some(size)
    while 0 < len(data) < size:
        part = await stream.receive_some(size - len(data))
        if not part:
            raise PerfError("a stream ended within a message")
        data += part
    return data


async def _ask(run: Run, tally: Tally, stream: Any) -> None:
    message = run.block()
    clock, size = time.perf_counter_ns, len(message)
    for moment in run.intended(tally):
        if moment and not await wait_until(run, moment):
            break
        began = moment or clock()
        await stream.send_all(message)
        if not await _exactly(stream, size):
            raise PerfError("the other end ended a stream early")
        tally.trip(clock() - began, size)
    await finish(stream)


async def _answer(run: Run, tally: Tally, stream: Any) -> None:
    size = run.parameters.length
    while message := await _exactly(stream, size):
        await stream.send_all(message)
        tally.bytes += size
    await stream.send_eof()


async def wait_until(run: Run, moment_ns: int) -> bool:
    """Wait for a moment, the last part of it awake; False: it is not wanted any more."""
    while (left_s := run.sleep_s(moment_ns)) and not run.stopping:  # noqa: ASYNC110 (a moment, not an event)
        await trio.sleep(left_s)
    while time.perf_counter_ns() < moment_ns and not run.stopping:
        await trio.lowlevel.checkpoint()
    return not run.stopping

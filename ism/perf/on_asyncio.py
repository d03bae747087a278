# SPDX-License-Identifier: Apache-2.0
"""Streams by asyncio's reader and writer, a task each in one thread: asyncio's own, or those of `ism.smc.asyncio`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any, Final

from ism.perf.flows import HELLO_WAIT_S, PerfError, Run, Tally, Where, way_of
from ism.perf.protocol import HELLO_BYTES, WELCOME

_TURN_S: Final = 0.0005
"""`drain` gives way to nobody while the other end keeps up; so other tasks get their turn this often."""
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def work(run: Run, where: Where) -> None:
    """Open the streams, wait for the beginning, move the bytes. Raises OSError, PerfError."""
    make: Any = None
    if run.parameters.transport == "smc":
        from ism.smc.asyncio import EventLoop as make
    try:
        with asyncio.Runner(loop_factory=make) as runner:
            runner.run(_main(run, where))
    except asyncio.CancelledError:
        raise PerfError("aborted") from None


async def _main(run: Run, where: Where) -> None:
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None

    def abort() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(task.cancel)

    run.on_abort(abort)
    streams: list[Streams] = []
    try:
        await (_connect if run.client else _accept)(run, where, streams)
        run.ready([_way(run, writer) for _, writer in streams])
        await asyncio.to_thread(run.wait)
        moving = [asyncio.create_task(_move(run, *pair)) for pair in zip(run.tallies, streams, strict=True)]
        try:
            await asyncio.gather(*moving)
        finally:
            for one in moving:
                one.cancel()
    finally:
        for _, writer in streams:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for _, writer in streams), return_exceptions=True)


def _way(run: Run, writer: asyncio.StreamWriter) -> Any:
    smc = run.parameters.transport == "smc"
    return way_of(writer.get_extra_info("socket"), writer.get_extra_info("smc_info") if smc else None)


# -- opening ---------------------------------------------------------------------------------------------------------


async def _connect(run: Run, where: Where, streams: list[Streams]) -> None:
    for tally in run.tallies:
        reader, writer = await _open(run, where)
        streams.append((reader, writer))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HELLO_WAIT_S):
                writer.write(run.hello(tally))
                await writer.drain()
                if await reader.read(len(WELCOME)) == WELCOME:
                    continue
        raise PerfError("the server refused a stream")


async def _open(run: Run, where: Where) -> Streams:
    if run.parameters.transport == "unix":
        return await asyncio.open_unix_connection(where.name, limit=run.receive_bytes())
    if run.parameters.transport == "tcp":
        return await asyncio.open_connection(where.host, where.port, limit=run.receive_bytes())
    from ism.smc.asyncio import open_connection

    return await open_connection(where.host, where.port, limit=run.receive_bytes())


async def _accept(run: Run, where: Where, streams: list[Streams]) -> None:
    arrived: asyncio.Queue[Streams] = asyncio.Queue()
    server = await _listen(run, where, arrived)
    found: dict[int, Streams] = {}
    try:
        run.listening(0 if run.parameters.transport == "unix" else server.sockets[0].getsockname()[1])
        while len(found) < len(run.tallies):
            reader, writer = await arrived.get()
            index = await _greet(run, reader, writer)
            if index is None or index in found:
                writer.close()
            else:
                found[index] = reader, writer
    finally:
        server.close()
        while not arrived.empty():
            arrived.get_nowait()[1].close()
        streams += (found[index] for index in sorted(found))


async def _listen(run: Run, where: Where, arrived: asyncio.Queue[Streams]) -> asyncio.Server:
    def callback(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.put_nowait((reader, writer))

    limit = run.receive_bytes()
    if run.parameters.transport == "unix":
        return await asyncio.start_unix_server(callback, where.name, limit=limit)
    if run.parameters.transport == "tcp":
        return await asyncio.start_server(callback, where.host, 0, limit=limit)
    from ism.smc.asyncio import start_server

    return await start_server(callback, where.host, 0, limit=limit)


async def _greet(run: Run, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int | None:
    """Read who it is, and answer. Returns the index of the stream, None when it is none of ours."""
    with contextlib.suppress(TimeoutError, OSError, asyncio.IncompleteReadError):
        async with asyncio.timeout(HELLO_WAIT_S):
            index = run.greeted(await reader.readexactly(HELLO_BYTES))
            if index is not None:
                writer.write(WELCOME)
                await writer.drain()
                return index
    return None


# -- moving ----------------------------------------------------------------------------------------------------------


async def _move(run: Run, tally: Tally, streams: Streams) -> None:
    reader, writer = streams
    try:
        if run.parameters.latency:
            await (_ask if run.client else _answer)(run, tally, reader, writer)
        elif tally.sends:
            await _send(run, tally, writer)
            await _finish(reader, writer)
        else:
            size = run.receive_bytes()
            while data := await reader.read(size):
                tally.bytes += len(data)
            writer.write_eof()
    except asyncio.IncompleteReadError as exc:
        raise PerfError("a stream ended within a message") from exc
    run.ended(tally)


async def _send(run: Run, tally: Tally, writer: asyncio.StreamWriter) -> None:
    turn_ends_s = 0.0
    for piece in run.pieces(tally, run.block()):
        writer.write(piece)
        await writer.drain()
        if time.perf_counter() > turn_ends_s:
            await asyncio.sleep(0)
            turn_ends_s = time.perf_counter() + _TURN_S


async def _finish(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send the end, and wait until the other end has it: it has everything then."""
    writer.write_eof()
    if await reader.read(1):
        raise PerfError("the other end sent what it was not asked for")


async def _ask(run: Run, tally: Tally, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    message = run.block()
    clock, size = time.perf_counter_ns, len(message)
    for moment in run.intended(tally):
        if moment and not await _wait_until(run, moment):
            break
        began = moment or clock()
        writer.write(message)
        await writer.drain()
        await reader.readexactly(size)
        tally.trip(clock() - began, size)
    await _finish(reader, writer)


async def _answer(run: Run, tally: Tally, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    size = run.parameters.length
    while True:
        try:
            message = await reader.readexactly(size)
        except asyncio.IncompleteReadError as exc:
            if exc.partial:
                raise
            break
        writer.write(message)
        await writer.drain()
        tally.bytes += size
    writer.write_eof()


async def _wait_until(run: Run, moment_ns: int) -> bool:
    """Wait for a moment, the last part of it awake; False: it is not wanted any more."""
    while (left_s := run.sleep_s(moment_ns)) and not run.stopping:  # noqa: ASYNC110 (a moment, not an event)
        await asyncio.sleep(left_s)
    while time.perf_counter_ns() < moment_ns and not run.stopping:  # noqa: ASYNC110
        await asyncio.sleep(0)
    return not run.stopping

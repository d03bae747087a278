# SPDX-License-Identifier: Apache-2.0
"""Streams without a copy of their own: `send_buffer` and `receive_view` of a trio stream over shared memory.

The sender writes into the peer's ring; the receiver is lent what is there, and gives it back without looking at it.
Calls yield once in a while (`amortise_checkpoints`), so that what is measured is the way and not the event loop.
"""

from __future__ import annotations

import time
from typing import Any

from ism.perf import on_trio
from ism.perf.flows import PerfError, Run, Tally, Where


def work(run: Run, where: Where) -> None:
    """Open the streams, wait for the beginning, move the bytes. Raises as `on_trio.work`."""
    on_trio.work_with(run, where, _move)


async def _move(run: Run, tally: Tally, stream: Any) -> None:
    if stream.smc_info().mode != "SMC":
        raise PerfError(f"views are of shared memory, but this stream is {stream.smc_info()}")
    stream.amortise_checkpoints = True
    if run.parameters.latency:
        await (_ask if run.client else _answer)(run, tally, stream)
    elif tally.sends:
        for piece in run.pieces(tally, run.block()):
            await _put(stream, piece)
        await on_trio.finish(stream)
    else:
        while count := await _skip(stream):
            tally.bytes += count
        await stream.send_eof()
    run.ended(tally)


async def _put(stream: Any, data: bytes | bytearray | memoryview) -> None:
    """Write all of `data` in place."""
    view, at = memoryview(data), 0
    while at < len(view):
        async with stream.send_buffer(len(view) - at) as room:
            room.view[:] = view[at : at + len(room)]
        at += len(room)


async def _skip(stream: Any) -> int:
    """Take what is there, unseen; how many bytes, 0 at the end."""
    async with stream.receive_view() as lent:
        return len(lent)


async def _message(stream: Any, size: int, *, back: bool) -> bool:
    """Take a message of `size` bytes, and send it `back` from where it is; False at the end of the stream.

    One that does not fit into the ring is collected first: its sender reads nothing before it has sent all of it.
    """
    left, whole = size, bytearray() if back and size > stream.smc_info().send_buffer else None
    while left:
        async with stream.receive_view(left) as lent:
            if not lent:
                if left < size:
                    raise PerfError("a stream ended within a message")
                return False
            if whole is not None:
                whole += lent.view
            elif back:
                await _put(stream, lent.view)
        left -= len(lent)
    if whole is not None:
        await _put(stream, whole)
    return True


async def _ask(run: Run, tally: Tally, stream: Any) -> None:
    message = run.block()
    clock, size = time.perf_counter_ns, len(message)
    for moment in run.intended(tally):
        if moment and not await on_trio.wait_until(run, moment):
            break
        began = moment or clock()
        await _put(stream, message)
        if not await _message(stream, size, back=False):
            raise PerfError("the other end ended a stream early")
        tally.trip(clock() - began, size)
    await on_trio.finish(stream)


async def _answer(run: Run, tally: Tally, stream: Any) -> None:
    size = run.parameters.length
    while await _message(stream, size, back=True):
        tally.bytes += size
    await stream.send_eof()

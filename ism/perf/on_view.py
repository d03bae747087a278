# SPDX-License-Identifier: Apache-2.0
"""Streams without a copy of their own: views of the rings, of a trio stream over shared memory.

The sender writes into the peer's ring (`reserve`, `commit`); the receiver is lent what is there (`peek`) and gives it
back (`consume`) without looking at it. Only where a ring is full or empty one byte goes by an ordinary call of the
connection: it spins for as long as that is worth while, and tells of the end and of errors.
"""

from __future__ import annotations

import time
from typing import Any, Final

import trio

from ism.perf import on_trio
from ism.perf.flows import PerfError, Run, Tally, Where
from ism.smc.connection import Connection

_TURN_S: Final = 0.0005
"""Other tasks get their turn this often."""


def work(run: Run, where: Where) -> None:
    """Open the streams, wait for the beginning, move the bytes. Raises as `on_trio.work`, and ProtocolError."""
    on_trio.work_with(run, where, _move)


async def _move(run: Run, tally: Tally, stream: Any) -> None:
    connection: Connection | None = stream.connection
    if connection is None:
        raise PerfError(f"views are of shared memory, but this stream is {stream.smc_info()}")
    views = _Views(connection)
    if run.parameters.latency:
        await (_ask if run.client else _answer)(run, tally, stream, views)
    elif tally.sends:
        for piece in run.pieces(tally, run.block()):
            await views.put(piece)
        await on_trio.finish(stream)
    else:
        while count := await views.skip():
            tally.bytes += count
        await stream.send_eof()
    run.ended(tally)


class _Views:
    """The rings of one connection; one task uses it."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._endpoint = connection, connection.endpoint
        self._one = bytearray(1)
        self._turn_ends_s = 0.0

    async def _turn(self) -> None:
        if time.perf_counter() > self._turn_ends_s:
            await trio.lowlevel.checkpoint()
            self._turn_ends_s = time.perf_counter() + _TURN_S

    async def put(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data` in place. Raises OSError, ProtocolError."""
        view, at, endpoint = memoryview(data), 0, self._endpoint
        while at < len(view):
            room = endpoint.reserve(len(view) - at)
            if count := len(room):
                room[:] = view[at : at + count]
                endpoint.commit(count)
                at += count
            elif sent := self._connection.send(view[at : at + 1]):
                at += sent
            else:
                await self._sleep(writer=True)
        await self._turn()

    async def lend(self) -> tuple[memoryview | bytes, bool]:
        """Return what comes next, and whether it is to be consumed. Empty: the end. Raises OSError, ProtocolError."""
        while True:
            views = self._endpoint.peek()
            if views:
                return views[0], True
            count = self._connection.recv_into(self._one)
            if count is not None:
                return bytes(self._one[:count]), False
            await self._sleep(writer=False)

    async def skip(self) -> int:
        """Take what is there, unseen; how many bytes, 0 at the end."""
        part, lent = await self.lend()
        if lent:
            self._endpoint.consume(len(part))
        await self._turn()
        return len(part)

    async def message(self, size: int, *, back: bool) -> bool:
        """Take a message of `size` bytes, and send it `back` from where it is; False at the end of the stream.

        One that does not fit into the ring is collected first: its sender reads nothing before it has sent all of it.
        """
        left, whole = size, bytearray() if back and size > self._endpoint.tx_ring_bytes else None
        while left:
            part, lent = await self.lend()
            if not part:
                if left < size:
                    raise PerfError("a stream ended within a message")
                return False
            part = part[:left]
            if whole is not None:
                whole += part
            elif back:
                await self.put(part)
            if lent:
                self._endpoint.consume(len(part))
            left -= len(part)
        if whole is not None:
            await self.put(whole)
        await self._turn()
        return True

    async def _sleep(self, *, writer: bool) -> None:
        """Sleep until the peer may have done something. Raises trio.ClosedResourceError."""
        connection = self._connection
        if not (connection.must_wait_to_write() if writer else connection.must_wait_to_read()):
            return
        try:
            await trio.lowlevel.wait_readable(connection.fileno())
            connection.drain()
        finally:
            connection.awake(writer=writer)


async def _ask(run: Run, tally: Tally, stream: Any, views: _Views) -> None:
    message = run.block()
    clock, size = time.perf_counter_ns, len(message)
    for moment in run.intended(tally):
        if moment and not await on_trio.wait_until(run, moment):
            break
        began = moment or clock()
        await views.put(message)
        if not await views.message(size, back=False):
            raise PerfError("the other end ended a stream early")
        tally.trip(clock() - began, size)
    await on_trio.finish(stream)


async def _answer(run: Run, tally: Tally, stream: Any, views: _Views) -> None:
    size = run.parameters.length
    while await views.message(size, back=True):
        tally.bytes += size
    await stream.send_eof()

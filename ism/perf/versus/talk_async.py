# SPDX-License-Identifier: Apache-2.0
"""The two workloads of `talk`, for peers whose calls are awaited, in trio or in asyncio."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sized
from dataclasses import dataclass
from typing import Any

from ism.perf.versus.figures import Figures, Outcome, Script, Step, plan
from ism.perf.versus.talk import BYE, DONE, KINDS, REQUEST, RTT


@dataclass(frozen=True, slots=True)
class Line:
    """One connection. Attributes: `send` (a whole message), `some` (receive up to so many bytes; empty at the end)."""

    send: Callable[[Any], Awaitable[Any]]
    some: Callable[[int], Awaitable[Sized]]

    async def take(self, count: int) -> bytes:
        """Receive so many bytes. Raises EOFError."""
        data = b""
        while len(data) < count:
            part: Any = await self.some(count - len(data))
            if not len(part):
                raise EOFError("the other end ended the connection early")
            data += bytes(part)
        return data


async def _rest(line: Line, got: int, size: int) -> None:
    """Receive what is left of a message of which `got` bytes are there."""
    while got < size:
        count = len(await line.some(size - got)) if got else 0
        if not count:
            raise EOFError("the other end has gone")
        got += count


async def answer(line: Line) -> None:
    """Do what the near end asks, until it says goodbye. Raises EOFError, what the calls raise."""
    send, some = line.send, line.some
    while True:
        kind, size, count = REQUEST.unpack(await line.take(REQUEST.size))
        if kind == BYE:
            return
        message = bytes(size)
        if kind == RTT:
            for _ in range(count):
                got = len(await some(size))
                if got < size:
                    await _rest(line, got, size)
                await send(message)
        else:
            left, began_ns = size * count, time.process_time_ns()
            while left > 0:
                got = len(await some(size))
                if not got:
                    raise EOFError("the near end has gone")
                left -= got
            await send(REQUEST.pack(DONE, 0, time.process_time_ns() - began_ns))


async def ask(line: Line, script: Script) -> Figures:
    """Take one sample. Raises EOFError, what the calls raise."""
    steps = plan(script)
    step = next(steps)
    while True:
        await line.send(REQUEST.pack(KINDS[step.kind], step.size, step.count))
        outcome = await (round_trips if step.kind == "rtt" else stream)(line, step)
        try:
            step = steps.send(outcome)
        except StopIteration as done:
            await line.send(REQUEST.pack(BYE, 0, 0))
            figures: Figures = done.value
            return figures


async def round_trips(line: Line, step: Step) -> Outcome:
    """Send and receive a message, again and again."""
    send, some, size, clock = line.send, line.some, step.size, time.perf_counter_ns
    message = bytes(size)
    times_ns: list[int] = []
    keep = times_ns.append
    began_s, cpu_s = time.perf_counter(), time.process_time()
    for _ in range(step.count):
        began_ns = clock()
        await send(message)
        got = len(await some(size))
        if got < size:
            await _rest(line, got, size)
        keep(clock() - began_ns)
    return Outcome(time.perf_counter() - began_s, time.process_time() - cpu_s, 0.0, times_ns)


async def stream(line: Line, step: Step) -> Outcome:
    """Send all messages and wait for the acknowledgement of the last."""
    send, message = line.send, bytes(step.size)
    began_s, cpu_s = time.perf_counter(), time.process_time()
    for _ in range(step.count):
        await send(message)
    far_ns = REQUEST.unpack(await line.take(REQUEST.size))[2]
    return Outcome(time.perf_counter() - began_s, time.process_time() - cpu_s, far_ns / 1e9, [])

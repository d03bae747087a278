# SPDX-License-Identifier: Apache-2.0
"""The two workloads, for peers whose calls block.

The near end asks in the connection itself: sixteen bytes that say what comes, then the messages. Round trips are
answered one by one. After the last message of a stream the far end answers with the CPU time that receiving took. Each
message is sent by one call, and received into a buffer of its own size: nobody reads many small messages at once.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from ism.perf.versus.figures import Figures, Outcome, Script, Step, plan

REQUEST: Final = struct.Struct("<BxxxIQ")
"""Kind, size of a message, how many; the answer to a stream has the CPU nanoseconds in the place of the number."""
RTT, STREAM, BYE, DONE = 1, 2, 3, 4
KINDS: Final = {"rtt": RTT, "stream": STREAM}


@dataclass(frozen=True, slots=True)
class Line:
    """One connection, as the workloads use it.

    Attributes: `send` (a whole message), `some` (receive into a view, a message or a part of it; how many bytes, 0 at
    the end), `take` (receive so many bytes, sixteen at most).
    """

    send: Callable[[Any], Any]
    some: Callable[[memoryview], int]
    take: Callable[[int], bytes]


def exactly(some: Callable[[memoryview], int]) -> Callable[[int], bytes]:
    """Return a `take` for a byte stream. It raises EOFError."""

    def take(count: int) -> bytes:
        data = bytearray(count)
        _fill(some, memoryview(data))
        return bytes(data)

    return take


def _fill(some: Callable[[memoryview], int], view: memoryview) -> None:
    while view:
        count = some(view)
        if not count:
            raise EOFError("the other end ended the connection early")
        view = view[count:]


# -- the far end -----------------------------------------------------------------------------------------------------


def answer(line: Line) -> None:
    """Do what the near end asks, until it says goodbye. Raises EOFError, OSError."""
    send, some = line.send, line.some
    while True:
        kind, size, count = REQUEST.unpack(line.take(REQUEST.size))
        if kind == BYE:
            return
        view, message = memoryview(bytearray(size)), bytes(size)
        if kind == RTT:
            for _ in range(count):
                got = some(view)
                if got < size:
                    if not got:
                        raise EOFError("the near end has gone")
                    _fill(some, view[got:])
                send(message)
        else:
            left, began_ns = size * count, time.process_time_ns()
            while left > 0:
                got = some(view)
                if not got:
                    raise EOFError("the near end has gone")
                left -= got
            send(REQUEST.pack(DONE, 0, time.process_time_ns() - began_ns))


# -- the near end ----------------------------------------------------------------------------------------------------


def ask(line: Line, script: Script) -> Figures:
    """Take one sample. Raises EOFError, OSError."""
    steps = plan(script)
    step = next(steps)
    try:
        while True:
            line.send(REQUEST.pack(KINDS[step.kind], step.size, step.count))
            step = steps.send(round_trips(line, step) if step.kind == "rtt" else stream(line, step))
    except StopIteration as done:
        line.send(REQUEST.pack(BYE, 0, 0))
        figures: Figures = done.value
        return figures


def round_trips(line: Line, step: Step) -> Outcome:
    """Send and receive a message, again and again."""
    send, some, size, clock = line.send, line.some, step.size, time.perf_counter_ns
    message, view = bytes(size), memoryview(bytearray(size))
    times_ns: list[int] = []
    keep = times_ns.append
    began_s, cpu_s = time.perf_counter(), time.process_time()
    for _ in range(step.count):
        began_ns = clock()
        send(message)
        got = some(view)
        if got < size:
            if not got:
                raise EOFError("the far end has gone")
            _fill(some, view[got:])
        keep(clock() - began_ns)
    return Outcome(time.perf_counter() - began_s, time.process_time() - cpu_s, 0.0, times_ns)


def stream(line: Line, step: Step) -> Outcome:
    """Send all messages and wait for the acknowledgement of the last."""
    send, message = line.send, bytes(step.size)
    began_s, cpu_s = time.perf_counter(), time.process_time()
    for _ in range(step.count):
        send(message)
    far_ns = REQUEST.unpack(line.take(REQUEST.size))[2]
    return Outcome(time.perf_counter() - began_s, time.process_time() - cpu_s, far_ns / 1e9, [])

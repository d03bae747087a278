# SPDX-License-Identifier: Apache-2.0
"""What does waiting cost: latency and processor time, when the peer takes a while to answer?

A peer process answers each message after so many microseconds, which it spends working. This end sends, waits for the
answer as any caller would (it spins while that pays, then sleeps on the eventfd), and sends again at once. Counted are
the time that an answer took beyond the peer's work, how many of the waits slept, and the processor time of this end.
Interleaved with a ring that never spins, and with one whose peer is late now and then, as peers are.

The two processes are kept on two CPUs; with one only there is nothing to see, as nobody spins there.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from harness import run, table
from ring import RING_BYTES, Side

from ism.memory import PAGE_SIZE, create_memfd
from ism.shm import HEADER_BYTES, MAX_SPIN_NS, compile_kernels

WORK_US = (5, 20, 45, 100, 1000)
_LATE_US, _LATE_SHARE = 2000, 0.02
_SIZE = 64


def _works(us: float, late: float, rounds: int) -> list[float]:
    """How long the peer works for each answer, the same in every run."""
    dice = random.Random(us)
    return [_LATE_US if dice.random() < late else us for _ in range(rounds)]


def _answer(side: Side, works: list[float]) -> None:
    buffer, clock = memoryview(bytearray(_SIZE)), time.perf_counter_ns
    for work in works:
        side.recv_exactly(buffer)
        end = clock() + int(work * 1000)
        while clock() < end:
            pass
        side.send_all(buffer)


@contextmanager
def _peer(works: list[float], spin_ns: int, cpus: tuple[int, int]) -> Any:
    """Fork a process that answers; yield this end."""
    size = -(-(HEADER_BYTES + RING_BYTES) // PAGE_SIZE) * PAGE_SIZE
    regions = [create_memfd("bench", size) for _ in range(2)]
    bells = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.sched_setaffinity(0, {cpus[1]})
            _answer(Side(regions[1], regions[0], bells[1], bells[0], spin_ns), works)
            status = 0
        finally:
            os._exit(status)
    os.sched_setaffinity(0, {cpus[0]})
    try:
        yield Side(regions[0], regions[1], bells[0], bells[1], spin_ns)
    finally:
        os.waitpid(child, 0)
        for fd in (*regions, *bells):
            os.close(fd)


def waits(us: float, *, late: float, spin_ns: int, rounds: int, cpus: tuple[int, int]) -> dict[str, float]:
    """Wait for so many answers. Returns us beyond the work (p50), CPU us a wait, share of waits that slept."""
    works = _works(us, late, rounds)
    message, buffer, clock = memoryview(bytes(_SIZE)), memoryview(bytearray(_SIZE)), time.perf_counter_ns
    beyond = []
    with _peer(works, spin_ns, cpus) as side:
        side.send_all(message)
        side.recv_exactly(buffer)  # the peer is there
        side.slept, cpu_ns = 0, time.process_time_ns()
        for work in works[1:]:
            start = clock()
            side.send_all(message)
            side.recv_exactly(buffer)
            beyond.append((clock() - start) / 1e3 - work)
        cpu_ns = time.process_time_ns() - cpu_ns
    count = len(beyond)
    return {
        "beyond_us": statistics.median(beyond),
        "mean_us": statistics.fmean(sorted(beyond)[: count * 99 // 100]),
        "cpu_us": cpu_ns / count / 1e3,
        "cpu_share": cpu_ns / 1e3 / (sum(beyond) + sum(works[1:])),
        "slept": side.slept / count,
    }


def body(quick: bool) -> dict[str, Any]:
    """Run the rounds and print the table."""
    compile_kernels(print)
    allowed = sorted(os.sched_getaffinity(0))
    cpus = (allowed[0], allowed[-1])
    repeats, span_us = (1, 20_000) if quick else (5, 150_000)
    cases: dict[str, Callable[[float], dict[str, float]]] = {}
    for name, spin_ns, late in (
        ("spins", MAX_SPIN_NS, 0.0),
        ("2 % late", MAX_SPIN_NS, _LATE_SHARE),
        ("sleeps", 0, 0.0),
    ):
        cases[name] = lambda us, spin_ns=spin_ns, late=late: waits(  # type: ignore[misc]
            us, late=late, spin_ns=spin_ns, rounds=max(40, int(span_us / (us + 20))), cpus=cpus
        )
    found: dict[str, dict[int, list[dict[str, float]]]] = {name: {us: [] for us in WORK_US} for name in cases}
    try:
        for _ in range(repeats):
            for us in WORK_US:
                for name, sample in cases.items():
                    found[name][us].append(sample(us))
    finally:
        os.sched_setaffinity(0, allowed)
    rows, figures = [], {}
    for us in WORK_US:
        for name in cases:
            median = {key: statistics.median(one[key] for one in found[name][us]) for key in found[name][us][0]}
            figures[f"{name}, {us} us"] = median
            rows.append(
                [
                    f"{us} us, {name}",
                    *(f"{median[key]:.1f}" for key in ("beyond_us", "mean_us", "cpu_us")),
                    *(f"{100 * median[key]:.1f}" for key in ("cpu_share", "slept")),
                ]
            )
    header = ("the peer works", "beyond it p50, us", "mean, us", "CPU a wait, us", "CPU, %", "slept, %")
    table("waiting for an answer", header, rows)
    return figures


if __name__ == "__main__":
    run(__doc__ or "", body)

# SPDX-License-Identifier: Apache-2.0
"""What does a round trip of a small message cost, against TCP: with trio streams, and with blocking sockets?

Two processes, both ends awake, rounds of the transports in turn, ratios round by round. For trio twice: each end kept
on a processor of its own, and free to go where the scheduler puts them. With blocking sockets also `fallback`: our
class with a plain server, so TCP in the end.
"""

from __future__ import annotations

import os
import time

import trio
from echo import BLOCK, CASES, Ends, ends, in_turn, medians, show
from harness import Figures, manager, percentile, run

from ism.perf import plots
from ism.perf.compare import compare, far_end

_MESSAGE = 64
_ROWS = (("p50, us", "p50_s", 1e6, False), ("p99, us", "p99_s", 1e6, False))


def blocking_round_trip(far: Ends, case: str, count: int) -> dict[str, float]:
    """Echo small messages."""
    message, times = bytes(_MESSAGE), []
    with far.opened(case) as connection:
        for number in range(count + count // 10):
            began = time.perf_counter()
            connection.sendall(message)
            left = _MESSAGE
            while left:
                left -= len(connection.recv(left))
            if number >= count // 10:
                times.append(time.perf_counter() - began)
    return {"p50_s": percentile(times, 50), "p99_s": percentile(times, 99)}


def trio_round_trips(rounds: int, count: int, *, apart: bool) -> dict[str, list[dict[str, float]]]:
    """The same with trio streams, by transport."""
    allowed = os.sched_getaffinity(0)
    with manager(), far_end(max(allowed) if apart else None) as far:
        try:
            if apart:
                os.sched_setaffinity(0, {min(allowed)})
            result = trio.run(lambda: compare(far, rounds=rounds, pings=count, total=8 * BLOCK))
        finally:
            os.sched_setaffinity(0, allowed)
    return {
        name: [{"p50_s": p50, "p99_s": p99} for p50, p99 in zip(samples.rtt_p50, samples.rtt_p99, strict=True)]
        for name, samples in result.samples.items()
    }


def body(quick: bool) -> Figures:
    """Run the rounds and print the tables."""
    rounds, count = (1, 50) if quick else (7, 3000)
    figures: Figures = {}
    for mode, apart in (("pinned", True), ("free", False))[quick:]:
        samples = trio_round_trips(rounds, count, apart=apart)
        title = f"trio streams, {mode}"
        figures[title] = {
            "rounds": samples,
            "against_tcp": show(f"round trip of {_MESSAGE} bytes, {title}", samples, _ROWS),
        }
    with manager(), ends() as far:
        samples = in_turn(rounds, CASES, lambda case: blocking_round_trip(far, case, count))
    title = "blocking sockets"
    figures[title] = {
        "rounds": samples,
        "against_tcp": show(f"round trip of {_MESSAGE} bytes, {title}", samples, _ROWS),
    }
    return figures


def chart(figures: Figures, path: str) -> None:
    """The medians by transport."""
    bars: dict[str, dict[str, float]] = {case: {} for case in CASES}
    for title, found in figures.items():
        for case, value in medians(found["rounds"], "p50_s", 1e6).items():
            bars[case][title] = value
    plots.bar_chart(path, "Round trip of a small message", "microseconds, median", "", bars)


if __name__ == "__main__":
    run(__doc__ or "", body, chart)

# SPDX-License-Identifier: Apache-2.0
"""How fast do bytes flow one way, at what processor time, against TCP: with trio streams, with blocking sockets?

Two processes, messages of 64 KiB, from the first send until the receiver has said that it has the last byte; CPU is
that of both ends. Rounds of the transports in turn, ratios round by round. For trio twice: each end kept on a processor
of its own, and free to go where the scheduler puts them, which may be the same one.
"""

from __future__ import annotations

import os
import time

import trio
from echo import BLOCK, CASES, SINK, Ends, ends, in_turn, medians, show
from harness import Figures, manager, run

from ism.perf import plots
from ism.perf.compare import compare, far_end

_ROWS = (("GB/s", "bytes_per_s", 1e-9, True), ("CPU of both ends, s/GB", "cpu_s_per_gb", 1, False))


def blocking_stream(far: Ends, case: str, total: int) -> dict[str, float]:
    """Send blocks until the other end has them all."""
    block = bytes(BLOCK)
    with far.connect(case) as connection:
        before = far.cpu_s()
        connection.sendall(SINK + total.to_bytes(8, "little"))
        start = time.perf_counter()
        for _ in range(total // BLOCK):
            connection.sendall(block)
        connection.recv(1)
        took = time.perf_counter() - start
        cpu_s = far.cpu_s() - before
    return {"bytes_per_s": total / took, "cpu_s_per_gb": cpu_s / (total / 1e9)}


def trio_streams(rounds: int, total: int, *, apart: bool) -> dict[str, list[dict[str, float]]]:
    """The same with trio streams, by transport."""
    allowed = os.sched_getaffinity(0)
    with manager(), far_end(max(allowed) if apart else None) as far:
        try:
            if apart:
                os.sched_setaffinity(0, {min(allowed)})
            result = trio.run(lambda: compare(far, rounds=rounds, pings=20, total=total))
        finally:
            os.sched_setaffinity(0, allowed)
    return {
        name: [
            {"bytes_per_s": rate, "cpu_s_per_gb": cpu_s}
            for rate, cpu_s in zip(samples.throughput, samples.cpu_s_per_gb, strict=True)
        ]
        for name, samples in result.samples.items()
    }


def body(quick: bool) -> Figures:
    """Run the rounds and print the tables."""
    rounds, total = (1, 1 << 22) if quick else (5, 1 << 29)
    figures: Figures = {}
    for mode, apart in (("pinned", True), ("free", False))[quick:]:
        samples = trio_streams(rounds, total, apart=apart)
        title = f"trio streams, {mode}"
        figures[title] = {"rounds": samples, "against_tcp": show(f"one way, {title}", samples, _ROWS)}
    with manager(), ends() as far:
        samples = in_turn(rounds, CASES, lambda case: blocking_stream(far, case, total))
    title = "blocking sockets"
    figures[title] = {"rounds": samples, "against_tcp": show(f"one way, {title}", samples, _ROWS)}
    return figures


def chart(figures: Figures, path: str) -> None:
    """The rates by transport."""
    bars: dict[str, dict[str, float]] = {case: {} for case in CASES}
    for title, found in figures.items():
        for case, value in medians(found["rounds"], "bytes_per_s", 1e-9).items():
            bars[case][title] = value
    plots.bar_chart(path, "One way, messages of 64 KiB", "GB/s, median", "", bars)


if __name__ == "__main__":
    run(__doc__ or "", body, chart)

# SPDX-License-Identifier: Apache-2.0
"""How does SmcStream compare with trio TCP: round trip of 64 bytes, stream of 64 KiB messages, CPU of both ends?

Two processes, a checkpoint in every call, rounds of the two transports in turn, ratios round by round. Twice: each end
kept on a processor of its own, so that the peers are awake and apart; and free to go where the scheduler puts them,
which may be the same one, where both transports pay for sleeping and waking.
"""

from __future__ import annotations

import os
from typing import Any

import trio
from harness import manager, run, table

from ism.perf.compare import Comparison, compare, far_end

ROWS = (
    ("round trip 64 B p50, us", "rtt_p50", 1e6),
    ("round trip 64 B p99, us", "rtt_p99", 1e6),
    ("stream 64 KiB, GB/s", "throughput", 1e-9),
    ("CPU of both ends, s/GB", "cpu_s_per_gb", 1.0),
)


def show(title: str, result: Comparison) -> None:
    """Print medians, ranges and ratios."""
    rows = []
    for label, name, scale in ROWS:
        cells = [label]
        for transport in ("smc", "tcp"):
            values = [value * scale for value in getattr(result.samples[transport], name)]
            cells.append(f"{result.median(transport, name) * scale:.2f} ({min(values):.2f}..{max(values):.2f})")
        rows.append([*cells, f"{result.ratio(name):.2f}x"])
    table(title, ("", "smc", "tcp", "ratio"), rows)


def body(quick: bool) -> dict[str, Any]:
    """Run the rounds and print the tables."""
    rounds, pings, total = (1, 50, 1 << 22) if quick else (5, 3000, 1 << 29)
    allowed = sorted(os.sched_getaffinity(0))
    figures = {}
    for mode in ("pinned", "free"):
        near, far_cpu = (allowed[0], allowed[-1]) if mode == "pinned" else (None, None)
        with manager(), far_end(far_cpu) as far:
            try:
                if near is not None:
                    os.sched_setaffinity(0, {near})
                result = trio.run(lambda far=far: compare(far, rounds=rounds, pings=pings, total=total))
            finally:
                os.sched_setaffinity(0, allowed)
        show(f"SmcStream against trio TCP, {mode}", result)
        figures[mode] = result.as_json()
    return figures


if __name__ == "__main__":
    run(__doc__ or "", body)

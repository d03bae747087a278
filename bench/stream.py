# SPDX-License-Identifier: Apache-2.0
"""How does SmcStream compare with trio TCP: round trip of 64 bytes, stream of 64 KiB messages, CPU of both ends?

Two processes, a checkpoint in every call, rounds of the two transports in turn, ratios round by round.
"""

from __future__ import annotations

from typing import Any

import trio
from harness import manager, run, table

from ism.perf.compare import compare, far_end


def body(quick: bool) -> dict[str, Any]:
    """Run the rounds and print medians with their range."""
    rounds, pings, total = (1, 50, 1 << 22) if quick else (5, 3000, 1 << 29)
    with manager(), far_end() as far:
        result = trio.run(lambda: compare(far, rounds=rounds, pings=pings, total=total))
    rows = []
    for label, name, scale in (
        ("round trip 64 B p50, us", "rtt_p50", 1e6),
        ("round trip 64 B p99, us", "rtt_p99", 1e6),
        ("stream 64 KiB, GB/s", "throughput", 1e-9),
        ("CPU of both ends, s/GB", "cpu_s_per_gb", 1.0),
    ):
        cells = [label]
        for transport in ("smc", "tcp"):
            values = [value * scale for value in getattr(result.samples[transport], name)]
            cells.append(f"{result.median(transport, name) * scale:.2f} ({min(values):.2f}..{max(values):.2f})")
        rows.append([*cells, f"{result.ratio(name):.2f}x"])
    table("SmcStream against trio TCP", ("", "smc", "tcp", "ratio"), rows)
    return result.as_json()


if __name__ == "__main__":
    run(__doc__ or "", body)

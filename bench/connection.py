# SPDX-License-Identifier: Apache-2.0
"""What does one connection cost: connect, first byte echoed, close, over shared memory, TCP, and when it falls back?

Blocking sockets, two processes, one connection after the other. *fresh* has no region to use again, as the first one
between two processes; `smc` uses those of the one before. Rounds of the cases in turn, ratios round by round.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from echo import CASES, ECHO, Ends, ends, in_turn, medians, show
from harness import Figures, manager, run

from ism.perf import plots

_STEPS = ("connect_s", "first_byte_s", "close_s")
_FRESH = "fresh"
_ROWS = (
    ("connect, us", "connect_s", 1e6, False),
    ("first byte echoed, us", "first_byte_s", 1e6, False),
    ("close, us", "close_s", 1e6, False),
    ("all, us", "all_s", 1e6, False),
)


def set_up(far: Ends, case: str, count: int) -> dict[str, float]:
    """Connect, echo a byte, close, again and again. Medians of each step."""
    times: dict[str, list[float]] = {name: [] for name in (*_STEPS, "all_s")}
    for _ in range(count):
        if case == _FRESH:
            far.forget()
        marks = [time.perf_counter()]
        connection: Any = far.connect("smc" if case == _FRESH else case)
        marks.append(time.perf_counter())
        connection.sendall(ECHO)
        connection.recv(1)
        marks.append(time.perf_counter())
        connection.close()
        marks.append(time.perf_counter())
        for name, began, ended in zip(_STEPS, marks, marks[1:], strict=False):
            times[name].append(ended - began)
        times["all_s"].append(marks[-1] - marks[0])
    return {name: statistics.median(values) for name, values in times.items()}


def body(quick: bool) -> Figures:
    """Run the rounds and print the table."""
    rounds, count = (1, 10) if quick else (7, 200)
    with manager(), ends() as far:
        samples = in_turn(rounds, (_FRESH, *CASES), lambda case: set_up(far, case, count))
    ratios = show("one connection, blocking sockets, two processes", samples, _ROWS)
    extra = statistics.median(
        ours["first_byte_s"] + ours["connect_s"] - tcp["first_byte_s"] - tcp["connect_s"]
        for ours, tcp in zip(samples["fallback"], samples["tcp"], strict=True)
    )
    print(f"  a fallback connection's first byte comes {extra * 1e6:.0f} us after plain TCP's")
    return {"rounds": samples, "against_tcp": ratios, "fallback_extra_s": extra}


def chart(figures: Figures, path: str) -> None:
    """Bars of each step."""
    steps = {label.removesuffix(", us"): medians(figures["rounds"], name, scale) for label, name, scale, _ in _ROWS}
    plots.bar_chart(path, "One connection", "microseconds", "", steps)


if __name__ == "__main__":
    run(__doc__ or "", body, chart)

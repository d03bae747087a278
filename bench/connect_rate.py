# SPDX-License-Identifier: Apache-2.0
"""How many connections a second can be made, with and without regions that earlier ones have left?

Blocking sockets, two processes; each connection carries a byte each way. *one by one*: each is closed before the next,
so that it takes the regions of the one before. *kept*: so many are made and only then closed, so that each has regions
of its own. *threads*: one by one, but in several threads at once.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from echo import CASES, Ends, ends, in_turn, medians, show
from harness import Figures, manager, run

from ism.perf import plots

_THREADS = 4
_ROWS = (
    ("one by one", "one_by_one", 1, True),
    (f"{_THREADS} threads", "threads", 1, True),
    ("kept: connect", "kept", 1, True),
    ("kept: close", "closed", 1, True),
)


def one_by_one(far: Ends, case: str, count: int) -> float:
    """Connections a second."""
    began = time.perf_counter()
    for _ in range(count):
        far.opened(case).close()
    return count / (time.perf_counter() - began)


def threads(far: Ends, case: str, count: int) -> float:
    """The same in several threads at once."""
    each = -(-count // _THREADS)
    workers = [threading.Thread(target=one_by_one, args=(far, case, each)) for _ in range(_THREADS)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return _THREADS * each / (time.perf_counter() - began)


def kept(far: Ends, case: str, count: int) -> tuple[float, float]:
    """Make all, then close all. Connections a second, both ways."""
    far.forget()
    connections: list[Any] = []
    began = time.perf_counter()
    connections = [far.opened(case) for _ in range(count)]
    made = time.perf_counter()
    for connection in connections:
        connection.close()
    return count / (made - began), count / (time.perf_counter() - made)


def body(quick: bool) -> Figures:
    """Run the rounds and print the table."""
    rounds, count = (1, 12) if quick else (5, 200)

    def measure(case: str) -> dict[str, float]:
        made, closed = kept(far, case, count)
        return {
            "one_by_one": one_by_one(far, case, count),
            "threads": threads(far, case, count),
            "kept": made,
            "closed": closed,
        }

    with manager(), ends() as far:
        samples = in_turn(rounds, CASES, measure)
    ratios = show("connections a second, blocking sockets, two processes", samples, _ROWS)
    return {"rounds": samples, "count": count, "against_tcp": ratios}


def chart(figures: Figures, path: str) -> None:
    """Bars of each way, closing apart."""
    ways = {label: medians(figures["rounds"], name, scale) for label, name, scale, _ in _ROWS if name != "closed"}
    plots.bar_chart(path, "Connections a second", "connections a second", "", ways)


if __name__ == "__main__":
    run(__doc__ or "", body, chart)

# SPDX-License-Identifier: Apache-2.0
"""How long does a user wait: for `ism --help`, `ism status`, and the first connection of a fresh process?

Whole processes, wall clock, with a warm compile cache. The first connection is timed inside a fresh interpreter, from
its first line (imports included) to the first byte back.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

from harness import manager, run, table

from ism.perf import plots
from ism.perf.compare import far_end
from ism.shm import compile_kernels

_FIRST = """
import time
start = time.perf_counter()
import trio
import ism.smc
from ism.perf import workloads

async def main():
    async with await ism.smc.open_tcp_stream("127.0.0.1", {port}, smc="require") as stream:
        await workloads.ping_pong(stream, size=1, rounds=1, warm_up=0)
        print(time.perf_counter() - start)

trio.run(main)
"""


def seconds(*command: str) -> float:
    """Run a command and return its wall time. Raises CalledProcessError."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def body(quick: bool) -> dict[str, Any]:
    """Time everything and print the table."""
    compile_kernels()
    repeats = 1 if quick else 7
    times: dict[str, list[float]] = {}
    with manager() as host:
        for name, command in (("ism --help", ["--help"]), ("ism status", ["status", "--run-dir", str(host.directory)])):
            times[name] = [seconds(sys.executable, "-m", "ism", *command) for _ in range(repeats)]
        with far_end() as far:
            program = _FIRST.format(port=far.ports["smc"])
            times["first connection"] = [
                float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout)
                for _ in range(repeats)
            ]
    rows = [
        [name, f"{statistics.median(values):.3f}", f"{min(values):.3f}..{max(values):.3f}"]
        for name, values in times.items()
    ]
    table("waiting of a user, s", ("", "median", "range"), rows)
    return times


def chart(figures: dict[str, Any], path: str) -> None:
    """One bar a wait."""
    bars = {name: statistics.median(values) for name, values in figures.items()}
    plots.bar_chart(path, "What a user waits for", "seconds, median", "", {"wait": bars})


if __name__ == "__main__":
    run(__doc__ or "", body, chart)

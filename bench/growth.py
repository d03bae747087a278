# SPDX-License-Identifier: Apache-2.0
"""What the scaling benchmarks share: what a process uses, read from /proc, and how a cost grows with a number.

The exponent of a growth is the slope of a straight line through log(cost) over log(n): 0 for a cost that does not
depend on n, 1 for one that doubles with it, more than 1 for what must not be.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import table

LEAST = 10
"""From which n on a fit counts by default: below, what is constant hides what grows."""

Points = Mapping[int, float]
"""A cost at each n."""


@dataclass(frozen=True)
class Use:
    """What a process uses: CPU seconds, private bytes, descriptors, and how often each of its threads went to sleep."""

    cpu_s: float
    private_bytes: int
    fds: int
    sleeps: Mapping[str, int]

    def sleeps_since(self, before: Use) -> int:
        """How often threads that were there before have gone to sleep since."""
        return sum(count - before.sleeps[thread] for thread, count in self.sleeps.items() if thread in before.sleeps)


def use_of(pid: int) -> Use:
    """Read what a process uses now."""
    sleeps = {}
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            sleeps[thread] = _field(Path(f"/proc/{pid}/task/{thread}/status"), "voluntary_ctxt_switches:")
    private = _field(Path(f"/proc/{pid}/status"), "RssAnon:") * 1024
    return Use(cpu_s(pid), private, len(os.listdir(f"/proc/{pid}/fd")), sleeps)


def cpu_s(pid: int) -> float:
    """CPU seconds of a process, ended threads included, to the nanosecond (clock_getcpuclockid(3))."""
    return time.clock_gettime(~pid << 3 | 2)


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise SystemExit(f"{path} has no {name}")


def region_bytes(manager_pid: int) -> tuple[int, int]:
    """Bytes of the regions that a manager holds: how long they are, and how much of them has pages."""
    size = used = 0
    folder = f"/proc/{manager_pid}/fd"
    for number in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"{folder}/{number}").startswith("/memfd:ism:"):
                found = os.stat(f"{folder}/{number}")
                size += found.st_size
                used += found.st_blocks * 512
    return size, used


def raise_descriptor_limit() -> None:
    """Allow this process, and those that it starts, as many descriptors as it may have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def sizes(largest: int) -> list[int]:
    """1, 3, 10, 30 ... up to `largest`."""
    found = [base * 10**power for power in range(7) for base in (1, 3)]
    return [size for size in found if size < largest] + [largest]


def exponent(points: Points, *, least: int = LEAST) -> float | None:
    """The slope in the log-log plane, by least squares over the n of at least `least`. None for too few points."""
    pairs = [(math.log(n), math.log(cost)) for n, cost in points.items() if n >= least and cost > 0]
    if len(pairs) < 2:
        return None
    mean_x, mean_y = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in pairs)
    return sum((x - mean_x) * (y - mean_y) for x, y in pairs) / spread if spread else None


def show(title: str, what: str, costs: Mapping[str, Points], *, least: int = LEAST) -> dict[str, float | None]:
    """Print the costs at each n and the exponent of each, and return the exponents.

    Args: `least`: from which n on the fit counts; small ones show what is constant.
    """
    numbers: Sequence[int] = sorted({n for points in costs.values() for n in points})
    slopes = {name: exponent(points, least=least) for name, points in costs.items()}
    rows = [[str(n), *(_cell(points.get(n)) for points in costs.values())] for n in numbers]
    rows.append(["exponent", *("" if slope is None else f"{slope:.2f}" for slope in slopes.values())])
    table(title, (what, *costs), rows)
    return slopes


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def series(costs: Mapping[str, Points], names: Iterable[str] | None = None) -> dict[str, list[tuple[float, float]]]:
    """The costs as a chart takes them."""
    chosen = costs if names is None else {name: costs[name] for name in names}
    return {name: [(float(n), cost) for n, cost in sorted(points.items())] for name, points in chosen.items()}

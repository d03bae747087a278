# SPDX-License-Identifier: Apache-2.0
"""How many CPUs everybody else uses meanwhile: other programs of this machine, and other machines of its host.

Two ends want two CPUs to themselves. What others take shows up in every figure, so it is recorded with each sample.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_BUSY: Final = (0, 1, 2, 5, 6, 7)
"""Of the line `cpu` in /proc/stat: user, nice, system, irq, softirq, steal; guests are in user already."""


def busy_s(stat: str) -> float:
    """Return the CPU time that all CPUs have spent, or were not given, from the text of /proc/stat."""
    fields = stat.split("\n", 1)[0].split()[1:]
    return sum(int(fields[at]) for at in _BUSY if at < len(fields)) / _TICKS


def _process_s(pid: int) -> float:
    """Return what a live process has used, 0 when it is gone (it is in our own children's time then)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


class Others:
    """From now on. `pids`: children of this process that count as ours."""

    def __init__(self, pids: Iterable[int]) -> None:
        """Raises OSError."""
        self._pids = tuple(pids)
        self._began = self._now()

    def _now(self) -> tuple[float, float]:
        own = os.times()
        ours = own.user + own.system + own.children_user + own.children_system + sum(map(_process_s, self._pids))
        return time.monotonic(), busy_s(Path("/proc/stat").read_text()) - ours

    def cpus(self) -> float:
        """Return how many CPUs others have used on average."""
        (began_s, before), (now_s, after) = self._began, self._now()
        return max(0.0, (after - before) / (now_s - began_s)) if now_s > began_s else 0.0

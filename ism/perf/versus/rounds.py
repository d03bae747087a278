# SPDX-License-Identifier: Apache-2.0
"""The order of the run: rounds, each of which takes every sample once, in an order of its own.

Within a round, samples that will be compared (the same workload and size) follow each other; their order, and that of
the workloads, is shuffled with a seed that is recorded. A probe of the two CPUs comes before each sample. A sample that
fails is recorded and the run goes on.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ism.perf.versus import iperf
from ism.perf.versus.catalog import BY_NAME, MEMCPY, Entry
from ism.perf.versus.others import Others
from ism.perf.versus.pair import Pair, PairError, manager

SMALL, LARGE, HUGE = 64, 65536, 1 << 20
SIZES: Final = (64, 256, 1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20)
PARKED: Final = "parked"
"""A round trip between ends that never spin; the other kinds of samples are those of `figures`."""
DISTURBED_CPUS: Final = 0.3
"""A sample during which others use so much is taken again."""
_AGAIN: Final = 0.25
"""The share of a round's samples that are taken again at most: the run is to end in time on a busy machine too."""
_COPY_S: Final = 0.06
_PLACEMENTS: Final = ("pinned", "free")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How much is measured. Attributes: `free_rounds`: rounds with the ends wherever the scheduler puts them;
    `sweep_rounds`, `sizes`: of the figures over message size; `patience`: how often a sample that others have disturbed
    is taken again."""

    rounds: int
    free_rounds: int
    sweep_rounds: int
    warm_s: float
    measure_s: float
    patience: int
    sizes: tuple[int, ...]
    seed: int
    cpus: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Job:
    """One sample to take. `kind`: rtt, stream, parked."""

    peer: str
    kind: str
    size: int

    def name(self) -> str:
        """Return it in words."""
        return f"{self.peer} {self.kind} {self.size} B"


def jobs(entries: list[Entry]) -> list[Job]:
    """Return what each round measures."""
    names = [entry.name for entry in entries]
    found = []
    for name in names:
        if name != "iperf3":
            found += [Job(name, "rtt", SMALL), Job(name, "stream", SMALL)]
        found += [Job(name, "stream", LARGE), Job(name, "stream", HUGE)]
    if "smc-blocking" in names:
        found.append(Job("smc-blocking", PARKED, SMALL))
    return found + [Job(MEMCPY, "stream", size) for size in (LARGE, HUGE)]


def sweep_jobs(entries: list[Entry], sizes: tuple[int, ...]) -> list[Job]:
    """Return what is measured over message size, beyond `jobs`."""
    everything = [
        Job(entry.name, kind, size) for entry in entries if entry.swept for size in sizes for kind in ("rtt", "stream")
    ]
    known = set(jobs(entries))
    return [job for job in everything if job not in known]


def shuffled(these: list[Job], seed: int, number: int) -> Iterator[Job]:
    """Yield a round's jobs: what is compared stays together, all else is in an order of this round's."""
    order = random.Random(f"{seed}/{number}")
    groups: dict[tuple[str, int], list[Job]] = {}
    for job in these:
        groups.setdefault(("rtt" if job.kind == PARKED else job.kind, job.size), []).append(job)
    keys = sorted(groups)
    order.shuffle(keys)
    for key in keys:
        group = groups[key]
        order.shuffle(group)
        yield from group


class Runner:
    """Takes all samples. Attributes: `samples`, `failures` (both as in the document)."""

    def __init__(self, entries: list[Entry], options: Options, say: Callable[[str], None]) -> None:
        """Args: `say`: told where it is."""
        self._entries, self._options, self._say = entries, options, say
        self.samples: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []

    def run(self) -> None:
        """Do it. Raises PairError when not even the ends can be started."""
        options = self._options
        with tempfile.TemporaryDirectory(prefix="ism-compare-") as name, manager(Path(name)) as environment:
            with Pair(options.cpus, environment) as pair:
                pair.together("ready")
                every = jobs(self._entries)
                for number in range(options.rounds):
                    self._round(pair, "pinned", number, every, f"round {number + 1} of {options.rounds}")
                swept = sweep_jobs(self._entries, options.sizes)
                for number in range(options.sweep_rounds if swept else 0):
                    self._round(pair, "pinned", number, swept, f"message sizes, {number + 1} of {options.sweep_rounds}")
            if options.free_rounds:
                with Pair(None, environment) as pair:
                    for number in range(options.free_rounds):
                        self._round(pair, "free", number, every, f"not pinned, {number + 1} of {options.free_rounds}")

    def _round(self, pair: Pair, placement: str, number: int, these: list[Job], title: str) -> None:
        began_s, spare = time.monotonic(), int(len(these) * _AGAIN)
        for job in shuffled(these, self._options.seed + _PLACEMENTS.index(placement), number):
            where = {"placement": placement, "round": number, "peer": job.peer, "kind": job.kind, "size": job.size}
            try:
                tries = [self._try(pair, job)]
                while tries[-1]["others_cpus"] > DISTURBED_CPUS and len(tries) <= self._options.patience and spare:
                    spare -= 1
                    tries.append(self._try(pair, job))
            except PairError as exc:
                pair.stop(at_once=True)
                self.failures.append(where | {"error": str(exc)})
                self._say(f"  {job.name()}: {exc}")
            else:
                best = min(tries, key=lambda one: float(one["others_cpus"]))
                self.samples.append(where | {"tries": len(tries)} | best)
        self._say(f"{title}: {len(these)} samples in {time.monotonic() - began_s:.0f} s")

    def _try(self, pair: Pair, job: Job) -> dict[str, Any]:
        """Take a sample once, with what else is recorded of it."""
        (probe_s, turn_s), others = pair.probe(), Others(pair.pids())
        figures = self._take(pair, job)
        return {"probe_s": probe_s, "turn_s": turn_s, "others_cpus": others.cpus()} | figures

    def _take(self, pair: Pair, job: Job) -> dict[str, Any]:
        options = self._options
        if job.peer == MEMCPY:
            return pair.memcpy(job.size, min(_COPY_S, options.measure_s))
        if not BY_NAME[job.peer].module:
            return iperf.sample(job.size, options.measure_s, pair.cpus)
        script = {
            "kind": "rtt" if job.kind == PARKED else job.kind, "size": job.size,
            "warm_s": options.warm_s, "measure_s": options.measure_s,
        }  # fmt: skip
        return pair.sample(job.peer, script, spin_us=0 if job.kind == PARKED else None)

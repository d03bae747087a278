# SPDX-License-Identifier: Apache-2.0
"""What these sockets are to reach, as ratios to a peer in the same run: floors that must hold, and goals.

A ratio is taken in each round, from the samples of that round, such that more is better: of rates ours over theirs, of
times and CPU theirs over ours. Its median over the rounds is judged. Values in, verdicts out; nothing is measured here.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from ism.perf.versus.catalog import MEMCPY

Verdict = Literal["held", "below goal", "below floor", "not measured"]
_RATES: Final = ("bytes_per_s", "messages_per_s")


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of one peer's samples."""

    peer: str
    kind: str
    size: int
    name: str

    def of(self, sample: Mapping[str, Any]) -> float | None:
        """Return it from a sample, None when that is another's or has none."""
        if (sample["peer"], sample["kind"], sample["size"]) != (self.peer, self.kind, self.size):
            return None
        value: float | None = sample[self.name]
        return value


@dataclass(frozen=True, slots=True)
class Goal:
    """One row: `ours` against `theirs`."""

    name: str
    ours: Figure
    theirs: Figure
    floor: float
    goal: float

    def how(self) -> str:
        """Return in words what is divided by what."""
        ours, theirs = (f"{one.peer} {one.kind} {one.size} B {one.name}" for one in (self.ours, self.theirs))
        return f"{ours} / {theirs}" if self.ours.name in _RATES else f"{theirs} / {ours}"

    def ratios(self, samples: Iterable[Mapping[str, Any]]) -> list[float]:
        """Return the ratio of each round that has both figures."""
        found: tuple[dict[int, float], dict[int, float]] = {}, {}
        for sample in samples:
            for figure, rounds in zip((self.ours, self.theirs), found, strict=True):
                value = figure.of(sample)
                if value:
                    rounds[sample["round"]] = value
        ours, theirs = found
        both = sorted(ours.keys() & theirs.keys())
        if self.ours.name in _RATES:
            return [ours[number] / theirs[number] for number in both]
        return [theirs[number] / ours[number] for number in both]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A row of the table. Attributes: `median`, `least`, `most`: None when it was not measured."""

    name: str
    how: str
    floor: float
    goal: float
    verdict: Verdict
    rounds: int
    median: float | None = None
    least: float | None = None
    most: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return it by name."""
        return asdict(self)


def judge(goal: Goal, samples: Iterable[Mapping[str, Any]]) -> Judged:
    """Judge one row from the samples of one placement."""
    ratios = goal.ratios(samples)
    if not ratios:
        verdict: Verdict = "not measured"
        return Judged(name=goal.name, how=goal.how(), floor=goal.floor, goal=goal.goal, verdict=verdict, rounds=0)
    median = statistics.median(ratios)
    verdict = "below floor" if median < goal.floor else "below goal" if median < goal.goal else "held"
    return Judged(
        name=goal.name, how=goal.how(), floor=goal.floor, goal=goal.goal, verdict=verdict, rounds=len(ratios),
        median=median, least=min(ratios), most=max(ratios),
    )  # fmt: skip


def judge_all(samples: list[dict[str, Any]], placement: str = "pinned") -> list[Judged]:
    """Judge every row from the samples of one placement."""
    these = [sample for sample in samples if sample["placement"] == placement]
    return [judge(goal, these) for goal in GOALS]


def _rtt(peer: str, kind: str = "rtt") -> Figure:
    return Figure(peer, kind, 64, "p50_s")


def _messages(peer: str) -> Figure:
    return Figure(peer, "stream", 64, "messages_per_s")


def _stream(peer: str, size: int) -> Figure:
    return Figure(peer, "stream", size, "bytes_per_s")


def _cpu(peer: str) -> Figure:
    return Figure(peer, "stream", 65536, "cpu_s_per_gb")


_K64, _M1 = 65536, 1 << 20
_SMC, _TRIO, _AMORTISED, _VIEW = "smc-blocking", "smc-trio", "smc-trio-amortised", "smc-view"

GOALS: Final = (
    Goal("round trip 64 B, vs blocking TCP", _rtt(_SMC), _rtt("tcp-blocking"), 25, 40),
    Goal("round trip 64 B, vs blocking UNIX", _rtt(_SMC), _rtt("unix-blocking"), 18, 25),
    Goal("round trip 64 B, vs spinning TCP", _rtt(_SMC), _rtt("tcp-spinning"), 5, 8),
    Goal("messages/s 64 B, vs blocking TCP", _messages(_SMC), _messages("tcp-blocking"), 5, 10),
    Goal("messages/s 64 B, vs trio TCP", _messages(_SMC), _messages("tcp-trio"), 20, 28),
    Goal("stream 64 KiB, vs blocking TCP", _stream(_SMC, _K64), _stream("tcp-blocking", _K64), 3, 5),
    Goal("stream 64 KiB, vs trio TCP", _stream(_SMC, _K64), _stream("tcp-trio", _K64), 5, 8),
    Goal("stream 1 MiB, vs blocking TCP", _stream(_SMC, _M1), _stream("tcp-blocking", _M1), 2.5, 5),
    Goal("stream 1 MiB, vs trio TCP", _stream(_SMC, _M1), _stream("tcp-trio", _M1), 2.5, 10),
    Goal("trio round trip 64 B, vs trio TCP", _rtt(_TRIO), _rtt("tcp-trio"), 4.5, 7),
    Goal("trio round trip 64 B, amortised, vs trio TCP", _rtt(_AMORTISED), _rtt("tcp-trio"), 15, 22),
    Goal("trio messages/s 64 B, vs trio TCP", _messages(_TRIO), _messages("tcp-trio"), 1.5, 2.5),
    Goal("trio messages/s 64 B, amortised, vs trio TCP", _messages(_AMORTISED), _messages("tcp-trio"), 6, 11),
    Goal("trio stream 64 KiB, vs trio TCP", _stream(_TRIO, _K64), _stream("tcp-trio", _K64), 1.5, 4),
    Goal("trio stream 64 KiB, amortised, vs trio TCP", _stream(_AMORTISED, _K64), _stream("tcp-trio", _K64), 3.5, 7),
    Goal("parked round trip 64 B, vs blocking TCP", _rtt(_SMC, "parked"), _rtt("tcp-blocking"), 0.6, 1.0),
    Goal("CPU per GB 64 KiB, vs trio TCP", _cpu(_SMC), _cpu("tcp-trio"), 4, 6),
    Goal("CPU per GB 64 KiB, vs blocking TCP", _cpu(_SMC), _cpu("tcp-blocking"), 2, 3.4),
    Goal("stream 64 KiB, of one thread's memcpy", _stream(_SMC, _K64), _stream(MEMCPY, _K64), 0.2, 0.35),
    Goal("stream 1 MiB, of one thread's memcpy", _stream(_SMC, _M1), _stream(MEMCPY, _M1), 0.2, 0.35),
    Goal("view stream 64 KiB, of one thread's memcpy", _stream(_VIEW, _K64), _stream(MEMCPY, _K64), 0.2, 0.6),
    Goal("view stream 1 MiB, of one thread's memcpy", _stream(_VIEW, _M1), _stream(MEMCPY, _M1), 0.2, 0.6),
    Goal("messages/s 64 B, vs iceoryx2", _messages(_SMC), _messages("iceoryx2"), 4, 9),
    Goal("stream 64 KiB, vs iceoryx2", _stream(_SMC, _K64), _stream("iceoryx2", _K64), 1.9, 2.5),
    Goal("stream 1 MiB, vs iceoryx2", _stream(_SMC, _M1), _stream("iceoryx2", _M1), 0.5, 1.4),
)

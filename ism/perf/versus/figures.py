# SPDX-License-Identifier: Apache-2.0
"""What is asked of a peer, and what comes back. Values, and the plan of one sample; nothing is measured here.

A sample is one connection: a warm-up of doubling steps until enough time has passed, which also tells how fast it goes,
then one step of about the wanted length, whose figures are kept.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

Kind = Literal["rtt", "stream"]
"""Round trips one at a time; or messages one way, until the receiver has acknowledged the last."""

_FIRST_BYTES: Final = 1 << 18
_FIRST_MESSAGES: Final = 64
_FEWEST: Final[dict[str, int]] = {"rtt": 100, "stream": 8}
_MOST: Final = 2_000_000
_GROWTH: Final = 8


@dataclass(frozen=True, slots=True)
class Script:
    """One sample. Attributes: `size` of a message, bytes; how long to warm up and to measure, seconds, about."""

    kind: Kind
    size: int
    warm_s: float
    measure_s: float


@dataclass(frozen=True, slots=True)
class Step:
    """So many messages, now."""

    kind: Kind
    size: int
    count: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one step took. Attributes: CPU of both ends, user and system; `times_ns`: of each round trip."""

    seconds: float
    near_cpu_s: float
    far_cpu_s: float
    times_ns: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One sample's figures; None where it has none of that kind."""

    count: int
    seconds: float
    messages_per_s: float
    bytes_per_s: float
    cpu_s_per_gb: float | None
    p50_s: float | None = None
    p99_s: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return them by name."""
        return asdict(self)


def plan(script: Script) -> Generator[Step, Outcome, Figures]:
    """Yield the steps of a sample; wants each one's outcome sent back. Returns the figures of the last."""
    kind, size = script.kind, script.size
    count = min(max(_FEWEST[kind], _FIRST_BYTES // size), _FIRST_MESSAGES)
    passed_s = 0.0
    while True:
        outcome = yield Step(kind, size, count)
        passed_s += outcome.seconds
        each_s = max(outcome.seconds, 1e-9) / count
        if passed_s >= script.warm_s:
            break
        left = int((script.warm_s - passed_s) / each_s) + 1
        count = max(_FEWEST[kind], min(left, count * _GROWTH, _MOST))
    count = max(_FEWEST[kind], min(int(script.measure_s / each_s), _MOST))
    return figures_of(Step(kind, size, count), (yield Step(kind, size, count)))


def figures_of(step: Step, outcome: Outcome) -> Figures:
    """Return the figures of one step."""
    moved = step.count * step.size
    if step.kind == "stream":
        return Figures(
            count=step.count,
            seconds=outcome.seconds,
            messages_per_s=step.count / outcome.seconds,
            bytes_per_s=moved / outcome.seconds,
            cpu_s_per_gb=(outcome.near_cpu_s + outcome.far_cpu_s) / (moved / 1e9),
        )
    times = sorted(outcome.times_ns)
    return Figures(
        count=step.count,
        seconds=outcome.seconds,
        messages_per_s=step.count / outcome.seconds,
        bytes_per_s=moved / outcome.seconds,
        cpu_s_per_gb=None,
        p50_s=times[len(times) // 2] / 1e9,
        p99_s=times[min(len(times) - 1, len(times) * 99 // 100)] / 1e9,
    )

# SPDX-License-Identifier: Apache-2.0
"""The goals of `ism perf compare`, judged from made-up samples."""

from __future__ import annotations

from typing import Any

import pytest

from ism.perf.versus.catalog import BY_NAME, MEMCPY
from ism.perf.versus.goals import GOALS, Figure, Goal, judge, judge_all
from ism.perf.versus.rounds import HUGE, LARGE, PARKED, SMALL, jobs

RATE = Goal("rate", Figure("a", "stream", 64, "bytes_per_s"), Figure("b", "stream", 64, "bytes_per_s"), 2, 4)
TIME = Goal("time", Figure("a", "rtt", 64, "p50_s"), Figure("b", "rtt", 64, "p50_s"), 2, 4)


def sample(peer: str, number: int, *, kind: str = "stream", size: int = 64, **figures: float) -> dict[str, Any]:
    names = ("bytes_per_s", "messages_per_s", "p50_s", "p99_s", "cpu_s_per_gb")
    empty: dict[str, Any] = dict.fromkeys(names)
    return {"peer": peer, "kind": kind, "size": size, "round": number, "placement": "pinned"} | empty | figures


def rates(ours: list[float], theirs: list[float]) -> list[dict[str, Any]]:
    pairs = [("a", number, value) for number, value in enumerate(ours)]
    pairs += [("b", number, value) for number, value in enumerate(theirs)]
    return [sample(peer, number, bytes_per_s=value) for peer, number, value in pairs]


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [(39.0, "below goal"), (40.0, "held"), (20.0, "below goal"), (19.9, "below floor")],
)
def test_the_median_of_the_ratios_is_judged_against_floor_and_goal(ours: float, verdict: str) -> None:
    row = judge(RATE, rates([1.0, ours, 1000.0], [10.0, 10.0, 10.0]))
    assert (row.verdict, row.median, row.least, row.most) == (verdict, ours / 10, 0.1, 100.0)


def test_a_ratio_is_taken_within_a_round_not_between_medians() -> None:
    row = judge(RATE, rates([10.0, 20.0, 90.0], [1.0, 10.0, 30.0]))
    assert row.median == 3.0  # of 10, 2 and 3; the medians' ratio would be 2


def test_of_times_and_cpu_the_smaller_is_better() -> None:
    samples = [sample("a", 0, kind="rtt", p50_s=1e-6), sample("b", 0, kind="rtt", p50_s=5e-6)]
    row = judge(TIME, samples)
    assert row.median == pytest.approx(5.0)
    assert row.how == "b rtt 64 B p50_s / a rtt 64 B p50_s"


def test_rounds_in_which_one_of_both_failed_do_not_count() -> None:
    row = judge(RATE, rates([10.0, 20.0], [10.0]))
    assert (row.rounds, row.median) == (1, 1.0)


@pytest.mark.parametrize("samples", [[], rates([1.0], []), rates([], [1.0])])
def test_a_row_whose_peer_is_absent_is_not_measured(samples: list[dict[str, Any]]) -> None:
    row = judge(RATE, samples)
    assert (row.verdict, row.median, row.least, row.most, row.rounds) == ("not measured", None, None, None, 0)


def test_other_sizes_and_kinds_are_not_mixed_in() -> None:
    samples = [*rates([20.0], [10.0]), sample("a", 0, size=128, bytes_per_s=1.0), sample("a", 0, kind="rtt", p50_s=1.0)]
    assert judge(RATE, samples).median == 2.0


def test_only_the_wanted_placement_counts() -> None:
    samples = [
        sample("smc-blocking", 0, kind="rtt", p50_s=1e-6),
        sample("tcp-blocking", 0, kind="rtt", p50_s=30e-6),
        sample("smc-blocking", 0, kind="rtt", p50_s=1.0) | {"placement": "free"},
    ]
    rows = {row.name: row for row in judge_all(samples)}
    assert rows["round trip 64 B, vs blocking TCP"].median == pytest.approx(30.0)
    assert rows["round trip 64 B, vs blocking TCP"].verdict == "below goal"
    assert rows["stream 64 KiB, vs iceoryx2"].verdict == "not measured"
    assert {row.name: row.verdict for row in judge_all(samples, "free")}["round trip 64 B, vs blocking TCP"] == (
        "not measured"
    )


def test_every_row_is_of_samples_that_a_run_takes() -> None:
    taken = {(job.peer, job.kind, job.size) for job in jobs(list(BY_NAME.values()))}
    for goal in GOALS:
        for figure in (goal.ours, goal.theirs):
            assert (figure.peer, figure.kind, figure.size) in taken, goal.name
        assert 0 < goal.floor < goal.goal
    assert len({goal.name for goal in GOALS}) == len(GOALS)
    assert {(MEMCPY, "stream", LARGE), (MEMCPY, "stream", HUGE), ("smc-blocking", PARKED, SMALL)} <= taken

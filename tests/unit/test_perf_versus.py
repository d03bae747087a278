# SPDX-License-Identifier: Apache-2.0
"""The parts of `ism perf compare` that measure nothing: the plan of a sample, the order of the rounds, names, CPUs."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import pytest
from click.testing import CliRunner

from ism.cli.perf import perf
from ism.errors import ConfigError
from ism.perf.versus.catalog import BY_NAME, CATALOG, chosen
from ism.perf.versus.figures import Figures, Outcome, Script, Step, figures_of, plan
from ism.perf.versus.machine import facts, peers, two_cpus
from ism.perf.versus.others import Others, busy_s
from ism.perf.versus.probe import count_s
from ism.perf.versus.rounds import PARKED, SIZES, Job, Options, Runner, jobs, shuffled, sweep_jobs
from ism.perf.versus.text import Table, number


def play(script: Script, each_s: float) -> tuple[list[Step], Figures]:
    """Answer a plan as ends would that need so long for a message."""
    steps, taken = plan(script), []
    step = next(steps)
    try:
        while True:
            taken.append(step)
            times = [int(each_s * 1e9)] * step.count if step.kind == "rtt" else []
            step = steps.send(Outcome(step.count * each_s, 0.5, 0.25, times))
    except StopIteration as done:
        return taken, done.value


@pytest.mark.parametrize("kind", ["rtt", "stream"])
@pytest.mark.parametrize("each_s", [1e-6, 1e-3])
def test_a_sample_warms_up_long_enough_and_then_measures_as_long_as_wanted(kind: str, each_s: float) -> None:
    steps, figures = play(Script(kind, 64, warm_s=0.2, measure_s=0.5), each_s)  # type: ignore[arg-type]
    *warm_up, measured = steps
    assert sum(step.count for step in warm_up) * each_s >= 0.2
    assert measured.count * each_s == pytest.approx(0.5, rel=0.01)
    assert figures.count == measured.count
    assert figures.messages_per_s == pytest.approx(1 / each_s)


def test_a_very_slow_peer_still_gives_enough_messages_for_a_figure() -> None:
    steps, figures = play(Script("rtt", 64, warm_s=0.01, measure_s=0.01), each_s=1.0)
    assert figures.count == steps[-1].count == 100


def test_figures_of_a_stream_have_rates_and_the_cpu_of_both_ends() -> None:
    found = figures_of(Step("stream", 1000, 1_000_000), Outcome(0.5, 0.3, 0.1, []))
    assert (found.bytes_per_s, found.messages_per_s, found.p50_s) == (2e9, 2e6, None)
    assert found.cpu_s_per_gb == pytest.approx(0.4)


def test_figures_of_round_trips_have_percentiles() -> None:
    found = figures_of(Step("rtt", 64, 100), Outcome(0.5, 0.3, 0.1, [number * 1000 for number in range(100, 0, -1)]))
    assert (found.p50_s, found.p99_s, found.cpu_s_per_gb) == (51e-6, 100e-6, None)


def test_a_round_has_every_job_once_and_keeps_what_is_compared_together() -> None:
    every = jobs(list(CATALOG))
    order = list(shuffled(every, 7, 0))
    assert sorted(order, key=str) == sorted(every, key=str)
    groups = [("rtt" if job.kind == PARKED else job.kind, job.size) for job in order]
    changes = sum(one != other for one, other in pairwise(groups))
    assert changes == len(set(groups)) - 1


def test_the_order_follows_from_the_seed_and_differs_between_rounds() -> None:
    every = jobs(list(CATALOG))
    first, again, other = (list(shuffled(every, 7, number)) for number in (0, 0, 1))
    assert first == again
    assert first != other
    assert first != list(shuffled(every, 8, 0))


def test_the_sweep_adds_only_what_the_rounds_have_not() -> None:
    every, swept = jobs(list(CATALOG)), sweep_jobs(list(CATALOG), SIZES)
    assert not set(every) & set(swept)
    for entry in CATALOG:
        if entry.swept:
            sizes = {job.size for job in every + swept if job.peer == entry.name and job.kind == "stream"}
            assert sizes == set(SIZES)


def test_peers_are_chosen_by_name_and_by_family() -> None:
    assert [entry.name for entry in chosen("zmq, tcp-trio")] == ["tcp-trio", "zmq-ipc", "zmq-tcp"]
    assert chosen(None) == list(CATALOG)


@pytest.mark.parametrize("names", ["tcp,nobody", "", " , "])
def test_unknown_peers_and_none_at_all_are_refused(names: str) -> None:
    with pytest.raises(ConfigError, match="--peers"):
        chosen(names)


def test_what_can_be_absent_says_how_it_is_installed() -> None:
    assert {entry.name for entry in CATALOG if not entry.install} == {
        name for name in BY_NAME if name.startswith(("smc-", "tcp-", "unix-"))
    } | {"pipe"}
    for entry in CATALOG:
        assert bool(entry.install) == bool(entry.needs or entry.program)


def test_a_peer_that_is_not_here_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    found = peers([BY_NAME["iperf3"], BY_NAME["pipe"]])
    assert found["iperf3"] == {
        "label": "iperf3 (C)", "family": "iperf3", "present": False, "version": "", "install": "apt-get install iperf3",
    }  # fmt: skip
    assert found["pipe"]["present"]


def test_the_two_ends_get_cpus_that_this_process_may_use() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    near, far = two_cpus(None)
    assert {near, far} <= set(allowed)
    assert near != far or len(allowed) == 1
    assert two_cpus(f"{allowed[-1]},{allowed[0]}") == (allowed[-1], allowed[0])


@pytest.mark.parametrize("wanted", ["", "0", "0,1,2", "a,b", "-1,0", "0,99999"])
def test_cpus_that_make_no_sense_are_refused(wanted: str) -> None:
    with pytest.raises(ConfigError, match="--cpus"):
        two_cpus(wanted)


def test_the_machine_is_described() -> None:
    found = facts()
    assert found["cpu"]
    assert found["kernel"].startswith("Linux ")
    assert {"python", "ism", "numba", "trio", "cpus_allowed"} <= found.keys()


def test_what_others_use_is_told_from_what_we_use() -> None:
    stat = "cpu  100 10 50 9000 70 5 6 9 40 0\ncpu0 1 2 3 4\n"
    assert busy_s(stat) == (100 + 10 + 50 + 5 + 6 + 9) / os.sysconf("SC_CLK_TCK")
    assert Others([]).cpus() >= 0


def test_the_speed_of_a_cpu_is_the_time_of_a_loop_s_turn() -> None:
    assert 1e-10 < count_s() < 1e-3


def test_tables_are_aligned_and_numbers_short() -> None:
    table = Table("title", ("", "us"), [("a", number(None)), ("longer", number(12.345)), ("b", number(1234.5))])
    assert table.lines() == ["title", "            us", "  a          -", "  longer  12.3", "  b       1234"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["compare", "--rounds", "0"], "--rounds"),
        (["compare", "--sizes", "64Q"], "no size"),
        (["compare", "--json", "/nonexistent/folder/file"], "folder"),
        (["-s", "compare"], "do not go with compare"),
        (["compare", "--peers", "nobody"], ""),
    ],
)
def test_compare_refuses_what_makes_no_sense_before_it_measures(arguments: list[str], word: str) -> None:
    done = CliRunner().invoke(perf, arguments)
    assert done.exit_code != 0
    assert word in done.output


class Taking(Runner):
    """A runner whose samples are made up: each try of a job is disturbed as the list says, and takes nothing."""

    def __init__(self, disturbed: list[float], patience: int) -> None:
        options = Options(
            rounds=1, free_rounds=0, sweep_rounds=0, warm_s=0, measure_s=0, patience=patience, sizes=(), seed=1,
            cpus=(0, 1),
        )  # fmt: skip
        self.said: list[str] = []
        super().__init__([], options, self.said.append)
        self.disturbed = disturbed

    def _try(self, pair: Any, job: Job) -> dict[str, Any]:
        return {"others_cpus": self.disturbed.pop(0), "left": len(self.disturbed)}


@pytest.mark.parametrize(
    ("disturbed", "patience", "tries", "kept"),
    [
        ([0.2, 9.0], 2, 1, 0.2),
        ([0.9, 0.1, 9.0], 2, 2, 0.1),
        ([0.9, 0.8, 1.0, 9.0], 2, 3, 0.8),
        ([0.9, 9.0], 0, 1, 0.9),
    ],
)
def test_a_disturbed_sample_is_taken_again_and_the_least_disturbed_is_kept(
    disturbed: list[float], patience: int, tries: int, kept: float
) -> None:
    runner = Taking(disturbed + [0.0] * 7, patience)
    runner._round(None, "pinned", 0, [Job("pipe", "rtt", 64)] * 8, "round")  # type: ignore[arg-type]
    assert (runner.samples[0]["tries"], runner.samples[0]["others_cpus"]) == (tries, kept)


def test_on_a_busy_machine_a_quarter_of_the_samples_at_most_are_taken_again() -> None:
    runner = Taking([1.0] * 100, 9)
    runner._round(None, "pinned", 0, [Job("pipe", "rtt", 64)] * 8, "round")  # type: ignore[arg-type]
    assert sum(one["tries"] for one in runner.samples) == 10
    assert len(runner.samples) == 8

# SPDX-License-Identifier: Apache-2.0
"""`ism perf compare` as a process, with samples far too short to be believed; and ends that fail."""

from __future__ import annotations

import json
import math
import os
import select
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ism.errors import IsmError
from ism.perf.versus.catalog import BY_NAME, MEMCPY
from ism.perf.versus.goals import GOALS
from ism.perf.versus.pair import Pair, manager

pytestmark = pytest.mark.processes

LIMIT_S = 200
SHORT = ("--seconds", "0.004", "--warm-up", "0.002", "--rounds", "1")
SCRIPT = {"kind": "rtt", "size": 64, "warm_s": 0.0, "measure_s": 0.001}


def compare(directory: Path, *arguments: str, path: str | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command with `directory` for everything temporary."""
    environment = os.environ | {"TMPDIR": str(directory)} | more | ({} if path is None else {"PATH": path})
    command = [sys.executable, "-m", "ism", "perf", "compare", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=environment)


def samples_of(document: dict[str, Any], peer: str, kind: str) -> dict[int, dict[str, Any]]:
    return {one["size"]: one for one in document["samples"] if (one["peer"], one["kind"]) == (peer, kind)}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    directory = tmp_path_factory.mktemp("short")
    arguments = ("--quick", *SHORT, "--sizes", "64,4K", "--seed", "5", "--json", "-")
    peers = ",".join(dict.fromkeys(entry.family for entry in BY_NAME.values()))
    return compare(directory, *arguments, "--peers", peers, path="/nonexistent"), directory


def test_every_figure_that_is_asked_for_is_in_the_document(
    short: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    done, _ = short
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["failures"] == []
    for name, peer in document["peers"].items():
        if not peer["present"]:
            continue
        trip, streams = samples_of(document, name, "rtt")[64], samples_of(document, name, "stream")
        assert 0 < trip["p50_s"] <= trip["p99_s"] < 1
        assert streams[64]["messages_per_s"] > 1
        for size in (65536, 1 << 20):
            assert streams[size]["bytes_per_s"] > 1e5
            assert streams[size]["cpu_s_per_gb"] > 0
        if BY_NAME[name].swept:
            assert samples_of(document, name, "rtt").keys() == {64, 4096}
            assert streams.keys() == {64, 4096, 65536, 1 << 20}
    assert samples_of(document, "smc-blocking", "parked")[64]["p50_s"] > 0
    assert samples_of(document, MEMCPY, "stream").keys() == {65536, 1 << 20}


def test_the_document_says_how_where_and_in_what_order_it_was_measured(
    short: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    document = json.loads(short[0].stdout)
    assert document["options"]["seed"] == 5
    assert set(document["options"]["cpus"]) <= os.sched_getaffinity(0)
    assert document["options"]["sizes"] == [64, 4096]
    assert document["machine"]["cpu"]
    assert document["peers"]["smc-view"]["present"]
    assert {one["placement"] for one in document["samples"]} == {"pinned"}
    assert all(one["probe_s"] is None or 0 < one["probe_s"] < 1 for one in document["samples"])
    assert all(0 < one["turn_s"] < 1 and one["others_cpus"] >= 0 and one["tries"] >= 1 for one in document["samples"])
    if len(set(document["options"]["cpus"])) == 2:
        assert document["probe_s"]["pinned"] is not None
    summary = document["summary"]["pinned"]["tcp-blocking"]["rtt 64"]["p50_s"]
    assert summary["least"] == summary["median"] == samples_of(document, "tcp-blocking", "rtt")[64]["p50_s"]


def test_every_goal_is_judged_or_lacks_a_peer(short: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    document = json.loads(short[0].stdout)
    absent = {name for name, peer in document["peers"].items() if not peer["present"]}
    for goal, row in zip(GOALS, document["goals"], strict=True):
        assert (row["name"], row["floor"], row["goal"]) == (goal.name, goal.floor, goal.goal)
        lacks = bool({goal.ours.peer, goal.theirs.peer} & absent)
        assert (row["verdict"] == "not measured") == lacks
        assert lacks or (row["least"] <= row["median"] <= row["most"] and math.isfinite(row["median"]))


def test_people_get_tables_beside_the_document_and_absent_peers_are_named(
    short: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    errors = short[0].stderr
    assert "iperf3 is not installed: apt-get install iperf3" in errors
    assert "not installed: iperf3; to have it: apt-get install iperf3" in errors
    for word in ("smc, blocking", "TCP, spinning", "RTT 64 B p50, us", "median (least..most)", "vs blocking UNIX"):
        assert word in errors
    assert "Traceback" not in errors


def test_nothing_is_left_behind(short: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    assert list(short[1].iterdir()) == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_ended_leaves_nothing_behind(tmp_path: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-m", "ism", "perf", "compare", *SHORT[:-2], "--rounds", "100", "--peers", "pipe"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        assert "round 1 of 100" in process.stderr.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(how)
        process.communicate(timeout=LIMIT_S)
    assert process.returncode == (1 if how is signal.SIGINT else 143)
    assert len(children) == 3  # the manager and both ends
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert list(tmp_path.iterdir()) == []


def test_when_it_is_killed_the_manager_and_both_ends_end_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ism", "perf", "compare", *SHORT[:-2], "--rounds", "100", "--peers", "pipe"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        assert "round 1 of 100" in process.stderr.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        watched = [os.pidfd_open(int(child)) for child in children]
        process.kill()
    for child in watched:
        assert select.select([child], [], [], LIMIT_S)[0], "a child goes on without its parent"
        os.close(child)


def test_without_quick_there_is_also_a_pass_that_is_not_pinned(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = compare(tmp_path, *SHORT, "--sizes", "", "--peers", "pipe", "--json", str(file))
    assert done.returncode == 0, done.stderr
    document = json.loads(file.read_text())
    assert {one["placement"] for one in document["samples"]} == {"pinned", "free"}
    assert document["summary"].keys() == {"pinned", "free"}
    assert "both ends where the scheduler puts them" in done.stdout
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed (extra perf)")
def test_a_page_is_written(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    done = compare(
        tmp_path, "--quick", *SHORT, "--sizes", "64,1K,4K", "--peers", "tcp-blocking", "--html", str(file)
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = file.read_text(encoding="utf-8")
    assert written.startswith("<!DOCTYPE html>")
    assert 'id="throughput-over-message-size--tcp-blocking"' in written
    assert 'id="cpu-of-both-ends--cpu--tcp-blocking"' in written


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (("--peers", "carrier-pigeon"), 2, "'carrier-pigeon' is none of"),
        (("--cpus", "0,4095"), 2, "must be two of"),
        (("--html", "page.html"), 1, "pip install 'virtio-ism[perf]'"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_nothing_is_measured(
    tmp_path: Path, arguments: tuple[str, ...], status: int, word: str
) -> None:
    hides = tmp_path / "hides"
    hides.mkdir()
    (hides / "matplotlib.py").write_text("raise ImportError('not here')")
    done = compare(tmp_path, *arguments, PYTHONPATH=str(hides))
    assert (done.returncode, done.stdout) == (status, "")
    assert word in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_peer_that_fails_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    program = programs / "iperf3"
    program.write_text('#!/bin/sh\ncase "$1" in -s) echo listening; exec /bin/sleep 60;; esac\necho rubbish\n')
    program.chmod(0o755)
    done = compare(
        tmp_path, "--quick", *SHORT, "--sizes", "", "--peers", "iperf3,pipe", "--json", "-", path=str(programs)
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert {(one["peer"], one["size"]) for one in document["failures"]} == {("iperf3", 65536), ("iperf3", 1 << 20)}
    assert samples_of(document, "pipe", "rtt")[64]["p50_s"] > 0
    assert "failed: iperf3 stream 65536 B" in done.stderr


def test_after_an_end_has_failed_or_died_both_are_new(tmp_path: Path) -> None:
    with manager(tmp_path) as environment, Pair(None, environment) as pair:
        assert pair.sample("pipe", SCRIPT)["p50_s"] > 0
        first = [end.process.pid for end in pair._ends]
        with pytest.raises(IsmError, match="far end: KeyError"):
            pair.sample("nobody", SCRIPT)
        assert pair.sample("pipe", SCRIPT)["p50_s"] > 0
        second = [end.process.pid for end in pair._ends]
        pair._ends[0].process.kill()
        with pytest.raises(IsmError, match="near end"):
            pair.sample("pipe", SCRIPT)
        assert pair.sample("pipe", SCRIPT)["p50_s"] > 0
        third = [end.process.pid for end in pair._ends]
    assert len({*first, *second, *third}) == 6


def test_shared_memory_is_measured_over_shared_memory_or_not_at_all(tmp_path: Path) -> None:
    with manager(tmp_path) as environment, Pair(None, environment | {"ISM_SMC": "off"}) as pair:
        with pytest.raises(IsmError, match="over shared memory"):
            pair.sample("smc-blocking", SCRIPT)
        assert pair.sample("tcp-blocking", SCRIPT)["p50_s"] > 0

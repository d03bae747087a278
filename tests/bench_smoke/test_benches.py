# SPDX-License-Identifier: Apache-2.0
"""Every benchmark runs with --quick, writes figures and draws them. What they are is no test's business."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


run_all = module("run_all")
NAMES = sorted({path.stem for path in BENCH.glob("*.py")} - set(run_all.SHARED))


@pytest.mark.processes
@pytest.mark.parametrize("name", NAMES)
def test_the_benchmark_runs(name: str, tmp_path: Path) -> None:
    figures, drawing = tmp_path / "figures.json", tmp_path / "drawing.svg"
    command = [sys.executable, str(BENCH / f"{name}.py"), "--quick", "--json", str(figures)]
    if name not in run_all.DRAWN_NOT:
        command += ["--svg", str(drawing)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    assert json.loads(figures.read_text())
    if name not in run_all.DRAWN_NOT:
        assert "no plot: charts need the package matplotlib" in done.stdout or "<svg" in drawing.read_text()


def test_make_bench_runs_all_of_them() -> None:
    assert sorted(run_all.ORDER) == NAMES


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_of_n_is_its_power(power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    growth = module("growth")
    slope = growth.exponent({n: 3.5 * n**power for n in growth.sizes(1000)})
    assert math.isclose(slope, power, abs_tol=1e-9)


def test_what_is_constant_below_ten_does_not_hide_what_grows_above(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    growth = module("growth")
    assert growth.sizes(1000) == [1, 3, 10, 30, 100, 300, 1000]
    assert growth.exponent({1: 50.0, 3: 50.0, 10: 100.0, 100: 10_000.0}) == pytest.approx(2.0)
    assert growth.exponent({1: 50.0, 100: 50.0}) is None

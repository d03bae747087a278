# SPDX-License-Identifier: Apache-2.0
"""Every benchmark runs with --quick and writes figures. What they are is no test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
NAMES = sorted(path.stem for path in BENCH.glob("*.py") if path.stem not in ("harness", "run_all"))


@pytest.mark.processes
@pytest.mark.parametrize("name", NAMES)
def test_the_benchmark_runs(name: str, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(BENCH / f"{name}.py"), "--quick", "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    assert json.loads(figures.read_text())


def test_make_bench_runs_all_of_them() -> None:
    text = (BENCH / "run_all.py").read_text()
    assert all(f'"{name}"' in text for name in NAMES)

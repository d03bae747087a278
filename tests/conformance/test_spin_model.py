# SPDX-License-Identifier: Apache-2.0
"""The SPIN model of the park handshake: correct as written, and found wrong as soon as one part of it is removed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[2] / "docs" / "models" / "park.pml"

REMOVALS = [
    "NO_PUBLISH_FENCE",
    "NO_PARK_READER_FENCE",
    "NO_PARK_WRITER_FENCE",
    "NO_FLAG_FENCE",
    "NO_RELEASE",
    "NO_ACQUIRE",
    "NO_RECHECK",
    "NO_RUNG",
    "DRAIN_LATE",
    "FLAGS_LATE",
    "NO_FLUSH",
]
POLLING_REMOVALS = ["NO_CONSUME_FENCE"]
FENCES_X86_NEEDS = [name for name in REMOVALS if name.endswith("_FENCE")]

pytestmark = pytest.mark.skipif(
    shutil.which("spin") is None or shutil.which("gcc") is None,
    reason="the model checker needs the programs spin and gcc (Debian packages spin and gcc)",
)


def check(folder: Path, *macros: str) -> int:
    """Run the checker over every interleaving; the number of errors found (it stops at the first)."""
    defines = [f"-D{macro}" for macro in macros]
    run = subprocess.run
    run(["spin", "-a", *defines, str(MODEL)], cwd=folder, check=True, capture_output=True, timeout=60)
    # SAFETY: no search for acceptance cycles; COLLAPSE: states kept compressed
    command = ["gcc", "-O1", "-w", "-DSAFETY", "-DCOLLAPSE", "-DVECTORSZ=2048", "-o", "pan", "pan.c"]
    run(command, cwd=folder, check=True, timeout=120)
    result = run(["./pan", "-m1000000"], cwd=folder, check=True, capture_output=True, text=True, timeout=300)
    assert "max search depth too small" not in result.stdout
    summary = next(line for line in result.stdout.splitlines() if "errors:" in line)
    return int(summary.partition("errors:")[2])


@pytest.mark.parametrize("reader", ["PARKING", "POLLING"])
@pytest.mark.parametrize("memory", ["WEAK", "TSO"])
def test_the_model_holds_in_every_interleaving(tmp_path: Path, memory: str, reader: str) -> None:
    assert check(tmp_path, memory, reader) == 0


@pytest.mark.parametrize("removal", REMOVALS)
def test_removing_one_part_of_the_handshake_breaks_the_model(tmp_path: Path, removal: str) -> None:
    assert check(tmp_path, removal) == 1


@pytest.mark.parametrize("removal", FENCES_X86_NEEDS)
def test_every_fence_is_needed_even_where_stores_stay_in_order(tmp_path: Path, removal: str) -> None:
    assert check(tmp_path, removal, "TSO") == 1


@pytest.mark.parametrize("memory", ["WEAK", "TSO"])
@pytest.mark.parametrize("removal", POLLING_REMOVALS)
def test_a_reader_that_never_parks_needs_its_own_fence(tmp_path: Path, removal: str, memory: str) -> None:
    assert check(tmp_path, removal, memory, "POLLING") == 1


def test_the_list_of_removals_is_the_models() -> None:
    text = MODEL.read_text()
    used = {line.split()[1] for line in text.splitlines() if line.startswith(("#ifdef ", "#ifndef "))}
    assert used == {*REMOVALS, *POLLING_REMOVALS, "TSO", "POLLING"}

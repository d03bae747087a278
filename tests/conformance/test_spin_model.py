# SPDX-License-Identifier: Apache-2.0
"""The SPIN models, of sleep and wake, of the decision about a connection, of offers, of streams that change rings.

Correct as written, and found wrong as soon as one part is removed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODELS = Path(__file__).parents[2] / "docs" / "models"
PARK, DECISION, OFFER = MODELS / "park.pml", MODELS / "decision.pml", MODELS / "offer.pml"
MOVE = MODELS / "move.pml"

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
DECISION_REMOVALS = [
    "NO_EXCLUSION",
    "EVENT_FIRST",
    "NO_LAST_LOOK",
    "INTEND_UNCHECKED",
    "SERVER_NO_NONCE",
    "CLIENT_NO_NONCE",
    "NO_DROP",
    "NO_ANSWER",
]
OFFER_REMOVALS = [
    "NO_EXCHANGE",
    "WITHDRAW_STORE",
    "NO_SLEEP_FENCE",
    "NO_LAST_LOOK",
    "ZERO_LATE",
    "OFFER_EARLY",
    "RESET_AT_END",
]
MOVE_REMOVALS = [
    "MOVE_LATE",
    "CURSOR_LATE",
    "OFFER_EARLY",
    "TWO_MOVES",
    "LOOK_FIRST",
    "NO_RELOAD",
    "NO_CLAMP",
    "RETIRE_EARLY",
]
FENCES_X86_NEEDS = [name for name in REMOVALS if name.endswith("_FENCE")]

pytestmark = pytest.mark.skipif(
    shutil.which("spin") is None or shutil.which("gcc") is None,
    reason="the model checker needs the programs spin and gcc (Debian packages spin and gcc)",
)


def check(folder: Path, *macros: str, model: Path = PARK) -> int:
    """Run the checker over every interleaving; the number of errors found (it stops at the first)."""
    return errors(explore(folder, *macros, model=model))


def explore(folder: Path, *macros: str, model: Path) -> str:
    defines = [f"-D{macro}" for macro in macros]
    run = subprocess.run
    run(["spin", "-a", *defines, str(model)], cwd=folder, check=True, capture_output=True, timeout=60)
    # SAFETY: no search for acceptance cycles; COLLAPSE: states kept compressed
    command = ["gcc", "-O1", "-w", "-DSAFETY", "-DCOLLAPSE", "-DVECTORSZ=2048", "-o", "pan", "pan.c"]
    run(command, cwd=folder, check=True, timeout=120)
    result = run(["./pan", "-m1000000"], cwd=folder, check=True, capture_output=True, text=True, timeout=300)
    assert "max search depth too small" not in result.stdout
    return result.stdout


def errors(output: str) -> int:
    summary = next(line for line in output.splitlines() if "errors:" in line)
    return int(summary.partition("errors:")[2])


def macros_of(model: Path) -> set[str]:
    return {line.split()[1] for line in model.read_text().splitlines() if line.startswith(("#ifdef ", "#ifndef "))}


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
    assert macros_of(PARK) == {*REMOVALS, *POLLING_REMOVALS, "TSO", "POLLING"}


# -- the decision


def test_both_ends_of_a_connection_always_decide_alike_and_every_step_can_happen(tmp_path: Path) -> None:
    output = explore(tmp_path, model=DECISION)
    assert errors(output) == 0
    unreached = [int(number) for number in re.findall(r"\((\d+) of \d+ states\)", output)]
    assert unreached == [0, 0, 0, 0]


@pytest.mark.parametrize("removal", DECISION_REMOVALS)
def test_removing_one_part_of_the_decision_breaks_the_model(tmp_path: Path, removal: str) -> None:
    assert check(tmp_path, removal, model=DECISION) == 1


def test_the_list_of_the_decision_s_removals_is_the_models() -> None:
    assert macros_of(DECISION) == set(DECISION_REMOVALS)


# -- offers


def test_both_ends_know_alike_what_became_of_an_offer(tmp_path: Path) -> None:
    assert check(tmp_path, model=OFFER) == 0


@pytest.mark.parametrize("removal", OFFER_REMOVALS)
def test_removing_one_part_of_an_offer_breaks_the_model(tmp_path: Path, removal: str) -> None:
    assert check(tmp_path, removal, model=OFFER) == 1


def test_the_list_of_the_offer_s_removals_is_the_models() -> None:
    assert macros_of(OFFER) == set(OFFER_REMOVALS)


# -- moves


def test_a_stream_that_changes_rings_comes_out_as_it_went_in_and_every_step_can_happen(tmp_path: Path) -> None:
    output = explore(tmp_path, model=MOVE)
    assert errors(output) == 0
    assert [int(number) for number in re.findall(r"\((\d+) of \d+ states\)", output)] == [
        1,
        0,
        0,
        0,
    ]  # the bus never ends


@pytest.mark.parametrize("removal", MOVE_REMOVALS)
def test_removing_one_part_of_a_move_breaks_the_model(tmp_path: Path, removal: str) -> None:
    assert check(tmp_path, removal, model=MOVE) == 1


def test_the_list_of_the_moves_removals_is_the_models() -> None:
    assert macros_of(MOVE) == set(MOVE_REMOVALS)

# SPDX-License-Identifier: Apache-2.0
"""What the options of `ism perf` mean, and which of them do not go together."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner

from ism.cli.perf import parameters_of, perf
from ism.perf.parameters import Parameters

DEFAULTS: dict[str, Any] = {
    "seconds": None, "size": None, "length": None, "streams": 1, "reverse": False, "both": False, "latency": False,
    "rate": 0, "api": "trio", "transport": "smc",
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Parameters(seconds=10.0, length=65536)),
        ({"latency": True}, Parameters(seconds=10.0, length=64, latency=True)),
        ({"size": 1 << 20}, Parameters(seconds=None, bytes=1 << 20)),
        ({"seconds": 2.5, "length": 7}, Parameters(seconds=2.5, length=7)),
        ({"latency": True, "rate": 9, "api": "blocking"}, Parameters(latency=True, length=64, rate=9, api="blocking")),
    ],
)
def test_options_become_parameters(options: dict[str, Any], expected: Parameters) -> None:
    assert parameters_of(DEFAULTS | options) == expected


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "either -s"),
        (["-s", "-c", "host"], "either -s"),
        (["-s", "-t", "1"], "-t does not go with -s"),
        (["-s", "-J"], "-J does not go with -s"),
        (["-c", "host", "-1"], "-1 does not go with -c"),
        (["-c", "host", "-t", "1", "-n", "1"], "one of them"),
        (["-c", "host", "-t", "x"], "not a valid float"),
        (["-c", "host", "-t", "nan"], "the time"),
        (["-c", "host", "-l", "64Q"], "no size"),
        (["-c", "host", "-l", "17M"], "the length"),
        (["-c", "host", "-P", "0"], "the number of streams"),
        (["-c", "host", "-R", "--bidir"], "exclude each other"),
        (["-c", "host", "--latency", "-R"], "from the client"),
        (["-c", "host", "--rate", "5"], "for latency only"),
        (["-c", "host", "--api", "curio"], "curio"),
        (["-c", "host", "--api", "view", "--transport", "unix"], "must be smc"),
        (["-c", "host", "-p", "70000"], "70000"),
        (["compare-what"], "compare-what"),
    ],
)
def test_what_makes_no_sense_is_an_error_of_usage(arguments: list[str], word: str) -> None:
    done = CliRunner().invoke(perf, arguments)
    assert done.exit_code == 2
    assert word in done.output


def test_help_tells_of_coordinated_omission() -> None:
    done = CliRunner().invoke(perf, ["--help"])
    assert done.exit_code == 0
    assert "coordinated omission" in " ".join(done.output.split())


def test_neither_help_nor_usage_loads_numba_or_trio() -> None:
    program = (
        "import sys, ism.cli\n"
        "sys.argv = ['ism', 'perf', '--help']\n"
        "try: ism.cli.main()\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'numba', 'trio'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0

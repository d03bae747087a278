# SPDX-License-Identifier: Apache-2.0
"""The `ism` command as its user meets it: help, errors and exit statuses, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def ism(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ism", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )


def test_help_lists_the_commands() -> None:
    done = ism("--help")
    assert done.returncode == 0
    for command in ("demo", "manager", "status"):
        assert command in done.stdout


@pytest.mark.parametrize("command", ["manager", "status", "demo"])
def test_every_command_has_help(command: str) -> None:
    done = ism(command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: ism {command}")


def test_an_unknown_command_is_an_error_of_usage() -> None:
    done = ism("frobnicate")
    assert done.returncode == 2
    assert "frobnicate" in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["status", "--help"], ["manager", "--help"], ["status"]])
def test_the_command_line_does_not_load_numba(arguments: list[str], tmp_path: Path) -> None:
    program = (
        "import sys, ism.cli\n"
        f"sys.argv = ['ism', *{arguments!r}]\n"
        "try: ism.cli.main()\n"
        "except SystemExit: pass\n"
        "sys.exit('numba' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        timeout=60,
        check=False,
        env={**os.environ, "ISM_RUN_DIR": str(tmp_path)},
    )
    assert done.returncode == 0


def test_the_manager_does_not_load_numba() -> None:
    program = "import sys, ism.manager.server; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


def test_status_without_a_manager_says_what_to_do(tmp_path: Path) -> None:
    done = ism("status", "--run-dir", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("ism: no manager answers at")
    assert "run `ism manager`" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("domains = 3", "domains"),
        ("[[device]]\nname = 'a'\nwindow = 12345", "window"),
        ("this is not toml", "config.toml"),
        ("[manger]\n", "manger"),
    ],
)
def test_a_bad_configuration_is_named_by_file_and_key_with_status_2(text: str, expected: str, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(text)
    done = ism("manager", "--config", str(config), "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert str(config) in done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_configuration_file_is_named_with_status_2(tmp_path: Path) -> None:
    done = ism("manager", "--config", str(tmp_path / "absent.toml"), "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "absent.toml" in done.stderr
    assert "Traceback" not in done.stderr

# SPDX-License-Identifier: Apache-2.0
"""`ism demo` as its user runs it."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def demo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("ISM_DEVICE", "ISM_RUN_DIR")}
    return subprocess.run(
        [sys.executable, "-m", "ism", "demo", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**clean, "COLUMNS": "120", **environment},
    )


@pytest.mark.processes
def test_the_demo_verifies_a_file_and_shows_the_ratios(tmp_path: Path) -> None:
    file = tmp_path / "some data"
    file.write_bytes(os.urandom(3_000_001))
    done = demo(str(file), ISM_RUN_DIR=str(tmp_path / "nobody"))
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout
    assert hashlib.sha256(file.read_bytes()).hexdigest() in done.stdout
    for row in ("round trip, 64 B", "stream, 64 KiB messages", "CPU of both ends"):
        assert re.search(rf"{re.escape(row)}.*\d+\.\d+x", done.stdout), done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.processes
def test_an_empty_file_goes_through_as_well(tmp_path: Path) -> None:
    file = tmp_path / "empty"
    file.write_bytes(b"")
    done = demo(str(file), ISM_RUN_DIR=str(tmp_path / "nobody"))
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256(b"").hexdigest() in done.stdout


def test_a_file_that_is_not_there_is_an_error_of_usage(tmp_path: Path) -> None:
    done = demo(str(tmp_path / "absent"))
    assert done.returncode == 2
    assert "absent" in done.stderr


@pytest.mark.processes
def test_a_device_that_cannot_be_opened_fails_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    done = demo(str(file), ISM_DEVICE=f"vfio-user:{tmp_path}/absent.sock")
    assert done.returncode == 1
    assert "absent.sock" in done.stderr

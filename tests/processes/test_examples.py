# SPDX-License-Identifier: Apache-2.0
"""The examples run as separate processes, as their first lines say, and stay short enough to read at a glance."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ism.errors import TransportError
from ism.manager.control import request

pytestmark = pytest.mark.processes

LIMIT_S = 60
EXAMPLES = Path(__file__).parents[2] / "examples"


@contextlib.contextmanager
def running(*command: str, run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "ISM_DEVICE": f"vfio-user:{run_dir / 'device.sock'}",
    }
    with subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as started:
        try:
            yield started
        finally:
            started.kill()


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    with running("-m", "ism", "manager", "--quiet", "--run-dir", str(tmp_path), run_dir=tmp_path) as manager:
        patience = time.monotonic() + LIMIT_S
        while True:
            try:
                request(tmp_path / "control.sock", "status")
                break
            except TransportError:
                assert manager.poll() is None, "the manager ended"
                assert time.monotonic() < patience, "the manager does not serve"
                time.sleep(0.01)
        yield tmp_path


def test_the_echo_examples_talk_through_shared_memory(run_dir: Path) -> None:
    with running(str(EXAMPLES / "echo_server.py"), "0", run_dir=run_dir) as server:
        assert server.stdout is not None
        words = server.stdout.readline().split()
        assert words[:-1] == ["listening", "on", "port"]
        for texts in (["hello", "shared", "memory"], ["again"], ["x" * 100_000]):
            with running(str(EXAMPLES / "echo_client.py"), words[-1], *texts, run_dir=run_dir) as client:
                output, errors = client.communicate(timeout=LIMIT_S)
                assert (output.split(), errors, client.returncode) == (texts, "", 0)
        server.send_signal(signal.SIGINT)
        output, errors = server.communicate(timeout=LIMIT_S)
        assert (output, errors, server.returncode) == ("", "", 0)


@pytest.mark.parametrize("name", ["echo_server.py", "echo_client.py"])
def test_an_example_is_under_40_lines(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) < 40

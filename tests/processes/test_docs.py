# SPDX-License-Identifier: Apache-2.0
"""What the documentation tells people to paste works as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from ism.manager.config import parse_config

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "ism", "manager", "--run-dir", str(run_dir)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "a fresh device" in line:
                break
        yield {**os.environ, "ISM_DEVICE": f"vfio-user:{run_dir / 'device.sock'}"}
        process.terminate()
        process.stderr.read()


@pytest.mark.processes
def test_the_example_of_the_driver_page_prints_what_the_peer_wrote(environment: dict[str, str]) -> None:
    program = re.search(r"```python\n(.*?)```", (DOCS / "driver.md").read_text(), re.DOTALL)
    assert program is not None
    done = subprocess.run(
        [sys.executable, "-c", program[1]], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "b'hello'\n"


def test_the_configuration_of_the_manager_page_is_one(tmp_path: Path) -> None:
    block = re.search(
        r"(?:^    .*\n|^\n)*^    \[manager\]\n(?:^    .*\n|^\n)+", (DOCS / "manager.md").read_text(), re.M
    )
    assert block is not None
    config = parse_config(textwrap.dedent(block[0]), "docs/manager.md", tmp_path)
    assert [device.name for device in config.devices] == ["vm1"]
    assert config.fresh is None

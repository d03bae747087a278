# SPDX-License-Identifier: Apache-2.0
"""docs/vfio-user.md says what is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from ism.vfio_user.map_channel_wire import Packet

TEXT = (Path(__file__).parents[2] / "docs" / "vfio-user.md").read_text()


def test_the_example_runs_and_gives_what_it_says() -> None:
    example = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    promised = re.search(r"`result` is `(.*?)`\.", TEXT)
    assert example is not None
    assert promised is not None
    names: dict[str, Any] = {}
    exec(compile(example[1], "docs/vfio-user.md", "exec"), names)
    assert names["result"] == eval(promised[1]) == b"hello" + bytes(7) + b"DMA!"


def test_the_map_channel_table_is_the_one_in_the_code() -> None:
    table = "\n".join(Packet.markdown())
    places = [(row.offset, row.size, row.name) for row in Packet.FIELDS]
    for offset, size, name in places:
        assert f"| {offset} | {size} | {name} |" in TEXT
    assert len(places) == table.count("\n") - 1


def test_the_client_side_does_not_load_trio() -> None:
    code = "import sys, ism.vfio_user.client, ism.vfio_user.map_channel; sys.exit('trio' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

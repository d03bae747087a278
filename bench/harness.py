# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: the options --quick and --json, a manager of their own, and how figures are shown."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ism import paths

START_TIMEOUT_S = 20.0


@contextmanager
def manager() -> Iterator[Path]:
    """Run a manager in a directory of its own and point ISM_DEVICE at it. Yields its run directory."""
    with tempfile.TemporaryDirectory(prefix="ism-bench-") as name:
        directory = Path(name)
        with subprocess.Popen([sys.executable, "-m", "ism", "manager", "--quiet", "--run-dir", name]) as process:
            try:
                deadline = time.monotonic() + START_TIMEOUT_S
                while not paths.control_socket(directory).exists():
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise SystemExit("the manager did not start")
                    time.sleep(0.02)
                os.environ["ISM_DEVICE"] = f"vfio-user:{paths.device_socket(directory)}"
                yield directory
            finally:
                os.environ.pop("ISM_DEVICE", None)
                default = sys.modules.get("ism.smc.default")
                if default is not None:
                    default.close_default()
                process.terminate()


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with aligned columns."""
    print(f"\n{title}")
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        cells = [first.strip().ljust(widths[0]), *rest]
        print("  " + "  ".join(cells))


def run(question: str, body: Callable[[bool], dict[str, Any]]) -> None:
    """Parse the options, run `body(quick)`, which prints its table, and write its figures where asked."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--quick", action="store_true", help="a fraction of a second: shows that it works")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures here")
    options = parser.parse_args()
    figures = body(options.quick)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))

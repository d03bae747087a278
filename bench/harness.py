# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: their options, a manager and a far end of their own, and how figures are shown.

A benchmark is a program whose docstring is its question: `run(__doc__, body, chart)`. `body` measures, prints its table
and returns the figures; `chart` draws them. The far end of a conversation is the same file in another process
(`peer`), which answers lines of JSON (`answer`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ism import paths
from ism.errors import FeatureMismatchError

START_TIMEOUT_S = 20.0
PEER = "--peer"
"""First argument of a benchmark's file when it is run as the far end."""

Figures = dict[str, Any]


@dataclass(frozen=True)
class Manager:
    """A manager that runs. Attributes: `directory` (its run directory), `pid`."""

    directory: Path
    pid: int


@contextmanager
def manager() -> Iterator[Manager]:
    """Run a manager in a directory of its own and point ISM_DEVICE at it."""
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
                yield Manager(directory, process.pid)
            finally:
                os.environ.pop("ISM_DEVICE", None)
                default = sys.modules.get("ism.smc.default")
                if default is not None:
                    default.close_default()
                process.terminate()


# -- the far end -----------------------------------------------------------------------------------------------------


class Peer:
    """A process at the far end. Attributes: `pid`, `hello` (what it said first)."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid
        self.hello = self.read()

    def read(self) -> Any:
        """The next line that it says. Raises ChildProcessError when it has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ChildProcessError("the far end has ended; its error is above")
        return json.loads(line)

    def ask(self, name: str, *arguments: Any) -> Any:
        """Have `name` of the far end's verbs called, and return what it returned. Raises ChildProcessError."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self._process.stdin.flush()
        return self.read()


@contextmanager
def peer(file: str, *arguments: object) -> Iterator[Peer]:
    """Run a benchmark's file as the far end; it ends when its standard input does."""
    command = [sys.executable, file, PEER, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield Peer(process)
        finally:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def answer(hello: Any, verbs: Mapping[str, Callable[..., Any]]) -> None:
    """At the far end: say hello, then do what is asked until standard input ends."""
    print(json.dumps(hello), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(verbs[name](*arguments)), flush=True)


# -- figures ---------------------------------------------------------------------------------------------------------


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with aligned columns."""
    print(f"\n{title}")
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        cells = [first.strip().ljust(widths[0]), *rest]
        print("  " + "  ".join(cells).rstrip())


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that so many percent of all are not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def run(
    question: str,
    body: Callable[..., Figures],
    chart: Callable[[Figures, str], object] | None = None,
    *,
    more: Callable[[argparse.ArgumentParser], None] = lambda _: None,
) -> None:
    """Parse the options, run `body(quick)`, which prints its table, and write figures and chart where asked.

    Args: `chart(figures, path)` draws an SVG file; `more` adds options, which `body` gets by name.
    """
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--quick", action="store_true", help="a fraction of a second: shows that it works")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures here")
    if chart is not None:
        parser.add_argument("--svg", metavar="FILE", type=Path, help="also draw them here (needs matplotlib)")
    more(parser)
    options = vars(parser.parse_args())
    quick, file, drawing = options.pop("quick"), options.pop("json"), options.pop("svg", None)
    figures = body(quick, **options)
    if file:
        file.write_text(json.dumps(figures, indent=1))
    if chart is not None and drawing:
        try:
            chart(figures, str(drawing))
        except FeatureMismatchError as missing:
            print(f"no plot: {missing}")


def pin_option(parser: argparse.ArgumentParser) -> None:
    """Add --pin."""
    parser.add_argument("--pin", action="store_true", help="pin the two processes to two processors")


def cpus_of(pin: bool) -> tuple[int, int] | None:
    """Which processors the two ends are kept on with --pin, None for any."""
    allowed = sorted(os.sched_getaffinity(0))
    return (allowed[0], allowed[1]) if pin and len(allowed) > 1 else None

# SPDX-License-Identifier: Apache-2.0
"""Run every benchmark, one process after the other; figures in bench/results/NAME.json, drawings in NAME.svg.

Options go to each of them: `python bench/run_all.py --quick` shows that all work. Names given first restrict it to
these: `python bench/run_all.py ring park`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ORDER = (
    "stream",
    "round_trip",
    "connection",
    "connect_rate",
    "scaling_connections",
    "scaling_processes",
    "scaling_attachers",
    "doorbell",
    "control",
    "start",
    "memory",
    "ring",
    "park",
    "wait",
    "copies",
    "atomics",
)
SHARED = ("echo", "growth", "harness", "report", "run_all")
"""Files here that ask nothing."""
DRAWN_NOT = ("copies", "memory", "wait")
"""One figure, or a table, says it all."""


def main() -> int:
    """Run all; a failing one does not stop the others. Returns the exit status."""
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    names = [argument for argument in sys.argv[1:] if not argument.startswith("-")] or list(ORDER)
    options = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    failed = []
    for name in names:
        print(f"\n== bench/{name}.py", flush=True)
        command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(results / f"{name}.json"), *options]
        if name not in DRAWN_NOT:
            command += ["--svg", str(results / f"{name}.svg")]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

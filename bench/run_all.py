# SPDX-License-Identifier: Apache-2.0
"""Run every benchmark, one process after the other, and keep the figures in bench/results/NAME.json."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ORDER = ("stream", "sockets", "control", "start", "memory", "ring", "park", "atomics")


def main() -> int:
    """Run all; a failing one does not stop the others. Returns the exit status."""
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    failed = []
    for name in ORDER:
        print(f"\n== bench/{name}.py", flush=True)
        command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(results / f"{name}.json"), *sys.argv[1:]]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

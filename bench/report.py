# SPDX-License-Identifier: Apache-2.0
"""Put the latest figures into docs/performance.md: tables between its markers, and the plots beside it.

    ism perf compare --json bench/results/compare.json
    python bench/run_all.py
    python bench/report.py

Options: --results FOLDER (bench/results), --document FILE (docs/performance.md). What there is no result of stays as it
is. The words around the tables are written by hand, and are to be read again whenever the figures change.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

from ism.perf.versus import page, text

ROOT = Path(__file__).parents[1]
PLOTS = ("throughput", "latency", "cpu")
GROWTH = ("scaling_connections", "scaling_processes", "scaling_attachers", "doorbell")


def markdown(table: text.Table) -> str:
    """Write a table in Markdown."""
    rows = [table.header, ["---", *["--:"] * (len(table.header) - 1)], *table.rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def sections(document: dict[str, Any]) -> dict[str, str]:
    """Return what belongs between each pair of markers."""
    facts = [("", ""), *text.machine(document)]
    return {
        "machine": markdown(text.Table("", facts[0], facts[1:])) + "\n\n" + "\n".join(text.disturbed(document)),
        "goals": markdown(text.goals(document)),
        "pinned": markdown(text.figures(document, "pinned")),
        "free": markdown(text.figures(document, "free")),
    }


def replaced(words: str, name: str, content: str) -> str:
    """Put `content` between the markers of a name. Raises ValueError: they are missing."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    found, count = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}",
        lambda _: f"{begin}\n{content.rstrip()}\n{end}",
        words,
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError(f"{begin} ... {end} is there {count} times, not once")
    return found


def main() -> None:
    """Do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "performance.md")
    options = parser.parse_args()
    plots = options.document.parent / "plots"
    plots.mkdir(exist_ok=True)
    compare = options.results / "compare.json"
    if compare.exists():
        document = json.loads(compare.read_text())
        words = options.document.read_text()
        for name, content in sections(document).items():
            words = replaced(words, name, content)
        options.document.write_text(words)
        for name, svg in zip(PLOTS, page.charts(document), strict=False):
            (plots / f"{name}.svg").write_text(svg)
    for name in GROWTH:
        drawn = options.results / f"{name}.svg"
        if drawn.exists():
            shutil.copyfile(drawn, plots / drawn.name)


if __name__ == "__main__":
    main()

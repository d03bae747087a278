# SPDX-License-Identifier: Apache-2.0
"""A run's document as one HTML page that needs nothing else: tables, and charts as SVG inside it.

The script in it lets a reader click a name in a legend to hide and show that line; the page is complete without it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any, Final

from ism.perf.plots import bar_chart, chart_id, line_chart, size_text
from ism.perf.versus import text
from ism.perf.versus.catalog import MEMCPY
from ism.perf.versus.result import Document, median, over_size

THROUGHPUT: Final = "Throughput over message size"
LATENCY: Final = "Round trip over message size"
CPU: Final = "CPU of both ends"
_SIZE: Final = "message size"
_METHOD: Final = (
    "Two processes on one machine, one sample after the other. Throughput ends when the receiver has acknowledged the "
    "last message. Every message is sent by one call and received into a buffer of its own size. CPU is user and "
    "system time of both ends; spinning counts. Each round takes every sample once, in a shuffled order in which those "
    "that are compared follow each other; a ratio is taken in each round, and its median over the rounds is shown. "
    "Before each sample a word goes between the two CPUs and back through a cache line, which shows whether the "
    "machine has moved them. Absolute figures belong to this machine and this moment; ratios travel better."
)
_STYLE: Final = """
:root { color-scheme: light; }
body { background: #fff; color: #111; font: 15px/1.45 sans-serif; }
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0 0 1.5rem; }
caption { font-weight: bold; text-align: left; padding: .3rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: .2rem .6rem; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
table.facts td { text-align: left; }
.held td:last-child { color: #00603f; } .below-goal td:last-child { color: #7a4a00; }
.below-floor td:last-child { color: #b00020; font-weight: bold; } .not-measured { color: #666; }
figure { margin: 0 0 1.5rem; } svg { max-width: 100%; height: auto; } .scroll { overflow-x: auto; }
.key { cursor: pointer; } .off { opacity: .25; }
"""
_SCRIPT: Final = """
for (const svg of document.querySelectorAll("figure svg")) {
  for (const text of svg.querySelectorAll("[id*='legend'] text")) {
    const slug = text.textContent.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "");
    const line = document.getElementById(svg.id + "--" + slug);
    if (!line) continue;
    text.classList.add("key");
    text.addEventListener("click", () => {
      line.style.display = text.classList.toggle("off") ? "none" : "";
    });
  }
}
"""


def page(document: Document) -> str:
    """Return the page. Raises FeatureMismatchError (no matplotlib)."""
    goals = text.goals(document)
    parts = [
        "<h1>Sockets over shared memory and their peers</h1>",
        _facts(text.machine(document)),
        f"<p>{escape(_METHOD)}</p>",
        _table(goals, [str(row["verdict"]).replace(" ", "-") for row in document["goals"]]),
        *(_table(text.figures(document, placement)) for placement in document["summary"]),
        *(f"<figure>{chart}</figure>" for chart in charts(document)),
        *(
            f"<p>{escape(line)}</p>"
            for line in (*text.absent(document), *text.failures(document), *text.disturbed(document))
        ),
    ]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<title>ism perf compare</title><style>{_STYLE}</style></head>\n<body>\n{body}\n"
        f'<script type="application/json" id="figures">{_embedded(document)}</script>\n'
        f"<script>{_SCRIPT}</script>\n</body></html>"
    )


def _embedded(document: Document) -> str:
    """Return the summary as JSON that cannot end the element it stands in."""
    kept = {name: document[name] for name in ("summary", "goals")}
    return json.dumps(kept, sort_keys=True).replace("<", "\\u003c")


def _facts(pairs: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in pairs)
    return f'<table class="facts"><caption>Machine and method</caption>{rows}</table>'


def _table(table: text.Table, classes: Sequence[str] = ()) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = []
    for at, row in enumerate(table.rows):
        kind = f' class="{classes[at]}"' if classes else ""
        rows.append(f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return (
        f'<div class="scroll"><table id="{chart_id(table.title)}"><caption>{escape(table.title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def charts(document: Document) -> list[str]:
    """Return the charts, each as SVG, of what there are figures for."""
    drawn = []
    throughput = over_size(document, "stream", "bytes_per_s", 1e-9)
    if throughput:
        drawn.append(line_chart(None, THROUGHPUT, _SIZE, "GB/s", throughput, logy=True, xformat=size_text))
    latency = over_size(document, "rtt", "p50_s", 1e6)
    if latency:
        drawn.append(
            line_chart(None, LATENCY, _SIZE, "round trip, median, microseconds", latency, logy=True, xformat=size_text)
        )
    cpu = cpu_bars(document)
    if cpu:
        drawn.append(bar_chart(None, CPU, "CPU seconds per GB, messages of 64 KiB (less is better)", "", {"CPU": cpu}))
    return drawn


def cpu_bars(document: Document) -> dict[str, float]:
    """Return the CPU seconds per GB of each peer, by its label, least first."""
    found: dict[str, float] = {}
    peers: dict[str, Any] = document["peers"]
    for name in document["summary"].get("pinned", {}):
        value = median(document, "pinned", name, "stream 65536", "cpu_s_per_gb")
        if name != MEMCPY and value is not None:
            found[peers[name]["label"]] = value
    return dict(sorted(found.items(), key=lambda item: item[1]))

# SPDX-License-Identifier: Apache-2.0
"""The document of a run: what was asked, the machine, every sample, what they come to, and the goals.

docs/perf.md has its fields. Everything that is shown is made from it, so a stored one can be shown again.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

from ism.perf.versus import goals, machine
from ism.perf.versus.catalog import Entry
from ism.perf.versus.rounds import Options, Runner

FORMAT: Final = 1
FIGURES: Final = ("p50_s", "p99_s", "messages_per_s", "bytes_per_s", "cpu_s_per_gb")
Document = dict[str, Any]


def measure(entries: list[Entry], options: Options, say: Callable[[str], None]) -> Document:
    """Run everything and return the document. Raises PairError."""
    began, began_s = time.strftime("%Y-%m-%dT%H:%M:%S%z"), time.monotonic()
    known = machine.peers(entries)
    for name, peer in known.items():
        if not peer["present"]:
            say(f"{name} is not installed: {peer['install']}")
    runner = Runner([entry for entry in entries if known[entry.name]["present"]], options, say)
    runner.run()
    return {
        "program": "ism perf compare",
        "format": FORMAT,
        "began": began,
        "seconds": time.monotonic() - began_s,
        "command": sys.argv[1:],
        "options": asdict(options),
        "machine": machine.facts(),
        "peers": known,
        "samples": runner.samples,
        "failures": runner.failures,
        **{
            name: {place: spread(recorded(runner.samples, place, name)) for place in places(runner.samples)}
            for name in ("probe_s", "turn_s", "others_cpus")
        },
        "summary": {place: summary(runner.samples, place) for place in places(runner.samples)},
        "goals": [row.as_json() for row in goals.judge_all(runner.samples)],
    }


def places(samples: list[dict[str, Any]]) -> list[str]:
    """Return the placements there are."""
    return list(dict.fromkeys(sample["placement"] for sample in samples))


def recorded(samples: list[dict[str, Any]], placement: str, name: str) -> list[float]:
    """Return what was recorded beside each sample, as far as it could be taken."""
    return [one[name] for one in samples if one["placement"] == placement and one[name] is not None]


def spread(values: list[float]) -> dict[str, float] | None:
    """Return median, least and most; None of nothing."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)} if values else None


def summary(samples: list[dict[str, Any]], placement: str) -> dict[str, Any]:
    """Return, by peer, by "kind size", by figure, the spread over the rounds."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for sample in samples:
        if sample["placement"] == placement:
            cell = found.setdefault(sample["peer"], {}).setdefault(f"{sample['kind']} {sample['size']}", {})
            for name in FIGURES:
                if sample[name] is not None:
                    cell.setdefault(name, []).append(sample[name])
    return {
        peer: {key: {name: spread(values) for name, values in cell.items()} for key, cell in cells.items()}
        for peer, cells in found.items()
    }


def median(document: Document, placement: str, peer: str, key: str, figure: str) -> float | None:
    """Return one median of a summary, None when it was not measured. Args: `key`: "kind size"."""
    found = document["summary"].get(placement, {}).get(peer, {}).get(key, {}).get(figure)
    return None if found is None else float(found["median"])


def over_size(document: Document, kind: str, figure: str, scale: float) -> dict[str, list[tuple[float, float]]]:
    """Return (size, median) of each peer that was measured at every size of the sweep, by its label; pinned."""
    lines, sizes = {}, sorted(document["options"]["sizes"])
    for name, peer in document["peers"].items():
        values = [median(document, "pinned", name, f"{kind} {size}", figure) for size in sizes]
        points = [(float(size), value * scale) for size, value in zip(sizes, values, strict=True) if value is not None]
        if sizes and len(points) == len(sizes):
            lines[peer["label"]] = points
    return lines

# SPDX-License-Identifier: Apache-2.0
"""A run's document as lines for people. The tables are also what the page shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from ism.perf.versus.catalog import MEMCPY
from ism.perf.versus.result import Document, median


@dataclass(frozen=True, slots=True)
class Table:
    """A title, a header, and rows of text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def lines(self) -> list[str]:
        """Return it with aligned columns: the first to the left, the others to the right."""
        widths = [max(len(row[at]) for row in (self.header, *self.rows)) for at in range(len(self.header))]
        lines = [self.title]
        for row in (self.header, *self.rows):
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  " + "  ".join(cells).rstrip())
        return lines


_COLUMNS: Final = (
    ("RTT 64 B p50, us", "rtt 64", "p50_s", 1e6),
    ("p99, us", "rtt 64", "p99_s", 1e6),
    ("parked p50, us", "parked 64", "p50_s", 1e6),
    ("kmsg/s 64 B", "stream 64", "messages_per_s", 1e-3),
    ("GB/s 64 KiB", "stream 65536", "bytes_per_s", 1e-9),
    ("GB/s 1 MiB", "stream 1048576", "bytes_per_s", 1e-9),
    ("CPU s/GB 64 KiB", "stream 65536", "cpu_s_per_gb", 1.0),
)
_DISTURBED_CPUS: Final = 0.1
PLACES: Final = {"pinned": "each end on a CPU of its own", "free": "both ends where the scheduler puts them"}


def number(value: float | None) -> str:
    """Return three digits, or a dash for nothing."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def figures(document: Document, placement: str) -> Table:
    """Return the medians of all peers."""
    labels = {name: peer["label"] for name, peer in document["peers"].items()} | {MEMCPY: "memcpy, one thread"}
    rows = [
        [label, *(number(_scaled(median(document, placement, name, key, figure), scale))
                  for _, key, figure, scale in _COLUMNS)]
        for name, label in labels.items()
        if name in document["summary"].get(placement, {})
    ]  # fmt: skip
    return Table(f"Medians, {PLACES[placement]}", ("", *(column[0] for column in _COLUMNS)), rows)


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def goals(document: Document) -> Table:
    """Return the goals and whether they are held."""
    rows = [
        [row["name"], _range(row), f"{row['floor']:g}", f"{row['goal']:g}", row["verdict"]] for row in document["goals"]
    ]
    return Table(
        "Ratios round by round, more is better: median (least..most)", ("", "ratio", "floor", "goal", ""), rows
    )


def _range(row: dict[str, Any]) -> str:
    if row["median"] is None:
        return "-"
    return _spread(row)


def _spread(found: dict[str, Any]) -> str:
    return f"{number(found['median'])} ({number(found['least'])}..{number(found['most'])})"


def machine(document: Document) -> list[tuple[str, str]]:
    """Return what was measured, where and how, as pairs."""
    facts, options = document["machine"], document["options"]
    pairs = [
        ("CPU", f"{facts['cpu']}, {facts['cpus']} CPUs{' of a virtual machine' if facts['hypervisor'] else ''}"),
        ("system", f"{facts['kernel']}, {facts['libc']}, {facts['python']}"),
        ("versions", ", ".join(f"{name} {facts[name]}" for name in ("ism", "numba", "numpy", "trio") if name in facts)),
        ("peers", ", ".join(f"{name} {one['version']}" for name, one in document["peers"].items() if one["version"])),
        ("placement", f"near end on CPU {options['cpus'][0]}, far end on CPU {options['cpus'][1]}"),
        ("rounds", f"{options['rounds']} pinned, {options['free_rounds']} not; {options['sweep_rounds']} over message "
                   f"sizes; seed {options['seed']}"),
        ("a sample", f"{options['warm_s']:g} s of warm-up, then {options['measure_s']:g} s"),
        ("began", f"{document['began']}, took {document['seconds']:.0f} s"),
    ]  # fmt: skip
    for placement, probe in document["probe_s"].items():
        if probe is not None:
            least, most = (f"{probe[name] * 1e9:.0f}" for name in ("least", "most"))
            pairs.append((f"cache line, {placement}", f"round trip {probe['median'] * 1e9:.0f} ns ({least}..{most})"))
    for placement, turn in document["turn_s"].items():
        least, most = (f"{turn[name] * 1e9:.0f}" for name in ("least", "most"))
        pairs.append(
            (f"CPU speed, {placement}", f"turn of a Python loop {turn['median'] * 1e9:.0f} ns ({least}..{most})")
        )
    for placement, used in document["others_cpus"].items():
        pairs.append((f"other programs, {placement}", f"used {_spread(used)} CPUs meanwhile"))
    return pairs


def disturbed(document: Document) -> list[str]:
    """Return a line when other programs have used too much for the figures to be believed."""
    mean = [one["others_cpus"] for one in document["samples"]]
    if not mean or (used := sum(mean) / len(mean)) < _DISTURBED_CPUS:
        return []
    return [f"other programs used {used:.2f} CPUs on average: these figures are not to be relied on"]


def absent(document: Document) -> list[str]:
    """Return a line for each peer that is not here."""
    return [
        f"not installed: {name}; to have it: {peer['install']}"
        for name, peer in document["peers"].items()
        if not peer["present"]
    ]


def failures(document: Document) -> list[str]:
    """Return a line for each sample that failed."""
    return [
        f"failed: {one['peer']} {one['kind']} {one['size']} B, {one['placement']}, round {one['round'] + 1}: "
        f"{one['error']}"
        for one in document["failures"]
    ]


def report(document: Document) -> str:
    """Return everything."""
    pairs = machine(document)
    width = max(len(name) for name, _ in pairs)
    blocks = [[f"{name.ljust(width)}  {value}" for name, value in pairs]]
    blocks += [figures(document, placement).lines() for placement in document["summary"]]
    blocks.append(goals(document).lines())
    blocks += [lines for lines in (disturbed(document), absent(document), failures(document)) if lines]
    return "\n\n".join("\n".join(lines) for lines in blocks)

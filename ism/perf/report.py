# SPDX-License-Identifier: Apache-2.0
"""What `ism perf` shows: lines for people, one document for machines. Values in, text out; nothing is measured here.

Units are decimal: 1 GB is 10^9 bytes, and rates are shown in bytes and in bits. Times in the document are in seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ism.perf.parameters import Direction, Flow, Parameters
from ism.perf.protocol import Count, Way

_ARROWS: Final[dict[Direction, str]] = {"out": "->", "in": "<-"}
_SCALES: Final = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


# -- what is shown ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """One stream in one interval, as the client counts. Attributes: `trips`, `mean_ns`, `worst_ns`: of round trips."""

    flow: Flow
    bytes: int
    trips: int = 0
    mean_ns: float = 0.0
    worst_ns: int = 0


@dataclass(frozen=True, slots=True)
class Interval:
    """From `begin_s` to `end_s`, counted from the beginning."""

    begin_s: float
    end_s: float
    streams: tuple[Moved, ...]


@dataclass(frozen=True, slots=True)
class Used:
    """CPU of one end, seconds."""

    user_s: float
    system_s: float

    @property
    def total_s(self) -> float:
        """Both."""
        return self.user_s + self.system_s


@dataclass(frozen=True, slots=True)
class Latencies:
    """Round trips of all streams together, ns. Attributes: `percentiles` (percentile to value)."""

    trips: int
    mean_ns: float
    max_ns: int
    percentiles: dict[float, int]


@dataclass(slots=True, kw_only=True)
class Report:
    """Everything known of one test, filled as it goes.

    Attributes: `program`, `host` and `server_program`, `server_host` (names of themselves), `address` (of the server);
    `ways`, `server_ways`, `flows` in the same order; `counts`, `server_counts`: (bytes, seconds) of each stream at
    either end; `interrupted`; `error` ("": none).
    """

    program: str
    host: str
    address: str
    port: int
    began: str
    parameters: Parameters
    server_program: str = ""
    server_host: str = ""
    ways: Sequence[Way] = ()
    server_ways: Sequence[Way] = ()
    intervals: list[Interval] = field(default_factory=list)
    counts: Sequence[Count] = ()
    server_counts: Sequence[Count] = ()
    cpu: Used | None = None
    server_cpu: Used | None = None
    latencies: Latencies | None = None
    interrupted: bool = False
    error: str = ""

    @property
    def flows(self) -> tuple[Flow, ...]:
        """The streams."""
        return self.parameters.flows()

    def ends(self, index: int) -> tuple[Count, Count]:
        """Return what the sender and the receiver of a stream have counted."""
        mine, theirs = self.counts[index], self.server_counts[index]
        return (mine, theirs) if self.flows[index].direction == "out" else (theirs, mine)

    def mismatch(self) -> str:
        """Return in words which stream lost or gained bytes on its way; "" when none has."""
        for index, flow in enumerate(self.flows):
            sent, received = (end.bytes for end in self.ends(index))
            if sent != received:
                return f"stream {flow.id}: {sent} bytes were sent, and {received} received"
        return ""


# -- numbers ---------------------------------------------------------------------------------------------------------


def scaled(value: float, unit: str) -> str:
    """Return a number with three digits or four and a decimal prefix: 1234567 "B" is "1.235 MB"."""
    for scale, prefix in _SCALES:
        if value >= scale * 0.9995:
            number = value / scale
            return f"{number:.{3 if number < 9.9995 else 2 if number < 99.995 else 1}f} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def rates(size: int, seconds: float) -> str:
    """Return bytes in a time as both rates."""
    per_s = size / seconds if seconds > 0 else 0.0
    return f"{scaled(per_s, 'B/s'):>12} {scaled(per_s * 8, 'bit/s'):>14}"


def microseconds(ns: float) -> str:
    """Return a time in microseconds."""
    us = ns / 1000
    return f"{us:.{2 if us < 100 else 1 if us < 1000 else 0}f} us"


def _size(size: int) -> str:
    for scale, prefix in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if size >= scale and size % scale == 0:
            return f"{size // scale} {prefix}iB"
    return f"{size} B"


# -- lines -----------------------------------------------------------------------------------------------------------


def describe(parameters: Parameters) -> str:
    """Return what is measured in one line."""
    p = parameters
    if p.latency:
        what = f"round trips of {_size(p.length)}" + (f", {p.rate} each second" if p.rate else "")
    else:
        what = f"throughput in writes of {_size(p.length)}"
        what += ", server to client" if p.reverse else ", both directions" if p.both else ""
    streams = f", {p.streams} streams" + (" each way" if p.both else "") if p.streams > 1 else ""
    length = f"{p.seconds:g} s" if p.seconds is not None else f"{p.bytes} bytes"
    return f"{what}{streams}, {length}, {p.api} over {p.transport}"


def label(flow: Flow | None, direction: Direction) -> str:
    """Return what stands in front of a stream's line, or of the sum of a direction."""
    return f"[{'SUM' if flow is None else format(flow.id, '3d')}] {_ARROWS[direction]}"


def streams_line(flow: Flow, way: Way) -> str:
    """Return how the bytes of a stream travel, as one end sees it."""
    return f"{label(flow, flow.direction)} {way}, buffers {way.receive_buffer} in, {way.send_buffer} out"


def connected_lines(report: Report) -> list[str]:
    """Return how the bytes of every stream travel, as both ends see it."""
    lines = []
    for flow, mine, theirs in zip(report.flows, report.ways, report.server_ways, strict=True):
        lines.append(streams_line(flow, mine))
        if (theirs.mode, theirs.reason) != (mine.mode, mine.reason):
            lines.append(f"{' ' * len(label(flow, flow.direction))} at the server: {theirs}")
        elif (theirs.receive_buffer, theirs.send_buffer) != (mine.send_buffer, mine.receive_buffer):
            lines[-1] += f"; server {theirs.receive_buffer} in, {theirs.send_buffer} out"
    return lines


def interval_header(parameters: Parameters) -> str:
    """Return the line above those of intervals."""
    if parameters.latency:
        return f"[ ID]     {'Interval':>15} {'Round trips':>14} {'':>12} {'Mean':>11} {'Max':>11}"
    return f"[ ID]     {'Interval':>15} {'Transfer':>12} {'Bytes':>12} {'Bits':>14}"


def interval_lines(interval: Interval) -> list[str]:
    """Return a line for each stream, and one for the sum of each direction that has several."""
    seconds = interval.end_s - interval.begin_s
    lines = [_moved_line(interval, label(one.flow, one.flow.direction), one, seconds) for one in interval.streams]
    for direction in _ARROWS:
        streams = [one for one in interval.streams if one.flow.direction == direction]
        if len(streams) > 1:
            lines.append(_moved_line(interval, label(None, direction), _sum(streams), seconds))
    return lines


def _sum(streams: Sequence[Moved]) -> Moved:
    trips = sum(one.trips for one in streams)
    mean = sum(one.mean_ns * one.trips for one in streams) / trips if trips else 0.0
    worst = max(one.worst_ns for one in streams)
    size = sum(one.bytes for one in streams)
    return Moved(flow=streams[0].flow, bytes=size, trips=trips, mean_ns=mean, worst_ns=worst)


def _span(begin_s: float, end_s: float) -> str:
    return f"{f'{begin_s:.2f}-{end_s:.2f} s':>15}"


def _moved_line(interval: Interval, front: str, moved: Moved, seconds: float) -> str:
    head = f"{front}  {_span(interval.begin_s, interval.end_s)}"
    if moved.worst_ns or moved.trips:
        per_s = f"{moved.trips / seconds if seconds > 0 else 0:.0f} /s"
        return (
            f"{head} {moved.trips:>14} {per_s:>12} {microseconds(moved.mean_ns):>11} {microseconds(moved.worst_ns):>11}"
        )
    return f"{head} {scaled(moved.bytes, 'B'):>12} {rates(moved.bytes, seconds)}"


def total_lines(report: Report) -> list[str]:
    """Return the result."""
    lines = ["- " * 40]
    if report.latencies is None:
        lines.append(interval_header(report.parameters))
        for direction in _ARROWS:
            chosen = [index for index, flow in enumerate(report.flows) if flow.direction == direction]
            for index in chosen:
                lines += _end_lines(label(report.flows[index], direction), [report.ends(index)])
            if len(chosen) > 1:
                lines += _end_lines(label(None, direction), [report.ends(index) for index in chosen])
    else:
        found = report.latencies
        seconds = max(count.seconds for count in report.counts)
        lines.append(f"{found.trips} round trips in {seconds:.2f} s, {found.trips / seconds if seconds else 0:.0f} /s")
        named = [(f"p{percentile:g}", value) for percentile, value in found.percentiles.items()]
        for name, value in (*named, ("max", found.max_ns), ("mean", found.mean_ns)):
            lines.append(f"  {name:6} {microseconds(value):>12}")
    size = sum(count.bytes for count in report.counts)
    ends = (("client", report.cpu), ("server", report.server_cpu))
    for name, used in ends:
        if used is not None:
            parts = f"{used.user_s:.2f} s user + {used.system_s:.2f} s system"
            lines.append(f"CPU of the {name}: {parts}{_per(used.total_s, report, size)}")
    if report.cpu is not None and report.server_cpu is not None:
        both = report.cpu.total_s + report.server_cpu.total_s
        lines.append(f"CPU of both ends:  {both:.2f} s{_per(both, report, size)}")
    if report.interrupted:
        lines.append("interrupted: these are the totals up to then")
    return lines


def _end_lines(front: str, ends: Sequence[tuple[Count, Count]]) -> list[str]:
    lines = []
    for position, name in enumerate(("sender", "receiver")):
        size = sum(end[position].bytes for end in ends)
        seconds = max(end[position].seconds for end in ends)
        lines.append(f"{front}  {_span(0, seconds)} {scaled(size, 'B'):>12} {rates(size, seconds)}  {name}")
    return lines


def _per(cpu_s: float, report: Report, size: int) -> str:
    if report.latencies is not None:
        trips = report.latencies.trips
        return f", {microseconds(cpu_s * 1e9 / trips)} a round trip" if trips else ""
    return f", {cpu_s / (size / 1e9):.3f} s/GB" if size else ""


def summary_line(size: int, seconds: float, cpu_s: float) -> str:
    """Return the server's line on a test that went well."""
    per_s = scaled(size / seconds if seconds else 0, "B/s")
    return f"done: {scaled(size, 'B')} in {seconds:.2f} s, {per_s}; CPU of this end {cpu_s:.2f} s"


# -- the document ----------------------------------------------------------------------------------------------------


def document(report: Report) -> dict[str, Any]:
    """Return everything as plain values; docs/perf.md has the fields."""
    flows = report.flows
    result: dict[str, Any] = {
        "start": {
            "time": report.began,
            "client": {"program": report.program, "host": report.host, "python": sys.version.split()[0]},
            "server": {
                "program": report.server_program,
                "host": report.server_host,
                "address": report.address,
                "port": report.port,
            },
            "parameters": report.parameters.to_json(),
            "streams": [
                {"id": flow.id, "direction": flow.direction, "client": _way(mine), "server": _way(theirs)}
                for flow, mine, theirs in zip(flows, report.ways, report.server_ways, strict=True)
            ]
            if report.ways and report.server_ways
            else [],
        },
        "intervals": [_interval(one) for one in report.intervals],
    }
    if report.counts and report.server_counts:
        result["end"] = _end(report)
    if report.error:
        result["error"] = report.error
    return result


def _way(way: Way) -> dict[str, Any]:
    return {
        "mode": way.mode,
        "reason": way.reason,
        "code": way.code,
        "receive_buffer": way.receive_buffer,
        "send_buffer": way.send_buffer,
    }


def _interval(interval: Interval) -> dict[str, Any]:
    seconds = interval.end_s - interval.begin_s

    def values(moved: Moved) -> dict[str, Any]:
        found = _rate(moved.bytes, seconds)
        if moved.trips or moved.worst_ns:
            found |= {"round_trips": moved.trips, "mean_s": moved.mean_ns / 1e9, "max_s": moved.worst_ns / 1e9}
        return found

    sums = {}
    for direction in _ARROWS:
        chosen = [one for one in interval.streams if one.flow.direction == direction]
        if chosen:
            sums[direction] = values(_sum(chosen))
    streams = [{"id": one.flow.id, "direction": one.flow.direction} | values(one) for one in interval.streams]
    return {"begin_s": interval.begin_s, "end_s": interval.end_s, "streams": streams, "sum": sums}


def _rate(size: int, seconds: float) -> dict[str, Any]:
    return {"bytes": size, "bytes_per_s": size / seconds if seconds > 0 else 0.0}


def _count(counts: Sequence[Count]) -> dict[str, Any]:
    seconds = max(count.seconds for count in counts)
    return {"seconds": seconds} | _rate(sum(count.bytes for count in counts), seconds)


def _end(report: Report) -> dict[str, Any]:
    ends = [(flow, *report.ends(index)) for index, flow in enumerate(report.flows)]
    unit, per = ("s_per_gb", sum(count.bytes for count in report.counts) / 1e9)
    if report.latencies is not None:
        unit, per = "s_per_round_trip", report.latencies.trips
    used = {name: one for name, one in (("client", report.cpu), ("server", report.server_cpu)) if one is not None}
    cpu: dict[str, Any] = {
        name: {"user_s": one.user_s, "system_s": one.system_s, unit: one.total_s / per if per else None}
        for name, one in used.items()
    }
    cpu[unit] = sum(one.total_s for one in used.values()) / per if per else None
    result: dict[str, Any] = {
        "streams": [
            {"id": flow.id, "direction": flow.direction, "sender": _count([sent]), "receiver": _count([received])}
            for flow, sent, received in ends
        ],
        "sum": {
            direction: {
                "sender": _count([sent for flow, sent, _ in ends if flow.direction == direction]),
                "receiver": _count([received for flow, _, received in ends if flow.direction == direction]),
            }
            for direction in sorted({flow.direction for flow in report.flows}, reverse=True)
        },
        "cpu": cpu,
        "interrupted": report.interrupted,
    }
    if report.latencies is not None:
        found = report.latencies
        seconds = max(count.seconds for count in report.counts)
        result["latency"] = {
            "round_trips": found.trips,
            "per_s": found.trips / seconds if seconds > 0 else 0.0,
            "mean_s": found.mean_ns / 1e9,
            "max_s": found.max_ns / 1e9,
            "percentiles_s": {f"{percentile:g}": value / 1e9 for percentile, value in found.percentiles.items()},
        }
    return result

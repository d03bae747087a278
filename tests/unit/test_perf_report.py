# SPDX-License-Identifier: Apache-2.0
"""Histograms, and what `ism perf` shows of a measurement."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ism.errors import FeatureMismatchError
from ism.perf.histogram import LARGEST_NS, PERCENTILES, Histogram
from ism.perf.parameters import Parameters
from ism.perf.protocol import Count, Way
from ism.perf.report import (
    Interval,
    Latencies,
    Moved,
    Report,
    Used,
    connected_lines,
    describe,
    document,
    interval_header,
    interval_lines,
    microseconds,
    scaled,
    total_lines,
)

PAGE = Path(__file__).parents[2] / "docs" / "perf.md"


# -- histogram -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, LARGEST_NS), min_size=1, max_size=300))
def test_percentiles_are_within_a_thousandth_of_the_sorted_values(values: list[int]) -> None:
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    values.sort()
    assert len(histogram) == len(values)
    assert histogram.max_ns == values[-1]
    assert histogram.mean_ns() == pytest.approx(sum(values) / len(values))
    for percentile, found in histogram.percentiles_ns().items():
        rank = min(len(values) - 1, max(0, int(percentile / 100 * len(values) + 0.5) - 1))
        near = values[max(0, rank - 1) : rank + 2]
        assert any(abs(found - value) <= value / 999 + 1 for value in near)


def test_a_histogram_of_nothing_is_zero() -> None:
    assert Histogram().percentiles_ns() == dict.fromkeys(PERCENTILES, 0)
    assert Histogram().mean_ns() == 0


def test_values_beyond_the_range_are_counted_too() -> None:
    histogram = Histogram()
    histogram.record(0)
    histogram.record(10 * LARGEST_NS)
    assert len(histogram) == 2
    assert histogram.max_ns == 10 * LARGEST_NS


def test_histograms_add_up() -> None:
    parts = [Histogram(), Histogram()]
    for number in range(1, 1001):
        parts[number % 2].record(number * 1000)
    together = Histogram()
    together.add(parts)
    assert len(together) == 1000
    assert together.max_ns == 1_000_000
    assert together.percentiles_ns()[50.0] == pytest.approx(500_000, rel=0.002)


def test_a_missing_library_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("hdrh"):
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(FeatureMismatchError, match=r"virtio-ism\[perf\]"):
        Histogram()


# -- lines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.000 kB"), (1234567, "1.235 MB"), (99.99e9, "99.99 GB"), (5e14, "500.0 TB"),
     (999_999, "1.000 MB"), (9_999_999, "10.00 MB")],
)  # fmt: skip
def test_numbers_have_decimal_prefixes(value: float, text: str) -> None:
    assert scaled(value, "B") == text


@pytest.mark.parametrize(("ns", "text"), [(1234, "1.23 us"), (123456, "123.5 us"), (12345678, "12346 us")])
def test_times_are_in_microseconds(ns: int, text: str) -> None:
    assert microseconds(ns) == text


def report(**changes: Any) -> Report:
    parameters = changes.pop("parameters", Parameters(streams=2, both=True, seconds=1.0))
    count = len(parameters.flows())
    values: dict[str, Any] = {
        "program": "ism perf 0", "host": "here", "address": "10.0.0.1", "port": 5208, "began": "2026-01-01T00:00:00",
        "parameters": parameters, "ways": [Way("SMC", "", 0, 1044480, 520192)] * count,
        "server_ways": [Way("SMC", "", 0, 520192, 1044480)] * count, "counts": [Count(10**9, 1.0)] * count,
        "server_counts": [Count(10**9, 1.01)] * count, "cpu": Used(0.25, 0.25), "server_cpu": Used(0.5, 0.0),
    }  # fmt: skip
    return Report(**values | changes)


def test_the_ways_of_both_ends_are_shown_where_they_differ() -> None:
    same = report(parameters=Parameters())
    assert connected_lines(same) == ["[  1] -> SMC, buffers 1044480 in, 520192 out"]
    one_sided = report(parameters=Parameters(), ways=[Way("TCP", "no device", 0x03030001, 1, 2)])
    first, second = connected_lines(one_sided)
    assert "TCP (no device, 0x03030001)" in first
    assert "at the server: SMC" in second


def test_an_interval_has_a_line_for_each_stream_and_sum() -> None:
    parameters = Parameters(streams=2, both=True)
    moved = [Moved(flow=flow, bytes=flow.id * 10**9) for flow in parameters.flows()]
    lines = interval_lines(Interval(1.0, 3.0, tuple(moved)))
    assert [line[:8] for line in lines] == ["[  1] ->", "[  2] ->", "[  3] <-", "[  4] <-", "[SUM] ->", "[SUM] <-"]
    assert re.split(r"\s{2,}", lines[4]) == ["[SUM] ->", "1.00-3.00 s", "3.000 GB", "1.500 GB/s", "12.00 Gbit/s"]
    header = interval_header(parameters)
    assert header.endswith("Bits")
    assert len(header) == len(lines[0])


def test_an_interval_of_round_trips_shows_their_mean_and_worst() -> None:
    parameters = Parameters(latency=True, length=64, streams=2)
    first, second = parameters.flows()
    moved = (
        Moved(flow=first, bytes=640, trips=10, mean_ns=1000.0, worst_ns=5000),
        Moved(flow=second, bytes=1920, trips=30, mean_ns=2000.0, worst_ns=4000),
    )
    lines = interval_lines(Interval(0.0, 0.5, moved))
    assert re.split(r"\s{2,}", lines[-1]) == ["[SUM] ->", "0.00-0.50 s", "40", "80 /s", "1.75 us", "5.00 us"]
    assert len(interval_header(parameters)) == len(lines[0])


def test_totals_have_both_ends_of_each_direction_and_their_cpu() -> None:
    text = "\n".join(total_lines(report()))
    assert text.count("sender") == text.count("receiver") == 6
    assert "[SUM] ->" in text
    assert "[SUM] <-" in text
    assert "CPU of the client: 0.25 s user + 0.25 s system, 0.125 s/GB" in text
    assert "CPU of both ends:  1.00 s, 0.250 s/GB" in text
    assert "interrupted" not in text


def test_totals_of_latency_have_the_percentiles() -> None:
    found = Latencies(1000, 5000.0, 99_000, {50.0: 4000, 90.0: 5000, 99.0: 6000, 99.9: 70_000})
    parameters = Parameters(latency=True, length=64)
    text = "\n".join(total_lines(report(parameters=parameters, latencies=found, interrupted=True)))
    for name, value in (("p50", "4.00"), ("p90", "5.00"), ("p99", "6.00"), ("p99.9", "70.00"), ("max", "99.00")):
        assert re.search(rf"^  {re.escape(name)} +{value} us$", text, re.MULTILINE)
    assert "1000 round trips in 1.00 s, 1000 /s" in text
    assert "interrupted" in text


def test_nothing_moved_is_no_division_by_zero() -> None:
    none = [Count(0, 0.0)] * 4
    empty = report(counts=none, server_counts=none)
    assert total_lines(empty)
    assert document(empty)["end"]["cpu"]["s_per_gb"] is None
    latency = Parameters(latency=True, length=64)
    nothing = report(parameters=latency, counts=none[:1], server_counts=none[:1], latencies=Latencies(0, 0.0, 0, {}))
    assert total_lines(nothing)
    assert document(nothing)["end"]["cpu"]["s_per_round_trip"] is None


def test_lost_bytes_are_noticed_in_either_direction() -> None:
    assert report().mismatch() == ""
    counts = [Count(10**9, 1.0)] * 3 + [Count(10**9 - 1, 1.0)]
    assert report(counts=counts).mismatch() == "stream 4: 1000000000 bytes were sent, and 999999999 received"
    assert report(server_counts=counts[::-1]).mismatch().startswith("stream 1: 1000000000 bytes were sent")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "throughput in writes of 64 KiB, 10 s, trio over smc"),
        ({"both": True, "streams": 2}, "throughput in writes of 64 KiB, both directions, 2 streams each way, 10 s, "),
        ({"latency": True, "length": 9, "rate": 5, "seconds": None, "bytes": 7}, "round trips of 9 B, 5 each second, "),
    ],
)  # fmt: skip
def test_a_test_is_described_in_one_line(changes: dict[str, Any], text: str) -> None:
    assert describe(Parameters(**changes)).startswith(text)


# -- document --------------------------------------------------------------------------------------------------------


def keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*(keys(one) for one in value.values()))
    return set().union(*(keys(one) for one in value)) if isinstance(value, list) else set()


def full_documents() -> list[dict[str, Any]]:
    latency = Parameters(latency=True, length=64)
    moved = Moved(flow=latency.flows()[0], bytes=640, trips=10, mean_ns=1000.0, worst_ns=5000)
    found = Latencies(10, 5000.0, 9000, dict.fromkeys(PERCENTILES, 1000))
    trips = report(parameters=latency, latencies=found, intervals=[Interval(0.0, 1.0, (moved,))])
    return [document(report(error="why")), document(trips)]


def test_the_document_is_json_with_sums_and_percentiles() -> None:
    throughput, latency = (json.loads(json.dumps(one)) for one in full_documents())
    assert throughput["error"] == "why"
    assert throughput["end"]["sum"]["in"]["receiver"] == {"seconds": 1.0, "bytes": 2 * 10**9, "bytes_per_s": 2e9}
    assert throughput["end"]["cpu"]["s_per_gb"] == 0.25
    assert throughput["start"]["streams"][0]["client"]["mode"] == "SMC"
    assert latency["end"]["latency"]["percentiles_s"]["99.9"] == 1e-6
    assert latency["intervals"][0]["sum"]["out"]["round_trips"] == 10


def test_the_page_names_every_field_of_the_document() -> None:
    text = PAGE.read_text()
    found = re.findall(r"`([a-z0-9_.]+)`", text)
    named = {*found, *(part for name in found for part in name.split("."))}
    missing = {key for one in full_documents() for key in keys(one)} - named
    assert not missing

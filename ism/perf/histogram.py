# SPDX-License-Identifier: Apache-2.0
"""Latencies in an HdrHistogram: constant memory and three digits of every value, however many there are.

The library is `hdrhistogram`, wanted by the extra `perf`, and imported when a histogram is made.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from ism.errors import FeatureMismatchError

PERCENTILES: Final = (50.0, 90.0, 99.0, 99.9)
LARGEST_NS: Final = 3_600_000_000_000
_DIGITS: Final = 3


class Histogram:
    """Times in nanoseconds. One above an hour counts as an hour; `max_ns` and the mean are exact."""

    __slots__ = ("_histogram", "_record", "max_ns", "total_ns")

    def __init__(self) -> None:
        """Raises FeatureMismatchError when the library is not there."""
        try:
            from hdrh.histogram import HdrHistogram
        except ImportError as exc:
            raise FeatureMismatchError(
                "percentiles need the package hdrhistogram: pip install 'virtio-ism[perf]'", ["hdrhistogram"]
            ) from exc
        self._histogram: Any = HdrHistogram(1, LARGEST_NS, _DIGITS)
        self._record = self._histogram.record_value
        self.max_ns = self.total_ns = 0

    def record(self, ns: int) -> None:
        """Count one value; what is below 1 counts as 1."""
        self.max_ns = max(self.max_ns, ns)
        self.total_ns += ns
        self._record(min(ns, LARGEST_NS) or 1)

    def add(self, others: Iterable[Histogram]) -> None:
        """Count all that others have counted."""
        for other in others:
            self._histogram.add(other._histogram)
            self.total_ns += other.total_ns
            self.max_ns = max(self.max_ns, other.max_ns)

    def __len__(self) -> int:
        return int(self._histogram.total_count)

    def mean_ns(self) -> float:
        """Return the mean, 0 of nothing."""
        return self.total_ns / len(self) if len(self) else 0.0

    def percentiles_ns(self) -> dict[float, int]:
        """Return the value at each of PERCENTILES, 0 of nothing: at most 0.1 % above the true one."""
        if not len(self):
            return dict.fromkeys(PERCENTILES, 0)
        found = self._histogram.get_percentile_to_value_dict(list(PERCENTILES))
        return {percentile: min(int(found[percentile]), self.max_ns) for percentile in PERCENTILES}

# SPDX-License-Identifier: Apache-2.0
"""What one measurement is: values, their limits, and how they look in JSON. Sans-io.

A server takes these from anybody who can reach its port: every number has a limit, and together they limit the memory
and the threads that a test can cost it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, cast

Api = Literal["trio", "blocking", "asyncio", "view"]
Transport = Literal["smc", "tcp", "unix"]
Direction = Literal["out", "in"]
"""As the client sees it: "out" is from client to server."""

APIS: Final[tuple[Api, ...]] = ("trio", "blocking", "asyncio", "view")
TRANSPORTS: Final[tuple[Transport, ...]] = ("smc", "tcp", "unix")

DEFAULT_SECONDS: Final = 10.0
DEFAULT_LENGTH: Final = {False: 65536, True: 64}
"""Bytes of one write, by whether latency is measured."""
MAX_SECONDS: Final = 86_400.0
MAX_BYTES: Final = 1 << 60
MAX_LENGTH: Final = 16 << 20
MAX_STREAMS: Final = 64
MAX_RATE: Final = 1_000_000
MAX_MEMORY: Final = 128 << 20
"""Bytes of all streams' buffers."""

_SIZE = re.compile(r"([0-9]{1,18})(?:\.([0-9]{1,6}))?\s*([KMGT]?)(?:iB|B)?", re.IGNORECASE)
_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Return the bytes that "64K", "1.5M" or "1000" mean. Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size, expected a number with K, M, G or T behind it, or nothing")
    unit = _UNITS[match[3].upper()]
    part: int = int(match[2] or 0) * unit // 10 ** len(match[2] or "0")
    whole: int = int(match[1]) * unit
    return whole + part


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """One stream in one direction. Attributes: `id` (from 1), `direction`, `quota` (bytes; None: until time is up)."""

    id: int
    direction: Direction
    quota: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """One measurement, valid. Raises ValueError, TypeError for values that are not.

    Attributes: `latency` (round trips; else throughput); `seconds` or `bytes`, whichever ends it, the other is None;
    `length` (bytes of one write, or message); `streams` (in each direction); `reverse` (the server sends);
    `both` (either end sends); `rate` (round trips to begin each second in each stream; 0: each after the last);
    `api`, `transport`.
    """

    latency: bool = False
    seconds: float | None = DEFAULT_SECONDS
    bytes: int | None = None
    length: int = DEFAULT_LENGTH[False]
    streams: int = 1
    reverse: bool = False
    both: bool = False
    rate: int = 0
    api: Api = "trio"
    transport: Transport = "smc"

    def __post_init__(self) -> None:
        for name in ("latency", "reverse", "both"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}, must be true or false")
        if (self.seconds is None) == (self.bytes is None):
            raise ValueError("a time or a number of bytes ends a test: give one of them")
        if self.seconds is not None:
            _number("the time", self.seconds, 0.001, MAX_SECONDS, "s")
        if self.bytes is not None:
            _integer("the number of bytes", self.bytes, 1, MAX_BYTES)
        _integer("the length", self.length, 1, MAX_LENGTH)
        _integer("the number of streams", self.streams, 1, MAX_STREAMS)
        _integer("the rate", self.rate, 0, MAX_RATE)
        if self.length * len(self.flows()) > MAX_MEMORY:
            raise ValueError(f"{len(self.flows())} streams of {self.length} bytes a write exceed {MAX_MEMORY} in all")
        if self.api not in APIS:
            raise ValueError(f"the api is {self.api!r}, must be one of {', '.join(APIS)}")
        if self.transport not in TRANSPORTS:
            raise ValueError(f"the transport is {self.transport!r}, must be one of {', '.join(TRANSPORTS)}")
        if self.reverse and self.both:
            raise ValueError("reverse and both directions at once exclude each other")
        if self.latency and (self.reverse or self.both):
            raise ValueError("latency is measured from the client: it has no other direction")
        if self.rate and not self.latency:
            raise ValueError("a rate is for latency only")
        if self.api == "view" and self.transport != "smc":
            raise ValueError("views are of shared memory: the transport must be smc")

    def flows(self) -> tuple[Flow, ...]:
        """Return the streams; the bytes of a direction are divided between its streams."""
        directions: tuple[Direction, ...] = ("out", "in") if self.both else ("in",) if self.reverse else ("out",)
        return tuple(
            Flow(id=number * self.streams + index + 1, direction=direction, quota=self._quota(index))
            for number, direction in enumerate(directions)
            for index in range(self.streams)
        )

    def _quota(self, index: int) -> int | None:
        if self.bytes is None:
            return None
        if self.latency:  # whole messages, one at least
            messages = max(1, -(-self.bytes // self.length))
            return self.length * (messages // self.streams + (index < messages % self.streams))
        return self.bytes // self.streams + (index < self.bytes % self.streams)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> Parameters:
        """Return what `to_json` gave, perhaps at the other end. Raises ValueError, TypeError."""
        if not isinstance(value, Mapping) or set(value) != {field.name for field in fields(cls)}:
            raise ValueError("these are not the parameters of this version")
        return cls(**cast("Mapping[str, Any]", value))


def _number(what: str, value: object, low: float, high: float, unit: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what} is {value!r}, must be a number")
    if not low <= value <= high:  # NaN is not, either
        raise ValueError(f"{what} is {value:g}, must be {low:g} to {high:g} {unit}".rstrip())


def _integer(what: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} is {value!r}, must be a whole number")
    if not low <= value <= high:
        raise ValueError(f"{what} is {value}, must be {low} to {high}")

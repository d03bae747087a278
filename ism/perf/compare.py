# SPDX-License-Identifier: Apache-2.0
"""Compare SMC with plain TCP on the same work, in one run: rounds interleaved, ratios round by round, CPU of both ends.

The far end is a process of `ism.perf.far`; this process is the near end. Both use trio with a checkpoint in every
call. Absolute figures depend on the machine and on what else runs there; the ratios of one run are what counts.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from ism.perf import workloads
from ism.smc import open_tcp_stream

TRANSPORTS = ("smc", "tcp")


class Far:
    """The process at the far end. Attributes: `ports` (by transport name)."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise ChildProcessError("the measuring peer ended before it listened; its error is above")
        self.ports: dict[str, int] = json.loads(line)

    def cpu_s(self) -> float:
        """CPU seconds, user and system, that the far end has used."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(json.loads(self._process.stdout.readline())["cpu_s"])


@contextmanager
def far_end(cpu: int | None = None) -> Iterator[Far]:
    """Start the far end, on one processor if that is given, and end it afterwards. Raises ChildProcessError."""
    with subprocess.Popen(
        [sys.executable, "-m", "ism.perf.far"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            if cpu is not None:
                os.sched_setaffinity(process.pid, {cpu})
            yield Far(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()


@dataclass
class Samples:
    """Figures of one transport, one entry a round: seconds, bytes per second, CPU seconds of both ends per GB."""

    rtt_p50: list[float] = field(default_factory=list)
    rtt_p99: list[float] = field(default_factory=list)
    throughput: list[float] = field(default_factory=list)
    cpu_s_per_gb: list[float] = field(default_factory=list)


@dataclass
class Comparison:
    """All rounds of both transports."""

    samples: dict[str, Samples]
    message_size: int
    stream_size: int

    def median(self, transport: str, name: str) -> float:
        """Median over the rounds."""
        return float(statistics.median(getattr(self.samples[transport], name)))

    def ratio(self, name: str) -> float:
        """Median of the ratios round by round, so that above 1 SMC is better."""
        smc, tcp = getattr(self.samples["smc"], name), getattr(self.samples["tcp"], name)
        better_is_more = name == "throughput"
        return float(statistics.median(s / t if better_is_more else t / s for s, t in zip(smc, tcp, strict=True)))

    def as_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        names = ("rtt_p50", "rtt_p99", "throughput", "cpu_s_per_gb")
        return {
            "message_size": self.message_size,
            "stream_size": self.stream_size,
            "ratios": {name: self.ratio(name) for name in names},
            "rounds": {which: vars(samples) for which, samples in self.samples.items()},
        }


async def _connect(transport: str, port: int) -> trio.abc.Stream:
    if transport == "tcp":
        return await trio.open_tcp_stream("127.0.0.1", port)
    return await open_tcp_stream("127.0.0.1", port, smc="require")  # TCP in its place would be no comparison


async def compare(
    far: Far,
    *,
    rounds: int = 3,
    pings: int = 1500,
    message_size: int = 64,
    stream_size: int = 65536,
    total: int = 1 << 28,
) -> Comparison:
    """Run `rounds` rounds of ping-pong and one-way stream over both transports, in turn.

    Args: `pings` round trips of `message_size` bytes; `total` bytes in messages of `stream_size`.
    """
    found = {transport: Samples() for transport in TRANSPORTS}
    for number in range(rounds):
        for transport in TRANSPORTS if number % 2 == 0 else reversed(TRANSPORTS):
            samples = found[transport]
            async with await _connect(transport, far.ports[transport]) as stream:
                latency = await workloads.ping_pong(stream, size=message_size, rounds=pings)
                samples.rtt_p50.append(latency.p50)
                samples.rtt_p99.append(latency.p99)
                await workloads.one_way(stream, size=stream_size, total=total // 8)
                before = time.process_time() + far.cpu_s()
                samples.throughput.append(await workloads.one_way(stream, size=stream_size, total=total))
                cpu_s = time.process_time() + far.cpu_s() - before
                samples.cpu_s_per_gb.append(cpu_s / (total / 1e9))
    return Comparison(found, message_size, stream_size)

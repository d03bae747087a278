# SPDX-License-Identifier: Apache-2.0
"""What does a control command cost a process: alloc, attach, detach, grant, and a whole connection?

Each command goes through the virtqueue to the manager, which maps or unmaps the region in this process before it
acknowledges. Medians and 99th percentiles of single commands, one at a time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import trio
from harness import manager, percentile, run, table

from ism.driver import Device, open_device
from ism.perf import plots
from ism.perf.compare import far_end
from ism.smc import open_tcp_stream
from ism.smc.trio_wait import default_device
from ism.virtio.ism_spec import Permission

_SHARE = Permission.READ | Permission.WRITE | Permission.ATTACH


def timed(action: Callable[[], Any], times: list[float]) -> Any:
    """Run `action` and note how long it took."""
    start = time.perf_counter()
    result = action()
    times.append(time.perf_counter() - start)
    return result


def commands(owner: Device, peer: Device, count: int) -> dict[str, list[float]]:
    """Time the commands of `count` regions."""
    times: dict[str, list[float]] = {name: [] for name in ("alloc", "grant", "attach", "detach")}
    for _ in range(count):
        placement = timed(lambda: owner.control.alloc(65536), times["alloc"])
        timed(lambda token=placement.token: owner.control.grant(token, _SHARE, peer.devid).expect_ok(), times["grant"])
        timed(lambda token=placement.token: peer.control.attach(token, Permission(0)), times["attach"])
        timed(lambda token=placement.token: peer.control.detach(token).expect_ok(), times["detach"])
        owner.control.detach(placement.token).expect_ok()
    return times


async def connections(port: int, count: int) -> list[float]:
    """Time connect, handshake and the first byte echoed, one connection after the other."""
    await default_device()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        async with await open_tcp_stream("127.0.0.1", port, smc="require") as stream:
            await stream.do_handshake()
            times.append(time.perf_counter() - start)
    return times


def body(quick: bool) -> dict[str, Any]:
    """Time everything and print the table."""
    count = 20 if quick else 1000
    with manager():
        with open_device() as owner, open_device() as peer:
            times = commands(owner, peer, count)
        with far_end() as far:
            times["connection"] = trio.run(connections, far.ports["smc"], max(5, count // 10))
    rows = []
    for name, values in times.items():
        p50, p99 = statistics.median(values), percentile(values, 99)
        rows.append([name, f"{p50 * 1e6:.0f}", f"{p99 * 1e6:.0f}"])
    table("control path from a process, us", ("", "p50", "p99"), rows)
    return {name: {"p50_s": statistics.median(values), "count": len(values)} for name, values in times.items()}


def chart(figures: dict[str, Any], path: str) -> None:
    """One bar a command."""
    bars = {name: found["p50_s"] * 1e6 for name, found in figures.items()}
    plots.bar_chart(path, "Commands of a process", "microseconds, median", "", {"p50": bars})


if __name__ == "__main__":
    run(__doc__ or "", body, chart)

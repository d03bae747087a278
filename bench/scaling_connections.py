# SPDX-License-Identifier: Apache-2.0
"""How do costs grow with the number of connections of one process: set-up, round trip, idling, memory, close?

One process connects again and again to one other and keeps every connection; each has carried one byte each way, so
its regions exist. At 1, 3, 10 ... connections the last ones' set-up is looked at, and with all others idle the round
trip on one in the middle, what both processes and the manager use of a processor, and what they have in memory and
descriptors. Then the connections are closed again, one by one. First with trio streams, where each connection of the
far end has a task, then with blocking sockets, where it has a thread.
"""

from __future__ import annotations

import argparse
import os
import queue
import statistics
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import growth
import trio
import trio.testing
from harness import PEER, Figures, Manager, answer, manager, peer, run

from ism.perf import plots
from ism.smc import SmcStream, blocking, open_tcp_listeners, open_tcp_stream
from ism.smc.default import close_default
from ism.smc.trio_wait import default_device

SURFACES = ("trio", "blocking")
_MESSAGE = 64
_LAST = 10
"""How many of the latest set-ups tell what one costs there."""


# -- the far end -----------------------------------------------------------------------------------------------------


def far(surface: str) -> None:
    """Echo on every connection."""
    growth.raise_descriptor_limit()
    ports: queue.Queue[int] = queue.Queue()
    target = _serve_trio if surface == "trio" else _serve_blocking
    threading.Thread(target=target, args=(ports,), daemon=True).start()
    answer(ports.get(), {})


def _serve_trio(ports: queue.Queue[int]) -> None:
    async def echo(stream: SmcStream) -> None:
        async with stream:
            while data := await stream.receive_some(65536):
                await stream.send_all(data)

    async def main() -> None:
        listeners = await open_tcp_listeners(0, host="127.0.0.1", smc="require")
        ports.put(listeners[0].socket.getsockname()[1])
        await trio.serve_listeners(echo, listeners)

    trio.run(main)


def _serve_blocking(ports: queue.Queue[int]) -> None:
    def echo(connection: Any) -> None:
        with connection:
            while data := connection.recv(65536):
                connection.sendall(data)

    listener = blocking.create_server(("127.0.0.1", 0), backlog=1024)
    ports.put(listener.getsockname()[1])
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=echo, args=(connection,), daemon=True).start()


# -- the near end ----------------------------------------------------------------------------------------------------


class Line(Protocol):
    """One connection of the near end, which has carried a byte each way."""

    async def echo(self, count: int) -> None:
        """Send so many bytes and receive them again."""
        ...

    async def wait(self) -> None:
        """Wait for something to receive, which never comes."""
        ...

    async def close(self) -> None:
        """End it."""
        ...


class _Trio:
    def __init__(self, stream: SmcStream) -> None:
        self._stream = stream

    async def echo(self, count: int) -> None:
        await self._stream.send_all(bytes(count))
        while count:
            count -= len(await self._stream.receive_some(count))

    async def wait(self) -> None:
        await self._stream.receive_some()

    async def close(self) -> None:
        await self._stream.aclose()


class _Blocking:
    """The same with a socket that blocks the whole process. Nobody waits on an idle one."""

    def __init__(self, connected: Any) -> None:
        self._socket = connected

    async def echo(self, count: int) -> None:
        self._socket.sendall(bytes(count))
        while count:
            count -= len(self._socket.recv(count))

    async def wait(self) -> None:
        pass

    async def close(self) -> None:
        self._socket.close()


async def connect(surface: str, port: int) -> Line:
    """Connect, and echo one byte."""
    line: _Trio | _Blocking
    if surface == "trio":
        line = _Trio(await open_tcp_stream("127.0.0.1", port, smc="require"))
    else:
        line = _Blocking(blocking.create_connection(("127.0.0.1", port)))
    await line.echo(1)
    return line


@asynccontextmanager
async def all_wait(lines: list[Line]) -> AsyncIterator[None]:
    """Have a task wait on each connection, as the tasks of an idle program do."""
    async with trio.open_nursery() as nursery:
        for line in lines:
            nursery.start_soon(line.wait)
        await trio.testing.wait_all_tasks_blocked(0.01)
        yield
        nursery.cancel_scope.cancel()


class Measurement:
    """The costs at each number of connections, by name of the cost."""

    def __init__(self, host: Manager, far_pid: int, *, pings: int, idle_s: float) -> None:
        self._pids = {"near": os.getpid(), "far": far_pid, "manager": host.pid}
        self._manager, self._pings, self._idle_s = host.pid, pings, idle_s
        self.costs: dict[str, dict[int, float]] = {}
        self._before = {name: growth.use_of(pid) for name, pid in self._pids.items()}

    def note(self, name: str, n: int, cost: float) -> None:
        """Enter one figure."""
        self.costs.setdefault(name, {})[n] = cost

    async def at(self, lines: list[Line], latest: list[float]) -> None:
        """Measure with so many connections, of which the last took `latest` seconds to set up."""
        n = len(lines)
        self.note("set-up us", n, statistics.median(latest) * 1e6)
        self.note("round trip us", n, await self._round_trip(lines[n // 2]) * 1e6)
        async with all_wait(lines):
            before = {name: growth.use_of(pid) for name, pid in self._pids.items()}
            cpu_s = {name: -growth.cpu_s(pid) for name, pid in self._pids.items()}
            await trio.sleep(self._idle_s)
            for name, pid in self._pids.items():
                cpu_s[name] += growth.cpu_s(pid)
            after = {name: growth.use_of(pid) for name, pid in self._pids.items()}
        for name, used in after.items():
            self.note(f"{name} idle %", n, 100 * cpu_s[name] / self._idle_s)
            self.note(f"{name} sleeps/s", n, used.sleeps_since(before[name]) / self._idle_s)
            self.note(f"{name} KiB", n, (used.private_bytes - self._before[name].private_bytes) / 1024)
            self.note(f"{name} fds", n, used.fds - self._before[name].fds)
        size, pages = growth.region_bytes(self._manager)
        self.note("regions KiB", n, size / 1024)
        self.note("region pages KiB", n, pages / 1024)

    async def _round_trip(self, line: Line) -> float:
        times = []
        for number in range(self._pings + self._pings // 10):
            began = time.perf_counter()
            await line.echo(_MESSAGE)
            if number >= self._pings // 10:
                times.append(time.perf_counter() - began)
        return statistics.median(times)


async def measure(surface: str, port: int, numbers: list[int], measurement: Measurement) -> None:
    """Connect up to the largest number, stopping at each, and close again."""
    lines: list[Line] = []
    times: list[float] = []
    for n in numbers:
        while len(lines) < n:
            began = time.perf_counter()
            lines.append(await connect(surface, port))
            times.append(time.perf_counter() - began)
        await measurement.at(lines, times[-min(_LAST, max(1, n // 3)) :])
    for n, left in zip(reversed(numbers), [*reversed(numbers[:-1]), 0], strict=True):
        times = []
        while len(lines) > left:
            began = time.perf_counter()
            await lines.pop().close()
            times.append(time.perf_counter() - began)
        measurement.note("close us", n, statistics.median(times) * 1e6)


_SHOWN = {
    "what one operation costs": ("set-up us", "round trip us", "close us"),
    "what all of them use of a processor while idle": (
        "near idle %", "far idle %", "manager idle %", "near sleeps/s", "far sleeps/s", "manager sleeps/s",
    ),
    "what all of them have, more than before": (
        "regions KiB", "region pages KiB", "near KiB", "far KiB", "manager KiB", "near fds", "far fds", "manager fds",
    ),
}  # fmt: skip


def body(quick: bool, *, most: int) -> Figures:
    """Measure both surfaces and print the tables."""
    growth.raise_descriptor_limit()
    numbers = growth.sizes(10 if quick else most)
    pings, idle_s = (10, 0.05) if quick else (300, 2.0)
    figures: Figures = {"n": numbers, "idle_s": idle_s}

    async def one(surface: str, host: Manager) -> Measurement:
        await default_device()
        with peer(__file__, surface) as far_end:
            warm = [await connect(surface, far_end.hello) for _ in range(2)]
            for line in warm:
                await line.close()
            measurement = Measurement(host, far_end.pid, pings=pings, idle_s=idle_s)
            await measure(surface, far_end.hello, numbers, measurement)
            return measurement

    for surface in SURFACES:
        with manager() as host:
            costs = trio.run(one, surface, host).costs
            close_default()
        slopes = {}
        for title, names in _SHOWN.items():
            chosen = {name: costs[name] for name in names}
            slopes |= growth.show(f"{surface}: {title}, by number of connections", "n", chosen)
        last = numbers[-1]
        per_line = sum(costs[name][last] for name in ("region pages KiB", "near KiB", "far KiB", "manager KiB")) / last
        print(f"  one idle connection costs {per_line:.0f} KiB in all, of {last}")
        figures[surface] = {"costs": costs, "exponents": slopes, "KiB_per_connection": per_line}
    return figures


def chart(figures: Figures, path: str) -> None:
    """Set-up, round trip and close over the number of connections."""
    lines = {
        f"{surface}, {name[:-3]}": [(float(n), cost) for n, cost in figures[surface]["costs"][name].items()]
        for surface in SURFACES
        for name in _SHOWN["what one operation costs"]
    }
    plots.line_chart(path, "One more connection", "connections that are there", "microseconds", lines, logy=True)


def options_of(parser: argparse.ArgumentParser) -> None:
    """Add --most."""
    parser.add_argument("--most", type=int, default=1000, metavar="N", help="how many connections at last (1000)")


if __name__ == "__main__":
    if sys.argv[1:2] == [PEER]:
        far(sys.argv[2])
    else:
        run(__doc__ or "", body, chart, more=options_of)

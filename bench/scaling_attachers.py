# SPDX-License-Identifier: Apache-2.0
"""How do costs grow with the number of devices that hold one region: attach, doorbell, detach, the manager's work?

The owner's region is attached by ever more devices, all of one other process, each with a doorbell of its own. At 1, 3,
10 ... attachers: what one more attach and one detach cost, what one ring by the owner costs until the first and until
the last of all has heard it, and what the manager has and does for it. Every attacher that is there is told of each
that comes and goes, so the manager's work for one grows with their number.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import statistics
import sys
import time
from typing import Any

import growth
from harness import PEER, Figures, Manager, Peer, answer, manager, peer, run

from ism.driver import Device, Region, open_device
from ism.eventfd import drain
from ism.ids import Token
from ism.perf import plots
from ism.virtio.ism_spec import Permission

_SHARE = Permission.READ | Permission.WRITE | Permission.ATTACH
_REGION = 65536
_SAMPLES = 5


# -- the attachers ---------------------------------------------------------------------------------------------------


class Attachers:
    """The devices of the far end, and the regions that they have attached."""

    def __init__(self) -> None:
        self._devices: list[Device] = []
        self._regions: list[Region] = []
        self._epoll = select.epoll()

    def open(self, count: int) -> float:
        """Open devices until there are so many. Returns the median of the seconds that one took."""
        times = [0.0]
        while len(self._devices) < count:
            began = time.perf_counter()
            self._devices.append(open_device())
            times.append(time.perf_counter() - began)
        return statistics.median(times[-_SAMPLES:])

    def attach(self, token: int, count: int) -> list[float]:
        """Have devices attach until there are so many. Returns the seconds that each took."""
        times = []
        while len(self._regions) < count:
            device = self._devices[len(self._regions)]
            began = time.perf_counter()
            region = device.attach(Token(token), interrupt=True)
            times.append(time.perf_counter() - began)
            self._regions.append(region)
            self._epoll.register(region.fileno(), select.EPOLLIN)
        return times

    def detach(self, count: int) -> list[float]:
        """Have devices detach until so many are left. Returns the seconds until each detach was acknowledged."""
        times = []
        while len(self._regions) > count:
            region = self._regions.pop()
            self._epoll.unregister(region.fileno())
            device, token = region.device, region.token
            began = time.perf_counter()
            device.control.detach(token).expect_ok()
            times.append(time.perf_counter() - began)
            region.close()  # the device has let it go; this is about what the process holds
        return times

    def quiet(self) -> bool:
        """Take back every doorbell that has rung; whether there was none."""
        return not self._take(self._epoll.poll(0, 4096))

    def hear(self) -> tuple[float, float]:
        """Wait for the doorbells of all. Returns when the first and when the last rang, as `time.monotonic`."""
        left, first = len(self._regions), 0.0
        print("null", flush=True)  # waiting from now on
        while left:
            found = self._epoll.poll(10, 4096)
            if not found:
                raise TimeoutError(f"{left} of {len(self._regions)} attachers were not told of a doorbell")
            first = first or time.monotonic()
            left -= self._take(found)
        return first, time.monotonic()

    @staticmethod
    def _take(found: list[tuple[int, int]]) -> int:
        return sum(drain(fd) for fd, _ in found)


def far() -> None:
    """Do what the owner asks."""
    growth.raise_descriptor_limit()
    attachers = Attachers()
    verbs = {name: getattr(attachers, name) for name in ("open", "attach", "detach", "quiet", "hear")}
    answer(None, verbs)


# -- the owner -------------------------------------------------------------------------------------------------------


def settle(manager_pid: int, far_end: Peer) -> None:
    """Wait until the manager and the attachers have nothing left to do."""
    before = -1.0
    while True:
        time.sleep(0.02)
        used = growth.cpu_s(manager_pid) + growth.cpu_s(far_end.pid)
        if used - before < 0.002 and far_end.ask("quiet"):
            return
        before = used


class Measurement:
    """The costs at each number of attachers, by name of the cost."""

    def __init__(self, host: Manager, far_end: Peer, region: Region) -> None:
        self._host, self._far, self._region = host, far_end, region
        self.costs: dict[str, dict[int, float]] = {}
        self._before = growth.use_of(host.pid)

    def _note(self, name: str, n: int, cost: float) -> None:
        self.costs.setdefault(name, {})[n] = cost

    def up_to(self, n: int) -> None:
        """Open and attach until there are `n`; then the last one detaches and attaches again, a few times."""
        self._note("open us", n, self._far.ask("open", n) * 1e6)
        self._far.ask("attach", self._region.token, n)
        attach, detach = ("attach", self._region.token, n), ("detach", n - 1)
        for verb, request, back in (("detach", detach, attach), ("attach", attach, detach)):
            if verb == "attach":
                self._far.ask(*detach)
            times, work = self._one_by_one(request, back)
            self._note(f"{verb} us", n, times)
            self._note(f"manager's work to {verb} us", n, work)

    def _one_by_one(self, request: tuple[Any, ...], back: tuple[Any, ...]) -> tuple[float, float]:
        times, works = [], []
        for number in range(_SAMPLES):
            if number:
                self._far.ask(*back)
            settle(self._host.pid, self._far)
            before = growth.cpu_s(self._host.pid)
            times += self._far.ask(*request)
            settle(self._host.pid, self._far)
            works.append(growth.cpu_s(self._host.pid) - before)
        return statistics.median(times) * 1e6, statistics.median(works) * 1e6

    def ring(self, n: int, rounds: int) -> None:
        """Ring and see when the first and the last attacher hear it."""
        settle(self._host.pid, self._far)
        calls, firsts, lasts, works = [], [], [], []
        for _ in range(rounds):
            before = growth.cpu_s(self._host.pid)
            self._far.ask("hear")
            time.sleep(0.001)  # it polls by now
            began = time.monotonic()
            self._region.ring()
            calls.append(time.monotonic() - began)
            first, last = self._far.read()
            firsts.append(first - began)
            lasts.append(last - began)
            works.append(growth.cpu_s(self._host.pid) - before)
        for name, values in (("ring, the call us", calls), ("first hears us", firsts), ("last hears us", lasts)):
            self._note(name, n, statistics.median(values) * 1e6)
        self._note("manager's work to ring us", n, statistics.median(works) * 1e6)

    def have(self, n: int) -> None:
        """Note what the manager has now."""
        use = growth.use_of(self._host.pid)
        self._note("manager KiB", n, (use.private_bytes - self._before.private_bytes) / 1024)
        self._note("manager fds", n, use.fds - self._before.fds)


_SHOWN = {
    "one attacher more, one less": (
        "open us", "attach us", "manager's work to attach us", "detach us", "manager's work to detach us",
    ),
    "one doorbell for all": ("ring, the call us", "first hears us", "last hears us", "manager's work to ring us"),
    "what the manager has, more than before": ("manager KiB", "manager fds"),
}  # fmt: skip


def body(quick: bool, *, most: int) -> Figures:
    """Attach up to the largest number, stopping at each, and detach again."""
    growth.raise_descriptor_limit()
    numbers = growth.sizes(10 if quick else most)
    rounds = 3 if quick else 30
    with manager() as host, open_device() as owner, peer(__file__) as far_end:
        region = owner.alloc(_REGION, grants=[(_SHARE, None)])
        measurement = Measurement(host, far_end, region)
        for n in numbers:
            measurement.up_to(n)
            measurement.ring(n, rounds)
            measurement.have(n)
        logging.getLogger("ism").setLevel(logging.ERROR)
        os.kill(host.pid, signal.SIGTERM)  # so that it need not tell all attachers of each other's end
    slopes = {}
    for title, names in _SHOWN.items():
        chosen = {name: measurement.costs[name] for name in names}
        slopes |= growth.show(f"{title}, by number of attachers", "n", chosen)
    return {"n": numbers, "costs": measurement.costs, "exponents": slopes}


def chart(figures: Figures, path: str) -> None:
    """What one more, one less and one doorbell take."""
    names = ("attach us", "detach us", "first hears us", "last hears us")
    lines = {name[:-3]: [(float(n), cost) for n, cost in sorted(figures["costs"][name].items())] for name in names}
    plots.line_chart(path, "One region, many attachers", "attachers", "microseconds", lines, logy=True)


def options_of(parser: argparse.ArgumentParser) -> None:
    """Add --most."""
    parser.add_argument("--most", type=int, default=1000, metavar="N", help="how many attachers at last (1000)")


if __name__ == "__main__":
    if sys.argv[1:2] == [PEER]:
        far()
    else:
        run(__doc__ or "", body, chart, more=options_of)

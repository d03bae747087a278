# SPDX-License-Identifier: Apache-2.0
"""What does one wake-up of a peer cost: by its own eventfd, through the manager, and when there are several to wake?

Two processes that hold one region ring each other in turn, each asleep until the other rings: half a round trip is one
wake-up. *direct*: exactly two hold it, and each has the other's eventfd. *register*: the same by a write to the notify
register, which is a message to the manager, as from a virtual machine. *fan-out*: others hold the region too, so the
eventfd leads to the manager, which wakes all. The call alone is what the one who rings spends before it goes on. The
floor is a bare pair of eventfds.
"""

from __future__ import annotations

import os
import select
import statistics
import sys
import time
from collections.abc import Callable

import growth
from harness import PEER, Figures, Peer, answer, manager, peer, run, table

from ism.driver import Device, Region, open_device
from ism.eventfd import drain
from ism.ids import Token
from ism.perf import plots
from ism.virtio.ism_spec import Permission

_SHARE = Permission.READ | Permission.WRITE | Permission.ATTACH
_OTHERS = (1, 7)
_PATIENCE_MS = 10_000


def await_ring(poller: select.poll, region: Region) -> None:
    """Sleep until the region's doorbell rings, and take it back."""
    while not drain(region.fileno()):
        if not poller.poll(_PATIENCE_MS):
            raise TimeoutError("no doorbell rang")


def poller_of(fd: int) -> select.poll:
    """Something to sleep on."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return poller


def by_register(region: Region) -> Callable[[], None]:
    """Ring with a message to the manager. The slot of a region is its first chunk's number."""
    return lambda: region.device.ring_slot(region._held.slot)


# -- the far end -----------------------------------------------------------------------------------------------------


def far() -> None:
    """Attach to the region, and ring back each time it rings."""
    device = open_device()
    regions: list[Region] = []

    def attach(token: int) -> None:
        regions.append(device.attach(Token(token), interrupt=True))

    def echo(how: str, count: int) -> None:
        (region,) = regions
        poller = poller_of(region.fileno())
        ring = by_register(region) if how == "register" else region.ring
        drain(region.fileno())
        print("null", flush=True)
        for _ in range(count):
            await_ring(poller, region)
            ring()

    answer(None, {"attach": attach, "echo": echo})
    device.close()


# -- the near end ----------------------------------------------------------------------------------------------------


def ping_pong(region: Region, far_end: Peer, how: str, count: int, manager_pid: int) -> dict[str, float]:
    """Ring and be rung. Returns microseconds: of one wake-up, of the call alone, and of the manager's work for one."""
    ring = by_register(region) if how == "register" else region.ring
    poller = poller_of(region.fileno())
    drain(region.fileno())
    before = growth.cpu_s(manager_pid)
    far_end.ask("echo", how, count)
    calls, trips = [], []
    for _ in range(count):
        began = time.perf_counter()
        ring()
        called = time.perf_counter()
        await_ring(poller, region)
        trips.append(time.perf_counter() - began)
        calls.append(called - began)
    far_end.read()
    work = (growth.cpu_s(manager_pid) - before) / (2 * count)
    return {
        "wake-up": statistics.median(trips) / 2 * 1e6,
        "the call": statistics.median(calls) * 1e6,
        "manager's work": work * 1e6,
    }


def floor(count: int) -> dict[str, float]:
    """Two bare eventfds and a child process."""
    there, back = os.eventfd(0), os.eventfd(0)
    child = os.fork()
    if child == 0:
        for _ in range(count):
            os.eventfd_read(there)
            os.eventfd_write(back, 1)
        os._exit(0)
    calls, trips = [], []
    for _ in range(count):
        began = time.perf_counter()
        os.eventfd_write(there, 1)
        called = time.perf_counter()
        os.eventfd_read(back)
        trips.append(time.perf_counter() - began)
        calls.append(called - began)
    os.waitpid(child, 0)
    os.close(there)
    os.close(back)
    return {"wake-up": statistics.median(trips) / 2 * 1e6, "the call": statistics.median(calls) * 1e6}


def settled(far_end: Peer, region: Region, manager_pid: int) -> None:
    """Let the manager's changes of eventfds take effect: they ring once more than anybody asked for."""
    used = -1.0
    while (now := growth.cpu_s(manager_pid)) - used > 0.0002:
        used = now
        time.sleep(0.02)
    drain(region.fileno())


def body(quick: bool) -> Figures:
    """Measure each way in turn and print the table."""
    count, rounds = (50, 1) if quick else (3000, 5)
    samples = {"bare eventfds": [floor(count) for _ in range(rounds)]}
    with manager() as host, open_device() as owner, peer(__file__) as far_end:
        region = owner.alloc(65536, grants=[(_SHARE, None)])
        far_end.ask("attach", region.token)
        others: list[Device] = []
        for beside in (0, *_OTHERS):
            while len(others) < beside:
                others.append(open_device())
                others[-1].attach(region.token, interrupt=True)
            settled(far_end, region, host.pid)
            if beside:
                samples[f"fan-out, {beside + 2} holders"] = [
                    ping_pong(region, far_end, "ring", count, host.pid) for _ in range(rounds)
                ]
                continue
            for _ in range(rounds):
                for name, how in (("direct", "ring"), ("register", "register")):
                    samples.setdefault(name, []).append(ping_pong(region, far_end, how, count, host.pid))
        for device in others:
            device.close()
        region.close()
    figures = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in samples.items()
    }
    columns = ("wake-up", "the call", "manager's work")
    rows = [[name, *(f"{row[key]:.1f}" if key in row else "" for key in columns)] for name, row in figures.items()]
    table("one wake-up, us", ("", *columns), rows)
    return figures


def chart(figures: Figures, path: str) -> None:
    """One bar a way."""
    bars = {name: row["wake-up"] for name, row in figures.items()}
    plots.bar_chart(path, "One wake-up of a peer that sleeps", "microseconds", "", {"wake-up": bars})


if __name__ == "__main__":
    if sys.argv[1:2] == [PEER]:
        far()
    else:
        run(__doc__ or "", body, chart)

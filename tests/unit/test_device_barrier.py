# SPDX-License-Identifier: Apache-2.0
"""The full barrier, and where the device's queue uses it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest
from device_rig import RAM_BASE, Ram, Ring

from ism.device.queue import DeviceQueue
from ism.virtio import barrier

BUFFER = RAM_BASE + 0x10000


def test_threads_do_not_disturb_each_other() -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(2000):
                barrier.full()
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []


@pytest.fixture
def alarm() -> Iterator[list[int]]:
    calls: list[int] = []

    def handler(number: int, _frame: object) -> None:
        barrier.full()
        calls.append(number)

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    yield calls
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_a_signal_handler_may_interrupt_a_barrier_with_its_own(alarm: list[int]) -> None:
    while len(alarm) < 20:
        barrier.full()


def test_locks_are_reused() -> None:
    barrier.full()
    held = len(barrier._held)
    for _ in range(100):
        barrier.full()
    assert len(barrier._held) == held


class Recorded(Ram):
    """Guest memory that writes down which part of a ring was touched, and how."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.parts: dict[int, str] = {}

    def note(self, verb: str, iova: int) -> None:
        if iova in self.parts:
            self.log.append(f"{verb} {self.parts[iova]}")

    def read(self, iova: int, length: int) -> bytes:
        self.note("load", iova)
        return super().read(iova, length)

    def write(self, iova: int, data: bytes | memoryview) -> None:
        self.note("store", iova)
        super().write(iova, data)


def test_the_queue_orders_its_accesses_as_the_specification_demands(monkeypatch: pytest.MonkeyPatch) -> None:
    ram = Recorded()
    ring = Ring(ram, RAM_BASE, 8)
    queue = DeviceQueue(0, 8, ram)
    queue.desc, queue.driver, queue.device = ring.desc, ring.driver, ring.device
    queue.enable()
    ring.add([(BUFFER, 2)], [(BUFFER + 64, 4)])
    ram.parts = {
        ring.driver: "avail flags",
        ring.driver + 2: "avail idx",
        ring.driver + 4: "avail entry",
        ring.desc: "descriptor",
        BUFFER + 64: "reply",
        ring.device + 2: "used idx",
        ring.device + 4: "used element",
    }
    full = barrier.full

    def recorded() -> None:
        full()
        ram.log.append("barrier")

    monkeypatch.setattr(barrier, "full", recorded)
    chain = queue.pop()
    assert chain is not None
    assert ram.log == ["load avail idx", "barrier", "load avail entry", "load descriptor"]
    ram.log.clear()
    queue.push(chain, b"ok")
    assert ram.log == [
        "store reply",
        "store used element",
        "barrier",
        "store used idx",
        "barrier",
        "load avail flags",
    ]

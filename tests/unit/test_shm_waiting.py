# SPDX-License-Identifier: Apache-2.0
"""Whether a wait spins: what it learns from a scripted peer, and where it must not. No clock decides anything here."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ism.memory import Mapping
from ism.shm import HEADER_BYTES, MAX_SPIN_NS, Endpoint
from ism.shm import state as words
from ism.shm.interop import RingState
from ism.shm.jit import kernel, numba_types
from ism.shm.park import FAR_SPIN_FACTOR, _adapt, _granted_ns

RX_SPIN = words.RX_SPIN
WAKE_US = 45
"""What a sleep adds to the peer's answer, in the scripts."""


def _wait_for_answer(state: Any, answer_ns: int) -> int:
    """Kernel: a wait of the reader whose peer answers after so long; how long it may spin."""
    granted = _granted_ns(state, RX_SPIN)
    if granted > 0:
        _adapt(state, RX_SPIN, granted, answer_ns <= granted)
    return granted


@pytest.fixture(scope="module")
def wait_for_answer() -> Callable[[int, int], int]:
    dispatcher = kernel(_wait_for_answer, cache=False)
    signature = numba_types.int64(RingState, numba_types.int64)
    dispatcher.compile(signature)
    return dispatcher.get_overload(signature.args)  # type: ignore[no-any-return]


def pair(kernels: tuple[int, int], max_spin_ns: int) -> tuple[Endpoint, Endpoint]:
    regions = [Mapping(HEADER_BYTES + 4096) for _ in range(2)]
    ends = [
        Endpoint(rx, tx, doorbell=lambda: None, max_spin_ns=max_spin_ns, kernel=number)
        for rx, tx, number in zip(regions, reversed(regions), kernels, strict=True)
    ]
    return ends[0], ends[1]


class Waiter:
    """An endpoint whose peer answers as a script says. Longest spin: 50 us.

    The peer is behind another kernel, so that no CPU number keeps this side from spinning, whatever runs the tests.
    """

    def __init__(self, wait: Callable[[int, int], int]) -> None:
        self._wait = wait
        peer, self._end = pair((7, 8), MAX_SPIN_NS // FAR_SPIN_FACTOR)
        peer.send(b"x")
        assert self._end.recv(1) == b"x"  # it knows who the peer is from here on
        self.waits = self.won = self.in_vain = 0
        self.passed_us = 0.0

    def answers(self, *answers_us: float) -> list[bool]:
        """Wait for each; returns which waits were over before they slept."""
        return [self._answer(answer_us) for answer_us in answers_us]

    def _answer(self, answer_us: float) -> bool:
        granted = self._wait(self._end._address, int(answer_us * 1000))
        assert granted in (0, MAX_SPIN_NS)
        won = answer_us * 1000 <= granted
        self.waits += 1
        self.won += won
        self.in_vain += bool(granted) and not won
        self.passed_us += answer_us if won else answer_us + WAKE_US
        return won

    @property
    def share_in_vain(self) -> float:
        """Part of the time that was spent spinning for nothing."""
        return self.in_vain * MAX_SPIN_NS / 1000 / self.passed_us


@pytest.fixture
def waiter(wait_for_answer: Callable[[int, int], int]) -> Waiter:
    return Waiter(wait_for_answer)


def test_every_answer_within_the_longest_spin_is_waited_for_awake(wait_for_answer: Callable[[int, int], int]) -> None:
    for answer_us in range(1, 51):
        assert all(Waiter(wait_for_answer).answers(*[answer_us] * 100)), answer_us


def test_slower_answers_are_slept_for_and_tried_ever_more_seldom(wait_for_answer: Callable[[int, int], int]) -> None:
    for answer_us in range(51, 201):
        waiter = Waiter(wait_for_answer)
        assert not any(waiter.answers(*[answer_us] * 1000))
        first = waiter.in_vain
        waiter.answers(*[answer_us] * 1024)
        assert first <= 9, answer_us
        assert waiter.in_vain - first <= 4, answer_us


@pytest.mark.parametrize(("late", "slept"), [(0.02, 0.02), (0.1, 0.1), (0.3, 0.31)])
def test_a_peer_that_is_late_now_and_then_is_slept_for_only_then(waiter: Waiter, late: float, slept: float) -> None:
    dice = random.Random(1)
    waiter.answers(*(2000 if dice.random() < late else 45 for _ in range(10_000)))
    assert waiter.waits - waiter.won <= (slept + 0.01) * waiter.waits


def test_a_peer_that_answers_each_millisecond_costs_next_to_nothing(waiter: Waiter) -> None:
    waiter.answers(*[1000] * 10_000)
    assert waiter.share_in_vain < 0.001


@pytest.mark.parametrize("quick", [0.05, 0.1, 0.2])
def test_seldom_luck_does_not_keep_a_slow_peer_spun_for(waiter: Waiter, quick: float) -> None:
    dice = random.Random(2)
    waiter.answers(*(20 if dice.random() < quick else 1000 for _ in range(10_000)))
    assert waiter.share_in_vain < 0.01


def test_what_was_learnt_is_learnt_anew_when_the_peer_changes(waiter: Waiter) -> None:
    waiter.answers(*[20] * 1000, *[200] * 2000)
    fast = waiter.answers(*[20] * 1000)
    assert all(fast[256:]), "after the longest pause it is spun for again, each time"
    slow = waiter.answers(*[200] * 20)
    assert not any(slow)
    assert waiter.answers(*[20] * 20)[-1]


def test_spins_in_vain_are_paid_for_by_those_that_helped(wait_for_answer: Callable[[int, int], int]) -> None:
    for seed in range(20):
        dice = random.Random(seed)
        waiter = Waiter(wait_for_answer)
        share = dice.random()
        for _ in range(3000):
            waiter.answers(10 if dice.random() < share else 90)
            trials = 1 + waiter.waits // 5  # after a pause of four waits, the shortest
            assert waiter.in_vain <= trials + 2 * waiter.won


def budget(end: Endpoint) -> int:
    return end._words[RX_SPIN + words.SPIN_BUDGET_NS]


@contextmanager
def pinned(cpus: set[int]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def test_a_process_that_is_given_one_cpu_later_stops_spinning_for_a_peer_it_knows_nothing_of() -> None:
    first, second = pair((0, 0), MAX_SPIN_NS)  # kernels that do not say who they are
    allowed = os.sched_getaffinity(0)
    with pinned({min(allowed)}):
        for _ in range(20):
            assert first.recv(1) is None
        assert budget(first) == MAX_SPIN_NS
    if len(allowed) > 1:
        assert second.recv(1) is None
        assert budget(second) == 0, "it may use several, and spins"


def test_one_cpu_is_enough_to_spin_for_a_peer_known_to_be_elsewhere() -> None:
    first, second = pair((7, 8), MAX_SPIN_NS)
    second.send(b"x")
    assert first.recv(1) == b"x"
    with pinned({min(os.sched_getaffinity(0))}):
        assert first.recv(1) is None
    assert budget(first) == 0


def test_a_wait_that_may_not_spin_leaves_what_was_learnt_alone() -> None:
    first, second = pair((7, 8), MAX_SPIN_NS)
    second.send(b"x")
    assert first.recv(1) == b"x"
    for _ in range(20):
        assert first.recv(1, False) is None
    assert budget(first) == MAX_SPIN_NS
    first.max_spin_ns = 0
    assert first.recv(1) is None
    assert first.park_reader()

# SPDX-License-Identifier: Apache-2.0
"""Vectors handed out to regions: own ones, the shared last one, used again, gone."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from ism.driver.vectors import Binding, Vectors
from ism.errors import DeviceGoneError, TransportError
from ism.eventfd import drain, raise_eventfd


class Host:
    """Transport and watcher in one: what was bound, and the callbacks, run by hand."""

    name = "host"

    def __init__(self) -> None:
        self.bound: dict[int, int] = {}
        self.callbacks: dict[int, Callable[[], None]] = {}
        self.refuse = False

    def set_vectors(self, first: int, eventfds: Sequence[int | None]) -> None:
        if self.refuse:
            raise TransportError("no more vectors today")
        for vector, fd in enumerate(eventfds, first):
            assert fd is not None
            self.bound[vector] = fd

    def add(self, fd: int, callback: Callable[[], None], *, hangup_only: bool = False) -> None:
        if self.refuse:
            raise DeviceGoneError("closed")
        self.callbacks[fd] = callback

    def remove(self, fd: int) -> None:
        self.callbacks.pop(fd, None)

    def interrupt(self, vector: int) -> None:
        fd = self.bound[vector]
        raise_eventfd(fd)
        if fd in self.callbacks:
            self.callbacks[fd]()


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def vectors(host: Host) -> Iterator[Vectors]:
    warm = os.eventfd(0)
    raise_eventfd(warm)  # takes the one descriptor that a process keeps for it
    os.close(warm)
    before = len(os.listdir("/proc/self/fd"))
    made = Vectors(host, host, 3, 6)
    yield made
    made.close()
    made.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert host.callbacks == {}


def set_ones(bindings: Sequence[Binding]) -> list[bool]:
    return [drain(binding.fd) for binding in bindings]


def test_each_region_has_a_vector_of_its_own_until_one_is_left(vectors: Vectors, host: Host) -> None:
    bindings = [vectors.acquire() for _ in range(4)]
    assert [(binding.vector, binding.shared) for binding in bindings] == [(3, False), (4, False), (5, True), (5, True)]
    host.interrupt(4)
    assert set_ones(bindings) == [False, True, False, False]
    host.interrupt(5)
    assert set_ones(bindings) == [False, False, True, True]


def test_a_vector_that_comes_back_is_given_out_again_with_a_clean_eventfd(vectors: Vectors, host: Host) -> None:
    first = vectors.acquire()
    raise_eventfd(first.fd)
    vectors.release(first)
    again = vectors.acquire()
    assert again == first
    assert not drain(again.fd)


def test_a_shared_interrupt_that_is_released_is_told_nothing_more(vectors: Vectors, host: Host) -> None:
    own, _, stays, goes = [vectors.acquire() for _ in range(4)]
    vectors.release(goes)
    vectors.release(goes)
    host.interrupt(5)
    assert set_ones([own, stays]) == [False, True]


def test_a_full_counter_that_a_peer_made_blocking_stops_nobody(vectors: Vectors, host: Host) -> None:
    bindings = [vectors.acquire() for _ in range(4)]
    for binding in bindings:
        os.eventfd_write(binding.fd, (1 << 64) - 2)
        os.set_blocking(binding.fd, True)
    host.interrupt(5)
    vectors.wake_all()
    assert all(set_ones(bindings))


def test_wake_all_reaches_own_and_shared_interrupts(vectors: Vectors) -> None:
    bindings = [vectors.acquire() for _ in range(4)]
    vectors.wake_all()
    assert all(set_ones(bindings))


def test_a_vector_that_the_transport_refuses_costs_no_descriptor(vectors: Vectors, host: Host) -> None:
    before = len(os.listdir("/proc/self/fd"))
    host.refuse = True
    for _ in range(3):
        with pytest.raises(TransportError, match="no more vectors today"):
            vectors.acquire()
    assert len(os.listdir("/proc/self/fd")) == before
    host.refuse = False
    assert vectors.acquire().vector == 3


def test_without_vectors_for_regions_the_error_says_so(host: Host) -> None:
    for count in (0, 3):
        with pytest.raises(TransportError, match="has no interrupt vectors for regions"):
            Vectors(host, host, 3, count).acquire()


def test_after_close_there_are_none_and_giving_back_is_harmless(host: Host) -> None:
    vectors = Vectors(host, host, 3, 5)
    kept = [vectors.acquire(), vectors.acquire()]
    vectors.close()
    for binding in kept:
        vectors.release(binding)
    vectors.wake_all()
    with pytest.raises(DeviceGoneError):
        vectors.acquire()


class Counting(Host):
    """Attributes: `asked` (how many vectors each call bound); `most` (so many at once are refused)."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []
        self.most = 100

    def set_vectors(self, first: int, eventfds: Sequence[int | None]) -> None:
        self.asked.append(len(eventfds))
        if len(eventfds) > self.most:
            raise TransportError("no more today")
        super().set_vectors(first, eventfds)


def test_the_more_regions_there_are_the_more_vectors_are_bound_at_once() -> None:
    before = len(os.listdir("/proc/self/fd"))
    host = Counting()
    vectors = Vectors(host, host, 3, 203)
    bindings = [vectors.acquire() for _ in range(199)]
    assert [binding.vector for binding in bindings] == list(range(3, 202))
    assert all(host.bound[binding.vector] == binding.fd and not binding.shared for binding in bindings)
    assert (host.asked[0], max(host.asked)) == (1, 8)
    assert len(host.asked) < len(bindings) / 3
    assert vectors.exhausted
    assert vectors.acquire().shared
    vectors.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_few_regions_have_no_vectors_bound_ahead() -> None:
    host = Counting()
    vectors = Vectors(host, host, 3, 100)
    for _ in range(8):
        vectors.acquire()
    assert host.asked == [1] * 8
    vectors.close()


def test_vectors_that_came_back_are_bound_again_side_by_side_and_each_once() -> None:
    host = Counting()
    vectors = Vectors(host, host, 3, 103)
    bindings = [vectors.acquire() for _ in range(60)]
    spare = len(host.bound) - len(bindings)
    for binding in bindings[10:50:2] + bindings[20:30:2] + bindings[21:30:2]:
        vectors.release(binding)
    host.asked.clear()
    again = [vectors.acquire() for _ in range(25 + spare)]
    in_use = [binding.vector for binding in bindings[:10] + bindings[50:] + again]
    assert len(set(in_use)) == len(in_use)
    assert all(host.bound[binding.vector] == binding.fd for binding in again)
    assert max(host.asked) > 1
    assert max(binding.vector for binding in again) < 3 + 60 + spare
    vectors.close()


def test_of_what_is_refused_together_one_is_asked_for_alone() -> None:
    before = len(os.listdir("/proc/self/fd"))
    host = Counting()
    host.most = 1
    vectors = Vectors(host, host, 3, 100)
    bindings = [vectors.acquire() for _ in range(20)]
    assert [binding.vector for binding in bindings] == list(range(3, 23))
    assert 2 in host.asked
    host.most = 0
    with pytest.raises(TransportError, match="no more today"):
        vectors.acquire()
    host.most = 1
    assert vectors.acquire().vector == 23
    vectors.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_get_and_give_back_interrupts_at_once(vectors: Vectors) -> None:
    in_use: set[int] = set()
    lock = threading.Lock()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(200):
                binding = vectors.acquire()
                with lock:
                    assert binding.fd not in in_use
                    in_use.add(binding.fd)
                raise_eventfd(binding.fd)
                with lock:
                    in_use.discard(binding.fd)
                vectors.release(binding)
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []


def test_who_kept_an_earlier_regions_eventfd_cannot_swallow_a_later_regions_wake_ups(
    host: Host, vectors: Vectors
) -> None:
    first = vectors.acquire()
    kept = os.dup(first.fd)  # what a peer gets for its doorbell, and may keep for ever
    try:
        vectors.release(first)
        second = vectors.acquire()
        assert second.vector == first.vector
        host.interrupt(second.vector)
        assert not drain(kept)
        assert drain(second.fd)
        vectors.release(second)
    finally:
        os.close(kept)

# SPDX-License-Identifier: Apache-2.0
"""Offers in shared memory: one word, taken or withdrawn, never both."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from ism.memory import PAGE_SIZE, Mapping
from ism.shm import offer
from ism.shm.header import Header
from ism.shm.kernels import load_kernels

ADDRESSES = (bytes(15) + b"\1", bytes(15) + b"\2")
CONNECTION = offer.connection_bytes(7, ADDRESSES[0], 40000, ADDRESSES[1], 80)
ROUNDS = 300


def exchange(address: int, expected: int, desired: int) -> int:
    return load_kernels().exchange(address, expected, desired)


def test_an_offer_is_found_by_exactly_its_connection() -> None:
    page = Mapping(PAGE_SIZE)
    assert not offer.matches(page, CONNECTION)
    assert offer.make(page, CONNECTION, exchange)
    assert offer.matches(page, CONNECTION)
    for other in (
        offer.connection_bytes(8, ADDRESSES[0], 40000, ADDRESSES[1], 80),
        offer.connection_bytes(7, ADDRESSES[1], 40000, ADDRESSES[1], 80),
        offer.connection_bytes(7, ADDRESSES[0], 40001, ADDRESSES[1], 80),
        offer.connection_bytes(7, ADDRESSES[0], 40000, ADDRESSES[0], 80),
        offer.connection_bytes(7, ADDRESSES[0], 40000, ADDRESSES[1], 81),
    ):
        assert not offer.matches(page, other)


def test_the_first_of_taking_and_withdrawing_counts() -> None:
    page = Mapping(PAGE_SIZE)
    assert offer.make(page, CONNECTION, exchange)
    assert offer.take(page, exchange)
    assert not offer.withdraw(page, exchange)
    assert offer.state(page) == offer.TAKEN
    assert not offer.take(page, exchange)
    assert offer.make(page, CONNECTION, exchange)  # the next connection
    assert offer.withdraw(page, exchange)
    assert not offer.take(page, exchange)
    assert not offer.matches(page, CONNECTION)


def test_a_client_that_sleeps_says_so_and_looks_again() -> None:
    page = Mapping(PAGE_SIZE)
    assert offer.make(page, CONNECTION, exchange)
    assert not offer.client_sleeps(page)
    assert offer.wait(page)
    assert offer.client_sleeps(page)
    offer.take(page, exchange)
    assert not offer.wait(page)


def test_two_threads_at_once_never_both_succeed() -> None:
    page = Mapping(PAGE_SIZE)
    load_kernels()
    for _ in range(ROUNDS):
        page.view[:] = bytes(PAGE_SIZE)
        assert offer.make(page, CONNECTION, exchange)
        ready, results = threading.Barrier(2), {}

        def run(name: str, act: object, ready: threading.Barrier = ready, results: dict[str, bool] = results) -> None:
            ready.wait()
            results[name] = act(page, exchange)  # type: ignore[operator]

        threads = [
            threading.Thread(target=run, args=("taken", offer.take)),
            threading.Thread(target=run, args=("withdrawn", offer.withdraw)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results["taken"] != results["withdrawn"]


@given(st.binary(min_size=128, max_size=128))
def test_whatever_a_peer_writes_there_only_its_own_connection_is_matched(line: bytes) -> None:
    page = Mapping(PAGE_SIZE)
    at = Header.offset_of("offer_state")
    page.view[at : at + len(line)] = line
    state, connection = line[:8], line[16:60]
    assert offer.matches(page, connection) == (state == offer.OFFERED.to_bytes(8, "little"))
    assert offer.take(page, exchange) == (state == offer.OFFERED.to_bytes(8, "little"))


def test_a_region_that_its_owner_gives_away_cannot_be_offered_nor_an_offered_one_be_given_away() -> None:
    page = Mapping(PAGE_SIZE)
    assert offer.reserve(page, exchange)
    assert not offer.make(page, CONNECTION, exchange)
    offer.release(page, exchange)
    assert offer.make(page, CONNECTION, exchange)
    assert not offer.reserve(page, exchange)
    offer.release(page, exchange)
    assert offer.matches(page, CONNECTION)


def test_what_became_of_an_offer_can_be_seen_after_the_owner_is_done_with_the_connection() -> None:
    page = Mapping(PAGE_SIZE)
    assert offer.make(page, CONNECTION, exchange)
    assert offer.take(page, exchange)
    offer.release(page, exchange)  # as at the end of any connection
    assert not offer.withdraw(page, exchange)
    assert offer.reserve(page, exchange)
    assert not offer.make(page, CONNECTION, exchange)

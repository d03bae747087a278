# SPDX-License-Identifier: Apache-2.0
"""Eventfds whose description a hostile peer shares: nothing sleeps, whatever the peer does to flags and counter."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator

import pytest

from ism import eventfd
from ism.errors import TransportError
from ism.eventfd import Raiser, drain, make_eventfd, raise_eventfd

FULL = (1 << 64) - 2


@pytest.fixture
def blocking() -> Iterator[int]:
    """An eventfd on which a peer has cleared O_NONBLOCK."""
    fd = make_eventfd()
    os.set_blocking(fd, True)
    yield fd
    os.close(fd)


@pytest.fixture(params=["asynchronous", "polled"])
def raiser(request: pytest.FixtureRequest) -> Iterator[Raiser]:
    made = Raiser(asynchronous=request.param == "asynchronous")
    yield made
    if made.asynchronous:
        os.close(made._null)


def test_an_eventfd_is_raised_and_drained(raiser: Raiser) -> None:
    fd = make_eventfd()
    assert not drain(fd)
    raiser.raise_eventfd(fd)
    raiser.raise_eventfd(fd)
    assert drain(fd)
    assert not drain(fd)
    os.close(fd)


def test_draining_an_empty_blocking_eventfd_does_not_sleep(blocking: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not drain(blocking)
    raise_eventfd(blocking)
    assert drain(blocking)

    def unsupported(*_: object) -> int:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "preadv", unsupported)  # a kernel before 5.8
    assert not drain(blocking)
    raise_eventfd(blocking)
    assert drain(blocking)


def test_raising_a_full_blocking_eventfd_does_not_sleep(raiser: Raiser, blocking: int) -> None:
    os.eventfd_write(blocking, FULL)
    for _ in range(200):
        raiser.raise_eventfd(blocking)
    assert drain(blocking)


def test_every_raise_counts_from_every_thread(raiser: Raiser) -> None:
    fd = make_eventfd()

    def work() -> None:
        for _ in range(2000):
            raiser.raise_eventfd(fd)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert os.eventfd_read(fd) == 8000
    os.close(fd)


def test_a_descriptor_that_is_no_eventfd_is_an_error_and_is_not_written_to() -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    with pytest.raises(OSError, match="cannot be raised"):
        raise_eventfd(write_end)
    with pytest.raises(BlockingIOError):
        os.read(read_end, 8)
    os.close(read_end)
    os.close(write_end)
    with pytest.raises(OSError, match="Bad file descriptor"):
        raise_eventfd(write_end)


def test_without_descriptors_the_error_names_the_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(TransportError, match="ulimit -n"):
            make_eventfd()
        polled = Raiser()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not polled.asynchronous


def test_a_forked_child_makes_a_context_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    fd = make_eventfd()
    raise_eventfd(fd)
    parents = eventfd._raiser
    monkeypatch.setattr(eventfd, "_raiser", parents)  # put back at the end
    monkeypatch.setattr(eventfd, "_raiser_lock", eventfd._raiser_lock)
    eventfd._after_fork()
    raise_eventfd(fd)
    assert eventfd._raiser is not parents
    assert eventfd._raiser is not None
    if eventfd._raiser.asynchronous:
        os.close(eventfd._raiser._null)
    assert os.eventfd_read(fd) == 2
    os.close(fd)

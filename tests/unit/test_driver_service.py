# SPDX-License-Identifier: Apache-2.0
"""The service thread: callbacks that raise, remove, add, close; its end; descriptors it must not touch."""

from __future__ import annotations

import logging
import os
import resource
import socket
import threading
from collections.abc import Iterator

import pytest

from ism.driver.service import Service
from ism.errors import DeviceGoneError, TransportError
from ism.eventfd import drain, make_eventfd, raise_eventfd

PATIENCE_S = 30.0


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    warm = make_eventfd()
    raise_eventfd(warm)
    os.close(warm)
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service("test service")
    yield made
    made.close()


@pytest.fixture
def fd() -> Iterator[int]:
    made = make_eventfd()
    yield made
    os.close(made)


class Counter:
    """A callback that drains its descriptor and counts."""

    def __init__(self, fd: int) -> None:
        self._fd, self._came = fd, threading.Semaphore(0)
        self.threads: set[int] = set()

    def __call__(self) -> None:
        if drain(self._fd):
            self.threads.add(threading.get_ident())
            self._came.release()

    def wait(self) -> None:
        assert self._came.acquire(timeout=PATIENCE_S)


def test_callbacks_run_in_one_thread_of_their_own(service: Service, fd: int) -> None:
    other = make_eventfd()
    counters = [Counter(fd), Counter(other)]
    service.add(fd, counters[0])
    service.add(other, counters[1])
    for _ in range(3):
        raise_eventfd(fd)
        counters[0].wait()
        raise_eventfd(other)
        counters[1].wait()
    assert counters[0].threads == counters[1].threads
    assert threading.get_ident() not in counters[0].threads
    assert not service.is_current
    service.remove(other)
    os.close(other)


def test_a_callback_knows_that_it_is_one(service: Service, fd: int) -> None:
    seen: list[bool] = []
    counter = Counter(fd)

    def callback() -> None:
        seen.append(service.is_current)
        counter()

    service.add(fd, callback)
    raise_eventfd(fd)
    counter.wait()
    assert seen == [True]


def test_a_callback_that_raises_is_logged_and_its_descriptor_watched_no_more(
    service: Service, fd: int, caplog: pytest.LogCaptureFixture
) -> None:
    calls = threading.Semaphore(0)

    def callback() -> None:
        calls.release()
        raise ZeroDivisionError

    other = make_eventfd()
    counter = Counter(other)
    with caplog.at_level(logging.ERROR):
        service.add(fd, callback)
        service.add(other, counter)
        raise_eventfd(fd)  # never drained: it would be called for ever
        assert calls.acquire(timeout=PATIENCE_S)
        for _ in range(3):
            raise_eventfd(other)
            counter.wait()
    assert not calls.acquire(blocking=False)
    assert "ZeroDivisionError" in caplog.text
    service.remove(other)
    os.close(other)


def test_a_removed_descriptor_is_not_called_and_may_be_added_again(service: Service, fd: int) -> None:
    counter = Counter(fd)
    service.add(fd, counter)
    service.remove(fd)
    service.remove(fd)
    raise_eventfd(fd)
    service.add(fd, counter)
    counter.wait()


def test_a_callback_may_remove_itself_and_others(service: Service) -> None:
    fds = [make_eventfd() for _ in range(2)]
    called: list[int] = []
    done = threading.Event()

    def callback(index: int) -> None:
        called.append(index)
        for fd in fds:
            service.remove(fd)
        done.set()

    def begin() -> None:  # in the thread itself, so that both are found readable by one look
        drain(start)
        for index, fd in enumerate(fds):
            raise_eventfd(fd)
            service.add(fd, lambda index=index: callback(index))

    start, gate = make_eventfd(), make_eventfd()
    service.add(start, begin)
    raise_eventfd(start)
    assert done.wait(PATIENCE_S)
    counter = Counter(gate)
    service.add(gate, counter)
    raise_eventfd(gate)
    counter.wait()
    assert len(called) == 1
    service.remove(gate)
    service.remove(start)
    for fd in (*fds, start, gate):
        os.close(fd)


def test_a_callback_may_add_a_descriptor(service: Service, fd: int) -> None:
    other = make_eventfd()
    counter = Counter(other)

    def callback() -> None:
        drain(fd)
        service.add(other, counter)

    service.add(fd, callback)
    raise_eventfd(fd)
    raise_eventfd(other)
    counter.wait()
    service.remove(other)
    os.close(other)


def test_a_callback_may_close_the_service(fd: int) -> None:
    service = Service("closes itself")
    closed = threading.Event()

    def callback() -> None:
        service.close()
        closed.set()

    service.add(fd, callback)
    raise_eventfd(fd)
    assert closed.wait(PATIENCE_S)
    service.close()  # waits for the thread, which has called it itself
    with pytest.raises(DeviceGoneError, match="is closed"):
        service.add(fd, callback)


def test_after_close_no_callback_begins_and_the_one_that_runs_has_finished(fd: int) -> None:
    service = Service("waits")
    begun, may_end, log = threading.Event(), threading.Event(), []

    def callback() -> None:
        begun.set()
        assert may_end.wait(PATIENCE_S)
        log.append("callback")

    service.add(fd, callback)
    raise_eventfd(fd)
    assert begun.wait(PATIENCE_S)
    closer = threading.Thread(target=lambda: (service.close(), log.append("closed")))
    closer.start()
    may_end.set()
    closer.join(PATIENCE_S)
    assert log == ["callback", "closed"]


def test_close_is_idempotent_from_many_threads(fd: int) -> None:
    service = Service("many")
    service.add(fd, lambda: None)
    threads = [threading.Thread(target=service.close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)


def test_a_service_that_never_watched_anything_closes_too() -> None:
    service = Service("idle")
    service.close()
    service.close()
    service.remove(0)
    with pytest.raises(DeviceGoneError):
        service.every(0.001, lambda: None)


def test_the_tick_comes_without_any_descriptor_and_ends_with_close() -> None:
    service = Service("ticks")
    ticks = threading.Semaphore(0)
    service.every(0.001, ticks.release)
    for _ in range(5):
        assert ticks.acquire(timeout=PATIENCE_S)
    service.close()


def test_a_tick_may_begin_when_the_thread_is_waiting_already(service: Service, fd: int) -> None:
    counter = Counter(fd)
    service.add(fd, counter)
    raise_eventfd(fd)
    counter.wait()
    ticks = threading.Semaphore(0)
    service.every(0.001, ticks.release)
    assert ticks.acquire(timeout=PATIENCE_S)


def test_a_tick_that_raises_is_logged_once_and_called_no_more(
    service: Service, fd: int, caplog: pytest.LogCaptureFixture
) -> None:
    ticks = threading.Semaphore(0)

    def tick() -> None:
        ticks.release()
        raise ZeroDivisionError

    counter = Counter(fd)
    service.every(0.001, tick)
    assert ticks.acquire(timeout=PATIENCE_S)
    service.add(fd, counter)
    for _ in range(3):
        raise_eventfd(fd)
        counter.wait()
    assert not ticks.acquire(blocking=False)
    assert len(caplog.records) == 1


def test_a_hangup_is_told_without_reading_what_comes(service: Service) -> None:
    here, there = socket.socketpair()
    gone = threading.Event()

    def callback() -> None:
        service.remove(here.fileno())
        gone.set()

    service.add(here.fileno(), callback, hangup_only=True)
    there.send(b"not a hangup")
    assert not gone.is_set()
    there.close()
    assert gone.wait(PATIENCE_S)
    assert here.recv(100) == b"not a hangup"
    here.close()


def test_a_descriptor_that_cannot_be_watched_is_an_error_and_leaves_nothing(service: Service, fd: int) -> None:
    with open(os.devnull, "rb") as file, pytest.raises(OSError, match="not permitted"):
        service.add(file.fileno(), lambda: None)
    counter = Counter(fd)
    service.add(fd, counter)
    with pytest.raises(FileExistsError):
        service.add(fd, lambda: None)
    raise_eventfd(fd)
    counter.wait()


def test_without_descriptors_the_error_names_the_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = make_eventfd()
    os.close(spare)
    for limit in (spare, spare + 1):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            with pytest.raises(TransportError, match="ulimit -n"):
                Service("hungry")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_in_a_forked_child_it_touches_nothing(service: Service, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Counter(fd)
    service.add(fd, counter)
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)
        service.remove(fd)
        service.close()
        with pytest.raises(DeviceGoneError, match="before a fork"):
            service.add(fd, counter)
    raise_eventfd(fd)
    counter.wait()


# -- a thread that waits serves in the service thread's place


def test_whoever_waits_takes_the_answer_itself_and_hands_the_descriptor_back(service: Service, fd: int) -> None:
    counter = Counter(fd)
    service.add(fd, counter)
    raise_eventfd(fd)
    counter.wait()
    by_service = set(counter.threads)
    answered: list[int] = []

    def callback() -> None:
        if drain(fd):
            assert service.is_current
            answered.append(threading.get_ident())

    service.remove(fd)
    service.add(fd, callback)
    teller = threading.Thread(target=raise_eventfd, args=(fd,))
    teller.start()
    service.serve_until(lambda: bool(answered), [fd], PATIENCE_S)
    teller.join(PATIENCE_S)
    assert answered
    service.remove(fd)
    idle = threading.Event()
    assert service.soon(idle.set)
    assert idle.wait(PATIENCE_S)  # a callback that was about to run when it was removed may run still, and drain
    service.add(fd, counter)
    raise_eventfd(fd)
    counter.wait()
    assert counter.threads == by_service


def test_an_answer_that_comes_by_another_way_ends_the_wait(service: Service, fd: int) -> None:
    service.add(fd, lambda: None)
    done = threading.Event()
    ended = threading.Event()

    def wait() -> None:
        service.serve_until(done.is_set, [fd], PATIENCE_S)
        ended.set()

    thread = threading.Thread(target=wait)
    thread.start()
    done.set()
    service.nudge()
    assert ended.wait(PATIENCE_S)
    thread.join(PATIENCE_S)


def test_close_waits_for_whoever_serves_and_lets_it_go(fd: int) -> None:
    for _ in range(50):
        service = Service("served")
        service.add(fd, lambda: None)
        begun = threading.Barrier(2)

        def wait(service: Service = service, begun: threading.Barrier = begun) -> None:
            begun.wait(PATIENCE_S)
            try:
                service.serve_until(lambda: False, [fd], PATIENCE_S)
            except DeviceGoneError:
                pass  # closed before it began

        thread = threading.Thread(target=wait)
        thread.start()
        begun.wait(PATIENCE_S)
        service.close()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_a_callback_that_a_waiter_runs_may_close_the_service(fd: int) -> None:
    service = Service("closes under a waiter")
    closed: list[bool] = []

    def callback() -> None:
        drain(fd)
        service.close()
        closed.append(True)

    service.add(fd, callback)
    raise_eventfd(fd)
    service.serve_until(lambda: bool(closed), [fd], PATIENCE_S)
    service.close()
    assert closed or not service.is_current


def test_only_one_thread_serves_and_the_others_return_at_once(service: Service, fd: int) -> None:
    inside, leave = threading.Event(), threading.Event()

    def done() -> bool:
        inside.set()
        return leave.is_set()

    service.add(fd, lambda: None)
    thread = threading.Thread(target=service.serve_until, args=(done, [fd], PATIENCE_S))
    thread.start()
    assert inside.wait(PATIENCE_S)
    service.serve_until(lambda: False, [fd], PATIENCE_S)  # would wait for ever
    leave.set()
    service.nudge()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


@pytest.mark.parametrize("told_before", [False, True])
def test_who_gives_way_leaves_for_a_thread_that_waits_for_an_answer(
    service: Service, fd: int, told_before: bool
) -> None:
    inside, left = threading.Event(), threading.Event()
    answered: list[int] = []

    def done() -> bool:
        inside.set()
        return False

    def wait() -> None:
        service.serve_until(done, [fd], PATIENCE_S, gives_way=True)
        left.set()

    def callback() -> None:
        if drain(fd):
            answered.append(threading.get_ident())

    service.add(fd, callback)
    thread = threading.Thread(target=wait)
    thread.start()
    assert inside.wait(PATIENCE_S)
    if told_before:
        service.make_way()
        service.nudge()
        assert left.wait(PATIENCE_S)
    raised = False

    def look() -> bool:
        nonlocal raised
        if not raised:  # by now it is this thread that serves
            raised = True
            assert left.wait(PATIENCE_S)
            raise_eventfd(fd)
        return bool(answered)

    while not answered:  # it may have been refused: who gives way was inside a callback, or asleep
        service.serve_until(look, [fd], PATIENCE_S)
    assert answered == [threading.get_ident()]
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_who_gives_way_does_not_make_others_who_do_leave(service: Service, fd: int) -> None:
    inside, leave = threading.Event(), threading.Event()

    def done() -> bool:
        inside.set()
        return leave.is_set()

    service.add(fd, lambda: None)
    thread = threading.Thread(target=service.serve_until, args=(done, [fd], PATIENCE_S), kwargs={"gives_way": True})
    thread.start()
    assert inside.wait(PATIENCE_S)
    service.serve_until(lambda: False, [fd], PATIENCE_S, gives_way=True)  # would wait for ever
    assert thread.is_alive()
    leave.set()
    service.nudge()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_who_waits_for_an_answer_is_not_made_to_leave(service: Service, fd: int) -> None:
    inside, leave, told, again = (threading.Event() for _ in range(4))

    def done() -> bool:
        inside.set()
        if told.is_set():
            again.set()
        return leave.is_set()

    service.add(fd, lambda: None)
    thread = threading.Thread(target=service.serve_until, args=(done, [fd], PATIENCE_S))
    thread.start()
    assert inside.wait(PATIENCE_S)
    service.make_way()
    service.nudge()
    service.serve_until(lambda: False, [fd], PATIENCE_S)  # would wait for ever
    told.set()
    service.nudge()
    assert again.wait(PATIENCE_S)  # it serves still
    leave.set()
    service.nudge()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_what_is_to_be_done_soon_is_done_once_in_the_service_thread(service: Service, fd: int) -> None:
    service.add(fd, lambda: None)
    came: list[tuple[bool, int]] = []
    done = threading.Semaphore(0)

    def note() -> None:
        came.append((service.is_current, threading.get_ident()))
        done.release()

    assert service.soon(note)
    assert service.soon(note)
    for _ in range(2):
        assert done.acquire(timeout=PATIENCE_S)
    assert came[0][0]
    assert came[0] == came[1]
    assert came[0][1] != threading.get_ident()


def test_nothing_is_done_soon_without_a_thread_or_after_the_end(service: Service, fd: int) -> None:
    assert not service.soon(lambda: None)
    service.add(fd, lambda: None)
    service.close()
    assert not service.soon(lambda: None)


def test_what_is_to_be_done_soon_and_raises_stops_nothing(
    service: Service, fd: int, caplog: pytest.LogCaptureFixture
) -> None:
    service.add(fd, lambda: None)
    done = threading.Event()

    def fail() -> None:
        raise ValueError("no")

    with caplog.at_level(logging.CRITICAL):
        assert service.soon(fail)
        assert service.soon(done.set)
        assert done.wait(PATIENCE_S)

# SPDX-License-Identifier: Apache-2.0
"""Descriptors: owned once, sent once, never leaked."""

from __future__ import annotations

import errno
import os
import resource
import socket
import threading
from collections.abc import Iterator

import pytest

from ism.errors import DeviceGoneError
from ism.vfio_user.errors import VfioUserTimeoutError
from ism.vfio_user.fds import Fd, PartialSendError, close_all, recv_message, send_message, send_some


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, two = socket.socketpair()
    with one, two:
        yield one, two


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def memfd() -> Fd:
    return Fd(os.memfd_create("test"))


def test_a_descriptor_is_closed_once() -> None:
    with memfd() as fd:
        number = fd.fileno()
        os.fstat(number)
    assert fd.closed
    assert fd.fileno() == -1
    fd.close()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(number)


def test_a_detached_descriptor_is_the_callers() -> None:
    fd = memfd()
    number = fd.detach()
    fd.close()
    os.close(number)
    with pytest.raises(ValueError, match="already"):
        fd.detach()


def test_a_copy_has_a_life_of_its_own_and_is_not_inherited() -> None:
    with memfd() as fd:
        copy = fd.dup()
        other = Fd.copy_of(fd)
    with copy, other:
        assert os.fstat(copy.fileno()).st_ino == os.fstat(other.fileno()).st_ino
        assert not os.get_inheritable(copy.fileno())


def test_a_forgotten_descriptor_is_closed_with_a_warning() -> None:
    number = os.memfd_create("forgotten")
    fd = Fd(number)
    with pytest.warns(ResourceWarning, match="never closed"):
        del fd
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(number)


def test_a_negative_number_is_no_descriptor() -> None:
    with pytest.raises(ValueError, match="-1"):
        Fd(-1)


def test_descriptors_arrive_close_on_exec_with_their_bytes(pair: tuple[socket.socket, socket.socket]) -> None:
    with memfd() as one, memfd() as two:
        send_message(pair[0], b"hello", [one, two.fileno()], timeout_s=1)
        buffer = bytearray(16)
        received = recv_message(pair[1], buffer, 4)
        assert (received.size, bytes(buffer[:5]), received.problem) == (5, b"hello", None)
        assert [os.fstat(fd.fileno()).st_ino for fd in received.fds] == [
            os.fstat(fd.fileno()).st_ino for fd in (one, two)
        ]
        assert not any(os.get_inheritable(fd.fileno()) for fd in received.fds)
        close_all(received.fds)


@pytest.mark.parametrize("allowed", [0, 1, 2, 3])
def test_surplus_descriptors_are_reported_and_none_stays_open(
    pair: tuple[socket.socket, socket.socket], allowed: int
) -> None:
    with memfd() as fd:
        send_some(pair[0], b"x", [fd] * 5)
        before = open_descriptors()
        received = recv_message(pair[1], bytearray(8), allowed)
        assert received.size == 1
        assert received.fds == []
        assert received.problem is not None
        assert "RLIMIT_NOFILE" in str(received.problem)
        assert received.problem.errno == errno.EMFILE
        assert open_descriptors() == before


def test_descriptors_beyond_this_process_limit_are_reported_and_none_stays_open(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with memfd() as fd:
        send_some(pair[0], b"x", [fd] * 4)
        before = open_descriptors()
        lowest = os.dup(fd.fileno())
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 2, hard))
        try:
            received = recv_message(pair[1], bytearray(8), 8)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert received.problem is not None
        assert open_descriptors() == before


def test_a_long_message_is_sent_whole_and_its_descriptors_once(pair: tuple[socket.socket, socket.socket]) -> None:
    data = os.urandom(1 << 20)
    got = bytearray()
    fds: list[Fd] = []

    def reader() -> None:
        buffer = bytearray(50_000)
        while len(got) < len(data):
            try:
                received = recv_message(pair[1], buffer, 4)
            except BlockingIOError:
                continue
            got.extend(buffer[: received.size])
            fds.extend(received.fds)

    thread = threading.Thread(target=reader)
    thread.start()
    with memfd() as fd:
        send_message(pair[0], data, [fd], timeout_s=10)
    thread.join(10)
    assert not thread.is_alive()
    assert got == data
    assert len(fds) == 1
    close_all(fds)


def test_a_peer_that_does_not_read_is_given_up_on(pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(PartialSendError) as caught:
        send_message(pair[0], bytes(1 << 22), timeout_s=0.01)
    assert 0 < caught.value.sent < 1 << 22
    with pytest.raises(VfioUserTimeoutError) as again:
        send_message(pair[0], b"more", timeout_s=0.01)
    assert isinstance(again.value, PartialSendError)
    assert again.value.sent == 0


def test_a_peer_that_left_is_reported(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[1].close()
    with pytest.raises(DeviceGoneError):
        send_message(pair[0], b"x", timeout_s=1)


def test_a_packet_longer_than_the_buffer_has_the_wrong_size() -> None:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, two:
        one.send(bytes(41))
        assert recv_message(two, bytearray(40), 1).size == 41

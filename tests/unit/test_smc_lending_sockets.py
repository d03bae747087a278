# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PT012 (it is the end of a block that raises)
"""Memory lent by blocking sockets, over shared memory and over TCP."""

from __future__ import annotations

import errno
import os
import select
import socket as std
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
from socket_pairs import LIMIT_S, ChangedTcpPairs, SmcPairs, smc_pairs, time_limit

from ism.shm import HEADER_BYTES
from ism.smc import blocking
from ism.smc.channel import Channel


class Boom(Exception):
    """Raised by a block."""


@pytest.fixture(scope="module")
def smc_maker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmcPairs]:
    with smc_pairs(tmp_path_factory.mktemp("manager")) as pairs:
        yield pairs


Pair = tuple[Any, Any]


@pytest.fixture
def smc_pair(smc_maker: SmcPairs) -> Iterator[Pair]:
    yield from lend_pair(smc_maker)


@pytest.fixture(params=["SMC", "TCP"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    if request.param == "SMC":
        yield from lend_pair(request.getfixturevalue("smc_maker"))
    else:
        yield from lend_pair(ChangedTcpPairs(blocking.socket))


def lend_pair(maker: Any) -> Iterator[Pair]:
    ends = maker.make()
    try:
        with time_limit():
            yield ends
    finally:
        for end in ends:
            end.close()
        if maker.in_kernel:
            maker.close()


def receive_exactly_from(sock: Any, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        assert part
        data += part
    return data


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except Exception as exc:
            found.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def test_a_socket_lends_room_and_bytes(pair: Pair) -> None:
    client, server = pair
    with client.send_buffer(5) as room:
        assert (len(room), room.view.readonly) == (5, False)
        room.view[:] = b"hello"
    with server.recv_view() as lent:
        assert (bytes(lent.view), lent.view.readonly) == (b"hello", True)
        lent.consume(2)
    assert server.recv(10) == b"llo"
    with client.send_buffer(5) as room:
        room.view[:2] = b"ab"
        room.commit(2)
    client.shutdown(std.SHUT_WR)
    with server.recv_view(1) as lent:
        assert bytes(lent.view) == b"a"
    assert server.recv(10) == b"b"
    with server.recv_view() as lent:
        assert not lent
    with pytest.raises(BrokenPipeError), client.send_buffer(1):
        pass


def test_an_exception_in_a_sockets_block_neither_consumes_nor_sends(pair: Pair) -> None:
    client, server = pair
    with pytest.raises(Boom), client.send_buffer(3):
        raise Boom
    client.sendall(b"abc")
    with pytest.raises(Boom), server.recv_view():
        raise Boom
    assert receive_exactly_from(server, 3) == b"abc"


def test_a_socket_keeps_what_is_still_looked_at(pair: Pair) -> None:
    client, server = pair
    client.sendall(b"abcd")
    with pytest.raises(BufferError), server.recv_view(4) as lent:
        kept = numpy.frombuffer(lent.view, numpy.uint8)
        lent.consume(2)
    for call in (lambda: server.recv(1), lambda: server.recv_into(bytearray(1)), server.recv_view, lent.release):
        with pytest.raises(BufferError):
            call()
    assert bytes(kept) == b"abcd"
    del kept
    lent.release()
    lent.release()
    assert server.recv(10) == b"cd"
    with pytest.raises(BufferError), client.send_buffer(2) as room:
        kept = numpy.frombuffer(room.view, numpy.uint8)
        kept[:] = 65
    for call in (lambda: client.send(b"x"), lambda: client.sendall(b"x"), lambda: client.send_buffer(1)):
        with pytest.raises(BufferError):
            call()
    del kept
    client.sendall(b"x")
    assert receive_exactly_from(server, 3) == b"AAx"


def test_a_peek_is_refused_too_while_bytes_are_looked_at(smc_pair: Pair) -> None:
    client, server = smc_pair
    client.sendall(b"abcd")
    with pytest.raises(BufferError), server.recv_view() as lent:
        kept = lent.view[1:]
    with pytest.raises(BufferError):
        server.recv(1, std.MSG_PEEK)
    del kept
    client.sendall(b"ef")
    assert server.recv(10, std.MSG_PEEK) == b"ef"


def test_a_thread_that_has_a_loan_is_told_so_and_not_left_hanging(pair: Pair) -> None:
    client, server = pair
    client.sendall(b"abc")
    for timeout in (None, 5, 0):
        server.settimeout(timeout)
        with server.recv_view() as lent:
            for call in (lambda: server.recv(1), lambda: server.recv_into(bytearray(1)), server.recv_view):
                with pytest.raises(OSError, match="lent") as caught:
                    call()
                assert caught.value.errno == errno.EDEADLK
            lent.consume(1)
        with server.send_buffer(1) as room:
            for call in (lambda: server.send(b"x"), lambda: server.sendall(b"x"), lambda: server.send_buffer(1)):
                with pytest.raises(OSError, match="lent") as caught:
                    call()
                assert caught.value.errno == errno.EDEADLK
            room.commit(0)


def test_another_thread_waits_for_its_turn(pair: Pair) -> None:
    client, server = pair
    client.sendall(b"abc")
    with server.recv_view() as lent, server.send_buffer(1) as room:
        reader, got = in_thread(lambda: server.recv(10))
        writer, sent = in_thread(lambda: server.sendall(b"second"))
        room.view[:] = b"1"
        impatient, late = in_thread(lambda: with_timeout(server, 0.01, lambda: server.recv(1)))
        impatient.join(LIMIT_S)
        assert isinstance(late[0], TimeoutError)
        assert reader.is_alive()
        assert writer.is_alive()
        lent.consume(1)
    reader.join(LIMIT_S)
    writer.join(LIMIT_S)
    assert got == [b"bc"]
    assert sent == [None]
    assert receive_exactly_from(client, 7) == b"1second"


def with_timeout(sock: Any, timeout_s: float, call: Callable[[], Any]) -> Any:
    sock.settimeout(timeout_s)
    try:
        return call()
    finally:
        sock.settimeout(None)


def test_a_thread_waiting_for_its_turn_finds_what_is_still_looked_at(pair: Pair) -> None:
    client, server = pair
    client.sendall(b"abc")
    with pytest.raises(BufferError), server.recv_view() as lent:
        kept = lent.view[1:]
        reader, got = in_thread(lambda: server.recv(10))
    reader.join(LIMIT_S)
    assert isinstance(got[0], BufferError)
    del kept
    lent.release()
    client.sendall(b"d")
    assert server.recv(1) == b"d"


def test_loans_time_out_and_do_not_block_as_receives_and_sends_do(pair: Pair) -> None:
    client, server = pair
    server.settimeout(0.01)
    with pytest.raises(TimeoutError):
        server.recv_view()
    server.settimeout(0)
    with pytest.raises(BlockingIOError):
        server.recv_view()
    client.settimeout(0)
    sent = 0
    with pytest.raises(BlockingIOError):
        while True:
            with client.send_buffer(1 << 20) as room:
                sent += len(room)
    assert sent
    server.settimeout(None)
    client.shutdown(std.SHUT_WR)
    got = 0
    while True:
        with server.recv_view() as lent:
            if not lent:
                break
            got += len(lent)
    assert got == sent


def test_sending_with_a_timeout_gives_up_when_there_is_no_room(smc_pair: Pair) -> None:
    client, _ = smc_pair
    client.settimeout(0.01)
    with pytest.raises(TimeoutError):
        while True:
            with client.send_buffer(1 << 20):
                pass


def test_a_socket_closed_in_the_middle_leaves_the_memory_and_takes_nothing(pair: Pair) -> None:
    client, server = pair
    client.sendall(bytes(100))
    with pytest.raises(OSError, match="Bad file descriptor"), client.send_buffer(10) as room:
        closer, _ = in_thread(client.close)
        closer.join(LIMIT_S)
        room.view[:] = bytes(10)
        with pytest.raises(OSError, match="Bad file descriptor"):
            room.commit(1)
    with server.recv_view() as lent:
        server.close()
        assert len(bytes(lent.view)) == len(lent)
        with pytest.raises(OSError, match="Bad file descriptor"):
            lent.consume(1)
    for call in (server.recv_view, lambda: client.send_buffer(1)):
        with pytest.raises(OSError, match="Bad file descriptor"):
            call()


def test_a_polled_descriptor_shows_what_a_block_leaves(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    client, server = pair
    monkeypatch.setattr(Channel, "_on_doorbell", lambda channel: None)  # in this process the sender sees to it itself
    poll = select.poll()
    poll.register(server.fileno(), select.POLLIN)
    with client.send_buffer(2) as room:
        room.view[:] = b"ab"
    assert poll.poll(0 if server.smc_info().mode == "SMC" else LIMIT_S * 1000)
    with server.recv_view() as lent:
        lent.consume(1)
    assert poll.poll(LIMIT_S * 1000)
    with server.recv_view() as lent:
        assert bytes(lent.view) == b"b"
    assert not poll.poll(0)


def test_a_forked_child_that_leaves_the_block_takes_and_sends_nothing(smc_pair: Pair) -> None:
    client, server = smc_pair
    client.sendall(b"abc")
    with server.recv_view() as lent, server.send_buffer(3) as room:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                lent.release()
                with pytest.raises(OSError, match="Bad file descriptor"):
                    room.release()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        ring_bytes = server._channel.connection.rx.length - HEADER_BYTES
        assert client._channel.connection.endpoint.writable_bytes() == ring_bytes - 3
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(3)
        lent.consume(1)
        room.view[:] = b"def"
    assert server.recv(3) == b"bc"
    assert client.recv(3) == b"def"


def test_a_reset_is_told_to_who_sends_and_not_to_a_block_that_was_given_up(smc_pair: Pair) -> None:
    client, server = smc_pair
    with pytest.raises(Boom), client.send_buffer(1):
        server.setsockopt(std.SOL_SOCKET, std.SO_LINGER, struct.pack("ii", 1, 0))
        server.close()
        raise Boom
    with pytest.raises(ConnectionResetError):
        client.send(b"x")


def test_a_descriptor_cannot_be_given_away_while_memory_is_lent(smc_pair: Pair) -> None:
    client, server = smc_pair
    client.sendall(b"abc")
    with server.recv_view() as lent:
        with pytest.raises(OSError, match="lent") as caught:
            server.dup()
        assert caught.value.errno == errno.EBUSY
        lent.consume(1)
    with server.dup() as other:
        assert other.recv(10) == b"bc"


@pytest.mark.parametrize("how", ["send", "sendall"])
def test_a_socket_makes_no_other_copy_of_an_array(smc_pair: Pair, how: str) -> None:
    client, server = smc_pair
    size = 8 << 20
    source = numpy.arange(size, dtype=numpy.uint8)
    target = numpy.zeros(size, numpy.uint8)

    def receive() -> None:
        view = memoryview(target)
        while view:
            view = view[server.recv_into(view) :]

    tracemalloc.start()
    try:
        thread, failed = in_thread(receive)
        getattr(client, how)(source)
        thread.join(LIMIT_S)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert failed == [None]
    assert numpy.array_equal(source, target)
    assert peak < size // 8

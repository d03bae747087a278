# SPDX-License-Identifier: Apache-2.0
"""Blocking sockets against a byte string: lent and copied calls of both ends, one after the other, in any order.

Nothing waits: sockets are non-blocking, and in shared memory what a call has to give is known from the model; TCP may
have it on its way. Blocks take parts, end in exceptions, and leave slices behind that pin what was lent.
"""

from __future__ import annotations

import contextlib
import random
import socket as std
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from socket_pairs import ChangedTcpPairs, smc_pairs, time_limit

from ism.smc import blocking

_BYTES = random.Random(3).randbytes(1 << 18)

sizes = st.one_of(st.integers(1, 64), st.integers(1, 150_000), st.sampled_from([61440, 65536]))
operations = st.lists(
    st.tuples(
        st.sampled_from(["send", "send_buffer", "recv", "recv_into", "peek", "recv_view"]),
        st.sampled_from([0, 1]),
        sizes,
        st.integers(0, 255),
        st.sampled_from(["all", "part", "raise", "pin"]),
    ),
    max_size=40,
)


class Boom(Exception):
    """Raised by a block."""


@pytest.fixture(scope="module", params=["SMC", "TCP"])
def maker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if request.param == "TCP":
        pairs = ChangedTcpPairs(blocking.socket)
        yield pairs
        pairs.close()
    else:
        with smc_pairs(tmp_path_factory.mktemp("manager")) as made:
            yield made


class Model:
    """A pair of sockets, and the bytes that are on their way from each end."""

    def __init__(self, ends: tuple[Any, Any], *, at_once: bool) -> None:
        self.ends, self.at_once = ends, at_once
        self.unread = [bytearray(), bytearray()]
        self.sent = 0

    def fresh(self, count: int) -> bytes:
        self.sent += 1
        at = (self.sent * 7919) % (len(_BYTES) - count)
        return _BYTES[at : at + count]

    def send(self, end: int, size: int, *_: Any) -> None:
        data = self.fresh(size)
        with contextlib.suppress(BlockingIOError):
            self.unread[end] += data[: self.ends[end].send(data)]

    def send_buffer(self, end: int, size: int, share: int, how: str) -> None:
        kept = None
        count = 0
        try:
            with self.ends[end].send_buffer(size) as room:
                assert 1 <= len(room) <= size
                count = len(room) * share // 255 if how == "part" else len(room)
                room.view[:count] = self.fresh(count)
                data = bytes(room.view[:count])
                room.commit(count)
                if how == "raise":
                    raise Boom
                if how == "pin":
                    kept = room.view[:]
        except (BlockingIOError, Boom):
            return
        except BufferError:
            assert kept is not None
            with pytest.raises(BufferError):
                self.ends[end].send(b"refused")
            kept.release()
            room.release()
        assert (kept is None) == (how != "pin")
        self.unread[end] += data

    def receive(self, end: int, data: bytes) -> None:
        """Check bytes that this end has received, and forget them."""
        expected = self.unread[1 - end]
        assert data == expected[: len(data)]
        assert data or not expected or not self.at_once
        del expected[: len(data)]

    def recv(self, end: int, size: int, *_: Any) -> None:
        self.receive(end, self.whatever(lambda: self.ends[end].recv(size)))

    def recv_into(self, end: int, size: int, *_: Any) -> None:
        buffer = bytearray(size)
        self.receive(end, self.whatever(lambda: bytes(buffer[: self.ends[end].recv_into(buffer)])))

    def peek(self, end: int, size: int, *_: Any) -> None:
        data = self.whatever(lambda: self.ends[end].recv(size, std.MSG_PEEK))
        assert data == self.unread[1 - end][: len(data)]

    def recv_view(self, end: int, size: int, share: int, how: str) -> None:
        kept = None
        data = b""
        try:
            with self.ends[end].recv_view(size) as lent:
                assert 1 <= len(lent) <= size
                count = len(lent) * share // 255 if how == "part" else len(lent)
                data = bytes(lent.view)
                assert data == self.unread[1 - end][: len(data)]
                data = data[:count]
                lent.consume(count)
                if how == "raise":
                    raise Boom
                if how == "pin":
                    kept = lent.view[:]
        except BlockingIOError:
            assert not self.unread[1 - end] or not self.at_once
            return
        except Boom:
            return
        except BufferError:
            assert kept is not None
            with pytest.raises(BufferError):
                self.ends[end].recv(1)
            assert bytes(kept) == data
            kept.release()
        assert (kept is None) == (how != "pin")
        if data:
            self.receive(end, data)

    @staticmethod
    def whatever(call: Any) -> bytes:
        """What a call gives; b"" when it would wait."""
        try:
            found: bytes = call()
        except BlockingIOError:
            return b""
        return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(program=operations)
def test_what_sockets_lend_and_copy_is_one_stream(maker: Any, program: list[tuple[str, int, int, int, str]]) -> None:
    ends = maker.make()
    try:
        with time_limit():
            for end in ends:
                end.setblocking(False)
            model = Model(ends, at_once=not maker.in_kernel)
            for operation, end, size, share, how in program:
                getattr(model, operation)(end, size, share, how)
            for end in (0, 1):
                ends[end].setblocking(True)
                while model.unread[1 - end]:
                    model.recv(end, 1 << 20)
    finally:
        for end in ends:
            end.close()

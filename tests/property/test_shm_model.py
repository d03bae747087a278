# SPDX-License-Identifier: Apache-2.0
"""Two endpoints against a bytearray model: any ring sizes, every operation interleaved, doorbells counted.

Each region is one memory file mapped twice: writable for its sender, read-only for its owner, so that a receiver
that wrote its own region would fault.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ism.errors import LocalProtocolError
from ism.memory import PAGE_SIZE, Mapping, create_memfd
from ism.shm import HEADER_BYTES, Endpoint, Flags, RxState
from ism.shm.ring import LONG_BYTES, PIECE_BYTES


class Part:
    """The first `length` bytes of a mapping."""

    def __init__(self, mapping: Mapping, length: int) -> None:
        self.mapping, self.address, self.length = mapping, mapping.address, length


class Direction:
    """One region, the unread bytes of the model, and who sleeps unrung."""

    def __init__(self, ring_bytes: int) -> None:
        self.ring_bytes = ring_bytes
        length = HEADER_BYTES + ring_bytes
        whole = -(-length // PAGE_SIZE) * PAGE_SIZE
        fd = create_memfd("ring", whole)
        try:
            writable, readonly = Mapping(whole), Mapping(whole)
            writable.place(0, whole, fd, 0)
            readonly.place(0, whole, fd, 0, write=False)
        finally:
            os.close(fd)
        self.canary = bytes(0xA5 ^ (i & 0xFF) for i in range(whole - length))
        writable.view[length:] = self.canary
        self.for_sender, self.for_owner = Part(writable, length), Part(readonly, length)
        self.unread = bytearray()
        self.flags = Flags(0)
        self.reader_unrung = self.writer_unrung = False

    @property
    def free(self) -> int:
        return self.ring_bytes - len(self.unread)

    def tail(self) -> bytes:
        return bytes(self.for_sender.mapping.view[self.for_sender.length :])


ENDS = st.sampled_from([0, 1])
SIZES = st.one_of(st.integers(1, 40), st.sampled_from([4095, 4096, 5000, 65537, 200_000]))


class TwoEndpoints(RuleBasedStateMachine):
    """End e sends on direction e and receives on direction 1 - e."""

    @initialize(sizes=st.tuples(SIZES, SIZES))
    def connect(self, sizes: tuple[int, int]) -> None:
        self.directions = [Direction(sizes[0]), Direction(sizes[1])]
        self.bells = [0, 0]
        self.ends = [
            Endpoint(
                self.directions[1 - e].for_owner,
                self.directions[e].for_sender,
                doorbell=lambda peer=1 - e: self.ring(peer),
                max_spin_ns=0,
            )
            for e in (0, 1)
        ]
        self.lent: list[int] = [0, 0]
        self.next_byte = 0

    def ring(self, end: int) -> None:
        self.bells[end] += 1

    def fresh(self, count: int) -> bytes:
        data = bytes((self.next_byte + i) % 251 for i in range(count))
        self.next_byte += count
        return data

    @contextlib.contextmanager
    def wakes(self, end: int, expected: bool) -> Iterator[None]:
        """The body rings the doorbell of `end` once if `expected`, else not at all, and nobody else's."""
        before = list(self.bells)
        yield
        before[end] += expected
        assert self.bells == before

    def published(self, end: int, data: bytes) -> None:
        direction = self.directions[end]
        direction.unread += data
        if data:
            direction.reader_unrung = False

    def must_wake_writer(self, direction: Direction, count: int) -> bool:
        """Whether taking `count` bytes makes room worth a doorbell; marks the sleep as rung."""
        left = len(direction.unread) - count
        window = max(1, min(direction.ring_bytes // 4, 65536))
        wakes = count > 0 and direction.writer_unrung and (left == 0 or direction.ring_bytes - left >= window)
        if wakes:
            direction.writer_unrung = False
        return wakes

    @rule(end=ENDS, count=st.integers(0, 250_000), kind=st.sampled_from([bytes, bytearray, memoryview]))
    def send(self, end: int, count: int, kind: type) -> None:
        direction = self.directions[end]
        count = count % (direction.ring_bytes + 3)
        data = self.fresh(count)
        fits = min(count, direction.free)
        if fits >= LONG_BYTES and direction.reader_unrung:
            fits = min(fits, PIECE_BYTES)  # the doorbell is rung before the rest is copied
        with self.wakes(1 - end, fits > 0 and direction.reader_unrung):
            assert self.ends[end].send(kind(data)) == fits
        self.published(end, data[:fits])
        self.lent[end] = 0

    @rule(end=ENDS, count=st.integers(0, 250_000))
    def recv(self, end: int, count: int) -> None:
        direction = self.directions[1 - end]
        count = count % (direction.ring_bytes + 3)
        expected = bytes(direction.unread[:count])
        # the accepted producer cursor may be older than the true one, which may ring early: refresh it first
        assert self.ends[end].readable_bytes() == len(direction.unread)
        with self.wakes(1 - end, self.must_wake_writer(direction, len(expected))):
            assert self.ends[end].recv(count) == (expected or None)
        del direction.unread[:count]

    @rule(end=ENDS, count=st.integers(0, 250_000))
    def recv_into(self, end: int, count: int) -> None:
        direction = self.directions[1 - end]
        count = count % (direction.ring_bytes + 3)
        expected = bytes(direction.unread[:count])
        assert self.ends[end].readable_bytes() == len(direction.unread)
        buffer = bytearray(b"\xee" * (count + 2))
        with memoryview(buffer) as view, self.wakes(1 - end, self.must_wake_writer(direction, len(expected))):
            assert self.ends[end].recv_into(view[1 : count + 1]) == len(expected)
        assert bytes(buffer) == b"\xee" + expected + b"\xee" * (count + 1 - len(expected))
        del direction.unread[:count]

    @rule(end=ENDS, wanted=st.integers(0, 1000))
    def reserve(self, end: int, wanted: int) -> None:
        view = self.ends[end].reserve(wanted)
        assert len(view) <= min(wanted, self.directions[end].free)
        assert bool(view) == bool(min(wanted, self.directions[end].free))
        self.lent[end] = len(view)
        self.reserved = (end, view)

    @precondition(lambda self: hasattr(self, "reserved"))
    @rule(share=st.floats(0, 1), excess=st.booleans())
    def commit(self, share: float, excess: bool) -> None:
        end, view = self.reserved
        direction = self.directions[end]
        if excess or not self.lent[end]:
            with pytest.raises(LocalProtocolError):
                self.ends[end].commit(self.lent[end] + 1)
            return
        data = self.fresh(int(len(view) * share))
        view[: len(data)] = data
        with self.wakes(1 - end, bool(data) and direction.reader_unrung):
            self.ends[end].commit(len(data))
        self.published(end, data)
        self.lent[end] = 0

    @rule(end=ENDS, share=st.floats(0, 1))
    def peek_and_consume(self, end: int, share: float) -> None:
        direction = self.directions[1 - end]
        views = self.ends[end].peek()
        assert b"".join(views) == direction.unread
        assert all(view.readonly and len(view) for view in views)
        count = int(len(direction.unread) * share)
        with self.wakes(1 - end, self.must_wake_writer(direction, count)):
            self.ends[end].consume(count)
        del direction.unread[:count]
        with pytest.raises(LocalProtocolError):
            self.ends[end].consume(len(direction.unread) + 1)

    @rule(end=ENDS, flag=st.sampled_from(list(Flags)))
    def set_flags(self, end: int, flag: Flags) -> None:
        mine, reverse = self.directions[end], self.directions[1 - end]
        with self.wakes(1 - end, mine.reader_unrung or reverse.writer_unrung):
            self.ends[end].set_flags(flag)
        mine.reader_unrung = reverse.writer_unrung = False
        mine.flags |= flag

    @rule(end=ENDS, beyond=st.integers(0, 50))
    def park_reader(self, end: int, beyond: int) -> None:
        direction = self.directions[1 - end]
        beyond %= direction.ring_bytes
        sleeps = len(direction.unread) <= beyond and not direction.flags
        with self.wakes(1 - end, sleeps and direction.writer_unrung):
            assert self.ends[end].park_reader(beyond) == sleeps
        direction.reader_unrung = sleeps
        if sleeps:
            direction.writer_unrung = False

    @rule(end=ENDS, beyond=st.integers(0, 50))
    def park_writer(self, end: int, beyond: int) -> None:
        direction = self.directions[end]
        beyond %= direction.ring_bytes
        peer = self.directions[1 - end].flags
        sleeps = direction.free <= beyond and not peer & (Flags.CLOSED | Flags.ABNORMAL_CLOSE)
        with self.wakes(1 - end, False):
            assert self.ends[end].park_writer(beyond) == sleeps
        direction.writer_unrung = sleeps

    @rule(end=ENDS)
    def unpark(self, end: int) -> None:
        self.ends[end].unpark_reader()
        self.ends[end].unpark_writer()
        self.directions[1 - end].reader_unrung = self.directions[end].writer_unrung = False

    @invariant()
    def both_ends_see_what_the_model_sees(self) -> None:
        if not hasattr(self, "ends"):
            return
        for end in (0, 1):
            out, back = self.directions[end], self.directions[1 - end]
            assert self.ends[end].writable_bytes() == out.free
            assert self.ends[end].readable_bytes() == len(back.unread)
            assert self.ends[end].peer_flags() == back.flags
            if back.unread:
                expected = RxState.DATA
            elif back.flags & Flags.ABNORMAL_CLOSE:
                expected = RxState.ABORTED
            else:
                expected = RxState.EOF if back.flags else RxState.EMPTY
            assert self.ends[end].rx_state() is expected
            assert out.tail() == out.canary


TwoEndpoints.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTwoEndpointsBehaveLikeBytearrays = TwoEndpoints.TestCase

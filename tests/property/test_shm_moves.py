# SPDX-License-Identifier: Apache-2.0
"""Rings that grow and shrink under a stream: whatever the timing, the bytes come out as they went in.

Every region that neither end uses any more is overwritten at once, so one that is let go too early shows.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ism.errors import RemoteProtocolError
from ism.memory import PAGE_SIZE, Mapping
from ism.shm import HEADER_BYTES, Endpoint, Flags, RxState
from ism.shm.header import Header


class Part:
    """The first `length` bytes of a mapping."""

    def __init__(self, length: int) -> None:
        self.mapping = Mapping(-(-length // PAGE_SIZE) * PAGE_SIZE)
        self.address, self.length = self.mapping.address, length


class Ring(Part):
    """A region that is all ring, seen from both ends at one address."""

    def __init__(self, length: int, token: int) -> None:
        super().__init__(length)
        self.token, self.holders = token, 2

    def let_go(self) -> None:
        self.holders -= 1
        if self.holders == 0:
            self.mapping.view[: self.length] = b"\xee" * self.length


ENDS = st.sampled_from([0, 1])
COUNTS = st.one_of(st.integers(1, 50), st.integers(1, 150_000))
LENGTHS = st.sampled_from([1, 7, 64, 4096, 4097, 65_536, 200_000])


class MovingStreams(RuleBasedStateMachine):
    """End e sends to end 1 - e, on rings that end 1 - e offers."""

    @initialize(sizes=st.tuples(LENGTHS, LENGTHS))
    def connect(self, sizes: tuple[int, int]) -> None:
        homes = [Part(HEADER_BYTES + size) for size in sizes]
        self.ends = [
            Endpoint(homes[1 - e], homes[e], doorbell=lambda: None, max_spin_ns=0, kernel=1 + e) for e in (0, 1)
        ]
        self.unread = [bytearray(), bytearray()]
        self.offered: list[list[Ring]] = [[], []]  # by receiving end: all it has made and not let go
        self.attached: list[list[Ring]] = [[], []]  # by sending end
        self.by_token: dict[int, Ring] = {}
        self.sent = 0

    def fresh(self, count: int) -> bytes:
        self.sent += 1
        return bytes((self.sent * 31 + i) % 251 for i in range(count))

    @rule(end=ENDS, count=COUNTS)
    def send(self, end: int, count: int) -> None:
        data = self.fresh(count)
        taken = self.ends[end].send(data, False)
        self.unread[end] += data[:taken]

    @rule(end=ENDS, count=COUNTS)
    def send_in_place(self, end: int, count: int) -> None:
        view = self.ends[end].reserve(count)
        data = self.fresh(len(view))
        view[:] = data
        self.ends[end].go_home()  # must not be done to what is reserved
        self.ends[end].commit(len(view))
        self.unread[end] += data

    @rule(end=ENDS, count=COUNTS)
    def receive(self, end: int, count: int) -> None:
        data = self.ends[end].recv(count, False)
        self.check(end, data or b"")

    @rule(end=ENDS, count=COUNTS)
    def receive_into(self, end: int, count: int) -> None:
        buffer = bytearray(count)
        got = self.ends[end].recv_into(buffer, False)
        self.check(end, buffer[:got])

    @rule(end=ENDS, most=COUNTS)
    def receive_in_place(self, end: int, most: int) -> None:
        views = self.ends[end].peek()
        data = b"".join(views)[:most]
        self.ends[end].consume(len(data))
        self.check(end, data)

    @rule(end=ENDS, most=COUNTS)
    def look(self, end: int, most: int) -> None:
        assert self.ends[end].peek_copy(most) == self.unread[1 - end][:most]

    def check(self, end: int, data: bytes | bytearray) -> None:
        model = self.unread[1 - end]
        assert bytes(data) == bytes(model[: len(data)])
        assert data or not model
        del model[: len(data)]

    @rule(end=ENDS, length=LENGTHS)
    def offer(self, end: int, length: int) -> None:
        if self.ends[end].offer_pending:
            return
        ring = Ring(length, 2**64 - 1 - len(self.by_token))
        self.by_token[ring.token] = ring
        self.offered[end].append(ring)
        self.ends[end].offer_ring(ring, ring.token)

    @rule(end=ENDS)
    def attach(self, end: int) -> None:
        found = self.ends[end].read_offer()
        if found is not None:
            number, token, length = found
            ring = self.by_token[token]
            assert ring.length == length
            self.attached[end].append(ring)
            self.ends[end].use_ring(ring, number)
        assert self.ends[end].read_offer() is None

    @rule(end=ENDS)
    def go_home(self, end: int) -> None:
        if self.ends[end].go_home():
            assert not self.unread[end]

    @rule(end=ENDS)
    def follow(self, end: int) -> None:
        self.ends[end].follow()

    @invariant()
    def what_is_not_used_is_let_go(self) -> None:
        for end in (0, 1):
            for held in (self.offered[end], self.attached[end]):
                for ring in list(held):
                    if self.ends[end].uses(ring) is False:
                        held.remove(ring)
                        ring.let_go()

    @invariant()
    def emptiness_is_known(self) -> None:
        for end in (0, 1):
            assert (self.ends[end].readable_bytes() > 0) == bool(self.unread[1 - end])
            assert (self.ends[end].rx_state() is RxState.DATA) == bool(self.unread[1 - end])

    @precondition(lambda self: self.sent > 20)
    @rule(end=ENDS)
    def drain_and_shrink(self, end: int) -> None:
        """Everything is read, the sender goes home, the receiver follows: nothing but the home ring is in use."""
        while (data := self.ends[1 - end].recv(1 << 20, False)) is not None:
            self.check(1 - end, data)
        self.attach(end)
        for _ in range(3):  # home first, then where it may have been offered to go, then home
            self.send(end, 1)
            while (data := self.ends[1 - end].recv(1 << 20, False)) is not None:
                self.check(1 - end, data)
            self.ends[end].go_home()
        self.ends[1 - end].follow()
        self.what_is_not_used_is_let_go()
        assert not self.attached[end]
        assert not self.offered[1 - end]


TestMovingStreams = MovingStreams.TestCase
TestMovingStreams.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)


def pair(ring: int = 4096) -> tuple[Endpoint, Endpoint, memoryview]:
    """Sender, receiver, and the memory that the sender writes."""
    to_a, to_b = Part(HEADER_BYTES + ring), Part(HEADER_BYTES + ring)
    a = Endpoint(to_a, to_b, doorbell=lambda: None, max_spin_ns=0, kernel=1)
    return a, Endpoint(to_b, to_a, doorbell=lambda: None, max_spin_ns=0, kernel=2), to_b.mapping.view


def test_a_full_ring_asks_for_a_larger_one_once_and_a_quiet_one_does_not() -> None:
    sender, receiver, _ = pair()
    asked: list[int] = []
    receiver.attend = lambda: asked.append(1)
    receiver.may_grow = True
    for _ in range(200):
        sender.send(b"q" * 100)
        receiver.recv(4096, False)
    assert not asked
    for _ in range(50):
        sender.send(b"b" * 4096)
        receiver.recv(4096, False)
    assert asked == [1]
    assert not receiver.may_grow


def test_a_large_ring_grows_only_if_it_is_empty_as_often_as_full() -> None:
    sender, receiver, _ = pair(1 << 22)
    asked: list[int] = []
    receiver.attend, receiver.may_grow = lambda: asked.append(1), True
    block = b"b" * (1 << 22)
    for _ in range(20):
        while sender.send(block, False):
            pass
        for _ in range(48):  # a slow reader: it never comes to the end
            receiver.recv(1 << 16, False)
    assert not asked
    for _ in range(20):
        while sender.send(block, False):
            pass
        while receiver.recv(1 << 16, False):
            pass
    assert asked == [1]


def test_an_offer_is_noticed_by_a_sender_that_lacks_room() -> None:
    sender, receiver, _ = pair()
    asked: list[int] = []
    sender.attend = lambda: asked.append(1)
    ring = Ring(100_000, 5)
    receiver.offer_ring(ring, ring.token)
    sender.send(b"x" * 4000)
    assert not asked
    assert sender.send(b"x" * 4096) == 96
    assert asked
    offer = sender.read_offer()
    assert offer == (1, 5, 100_000)
    sender.use_ring(ring, offer[0])
    assert sender.send(b"y" * 100_001) == 100_000
    assert sender.tx_ring_bytes == 100_000
    assert sender.send(b"y") == 0
    got = b"".join(iter(lambda: receiver.recv(1 << 20, False) or b"", b""))
    assert got == b"x" * 4096 + b"y" * 100_000
    assert receiver.rx_ring_bytes == 100_000


@pytest.mark.parametrize(
    ("word", "value"),
    [("next_ring", 7), ("next_ring", 0), ("next_cursor", 5000), ("next_cursor", 2**63), ("next_moves", 5)],
)
def test_a_move_that_was_not_offered_or_is_elsewhere_is_a_lie(word: str, value: int) -> None:
    sender, receiver, region = pair()
    ring = Ring(8192, 5)
    receiver.offer_ring(ring, ring.token)
    offer = sender.read_offer()
    assert offer is not None
    sender.use_ring(ring, offer[0])
    sender.send(b"z" * 100)
    at = Header.offset_of(word)
    region[at : at + 8] = value.to_bytes(8, "little")
    with pytest.raises(RemoteProtocolError):
        receiver.recv(10, False)
    with pytest.raises(RemoteProtocolError):
        receiver.recv(10, False)


def test_a_cursor_beyond_the_new_ring_is_a_lie() -> None:
    sender, receiver, region = pair()
    ring = Ring(64, 5)
    receiver.offer_ring(ring, ring.token)
    offer = sender.read_offer()
    assert offer is not None
    sender.use_ring(ring, offer[0])
    assert sender.send(b"z" * 100) == 64
    at = Header.offset_of("producer")
    region[at : at + 8] = (65).to_bytes(8, "little")
    with pytest.raises(RemoteProtocolError, match="producer"):
        receiver.recv(10, False)


def test_the_end_of_the_stream_comes_after_what_is_in_the_new_ring() -> None:
    sender, receiver, _ = pair(16)
    ring = Ring(4096, 5)
    sender.send(b"old")
    receiver.offer_ring(ring, ring.token)
    offer = sender.read_offer()
    assert offer is not None
    sender.use_ring(ring, offer[0])
    sender.send(b"new")
    sender.set_flags(Flags.DONE_WRITING)
    assert receiver.peek_copy(100) == b"oldnew"
    assert receiver.recv(100, False) == b"old"
    assert receiver.rx_state() is RxState.DATA
    assert not receiver.park_reader()
    assert receiver.recv(100, False) == b"new"
    assert receiver.rx_state() is RxState.EOF


def test_a_second_move_waits_for_the_first_to_be_read() -> None:
    sender, receiver, _ = pair(16)
    first, second = Ring(32, 1), Ring(64, 2)
    sender.send(b"home")
    receiver.offer_ring(first, 1)
    sender.use_ring(first, (sender.read_offer() or (0,))[0])
    sender.send(b"first")
    assert receiver.offer_pending, "the receiver has not seen the move"
    assert receiver.recv(100, False) == b"home"
    assert not receiver.offer_pending
    receiver.offer_ring(second, 2)
    sender.use_ring(second, (sender.read_offer() or (0,))[0])
    assert receiver.recv(100, False) == b"first"
    sender.send(b"second")
    assert sender.tx_ring_bytes == 64
    assert not sender.uses(first)
    assert receiver.recv(100, False) == b"second"
    assert not receiver.uses(first)
    assert receiver.uses(second)


def test_a_sender_that_went_home_moves_again_only_after_the_receiver_has_followed() -> None:
    sender, receiver, _ = pair(16)
    first, second = Ring(32, 1), Ring(64, 2)
    receiver.offer_ring(first, 1)
    sender.use_ring(first, (sender.read_offer() or (0,))[0])
    sender.send(b"first")
    assert receiver.recv(100, False) == b"first"
    receiver.offer_ring(second, 2)
    assert sender.go_home()
    assert not sender.go_home()
    sender.use_ring(second, (sender.read_offer() or (0,))[0])
    sender.send(b"home")
    assert sender.tx_ring_bytes == 16
    assert receiver.recv(100, False) == b"home"
    sender.send(b"second")
    assert sender.tx_ring_bytes == 64
    assert receiver.recv(100, False) == b"second"

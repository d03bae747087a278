# SPDX-License-Identifier: Apache-2.0
"""Short calls that go past the channel, among other threads' calls: nothing owed is lost, nothing is taken or mixed.

A thread switch that is rare is forced: the other thread's call is made where it would come in between.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from smc_stream_rig import SmcRig, bounded
from socket_pairs import LIMIT_S, SmcPairs, smc_pairs

from ism.errors import LocalProtocolError, TransportError
from ism.memory import Mapping
from ism.shm import HEADER_BYTES, Endpoint
from ism.shm.state import (
    ATTENTION,
    DOORBELL,
    FAILED_LOOK,
    GATED,
    HELD,
    NOT_SENDING,
    PEER_GONE,
    RX_DRY,
    RX_SPIN,
    SHORT,
    SPIN,
    SPIN_BUDGET_NS,
)
from ism.smc import tuning
from ism.smc.states import Outcome

QUICKLY = GATED | SHORT


@pytest.fixture
def pairs(tmp_path: Path) -> Iterator[SmcPairs]:
    with smc_pairs(tmp_path) as made:
        yield made


def ends(ring: int = 4096) -> tuple[Endpoint, Endpoint, list[int]]:
    """Sender, receiver, and how often the sender was rung."""
    to_a, to_b = Mapping(HEADER_BYTES + ring), Mapping(HEADER_BYTES + ring)
    rung: list[int] = []
    a = Endpoint(to_a, to_b, doorbell=lambda: None, max_spin_ns=0, kernel=1)
    return a, Endpoint(to_b, to_a, doorbell=lambda: rung.append(1), max_spin_ns=0, kernel=2), rung


def test_a_doorbell_that_one_receive_owes_is_still_owed_after_another_s() -> None:
    sender, receiver, rung = ends()
    while sender.send(b"x" * 1000, False):
        pass
    assert sender.park_writer()
    assert receiver.quick_recv(3000, QUICKLY)
    assert receiver.owed[0] == DOORBELL
    assert receiver.quick_recv(1, QUICKLY)
    receiver.quick_recv(1, QUICKLY)
    assert receiver.owed[0] == DOORBELL
    receiver.take_owed()
    assert rung == [1]
    assert not receiver.owed[0]
    receiver.take_owed()
    assert rung == [1]


def test_two_threads_that_receive_wake_a_sleeping_sender(pairs: SmcPairs) -> None:
    client, server = pairs.make()
    with client, server:
        for end in (client, server):
            end.settimeout(LIMIT_S)
        sending = threading.Thread(target=client.sendall, args=(bytes(500_000),))
        sending.start()
        while not server._channel.connection.endpoint.readable_bytes() > 50_000:
            pass
        quick, came_between = server._quick_recv, []

        def with_another(count: int, wait: int) -> bytes | None:
            data: bytes | None = quick(count, wait)
            if data is not None and not came_between:
                other = threading.Thread(target=lambda: came_between.append(quick(1, wait)))
                other.start()
                other.join()
            return data

        server._quick_recv = with_another
        got = 0
        while got + len(came_between[0] or b"" if came_between else b"") < 500_000:
            got += len(server.recv(30_000))
        sending.join(LIMIT_S)
        assert not sending.is_alive()


def test_what_a_view_shows_is_not_received_by_a_short_call(pairs: SmcPairs) -> None:
    client, server = pairs.make()
    with client, server:
        client.sendall(b"lent to one")
        connection, taken = server._channel.connection, []
        look = connection.lend_unread

        def look_and_be_overtaken(*arguments: Any) -> Any:
            view = look(*arguments)
            taken.append(server._quick_recv(100, QUICKLY))
            return view

        connection.lend_unread = look_and_be_overtaken
        try:
            with server.recv_view(100) as lent:
                assert bytes(lent.view) == b"lent to one"
        finally:
            del connection.lend_unread
        assert taken == [None]
        client.sendall(b"next")
        assert server.recv(100) == b"next"


def test_no_short_send_comes_between_the_parts_of_a_longer_one() -> None:
    sender, receiver, _ = ends(4096)
    assert sender.send(b"long" * 2000, False) == 4096
    receiver.recv(4096)
    assert sender.quick_send(b"short", QUICKLY) == FAILED_LOOK
    sender.change_gates(tx_open=HELD)
    assert sender.quick_send(b"short", QUICKLY) == 5


def test_a_short_send_is_whole_or_not_at_all() -> None:
    sender, receiver, _ = ends(4096)
    assert sender.quick_send(b"s" * 3000, QUICKLY) == 3000
    assert sender.quick_send(b"s" * 3000, QUICKLY) == FAILED_LOOK
    assert receiver.recv(5000) == b"s" * 3000
    assert sender.quick_send(b"s" * 3000, QUICKLY) == 3000


def test_a_gate_that_is_shut_for_two_reasons_opens_with_the_last() -> None:
    sender, _, _ = ends()
    sender.change_gates(tx_shut=NOT_SENDING | PEER_GONE)
    sender.change_gates(tx_open=NOT_SENDING)
    assert sender.quick_send(b"x", GATED) == FAILED_LOOK
    sender.change_gates(tx_open=PEER_GONE)
    assert sender.quick_send(b"x", GATED) == 1
    assert ATTENTION < DOORBELL


@bounded
async def test_a_state_that_was_judged_before_the_peer_went_does_not_open_the_gate_again() -> None:
    rig = SmcRig()
    client, server = await rig.pair()
    connection = client.connection
    assert connection is not None
    connection._note_gone()
    connection._send_outcome = Outcome.GOES
    connection._set_gate()  # by a thread that had looked before
    assert connection.endpoint.quick_send(b"x", GATED) == FAILED_LOOK
    await client.aclose()
    await server.aclose()
    rig.let_go()
    rig.close()


def test_a_pinned_view_keeps_short_receives_out_whatever_was_tried_since(pairs: SmcPairs) -> None:
    client, server = pairs.make()
    with client, server:
        client.sendall(b"0123456789abcdef")
        with pytest.raises(BufferError), server.recv_view(10) as lent:
            kept = lent.view[:3]
        for _ in range(2):
            with pytest.raises(BufferError):
                server.recv_view(10)
            with pytest.raises(BufferError):
                server.recv(4)
        kept.release()
        del kept
        assert server.recv(100) == b"abcdef"


def test_what_is_peeked_at_is_not_received_meanwhile(pairs: SmcPairs) -> None:
    client, server = pairs.make()
    with client, server:
        client.sendall(b"look at me")
        endpoint, taken = server._channel.connection.endpoint, []

        def look_and_be_overtaken(count: int) -> bytes:
            taken.append(server._quick_recv(100, QUICKLY))
            return endpoint.peek_copy(count)

        server._channel.connection.peek, look = look_and_be_overtaken, server._channel.connection.peek
        try:
            assert server.recv(100, socket.MSG_PEEK) == b"look at me"
        finally:
            server._channel.connection.peek = look
        assert taken == [None]
        assert server.recv(100) == b"look at me"


def test_a_ring_that_is_not_in_use_yet_is_not_exchanged_for_another() -> None:
    sender, _, _ = ends()
    sender.use_ring(Mapping(1 << 20), 1)
    assert sender.ring_pending
    with pytest.raises(AssertionError):
        sender.use_ring(Mapping(4096), 2)
    sender.send(b"x")
    assert not sender.ring_pending
    assert sender.tx_ring_bytes == 1 << 20
    made, endpoint, device = tuner()
    endpoint.may_grow, endpoint.ring_pending, endpoint.offer = True, True, (2, 5, 1 << 20)
    made.look()
    assert not device.asked
    endpoint.ring_pending = False
    made.tick()
    assert device.asked == 1
    made.close()


class FakeEndpoint:
    """What a tuner sees of an endpoint."""

    def __init__(self) -> None:
        self.attend: Any = None
        self.may_grow = self.offer_pending = False
        self.rx_ring_bytes, self.sent_bytes = 61440, 0
        self.offer: tuple[int, int, int] | None = None
        self.busy = self.ring_pending = False
        self.offered: list[Any] = []
        self.used: list[tuple[Any, int]] = []

    def read_offer(self) -> Any:
        if self.busy:
            raise LocalProtocolError("busy", state="busy")
        offer, self.offer = self.offer, None
        return offer

    def offer_ring(self, region: Any, token: int) -> None:
        self.offered.append(region)
        self.offer_pending = True

    def use_ring(self, region: Any, number: int) -> None:
        self.used.append((region, number))

    def uses(self, region: Any) -> bool:
        return True

    def go_home(self) -> bool:
        return False

    def follow(self) -> None:
        pass


class FakeDevice:
    """Gives regions, or refuses. Attributes: `asked` (attaches and allocations)."""

    devid, free_window = 7, 1 << 30

    def __init__(self) -> None:
        self.refuse: Exception | None = None
        self.asked = 0

    def _region(self, length: int) -> Any:
        self.asked += 1
        if self.refuse is not None:
            raise self.refuse
        return type("Region", (), {"length": length, "owned": False, "token": 5, "close": lambda self: None})()

    def alloc(self, size: int, **_: Any) -> Any:
        return self._region(size)

    def attach(self, token: int, rights: Any, **_: Any) -> Any:
        return self._region(1 << 20)


def tuner() -> tuple[tuning.Tuner, Any, Any]:
    endpoint, device = FakeEndpoint(), FakeDevice()
    made = tuning.Tuner(endpoint, device, 9, 1 << 24)  # type: ignore[arg-type]
    endpoint.may_grow = False  # as when a larger ring was asked for
    return made, endpoint, device


def test_a_wish_to_grow_survives_a_thread_that_is_sending() -> None:
    made, endpoint, _ = tuner()
    endpoint.busy = True
    made.look()
    assert len(endpoint.offered) == 1
    assert made.needs_ticks
    made.close()


def test_an_offer_that_cannot_be_attached_now_is_attached_at_a_later_tick() -> None:
    made, endpoint, device = tuner()
    endpoint.may_grow = True
    endpoint.offer = (1, 5, 1 << 20)
    device.refuse = TransportError("no descriptors", 24)
    made.look()
    assert not endpoint.used
    assert made.needs_ticks
    device.refuse = None
    made.tick()
    assert [number for _, number in endpoint.used] == [1]
    made.close()


def test_rings_that_are_offered_without_end_cost_a_bounded_number_of_regions() -> None:
    made, endpoint, device = tuner()
    endpoint.may_grow = True
    for number in range(1, 100):
        endpoint.offer = (number, 5, 1 << 20)
        made.look()
    assert device.asked == tuning.TURNS
    made.tick()
    assert device.asked == tuning.TURNS + 1
    made.close()


def test_an_offer_without_a_number_or_too_large_is_dropped() -> None:
    for offer in ((0, 5, 1 << 20), (1, 5, 0), (1, 5, tuning.LARGEST_OFFER + 1)):
        made, endpoint, device = tuner()
        endpoint.may_grow, endpoint.offer = True, offer
        made.look()
        made.tick()
        assert not device.asked
        made.close()


def test_a_brief_spin_in_vain_costs_nothing_of_what_may_be_spun_and_gives_the_turn_back() -> None:
    _, receiver, _ = ends()
    receiver.max_spin_ns = 50_000
    before = receiver._words[RX_SPIN + SPIN_BUDGET_NS]
    assert before > 0
    for _ in range(20):
        assert receiver.quick_recv(10, SPIN | SHORT) is None
    assert receiver._words[RX_SPIN + SPIN_BUDGET_NS] == before
    assert not receiver._words[RX_DRY], "the receive that follows counts it"

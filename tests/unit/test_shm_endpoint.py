# SPDX-License-Identifier: Apache-2.0
"""One endpoint against another in the same thread: wake-ups, windows, ends of streams, errors, lifetimes."""

from __future__ import annotations

import array
import gc
import threading
import weakref
from collections.abc import Callable

import numpy as np
import pytest

from ism.errors import LocalProtocolError
from ism.memory import Mapping
from ism.shm import HEADER_BYTES, MAX_SPIN_NS, Endpoint, Flags, Header, RxState, kernel_id
from ism.shm import state as words
from ism.shm.park import FAR_SPIN_FACTOR

RING = 64 * 1024


class Pair:
    """Two endpoints, `a` and `b`, and how often each one's doorbell was rung."""

    def __init__(self, ring_bytes: int = RING, *, max_spin_ns: int = 0, kernels: tuple[int, int] = (1, 2)) -> None:
        self.to_a, self.to_b = Mapping(HEADER_BYTES + ring_bytes), Mapping(HEADER_BYTES + ring_bytes)
        self.rung_a = self.rung_b = 0
        self.a = Endpoint(self.to_a, self.to_b, doorbell=self.ring_b, max_spin_ns=max_spin_ns, kernel=kernels[0])
        self.b = Endpoint(self.to_b, self.to_a, doorbell=self.ring_a, max_spin_ns=max_spin_ns, kernel=kernels[1])

    def ring_a(self) -> None:
        self.rung_a += 1

    def ring_b(self) -> None:
        self.rung_b += 1


def fill(end: Endpoint) -> None:
    while end.send(b"f" * 10_000):
        pass


@pytest.mark.parametrize(
    "data",
    [
        b"abcdefgh",
        bytearray(b"abcdefgh"),
        memoryview(b"..abcdefgh")[2:],
        array.array("B", b"abcdefgh"),
        np.frombuffer(b"abcdefgh", np.uint8),
        np.frombuffer(b"abcdefgh", np.float64),
    ],
)
def test_any_contiguous_buffer_can_be_sent(data: object) -> None:
    pair = Pair()
    assert pair.a.send(data) == 8
    assert pair.b.recv(100) == b"abcdefgh"


def test_what_is_no_contiguous_buffer_is_refused_and_nothing_is_sent() -> None:
    pair = Pair()
    with pytest.raises(TypeError):
        pair.a.send("text")
    with pytest.raises((BufferError, ValueError)):
        pair.a.send(np.zeros(10, np.uint8)[::2])
    with pytest.raises((BufferError, ValueError)):
        pair.a.send(memoryview(bytes(10))[::2])
    pair.a.send(b"x")
    with pytest.raises((BufferError, TypeError)):
        pair.b.recv_into(b"read-only")
    with pytest.raises(ValueError, match="negative"):
        pair.b.recv(-1)
    assert pair.b.recv(10) == b"x"


def test_a_received_buffer_is_not_kept_exported() -> None:
    pair = Pair()
    pair.a.send(b"x")
    buffer = bytearray(4)
    assert pair.b.recv_into(buffer) == 1
    pair.b.send(buffer)
    buffer.append(0)  # fails with BufferError while anything still exports it


def test_a_megabyte_passes_in_pieces_through_a_small_ring() -> None:
    pair = Pair()
    data = np.random.default_rng(1).bytes(1 << 20)
    received = bytearray()
    sent = 0
    while len(received) < len(data):
        sent += pair.a.send(memoryview(data)[sent:])
        received += pair.b.recv(1 << 20) or b""
    assert received == data


def test_an_awake_peer_is_never_rung() -> None:
    pair = Pair()
    for _ in range(10):
        pair.a.send(b"x" * 1000)
        pair.b.recv(1000)
    fill(pair.a)
    pair.b.recv(RING)
    pair.a.set_flags(Flags.DONE_WRITING)
    assert (pair.rung_a, pair.rung_b) == (0, 0)


def test_a_sleeping_reader_is_rung_once_however_much_is_sent() -> None:
    pair = Pair()
    assert pair.b.park_reader()
    for _ in range(5):
        pair.a.send(b"x")
    pair.a.set_flags(Flags.DONE_WRITING)
    assert not pair.a.ring_doorbell_if_parked()
    assert pair.rung_b == 1
    pair.b.unpark_reader()
    assert pair.b.recv(10) == b"xxxxx"


def test_a_sleeping_reader_is_rung_before_the_whole_of_a_long_message_is_copied() -> None:
    pair = Pair(1 << 20)
    data = bytes(1 << 20)
    assert pair.b.park_reader()
    first = pair.a.send(data)
    assert 0 < first < len(data)
    assert pair.rung_b == 1
    assert pair.a.send(memoryview(data)[first:]) == len(data) - first
    assert pair.rung_b == 1


def test_each_sleep_is_rung_anew() -> None:
    pair = Pair()
    for round_number in range(1, 6):
        assert pair.b.park_reader()
        pair.a.send(b"x")
        assert pair.rung_b == round_number
        pair.b.unpark_reader()
        pair.b.recv(1)


def test_parking_again_without_waking_starts_a_new_sleep() -> None:
    pair = Pair()
    assert pair.b.park_reader()
    assert pair.b.park_reader(), "a wake-up that was not for the reader"
    pair.a.send(b"x")
    assert pair.rung_b == 1


def test_a_reader_does_not_sleep_on_data_or_after_the_end() -> None:
    pair = Pair()
    pair.a.send(b"x")
    assert not pair.b.park_reader()
    pair.a.send(b"y")
    assert pair.rung_b == 0, "the announcement was taken back"
    pair.b.recv(2)
    pair.a.set_flags(Flags.DONE_WRITING)
    assert not pair.b.park_reader()


def test_a_writer_does_not_sleep_when_the_peer_will_never_read_again() -> None:
    pair = Pair()
    fill(pair.a)
    pair.b.set_flags(Flags.DONE_WRITING)
    assert pair.a.park_writer(), "done writing says nothing about reading"
    pair.b.set_flags(Flags.CLOSED)
    assert pair.rung_a == 1
    assert not pair.a.park_writer()


def test_a_slow_reader_wakes_the_writer_once_per_window_not_per_message() -> None:
    pair = Pair()
    fill(pair.a)
    assert pair.a.park_writer()
    window = RING // 4
    for _ in range(window // 64 - 1):
        pair.b.recv(64)
    assert pair.rung_a == 0
    pair.b.recv(64)
    assert pair.rung_a == 1
    while pair.b.recv(64):
        pass
    assert pair.rung_a == 1
    pair.a.unpark_writer()
    assert pair.a.writable_bytes() == RING


def test_an_emptied_ring_wakes_the_writer_whatever_its_size() -> None:
    pair = Pair()
    pair.a.send(b"x" * 100)
    assert pair.a.park_writer(beyond=RING - 100)
    pair.b.recv(99)
    pair.b.recv(1)
    assert pair.rung_a == 1


def test_a_reader_that_goes_to_sleep_wakes_a_writer_it_had_held_back() -> None:
    pair = Pair()
    fill(pair.a)
    assert pair.a.park_writer()
    pair.b.recv(10)
    assert pair.rung_a == 0
    assert pair.b.park_reader(beyond=RING - 10)
    assert pair.rung_a == 1
    pair.a.send(b"y")
    assert pair.rung_b == 1


def test_waiting_for_more_than_the_ring_holds_is_refused() -> None:
    pair = Pair()
    for park in (pair.a.park_reader, pair.a.park_writer):
        for beyond in (-1, RING):
            with pytest.raises(LocalProtocolError):
                park(beyond)


def test_reader_and_writer_may_sleep_at_once_and_are_rung_apart() -> None:
    pair = Pair()
    fill(pair.a)
    assert pair.a.park_writer()
    assert pair.a.park_reader()
    pair.b.send(b"x")
    assert pair.rung_a == 1
    pair.b.recv(RING)
    assert pair.rung_a == 2


def test_a_flag_wakes_both_with_one_doorbell() -> None:
    pair = Pair()
    fill(pair.a)
    assert pair.a.park_writer()
    assert pair.a.park_reader()
    pair.b.set_flags(Flags.ABNORMAL_CLOSE)
    assert pair.rung_a == 1


def test_the_end_is_told_only_after_all_data() -> None:
    pair = Pair()
    pair.a.send(b"xy")
    pair.a.set_flags(Flags.DONE_WRITING)
    assert pair.b.peer_flags() == Flags.DONE_WRITING
    assert pair.b.rx_state() is RxState.DATA
    assert pair.b.recv(1) == b"x"
    assert pair.b.rx_state() is RxState.DATA
    assert pair.b.recv(1) == b"y"
    assert pair.b.recv(1) is None
    assert pair.b.rx_state() is RxState.EOF
    pair.a.set_flags(Flags.ABNORMAL_CLOSE)
    assert pair.b.rx_state() is RxState.ABORTED


def test_reserved_flags_cannot_be_set_and_are_ignored_when_seen() -> None:
    pair = Pair()
    with pytest.raises(ValueError, match="reserved"):
        pair.a.set_flags(1 << 16)
    at = Header.offset_of("flags")
    pair.to_b.view[at : at + 4] = (0xFF0000).to_bytes(4, "little")
    assert pair.b.peer_flags() == Flags(0)
    assert pair.b.rx_state() is RxState.EMPTY


def test_send_withdraws_a_reservation() -> None:
    pair = Pair()
    assert len(pair.a.reserve(10)) == 10
    pair.a.send(b"x")
    with pytest.raises(LocalProtocolError):
        pair.a.commit(1)
    assert pair.b.recv(10) == b"x"


def test_a_closed_endpoint_refuses_everything() -> None:
    pair = Pair()
    pair.a.send(b"x")
    pair.b.close()
    pair.b.close()
    assert pair.b.closed
    calls: list[Callable[[], object]] = [
        lambda: pair.b.send(b"x"),
        lambda: pair.b.recv(1),
        lambda: pair.b.recv_into(bytearray(1)),
        lambda: pair.b.reserve(1),
        lambda: pair.b.commit(0),
        lambda: pair.b.consume(0),
        lambda: pair.b.set_flags(0x80),
        pair.b.peek,
        pair.b.peer_flags,
        pair.b.rx_state,
        pair.b.readable_bytes,
        pair.b.writable_bytes,
        pair.b.park_reader,
        pair.b.park_writer,
        pair.b.ring_doorbell_if_parked,
    ]
    for call in calls:
        with pytest.raises(LocalProtocolError, match="closed"):
            call()
    pair.b.unpark_reader()  # these two stand in finally blocks
    pair.b.unpark_writer()


def test_a_lent_view_keeps_the_memory_mapped_after_close() -> None:
    pair = Pair()
    pair.a.send(b"still here")
    (view,) = pair.b.peek()
    alive = weakref.ref(pair.to_b)
    pair.b.close()
    pair.a.close()
    del pair
    gc.collect()
    assert bytes(view) == b"still here"
    assert alive() is not None
    del view
    gc.collect()
    assert alive() is None


def test_a_second_thread_in_the_same_direction_is_refused() -> None:
    pair = Pair()
    pair.b._words[words.RX_BUSY] = 1  # as during another thread's spin
    with pytest.raises(LocalProtocolError, match="another thread"):
        pair.b.recv(1)
    assert pair.b.send(b"x") == 1


def test_what_the_doorbell_raises_passes_through_after_the_data_is_out() -> None:
    to_a, to_b = Mapping(HEADER_BYTES + RING), Mapping(HEADER_BYTES + RING)

    def broken() -> None:
        raise BrokenPipeError

    a = Endpoint(to_a, to_b, doorbell=broken)
    b = Endpoint(to_b, to_a, doorbell=broken)
    b.park_reader()
    with pytest.raises(BrokenPipeError):
        a.send(b"x")
    assert b.recv(1) == b"x"


def test_settings_out_of_range_are_refused() -> None:
    mapping = Mapping(8192)

    class Region:
        address, length = mapping.address, HEADER_BYTES

    class Crooked:
        address, length = mapping.address + 8, 4104

    for rx, tx in ((Region, mapping), (mapping, Region), (mapping, Crooked)):
        with pytest.raises(ValueError, match="cannot hold a ring"):
            Endpoint(rx, tx, doorbell=lambda: None)
    for spin in (-1, MAX_SPIN_NS + 1):
        with pytest.raises(ValueError, match="max_spin_ns"):
            Endpoint(mapping, mapping, doorbell=lambda: None, max_spin_ns=spin)


def budget(end: Endpoint) -> int:
    return int(end._words[words.RX_SPIN + words.SPIN_BUDGET_NS])


def test_spins_in_vain_use_up_the_budget_and_a_success_restores_it() -> None:
    pair = Pair(max_spin_ns=MAX_SPIN_NS, kernels=(1, 2))
    pair.a.send(b"x")
    pair.b.recv(1)  # from here on it knows that the peer is elsewhere
    assert budget(pair.b) == MAX_SPIN_NS
    for _ in range(20):
        assert pair.b.recv(1) is None
    assert budget(pair.b) == 0
    # one that can win: the peer sends from another thread until a spin has seen it arrive
    stop = threading.Event()

    def feed() -> None:
        while not stop.is_set():
            pair.a.send(b"x")

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        for _ in range(200_000):
            pair.b.recv(RING)
            if budget(pair.b) >= FAR_SPIN_FACTOR * MAX_SPIN_NS:
                break
    finally:
        stop.set()
        thread.join(10)
    assert budget(pair.b) >= FAR_SPIN_FACTOR * MAX_SPIN_NS  # the peer is behind another kernel


def test_ends_on_the_same_cpu_of_the_same_kernel_do_not_spin() -> None:
    cpu_at = Header.offset_of("cpu")
    for same_kernel in (False, True):
        pair = Pair(max_spin_ns=MAX_SPIN_NS, kernels=(7, 7) if same_kernel else (7, 8))
        pair.a.send(b"x")
        pair.b.recv(1)
        for cpu in range(1, 4097):  # claim every CPU in turn: the one this thread is on is among them
            pair.to_b.view[cpu_at : cpu_at + 4] = cpu.to_bytes(4, "little")
            before = budget(pair.b)
            pair.b.recv(1)
            if same_kernel and budget(pair.b) == before != 0:
                break
            pair.b.max_spin_ns = MAX_SPIN_NS
        assert (cpu < 4096) == same_kernel


def test_the_kernel_id_is_stable_and_fits_the_header() -> None:
    assert kernel_id() == kernel_id()
    assert -(2**63) <= kernel_id() < 2**63

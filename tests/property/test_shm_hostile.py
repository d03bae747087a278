# SPDX-License-Identifier: Apache-2.0
"""A peer that scribbles anything into the header at any time: RemoteProtocolError or correct behaviour, nothing else.

Both regions stand between unmapped pages and their unused bytes hold a canary, so an access outside a ring either
kills the test run or is seen.
"""

from __future__ import annotations

import ctypes

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ism.errors import LocalProtocolError, RemoteProtocolError
from ism.memory import PAGE_SIZE, Mapping
from ism.shm import HEADER_BYTES, Endpoint, Header

_mprotect = ctypes.CDLL(None, use_errno=True).mprotect
_mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
CANARY = 0x5A


class Guarded:
    """A region that ends, or begins, next to pages that cannot be touched."""

    def __init__(self, ring_bytes: int) -> None:
        pages = -(-ring_bytes // PAGE_SIZE) + 1
        self.mapping = Mapping((pages + 2) * PAGE_SIZE)
        self.length = HEADER_BYTES + ring_bytes
        self.address = self.mapping.address + PAGE_SIZE
        self.inside = self.mapping.view[PAGE_SIZE:-PAGE_SIZE]
        self.inside[self.length :] = bytes([CANARY]) * (len(self.inside) - self.length)
        for page in (self.mapping.address, self.mapping.address + (pages + 1) * PAGE_SIZE):
            assert _mprotect(page, PAGE_SIZE, 0) == 0

    def write_word(self, offset: int, size: int, value: int) -> None:
        self.inside[offset : offset + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")

    def untouched(self) -> bool:
        return all(byte == CANARY for byte in self.inside[self.length :])


FIELDS = st.sampled_from([row for row in Header.FIELDS if row.name != "magic"])
VALUES = st.one_of(
    st.integers(0, 70),
    st.integers(0, 2**64 - 1),
    st.sampled_from([2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1, 2**62, 2**32]),
)
OPERATIONS = st.sampled_from(
    [
        "send",
        "recv",
        "recv_into",
        "reserve",
        "commit",
        "peek",
        "consume",
        "flags",
        "state",
        "park_reader",
        "park_writer",
        "unpark",
        "readable",
        "writable",
        "ring",
        "set_flags",
        *["advance"] * 5,
        *["release"] * 5,
    ]
)
# One step in eight scribbles: a lie ends the endpoint, so more would leave nothing to see.
RARELY = st.integers(0, 7).map(lambda n: n == 7)
STEPS = st.lists(st.tuples(OPERATIONS, st.integers(0, 100), FIELDS, VALUES, RARELY), min_size=5, max_size=40)


def operate(end: Endpoint, name: str, count: int, rx_size: int, tx_size: int) -> None:
    """Do one operation; whatever it returns must be possible for rings of these sizes."""
    match name:
        case "send":
            assert 0 <= end.send(bytes(count)) <= min(count, tx_size)
        case "recv":
            data = end.recv(count)
            assert data is None or 0 < len(data) <= min(count, rx_size)
        case "recv_into":
            assert 0 <= end.recv_into(bytearray(count)) <= min(count, rx_size)
        case "reserve":
            view = end.reserve(count)
            view[:] = bytes(len(view))
        case "commit":
            end.commit(count % 8)
        case "peek":
            assert sum(len(bytes(view)) for view in end.peek()) <= rx_size
        case "consume":
            end.consume(count % 8)
        case "flags":
            end.peer_flags()
        case "state":
            end.rx_state()
        case "park_reader":
            end.park_reader(count % rx_size)
        case "park_writer":
            end.park_writer(count % tx_size)
        case "unpark":
            end.unpark_reader()
            end.unpark_writer()
        case "readable" | "advance":
            assert 0 <= end.readable_bytes() <= rx_size
        case "writable" | "release":
            assert 0 <= end.writable_bytes() <= tx_size
        case "ring":
            end.ring_doorbell_if_parked()
        case "set_flags":
            end.set_flags(0x80)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), STEPS, st.booleans())
def test_no_header_makes_an_endpoint_leave_its_rings(
    rx_size: int,
    tx_size: int,
    steps: list[tuple[str, int, object, int, bool]],
    started: bool,
) -> None:
    rx, tx = Guarded(rx_size), Guarded(tx_size)
    end = Endpoint(rx, tx, doorbell=lambda: None, max_spin_ns=0)
    if started:
        hello = Header.unpack(bytes(tx.inside[:HEADER_BYTES])).pack()[:16]
        rx.inside[:16] = hello
        rx.write_word(Header.offset_of("ring_bytes"), 8, rx_size)
    produced = consumed = 0
    lied = False
    for name, count, row, value, scribble in steps:
        if name == "advance":
            produced += count % (rx_size + 1)
            rx.write_word(Header.offset_of("producer"), 8, produced)
        elif name == "release":
            consumed += count % (tx_size + 1)
            rx.write_word(Header.offset_of("consumer"), 8, consumed)
        elif scribble:
            rx.write_word(row.offset, row.size, value)
        try:
            operate(end, name, count, rx_size, tx_size)
        except RemoteProtocolError:
            lied = True
        except LocalProtocolError:
            assert name in {"commit", "consume"}
        else:
            assert not lied or name in {"unpark", "ring", "set_flags"}, "a poisoned endpoint went on"
    assert rx.untouched()
    assert tx.untouched()


@pytest.mark.parametrize(
    ("field", "value"),
    [("producer", 65), ("producer", 2**64 - 1), ("producer", 2**63), ("consumer", 1), ("consumer", 2**63)],
)
def test_an_impossible_cursor_is_named_and_stays_an_error(field: str, value: int) -> None:
    rx, tx = Guarded(64), Guarded(64)
    end = Endpoint(rx, tx, doorbell=lambda: None, max_spin_ns=0)
    Endpoint(tx, rx, doorbell=lambda: None)
    rx.write_word(Header.offset_of(field), 8, value)
    call = end.readable_bytes if field == "producer" else end.writable_bytes
    with pytest.raises(RemoteProtocolError, match=f"{field} cursor {value:#x}"):
        call()
    rx.write_word(Header.offset_of(field), 8, 0)
    for again in (lambda: end.recv(1), lambda: end.send(b"x"), end.rx_state, end.peer_flags, end.peek):
        with pytest.raises(RemoteProtocolError, match=f"{field} cursor {value:#x}"):
            again()


def test_a_producer_that_overtakes_unread_bytes_is_a_lie_even_in_small_steps() -> None:
    rx, tx = Guarded(64), Guarded(64)
    end = Endpoint(rx, tx, doorbell=lambda: None, max_spin_ns=0)
    Endpoint(tx, rx, doorbell=lambda: None)
    for producer in (40, 64):
        rx.write_word(Header.offset_of("producer"), 8, producer)
        assert end.readable_bytes() == producer
    rx.write_word(Header.offset_of("producer"), 8, 65)
    with pytest.raises(RemoteProtocolError, match="0x40 to 0x40"):
        end.readable_bytes()


def test_a_cursor_or_flag_that_goes_back_is_a_lie() -> None:
    for field, size, first, second in (("producer", 8, 10, 9), ("flags", 4, 0xC0, 0x80)):
        rx, tx = Guarded(64), Guarded(64)
        end = Endpoint(rx, tx, doorbell=lambda: None, max_spin_ns=0)
        Endpoint(tx, rx, doorbell=lambda: None)
        rx.write_word(Header.offset_of(field), size, first)
        end.rx_state()
        rx.write_word(Header.offset_of(field), size, second)
        with pytest.raises(RemoteProtocolError, match=field):
            end.rx_state()


@pytest.mark.parametrize("field", ["cdc_type", "version", "line_bytes", "ring_bytes"])
def test_a_peer_that_is_not_one_of_us_is_refused_at_its_first_byte(field: str) -> None:
    rx, tx = Guarded(64), Guarded(64)
    end = Endpoint(rx, tx, doorbell=lambda: None, max_spin_ns=0)
    peer = Endpoint(tx, rx, doorbell=lambda: None)
    row = Header.info(field)
    rx.write_word(row.offset, row.size, 0x7B)
    assert end.recv(1) is None
    peer.send(b"x")
    with pytest.raises(RemoteProtocolError, match="ring_bytes" if field == "ring_bytes" else "hello"):
        end.recv(1)

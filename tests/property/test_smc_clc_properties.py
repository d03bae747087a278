# SPDX-License-Identifier: Apache-2.0
"""CLC codec: round trips, and arbitrary bytes give a message or HandshakeError, nothing else."""

from __future__ import annotations

import contextlib
import string

from hypothesis import example, given
from hypothesis import strategies as st

from ism.smc.clc import (
    DMB_SIZES,
    SMCD,
    SMCR,
    Accept,
    Confirm,
    Decline,
    FirstContact,
    ForeignAnswer,
    MessageReader,
    Offer,
    Proposal,
    decode,
    message_length,
)
from ism.smc.diagnosis import HandshakeError
from ism.smc.identity import valid_eid

U64 = st.integers(0, 2**64 - 1)
EIDS = st.text(string.ascii_uppercase + string.digits + ".-", min_size=1, max_size=32).filter(valid_eid)
HOSTS = st.text(string.ascii_letters + string.digits + ".-_?", max_size=32)
EMULATED = st.builds(Offer, gid=U64, devid=U64, chid=st.integers(0xFF00, 0xFFFF))
NATIVE = st.builds(Offer, gid=U64, devid=st.just(0), chid=st.integers(0, 0xFEFF))
PROPOSALS = st.builds(
    Proposal,
    offers=st.lists(st.one_of(EMULATED, NATIVE), max_size=4).map(tuple),
    eids=st.lists(EIDS, max_size=8).map(tuple),
    release=st.integers(0, 15),
    features=st.integers(0, 0xFFFF),
)
FIRST_CONTACTS = st.one_of(
    st.none(),
    st.builds(
        FirstContact,
        release=st.integers(1, 15),
        features=st.integers(0, 0xFFFF),
        host=HOSTS,
        os=st.integers(0, 15),
    ),
    st.builds(FirstContact, release=st.just(0), features=st.just(0), host=HOSTS, os=st.integers(0, 15)),
)
ANSWER = {
    "gid": U64,
    "devid": U64,
    "token": st.integers(1, 2**64 - 1),
    "size": st.sampled_from(DMB_SIZES),
    "chid": st.integers(0, 0xFFFF),
    "eid": EIDS,
    "link_id": st.integers(0, 2**32 - 1),
    "first_contact": FIRST_CONTACTS,
}
DECLINES = st.builds(
    Decline, diagnosis=st.integers(0, 2**32 - 1), out_of_sync=st.booleans(), version=st.sampled_from([1, 2])
)
MESSAGES = st.one_of(PROPOSALS, st.builds(Accept, **ANSWER), st.builds(Confirm, **ANSWER), DECLINES)


@given(MESSAGES)
def test_every_message_survives_the_wire(message):
    data = message.encode()
    assert message_length(data[:8]) == len(data)
    assert decode(data) == message


@given(st.lists(MESSAGES, min_size=1, max_size=4), st.data())
def test_a_stream_cut_anywhere_gives_the_same_messages_and_no_byte_is_read_behind(messages, data):
    stream = b"".join(message.encode() for message in messages)
    reader, got, at = MessageReader(), [], 0
    while at < len(stream):
        size = data.draw(st.integers(1, reader.bytes_wanted))
        message = reader.feed(stream[at : at + size])
        at += size
        if message is not None:
            got.append(message)
    assert got == messages
    assert at == len(stream)


def accepts_or_refuses(data: bytes) -> None:
    try:
        message = decode(data)
    except HandshakeError:
        return
    assert isinstance(message, Proposal | Accept | Confirm | ForeignAnswer | Decline)
    if isinstance(message, Proposal):
        assert len(message.offers) <= 8
        assert len(message.eids) <= 8
        text = "".join(message.eids)
    elif isinstance(message, Accept | Confirm):
        assert message.token != 0
        assert message.size in DMB_SIZES
        text = message.eid + (message.first_contact.host if message.first_contact else "")
    else:
        return
    assert text.isascii()
    assert text.isprintable()


@given(st.binary(max_size=700))
@example(SMCR + b"\x01\x00\x54\x2a" + bytes(72) + SMCR)
def test_arbitrary_bytes_are_accepted_or_refused(data):
    accepts_or_refuses(data)


@given(st.sampled_from([SMCR, SMCD]), st.integers(1, 4), st.integers(0, 255), st.binary(min_size=16, max_size=650))
def test_arbitrary_bodies_behind_a_good_header_are_accepted_or_refused(eyecatcher, kind, flags, body):
    length = 8 + len(body) + 4
    accepts_or_refuses(eyecatcher + bytes([kind]) + length.to_bytes(2) + bytes([flags]) + body + eyecatcher)


@given(MESSAGES, st.lists(st.tuples(st.integers(0, 651), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_message_with_a_few_bytes_changed_is_accepted_or_refused(message, changes):
    data = bytearray(message.encode())
    for at, value in changes:
        data[at % len(data)] = value
    accepts_or_refuses(bytes(data))


@given(st.binary(min_size=8, max_size=8))
def test_no_header_asks_for_an_unbounded_message(header):
    with contextlib.suppress(HandshakeError):
        assert 8 < message_length(header) <= 652

# SPDX-License-Identifier: Apache-2.0
"""The CLC codec against hand-written bytes: what is emitted, what is accepted, what is refused and why."""

from __future__ import annotations

import pytest

from ism.errors import LocalProtocolError
from ism.ids import DevId, Gid, Token
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
    size_code,
)
from ism.smc.diagnosis import Diagnosis, HandshakeError

GID, DEVID, TOKEN = Gid(0x1122334455667788), DevId(0x99AABBCCDDEEFF00), Token(0x0102030405060708)
OFFER = Offer(gid=GID, devid=DEVID, chid=0xFF00)
PROPOSAL = Proposal(offers=(OFFER,), eids=("VIRTIO-ISM",))
EID_BYTES = b"VIRTIO-ISM" + b" " * 22


def answer(kind=Accept, **changes):
    fields = {"gid": GID, "devid": DEVID, "token": TOKEN, "size": 65536, "chid": 0xFF00, "eid": "VIRTIO-ISM"}
    fields |= {"link_id": 0xCAFEF00D, "first_contact": FirstContact(host="alpha")}
    return kind(**(fields | changes))


def patched(data: bytes, at: int, value: bytes | int) -> bytes:
    """`data` with `value` written over it at `at`; an int is one byte."""
    new = bytes([value]) if isinstance(value, int) else value
    return data[:at] + new + data[at + len(new) :]


def ip_area(prefixes: int) -> bytes:
    return bytes(7) + bytes([prefixes]) + bytes(17 * prefixes)


def v1_and_v2(*, prefixes: int = 0, eids: int = 1, entries: int = 2, type_byte: int = 0x25, dext: bool = True) -> bytes:
    """A proposal as Linux lays it out: IP area, version 2 extension, EIDs, SMC-D extension, entries."""
    area = ip_area(prefixes)
    extension = (
        bytes([eids, entries, 0, 0x11]) + bytes(2) + (32 + 32 * eids).to_bytes(2) + bytes(18) + b"\0\1" + bytes(12)
    )
    tail = extension + EID_BYTES * eids
    if dext:
        tail += b"S" * 32 + bytes(16)
        tail += b"".join((GID if i % 2 == 0 else DEVID).to_bytes(8) + b"\xff\0" for i in range(entries))
    fixed = b"\1" * 30 + (40).to_bytes(2) + bytes(8) + b"\0\0" + (28 + len(area)).to_bytes(2) + b"\7" * 28
    length = 8 + len(fixed) + len(area) + len(tail) + 4
    return SMCR + bytes([1]) + length.to_bytes(2) + bytes([type_byte]) + fixed + area + tail + SMCR


def test_a_proposal_is_the_224_bytes_of_the_specification():
    expected = (
        bytes.fromhex("e2d4c3d9 01 00e0 26")
        + bytes(30)
        + bytes(2)  # no IP area
        + bytes(10)
        + bytes.fromhex("001c")
        + bytes(28)
        + bytes.fromhex("01 02 00 10 0000 0040")
        + bytes(18)
        + bytes.fromhex("0001")
        + bytes(12)
        + EID_BYTES
        + bytes(48)
        + bytes.fromhex("1122334455667788 ff00 99aabbccddeeff00 ff00")
        + bytes.fromhex("e2d4c3d9")
    )
    assert PROPOSAL.encode() == expected
    assert len(expected) == 224


@pytest.mark.parametrize(("kind", "number"), [(Accept, 2), (Confirm, 3)])
def test_an_answer_with_first_contact_is_the_130_bytes_of_the_specification(kind, number):
    expected = (
        bytes.fromhex(f"e2d4c3c4 {number:02x} 0082 29")
        + bytes.fromhex("1122334455667788 0102030405060708 00 20 0000 cafef00d ff00")
        + EID_BYTES
        + bytes.fromhex("99aabbccddeeff00")
        + bytes.fromhex("00 21 0000")
        + b"alpha".ljust(32)
        + bytes.fromhex("0000 0001 00000000 0000000000000000")
        + bytes.fromhex("e2d4c3c4")
    )
    assert answer(kind).encode() == expected
    assert len(expected) == 130


def test_an_answer_without_first_contact_has_78_bytes_and_the_bit_clear():
    data = answer(first_contact=None).encode()
    assert (len(data), data[7], data[74:]) == (78, 0x21, SMCD)
    assert decode(data) == answer(first_contact=None)


def test_a_first_contact_of_release_0_has_114_bytes():
    message = answer(first_contact=FirstContact(release=0, features=0, host="h"))
    assert len(message.encode()) == 114
    assert decode(message.encode()) == message


def test_a_decline_has_44_bytes_and_28_in_version_1():
    data = Decline(diagnosis=Diagnosis.NOUEID).encode()
    assert data == bytes.fromhex("e2d4c3d9 04 002c 20") + bytes(8) + bytes.fromhex("03030008 20") + bytes(19) + SMCR
    old = Decline(diagnosis=Diagnosis.NOUEID, out_of_sync=True, version=1).encode()
    assert old == bytes.fromhex("e2d4c3d9 04 001c 18") + bytes(8) + bytes.fromhex("03030008") + bytes(4) + SMCR


def test_what_is_encoded_decodes_to_the_same():
    for message in (
        PROPOSAL,
        Proposal(offers=(OFFER, Offer(gid=Gid(5), devid=DevId(0), chid=0x10)), eids=("A", "B.C-D")),
        answer(),
        answer(Confirm),
        Decline(diagnosis=0xDEADBEEF, out_of_sync=True),
        Decline(diagnosis=1, version=1),
    ):
        assert decode(message.encode()) == message


@pytest.mark.parametrize(("code", "size"), list(enumerate(DMB_SIZES)))
def test_every_dmb_size_has_its_code(code, size):
    assert size == 16384 << code
    assert answer(size=size).encode()[25] == code << 4
    assert decode(answer(size=size).encode()).size == size


@pytest.mark.parametrize("size", [0, 1, 16383, 16385, 3 << 14, 1 << 21, -16384])
def test_a_size_without_a_code_is_a_local_error(size):
    with pytest.raises(LocalProtocolError, match="DMB"):
        size_code(size)
    with pytest.raises(LocalProtocolError):
        answer(size=size).encode()


def test_token_0_cannot_be_sent():
    with pytest.raises(LocalProtocolError, match="token 0"):
        answer(token=0).encode()


def test_a_proposal_that_does_not_fit_the_counts_cannot_be_sent():
    with pytest.raises(LocalProtocolError, match="10 GID entries"):
        Proposal(offers=(OFFER,) * 5, eids=("A",)).encode()
    with pytest.raises(LocalProtocolError, match="9 EIDs"):
        Proposal(offers=(OFFER,), eids=("A",) * 9).encode()
    with pytest.raises(LocalProtocolError, match="version 2"):
        Proposal(absent=Diagnosis.NOV2EXT).encode()
    with pytest.raises(LocalProtocolError, match="version 2"):
        Proposal(version=1).encode()


def test_a_host_name_is_cut_and_made_ascii():
    data = answer(first_contact=FirstContact(host="ü" + "x" * 40)).encode()
    assert data[78:110] == b"?" + b"x" * 31
    assert len(data) == 130


# ----------------------------------------------------------------------------------------------- what is accepted


@pytest.mark.parametrize("prefixes", range(9))
@pytest.mark.parametrize("eids", [0, 1, 8])
@pytest.mark.parametrize("entries", [0, 2, 8])
def test_version_1_parts_and_a_system_eid_are_skipped(prefixes, eids, entries):
    message = decode(v1_and_v2(prefixes=prefixes, eids=eids, entries=entries))
    assert message == Proposal(offers=(OFFER,) * (entries // 2), eids=("VIRTIO-ISM",) * eids, release=1)


def test_the_largest_proposal_has_652_bytes():
    assert len(v1_and_v2(prefixes=8, eids=8, entries=8)) == 652


def test_both_eyecatchers_are_taken_in_every_place():
    for message in (PROPOSAL, answer(), answer(Confirm), Decline(diagnosis=1)):
        data = message.encode()
        for front in (SMCR, SMCD):
            for back in (SMCR, SMCD):
                assert decode(front + data[4:-4] + back) == message


def test_reserved_bytes_are_ignored():
    data = bytearray(PROPOSAL.encode())
    for span in (slice(8, 38), slice(40, 50), slice(52, 80), slice(82, 83), slice(84, 86), slice(88, 106)):
        data[span] = b"\xa5" * len(data[span])
    data[108:120] = b"\xa5" * 12
    assert decode(data) == PROPOSAL
    accept = bytearray(answer().encode())
    accept[25] |= 0x0F
    accept[26:28] = accept[76:78] = accept[110:112] = b"\xff\xff"
    accept[114:126] = b"\xff" * 12
    accept[74] = 0x80
    assert decode(accept) == answer()


def test_a_decline_needs_no_trailer():
    assert decode(Decline(diagnosis=7).encode()[:-4] + b"xxxx") == Decline(diagnosis=7)


def test_the_ip_area_may_come_last():
    data = PROPOSAL.encode()[:-4] + ip_area(1) + SMCR
    data = patched(patched(data, 5, len(data).to_bytes(2)), 7, 0x25)
    assert decode(patched(data, 38, (220 - 40).to_bytes(2))) == PROPOSAL
    with pytest.raises(HandshakeError, match="overlap or hole"):
        decode(patched(data, 38, (219 - 40).to_bytes(2)))


def test_an_emulated_device_without_its_second_half_is_no_offer():
    message = decode(v1_and_v2(entries=3))
    assert message.offers == (OFFER,)
    data = patched(PROPOSAL.encode(), 218, 0xFE)
    assert decode(data).offers == (Offer(gid=DEVID, devid=DevId(0), chid=0xFE00),)


def test_a_device_that_is_not_emulated_takes_one_entry():
    data = patched(patched(PROPOSAL.encode(), 208, 0x01), 218, 0x02)
    assert decode(data).offers == (
        Offer(gid=GID, devid=DevId(0), chid=0x0100),
        Offer(gid=Gid(DEVID), devid=DevId(0), chid=0x0200),
    )


def test_peer_text_is_made_harmless():
    data = patched(PROPOSAL.encode(), 120, b"A\0\x1b[2J\xff")
    assert decode(data).eids == ("A??[2J?ISM",)
    assert decode(patched(answer().encode(), 78, b"\n")).first_contact.host == "?lpha"


@pytest.mark.parametrize("length", [52, 92])
def test_a_version_1_proposal_is_read_and_known_to_offer_nothing(length):
    offset = length - 52
    data = SMCR + bytes([1]) + length.to_bytes(2) + b"\x11" + bytes(30) + offset.to_bytes(2)
    data = data.ljust(length - 4, b"\0") + SMCR
    assert decode(data) == Proposal(version=1, release=0, features=0, absent=Diagnosis.NOV2EXT)
    with pytest.raises(HandshakeError, match="add up"):
        decode(patched(data, 40 + offset + 7, 1)[: length - 4] + SMCR)
    with pytest.raises(HandshakeError, match="9 IPv6 prefixes"):
        decode(patched(data, 40 + offset + 7, 9))
    with pytest.raises(HandshakeError, match="IP area"):
        decode(patched(data, 38, b"\xff\xff"))


def test_a_version_2_proposal_without_smc_d_is_known_to_offer_nothing():
    assert decode(v1_and_v2(type_byte=0x21, dext=False)).absent is Diagnosis.NOV2DEXT
    none = PROPOSAL.encode()[:80] + SMCR
    none = patched(patched(none, 5, (84).to_bytes(2)), 7, 0x2A)
    assert decode(none).absent is Diagnosis.NOV2EXT


@pytest.mark.parametrize(
    ("type_byte", "length", "code"),
    [
        (0x11, 48, Diagnosis.VERSMISMAT),
        (0x10, 68, Diagnosis.MODEUNSUPP),
        (0x20, 108, Diagnosis.MODEUNSUPP),
        (0x28, 160, Diagnosis.MODEUNSUPP),
    ],
)
@pytest.mark.parametrize("number", [2, 3])
def test_answers_of_another_kind_of_smc_are_recognised_whole(type_byte, length, code, number):
    data = SMCR + bytes([number]) + length.to_bytes(2) + bytes([type_byte]) + bytes(length - 12) + SMCR
    assert decode(data) == ForeignAnswer(kind=number, code=code)


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ("e2d4c3d8 01 00e0 26", "no CLC message"),
        ("48545450 2f31 2e31", "no CLC message"),
        ("e2d4c3d9 00 00e0 26", "type 0"),
        ("e2d4c3d9 05 00e0 26", "type 5"),
        ("e2d4c3d9 01 00e0 06", "version 0"),
        ("e2d4c3d9 01 00e0 36", "version 3"),
        ("e2d4c3d9 01 0053 26", "length 83"),
        ("e2d4c3d9 01 028d 26", "length 653"),
        ("e2d4c3d9 01 0033 11", "length 51"),
        ("e2d4c3d9 01 00e5 11", "length 229"),
        ("e2d4c3c4 02 0082 21", "length 130"),
        ("e2d4c3c4 02 004e 29", "length 78"),
        ("e2d4c3c4 02 0081 29", "length 129"),
        ("e2d4c3c4 03 0030 21", "length 48"),
        ("e2d4c3c4 02 004e 22", "length 78"),
        ("e2d4c3c4 02 004e 23", "length 78"),
        ("e2d4c3d9 02 006b 20", "length 107"),
        ("e2d4c3d9 02 0131 20", "length 305"),
        ("e2d4c3d9 04 001c 20", "length 28"),
        ("e2d4c3d9 04 002c 10", "length 44"),
        ("e2d4c3d9 04 0000 20", "length 0"),
    ],
)
def test_a_header_no_message_has_is_refused_before_anything_else_is_read(header, problem):
    with pytest.raises(HandshakeError, match=problem):
        message_length(bytes.fromhex(header))


def test_a_newer_version_is_refused_with_its_code():
    with pytest.raises(HandshakeError) as caught:
        message_length(bytes.fromhex("e2d4c3d9 01 00e0 36"))
    assert caught.value.code is Diagnosis.VERSMISMAT


@pytest.mark.parametrize("size", [0, 7, 9])
def test_a_header_has_8_bytes(size):
    with pytest.raises(HandshakeError, match="8 bytes"):
        message_length(PROPOSAL.encode()[:size])


@pytest.mark.parametrize("message", [PROPOSAL, answer(), answer(Confirm)])
def test_a_wrong_trailer_is_refused(message):
    with pytest.raises(HandshakeError, match="eyecatcher"):
        decode(message.encode()[:-1] + b"\0")


@pytest.mark.parametrize("message", [PROPOSAL, answer(), Decline(diagnosis=1)])
@pytest.mark.parametrize("cut", [slice(0, -1), slice(0, 8), slice(0, 3), slice(0, 0)])
def test_a_cut_message_is_refused(message, cut):
    with pytest.raises(HandshakeError):
        decode(message.encode()[cut])
    with pytest.raises(HandshakeError):
        decode(message.encode() + b"x")


@pytest.mark.parametrize("code", range(7, 16))
def test_size_codes_above_6_are_refused(code):
    with pytest.raises(HandshakeError, match=f"size code {code}"):
        decode(patched(answer().encode(), 25, code << 4))


def test_an_element_other_than_0_and_token_0_are_refused():
    with pytest.raises(HandshakeError, match="element 1"):
        decode(patched(answer().encode(), 24, 1))
    with pytest.raises(HandshakeError, match="token 0"):
        decode(patched(answer(Confirm).encode(), 16, bytes(8)))


@pytest.mark.parametrize(("message_release", "byte"), [(1, 0x20), (0, 0x21)])
def test_a_release_that_contradicts_the_length_is_refused(message_release, byte):
    data = answer(first_contact=FirstContact(release=message_release, features=0)).encode()
    with pytest.raises(HandshakeError, match="release") as caught:
        decode(patched(data, 75, byte))
    assert caught.value.code is Diagnosis.RELEASEERR


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (80, 9),  # EIDs
        (80, 2),
        (80, 0),
        (80, 255),
        (81, 9),  # entries
        (81, 1),
        (81, 3),
        (81, 0),
        (86, b"\0\x3f"),  # SMC-D extension one byte early
        (86, b"\0\x41"),
        (86, b"\0\0"),  # inside the version 2 extension
        (86, b"\xff\xff"),
        (50, b"\0\0"),  # version 2 extension missing
        (50, b"\0\x1b"),
        (50, b"\0\x1d"),
        (50, b"\xff\xff"),
        (7, 0x25),  # claims an IP area it does not have
        (7, 0x22),  # claims SMC-R only
        (7, 0x2A),  # claims neither
    ],
)
def test_counts_and_offsets_that_do_not_add_up_are_refused(at, value):
    with pytest.raises(HandshakeError, match="PROPOSAL"):
        decode(patched(PROPOSAL.encode(), at, value))


@pytest.mark.parametrize("offset", [0, 39, 41, 48, 0xFFFF])
def test_an_ip_area_elsewhere_is_refused(offset):
    with pytest.raises(HandshakeError, match="PROPOSAL"):
        decode(patched(v1_and_v2(), 38, offset.to_bytes(2)))


def test_more_than_8_eids_or_entries_are_refused_even_when_everything_adds_up():
    with pytest.raises(HandshakeError, match="9 EIDs"):
        decode(v1_and_v2(eids=9))
    with pytest.raises(HandshakeError, match="9 GID entries"):
        decode(v1_and_v2(entries=9))


def test_more_than_8_prefixes_are_refused():
    with pytest.raises(HandshakeError, match="9 IPv6 prefixes"):
        decode(patched(v1_and_v2(), 87, 9))


# ----------------------------------------------------------------------------------------------------- the reader


def test_the_reader_asks_for_the_header_then_for_the_rest_and_leaves_what_follows():
    reader, data = MessageReader(), PROPOSAL.encode()
    assert reader.bytes_wanted == 8
    assert reader.feed(data[:3]) is None
    assert reader.bytes_wanted == 5
    assert reader.feed(data[3:8]) is None
    assert reader.bytes_wanted == 216
    with pytest.raises(LocalProtocolError, match="216 wanted"):
        reader.feed(data[8:] + b"G")
    assert reader.feed(memoryview(data)[8:]) == PROPOSAL
    assert reader.bytes_wanted == 8


def test_the_reader_refuses_an_empty_piece_and_a_bad_header():
    reader = MessageReader()
    with pytest.raises(LocalProtocolError):
        reader.feed(b"")
    with pytest.raises(HandshakeError):
        reader.feed(b"GET / HT")

# SPDX-License-Identifier: Apache-2.0
"""The CLC messages we emit, judged by Wireshark's SMC dissector.

tshark proves framing, offsets and field values. It checks neither the trailer words nor which eyecatcher a message
carries nor its exact length, so those are asserted here.
"""

from __future__ import annotations

import itertools

import pytest
from pcap import ERRORS, TSHARK, dissect, write_pcap

from ism.ids import DevId, Gid, Token
from ism.smc.clc import SMCD, SMCR, Accept, Confirm, FirstContact, Offer, Proposal
from ism.smc.diagnosis import Diagnosis
from ism.smc.handshake_machine import ClientHandshake, ServerHandshake
from ism.smc.identity import Identity

pytestmark = pytest.mark.skipif(TSHARK is None, reason="tshark is not installed (Debian package tshark)")

GID = Gid(0x1122334455667788)
CLIENT = Identity(GID, DevId(0x0A0B0C0D0E0F1011), chid=0xFF42, eids=("VIRTIO-ISM",), host="alpha", link_id=0x01020304)
SERVER = Identity(GID, DevId(0xF1F2F3F4F5F6F7F8), chid=0xFF42, eids=("VIRTIO-ISM",), host="beta", link_id=0xFFFEFDFC)
CLIENT_TOKEN, SERVER_TOKEN = Token(0xDEADBEEFCAFEF00D), Token(0x8000000000000001)

NO_MORE = [0] * 4
"""Version 2 has room for four further diagnosis codes, which nobody uses."""

MESSAGE = ["smc.clc_msg", "smc.length"]
PROPOSAL_FIELDS = [
    *MESSAGE,
    "smc.proposal.smc.version",
    "smc.proposal.smcv2.type",
    "smc.proposal.smc.type",
    "smc.proposal.smc.version.relnum",
    "smc.proposal.smc.seid",
    "smc.proposal.eid.count",
    "smc.proposal.eid",
    "smc.proposal.ismv2_gid_count",
    "smc.proposal.ism.gid",
    "smc.proposal.smc.chid",
    "smc.proposal.smcv2_ext_offset",
    "smc.proposal.smcdv2_ext_offset",
]


def answer_fields(kind: str, role: str) -> list[str]:
    names = ["first.contact", f"sender.{role}.ism.gid", "dmb.token", "dmbe.conn.index", "dmbe.buffer.size"]
    names += [f"{role}.linkid", "smc.chid", "eid", "os.type", "smc.version.relnum", "peer.host.name"]
    return MESSAGE + [f"smc.{kind}.{name}" for name in names]


def handshake() -> tuple[bytes, bytes, bytes]:
    client, server = ClientHandshake(CLIENT), ServerHandshake(SERVER)
    proposal = client.start()
    server.receive(proposal[:8])
    server.receive(proposal[8:])
    accept = server.accept(SERVER_TOKEN, 1 << 20)
    client.receive(accept[:8])
    client.receive(accept[8:])
    return proposal, accept, client.confirm(CLIENT_TOKEN, 64 << 10)


def one(rows, fields):
    """Values of the only row, flags and numbers as integers, text without its padding."""
    assert len(rows) == 1

    def value(text):
        text = text.strip()
        try:
            return int(text, 0)
        except ValueError:
            return text

    return {name.removeprefix("smc."): [value(text) for text in rows[0][name]] for name in fields}


def seen(path):
    """Types of all SMC messages in the capture, after making sure that nothing in it is wrong."""
    assert dissect(path, ["frame.number", "_ws.expert.message"], ERRORS) == []
    return [int(kind) for row in dissect(path, MESSAGE, "smc") for kind in row["smc.clc_msg"]]


def test_a_handshake_is_three_clean_messages_with_our_values(tmp_path):
    proposal, accept, confirm = handshake()
    path = tmp_path / "handshake.pcap"
    write_pcap(path, [("client", proposal), ("server", accept), ("client", confirm)])
    assert seen(path) == [1, 2, 3]

    assert one(dissect(path, PROPOSAL_FIELDS, "smc.clc_msg == 1"), PROPOSAL_FIELDS) == {
        "clc_msg": [1],
        "length": [224],
        "proposal.smc.version": [2],
        "proposal.smcv2.type": [1],
        "proposal.smc.type": [2],
        "proposal.smc.version.relnum": [1],
        "proposal.smc.seid": [0],
        "proposal.eid.count": [1],
        "proposal.eid": ["VIRTIO-ISM"],
        "proposal.ismv2_gid_count": [2],
        "proposal.ism.gid": [0, GID, CLIENT.devid],
        "proposal.smc.chid": [0, 0xFF42, 0xFF42],
        "proposal.smcv2_ext_offset": [28],
        "proposal.smcdv2_ext_offset": [64],
    }
    fields = answer_fields("accept", "server")
    assert one(dissect(path, fields, "smc.clc_msg == 2"), fields) == {
        "clc_msg": [2],
        "length": [130],
        "accept.first.contact": [1],
        "accept.sender.server.ism.gid": [GID],
        "accept.dmb.token": [SERVER_TOKEN],
        "accept.dmbe.conn.index": [0],
        "accept.dmbe.buffer.size": [6],
        "accept.server.linkid": [0xFFFEFDFC],
        "accept.smc.chid": [0xFF42],
        "accept.eid": ["VIRTIO-ISM"],
        "accept.os.type": [2],
        "accept.smc.version.relnum": [1],
        "accept.peer.host.name": ["beta"],
    }
    fields = answer_fields("confirm", "client")
    assert one(dissect(path, fields, "smc.clc_msg == 3"), fields) == {
        "clc_msg": [3],
        "length": [130],
        "confirm.first.contact": [1],
        "confirm.sender.client.ism.gid": [GID],
        "confirm.dmb.token": [CLIENT_TOKEN],
        "confirm.dmbe.conn.index": [0],
        "confirm.dmbe.buffer.size": [2],
        "confirm.client.linkid": [0x01020304],
        "confirm.smc.chid": [0xFF42],
        "confirm.eid": ["VIRTIO-ISM"],
        "confirm.os.type": [2],
        "confirm.smc.version.relnum": [1],
        "confirm.peer.host.name": ["alpha"],
    }


def test_the_gid_extensions_are_where_tshark_sees_reserved_bytes(tmp_path):
    _, accept, confirm = handshake()
    path = tmp_path / "reserved.pcap"
    write_pcap(path, [("server", accept), ("client", confirm)])
    for number, identity in ((2, SERVER), (3, CLIENT)):
        (row,) = dissect(path, ["smc.reserved"], f"smc.clc_msg == {number}")
        assert f"{identity.devid:016x}" in [value.replace(":", "") for value in row["smc.reserved"]]


def test_answers_without_first_contact_are_clean(tmp_path):
    common = {"gid": GID, "token": SERVER_TOKEN, "size": 16384, "chid": 0xFF42, "eid": "VIRTIO-ISM", "link_id": 5}
    accept = Accept(devid=SERVER.devid, **common).encode()
    confirm = Confirm(devid=CLIENT.devid, **common).encode()
    path = tmp_path / "later.pcap"
    write_pcap(path, [("client", handshake()[0]), ("server", accept), ("client", confirm)])
    assert seen(path) == [1, 2, 3]
    for number, kind, role in ((2, "accept", "server"), (3, "confirm", "client")):
        fields = answer_fields(kind, role)
        row = one(dissect(path, fields, f"smc.clc_msg == {number}"), fields)
        assert (row["length"], row[f"{kind}.first.contact"], row[f"{kind}.dmb.token"]) == ([78], [0], [SERVER_TOKEN])
        assert (row[f"{kind}.eid"], row[f"{kind}.peer.host.name"]) == (["VIRTIO-ISM"], [])


def test_several_eids_and_devices_are_clean(tmp_path):
    offers = tuple(Offer(gid=Gid(n), devid=DevId(n + 100), chid=0xFF00 + n) for n in range(1, 5))
    eids = tuple(f"EID-{n}.X" for n in range(8))
    path = tmp_path / "many.pcap"
    write_pcap(path, [("client", Proposal(offers=offers, eids=eids).encode())])
    assert seen(path) == [1]
    row = one(dissect(path, PROPOSAL_FIELDS, "smc"), PROPOSAL_FIELDS)
    assert row["proposal.eid"] == list(eids)
    assert row["proposal.ism.gid"] == [0, *(half for offer in offers for half in (offer.gid, offer.devid))]


@pytest.mark.parametrize("code", [Diagnosis.NOUEID, Diagnosis.SYNCERR, Diagnosis.MEM])
def test_a_declined_handshake_is_clean_and_shows_the_codes(tmp_path, code):
    client, server = ClientHandshake(CLIENT), ServerHandshake(SERVER)
    proposal = client.start()
    for piece in (proposal[:8], proposal[8:]):
        server.receive(piece)
    decline = server.decline(code)
    client.receive(decline[:8])
    event = client.receive(decline[8:])
    path = tmp_path / "declined.pcap"
    write_pcap(
        path, [("client", proposal), ("server", decline), ("client", event.reply), ("client", b"GET / HTTP/1.1")]
    )
    assert seen(path) == [1, 4, 4]
    fields = ["smc.length", "smc.peer.diag.info", "smc.decline.osync", "smc.decline.os.type", "ip.src"]
    rows = dissect(path, fields, "smc.clc_msg == 4")
    assert [[int(value, 0) for value in row["smc.peer.diag.info"]] for row in rows] == [
        [code, *NO_MORE],
        [0x05000000, *NO_MORE],
    ]
    assert [row["smc.length"] for row in rows] == [["44"], ["44"]]
    assert [int(row["smc.decline.osync"][0]) for row in rows] == [code is Diagnosis.SYNCERR, 0]
    assert [int(row["smc.decline.os.type"][0], 0) for row in rows] == [2, 2]


@pytest.mark.parametrize("size", [1, 7, 60, 129])
def test_messages_split_over_segments_are_put_together(tmp_path, size):
    # The dissector recognises a message by the word at the start of a segment, so that word stays whole.
    cuts = [4, *range(5, 224)] if size == 1 else list(range(size, 224, size))
    path, pieces = tmp_path / "split.pcap", []
    for sender, message in zip(("client", "server", "client"), handshake(), strict=True):
        edges = [0, *(cut for cut in cuts if cut < len(message)), len(message)]
        pieces += [(sender, message[a:b]) for a, b in itertools.pairwise(edges)]
    write_pcap(path, pieces)
    assert seen(path) == [1, 2, 3]


def test_messages_may_share_a_segment_and_application_data_may_follow(tmp_path):
    proposal, _, _ = handshake()
    decline = ServerHandshake(SERVER).decline(Diagnosis.CNFERR)
    path = tmp_path / "data.pcap"
    write_pcap(path, [("client", proposal + decline), ("server", decline), ("server", b"220 ready\r\n")])
    assert seen(path) == [1, 4, 4]


def test_a_broken_message_is_noticed_by_this_very_check(tmp_path):
    proposal, accept, confirm = handshake()
    bad = proposal[:50] + b"\x00\xff" + proposal[52:]
    path = tmp_path / "bad.pcap"
    write_pcap(path, [("client", bad), ("server", accept), ("client", confirm)])
    assert dissect(path, ["frame.number"], ERRORS) != []


def test_what_tshark_does_not_check():
    proposal, accept, confirm = handshake()
    decline = ServerHandshake(SERVER).decline(Diagnosis.MEM)
    expected = [(proposal, SMCR, 224), (accept, SMCD, 130), (confirm, SMCD, 130), (decline, SMCR, 44)]
    for message, eyecatcher, length in expected:
        assert message[:4] == message[-4:] == eyecatcher
        assert len(message) == int.from_bytes(message[5:7]) == length
    assert proposal[8:50] == bytes(42)
    for message, identity in ((accept, SERVER), (confirm, CLIENT)):
        assert int.from_bytes(message[66:74]) == identity.devid
        assert message[34:66] == b"VIRTIO-ISM".ljust(32)
        assert message[112:114] == b"\0\1"
    assert FirstContact().features == 1
    assert proposal[106:108] == b"\0\1"

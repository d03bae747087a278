# SPDX-License-Identifier: Apache-2.0
"""Both ends of the CLC handshake: the tables, two ends against each other, and every refusal."""

from __future__ import annotations

import dataclasses

import pytest

from ism.errors import LocalProtocolError
from ism.ids import DevId, Gid, Token
from ism.smc.clc import SMCD, SMCR, Accept, Confirm, Decline, FirstContact, Offer, Proposal, decode
from ism.smc.diagnosis import Diagnosis, HandshakeError
from ism.smc.handshake_machine import (
    CLIENT,
    SERVER,
    ClientHandshake,
    ClosedBeforeStart,
    Confirmed,
    Drained,
    Event,
    MustDecline,
    PeerAccepted,
    PeerDeclined,
    Proposed,
    ServerHandshake,
    State,
)
from ism.smc.identity import Identity

ALICE = Identity(Gid(7), DevId(1), host="alice", link_id=0xA11CE)
BOB = Identity(Gid(7), DevId(2), host="bob", link_id=0xB0B)
PROPOSAL = Proposal(offers=(Offer(gid=Gid(7), devid=DevId(1), chid=0xFF00),), eids=("VIRTIO-ISM",))
ACCEPT = Accept(
    gid=Gid(7),
    devid=DevId(2),
    token=Token(0xB),
    size=1 << 20,
    chid=0xFF00,
    eid="VIRTIO-ISM",
    link_id=0xB0B,
    first_contact=FirstContact(host="bob"),
)
CONFIRM = Confirm(
    gid=Gid(7),
    devid=DevId(1),
    token=Token(0xA),
    size=65536,
    chid=0xFF00,
    eid="VIRTIO-ISM",
    link_id=0xA11CE,
    first_contact=FirstContact(host="alice"),
)
DECLINE = Decline(diagnosis=Diagnosis.MEM)


def feed(machine, data):
    """Give `data` to the machine one byte at a time, as TCP might; return the event it ends in."""
    event = None
    for at in range(len(data)):
        assert event is None
        assert machine.bytes_wanted > 0
        event = machine.receive(data[at : at + 1])
    return event


def proposed_server(identity=BOB, proposal=PROPOSAL):
    server = ServerHandshake(identity)
    return server, feed(server, proposal.encode())


def client_in(state):
    client = ClientHandshake(ALICE)
    if state in (State.PROPOSED, State.ACCEPTED, State.UNUSABLE, State.CONFIRMED):
        client.start()
    if state in (State.ACCEPTED, State.CONFIRMED):
        feed(client, ACCEPT.encode())
    if state is State.UNUSABLE:
        feed(client, dataclasses.replace(ACCEPT, eid="OTHER").encode())
    if state is State.CONFIRMED:
        client.confirm(Token(0xA), 65536)
    if state is State.DRAINING:
        client.decline(Diagnosis.MEM)
    if state is State.FALLBACK:
        feed(client, DECLINE.encode())
    if state is State.CLOSED:
        client.receive_eof()
    if state is State.BROKEN:
        with pytest.raises(HandshakeError):
            feed(client, b"GET / HT")
    assert client.state is state
    return client


def server_in(state):
    server = ServerHandshake(BOB)
    if state in (State.PROPOSED, State.ACCEPTED, State.CONFIRMED):
        feed(server, PROPOSAL.encode())
    if state in (State.ACCEPTED, State.CONFIRMED):
        server.accept(Token(0xB), 1 << 20)
    if state is State.CONFIRMED:
        feed(server, CONFIRM.encode())
    if state in (State.UNUSABLE, State.DRAINING_LAST):
        feed(server, dataclasses.replace(PROPOSAL, eids=("OTHER",)).encode())
    if state in (State.DRAINING, State.DRAINING_LAST):
        server.decline(Diagnosis.MEM)
    if state is State.FALLBACK:
        feed(server, DECLINE.encode())
    if state is State.CLOSED:
        server.receive_eof()
    if state is State.BROKEN:
        with pytest.raises(HandshakeError):
            feed(server, b"GET / HT")
    assert server.state is state
    return server


def break_it(machine):
    """Let the peer break the protocol, by garbage where bytes are read and by EOF where none are."""
    return feed(machine, b"GET / HT") if machine.bytes_wanted else machine.receive_eof()


COMMON_ACTIONS = {
    Event.SEND_DECLINE: lambda machine: machine.decline(Diagnosis.MEM),
    Event.RECEIVE_PROPOSAL: lambda machine: receive(machine, PROPOSAL),
    Event.RECEIVE_ACCEPT: lambda machine: receive(machine, ACCEPT),
    Event.RECEIVE_CONFIRM: lambda machine: receive(machine, CONFIRM),
    Event.RECEIVE_DECLINE: lambda machine: receive(machine, DECLINE),
    Event.EOF: lambda machine: machine.receive_eof(),
    Event.BREAK: break_it,
}
CLIENT_ACTIONS = COMMON_ACTIONS | {
    Event.SEND_PROPOSAL: lambda machine: machine.start(),
    Event.SEND_CONFIRM: lambda machine: machine.confirm(Token(0xA), 65536),
    Event.RECEIVE_UNUSABLE: lambda machine: receive(machine, dataclasses.replace(ACCEPT, eid="OTHER")),
}
SERVER_ACTIONS = COMMON_ACTIONS | {
    Event.SEND_ACCEPT: lambda machine: machine.accept(Token(0xB), 1 << 20),
    Event.RECEIVE_UNUSABLE: lambda machine: receive(machine, dataclasses.replace(PROPOSAL, eids=("OTHER",))),
}


def receive(machine, message):
    """Give a whole message to a machine that may not want it."""
    return feed(machine, message.encode()) if machine.bytes_wanted else machine.receive(message.encode())


def walk(machine, table, event, actions):
    """Make `event` happen and compare with the table; what the table does not list must be refused."""
    state, row = machine.state, table[machine.state]
    if event not in actions:
        assert not any(event in anywhere for anywhere in table.values())
        return
    act = actions[event]
    if event is Event.RECEIVE_UNUSABLE and event not in row:
        # Whether a message suits is asked only where it may come.
        event = Event.RECEIVE_ACCEPT if table is CLIENT else Event.RECEIVE_PROPOSAL
    if event in row and event is not Event.BREAK:
        act(machine)
        assert machine.state is row[event]
        return
    by_eof = event in (Event.EOF, Event.BREAK)
    by_message = event.name.startswith("RECEIVE") and machine.bytes_wanted > 0
    if Event.BREAK in row and (by_eof or by_message):
        with pytest.raises(HandshakeError):
            act(machine)
        assert machine.state is row[Event.BREAK] is State.BROKEN
    else:
        with pytest.raises(LocalProtocolError):
            act(machine)
        assert machine.state is state


@pytest.mark.parametrize("event", Event, ids=lambda event: event.name)
@pytest.mark.parametrize("state", CLIENT, ids=lambda state: state.name)
def test_the_client_follows_its_table_in_every_state(state, event):
    walk(client_in(state), CLIENT, event, CLIENT_ACTIONS)


@pytest.mark.parametrize("event", Event, ids=lambda event: event.name)
@pytest.mark.parametrize("state", SERVER, ids=lambda state: state.name)
def test_the_server_follows_its_table_in_every_state(state, event):
    walk(server_in(state), SERVER, event, SERVER_ACTIONS)


@pytest.mark.parametrize("table", [CLIENT, SERVER])
def test_every_target_is_a_state_of_the_table_and_every_state_is_reached(table):
    targets = {target for row in table.values() for target in row.values()}
    assert targets | {State.START} == set(table)


# ------------------------------------------------------------------------------------------- two ends, no trouble


def test_two_ends_agree_byte_by_byte():
    client, server = ClientHandshake(ALICE), ServerHandshake(BOB)
    proposed = feed(server, client.start())
    assert proposed == Proposed(candidates=PROPOSAL.offers, eid="VIRTIO-ISM", eids=("VIRTIO-ISM",))
    accepted = feed(client, server.accept(Token(0xB), 1 << 20))
    assert accepted == PeerAccepted(
        gid=7, devid=2, token=0xB, size=1 << 20, eid="VIRTIO-ISM", link_id=0xB0B, first_contact=True, host="bob"
    )
    confirmed = feed(server, client.confirm(Token(0xA), 65536))
    assert confirmed == Confirmed(
        gid=7, devid=1, token=0xA, size=65536, eid="VIRTIO-ISM", link_id=0xA11CE, first_contact=True, host="alice"
    )
    for machine in (client, server):
        assert (machine.state, machine.finished, machine.fell_back) == (State.CONFIRMED, True, False)
        assert machine.bytes_wanted == 0


def test_the_messages_are_those_of_the_codec():
    client, server = ClientHandshake(ALICE), ServerHandshake(BOB)
    assert decode(client.start()) == PROPOSAL
    feed(server, PROPOSAL.encode())
    assert decode(server.accept(Token(0xB), 1 << 20)) == ACCEPT
    feed(client, ACCEPT.encode())
    assert decode(client.confirm(Token(0xA), 65536)) == CONFIRM


def test_the_machine_asks_for_the_header_then_for_the_rest():
    server, data = ServerHandshake(BOB), PROPOSAL.encode()
    assert server.bytes_wanted == 8
    assert server.receive(data[:8]) is None
    assert server.bytes_wanted == 216
    with pytest.raises(LocalProtocolError):
        server.receive(data[8:] + b"application")
    assert isinstance(server.receive(data[8:]), Proposed)
    assert server.bytes_wanted == 0


def test_the_first_common_eid_in_the_clients_order_is_chosen():
    server, event = proposed_server(
        dataclasses.replace(BOB, eids=("C", "B", "Z")), dataclasses.replace(PROPOSAL, eids=("A", "B", "C", "B"))
    )
    assert (event.eid, event.eids) == ("B", ("B", "C"))
    assert decode(server.accept(Token(1), 16384)).eid == "B"


def test_offers_of_other_domains_and_fabrics_are_left_out():
    offers = (
        Offer(gid=Gid(8), devid=DevId(1), chid=0xFF00),
        Offer(gid=Gid(7), devid=DevId(3), chid=0xFF01),
        Offer(gid=Gid(7), devid=DevId(4), chid=0xFF00),
    )
    server, event = proposed_server(proposal=dataclasses.replace(PROPOSAL, offers=offers))
    assert event.candidates == offers[2:]
    with pytest.raises(LocalProtocolError, match="did not offer"):
        server.accept(Token(1), 16384, offers[0])
    assert server.state is State.PROPOSED


def test_the_confirm_must_come_from_the_candidate_that_was_accepted():
    offers = tuple(Offer(gid=Gid(7), devid=DevId(n), chid=0xFF00) for n in (1, 5))
    for devid, good in ((5, True), (1, False)):
        server, event = proposed_server(proposal=dataclasses.replace(PROPOSAL, offers=offers))
        server.accept(Token(0xB), 16384, event.candidates[1])
        data = dataclasses.replace(CONFIRM, devid=DevId(devid)).encode()
        if good:
            assert feed(server, data).devid == 5
        else:
            with pytest.raises(HandshakeError, match="another device"):
                feed(server, data)


def test_two_processes_of_one_guest_may_share_a_device():
    server, event = proposed_server(ALICE)
    assert isinstance(event, Proposed)
    client = client_in(State.PROPOSED)
    assert isinstance(feed(client, server.accept(Token(0xB), 16384)), PeerAccepted)


def test_wrong_local_values_change_nothing():
    server, _ = proposed_server()
    for token, size in ((0, 16384), (1, 5)):
        with pytest.raises(LocalProtocolError):
            server.accept(Token(token), size)
    client = client_in(State.ACCEPTED)
    for token, size in ((0, 16384), (0xB, 16384), (1, 5)):
        with pytest.raises(LocalProtocolError):
            client.confirm(Token(token), size)
    assert feed(server, b"") is None
    assert isinstance(feed(client_in(State.PROPOSED), server.accept(Token(0xC), 16384)), PeerAccepted)
    assert decode(client.confirm(Token(0xD), 16384)).token == 0xD


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"release": 0}, Diagnosis.RELEASEERR),
        ({"features": 0}, Diagnosis.NOSMCD2DEV),
        ({"offers": ()}, Diagnosis.NOSMCD2DEV),
        ({"offers": (Offer(gid=Gid(8), devid=DevId(1), chid=0xFF00),)}, Diagnosis.NOSMCD2DEV),
        ({"offers": (Offer(gid=Gid(7), devid=DevId(0), chid=0xFF00),)}, Diagnosis.NOSMCD2DEV),
        ({"offers": (Offer(gid=Gid(7), devid=DevId(1), chid=0xFF01),)}, Diagnosis.NOSMCD2DEV),
        ({"offers": (Offer(gid=Gid(7), devid=DevId(0), chid=0x0100),)}, Diagnosis.NOSMCD2DEV),
        ({"eids": ()}, Diagnosis.NOUEID),
        ({"eids": ("virtio-ism", "OTHER")}, Diagnosis.NOUEID),
    ],
)
def test_a_proposal_that_does_not_suit_names_the_decline_code(changes, code):
    server, event = proposed_server(proposal=dataclasses.replace(PROPOSAL, **changes))
    assert event == MustDecline(code=code, words=code.words)
    with pytest.raises(LocalProtocolError):
        server.accept(Token(1), 16384)
    client = client_in(State.PROPOSED)
    declined = feed(client, server.decline(event.code))
    assert (declined.code, declined.words, declined.out_of_sync) == (code, code.words, False)
    assert feed(server, declined.reply).reply == b""
    assert (client.state, server.state) == (State.FALLBACK, State.FALLBACK)


def test_a_newer_release_is_met_with_ours():
    server, event = proposed_server(proposal=dataclasses.replace(PROPOSAL, release=3))
    assert isinstance(event, Proposed)
    assert decode(server.accept(Token(1), 16384)).first_contact.release == 1


def test_a_version_1_proposal_is_declined_in_version_1():
    server = ServerHandshake(BOB)
    event = feed(server, SMCR + bytes.fromhex("01 0034 10") + bytes(40) + SMCR)
    assert event.code is Diagnosis.NOV2EXT
    assert len(server.decline(event.code)) == 28


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"first_contact": None}, Diagnosis.SYNCERR),
        ({"first_contact": FirstContact(release=2)}, Diagnosis.VERSMISMAT),
        ({"first_contact": FirstContact(release=0, features=0)}, Diagnosis.RELEASEERR),
        ({"first_contact": FirstContact(features=0xFFFE)}, Diagnosis.NOSMCD2DEV),
        ({"gid": Gid(8)}, Diagnosis.NOSMCD2DEV),
        ({"devid": DevId(0)}, Diagnosis.NOSMCD2DEV),
        ({"chid": 0xFF01}, Diagnosis.NOSMCD2DEV),
        ({"eid": "OTHER"}, Diagnosis.NOUEID),
    ],
)
def test_an_accept_that_does_not_suit_names_the_decline_code(changes, code):
    client = client_in(State.PROPOSED)
    event = feed(client, dataclasses.replace(ACCEPT, **changes).encode())
    assert event == MustDecline(code=code, words=code.words)
    with pytest.raises(LocalProtocolError):
        client.confirm(Token(1), 16384)
    declined = feed(server_in(State.ACCEPTED), client.decline(event.code))
    assert (declined.code, declined.out_of_sync, declined.reply) == (code, code is Diagnosis.SYNCERR, b"")
    assert client.state is State.FALLBACK


def test_an_accept_of_another_kind_of_smc_is_declined():
    for flags, length, code in ((0x20, 108, Diagnosis.MODEUNSUPP), (0x11, 48, Diagnosis.VERSMISMAT)):
        client = client_in(State.PROPOSED)
        data = SMCR + bytes([2]) + length.to_bytes(2) + bytes([flags]) + bytes(length - 12) + SMCR
        assert feed(client, data).code is code


def test_features_are_cut_to_what_both_have():
    client = client_in(State.PROPOSED)
    feed(client, dataclasses.replace(ACCEPT, first_contact=FirstContact(features=0xFFFF)).encode())
    assert decode(client.confirm(Token(1), 16384)).first_contact.features == 1


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"first_contact": None}, Diagnosis.SYNCERR),
        ({"first_contact": FirstContact(release=2)}, Diagnosis.RELEASEERR),
        ({"first_contact": FirstContact(release=0, features=0)}, Diagnosis.RELEASEERR),
        ({"gid": Gid(8)}, Diagnosis.NOSMCD2DEV),
        ({"devid": DevId(9)}, Diagnosis.NOSMCD2DEV),
        ({"chid": 0xFF01}, Diagnosis.NOSMCD2DEV),
        ({"eid": "OTHER"}, Diagnosis.NOUEID),
        ({"token": Token(0xB)}, None),
    ],
)
def test_a_confirm_that_does_not_repeat_the_agreement_breaks_the_handshake(changes, code):
    server = server_in(State.ACCEPTED)
    with pytest.raises(HandshakeError) as caught:
        feed(server, dataclasses.replace(CONFIRM, **changes).encode())
    assert (caught.value.code, caught.value.state) == (code, "accepted")
    assert server.state is State.BROKEN


def test_a_confirm_of_another_kind_of_smc_breaks_the_handshake():
    server = server_in(State.ACCEPTED)
    with pytest.raises(HandshakeError) as caught:
        feed(server, SMCR + bytes.fromhex("03 0044 10") + bytes(56) + SMCR)
    assert caught.value.code is Diagnosis.MODEUNSUPP
    assert SMCD != SMCR


# ------------------------------------------------------------------------------------------------ declines, timing


def test_a_server_that_declines_first_reads_what_the_client_had_already_sent():
    client, server = ClientHandshake(ALICE), ServerHandshake(BOB)
    proposal, decline = client.start(), server.decline(Diagnosis.CNFERR)
    assert server.fell_back
    assert feed(server, proposal) == Drained()
    assert server.bytes_wanted == 8
    declined = feed(client, decline)
    assert declined.code == Diagnosis.CNFERR
    assert client.bytes_wanted == 0
    assert isinstance(feed(server, declined.reply), PeerDeclined)
    assert (server.bytes_wanted, server.finished) == (0, True)


def test_a_client_that_has_not_started_answers_a_decline_with_a_decline():
    client, server = ClientHandshake(ALICE), ServerHandshake(BOB)
    declined = feed(client, server.decline(Diagnosis.CNFERR))
    assert decode(declined.reply) == Decline(diagnosis=Diagnosis.PEERDECL)
    assert isinstance(feed(server, declined.reply), PeerDeclined)
    assert (client.state, server.state) == (State.FALLBACK, State.FALLBACK)


def test_a_server_answers_a_client_that_declines_first():
    client, server = ClientHandshake(ALICE), ServerHandshake(BOB)
    declined = feed(server, client.decline(Diagnosis.TIMEOUT_CL))
    assert isinstance(feed(client, declined.reply), PeerDeclined)
    assert (client.state, server.state) == (State.FALLBACK, State.FALLBACK)


def test_a_clients_decline_may_cross_the_servers_accept():
    client, server = ClientHandshake(ALICE), ServerHandshake(BOB)
    feed(server, client.start())
    decline, accept = client.decline(Diagnosis.TIMEOUT_CL), server.accept(Token(0xB), 16384)
    assert feed(client, accept) == Drained()
    assert feed(server, decline).reply == b""
    assert (client.state, server.state) == (State.FALLBACK, State.FALLBACK)


def test_declines_may_cross():
    client, server = ClientHandshake(ALICE), ServerHandshake(BOB)
    feed(server, client.start())
    from_client, from_server = client.decline(Diagnosis.TIMEOUT_CL), server.decline(Diagnosis.MEM)
    assert feed(client, from_server).reply == b""
    assert feed(server, from_client).reply == b""
    assert (client.state, server.state) == (State.FALLBACK, State.FALLBACK)


def test_an_unknown_decline_code_is_reported_as_it_is():
    event = feed(client_in(State.PROPOSED), Decline(diagnosis=0xFFFFFFFF, out_of_sync=True).encode())
    assert (event.code, event.out_of_sync) == (0xFFFFFFFF, True)
    assert "0xffffffff" in event.words


# ------------------------------------------------------------------------------------------------------------ EOF


@pytest.mark.parametrize("machine", [client_in(State.START), client_in(State.PROPOSED), server_in(State.START)])
def test_eof_before_the_first_byte_is_a_clean_close(machine):
    assert machine.receive_eof() == ClosedBeforeStart()
    assert (machine.state, machine.finished) == (State.CLOSED, True)


@pytest.mark.parametrize("size", [1, 8, 223])
def test_eof_inside_a_message_breaks_the_handshake(size):
    server = ServerHandshake(BOB)
    feed(server, PROPOSAL.encode()[:size])
    with pytest.raises(HandshakeError, match="middle"):
        server.receive_eof()
    assert server.state is State.BROKEN


def test_eof_between_two_messages_breaks_the_handshake():
    with pytest.raises(HandshakeError, match="middle"):
        server_in(State.ACCEPTED).receive_eof()

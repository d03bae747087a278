# SPDX-License-Identifier: Apache-2.0
"""Two ends of a handshake under every schedule: they always agree, and application bytes are never touched.

Each end acts whenever it likes: reads a few bytes, starts, gives up. The wires are byte queues, as TCP is. When both
have finished, either both use shared memory, or both use TCP and what is left on the wires is exactly what the
applications wrote.
"""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from ism.ids import DevId, Gid, Token
from ism.smc.diagnosis import Diagnosis, HandshakeError
from ism.smc.handshake_machine import (
    ClientHandshake,
    ClosedBeforeStart,
    MustDecline,
    PeerAccepted,
    PeerDeclined,
    Proposed,
    ServerHandshake,
    State,
)
from ism.smc.identity import Identity

CLIENT = Identity(Gid(7), DevId(1), eids=("A", "B"), host="client")
SERVER = Identity(Gid(7), DevId(2), eids=("B",), host="server")
# What an application may write looks like a CLC message on purpose: nobody may sniff.
CLIENT_DATA = ClientHandshake(CLIENT).start() + b"GET / HTTP/1.1"
SERVER_DATA = ServerHandshake(SERVER).decline(Diagnosis.MEM) + b"220 ready"


class End:
    """One machine, the wire it reads and the wire it writes."""

    def __init__(self, machine, wire_in, wire_out, data):
        self.machine, self.wire_in, self.wire_out, self.data = machine, wire_in, wire_out, data

    def write(self, message):
        self.wire_out += message
        if self.machine.fell_back and self.data:
            self.wire_out += self.data
            self.data = b""

    def start(self):
        if isinstance(self.machine, ClientHandshake) and self.machine.state is State.START:
            self.write(self.machine.start())

    def give_up(self):
        state = self.machine.state
        late = isinstance(self.machine, ServerHandshake) and state is State.ACCEPTED
        if not (self.machine.finished or self.machine.fell_back or late):
            self.write(self.machine.decline(Diagnosis.TIMEOUT_CL))

    def read(self, most, decline):
        size = min(most, self.machine.bytes_wanted, len(self.wire_in))
        if size == 0:
            return
        piece = bytes(self.wire_in[:size])
        del self.wire_in[:size]
        event = self.machine.receive(piece)
        if isinstance(event, PeerDeclined):
            self.write(event.reply)
        elif isinstance(event, MustDecline):
            self.write(self.machine.decline(event.code))
        elif isinstance(event, Proposed | PeerAccepted):
            if decline:
                self.write(self.machine.decline(Diagnosis.MEM))
            elif isinstance(event, Proposed):
                self.write(self.machine.accept(Token(1), 16384))
            else:
                self.write(self.machine.confirm(Token(2), 65536))


STEPS = st.lists(
    st.tuples(
        st.booleans(), st.sampled_from(["read", "read", "read", "start", "give up"]), st.integers(1, 300), st.booleans()
    ),
    max_size=30,
)


@given(STEPS, st.booleans(), st.sampled_from(["", "gid", "chid", "eids"]))
def test_both_ends_always_agree_and_no_application_byte_is_lost(steps, declines, mismatch):
    changes = {"gid": {"gid": Gid(8)}, "chid": {"chid": 0xFF01}, "eids": {"eids": ("C",)}, "": {}}[mismatch]
    to_server, to_client = bytearray(), bytearray()
    client = End(ClientHandshake(CLIENT), to_client, to_server, CLIENT_DATA)
    server = End(ServerHandshake(dataclasses.replace(SERVER, **changes)), to_server, to_client, SERVER_DATA)
    for on_client, what, size, decline in steps:
        end = client if on_client else server
        if what == "read":
            end.read(size, decline and declines)
        elif what == "start":
            end.start()
        else:
            end.give_up()
    client.start()
    for _ in range(10):
        server.read(1000, False)
        client.read(1000, False)
    states = {client.machine.state, server.machine.state}
    if states == {State.CONFIRMED}:
        assert not mismatch
        assert (to_server, to_client) == (b"", b"")
    else:
        assert states == {State.FALLBACK}
        assert (bytes(to_server), bytes(to_client)) == (CLIENT_DATA, SERVER_DATA)


@given(st.booleans(), st.booleans(), st.lists(st.binary(min_size=1, max_size=80), max_size=8))
def test_hostile_bytes_give_an_event_or_a_handshake_error(on_client, started, pieces):
    machine = ClientHandshake(CLIENT) if on_client else ServerHandshake(SERVER)
    if on_client and started:
        machine.start()
    for piece in pieces:
        if not machine.bytes_wanted:
            break
        try:
            machine.receive(piece[: machine.bytes_wanted])
        except HandshakeError:
            assert machine.state is State.BROKEN
    assert machine.state is not State.CONFIRMED


@given(st.integers(0, 223))
def test_eof_after_any_number_of_bytes_is_a_clean_close_or_an_error(size):
    server = ServerHandshake(SERVER)
    for byte in ClientHandshake(CLIENT).start()[:size]:
        server.receive(bytes([byte]))
    try:
        assert server.receive_eof() == ClosedBeforeStart()
        assert size == 0
    except HandshakeError:
        assert size > 0
    assert server.finished

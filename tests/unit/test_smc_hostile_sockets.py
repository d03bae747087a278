# SPDX-License-Identifier: Apache-2.0
"""Hostile clients of blocking sockets: they speak raw bytes over TCP to a server that serves others.

Each attack is met with a DECLINE or the end of the connection within the time of a handshake message. Meanwhile an
honest client is served, by the same loop around `accept`; afterwards no region is left.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fallback_rig import LIMIT_S, Call, Fabrics, until
from hostile_rig import (
    CLOSED,
    FALSE_REGIONS,
    KIB,
    NO_ANSWER,
    NO_MESSAGE,
    NO_PROPOSAL,
    POLICIES,
    Attacker,
    expect_shared_memory,
    number,
    poked,
    victims,
)

from ism.ids import DevId, Gid, Token
from ism.smc.clc import AnswerHead, Header, MessageType
from ism.smc.diagnosis import Diagnosis
from ism.smc.handshake_machine import ClientHandshake


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fabrics]:
    with victims(monkeypatch) as made:
        yield made


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    expect_shared_memory(monkeypatch, request.param)
    return str(request.param)


class Serving:
    """A server in threads: accepts for ever and echoes. Attributes: `listener`, `address`."""

    def __init__(self, listener: Any) -> None:
        self.listener = listener
        self.address = listener.getsockname()
        self._handled: dict[int, Call] = {}
        self._loop = Call(self._serve)

    def _serve(self) -> None:
        while True:
            sock, address = self.listener.accept()
            self._handled[address[1]] = Call(lambda sock=sock: self._echo(sock))

    @staticmethod
    def _echo(sock: Any) -> str:
        with sock:
            try:
                while data := sock.recv(10000):
                    sock.sendall(data)
            except OSError as exc:
                return type(exc).__name__
            return "the end"

    def outcome(self, port: int) -> str:
        """What became of a connection, in the server."""
        until(lambda: port in self._handled)
        return str(self._handled[port].result())

    def serves(self) -> None:
        assert self._loop.is_alive(), "the loop around accept has ended"


@pytest.fixture
def serving(rig: Fabrics, policy: str) -> Serving:
    return Serving(rig.listen())


def honest(rig: Fabrics, serving: Serving) -> None:
    """A client with manners is served."""
    serving.serves()
    with rig.connect(serving.address) as client:
        client.settimeout(LIMIT_S)
        client.sendall(b"good morning")
        assert client.recv(100) == b"good morning"
        assert client.smc_info().mode == "SMC"


@contextlib.contextmanager
def attacking(rig: Fabrics, serving: Serving) -> Iterator[Attacker]:
    """Lend an attacker who has connected as a client."""
    assert rig.server is not None
    attacker = Attacker(rig, socket.create_connection(serving.address), rig.server)
    try:
        yield attacker
    finally:
        attacker.close()


def attacked(rig: Fabrics, serving: Serving, attack: Callable[[Attacker], None]) -> str:
    """Let an attacker be a client, an honest client be served meanwhile; return how it ends for the attacker."""
    with attacking(rig, serving) as attacker:
        attack(attacker)
        honest(rig, serving)
        verdict = attacker.verdict()
        port = attacker.sock.getsockname()[1]
    serving.outcome(port)
    honest(rig, serving)
    return verdict


# Messages that are none -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [*NO_MESSAGE, *NO_PROPOSAL])
def test_a_proposal_that_is_none_ends_the_connection_and_nothing_else(
    rig: Fabrics, serving: Serving, damage: str
) -> None:
    def attack(attacker: Attacker) -> None:
        good = ClientHandshake(attacker.identity()).start()
        attacker.send({**NO_MESSAGE, **NO_PROPOSAL}[damage](good))

    assert attacked(rig, serving, attack) == CLOSED


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"gid": Gid(0x999)}, Diagnosis.NOSMCD2DEV),
        ({"chid": 0xFF07}, Diagnosis.NOSMCD2DEV),
        ({"eids": ("SOMEBODY-ELSE",)}, Diagnosis.NOUEID),
        ({"devid": DevId(0x7777)}, Diagnosis.MEM),
    ],
    ids=["another domain", "another fabric", "another EID", "a device that is not there"],
)
def test_an_offer_that_does_not_suit_is_declined(
    rig: Fabrics, serving: Serving, changes: dict[str, Any], code: Diagnosis
) -> None:
    def attack(attacker: Attacker) -> None:
        attacker.send(ClientHandshake(attacker.identity(**changes)).start())

    assert attacked(rig, serving, attack) == code.name


# Messages that do not come, or not whole ------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 8, 9, 100, 223])
@pytest.mark.parametrize("then", ["silence", "end", "reset"])
def test_a_part_of_a_proposal_is_not_waited_for_longer_than_a_message_may_take(
    rig: Fabrics, serving: Serving, length: int, then: str
) -> None:
    def attack(attacker: Attacker) -> None:
        attacker.send(ClientHandshake(attacker.identity()).start()[:length])
        if then == "end":
            attacker.sock.shutdown(socket.SHUT_WR)
        elif then == "reset":
            attacker.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            attacker.sock.close()
            attacker.sock = socket.create_connection(serving.address)  # for the verdict: nobody answers a closed one
            attacker.sock.shutdown(socket.SHUT_RDWR)

    began = time.monotonic()
    assert attacked(rig, serving, attack) in (CLOSED, "TIMEOUT_CL")
    assert time.monotonic() - began < LIMIT_S / 2


def test_a_trickle_without_end_is_not_waited_for(rig: Fabrics, serving: Serving) -> None:
    def attack(attacker: Attacker) -> None:
        message = ClientHandshake(attacker.identity()).start()

        def trickle() -> None:
            with contextlib.suppress(OSError):
                for byte in itertools.chain(message[:60], itertools.repeat(0)):
                    attacker.sock.send(bytes([byte]))
                    time.sleep(0.02)

        Call(trickle)

    assert attacked(rig, serving, attack) in (CLOSED, "TIMEOUT_CL")


def test_many_that_say_nothing_keep_nobody_from_being_served(rig: Fabrics, serving: Serving) -> None:
    idle = [socket.create_connection(serving.address) for _ in range(60)]
    honest(rig, serving)
    for sock in idle:
        sock.close()
    honest(rig, serving)


def test_many_that_propose_and_say_no_more_keep_nobody_from_being_served(rig: Fabrics, serving: Serving) -> None:
    with contextlib.ExitStack() as stack:
        attackers = [stack.enter_context(attacking(rig, serving)) for _ in range(40)]
        for attacker in attackers:
            attacker.send(ClientHandshake(attacker.identity()).start())
        honest(rig, serving)
        assert {attacker.verdict() for attacker in attackers} == {CLOSED}
        honest(rig, serving)


def test_proposals_without_end_end_the_connection(rig: Fabrics, serving: Serving) -> None:
    def attack(attacker: Attacker) -> None:
        message = ClientHandshake(attacker.identity()).start()
        attacker.send(message * 500)

    assert attacked(rig, serving, attack) == CLOSED


# Answers ---------------------------------------------------------------------------------------------------------

FALSE_CONFIRM: dict[str, Callable[[bytes], bytes]] = {
    "another domain": lambda good: poked(good, AnswerHead.offset_of("gid"), *(5).to_bytes(8, "big")),
    "another device": lambda good: poked(good, AnswerHead.offset_of("devid"), *(5).to_bytes(8, "big")),
    "another fabric": lambda good: number(good, AnswerHead, "chid", 0xFF09),
    "another EID": lambda good: poked(good, AnswerHead.offset_of("eid"), 0x41, 0x42),
    "an ACCEPT": lambda good: number(good, Header, "kind", MessageType.ACCEPT),
}


@pytest.mark.parametrize("damage", [*NO_ANSWER, *FALSE_CONFIRM])
def test_a_confirm_that_is_none_ends_the_connection_and_nothing_else(
    rig: Fabrics, serving: Serving, damage: str
) -> None:
    def attack(attacker: Attacker) -> None:
        attacker.send({**NO_ANSWER, **FALSE_CONFIRM}[damage](attacker.answer("client")))

    assert attacked(rig, serving, attack) == CLOSED


@pytest.mark.parametrize("then", ["silence", "end", "half a CONFIRM", "another PROPOSAL"])
def test_a_client_that_does_not_confirm_is_not_waited_for(rig: Fabrics, serving: Serving, then: str) -> None:
    def attack(attacker: Attacker) -> None:
        machine, _accept = attacker.accepted()
        if then == "end":
            attacker.sock.shutdown(socket.SHUT_WR)
        elif then == "half a CONFIRM":
            attacker.send(machine.confirm(Token(77), 64 * KIB)[:60])
        elif then == "another PROPOSAL":
            attacker.send(ClientHandshake(attacker.identity()).start())

    assert attacked(rig, serving, attack) == CLOSED


def test_a_client_that_declines_after_accept_goes_on_in_tcp_or_not_at_all(
    rig: Fabrics, serving: Serving, policy: str
) -> None:
    with attacking(rig, serving) as attacker:
        machine, _accept = attacker.accepted()
        attacker.send(machine.decline(Diagnosis.MEM) + b"by TCP")
        honest(rig, serving)
        if policy == "peers":
            assert attacker.sock.recv(100) == b"by TCP"
        else:
            assert attacker.message() is None


@pytest.mark.parametrize("answer", FALSE_REGIONS, ids=lambda answer: answer.__name__)
def test_a_region_that_is_not_the_clients_to_give_ends_the_connection(
    rig: Fabrics, serving: Serving, answer: Callable[[Attacker, str], bytes]
) -> None:
    client = rig.connect(serving.address)
    client.sendall(b"before")
    assert client.recv(6) == b"before"
    assert attacked(rig, serving, lambda attacker: attacker.send(answer(attacker, "client"))) == CLOSED
    client.sendall(b"after")
    assert client.recv(5) == b"after"

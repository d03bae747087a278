# SPDX-License-Identifier: Apache-2.0
"""Hostile servers of blocking sockets, peers that lie after an honest handshake, clients that lie in the directory."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fallback_rig import LOOPBACK, Call, Fabrics, check, converse, exchange, until
from hostile_rig import (
    CLOSED,
    FALSE_REGIONS,
    NO_ANSWER,
    POLICIES,
    Attacker,
    expect_shared_memory,
    poked,
    region_of_another_connection,
    victims,
)

from ism.driver import Device
from ism.driver.directory import FourTuple
from ism.errors import DeviceError
from ism.smc import clc
from ism.smc.addresses import packed
from ism.smc.clc import AnswerHead
from ism.smc.diagnosis import Diagnosis
from ism.smc.handshake_machine import ClientHandshake
from ism.smc.link import Stage
from ism.smc.rendezvous import scope_of


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fabrics]:
    with victims(monkeypatch) as made:
        yield made


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    expect_shared_memory(monkeypatch, request.param)
    return str(request.param)


OWN_FALSE_REGIONS = [region for region in FALSE_REGIONS if region is not region_of_another_connection]


# Servers that lie ------------------------------------------------------------------------------------------------


def betrayed(rig: Fabrics, attack: Callable[[Attacker], None]) -> tuple[str, str]:
    """Let an attacker be a server. Returns how it ends for the client, and for the attacker."""
    assert rig.client is not None
    with socket.create_server((LOOPBACK, 0)) as listener:
        client = rig.connect(listener.getsockname())
        attacker = Attacker(rig, listener.accept()[0], rig.client)
        try:
            calling = Call(lambda: call(client))
            attack(attacker)
            verdict = attacker.verdict()
            if verdict == CLOSED:
                attacker.sock.close()
            else:
                attacker.send(b"by TCP")
            return calling.result(), verdict
        finally:
            attacker.close()


def call(client: Any) -> str:
    """What a client's program gets."""
    with client:
        try:
            client.sendall(b"hello")
            return str(client.recv(100))
        except OSError as exc:
            return type(exc).__name__


@pytest.mark.parametrize("damage", NO_ANSWER)
def test_an_accept_that_is_none_is_an_error_for_the_client(rig: Fabrics, policy: str, damage: str) -> None:
    outcome, verdict = betrayed(rig, lambda attacker: attacker.send(NO_ANSWER[damage](attacker.answer("server"))))
    assert (outcome, verdict) == ("ConnectionResetError", CLOSED)


@pytest.mark.parametrize("answer", OWN_FALSE_REGIONS, ids=lambda answer: answer.__name__)
def test_a_region_that_is_not_the_servers_to_give_is_declined(
    rig: Fabrics, policy: str, answer: Callable[[Attacker, str], bytes]
) -> None:
    outcome, verdict = betrayed(rig, lambda attacker: attacker.send(answer(attacker, "server")))
    assert verdict in ("MEM", "INTERR")
    assert outcome == ("b'by TCP'" if policy == "peers" else "ConnectionResetError")


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("gid", 5, Diagnosis.NOSMCD2DEV),
        ("devid", 0, Diagnosis.NOSMCD2DEV),
        ("eid", int.from_bytes(b"ANOTHER ", "big"), Diagnosis.NOUEID),
    ],
)
def test_an_accept_that_does_not_suit_is_declined(
    rig: Fabrics, policy: str, field: str, value: int, code: Diagnosis
) -> None:
    def attack(attacker: Attacker) -> None:
        good = attacker.answer("server")
        attacker.send(poked(good, AnswerHead.offset_of(field), *value.to_bytes(8, "big")))

    outcome, verdict = betrayed(rig, attack)
    assert verdict == code.name
    assert outcome == ("b'by TCP'" if policy == "peers" else "ConnectionResetError")


@pytest.mark.parametrize("length", [1, 8, 129])
def test_a_part_of_an_accept_is_not_waited_for(rig: Fabrics, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setenv("ISM_SMC_PEERS", LOOPBACK)
    _outcome, verdict = betrayed(rig, lambda attacker: attacker.send(attacker.answer("server")[:length]))
    assert verdict in (CLOSED, "TIMEOUT_CL")


def test_a_server_that_says_nothing_gets_tcp(rig: Fabrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISM_SMC_PEERS", LOOPBACK)

    def attack(attacker: Attacker) -> None:
        machine = attacker.proposed()
        attacker.send(machine.decline(Diagnosis.CNFERR))  # too late: what the client still waits for

    outcome, _verdict = betrayed(rig, attack)
    assert outcome == "b'by TCP'"


# Peers that are honest in the handshake, and lie later ----------------------------------------------------------


def test_bytes_that_a_peer_sends_over_tcp_do_not_keep_a_polling_program_busy(rig: Fabrics) -> None:
    client, server = rig.pair()
    exchange(client, server)
    server.setblocking(False)
    assert not readable(server)
    for _ in range(3):
        socket.SocketType.send(client, b"junk" * 100)
        until(lambda: readable(server))
        with pytest.raises(BlockingIOError):
            server.recv(100)
        assert not readable(server)
    client.sendall(b"by memory")
    until(lambda: readable(server))
    assert server.recv(100) == b"by memory"
    server.setblocking(True)
    converse(client, server)
    check(client, server, "SMC")


def test_what_is_sent_past_a_socket_is_an_error_and_not_a_loss(rig: Fabrics) -> None:
    """As when a program, or the standard event loop, hands the descriptor to `os.sendfile`."""
    client, server = rig.pair()
    exchange(client, server)
    server.setblocking(False)
    assert not readable(server)
    socket.SocketType.sendall(client, bytes(20000))
    until(lambda: readable(server))
    with pytest.raises(ConnectionAbortedError):
        server.recv(100)
    with pytest.raises(ConnectionResetError):
        client.recv(100)


def readable(sock: Any) -> bool:
    return bool(select.select([sock.fileno()], [], [], 0)[0])


# Clients of the directory that lie ------------------------------------------------------------------------------


@contextlib.contextmanager
def intending(rig: Fabrics, listener: Any, nonce: int = 0x1234_5678_9ABC_DEF0) -> Iterator[Attacker]:
    """Lend an attacker whose connection is in the directory, as a client's is, with a nonce of its own choice."""
    assert rig.server is not None
    sock = socket.socket()
    sock.bind((LOOPBACK, 0))
    attacker = Attacker(rig, sock, rig.server)
    try:
        host, port = listener.getsockname()
        here = sock.getsockname()
        assert attacker.device.directory is not None
        four_tuple = FourTuple(packed(here[0]), here[1], packed(host), port, scope_of(sock))
        assert attacker.device.directory.intend(four_tuple, nonce)
        sock.connect((host, port))
        yield attacker
    finally:
        attacker.close()


@pytest.mark.parametrize("length", [16, 224], ids=["the head", "all"])
def test_a_proposal_with_another_nonce_is_data_of_a_client_that_speaks_tcp(rig: Fabrics, length: int) -> None:
    listener = rig.listen()
    with intending(rig, listener) as attacker:
        server = rig.accept(listener)
        until(lambda: server._link.stage is Stage.AGREED)
        message = ClientHandshake(attacker.identity(), 0x0BAD).start()[:length]
        attacker.send(message)
        assert server.recv(1000) == message
        assert server.smc_info().code == Diagnosis.PEERNOSMC
        assert attacker.verdict() == "PEERNOSMC"


def test_a_few_bytes_that_could_begin_a_proposal_are_data_after_the_time_of_a_message(rig: Fabrics) -> None:
    listener = rig.listen()
    with intending(rig, listener) as attacker:
        server = rig.accept(listener)
        until(lambda: server._link.stage is Stage.AGREED)
        attacker.send(clc.SMCR[:2])
        receiving = Call(lambda: server.recv(3, socket.MSG_WAITALL))
        assert attacker.verdict() in ("TIMEOUT_CL", "PEERNOSMC")
        attacker.send(b"!")
        assert receiving.result() == clc.SMCR[:2] + b"!"
        attacker.send(b"more")
        assert server.recv(1000) == b"more"
        server.sendall(b"answer")
        assert attacker.sock.recv(100) == b"answer"


@pytest.mark.parametrize("first", ["client", "server"])
def test_a_client_of_the_directory_that_says_nothing_gets_tcp(rig: Fabrics, first: str) -> None:
    listener = rig.listen()
    with intending(rig, listener) as attacker:
        server = rig.accept(listener)
        if first == "server":
            server.sendall(b"banner")
            assert attacker.verdict() == "TIMEOUT_CL"
            assert attacker.sock.recv(100) == b"banner"
        else:
            attacker.send(b"hello")
            assert server.recv(100) == b"hello"
        assert server.smc_info().mode == "TCP"


def test_a_device_cannot_intend_a_connection_of_another(rig: Fabrics) -> None:
    listener = rig.listen()
    with intending(rig, listener, nonce=1) as attacker:
        third = Device(rig.fabric.plug())
        try:
            host, port = listener.getsockname()
            here = attacker.sock.getsockname()
            four_tuple = FourTuple(packed(here[0]), here[1], packed(host), port, scope_of(attacker.sock))
            assert third.directory is not None
            with pytest.raises(DeviceError):
                third.directory.intend(four_tuple, 2)
        finally:
            third.close()
        honest_server = rig.accept(listener)
        attacker.send(b"hello")
        assert honest_server.recv(100) == b"hello"

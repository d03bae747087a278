# SPDX-License-Identifier: Apache-2.0
"""Who meets whom: every pair of programs ends as SMC or as TCP on both ends, says why, and loses no byte.

Each case says what an end is told (`smc_info()`, counters), and is run with the client speaking first, with the server
speaking first, and with both speaking at once.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from fallback_rig import (
    LOOPBACK,
    ORDERS,
    Call,
    Ends,
    Fabrics,
    Proxy,
    attempt,
    check,
    converse,
    counted,
    exchange,
    fabrics,
    together,
    until,
    using,
)

from ism.driver import Device
from ism.smc import blocking, handshake, link, rendezvous
from ism.smc.diagnosis import Diagnosis
from ism.smc.link import Stage
from ism.testing import Fabric
from ism.virtio.ism_spec import EventType, IsmFeature

first = pytest.mark.parametrize("first", ORDERS)
WITHOUT_DIRECTORY = (IsmFeature.EVENT_IRQ, IsmFeature.EVENT_VQ)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fabrics]:
    """Two devices that know nothing of each other."""
    monkeypatch.setenv("ISM_SMC_BUFFER", "64K")
    with fabrics() as made:
        yield made


@pytest.fixture(params=["first", "again"])
def either(rig: Fabrics, request: pytest.FixtureRequest) -> Fabrics:
    """Two devices, with or without an earlier connection whose regions are kept."""
    rig.again = request.param == "again"
    return rig


def plain_server() -> socket.socket:
    return socket.create_server((LOOPBACK, 0))


# Both ends use shared memory ------------------------------------------------------------------------------------


@first
def test_two_ends_with_a_device_of_one_domain_use_shared_memory(either: Fabrics, first: str) -> None:
    with counted():
        client, server = either.pair()
        converse(client, server, first)
        check(client, server, "SMC")


@first
def test_a_plain_client_of_an_smc_server_gets_tcp(either: Fabrics, first: str) -> None:
    listener = either.listen()
    with counted(Diagnosis.PEERNOSMC):
        client = either.keep(socket.create_connection(listener.getsockname()))
        server = either.accept(listener)
        converse(client, server, first)
        check(client, server, "TCP", server_code=Diagnosis.PEERNOSMC, server_why="did not offer")


@first
def test_an_smc_client_of_a_plain_server_gets_tcp(either: Fabrics, first: str) -> None:
    with plain_server() as listener, counted(Diagnosis.PEERNOSMC):
        client = either.connect(listener.getsockname())
        server = either.keep(listener.accept()[0])
        converse(client, server, first)
        check(client, server, "TCP", client_code=Diagnosis.PEERNOSMC, client_why="nobody has published")


@pytest.mark.parametrize(
    ("host", "options", "target"),
    [
        ("127.0.0.1", {}, "127.0.0.1"),
        ("127.0.0.7", {}, "127.0.0.7"),
        ("0.0.0.0", {}, "127.0.0.1"),
        ("0.0.0.0", {}, "127.3.2.1"),
        ("::1", {}, "::1"),
        ("::", {}, "::1"),
        ("::", {"dualstack": True}, "127.0.0.1"),
        ("::", {"dualstack": True}, "::1"),
    ],
)
def test_every_address_of_a_listener_is_found(either: Fabrics, host: str, options: Any, target: str) -> None:
    listener = either.listen(host, **options)
    client = either.connect((target, listener.getsockname()[1]))
    server = either.accept(listener)
    converse(client, server)
    check(client, server, "SMC")


def test_connections_of_other_kinds_of_connect_use_shared_memory_too(either: Fabrics) -> None:
    listener = either.listen()
    bound, without_waiting, with_a_name = (either.keep(blocking.socket()) for _ in range(3))
    bound.bind((LOOPBACK, 0))
    without_waiting.setblocking(False)
    with using(either.client):
        assert bound.connect_ex(listener.getsockname()) == 0
        with pytest.raises(BlockingIOError):
            without_waiting.connect(listener.getsockname())
        with_a_name.connect(("localhost", listener.getsockname()[1]))
    for client in (bound, without_waiting, with_a_name):
        server = either.accept(listener)
        client.settimeout(None)
        converse(client, server)
        check(client, server, "SMC")


def test_a_refused_connection_is_refused_and_the_socket_can_try_again(rig: Fabrics) -> None:
    with plain_server() as unlistened:
        nobody = unlistened.getsockname()
    rig.publish(nobody)
    sock = rig.keep(blocking.socket())
    with using(rig.client):
        with pytest.raises(ConnectionRefusedError):
            sock.connect(nobody)
        assert sock.connect_ex(nobody) in (errno.ECONNREFUSED, errno.ECONNABORTED)
        assert not rig.fabric.registry.directory.members[rig.client.devid].intents
        listener = rig.listen()
        again = rig.keep(blocking.socket())
        again.connect(listener.getsockname())
    converse(again, rig.accept(listener))


# One end does not -----------------------------------------------------------------------------------------------


@first
def test_an_address_that_is_published_but_served_by_a_plain_program_gets_tcp(either: Fabrics, first: str) -> None:
    with plain_server() as listener, counted(Diagnosis.PEERNOSMC):
        either.publish(listener.getsockname())
        client = either.connect(listener.getsockname())
        assert client.smc_info().mode == "pending"
        server = either.keep(listener.accept()[0])
        converse(client, server, first)
        check(client, server, "TCP", client_code=Diagnosis.PEERNOSMC, client_why="did not claim")
        assert either.fabric.registry.directory.members[either.client.devid].stats.retractions == 1


@first
def test_a_plain_server_in_the_place_of_one_with_shared_memory_gets_tcp(rig: Fabrics, first: str) -> None:
    """The client offers the regions of the connection before to a server that is there still, but accepts no more."""
    earlier = rig.listen()
    address = earlier.getsockname()
    rig.use(earlier)
    earlier.close()
    with socket.create_server(address) as listener:
        client = rig.connect(address)
        server = rig.keep(listener.accept()[0])
        converse(client, server, first)
        check(client, server, "TCP", client_code=Diagnosis.PEERNOSMC)
    later = rig.listen(port=address[1])
    client = rig.connect(address)
    server = rig.accept(later)
    converse(client, server, first)
    assert client.smc_info().mode == server.smc_info().mode


@first
@pytest.mark.parametrize("who", ["client", "server"])
def test_an_end_that_is_switched_off_makes_it_tcp(either: Fabrics, who: str, first: str) -> None:
    listener = either.listen(smc="off" if who == "server" else None)
    client = either.connect(listener.getsockname(), smc="off" if who == "client" else None)
    server = either.accept(listener)
    converse(client, server, first)
    code = {who: Diagnosis.CNFERR}
    check(
        client,
        server,
        "TCP",
        client_code=code.get("client", Diagnosis.PEERNOSMC),
        server_code=code.get("server", Diagnosis.PEERNOSMC),
        **{f"{who}_why": "switched off"},
    )


@first
@pytest.mark.parametrize("who", ["client", "server", "both"])
def test_an_end_without_a_manager_gets_tcp(rig: Fabrics, who: str, first: str) -> None:
    ends = Ends(None if who != "server" else rig.client, None if who != "client" else rig.server)
    try:
        client, server = ends.pair()
        converse(client, server, first)
        code = {True: Diagnosis.NOSMCDDEV, False: Diagnosis.PEERNOSMC}
        check(client, server, "TCP", client_code=code[ends.client is None], server_code=code[ends.server is None])
    finally:
        ends.client = ends.server = None
        ends.close()


@first
def test_a_proxy_in_between_makes_it_tcp_on_both_sides_of_it(either: Fabrics, first: str) -> None:
    listener = either.listen()
    proxy = Proxy(listener.getsockname())
    try:
        with counted(Diagnosis.PEERNOSMC, Diagnosis.PEERNOSMC):
            client = either.connect(proxy.address)
            server = either.accept(listener)
            converse(client, server, first)
            check(client, server, "TCP", client_code=Diagnosis.PEERNOSMC, server_code=Diagnosis.PEERNOSMC)
    finally:
        proxy.close()


@first
def test_a_proxy_whose_address_is_published_does_not_claim_so_it_is_tcp(either: Fabrics, first: str) -> None:
    listener = either.listen()
    proxy = Proxy(listener.getsockname())
    try:
        either.publish(proxy.address)
        client = either.connect(proxy.address)
        assert client.smc_info().mode == "pending"
        server = either.accept(listener)
        converse(client, server, first)
        check(client, server, "TCP", client_code=Diagnosis.PEERNOSMC, server_code=Diagnosis.PEERNOSMC)
    finally:
        proxy.close()


@first
def test_a_proxy_that_uses_shared_memory_itself_does_so_on_both_sides(either: Fabrics, first: str) -> None:
    listener = either.listen()
    with using(either.server):
        proxy = Proxy(listener.getsockname(), make=blocking.socket)
        try:
            client = either.connect(proxy.address)
            server = either.accept(listener)
            converse(client, server, first)
            check(client, server, "SMC")
        finally:
            proxy.close()


# Domains and devices --------------------------------------------------------------------------------------------


@first
def test_peers_in_two_domains_get_tcp(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    with fabrics(other=Fabric(gid=0x222)) as rig, counted(Diagnosis.PEERNOSMC, Diagnosis.PEERNOSMC):
        client, server = rig.pair()
        converse(client, server, first)
        check(client, server, "TCP", client_code=Diagnosis.PEERNOSMC, server_code=Diagnosis.PEERNOSMC)


@first
def test_peers_in_two_domains_that_are_configured_as_peers_decline(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    monkeypatch.setenv("ISM_SMC_PEERS", "127.0.0.0/8")
    with fabrics(other=Fabric(gid=0x222)) as rig:
        client, server = rig.pair()
        converse(client, server, first)
        check(client, server, "TCP", client_code=Diagnosis.NOSMCD2DEV, server_code=Diagnosis.NOSMCD2DEV)


@first
def test_without_a_directory_it_is_tcp(rig: Fabrics, first: str) -> None:
    ends = Ends(*(Device(rig.fabric.plug(features=WITHOUT_DIRECTORY)) for _ in range(2)))
    try:
        client, server = ends.pair()
        converse(client, server, first)
        check(
            client,
            server,
            "TCP",
            client_code=Diagnosis.PEERNOSMC,
            server_code=Diagnosis.PEERNOSMC,
            client_why="no directory",
            server_why="no directory",
        )
    finally:
        ends.close()


@first
def test_without_a_directory_configured_peers_use_shared_memory(
    rig: Fabrics, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    monkeypatch.setenv("ISM_SMC_PEERS", "127.0.0.0/8")
    ends = Ends(*(Device(rig.fabric.plug(features=WITHOUT_DIRECTORY)) for _ in range(2)))
    try:
        client, server = ends.pair()
        converse(client, server, first)
        check(client, server, "SMC")
    finally:
        ends.close()


@first
def test_loopback_addresses_of_two_network_namespaces_are_not_the_same(
    monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    with fabrics(namespace=7) as rig:
        client, server = rig.pair()
        converse(client, server, first)
        check(client, server, "TCP", client_code=Diagnosis.PEERNOSMC, server_code=Diagnosis.PEERNOSMC)


# What is lost or late -------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten what is waited for when something is late."""
    monkeypatch.setattr(link, "RETRACT_WAIT_S", 0.1)
    monkeypatch.setattr(link, "CLIENT_PATIENCE_S", 0.3)
    monkeypatch.setattr(link, "SERVER_PATIENCE_S", 0.1)
    monkeypatch.setattr(handshake, "MESSAGE_TIMEOUT_S", 0.6)


@first
def test_a_claim_of_which_the_client_is_not_told_counts(either: Fabrics, first: str) -> None:
    either.lose_events(EventType.CLAIMED)
    client, server = either.pair()
    converse(client, server, first)
    check(client, server, "SMC")


def test_a_server_that_speaks_first_makes_a_client_begin_that_does_nothing(either: Fabrics) -> None:
    client, server = either.pair()
    together(lambda: server.sendall(b"first"))
    assert server.smc_info().mode == "SMC"
    assert client.recv(5) == b"first"
    converse(client, server)
    check(client, server, "SMC")


@pytest.mark.parametrize("lost", [(EventType.START,), (EventType.START, EventType.CLAIMED)])
def test_a_server_that_cannot_wake_the_client_goes_on_in_tcp(
    rig: Fabrics, short: None, lost: tuple[EventType, ...]
) -> None:
    rig.lose_events(*lost)
    with counted(Diagnosis.TIMEOUT_CL, Diagnosis.TIMEOUT_CL):
        client, server = rig.pair()
        together(lambda: server.sendall(b"first"))
        assert client.recv(5) == b"first"
        converse(client, server)
        check(client, server, "TCP", client_code=Diagnosis.TIMEOUT_CL, server_code=Diagnosis.TIMEOUT_CL)


@first
def test_a_server_whose_device_is_slow_gets_tcp_and_all_bytes(rig: Fabrics, short: None, first: str) -> None:
    client, server = rig.pair()
    until(lambda: client._link.stage is Stage.AGREED)
    rig.server.transport.pause()
    converse(client, server, first)
    rig.server.transport.resume()
    either = (Diagnosis.TIMEOUT_CL, Diagnosis.INTERR)  # both lose their patience at the same time
    check(client, server, "TCP", client_code=either, server_code=Diagnosis.INTERR)
    until(lambda: not rig.fabric.registry.regions)


@first
def test_a_client_whose_device_is_slow_gets_tcp_and_all_bytes(rig: Fabrics, short: None, first: str) -> None:
    client, server = rig.pair()
    until(lambda: client._link.stage is Stage.AGREED)
    rig.client.transport.pause()
    converse(client, server, first)
    rig.client.transport.resume()
    check(client, server, "TCP", client_code=Diagnosis.INTERR, server_code=Diagnosis.INTERR)
    until(lambda: not rig.fabric.registry.regions)


@first
def test_a_manager_that_answers_no_intent_makes_it_tcp(rig: Fabrics, short: None, first: str) -> None:
    listener = rig.listen()
    converse(rig.connect(listener.getsockname()), rig.accept(listener))  # so that no look-up is needed
    rig.client.transport.pause()
    client = rig.connect(listener.getsockname())
    server = rig.accept(listener)
    converse(client, server, first)
    check(client, server, "TCP", client_code=Diagnosis.INTERR, server_code=Diagnosis.PEERNOSMC)
    rig.client.transport.resume()


@first
def test_a_look_up_that_is_not_answered_makes_it_tcp(rig: Fabrics, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    monkeypatch.setattr(rendezvous, "COMMAND_WAIT_S", 0.1)
    monkeypatch.setattr(blocking, "COMMAND_WAIT_S", 0.1)
    listener = rig.listen()
    rig.client.transport.pause()
    client = rig.connect(listener.getsockname())
    server = rig.accept(listener)
    converse(client, server, first)
    check(client, server, "TCP", client_code=Diagnosis.INTERR, server_code=Diagnosis.PEERNOSMC)
    rig.client.transport.resume()


@pytest.mark.parametrize("who", ["client", "server"])
def test_an_end_that_gives_its_descriptor_away_makes_it_tcp(rig: Fabrics, who: str) -> None:
    client, server = rig.pair()
    giver, other = (client, server) if who == "client" else (server, client)
    giving = Call(giver.dup)
    until(lambda: giver._link is None or giver._link.stage is Stage.TCP)
    other.sendall(b"first")
    copy = rig.keep(giving.result())
    assert copy.recv(5) == b"first"
    converse(copy, other)
    check(client, server, "TCP", client_code=Diagnosis.OPTUNSUPP, server_code=Diagnosis.OPTUNSUPP)


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_connection_that_took_the_regions_of_another_is_over_shared_memory_at_once(rig: Fabrics, who: str) -> None:
    rig.again = True
    client, server = rig.pair()
    copy = rig.keep((client if who == "client" else server).dup())
    exchange(*((copy, server) if who == "client" else (client, copy)))
    converse(client, server)
    check(client, server, "SMC")


# Shared memory or nothing ---------------------------------------------------------------------------------------


@first
@pytest.mark.parametrize(("client_smc", "server_smc"), [("require", None), (None, "require"), ("require", "require")])
def test_an_end_that_requires_it_gets_shared_memory_from_any_that_can(
    rig: Fabrics, client_smc: Any, server_smc: Any, first: str
) -> None:
    listener = rig.listen(smc=server_smc)
    for _ in range(2):
        client, server = rig.connect(listener.getsockname(), smc=client_smc), rig.accept(listener)
        converse(client, server, first)
        check(client, server, "SMC")
        client.close()
        server.close()


@first
def test_a_server_that_requires_it_refuses_a_plain_client(rig: Fabrics, short: None, first: str) -> None:
    listener = rig.listen(smc="require")
    client = rig.keep(socket.create_connection(listener.getsockname()))
    server = rig.accept(listener)
    if first != "server":
        client.sendall(b"hello")
    use = server.recv if first != "server" else server.sendall
    with pytest.raises(OSError, match=r"no CLC message|did not come in time"):
        use(100 if first != "server" else b"220 welcome")
    assert server.smc_info().mode == "broken"
    with contextlib.suppress(ConnectionResetError):
        while client.recv(100):
            pass


@first
def test_a_client_that_requires_it_fails_with_a_plain_server(
    rig: Fabrics, short: None, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    with plain_server() as listener:
        client = rig.connect(listener.getsockname(), smc="require")
        server = rig.keep(listener.accept()[0])
        server.settimeout(5)
        if first == "server":
            server.sendall(b"220 welcome")
        use = client.sendall if first == "client" else client.recv
        with pytest.raises(OSError, match=r"no CLC message|did not come in time"):
            use(b"hello" if first == "client" else 100)
        assert client.smc_info().mode == "broken"


def test_a_client_that_requires_it_fails_to_connect_without_a_device(rig: Fabrics) -> None:
    ends = Ends(None, rig.server)
    listener = rig.listen()
    with pytest.raises(ConnectionAbortedError, match="shared memory is required"):
        ends.connect(listener.getsockname(), smc="require")
    for sock in ends._open:
        sock.close()


def test_two_ends_that_require_it_and_have_no_domain_in_common_fail(short: None) -> None:
    with fabrics(other=Fabric(gid=0x222)) as rig:
        listener = rig.listen(smc="require")
        client, server = rig.connect(listener.getsockname(), smc="require"), rig.accept(listener)
        assert all(attempt(client, server))
        assert (client.smc_info().mode, server.smc_info().mode) == ("broken", "broken")
        assert Diagnosis(client.smc_info().code) is Diagnosis.NOSMCD2DEV

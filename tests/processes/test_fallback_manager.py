# SPDX-License-Identifier: Apache-2.0
"""A manager that is not there, dies, stands still or has nothing to give, at every moment of a connection's beginning.

First with in-memory devices, where a moment can be held; then with real managers, killed and stopped at many moments.
Whatever happens, both ends end in the same mode with all bytes in order; or, once CONFIRM was sent, with an error on
both. Nothing waits longer than the limits of `link` say, which are made shorter here.
"""

from __future__ import annotations

import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fallback_rig import (
    LIMIT_S,
    LOOPBACK,
    ORDERS,
    Call,
    Ends,
    Fabrics,
    ManagerProcess,
    Managers,
    attempt,
    check,
    converse,
    exchange,
    fabrics,
    manager_factory,
    together,
    until,
)

from ism.driver import Device
from ism.smc import blocking, default, handshake, link, rendezvous
from ism.smc.clc import SMCR
from ism.smc.diagnosis import Diagnosis
from ism.smc.link import Stage
from ism.virtio.ism_spec import EventType

pytestmark = pytest.mark.processes

ANY_CODE = tuple(Diagnosis)
first = pytest.mark.parametrize("first", ORDERS)


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISM_SMC_BUFFER", "64K")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten what is waited for when a manager does not answer."""
    monkeypatch.setattr(link, "RETRACT_WAIT_S", 0.05)
    monkeypatch.setattr(link, "CLIENT_PATIENCE_S", 0.15)
    monkeypatch.setattr(link, "SERVER_PATIENCE_S", 0.05)
    monkeypatch.setattr(handshake, "MESSAGE_TIMEOUT_S", 0.6)


@pytest.fixture
def rig() -> Iterator[Fabrics]:
    with fabrics() as made:
        yield made


# Killed, at a moment that is held -------------------------------------------------------------------------------

# Held moments: each returns the two ends, and what is done while they talk.
Moment = Callable[[Fabrics, Callable[[], None]], tuple[Any, Any, Callable[[], None]]]


def nothing() -> None:
    """Everything was done before they talk."""


def known(rig: Fabrics) -> Any:
    """Return a listener that the client has found before, so that it needs no look-up."""
    listener = rig.listen()
    converse(rig.connect(listener.getsockname()), rig.accept(listener), size=100)
    return listener


def agreed(rig: Fabrics) -> tuple[Any, Any]:
    """Connect, up to where both ends know that it is to be shared memory, and nothing more."""
    listener = rig.listen()
    client = rig.connect(listener.getsockname())
    server = rig.accept(listener)
    until(lambda: client._link.stage is server._link.stage is Stage.AGREED)
    return client, server


def before_the_intend_is_answered(rig: Fabrics, strike: Callable[[], None]) -> tuple[Any, Any, Callable[[], None]]:
    listener = known(rig)
    rig.client.transport.pause()
    client = rig.connect(listener.getsockname())
    strike()
    return client, rig.accept(listener), nothing


def between_intend_and_connect(rig: Fabrics, strike: Callable[[], None]) -> tuple[Any, Any, Callable[[], None]]:
    listener = rig.listen()
    prepare = blocking.socket._prepare

    def struck(sock: Any, address: Any) -> Any:
        prepared = prepare(sock, address)
        strike()
        return prepared

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocking.socket, "_prepare", struck)
        client = rig.connect(listener.getsockname())
    return client, rig.accept(listener), nothing


def before_accept(rig: Fabrics, strike: Callable[[], None]) -> tuple[Any, Any, Callable[[], None]]:
    listener = rig.listen()
    client = rig.connect(listener.getsockname())
    strike()
    return client, rig.accept(listener), nothing


def before_the_claim_is_found(rig: Fabrics, strike: Callable[[], None]) -> tuple[Any, Any, Callable[[], None]]:
    listener = rig.listen()
    client = rig.connect(listener.getsockname())
    rig.server.transport.pause()
    server = rig.accept(listener)
    strike()
    return client, server, nothing


def before_the_claim_is_told(rig: Fabrics, strike: Callable[[], None]) -> tuple[Any, Any, Callable[[], None]]:
    rig.lose_events(EventType.CLAIMED, EventType.START)
    listener = rig.listen()
    client = rig.connect(listener.getsockname())
    server = rig.accept(listener)
    until(lambda: server._link.stage is Stage.AGREED)
    strike()
    return client, server, nothing


def before_the_proposal(rig: Fabrics, strike: Callable[[], None]) -> tuple[Any, Any, Callable[[], None]]:
    client, server = agreed(rig)
    strike()
    return client, server, nothing


def before_the_allocation(rig: Fabrics, strike: Callable[[], None]) -> tuple[Any, Any, Callable[[], None]]:
    client, server = agreed(rig)
    rig.server.transport.pause()

    def during() -> None:
        assert rig.server.transport.wait_withheld(1, LIMIT_S)
        strike()

    return client, server, during


def before_the_confirm(rig: Fabrics, strike: Callable[[], None]) -> tuple[Any, Any, Callable[[], None]]:
    client, server = agreed(rig)
    rig.client.transport.pause()

    def during() -> None:
        assert rig.client.transport.wait_withheld(1, LIMIT_S)
        strike()

    return client, server, during


def before_the_server_attaches(rig: Fabrics, strike: Callable[[], None]) -> tuple[Any, Any, Callable[[], None]]:
    client, server = agreed(rig)
    attach = handshake.attach

    def struck(device: Device, answer: Any) -> Any:
        if device is rig.server:
            strike()
        return attach(device, answer)

    handshake.attach = struck

    def during() -> None:
        until(lambda: client._link.settled and server._link.settled)
        handshake.attach = attach

    return client, server, during


def before_an_offer_is_taken(rig: Fabrics, strike: Callable[[], None]) -> tuple[Any, Any, Callable[[], None]]:
    """The two have had a connection, whose regions the client offers for the next."""
    listener = after_another(rig)
    client = rig.connect(listener.getsockname())
    strike()
    return client, rig.accept(listener), nothing


def after_another(rig: Ends) -> Any:
    """Return a listener with which the client has had a connection."""
    listener = rig.listen()
    earlier = rig.connect(listener.getsockname()), rig.accept(listener)
    converse(*earlier, size=100)
    check(*earlier, "SMC")
    close(*earlier)
    return listener


BEFORE_CONFIRM = (
    before_the_intend_is_answered,
    between_intend_and_connect,
    before_accept,
    before_the_claim_is_found,
    before_the_claim_is_told,
    before_the_proposal,
    before_the_allocation,
    before_the_confirm,
)


moment = pytest.mark.parametrize("moment", BEFORE_CONFIRM, ids=lambda moment: moment.__name__)
which = pytest.mark.parametrize("which", [("client",), ("server",), ("client", "server")], ids="+".join)


@moment
@which
@first
@pytest.mark.usefixtures("short")
def test_a_manager_killed_before_confirm_leaves_both_ends_in_one_mode(
    rig: Fabrics, first: str, which: tuple[str, ...], moment: Moment
) -> None:
    client, server, during = moment(rig, lambda: rig.kill(*which))
    talking = Call(lambda: converse(client, server, first))
    during()
    for name in {"client", "server"} - {*which}:
        getattr(rig, name).transport.resume()
    talking.result()
    check(client, server, "TCP", client_code=ANY_CODE, server_code=ANY_CODE)


@which
@first
@pytest.mark.usefixtures("short")
def test_a_manager_killed_between_confirm_and_the_servers_attach_breaks_both_ends_or_none(
    rig: Fabrics, first: str, which: tuple[str, ...]
) -> None:
    client, server, during = before_the_server_attaches(rig, lambda: rig.kill(*which))
    talking = Call(lambda: attempt(client, server, first))
    during()
    errors = talking.result()
    assert all(errors) or not any(errors), errors


@pytest.mark.parametrize("moment", [*BEFORE_CONFIRM, before_an_offer_is_taken], ids=lambda moment: moment.__name__)
@which
@pytest.mark.parametrize("first", ["client", "server"])
@pytest.mark.usefixtures("short")
def test_a_manager_that_stands_still_before_confirm_leaves_both_ends_in_one_mode(
    rig: Fabrics, first: str, which: tuple[str, ...], moment: Moment
) -> None:
    def stop() -> None:
        for name in which:
            getattr(rig, name).transport.pause()

    client, server, during = moment(rig, stop)
    talking = Call(lambda: converse(client, server, first))
    during()
    talking.join(0.25)  # longer than everything has patience for
    for name in ("client", "server"):
        getattr(rig, name).transport.resume()
    talking.result()
    mode = client.smc_info().mode
    check(client, server, mode, client_code=ANY_CODE, server_code=ANY_CODE)


# Real managers, killed and stopped at many moments --------------------------------------------------------------

TURNS = 48


@pytest.fixture(scope="module")
def managers() -> Iterator[Managers]:
    with manager_factory() as made:
        yield made


def strike_after(delay_s: float, manager: ManagerProcess, number: signal.Signals) -> Call:
    """Send a signal in so many seconds from another thread."""

    def strike() -> None:
        due = time.monotonic() + delay_s
        while (left := due - time.monotonic()) > 0:
            time.sleep(left)
        manager.signal(number)

    return Call(strike)


def time_of_a_connection(managers: Managers, directory: Path) -> float:
    """Return how long a connection takes from `connect` to its first answer, seconds, when nothing happens to it."""
    ends = managers.start(directory).ends()
    try:
        begin = time.monotonic()
        client, server = ends.pair()
        converse(client, server, size=1)
        return time.monotonic() - begin
    finally:
        ends.close()


def one_strike(ends: Ends, first: str, strike: Callable[[], Call], listener: Any) -> tuple[Any, Any, Any]:
    striking = strike()
    client = ends.connect(listener.getsockname())
    server = ends.accept(listener)
    errors = attempt(client, server, first)
    striking.result()
    return client, server, errors


@pytest.mark.usefixtures("short")
def test_a_manager_killed_at_any_moment_leaves_both_ends_in_one_mode(managers: Managers, tmp_path: Path) -> None:
    whole_s = time_of_a_connection(managers, tmp_path / "timed")
    seen: Counter[str] = Counter()
    for turn in range(TURNS):
        manager = managers.start(tmp_path / str(turn))
        ends = manager.ends()
        try:
            listener = ends.listen()
            client, server, errors = one_strike(
                ends,
                ORDERS[turn % 3],
                lambda turn=turn, manager=manager: strike_after(whole_s * turn / TURNS, manager, signal.SIGKILL),
                listener,
            )
            if any(errors):
                assert all(errors), errors
                assert client._link.stage is Stage.SMC or client._channel is not None, "broken before CONFIRM"
                seen["broken"] += 1
            else:
                mode = client.smc_info().mode
                check(client, server, mode, client_code=ANY_CODE, server_code=ANY_CODE)
                seen[mode] += 1
        finally:
            ends.close()
            manager.signal(signal.SIGKILL)
    assert seen["TCP"], seen


@pytest.mark.usefixtures("short")
def test_a_manager_stopped_at_any_moment_leaves_both_ends_in_one_mode(managers: Managers, tmp_path: Path) -> None:
    manager = managers.start(tmp_path / "run")
    whole_s = time_of_a_connection(managers, tmp_path / "timed")
    ends = manager.ends()
    listener = ends.listen()
    try:
        for turn in range(TURNS // 3):
            client, server, errors = one_strike(
                ends,
                ORDERS[turn % 3],
                lambda turn=turn: stop_for_a_while(whole_s * turn * 3 / TURNS, manager),
                listener,
            )
            assert errors == (None, None)
            mode = client.smc_info().mode
            check(client, server, mode, client_code=ANY_CODE, server_code=ANY_CODE)
    finally:
        ends.close()


def stop_for_a_while(delay_s: float, manager: ManagerProcess) -> Call:
    def stop() -> None:
        strike_after(delay_s, manager, signal.SIGSTOP).result()
        time.sleep(0.25)
        manager.signal(signal.SIGCONT)

    return Call(stop)


@first
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_manager_killed_about_the_time_an_offer_is_taken(
    managers: Managers, tmp_path: Path, first: str, when: str
) -> None:
    """Two that have had a connection need no manager for the next, once the server has taken the offer."""
    manager = managers.start(tmp_path / "run")
    ends = manager.ends()
    try:
        listener = after_another(ends)
        client = ends.connect(listener.getsockname())
        server = ends.accept(listener) if when == "after" else None
        manager.signal(signal.SIGKILL)
        until(lambda: all(device is not None and device.gone for device in (ends.client, ends.server)))
        server = server or ends.accept(listener)
        converse(client, server, first)
        check(client, server, "SMC" if when == "after" else "TCP", client_code=ANY_CODE, server_code=ANY_CODE)
    finally:
        ends.close()


@pytest.mark.parametrize("end", ["bytes", "the end"])
def test_a_plain_client_is_served_while_the_manager_stands_still(rig: Fabrics, end: str) -> None:
    listener = rig.listen()
    rig.server.transport.pause()
    client = rig.keep(socket.create_connection(listener.getsockname()))
    server = rig.accept(listener)
    if end == "bytes":
        converse(client, server, "client")
    else:
        client.shutdown(socket.SHUT_WR)
        assert together(lambda: server.recv(1)) == [b""]
    check(client, server, "TCP", server_code=Diagnosis.PEERNOSMC)
    rig.server.transport.resume()


def test_bytes_like_those_of_a_handshake_wait_for_the_manager_and_stay_data(rig: Fabrics) -> None:
    listener = rig.listen()
    rig.server.transport.pause()
    client = rig.keep(socket.create_connection(listener.getsockname()))
    server = rig.accept(listener)
    client.sendall(SMCR + b" is how a handshake begins")
    receiving = Call(lambda: server.recv(100))
    receiving.join(0.1)
    assert receiving.is_alive()
    rig.server.transport.resume()
    assert receiving.result() == SMCR + b" is how a handshake begins"


# Managers that come and go --------------------------------------------------------------------------------------


@pytest.fixture
def own_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Let this process find its device as programs do, in a run directory where nobody is yet."""
    run_dir = tmp_path / "run"
    monkeypatch.setenv("ISM_RUN_DIR", str(run_dir))
    monkeypatch.delenv("ISM_DEVICE", raising=False)
    monkeypatch.setattr(default, "RETRY_S", 0.0)
    default.close_default()
    yield run_dir
    default.close_default()


def pair(listener: Any) -> tuple[Any, Any]:
    """Connect as a program does, with the device of this process."""
    client = blocking.create_connection(listener.getsockname())
    return client, listener.accept()[0]


def close(*socks: Any) -> None:
    for sock in socks:
        sock.close()


def test_without_a_manager_it_is_tcp_and_with_the_next_one_shared_memory(managers: Managers, own_device: Path) -> None:
    with blocking.create_server((LOOPBACK, 0)) as early:
        client, server = pair(early)
        converse(client, server)
        check(client, server, "TCP", client_code=Diagnosis.NOSMCDDEV, server_code=Diagnosis.NOSMCDDEV)
        close(client, server)
        managers.start(own_device)
        with blocking.create_server((LOOPBACK, 0)) as later:
            client, server = pair(later)
            converse(client, server)
            check(client, server, "SMC")
            close(client, server)


def test_connections_go_on_without_their_manager_and_new_ones_use_the_next(
    managers: Managers, own_device: Path
) -> None:
    manager = managers.start(own_device)
    with blocking.create_server((LOOPBACK, 0)) as listener:
        old = pair(listener)
        exchange(*old)
        device = default.open_default()
        manager.signal(signal.SIGKILL)
        until(lambda: device.gone is not None)
        between = pair(listener)
        converse(*between)
        check(*between, "TCP", client_code=Diagnosis.NOSMCDDEV, server_code=ANY_CODE)
        managers.start(own_device)
        first_of_the_next = pair(listener)  # the listener notices, and publishes, when it accepts
        converse(*first_of_the_next)
        check(*first_of_the_next, "TCP", client_code=Diagnosis.PEERNOSMC, server_code=Diagnosis.PEERNOSMC)
        client, server = pair(listener)
        converse(client, server)
        check(client, server, "SMC")
        converse(*old)
        check(*old, "SMC")
        close(*old, *between, *first_of_the_next, client, server)


@first
@pytest.mark.usefixtures("short")
def test_a_manager_that_stands_still_from_the_beginning_makes_it_tcp(
    managers: Managers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    for module in (rendezvous, blocking):
        monkeypatch.setattr(module, "COMMAND_WAIT_S", 0.1)
    manager = managers.start(tmp_path / "run")
    ends = manager.ends()
    try:
        with manager.stopped():
            listener = ends.listen()
            client = ends.connect(listener.getsockname())
            server = ends.accept(listener)
            talking = Call(lambda: converse(client, server, first))
            talking.join(0.2)
        talking.result()
        check(client, server, "TCP", client_code=Diagnosis.INTERR, server_code=ANY_CODE)
    finally:
        ends.close()

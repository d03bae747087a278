# SPDX-License-Identifier: Apache-2.0
"""The engine of one undecided connection, without an event loop: the driver's threads move it, a test looks on."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from smc_stream_rig import LIMIT_S, SmcRig, leak_checked

from ism.driver import Device
from ism.driver.control import ack_error
from ism.driver.directory import FourTuple
from ism.errors import TransportError
from ism.ids import DevId
from ism.smc import blocking
from ism.smc.addresses import packed
from ism.smc.clc import SMCR
from ism.smc.diagnosis import Diagnosis
from ism.smc.handshake import DeclinedError
from ism.smc.link import CLAIM_WAIT_S, Link, Stage
from ism.smc.policy import Mode, Policy
from ism.smc.rendezvous import Fallback, Publication, connect_steps, scope_of
from ism.virtio.ism_spec import Ack

LOOPBACK = "127.0.0.1"
NEVER = float("inf")


def until(condition: Callable[[], bool]) -> None:
    patience = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < patience, "it never happened"
        time.sleep(0.001)


@pytest.fixture
def rig() -> Iterator[SmcRig]:
    with leak_checked(directory=True) as made:
        yield made


class Ends:
    """A listening socket in the directory, and the connections to it. Closes everything at its end."""

    def __init__(self, rig: SmcRig, mode: Mode = "auto") -> None:
        self.rig, self.policy = rig, Policy(mode=mode, buffer_size=65536)
        self.stack = contextlib.ExitStack()
        self.listener = self.stack.enter_context(socket.create_server((LOOPBACK, 0)))
        self.publication = Publication(rig.server_device, self.listener, self.policy)
        for command in self.publication.publish_steps():
            assert command.wait_done(LIMIT_S)
        self.stack.callback(self.publication.withdraw)
        self.settled: list[Link] = []

    def maker(self, sock: socket.socket, *, server_side: bool) -> Callable[[Device], Link]:
        def make(device: Device) -> Link:
            link = Link(
                sock.fileno(),
                sock.family,
                owner=sock,
                server_side=server_side,
                device=device,
                buffer_size=self.policy.buffer_size,
                required=self.policy.mode == "require",
                settled=self.settled.append,
            )
            self.stack.callback(link.close)
            return link

        return make

    def connect(self) -> tuple[Link, socket.socket]:
        """A client's link, connected by TCP."""
        sock = self.stack.enter_context(socket.socket())
        make = self.maker(sock, server_side=False)
        address = self.listener.getsockname()
        steps = connect_steps(self.rig.client_device, sock, address, self.policy, make)
        try:
            while True:
                assert next(steps).wait_done(LIMIT_S)
        except StopIteration as stop:
            link = stop.value
        assert isinstance(link, Link)
        sock.connect(address)
        link.connected()
        return link, sock

    def accept(self) -> tuple[Link, socket.socket]:
        """The server's link of the next connection."""
        sock, peer = self.listener.accept()
        self.stack.enter_context(sock)
        link = self.publication.accepted(sock, peer, self.maker(sock, server_side=True))
        assert isinstance(link, Link)
        return link, sock

    def pair(self) -> tuple[Link, Link]:
        """Both ends, claimed; nobody has begun."""
        client, _ = self.connect()
        server, _ = self.accept()
        until(lambda: client.stage is Stage.AGREED and server.stage is Stage.AGREED)
        return client, server

    def intents(self) -> int:
        members = self.rig.fabric.registry.directory.members
        return len(members[DevId(self.rig.client_device.devid)].intents)


@pytest.fixture
def ends(rig: SmcRig) -> Iterator[Ends]:
    made = Ends(rig)
    with made.stack:
        yield made


def expire(link: Link) -> None:
    """Wait as somebody does who is inside a call."""
    time.sleep(max(0.0, link.deadline_s - time.monotonic()))
    link.expire()


# How it begins --------------------------------------------------------------------------------------------------


def test_nothing_is_shaken_before_a_program_sends_or_receives(ends: Ends) -> None:
    client, server = ends.pair()
    assert (client.deadline_s, server.deadline_s) == (NEVER, NEVER)
    client.pump()
    server.expire()
    assert (client.stage, server.stage) == (Stage.AGREED, Stage.AGREED)
    assert not ends.rig.regions
    assert not ends.settled


@pytest.mark.parametrize("sending", [True, False])
def test_a_client_that_begins_is_enough_for_both(ends: Ends, sending: bool) -> None:
    client, server = ends.pair()
    client.start(sending=sending)
    until(lambda: client.settled and server.settled)
    assert (client.stage, server.stage) == (Stage.SMC, Stage.SMC)
    assert sorted(map(id, ends.settled)) == sorted(map(id, (client, server)))
    assert client.connection is not None
    assert server.connection is not None
    assert client.connection.send(b"x") == 1
    until(server.connection.readable)
    assert server.connection.recv(9) == b"x"


def test_a_server_that_would_send_has_a_client_begin_that_is_in_no_call(ends: Ends) -> None:
    client, server = ends.pair()
    server.start(sending=True)
    until(lambda: client.settled and server.settled)
    assert (client.stage, server.stage) == (Stage.SMC, Stage.SMC)


def test_a_server_that_would_receive_waits_for_the_client(ends: Ends) -> None:
    client, server = ends.pair()
    server.start(sending=False)
    assert server.deadline_s == NEVER
    assert client.stage is Stage.AGREED
    client.start(sending=True)
    until(lambda: server.stage is Stage.SMC)


def test_every_change_is_told_once_and_a_waiter_can_be_taken_back(ends: Ends) -> None:
    client, server = ends.pair()
    told, changed = [], threading.Event()
    server.on_change(lambda: told.append(1))
    server.on_change(changed.set)
    unwanted = lambda: told.append("unwanted")  # noqa: E731
    client.on_change(unwanted)
    client.forget(unwanted)
    client.forget(unwanted)
    client.start(sending=True)
    assert changed.wait(LIMIT_S)
    until(lambda: server.settled)
    assert told == [1]


# Time -----------------------------------------------------------------------------------------------------------


def test_a_client_that_is_not_claimed_sends_by_tcp_after_a_moment(ends: Ends) -> None:
    client, _ = ends.connect()
    connected_s = time.monotonic()
    assert ends.intents() == 1
    assert client.deadline_s == NEVER
    client.start(sending=True)
    assert client.deadline_s <= connected_s + CLAIM_WAIT_S
    client.expire()
    assert client.stage is Stage.WAITING
    expire(client)
    until(lambda: client.stage is Stage.TCP)
    assert client.may_receive
    assert client.code == Diagnosis.PEERNOSMC
    assert not ends.intents()


def test_a_client_that_is_not_claimed_and_only_receives_waits_for_bytes(ends: Ends) -> None:
    client, _ = ends.connect()
    plain, _ = ends.listener.accept()
    with plain:
        client.start(sending=False)
        assert client.deadline_s == NEVER
        assert client.stage is Stage.WAITING
        plain.send(b"from a server that does not ask")
        until(lambda: client.stage is Stage.TCP)
        assert client.raw.recv(100) == b"from a server that does not ask"


def test_whoever_cannot_wait_goes_on_in_tcp_at_once(ends: Ends) -> None:
    client, _ = ends.connect()
    client.hurry()
    until(lambda: client.stage is Stage.TCP)
    client.hurry()
    ends.accept()
    claimed, server = ends.pair()
    claimed.hurry()
    assert claimed.stage is Stage.AGREED
    assert server.stage is Stage.AGREED


def test_a_server_declines_when_the_client_does_not_begin_in_time(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends.rig.server_device.directory, "start_nowait", lambda claim: None)  # it is lost
    client, server = ends.pair()
    server.start(sending=True)
    assert server.deadline_s < NEVER
    expire(server)
    assert server.stage is Stage.TCP
    assert not server.may_receive  # the client has a word to say yet
    server.raw.send(b"data")
    client.start(sending=False)
    until(lambda: client.may_receive and server.may_receive)
    assert client.stage is Stage.TCP
    assert client.raw.recv(10) == b"data"
    assert client.code == server.code == Diagnosis.TIMEOUT_CL


def test_where_shared_memory_is_required_nobody_is_impatient(rig: SmcRig) -> None:
    required = Ends(rig, "require")
    with required.stack:
        client, server = required.pair()
        server.start(sending=True)
        assert server.deadline_s == NEVER
        until(lambda: client.stage is Stage.SMC)


# Giving it away -------------------------------------------------------------------------------------------------


def test_an_unclaimed_client_is_given_away_with_the_managers_word(ends: Ends) -> None:
    client, _ = ends.connect()
    client.give_away()
    until(lambda: client.stage is Stage.TCP)
    assert client.give_away()
    assert not ends.intents()


def test_a_client_that_is_claimed_as_it_is_given_away_declines(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    client, _ = ends.connect()
    directory = ends.rig.client_device.directory
    assert directory is not None
    monkeypatch.setattr(directory, "deliver", lambda event: None)  # the event is lost
    server, _ = ends.accept()
    until(lambda: server.stage is Stage.AGREED)
    client.give_away()
    until(lambda: client.stage is Stage.TCP and server.stage is Stage.TCP)
    until(lambda: client.may_receive and server.may_receive)
    assert client.code == server.code == Diagnosis.OPTUNSUPP


def test_a_server_that_is_given_away_while_it_asks_declines_when_it_may(ends: Ends) -> None:
    client, _ = ends.connect()
    ends.rig.server_device.transport.pause()  # type: ignore[attr-defined]
    server, _ = ends.accept()
    assert not server.give_away()
    ends.rig.server_device.transport.resume()  # type: ignore[attr-defined]
    until(lambda: client.may_receive and server.may_receive)  # the client's library answers, in whatever its program is
    assert client.stage is server.stage is Stage.TCP


def test_shared_memory_is_not_given_away(ends: Ends) -> None:
    client, server = ends.pair()
    client.start(sending=True)
    until(lambda: client.settled and server.settled)
    assert not client.give_away()
    assert client.stage is Stage.SMC


# What TCP carries -----------------------------------------------------------------------------------------------


def claimed_for(ends: Ends) -> tuple[Link, socket.socket]:
    """A server's link that has claimed, and the TCP of its client, who has lost the manager and speaks TCP."""
    sock = ends.stack.enter_context(socket.socket())
    sock.bind((LOOPBACK, 0))
    directory = ends.rig.client_device.directory
    assert directory is not None
    local, remote = sock.getsockname(), ends.listener.getsockname()
    four = FourTuple(packed(local[0]), local[1], packed(remote[0]), remote[1], scope_of(sock))
    assert directory.intend(four, 0x1234)
    sock.connect(remote)
    server, _ = ends.accept()
    until(lambda: server.stage is Stage.AGREED)
    return server, sock


def lowat(link: Link) -> int:
    return link.raw.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT)


@pytest.mark.parametrize("data", [b"x", b"GET / HTTP/1.1\r\n\r\n", SMCR + b"\1" + bytes(40)], ids=len)
def test_bytes_without_the_nonce_are_the_applications(ends: Ends, data: bytes) -> None:
    server, client = claimed_for(ends)
    client.send(data)
    until(lambda: server.stage is Stage.TCP)
    assert server.may_receive
    assert server.raw.recv(100) == data
    assert lowat(server) == 1


def test_few_bytes_that_may_begin_a_proposal_are_waited_for_without_a_busy_thread(ends: Ends) -> None:
    server, client = claimed_for(ends)
    client.send(SMCR)
    until(lambda: lowat(server) > 1)
    assert server.stage is Stage.AGREED
    assert server.deadline_s < NEVER
    client.send(b" it was, but no proposal")
    until(lambda: server.stage is Stage.TCP)
    assert lowat(server) == 1
    assert server.raw.recv(100) == SMCR + b" it was, but no proposal"


def test_bytes_that_break_the_rules_break_the_link(rig: SmcRig) -> None:
    required = Ends(rig, "require")
    with required.stack, socket.create_connection(required.listener.getsockname()) as intruder:
        server, _ = required.accept()
        intruder.send(bytes(100))
        until(lambda: server.settled)
        assert server.stage is Stage.BROKEN
        assert server.error is not None
        with contextlib.suppress(ConnectionResetError):
            assert intruder.recv(100) == b""


def test_a_decline_where_shared_memory_is_required_says_who_and_why(rig: SmcRig) -> None:
    required = Ends(rig, "require")
    with required.stack:
        client, server = required.pair()
        server.give_away()
        assert isinstance(server.error, DeclinedError)
        assert not server.error.by_peer
        client.start(sending=True)
        until(lambda: client.settled)
        assert client.stage in (Stage.BROKEN, Stage.TCP)  # it has read the decline, or the end after it


def test_an_end_before_the_first_byte_is_one_and_what_is_required_stays_so(rig: SmcRig) -> None:
    required = Ends(rig, "require")
    with required.stack:
        sock = socket.create_connection(required.listener.getsockname())
        server, _ = required.accept()
        sock.close()
        until(lambda: server.settled)
        assert server.stage is Stage.TCP
        assert server.raw.recv(10) == b""
        with pytest.raises(BrokenPipeError):
            server.raw.send(b"x", socket.MSG_NOSIGNAL)


# The end --------------------------------------------------------------------------------------------------------


# The regions ------------------------------------------------------------------------------------------------------


class Held:
    """Holds up the allocations of a device until they are let go on. Attributes: `asked` (how many have begun)."""

    def __init__(self, device: Device, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.asked = 0
        self._go, self._alloc, self._error = threading.Event(), device.alloc, error
        monkeypatch.setattr(device, "alloc", self._held_up)

    def _held_up(self, *args: Any, **kwargs: Any) -> Any:
        self.asked += 1
        assert self._go.wait(LIMIT_S)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._alloc(*args, **kwargs)

    def go_on(self) -> None:
        self._go.set()


def test_a_client_makes_its_region_while_the_server_makes_its_own(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(ends.rig.server_device, monkeypatch)
    client, server = ends.pair()
    client.start(sending=True)
    try:
        until(lambda: held.asked == 1 and ends.rig.regions == 1)
    finally:
        held.go_on()
    until(lambda: client.settled and server.settled)
    assert (client.stage, server.stage) == (Stage.SMC, Stage.SMC)
    assert ends.rig.regions == 2
    assert not client.reused


def test_a_region_made_ahead_goes_when_the_server_declines(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(ends.rig.server_device, monkeypatch, ack_error("ALLOC_REGION", Ack.ENOMEM))
    client, server = ends.pair()
    client.start(sending=True)
    try:
        until(lambda: held.asked == 1 and ends.rig.regions == 1)
        server.give_away()
        until(lambda: client.settled)
        assert client.stage is Stage.TCP
        until(lambda: not ends.rig.regions)
    finally:
        held.go_on()


@pytest.mark.parametrize("how", ["closed", "declined"])
def test_a_region_that_is_being_made_ahead_when_all_is_over_is_let_go(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    held = Held(ends.rig.client_device, monkeypatch)
    client, sock = ends.connect()
    server, _ = ends.accept()
    client.start(sending=True)
    try:
        until(lambda: held.asked == 1)
        if how == "closed":
            client.close()
            sock.close()
        else:
            client.give_away()
        until(lambda: client.settled and server.settled)
        ahead = client._ahead
        assert ahead is not None
    finally:
        held.go_on()
    assert ahead.wait(LIMIT_S)
    until(lambda: not ends.rig.regions)


def test_what_could_not_be_made_ahead_is_made_once_the_server_has_accepted(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(ends.rig.client_device, monkeypatch, ack_error("ALLOC_REGION", Ack.ENOMEM))
    held.go_on()
    client, server = ends.pair()
    client.start(sending=True)
    until(lambda: client.settled and server.settled)
    assert (client.stage, server.stage) == (Stage.SMC, Stage.SMC)
    assert held.asked == 2


def test_what_was_made_ahead_makes_room_for_the_servers_region(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    device = ends.rig.client_device
    made = Held(device, monkeypatch)
    made.go_on()
    attach, refusals = device.attach, [ack_error("ATTACH_REGION", Ack.ENOMEM)]

    def no_room_at_first(*args: Any, **kwargs: Any) -> Any:
        if refusals:
            raise refusals.pop()
        return attach(*args, **kwargs)

    monkeypatch.setattr(device, "attach", no_room_at_first)
    client, server = ends.pair()
    client.start(sending=True)
    until(lambda: client.settled and server.settled)
    assert (client.stage, server.stage) == (Stage.SMC, Stage.SMC)
    assert made.asked == 2
    until(lambda: ends.rig.regions == 2)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_process_short_of_descriptors_or_memory_declines_for_want_of_them(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    Held(ends.rig.server_device, monkeypatch, TransportError("cannot make it", number)).go_on()
    client, server = ends.pair()
    client.start(sending=True)
    until(lambda: client.settled and server.settled)
    assert (client.stage, server.stage) == (Stage.TCP, Stage.TCP)
    assert (client.code, server.code) == (Diagnosis.MEM, Diagnosis.MEM)
    until(lambda: not ends.rig.regions)


# How it ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["client", "server"])
@pytest.mark.parametrize("stage", ["waiting", "agreed", "talking", "SMC", "TCP"])
def test_closing_at_any_stage_leaves_nothing(ends: Ends, stage: str, first: str) -> None:
    client, client_sock = ends.connect()
    pairs: list[tuple[Link, socket.socket]] = [(client, client_sock)]
    if stage != "waiting":
        pairs.append(ends.accept())
        until(lambda: client.stage is Stage.AGREED)
        if stage == "TCP":
            client.give_away()
        elif stage != "agreed":
            client.start(sending=True)
        if stage == "SMC":
            until(lambda: all(link.settled for link, _ in pairs))
    for link, sock in pairs if first == "client" else pairs[::-1]:
        link.close()
        link.close()
        sock.close()
        assert link.stage is Stage.CLOSED
    until(lambda: not ends.intents())
    ends.rig.let_go()


def test_a_link_that_is_dropped_is_watched_no_longer(ends: Ends) -> None:
    sock, other = socket.socketpair()
    with sock, other:
        link: Link | None = Link(sock.fileno(), sock.family, server_side=True, device=ends.rig.server_device)
        assert link is not None
        link.agreed()
        fd, service = sock.fileno(), ends.rig.server_device.service
        assert fd in service._callbacks
        del link
        gc.collect()
        other.send(b"and the descriptor lives on")
        until(lambda: fd not in service._callbacks)


def test_a_copy_made_by_fork_touches_nothing_that_is_the_parents(ends: Ends) -> None:
    client, server = ends.pair()
    client.start(sending=True)
    until(lambda: client.settled and server.settled)
    child = os.fork()
    if not child:
        client.close()
        server.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert client.connection is not None
    assert server.connection is not None
    assert client.connection.send(b"still here") == 10
    until(server.connection.readable)
    assert server.connection.recv(20) == b"still here"


# The directory --------------------------------------------------------------------------------------------------


def test_a_manager_that_does_not_answer_holds_up_no_publishing(rig: SmcRig) -> None:
    rig.server_device.transport.pause()  # type: ignore[attr-defined]
    with socket.create_server((LOOPBACK, 0)) as listener:
        publication = Publication(rig.server_device, listener, Policy())
        began_s = time.monotonic()
        with pytest.raises(TransportError, match="does not answer"):
            for _ in publication.publish_steps():
                pass  # nobody has the time to wait
        assert time.monotonic() < began_s + 5
        publication.withdraw()
    rig.server_device.transport.resume()  # type: ignore[attr-defined]


@pytest.mark.parametrize("bound", [None, ("127.0.0.7", 0)])
def test_a_client_is_found_by_the_address_and_port_it_really_has(ends: Ends, bound: Any) -> None:
    sock = ends.stack.enter_context(socket.socket())
    if bound is not None:  # as trio does for a local address: the port is to be chosen by connect
        sock.setsockopt(socket.IPPROTO_IP, getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24), 1)
        sock.bind(bound)
    steps = connect_steps(
        ends.rig.client_device, sock, ends.listener.getsockname(), ends.policy, ends.maker(sock, server_side=False)
    )
    try:
        while True:
            assert next(steps).wait_done(LIMIT_S)
    except StopIteration as stop:
        client = stop.value
    assert not isinstance(client, Fallback)
    sock.connect(ends.listener.getsockname())
    server, _ = ends.accept()
    until(lambda: server.stage is Stage.AGREED)
    assert sock.getsockname()[0] == (bound or (LOOPBACK,))[0]


def test_a_waker_for_which_no_descriptor_is_left_says_that_and_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: Any) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(os, "eventfd", none_left)
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            blocking._Waker()
    gc.collect()  # what its destructor raises is a warning, and so an error

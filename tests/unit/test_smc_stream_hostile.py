# SPDX-License-Identifier: Apache-2.0
"""Hostile peers of the handshake: they speak raw bytes over TCP to a server and to a client.

After each of them the stream is broken with a reason, nothing is left, and the next good peer is served.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing
from smc_stream_rig import SmcRig, bounded, leak_checked, port_of, receive_exactly, tcp_of, until

from ism.driver import Device, Region
from ism.errors import RemoteProtocolError
from ism.ids import DevId, Token
from ism.smc import SmcStream, handshake
from ism.smc.diagnosis import Diagnosis, HandshakeError
from ism.smc.handshake_machine import ClientHandshake, PeerAccepted, PeerDeclined, Proposed, ServerHandshake
from ism.smc.identity import Identity
from ism.virtio.ism_spec import Permission

ALL = Permission.READ | Permission.WRITE | Permission.ATTACH
KIB = 1024


class Attacker:
    """One end of a TCP connection, a device of its own domain, and no manners."""

    def __init__(self, rig: SmcRig, stream: trio.SocketStream, device: Device, victim: Device) -> None:
        self.rig, self.stream, self.device, self.victim = rig, stream, device, victim
        self.regions: list[Region] = []

    def identity(self, devid: DevId | None = None) -> Identity:
        return Identity(self.device.gid, devid or self.device.devid, host="attacker")

    def region(self, size: int = 64 * KIB, device: Device | None = None, *, granted: bool = True) -> Region:
        """A region; the victim may attach it if `granted`."""
        grants = [(ALL, self.victim.devid)] if granted else []
        self.regions.append((device or self.device).alloc(size, grants=grants))
        return self.regions[-1]

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def event(self, machine: ClientHandshake | ServerHandshake) -> Any:
        while True:
            data = await self.stream.receive_some(machine.bytes_wanted)
            if (event := machine.receive(data)) is not None:
                return event

    async def accepted(self, devid: DevId | None = None) -> tuple[ClientHandshake, PeerAccepted]:
        """As a client: propose, and read the server's ACCEPT."""
        machine = ClientHandshake(self.identity(devid))
        await self.send(machine.start())
        event = await self.event(machine)
        assert isinstance(event, PeerAccepted)
        return machine, event

    async def proposed(self, devid: DevId | None = None) -> ServerHandshake:
        """As a server: read the client's PROPOSAL."""
        machine = ServerHandshake(self.identity(devid))
        assert isinstance(await self.event(machine), Proposed)
        return machine

    async def answer(self, role: str, token: int, size: int = 64 * KIB, devid: DevId | None = None) -> None:
        """Name a region: in the CONFIRM of a client, or in the ACCEPT of a server."""
        if role == "client":
            machine, _ = await self.accepted(devid)
            await self.send(machine.confirm(Token(token), size))
        else:
            await self.send((await self.proposed(devid)).accept(Token(token), size))


Attack = Callable[[Attacker, str], Awaitable[None]]


@pytest.fixture
def rig() -> Iterator[SmcRig]:
    with leak_checked() as made:
        yield made


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "MESSAGE_TIMEOUT_S", 0.3)


async def talks(client: SmcStream, server: SmcStream) -> None:
    """A good pair exchanges something."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send_all, b"good")
        assert await receive_exactly(server, 4) == b"good"
    await server.send_all(b"morning")
    assert await receive_exactly(client, 7) == b"morning"


async def attacked(rig: SmcRig, role: str, attack: Attack) -> BaseException | None:
    """Let the attacker be a `role` of one connection; returns why the victim's stream broke, None for an EOF."""
    outcome: BaseException | None = None
    rig.let_go()  # what good connections have left would be used, and then not kept
    before = rig.regions
    async with await rig.listen() as listener:
        if role == "client":
            stream = await trio.open_tcp_stream("127.0.0.1", port_of(listener))
            victim = await listener.accept()
            attacker = Attacker(rig, stream, rig.client_device, rig.server_device)
        else:
            (tcp_listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            async with tcp_listener:
                victim = await rig.connect(tcp_listener.socket.getsockname()[1])
                stream = await tcp_listener.accept()
            attacker = Attacker(rig, stream, rig.server_device, rig.client_device)
        async with trio.open_nursery() as nursery, stream, victim:

            async def run_attack() -> None:
                try:
                    await attack(attacker, role)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass  # the victim hung up

            nursery.start_soon(run_attack)
            try:
                assert await victim.receive_some() == b""
            except trio.BrokenResourceError as exc:
                outcome = exc.__cause__
                with pytest.raises(trio.BrokenResourceError):
                    await victim.send_all(b"x")
            if not isinstance(outcome, ConnectionResetError | None):  # no handshake, and nothing kept until the close
                await until(lambda: rig.regions == before + len(attacker.regions))
            await victim.aclose()
            nursery.cancel_scope.cancel()
        for region in attacker.regions:
            region.close()
        await until(lambda: rig.regions == before)
        async with await rig.connect(port_of(listener)) as client, await listener.accept() as server:
            await talks(client, server)
    return outcome


# Bytes that are no handshake ------------------------------------------------------------------------------------


async def garbage(attacker: Attacker, role: str) -> None:
    await attacker.send(random.Random(3).randbytes(5000))


async def another_protocol(attacker: Attacker, role: str) -> None:
    await attacker.send(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n")


async def half_a_header(attacker: Attacker, role: str) -> None:
    await attacker.send(await first_message(attacker, role, 5))
    await trio.sleep_forever()


async def half_a_message(attacker: Attacker, role: str) -> None:
    await attacker.send(await first_message(attacker, role, -1))
    await trio.sleep_forever()


async def half_a_message_and_the_end(attacker: Attacker, role: str) -> None:
    await attacker.send(await first_message(attacker, role, 20))
    await attacker.stream.send_eof()


async def trickle(attacker: Attacker, role: str) -> None:
    for byte in await first_message(attacker, role, None):
        await attacker.send(bytes([byte]))
        await trio.sleep(0.02)


async def wrong_trailer(attacker: Attacker, role: str) -> None:
    await attacker.send(await first_message(attacker, role, -4) + b"SMCX")


async def first_message(attacker: Attacker, role: str, end: int | None) -> bytes:
    if role == "client":
        return ClientHandshake(attacker.identity()).start()[:end]
    return (await attacker.proposed()).accept(Token(77), 64 * KIB)[:end]


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize(
    "attack",
    [garbage, another_protocol, half_a_header, half_a_message, half_a_message_and_the_end, trickle, wrong_trailer],
    ids=lambda attack: attack.__name__,
)
@bounded
async def test_bytes_that_are_no_handshake_break_the_stream_only(rig: SmcRig, role: str, attack: Attack) -> None:
    outcome = await attacked(rig, role, attack)
    if attack is half_a_message_and_the_end:  # as for TCP: nothing that an application sent can have been lost
        assert outcome is None
    elif isinstance(outcome, handshake.DeclinedError):  # as long as it may, a side that waited too long declines
        assert outcome.code == Diagnosis.TIMEOUT_CL
    else:
        assert isinstance(outcome, HandshakeError)


# Regions that are not the peer's to give ------------------------------------------------------------------------


async def unknown_token(attacker: Attacker, role: str) -> None:
    await attacker.answer(role, 0xDEAD_BEEF)
    await trio.sleep_forever()


async def ungranted_region(attacker: Attacker, role: str) -> None:
    await attacker.answer(role, attacker.region(granted=False).token)
    await trio.sleep_forever()


async def third_partys_region(attacker: Attacker, role: str) -> None:
    with Device(attacker.rig.fabric.plug()) as third:
        region = attacker.region(device=third, granted=False)
        try:
            await attacker.answer(role, region.token)
            await trio.sleep_forever()
        finally:
            attacker.regions.remove(region)
            region.close()


async def victims_own_region(attacker: Attacker, role: str) -> None:
    if role == "client":
        machine, accept = await attacker.accepted()
        message = machine.confirm(Token(0x5151_5151_5151_5151), 64 * KIB)
        named = (0x5151_5151_5151_5151).to_bytes(8, "big")
        assert message.count(named) == 1
        await attacker.send(message.replace(named, accept.token.to_bytes(8, "big")))
    else:
        own = attacker.region(device=attacker.victim, granted=False)
        await attacker.answer(role, own.token)
    await trio.sleep_forever()


async def larger_than_the_region(attacker: Attacker, role: str) -> None:
    await attacker.answer(role, attacker.region(64 * KIB).token, 1024 * KIB)
    await trio.sleep_forever()


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize(
    "attack",
    [unknown_token, ungranted_region, third_partys_region, victims_own_region, larger_than_the_region],
    ids=lambda attack: attack.__name__,
)
@bounded
async def test_a_region_that_is_not_the_peers_to_give_breaks_the_stream_only(
    rig: SmcRig, role: str, attack: Attack
) -> None:
    assert await attacked(rig, role, attack) is not None


@pytest.mark.parametrize("role", ["client", "server"])
@bounded
async def test_the_region_of_another_connection_is_refused_and_that_connection_is_unharmed(
    rig: SmcRig, role: str
) -> None:
    client, server = await rig.pair()
    async with client, server:
        for stream in (client, server):
            assert stream.connection is not None
            token = stream.connection.rx.token

            async def name_it(attacker: Attacker, role: str, token: int = token) -> None:
                await attacker.answer(role, token)
                await trio.sleep_forever()

            assert isinstance(await attacked(rig, role, name_it), RemoteProtocolError | handshake.DeclinedError)
            await talks(client, server)


# A handshake that goes wrong on purpose -------------------------------------------------------------------------


async def decline_at_once(attacker: Attacker, role: str) -> None:
    machine: Any = ClientHandshake if role == "client" else ServerHandshake
    await attacker.send(machine(attacker.identity()).decline(Diagnosis.CNFERR))
    await trio.sleep_forever()


async def decline_the_answer(attacker: Attacker, role: str) -> None:
    machine: Any = (await attacker.accepted())[0] if role == "client" else await attacker.proposed()
    await attacker.send(machine.decline(Diagnosis.MEM))
    await trio.sleep_forever()


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("attack", [decline_at_once, decline_the_answer], ids=lambda attack: attack.__name__)
@bounded
async def test_a_decline_breaks_the_stream_and_says_who_declined(rig: SmcRig, role: str, attack: Attack) -> None:
    cause = await attacked(rig, role, attack)
    assert isinstance(cause, handshake.DeclinedError)
    assert cause.by_peer


async def propose_twice(attacker: Attacker, role: str) -> None:
    await attacker.accepted()
    await attacker.send(ClientHandshake(attacker.identity()).start())
    await trio.sleep_forever()


async def confirm_from_another_device(attacker: Attacker, role: str) -> None:
    machine, _ = await attacker.accepted()
    message = machine.confirm(attacker.region().token, 64 * KIB)
    devid = attacker.device.devid.to_bytes(8, "big")
    assert devid in message
    await attacker.send(message.replace(devid, (99).to_bytes(8, "big")))
    await trio.sleep_forever()


async def silence_after_accept(attacker: Attacker, role: str) -> None:
    await attacker.accepted()
    await trio.sleep_forever()


async def end_after_accept(attacker: Attacker, role: str) -> None:
    await attacker.accepted()
    await attacker.stream.send_eof()
    await trio.sleep_forever()


@pytest.mark.parametrize(
    "attack",
    [propose_twice, confirm_from_another_device, silence_after_accept, end_after_accept],
    ids=lambda attack: attack.__name__,
)
@bounded
async def test_a_client_that_does_not_confirm_breaks_or_ends_the_stream_only(rig: SmcRig, attack: Attack) -> None:
    outcome = await attacked(rig, "client", attack)
    assert outcome is None if attack is end_after_accept else isinstance(outcome, HandshakeError)


@bounded
async def test_a_client_on_a_device_that_is_not_there_breaks_the_stream_only(rig: SmcRig) -> None:
    async def absent_device(attacker: Attacker, role: str) -> None:
        machine = ClientHandshake(attacker.identity(DevId(0x7777)))
        await attacker.send(machine.start())
        assert isinstance(await attacker.event(machine), PeerDeclined)

    cause = await attacked(rig, "client", absent_device)
    assert isinstance(cause, handshake.DeclinedError)
    assert not cause.by_peer


@bounded
async def test_a_server_that_names_another_device_gets_nothing_out_of_it(rig: SmcRig) -> None:
    async def accept_in_anothers_name(attacker: Attacker, role: str) -> None:
        with Device(attacker.rig.fabric.plug()) as third:
            machine = await attacker.proposed(third.devid)
            await attacker.send(machine.accept(attacker.region().token, 64 * KIB))
            confirmed = await attacker.event(machine)
            with pytest.raises(Exception, match="PERM_EATTACH"):
                attacker.device.attach(confirmed.token)
            await attacker.stream.aclose()

    # it never began to use the client's region: so this is an end of file
    assert await attacked(rig, "server", accept_in_anothers_name) is None


@bounded
async def test_bytes_on_tcp_after_the_handshake_are_nobodys_and_only_the_end_of_tcp_counts(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with client, server:
        await client.send_all(b"by memory")
        await tcp_of(client).send(b"by TCP")
        assert await receive_exactly(server, 9) == b"by memory"
        await client.send_all(b"more")
        assert await receive_exactly(server, 4) == b"more"
        tcp_of(client).shutdown(trio.socket.SHUT_WR)
        with pytest.raises(trio.BrokenResourceError) as caught:
            await server.receive_some()
        assert isinstance(caught.value.__cause__, ConnectionResetError)

# SPDX-License-Identifier: Apache-2.0
"""Streams that find out for themselves how their bytes travel: with peers of their kind, with plain trio, with neither.

In whatever order the two programs speak, no byte is lost or added, both ends know the same, and both say it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import trio
import trio.testing
from conversations import ORDERS, Talk, agree, client_first, finished, in_any_order, only_ends, server_first
from smc_stream_rig import SmcRig, bounded, leak_checked, port_of, receive_all, tcp_of

import ism.smc
from ism.driver import Device
from ism.ids import DevId
from ism.manager.quota import Quota
from ism.smc import SmcStream, info
from ism.smc.diagnosis import Diagnosis

LOOPBACK = "127.0.0.1"


@pytest.fixture
def rig() -> Iterator[SmcRig]:
    with leak_checked(directory=True) as made:
        yield made


@pytest.fixture(autouse=True)
def fallbacks(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Counters of fallbacks, fresh."""
    monkeypatch.setattr(info, "_fallbacks", counted := type(info._fallbacks)())
    monkeypatch.setattr(info, "_logged", set())
    return counted


# Both ends could -----------------------------------------------------------------------------------------------


@in_any_order
@bounded
async def test_two_ends_in_one_directory_use_shared_memory(rig: SmcRig, talk: Talk) -> None:
    async with await rig.listen() as listener:
        for number in range(3):
            client = await rig.connect(port_of(listener))
            server = await listener.accept()
            async with client, server:
                await talk(client, server)
                assert agree(client, server) == "SMC"
                told = client.smc_info()
                assert (told.reason, told.code) == ("", 0)
                assert told.peer_devid == rig.server_device.devid
                assert told.receive_buffer == told.send_buffer == 61440
                assert told.remote == server.socket.getsockname()
                assert told.reused is (number > 0)
                assert (told.sent, told.received) == (server.smc_info().received, server.smc_info().sent)
                await receive_rest(client, server)


async def receive_rest(client: SmcStream, server: SmcStream) -> None:
    """End in good order, so that the regions can be used again."""
    await client.send_eof()
    await server.send_eof()
    assert await receive_all(client) == await receive_all(server) == b""


@pytest.mark.parametrize("smc", ["auto", "require", "off"])
@bounded
async def test_the_environment_says_what_a_call_leaves_open(
    rig: SmcRig, smc: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISM_SMC", smc)
    monkeypatch.setenv("ISM_SMC_BUFFER", "128K")
    monkeypatch.setenv("ISM_SMC_SPIN_US", "7")
    async with await rig.listen(smc=None, buffer_size=None) as listener:
        client = await rig.connect(port_of(listener), smc=None, buffer_size=None)
        server = await listener.accept()
        await finished(client_first, client, server)
        assert agree(client, server) == ("TCP" if smc == "off" else "SMC")
        if client.connection is not None:
            assert client.connection.rx.length == 128 * 1024
            assert client.connection.endpoint.max_spin_ns == 7000


@pytest.mark.parametrize(("smc", "wrong"), [("ism_smc", "yes"), ("", "no")])
@bounded
async def test_a_wrong_mode_is_refused_at_once(smc: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if smc:
        monkeypatch.setenv("ISM_SMC", wrong)
        with pytest.raises(OSError, match="ISM_SMC"):
            await ism.smc.open_tcp_stream(LOOPBACK, 9)
    else:
        with pytest.raises(ValueError, match="smc is 'no'"):
            await ism.smc.open_tcp_listeners(0, smc=wrong)  # type: ignore[arg-type]


@bounded
async def test_peers_that_are_configured_need_no_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISM_SMC_PEERS", "127.0.0.0/8")
    with leak_checked(mode="auto") as rig:
        for talk in ORDERS:
            client, server = await rig.fresh_pair()
            await finished(talk, client, server)
            assert agree(client, server) == "SMC"


@bounded
async def test_without_a_directory_or_configuration_it_is_tcp() -> None:
    with leak_checked(mode="auto") as rig:
        client, server = await rig.fresh_pair()
        await finished(client_first, client, server)
        assert agree(client, server) == "TCP"
        assert client.smc_info().code == Diagnosis.PEERNOSMC
        assert "ISM_SMC_PEERS" in client.smc_info().reason


@bounded
async def test_ipv6_and_wildcard_listeners_are_found(rig: SmcRig) -> None:
    for host, target in (("::1", "::1"), ("0.0.0.0", LOOPBACK), ("::", "::1")):
        (listener,) = await ism.smc.open_tcp_listeners(0, host=host, **rig.server_options)
        async with listener:
            client = await ism.smc.open_tcp_stream(target, port_of(listener), **rig.client_options)
            server = await listener.accept()
            await finished(client_first, client, server)
            assert agree(client, server) == "SMC"


@bounded
async def test_a_name_with_several_addresses_is_tried_until_one_connects(rig: SmcRig) -> None:
    class Resolver(trio.abc.HostnameResolver):
        async def getaddrinfo(self, host: Any, port: Any, *_: Any) -> Any:
            stream = trio.socket.SOCK_STREAM
            return [
                (trio.socket.AF_INET, stream, 6, "", ("127.0.0.9", port)),
                (trio.socket.AF_INET6, stream, 6, "", ("::1", port, 0, 0)),
                (trio.socket.AF_INET, stream, 6, "", (LOOPBACK, port)),
            ]

        async def getnameinfo(self, *_: Any) -> Any:
            raise NotImplementedError

    trio.socket.set_custom_hostname_resolver(Resolver())
    async with await rig.listen() as listener:
        port = port_of(listener)
        client = await ism.smc.open_tcp_stream("somewhere", port, happy_eyeballs_delay=5, **rig.client_options)
        server = await listener.accept()
        await finished(server_first, client, server)
        assert agree(client, server) == "SMC"
    with pytest.raises(OSError, match="all attempts to connect to somewhere") as caught:
        await ism.smc.open_tcp_stream("somewhere", port, **rig.client_options)
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert len(caught.value.__cause__.exceptions) == 3


@bounded
async def test_a_local_address_can_be_asked_for(rig: SmcRig) -> None:
    async with await rig.listen() as listener:
        client = await rig.connect(port_of(listener), local_address="127.0.0.5")
        server = await listener.accept()
        assert client.socket.getsockname()[0] == "127.0.0.5"
        await finished(client_first, client, server)
        assert agree(client, server) == "SMC"
        with pytest.raises(OSError, match="all attempts"):
            await rig.connect(port_of(listener), local_address="::1")


# One end cannot ------------------------------------------------------------------------------------------------


@in_any_order
@bounded
async def test_a_client_talks_tcp_to_plain_trio(rig: SmcRig, talk: Talk) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host=LOOPBACK)
    async with listener:
        client = await rig.connect(listener.socket.getsockname()[1])
        server = await listener.accept()
        await finished(talk, client, server)
        assert client.smc_info().mode == "TCP"
        assert client.smc_info().code == Diagnosis.PEERNOSMC


@in_any_order
@bounded
async def test_a_server_talks_tcp_to_plain_trio(rig: SmcRig, talk: Talk) -> None:
    async with await rig.listen() as listener:
        client = await trio.open_tcp_stream(LOOPBACK, port_of(listener))
        server = await listener.accept()
        await finished(talk, client, server)
        assert server.smc_info().mode == "TCP"
        assert server.smc_info().code == Diagnosis.PEERNOSMC


@in_any_order
@bounded
async def test_a_client_whose_server_was_found_but_does_not_claim_talks_tcp(rig: SmcRig, talk: Talk) -> None:
    """Somebody else accepts what was published: the client learns it from the bytes, or does not wait for ever."""
    async with await rig.listen() as listener:
        tcp = trio.SocketListener(tcp_of(listener))
        client = await rig.connect(port_of(listener))
        server = await tcp.accept()
        await finished(talk, client, server)
        assert client.smc_info().mode == "TCP"
        assert not rig.fabric.registry.directory.members[rig.client_device.devid].intents


@in_any_order
@pytest.mark.parametrize("poor", ["client", "server"])
@bounded
async def test_an_end_without_memory_declines_and_both_talk_tcp(rig: SmcRig, talk: Talk, poor: str) -> None:
    with rig.plug(quota=Quota(bytes=1 << 16, regions=1, attachments=4)) as device:
        hoard = device.alloc(1 << 16)
        async with await rig.listen(**({"device": device} if poor == "server" else {})) as listener:
            client = await rig.connect(port_of(listener), **({"device": device} if poor == "client" else {}))
            server = await listener.accept()
            await finished(talk, client, server)
        assert agree(client, server) == "TCP"
        declining, other = (client, server) if poor == "client" else (server, client)
        if talk is not only_ends:
            assert declining.smc_info().code in (Diagnosis.MEM, Diagnosis.MAX_DMB)
            assert other.smc_info().code == declining.smc_info().code
        hoard.close()


@in_any_order
@pytest.mark.parametrize("off", ["client", "server"])
@bounded
async def test_an_end_that_is_switched_off_is_plain_tcp(rig: SmcRig, talk: Talk, off: str) -> None:
    async with await rig.listen(**({"smc": "off"} if off == "server" else {})) as listener:
        client = await rig.connect(port_of(listener), **({"smc": "off"} if off == "client" else {}))
        server = await listener.accept()
        await finished(talk, client, server)
        assert agree(client, server) == "TCP"


@in_any_order
@bounded
async def test_a_proxy_between_two_ends_makes_it_tcp(rig: SmcRig, talk: Talk) -> None:
    async with await rig.listen() as listener, trio.open_nursery() as nursery:
        (proxy,) = await trio.open_tcp_listeners(0, host=LOOPBACK)

        async def copy(source: trio.SocketStream, target: trio.SocketStream) -> None:
            async for data in source:
                await target.send_all(data)
            await target.send_eof()

        async def serve() -> None:
            near = await proxy.accept()
            far = await trio.open_tcp_stream(LOOPBACK, port_of(listener))
            async with near, far, trio.open_nursery() as both:
                both.start_soon(copy, near, far)
                both.start_soon(copy, far, near)

        nursery.start_soon(serve)
        client = await rig.connect(proxy.socket.getsockname()[1])
        server = await listener.accept()
        await finished(talk, client, server)
        await proxy.aclose()
    assert agree(client, server) == "TCP"


@bounded
async def test_two_domains_have_nothing_in_common_but_tcp(rig: SmcRig) -> None:
    with leak_checked(directory=True) as other:
        async with await other.listen() as listener:
            client = await rig.connect(port_of(listener))
            server = await listener.accept()
            await finished(client_first, client, server)
            assert agree(client, server) == "TCP"


@bounded
async def test_a_peer_that_requires_shared_memory_and_one_that_finds_it_meet(rig: SmcRig) -> None:
    for modes in (("auto", "require"), ("require", "auto"), ("require", "require")):
        async with await rig.listen(smc=modes[1]) as listener:
            client = await rig.connect(port_of(listener), smc=modes[0])
            server = await listener.accept()
            await finished(client_first, client, server)
            assert agree(client, server) == "SMC"


# What is left --------------------------------------------------------------------------------------------------


def intents(rig: SmcRig, device: Device) -> int:
    return len(rig.fabric.registry.directory.members[DevId(device.devid)].intents)


@bounded
async def test_a_connection_that_was_never_used_leaves_no_intent_and_no_offer(rig: SmcRig) -> None:
    async with await rig.listen() as listener:
        for _ in range(3):  # the second and third offer regions that the first has left
            client = await rig.connect(port_of(listener))
            await client.aclose()
            server = await listener.accept()
            assert await server.receive_some() == b""
            await server.aclose()
            client, server = await rig.connect(port_of(listener)), await listener.accept()
            await finished(client_first, client, server)
    assert not intents(rig, rig.client_device)


@bounded
async def test_a_connect_that_fails_or_is_cancelled_leaves_nothing(rig: SmcRig) -> None:
    async with await rig.listen() as listener:
        port = port_of(listener)
        with trio.CancelScope() as scope:
            scope.cancel()
            await rig.connect(port)
        assert scope.cancelled_caught
    with pytest.raises(OSError, match="all attempts"):
        await rig.connect(port)
    assert not intents(rig, rig.client_device)


@bounded
async def test_a_receive_cancelled_while_nothing_is_decided_can_be_repeated(rig: SmcRig) -> None:
    async with await rig.listen() as listener:
        client = await rig.connect(port_of(listener))
        async with client:
            for _ in range(3):
                with trio.move_on_after(0.01) as scope:
                    await client.receive_some()
                assert scope.cancelled_caught
            async with await listener.accept() as server:
                await client_first(client, server)
                assert agree(client, server) == "SMC"


@bounded
async def test_closing_while_nothing_is_decided_ends_both_tasks(rig: SmcRig) -> None:
    async with await rig.listen() as listener:
        client = await rig.connect(port_of(listener))
        async with trio.open_nursery() as nursery:

            async def expect_closed() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await client.receive_some()

            nursery.start_soon(expect_closed)
            await trio.testing.wait_all_tasks_blocked()
            await client.aclose()
    assert not intents(rig, rig.client_device)


@bounded
async def test_fallbacks_are_counted_by_reason_and_logged_once_for_each_peer(
    rig: SmcRig, fallbacks: dict[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "ism.smc"):
        (listener,) = await trio.open_tcp_listeners(0, host=LOOPBACK)
        async with listener:
            for _ in range(3):
                client = await rig.connect(listener.socket.getsockname()[1])
                async with client, await listener.accept() as server:
                    await client_first(client, server)
    assert fallbacks == {Diagnosis.PEERNOSMC: 3}
    assert ism.smc.counters() == {Diagnosis.PEERNOSMC.words: 3}
    assert [one.levelno for one in caplog.records] == [logging.INFO]


# Into a buffer -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["SMC", "TCP"])
async def pair(request: pytest.FixtureRequest, rig: SmcRig) -> AsyncIterator[tuple[SmcStream, SmcStream]]:
    async with await rig.listen(smc="auto" if request.param == "SMC" else "off") as listener:
        client, server = await rig.connect(port_of(listener)), await listener.accept()
        async with client, server:
            yield client, server


@bounded
async def test_bytes_can_be_received_into_a_buffer(pair: tuple[SmcStream, SmcStream]) -> None:
    one, other = pair
    buffer = bytearray(10)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.send_all, b"0123456789abc")
        got = await other.receive_some_into(buffer)
        while got < 13:
            with trio.testing.assert_checkpoints():
                got += await other.receive_some_into(memoryview(buffer)[2:5])
    assert (buffer[:2], got) == (b"01", 13)
    assert buffer[2:5] == b"abc"
    with pytest.raises(ValueError, match="empty"):
        await other.receive_some_into(bytearray())
    with pytest.raises(TypeError):
        await other.receive_some_into(b"read-only")  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            assert await other.receive_some_into(buffer) == 1

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await other.receive_some_into(buffer)
        await one.send_all(b"x")
    await one.aclose()
    assert await other.receive_some_into(buffer) == 0
    await other.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await other.receive_some_into(buffer)

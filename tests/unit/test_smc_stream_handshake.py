# SPDX-License-Identifier: Apache-2.0
"""The lazy handshake inside a stream: cancelled, shared by two tasks, closed in the middle, short of resources."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import trio
import trio.testing
from smc_stream_rig import LIMIT_S, SmcRig, bounded, leak_checked, port_of, receive_exactly, shake_hands, tcp_of, until

from ism.driver import Device
from ism.errors import QuotaError
from ism.manager.quota import Quota
from ism.smc import SmcStream, handshake, open_tcp_listeners, open_tcp_stream
from ism.smc.handshake import DeclinedError
from ism.smc.handshake_machine import ClientHandshake, Confirmed, PeerAccepted


@pytest.fixture
def rig() -> Iterator[SmcRig]:
    with leak_checked() as made:
        yield made


async def talk(client: SmcStream, server: SmcStream) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send_all, b"ping")
        assert await receive_exactly(server, 4) == b"ping"
    await server.send_all(b"pong")
    assert await receive_exactly(client, 4) == b"pong"


# Cancellation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["client", "server"])
@bounded
async def test_a_receive_cancelled_while_the_peer_is_silent_can_be_repeated(rig: SmcRig, first: str) -> None:
    client, server = await rig.fresh_pair()
    async with client, server:
        waiting = client if first == "client" else server
        for _ in range(3):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(waiting.receive_some)
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
            assert scope.cancelled_caught
        await talk(client, server)


@bounded
async def test_a_handshake_cancelled_at_any_moment_goes_on_with_the_next_call(
    rig: SmcRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ends give up after one more scheduling step each time, from both sides, until it is through."""
    given_up: dict[SmcStream, int] = {}
    allocate = handshake.allocate

    def allocate_late(*args: Any, **options: Any) -> Any:
        patience = time.monotonic() + LIMIT_S
        while len(given_up) < 2 and time.monotonic() < patience:
            time.sleep(0.001)
        return allocate(*args, **options)

    monkeypatch.setattr(handshake, "allocate", allocate_late)

    async def persistent(stream: SmcStream) -> None:
        for patience in range(1, 100_000):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:

                    async def give_up(scope: trio.CancelScope = scope, steps: int = patience % 7) -> None:
                        for _ in range(steps):
                            await trio.lowlevel.checkpoint()
                        scope.cancel()

                    nursery.start_soon(give_up)
                    await stream.do_handshake()
                    nursery.cancel_scope.cancel()
            if scope.cancelled_caught:
                given_up[stream] = patience
            if stream.connection is not None:
                return

    for _ in range(5):
        client, server = await rig.fresh_pair()
        given_up.clear()
        async with client, server:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(persistent, client)
                nursery.start_soon(persistent, server)
            assert len(given_up) == 2
            await talk(client, server)
        rig.let_go()


@bounded
async def test_a_server_cancelled_after_its_accept_keeps_the_region_and_goes_on(rig: SmcRig) -> None:
    client, server = await rig.fresh_pair()
    async with client, server:
        tcp, machine = tcp_of(client), ClientHandshake(handshake.identity_of(rig.client_device))
        await tcp.send(machine.start())
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.do_handshake)
                await until(lambda: rig.regions == 1)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        assert rig.regions == 1
        with trio.CancelScope() as scope:
            scope.cancel()
            await server.receive_some()
        while (answer := machine.receive(await tcp.recv(machine.bytes_wanted))) is None:
            pass
        assert isinstance(answer, PeerAccepted)
        own = handshake.allocate(rig.client_device, rig.buffer_size, answer.devid)
        attached = handshake.attach(rig.client_device, answer)
        await tcp.send(machine.confirm(own.token, rig.buffer_size))
        await server.do_handshake()
        assert server.connection is not None
        assert server.connection.rx.token == attached.token
        own.close()
        attached.close()


@bounded
async def test_a_stream_closed_after_a_cancelled_handshake_leaves_nothing(rig: SmcRig) -> None:
    client, server = await rig.fresh_pair()
    async with client:
        await tcp_of(client).send(ClientHandshake(handshake.identity_of(rig.client_device)).start())
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.do_handshake)
                await until(lambda: rig.regions == 1)
                scope.cancel()
        await server.aclose()
        await until(lambda: rig.regions == 0)


@bounded
async def test_a_stream_dropped_after_a_cancelled_handshake_leaves_nothing(rig: SmcRig) -> None:
    client, server = await rig.fresh_pair()
    async with client:
        await tcp_of(client).send(ClientHandshake(handshake.identity_of(rig.client_device)).start())
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.do_handshake)
                await until(lambda: rig.regions == 1)
                scope.cancel()
        server.socket.close()
        del server
        await until(lambda: rig.regions == 0)


# Two tasks ------------------------------------------------------------------------------------------------------


@bounded
async def test_the_handshake_goes_on_for_the_second_task_when_the_first_is_cancelled(rig: SmcRig) -> None:
    client, server = await rig.fresh_pair()
    async with client, server, trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def read() -> None:
            with scope:
                await client.receive_some()

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(client.send_all, b"from the second")
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert await receive_exactly(server, 15) == b"from the second"


@pytest.mark.parametrize("closer", ["client", "server"])
@bounded
async def test_closing_during_the_handshake_ends_both_tasks_and_leaves_nothing(rig: SmcRig, closer: str) -> None:
    other: trio.SocketStream  # it takes no part in the handshake
    if closer == "client":
        (silent,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with silent:
            stream = await rig.connect(silent.socket.getsockname()[1])
            other = await silent.accept()
    else:
        async with await rig.listen() as listener:
            other = await trio.open_tcp_stream("127.0.0.1", port_of(listener))
            stream = await listener.accept()
    async with stream, other, trio.open_nursery() as nursery:

        async def expect_closed(call: Any) -> None:
            with pytest.raises(trio.ClosedResourceError):
                await call()

        nursery.start_soon(expect_closed, stream.receive_some)
        nursery.start_soon(expect_closed, lambda: stream.send_all(b"x"))
        await trio.testing.wait_all_tasks_blocked()
        await stream.aclose()


@pytest.mark.parametrize("step", ["attach", "allocate"])
@pytest.mark.parametrize("closer", ["client", "server"])
@bounded
async def test_closing_while_the_device_is_asked_leaves_nothing(
    rig: SmcRig, monkeypatch: pytest.MonkeyPatch, closer: str, step: str
) -> None:
    entered, go_on = threading.Event(), threading.Event()
    original = getattr(handshake, step)
    device = rig.client_device if closer == "client" else rig.server_device

    def slow(asked: Device, *args: Any, **options: Any) -> Any:
        made = original(asked, *args, **options)
        if asked is device:
            entered.set()
            assert go_on.wait(30)
        return made

    monkeypatch.setattr(handshake, step, slow)
    client, server = await rig.fresh_pair()
    stream, other = (client, server) if closer == "client" else (server, client)
    async with client, server, trio.open_nursery() as nursery:

        async def expect_closed() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await stream.receive_some()

        async def expect_the_end() -> None:
            try:
                assert await other.receive_some() == b""
            except trio.BrokenResourceError:
                pass  # it had heard a part of the handshake

        nursery.start_soon(expect_closed)
        nursery.start_soon(expect_the_end)
        await trio.to_thread.run_sync(entered.wait)
        await stream.aclose()
        go_on.set()
    await until(lambda: rig.regions == 0)


@bounded
async def test_a_waiter_that_takes_over_a_closed_handshake_releases_it(rig: SmcRig) -> None:
    client, server = await rig.fresh_pair()
    async with client:
        await tcp_of(client).send(ClientHandshake(handshake.identity_of(rig.client_device)).start())
        scope = trio.CancelScope()
        async with trio.open_nursery() as nursery:

            async def first() -> None:
                with scope:
                    await server.do_handshake()
                await server.aclose()

            async def second() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await server.send_all(b"x")

            nursery.start_soon(first)
            await until(lambda: rig.regions == 1)
            nursery.start_soon(second)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
        await until(lambda: rig.regions == 0)


# Ends in the middle ---------------------------------------------------------------------------------------------


@bounded
async def test_a_server_that_closes_with_an_offer_unread_looks_like_an_end_of_file(rig: SmcRig) -> None:
    client, server = await rig.fresh_pair()
    async with client, trio.open_nursery() as nursery:

        async def expect_the_end() -> None:
            assert await client.receive_some() == b""

        nursery.start_soon(expect_the_end)
        await trio.testing.wait_all_tasks_blocked()
        await server.aclose()


@bounded
async def test_a_handshake_that_failed_keeps_failing_with_its_reason(rig: SmcRig) -> None:
    client, server = await rig.fresh_pair()
    async with client, server:
        await tcp_of(client).send(b"not a handshake")
        for call in (server.receive_some, server.do_handshake, lambda: server.send_all(b"x"), server.send_eof):
            with trio.testing.assert_checkpoints(), pytest.raises(trio.BrokenResourceError) as caught:
                await call()
            assert caught.value.__cause__ is not None


# Resources ------------------------------------------------------------------------------------------------------


@bounded
async def test_a_server_without_quota_declines_and_both_ends_learn_why(rig: SmcRig) -> None:
    with rig.plug(quota=Quota(bytes=1 << 16, regions=1, attachments=4)) as poor:
        hoard = poor.alloc(1 << 16)
        (listener,) = await open_tcp_listeners(0, host="127.0.0.1", smc="require", device=poor)
        async with listener:
            client = await rig.connect(port_of(listener))
            server = await listener.accept()
        causes = {}

        async def expect_broken(name: str, stream: SmcStream) -> None:
            with pytest.raises(trio.BrokenResourceError) as caught:
                await stream.receive_some()
            causes[name] = caught.value.__cause__

        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(expect_broken, "client", client)
            nursery.start_soon(expect_broken, "server", server)
        assert isinstance(causes["server"], DeclinedError)
        assert isinstance(causes["server"].__cause__, QuotaError)
        assert isinstance(causes["client"], DeclinedError)
        assert causes["client"].by_peer
        hoard.close()


@bounded
async def test_a_device_that_is_gone_breaks_the_stream_with_that_reason(rig: SmcRig) -> None:
    device = rig.plug()
    async with await rig.listen() as listener:
        lost = await rig.connect(port_of(listener), device=device)
        server = await listener.accept()
    device.transport.lose("the manager was stopped")  # type: ignore[attr-defined]
    async with lost, server, trio.open_nursery() as nursery:

        async def expect_broken(stream: SmcStream) -> None:
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()

        nursery.start_soon(expect_broken, lost)
        nursery.start_soon(expect_broken, server)
    device.close()


@pytest.mark.parametrize("chunk_size", [4096, 65536])
@pytest.mark.parametrize("size", [1, 5000, 70_000, 3 << 20])
@bounded
async def test_any_buffer_size_works(chunk_size: int, size: int) -> None:
    with leak_checked(buffer_size=size, chunk_size=chunk_size) as rig:
        client, server = await rig.pair()
        async with client, server:
            assert client.connection is not None
            assert client.connection.rx.length == math.ceil(max(size, 16384) / chunk_size) * chunk_size
            await talk(client, server)


@pytest.mark.parametrize("size", [0, -1, 1 << 64])
@bounded
async def test_an_impossible_buffer_size_is_refused_at_once(rig: SmcRig, size: int) -> None:
    with pytest.raises(ValueError, match="buffer_size"):
        await open_tcp_stream("127.0.0.1", 9, buffer_size=size)
    with pytest.raises(ValueError, match="buffer_size"):
        await open_tcp_listeners(0, buffer_size=size)


@bounded
async def test_two_hundred_connections_at_once_each_keep_their_bytes(rig: SmcRig) -> None:
    count = 200
    pairs: list[tuple[SmcStream, SmcStream]] = []
    async with await rig.listen() as listener:
        for _ in range(count):
            client = await rig.connect(port_of(listener))
            pairs.append((client, await listener.accept()))

    async def exchange(number: int, client: SmcStream, server: SmcStream) -> None:
        message = b"%d" % number * 1000
        await shake_hands(client, server)
        await client.send_all(message)
        assert await receive_exactly(server, len(message)) == message
        await server.send_all(message[::-1])
        assert await receive_exactly(client, len(message)) == message[::-1]

    async with trio.open_nursery() as nursery:
        for number, (client, server) in enumerate(pairs):
            nursery.start_soon(exchange, number, client, server)
    assert rig.regions == 2 * count
    async with trio.open_nursery() as nursery:
        for pair in pairs:
            for stream in pair:
                nursery.start_soon(stream.aclose)


# A client that is faster than its server ------------------------------------------------------------------------


@pytest.mark.parametrize("one_device", [False, True])
@bounded
async def test_what_a_client_sent_before_it_closed_arrives_though_the_server_attaches_later(
    one_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with leak_checked(one_device=one_device) as rig:
        client_is_done, attach = threading.Event(), handshake.attach

        def attach_late(device: Device, answer: Any) -> Any:
            if isinstance(answer, Confirmed):
                assert client_is_done.wait(10)
            return attach(device, answer)

        monkeypatch.setattr(handshake, "attach", attach_late)
        client, server = await rig.fresh_pair()
        async with server, trio.open_nursery() as nursery:

            async def say_and_leave() -> None:
                await client.send_all(b"the last words")
                await client.aclose()
                client_is_done.set()

            nursery.start_soon(say_and_leave)
            assert await receive_exactly(server, 14) == b"the last words"
            assert await server.receive_some() == b""
            with pytest.raises(trio.BrokenResourceError):
                await server.send_all(b"too late")

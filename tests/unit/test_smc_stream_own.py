# SPDX-License-Identifier: Apache-2.0
"""What only SMC streams show: information, sizes beyond a ring, fairness, and the default device."""

from __future__ import annotations

import array
import os
import socket
import threading
from collections.abc import Iterator

import numpy
import pytest
import trio
import trio.testing
from smc_stream_rig import SmcRig, bounded, leak_checked, receive_exactly, shake_hands

from ism.driver import Device
from ism.errors import TransportError
from ism.ids import DevId
from ism.smc import SmcListener, SmcStream, default, serve_tcp
from ism.smc.trio_wait import default_device
from ism.testing import Fabric


@pytest.fixture
def rig() -> Iterator[SmcRig]:
    with leak_checked() as made:
        yield made


@pytest.mark.parametrize(
    "data",
    [
        memoryview(bytes(range(256)) * 1024).cast("I"),
        array.array("H", range(60_000)),
        numpy.arange(50_000, dtype=numpy.uint32),
        numpy.arange(40_000, dtype=numpy.uint16).reshape(200, 200),
    ],
    ids=["view of words", "array", "numpy", "numpy, two dimensions"],
)
@bounded
async def test_a_buffer_of_wide_items_larger_than_the_ring_arrives_whole(rig: SmcRig, data: memoryview) -> None:
    client, server = await rig.pair()
    whole = memoryview(data).tobytes()
    async with client, server, trio.open_nursery() as nursery:
        nursery.start_soon(client.send_all, data)
        assert await receive_exactly(server, len(whole)) == whole


@bounded
async def test_the_largest_max_bytes_is_no_larger_than_what_is_there(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with client, server:
        await client.send_all(b"little")
        assert await server.receive_some(1 << 70) == b"little"


@bounded
async def test_a_sender_keeps_no_more_in_flight_than_the_peers_ring_holds(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with client, server:
        assert server.connection is not None
        with trio.move_on_after(0.05):
            await client.send_all(bytes(1 << 20))
        assert server.connection.endpoint.readable_bytes() == server.connection.endpoint.rx_ring_bytes == 61440


@bounded
async def test_a_send_that_the_peer_keeps_up_with_lets_other_tasks_run(rig: SmcRig) -> None:
    rig.buffer_size = 4 << 20  # so that the two threads do not wait for each other's turn at every few bytes
    client, server = await rig.pair()
    async with client, server:
        reader, total = server.connection, 64 << 20
        assert reader is not None
        turns = 0

        def read_as_fast_as_possible() -> None:
            left, buffer = total, bytearray(1 << 20)
            while left:
                left -= reader.endpoint.recv_into(buffer)

        async def count_turns() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        thread = threading.Thread(target=read_as_fast_as_possible)
        thread.start()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(count_turns)
            await client.send_all(bytes(total))
            nursery.cancel_scope.cancel()
        await trio.to_thread.run_sync(thread.join)
    assert turns > 2


@bounded
async def test_a_refused_second_task_has_passed_a_checkpoint(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with client, server, trio.open_nursery() as nursery:
        nursery.start_soon(client.receive_some)
        nursery.start_soon(client.send_all, bytes(1 << 20))
        await trio.testing.wait_all_tasks_blocked()
        for call in (
            client.receive_some,
            client.send_eof,
            client.wait_send_all_might_not_block,
            lambda: client.send_all(b"x"),
        ):
            with trio.testing.assert_checkpoints(), pytest.raises(trio.BusyResourceError):
                await call()
        nursery.cancel_scope.cancel()


@bounded
async def test_a_stream_tells_what_it_runs_over(rig: SmcRig) -> None:
    client, server = await rig.fresh_pair()
    async with client, server:
        assert client.connection is None
        assert client.socket.getpeername() == server.socket.getsockname()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 4) == (1).to_bytes(4, "little")
        await shake_hands(client, server)
        assert client.connection is not None
        assert client.connection.peer.devid == rig.server_device.devid
        assert client.connection.peer.link_id == os.getpid()


@bounded
async def test_a_closed_listener_accepts_nothing(rig: SmcRig) -> None:
    listener = await rig.listen()
    await listener.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()


@bounded
async def test_serving_closes_each_stream_after_its_handler(rig: SmcRig) -> None:
    async def double(stream: SmcStream) -> None:
        data = await receive_exactly(stream, 4)
        await stream.send_all(data * 2)

    async with trio.open_nursery() as nursery:

        async def serve(task_status: trio.TaskStatus[list[SmcListener]]) -> None:
            await serve_tcp(double, 0, host="127.0.0.1", **rig.server_options, task_status=task_status)

        (listener,) = await nursery.start(serve)
        for _ in range(3):
            async with await rig.connect(listener.socket.getsockname()[1]) as client:
                await client.send_all(b"echo")
                assert await receive_exactly(client, 8) == b"echoecho"
                assert await client.receive_some() == b""
        nursery.cancel_scope.cancel()


# The device that a process uses when it names none --------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Device]]:
    """Make the default device an in-memory one; lends the list of those that were opened."""
    fabric, devices = Fabric(), []

    def open_in_memory() -> Device:
        devices.append(Device(fabric.plug()))
        return devices[-1]

    monkeypatch.setattr(default, "open_device", open_in_memory)
    yield devices
    default.close_default()
    for device in devices:
        device.close()


@bounded
async def test_the_default_device_is_opened_once_however_many_ask(opened: list[Device]) -> None:
    found: list[DevId] = []

    async def ask() -> None:
        found.append((await default_device()).devid)

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(ask)
    assert len(opened) == 1
    assert found == [opened[0].devid] * 20


@bounded
async def test_a_default_device_that_is_gone_is_replaced(opened: list[Device]) -> None:
    first = await default_device()
    first.transport.lose("the manager was stopped")  # type: ignore[attr-defined]
    second = await default_device()
    assert second is not first
    assert await default_device() is second
    default.close_default()
    default.close_default()
    assert await default_device() is not second
    assert len(opened) == 3


def test_a_device_that_could_not_be_opened_is_not_tried_again_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[TransportError] = []

    def refuse() -> Device:
        failures.append(TransportError(f"no manager, try {len(failures)}"))
        raise failures[-1]

    monkeypatch.setattr(default, "open_device", refuse)
    monkeypatch.setattr(default, "_device", None)
    default.close_default()
    for _ in range(3):
        for ask in (default.open_default, default.opened):
            with pytest.raises(TransportError, match="try 0"):
                ask()
    monkeypatch.setattr(default, "RETRY_S", 0.0)
    assert default.opened() is None
    with pytest.raises(TransportError, match="try 1"):
        default.open_default()
    monkeypatch.setattr(default, "RETRY_S", 60.0)
    default.close_default()
    assert default.opened() is None
    with pytest.raises(TransportError, match="try 2"):
        default.open_default()
    default.close_default()


def test_a_default_device_that_was_lost_is_closed_once_nothing_holds_its_regions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fabric, opened = Fabric(), []

    def open_another() -> Device:
        transport = fabric.plug()
        opened.append((transport, Device(transport)))
        return opened[-1][1]

    monkeypatch.setattr(default, "open_device", open_another)
    monkeypatch.setattr(default, "_device", None)
    first = default.open_default()
    region = first.alloc(65536)
    opened[0][0].lose("the manager is gone")
    second = default.open_default()
    assert second is not first
    threads = threading.active_count()
    opened[1][0].lose("the manager is gone again")
    region.close()
    third = default.open_default()
    assert threading.active_count() == threads - 1  # two retired, one begun
    default.close_default()
    assert third.transport is opened[2][0]
    assert not default._retired


async def turns_of_others(rig: SmcRig, calls: int) -> int:
    """Send and receive without ever having to wait; count how often another task runs meanwhile."""
    client, server = await rig.pair()
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with client, server, trio.open_nursery() as nursery:
        client.amortise_checkpoints = server.amortise_checkpoints = True
        await client.send_all(b"x")  # a turn begins when one has ended
        await server.receive_some()
        nursery.start_soon(count)
        for _ in range(calls):
            await client.send_all(b"x")
            await server.receive_some()
        nursery.cancel_scope.cancel()
    return turns


@bounded
async def test_with_amortised_checkpoints_other_tasks_run_only_when_a_turn_is_over(
    rig: SmcRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ism.smc.trio_wait.TURN_S", 3600)
    assert await turns_of_others(rig, 50) == 0
    monkeypatch.setattr("ism.smc.trio_wait.TURN_S", 0)
    assert await turns_of_others(rig, 50) >= 90


@bounded
async def test_with_amortised_checkpoints_every_call_still_sees_cancellation(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with client, server:
        client.amortise_checkpoints = server.amortise_checkpoints = True
        await client.send_all(b"there")
        with trio.CancelScope() as scope:
            scope.cancel()
            await server.receive_some()
        assert scope.cancelled_caught
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.send_all(b"not sent")
        assert scope.cancelled_caught
        assert await server.receive_some() == b"there"


@bounded
async def test_streams_take_the_option_when_they_are_opened_and_accepted(rig: SmcRig) -> None:
    async with await rig.listen(amortise_checkpoints=True) as listener:
        client = await rig.connect(listener.socket.getsockname()[1], amortise_checkpoints=True)
        server = await listener.accept()
    async with client, server:
        assert client.amortise_checkpoints
        assert server.amortise_checkpoints


@bounded
async def test_a_call_that_slept_is_not_made_to_wait_for_its_turn_again(rig: SmcRig) -> None:
    client, server = await rig.pair()
    order: list[str] = []

    async def receive() -> None:
        order.append((await server.receive_some()).decode())

    async def send() -> None:
        await trio.testing.wait_all_tasks_blocked()
        await client.send_all(b"came")

    async with client, server:
        with trio.testing.assert_checkpoints():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                nursery.start_soon(send)
    assert order == ["came"]


@bounded
async def test_a_wait_that_slept_does_not_spare_the_next_call_its_yield(rig: SmcRig) -> None:
    client, server = await rig.pair()

    async def fill() -> None:
        with trio.move_on_after(0.2):
            await client.send_all(bytes(64 * rig.buffer_size))

    async def empty() -> None:
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(200):
            with trio.move_on_after(0.2):
                await server.receive_some(1 << 20)

    async with client, server:
        await fill()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(empty)
            await client.wait_send_all_might_not_block()
            with trio.testing.assert_checkpoints():
                await client.send_all(b"x")
            nursery.cancel_scope.cancel()

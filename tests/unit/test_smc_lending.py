# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PT012 (it is the end of a block that raises)
"""Memory lent by trio streams, over shared memory and over TCP; and the loan itself."""

from __future__ import annotations

import gc
import socket as std
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy
import pytest
import trio
import trio.testing
from smc_stream_rig import SmcRig, bounded, leak_checked, receive_all, receive_exactly

import ism.smc
from ism.driver import Region
from ism.ids import DevId
from ism.memory import PAGE_SIZE, Mapping
from ism.shm import HEADER_BYTES, Endpoint
from ism.shm.header import PRODUCER
from ism.smc import SmcStream, trio_wait
from ism.smc.group import link_groups
from ism.smc.lending import Loan

RING = 61440
"""Bytes of a ring in a buffer of 64 KiB."""


class Boom(Exception):
    """Raised by a block."""


# -- streams ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def rig() -> Iterator[SmcRig]:
    with leak_checked() as made:
        yield made


Streams = tuple[SmcStream, SmcStream]


async def tcp_streams() -> Streams:
    (listener,) = await ism.smc.open_tcp_listeners(0, host="127.0.0.1", smc="off")
    async with listener:
        client = await ism.smc.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1], smc="off")
        return client, await listener.accept()


@pytest.fixture(params=["SMC", "TCP"])
async def streams(request: pytest.FixtureRequest) -> AsyncIterator[Streams]:
    if request.param == "TCP":
        pair = await tcp_streams()
        for end in pair:
            assert end.smc_info().mode == "TCP"
        yield pair
    else:
        with leak_checked() as rig:
            pair = await rig.pair()
            yield pair
            for end in pair:
                await end.aclose()
    for end in pair:
        await end.aclose()


@bounded
async def test_what_is_written_into_a_lent_buffer_is_lent_to_the_receiver(streams: Streams) -> None:
    client, server = streams
    async with client.send_buffer(5) as room:
        assert (len(room), len(room.view), room.view.readonly) == (5, 5, False)
        room.view[:] = b"hello"
    async with server.receive_view() as lent:
        assert (len(lent), bytes(lent.view), lent.view.readonly) == (5, b"hello", True)
    await client.send_all(b"next")
    assert await server.receive_some() == b"next"


@bounded
async def test_a_block_takes_and_sends_as_many_bytes_as_it_says(streams: Streams) -> None:
    client, server = streams
    async with client.send_buffer(10) as room:
        room.view[:4] = b"abcd"
        room.commit(4)
    async with server.receive_view(3) as lent:
        assert bytes(lent.view) == b"abc"
        lent.consume(0)
        lent.consume(1)
    assert await server.receive_some() == b"bcd"
    async with client.send_buffer(10) as room:
        room.commit(0)
    await client.send_eof()
    assert await server.receive_some() == b""


@bounded
async def test_an_exception_in_the_block_neither_consumes_nor_sends(streams: Streams) -> None:
    client, server = streams
    with pytest.raises(Boom):
        async with client.send_buffer(3) as room:
            room.commit(2)
            raise Boom
    await client.send_all(b"abc")
    with pytest.raises(Boom):
        async with server.receive_view() as lent:
            lent.consume(1)
            raise Boom
    assert await receive_exactly(server, 3) == b"abc"


@bounded
async def test_at_the_end_of_the_stream_nothing_is_lent(streams: Streams) -> None:
    client, server = streams
    await client.send_eof()
    for _ in range(2):
        async with server.receive_view() as lent:
            assert not lent
            assert bytes(lent.view) == b""
    with pytest.raises(trio.ClosedResourceError):
        async with client.send_buffer(1):
            pass


@bounded
async def test_counts_that_are_no_part_of_the_loan_are_refused(streams: Streams) -> None:
    client, server = streams
    await client.send_all(b"abc")
    async with server.receive_view() as lent, client.send_buffer(2) as room:
        for count in (-1, 4):
            with pytest.raises(ValueError, match="not part"):
                lent.consume(count)
        with pytest.raises(ValueError, match="not part"):
            room.commit(3)
        with pytest.raises(TypeError):
            room.commit(1.0)  # type: ignore[arg-type]
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="must be 1 or more"):
            server.receive_view(wrong)
        with pytest.raises(ValueError, match="must be 1 or more"):
            client.send_buffer(wrong)
    with pytest.raises(ValueError, match="has ended"):
        lent.consume(1)
    with pytest.raises(ValueError, match="has ended"):
        room.commit(1)


@bounded
async def test_a_view_used_after_the_block_is_an_error_and_no_access(streams: Streams) -> None:
    client, server = streams
    async with client.send_buffer(3) as room:
        written = room.view
    async with server.receive_view() as lent:
        view = lent.view
    for gone in (written, view):
        with pytest.raises(ValueError, match="released"):
            gone[0]


@pytest.mark.parametrize(
    "keep",
    [lambda view: view[1:], lambda view: numpy.frombuffer(view, numpy.uint8)[1:], lambda view: view.cast("c")],
    ids=["slice", "array", "cast"],
)
@bounded
async def test_bytes_still_looked_at_stay_until_nobody_looks(streams: Streams, keep: Callable[[Any], Any]) -> None:
    client, server = streams
    await client.send_all(b"abcd")
    kept = None
    with pytest.raises(BufferError, match="still in use"):
        async with server.receive_view() as lent:
            kept = keep(lent.view)
            lent.consume(2)
    for _ in range(2):
        with trio.testing.assert_checkpoints(), pytest.raises(BufferError):
            await server.receive_some()
        with pytest.raises(BufferError):
            lent.release()
        with pytest.raises(BufferError):
            async with server.receive_view():
                pass
    assert bytes(kept)[-1:] == b"d"
    assert unread_of(server) == b"abcd", "nothing was given back"
    del kept
    assert await server.receive_some() == b"cd", "what the block has consumed is consumed now"


def unread_of(stream: SmcStream) -> bytes:
    if stream.connection is not None:
        return stream.connection.endpoint.peek_copy(100)
    with std.fromfd(stream.socket.fileno(), std.AF_INET, std.SOCK_STREAM) as tcp:
        return tcp.recv(100, std.MSG_PEEK)


@bounded
async def test_room_still_written_to_is_not_sent_until_nobody_does(streams: Streams) -> None:
    client, server = streams
    kept = None
    with pytest.raises(BufferError):
        async with client.send_buffer(4) as room:
            kept = room.view[1:]
            room.view[:] = b"abcd"
    for call in (lambda: client.send_all(b"x"), client.send_eof, client.wait_send_all_might_not_block):
        with trio.testing.assert_checkpoints(), pytest.raises(BufferError):
            await call()
    kept[0] = ord("B")
    del kept
    await client.send_all(b"efg")
    assert await receive_exactly(server, 7) == b"aBcdefg"


@bounded
async def test_an_exception_comes_before_what_is_still_looked_at(streams: Streams) -> None:
    client, server = streams
    await client.send_all(b"abc")
    kept = []
    with pytest.raises(Boom):
        async with server.receive_view() as lent:
            kept.append(lent.view[:1])
            raise Boom
    with pytest.raises(BufferError):
        await server.receive_some()
    kept.clear()
    assert await server.receive_some() == b"abc"


@bounded
async def test_a_loan_released_early_gives_the_direction_back(streams: Streams) -> None:
    client, server = streams
    async with client.send_buffer(3) as room:
        room.view[:] = b"abc"
        room.release()
        room.release()
        await client.send_all(b"def")
    async with server.receive_view(3) as lent:
        assert bytes(lent.view) == b"abc"
        lent.release()
        assert await server.receive_some(1) == b"d"
        async with server.receive_view() as inner:
            assert bytes(inner.view) == b"ef"
    await client.send_all(b"xy")
    early, early_room = server.receive_view(1), client.send_buffer(1)
    (await early.__aenter__()).release()
    (await early_room.__aenter__()).release()
    async with server.receive_view(), client.send_buffer(1):
        await early.__aexit__(None, None, None)  # the turn is another block's by now
        await early_room.__aexit__(None, None, None)
        with pytest.raises(trio.BusyResourceError):
            await server.receive_some()
        with pytest.raises(trio.BusyResourceError):
            await client.send_all(b"z")


@bounded
async def test_a_direction_that_is_lent_is_busy(streams: Streams) -> None:
    client, server = streams
    await client.send_all(b"abc")

    async def enter(block: Any) -> None:
        async with block:
            pass

    async with server.receive_view() as lent, server.send_buffer(2) as room:
        for call in (
            server.receive_some,
            lambda: server.receive_some_into(bytearray(1)),
            lambda: enter(server.receive_view()),
            lambda: server.send_all(b"x"),
            server.send_eof,
            server.wait_send_all_might_not_block,
            lambda: enter(server.send_buffer(1)),
        ):
            with trio.testing.assert_checkpoints(), pytest.raises(trio.BusyResourceError):
                await call()
        room.view[:] = b"ok"
        assert bytes(lent.view) == b"abc"
    assert await client.receive_some() == b"ok"


@bounded
async def test_the_socket_of_a_stream_that_is_lent_is_busy(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with client, server:
        await client.send_all(b"abc")
        async with server.receive_view() as lent, server.send_buffer(1):
            for call in (lambda: server.socket.recv(1), lambda: server.socket.send(b"x")):
                with trio.testing.assert_checkpoints(), pytest.raises(trio.BusyResourceError):
                    await call()
            with pytest.raises(trio.BusyResourceError):
                server.socket.dup()
            assert bytes(lent.view) == b"abc"
        await client.receive_some()


@bounded
async def test_a_stream_closed_in_the_middle_leaves_the_memory_and_takes_nothing(streams: Streams) -> None:
    client, server = streams
    await client.send_all(bytes(1000))
    with pytest.raises(trio.ClosedResourceError):
        async with client.send_buffer(10) as room:
            await client.aclose()
            room.view[:] = bytes(10)
            with pytest.raises(trio.ClosedResourceError):
                room.commit(1)
    async with server.receive_view() as lent:
        await server.aclose()
        assert len(bytes(lent.view)) == len(lent)
        with pytest.raises(trio.ClosedResourceError):
            lent.consume(1)
    with pytest.raises(trio.ClosedResourceError):
        async with server.receive_view():
            pass
    with pytest.raises(trio.ClosedResourceError):
        async with client.send_buffer(1):
            pass


@bounded
async def test_entering_waits_until_there_are_bytes_or_room(streams: Streams) -> None:
    client, server = streams
    got = []

    async def receive() -> None:
        async with server.receive_view() as lent:
            got.append(bytes(lent.view))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        assert not got
        await client.send_all(b"late")
    assert got == [b"late"]
    sent = 0

    async def fill() -> None:
        nonlocal sent
        while True:
            async with client.send_buffer(1 << 16) as room:
                sent += len(room)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fill)
        await trio.testing.wait_all_tasks_blocked()
        before, taken = sent, 0
        assert before > 0
        while sent == before:
            taken += len(await server.receive_some())
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    await client.send_eof()
    taken += len(await receive_all(server))
    if client.connection is not None:
        assert taken == sent
    else:  # cancelled while it was leaving: an unknown part of the last buffer was sent
        assert sent - (1 << 16) <= taken <= sent


@bounded
async def test_a_block_whose_entering_is_cancelled_takes_nothing(streams: Streams) -> None:
    client, server = streams
    with trio.CancelScope() as scope:
        scope.cancel()
        async with client.send_buffer(3):
            pytest.fail("entered")
    with trio.move_on_after(0) as scope:
        async with server.receive_view():
            pytest.fail("entered")
    assert scope.cancelled_caught
    await client.send_all(b"abc")
    with trio.CancelScope() as scope:
        scope.cancel()
        async with server.receive_view():
            pytest.fail("entered")
    with trio.CancelScope() as scope:
        async with server.receive_view() as lent, client.send_buffer(2) as room:
            room.view[:] = b"no"
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert lent.over
    assert room.over
    assert await server.receive_some() == b"abc"
    await client.send_eof()
    assert await server.receive_some() == b""


@pytest.mark.parametrize("amortised", [False, True])
@bounded
async def test_a_block_is_a_checkpoint_and_with_amortised_ones_seldom(
    rig: SmcRig, amortised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trio_wait, "TURN_S", 3600.0)
    client, server = await rig.pair()
    async with client, server:
        client.amortise_checkpoints = server.amortise_checkpoints = amortised
        turns = 0

        async def count_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count_turns)
            await trio.lowlevel.checkpoint()
            before, blocks = turns, 0
            for _ in range(200):
                async with client.send_buffer(1):
                    pass
                async with server.receive_view():
                    pass
                blocks += 2
            passed = turns - before
            nursery.cancel_scope.cancel()
        assert passed <= 4 if amortised else passed >= blocks - 4


@bounded
async def test_what_wraps_in_the_ring_is_lent_in_two_parts(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with client, server:
        await client.send_all(bytes(RING - 3))
        assert len(await receive_exactly(server, RING - 3)) == RING - 3
        async with client.send_buffer(8) as room:
            assert len(room) == 3
            room.view[:] = b"abc"
        async with client.send_buffer(5) as room:
            assert len(room) == 5
            room.view[:] = b"defgh"
        async with server.receive_view() as lent:
            assert bytes(lent.view) == b"abc"
        async with server.receive_view() as lent:
            assert bytes(lent.view) == b"defgh"


@bounded
async def test_a_reset_shows_after_the_bytes_that_came_before(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with client, server:
        await server.send_all(b"unread")
        await client.send_all(b"last")
        await client.aclose()  # with bytes unread: a reset
        async with server.receive_view() as lent:
            assert bytes(lent.view) == b"last"
        for _ in range(2):
            with trio.testing.assert_checkpoints(), pytest.raises(trio.BrokenResourceError):
                async with server.receive_view():
                    pass
        with trio.testing.assert_checkpoints(), pytest.raises(trio.BrokenResourceError):
            async with server.send_buffer(1):
                pass


@bounded
async def test_room_lent_while_the_peer_closes_is_not_sent(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with client, server:
        with pytest.raises(trio.BrokenResourceError):
            async with client.send_buffer(1):
                await server.aclose()
        assert not client._sending


@bounded
async def test_regions_are_used_again_after_loans_that_are_over_and_not_after_others(rig: SmcRig) -> None:
    for left in (None, "view", "room", "peek"):
        client, server = await rig.pair()
        groups = link_groups(rig.server_device)
        await client.send_all(b"abc")
        kept: Any = None
        async with server.receive_view() as lent:
            assert bytes(lent.view) == b"abc"
        async with server.send_buffer(1):
            pass
        assert len(await client.receive_some()) == 1
        if left == "view":
            await client.send_all(b"abc")
            with pytest.raises(BufferError):
                async with server.receive_view() as lent:
                    kept = lent.view[:1]
        elif left == "room":
            with pytest.raises(BufferError):
                async with server.send_buffer(1) as room:
                    kept = room.view[:1]
        elif left == "peek":
            assert server.connection is not None
            server.connection.endpoint.peek()
        await server.aclose()
        await client.aclose()
        kept_pairs = groups._groups.get(DevId(rig.client_device.devid))
        assert (kept_pairs is not None and len(kept_pairs.pairs) > 0) == (left is None)
        groups.clear()
        del kept


@bounded
async def test_a_loan_is_made_by_a_handshake_too(rig: SmcRig) -> None:
    client, server = await rig.fresh_pair()
    async with client, server, trio.open_nursery() as nursery:

        async def send() -> None:
            async with client.send_buffer(5) as room:
                room.view[:] = b"first"

        nursery.start_soon(send)
        async with server.receive_view() as lent:
            assert bytes(lent.view) == b"first"
        assert server.smc_info().mode == "SMC"


@bounded
async def test_neither_sending_nor_receiving_an_array_makes_another_copy(rig: SmcRig) -> None:
    client, server = await rig.pair()
    size = 8 << 20
    source = numpy.arange(size, dtype=numpy.uint8)
    target = numpy.zeros(size, numpy.uint8)

    async def receive() -> None:
        view = memoryview(target)
        while view:
            view = view[await server.receive_some_into(view) :]

    async with client, server:
        tracemalloc.start()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                await client.send_all(source)  # type: ignore[arg-type]
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert numpy.array_equal(source, target)
    assert peak < size // 8


@bounded
async def test_what_a_peer_does_to_lent_memory_shows_and_does_no_more(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with client, server:
        await client.send_all(b"honest")
        assert client.connection is not None
        theirs = client.connection.tx
        assert isinstance(theirs, Region)
        async with server.receive_view() as lent:
            kept = bytes(lent.view)
            theirs.view[HEADER_BYTES : HEADER_BYTES + 6] = b"forged"
            assert (kept, bytes(lent.view)) == (b"honest", b"forged")
            theirs.view[PRODUCER : PRODUCER + 8] = (1 << 40).to_bytes(8, "little")
        with pytest.raises(trio.BrokenResourceError):
            await server.receive_some()


async def test_a_loan_stays_in_the_ring_it_was_made_of_when_the_stream_moves_to_another() -> None:
    homes = [Mapping(HEADER_BYTES + PAGE_SIZE), Mapping(HEADER_BYTES + PAGE_SIZE)]
    sender, receiver = (
        Endpoint(homes[1 - end], homes[end], doorbell=lambda: None, max_spin_ns=0, kernel=1 + end) for end in (0, 1)
    )
    larger = Mapping(4 * PAGE_SIZE)
    sender.send(b"before")
    room = sender.lend_room(4)
    receiver.offer_ring(larger, 7)
    offer = sender.read_offer()
    assert offer is not None
    sender.use_ring(larger, offer[0])
    room[:] = b"room"
    sender.commit(4)
    sender.send(b"after")
    assert sender.tx_ring_bytes == 4 * PAGE_SIZE
    view = receiver.lend_unread(100)
    assert bytes(view) == b"beforeroom"
    receiver.consume(10)
    after = receiver.lend_unread(100)
    assert bytes(after) == b"after"
    assert receiver.uses(larger)
    del homes, sender, receiver, larger
    gc.collect()
    assert (bytes(view), bytes(after)) == (b"beforeroom", b"after"), "mapped for as long as somebody looks"


# -- the loan itself -------------------------------------------------------------------------------------------------


def test_a_loan_ends_once_and_tells_how_many_bytes_count() -> None:
    told: list[int] = []
    loan = Loan(memoryview(bytearray(8)), told.append)
    with loan:
        loan.view[0] = 1
    loan.release()
    assert told == [8]
    assert loan.over


def test_a_loan_that_is_pinned_tells_nothing_until_nobody_looks() -> None:
    told: list[int] = []
    with pytest.raises(BufferError), Loan(memoryview(bytearray(8)), told.append) as loan:
        again = memoryview(loan.view)
    assert told == []
    assert loan.ended
    assert not loan.over
    del again
    loan.release()
    assert told == [8]


def test_a_loan_in_a_reference_cycle_is_collected_without_harm() -> None:
    told: list[int] = []
    for _ in range(50):
        loan = Loan(memoryview(bytearray(8))[1:], told.append)
        cycle: list[Any] = [loan, loan.view, loan.view[1:], numpy.frombuffer(loan.view, numpy.uint8)]
        cycle.append(cycle)
        with pytest.raises(BufferError):
            loan.release()
        del loan, cycle
        gc.collect()
    assert told == []

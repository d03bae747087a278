# SPDX-License-Identifier: Apache-2.0
"""What a stream shows is the same over SMC as over TCP: every check runs on both, and TCP is the reference."""

from __future__ import annotations

import random
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import trio
import trio.testing
from smc_stream_rig import Pair, SmcRig, TcpRig, bounded, leak_checked, receive_all, receive_exactly

MANY = 1 << 23
"""More bytes than TCP takes that nobody reads: the kernel lets one side's buffer grow to 4 MiB."""
"""More than either transport buffers."""


@pytest.fixture(params=["tcp", "smc", "smc on one device", "smc by the directory"])
def rig(request: pytest.FixtureRequest) -> Iterator[SmcRig | TcpRig]:
    if request.param == "tcp":
        yield TcpRig()
    else:
        with leak_checked(one_device="one" in request.param, directory="directory" in request.param) as smc:
            yield smc


@pytest.fixture(params=["from the client", "from the server"])
async def pair(request: pytest.FixtureRequest, rig: SmcRig | TcpRig) -> AsyncIterator[Pair]:
    """Two connected streams; the first of them acts."""
    client, server = await rig.pair()
    async with client, server:
        yield (client, server) if "client" in request.param else (server, client)


async def clog(stream: Any) -> None:
    """Send until the peer must read."""
    await stream.send_all(bytes(MANY))


# Half-close and close -------------------------------------------------------------------------------------------


@bounded
async def test_half_close_ends_one_direction_and_leaves_the_other_open(pair: Pair) -> None:
    one, other = pair
    await one.send_all(b"question")
    await one.send_eof()
    assert await receive_all(other) == b"question"
    await other.send_all(b"answer")
    assert await receive_exactly(one, 6) == b"answer"
    await other.send_eof()
    assert await one.receive_some() == b""
    assert await other.receive_some() == b""


@bounded
async def test_after_half_close_sending_is_refused_and_a_second_half_close_is_not(pair: Pair) -> None:
    one, other = pair
    await one.send_eof()
    await one.send_eof()
    with pytest.raises(trio.ClosedResourceError):
        await one.send_all(b"late")
    await other.send_all(b"still open")
    assert await receive_exactly(one, 10) == b"still open"


@bounded
async def test_a_task_that_waits_to_receive_sees_the_half_close(pair: Pair) -> None:
    one, other = pair
    got = []
    async with trio.open_nursery() as nursery:

        async def wait_for_the_end() -> None:
            got.append(await other.receive_some())

        nursery.start_soon(wait_for_the_end)
        await trio.testing.wait_all_tasks_blocked()
        await one.send_eof()
    assert got == [b""]


@bounded
async def test_close_after_everything_was_read_is_an_end_of_file(pair: Pair) -> None:
    one, other = pair
    await other.send_all(b"all read")
    assert await receive_exactly(one, 8) == b"all read"
    await one.send_all(b"bye")
    await one.aclose()
    assert await receive_all(other) == b"bye"
    assert await other.receive_some() == b""


@bounded
async def test_close_with_unread_bytes_resets_the_peer_after_it_has_read_what_was_sent(pair: Pair) -> None:
    one, other = pair
    await other.send_all(b"never read")
    await trio.testing.wait_all_tasks_blocked()
    await one.send_all(b"last words")
    await one.aclose()
    assert await receive_exactly(other, 10) == b"last words"
    with pytest.raises(trio.BrokenResourceError) as caught:
        await other.receive_some()
    assert isinstance(caught.value.__cause__, ConnectionResetError)


@bounded
async def test_close_with_unread_bytes_wakes_a_peer_that_waits(pair: Pair) -> None:
    one, other = pair
    await other.send_all(b"never read")
    async with trio.open_nursery() as nursery:

        async def wait_for_the_end() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await other.receive_some()

        nursery.start_soon(wait_for_the_end)
        await trio.testing.wait_all_tasks_blocked()
        await one.aclose()


@bounded
async def test_unread_bytes_after_the_peers_half_close_still_reset_on_close(pair: Pair) -> None:
    one, other = pair
    await other.send_all(b"never read")
    await other.send_eof()
    await trio.testing.wait_all_tasks_blocked()
    await one.aclose()
    with pytest.raises(trio.BrokenResourceError):
        await other.receive_some()


@bounded
async def test_sending_after_the_peers_close_breaks_soon(pair: Pair) -> None:
    one, other = pair
    await one.aclose()
    with pytest.raises(trio.BrokenResourceError):  # noqa: PT012 (which of them fails is the transport's)
        while True:
            await other.send_all(b"anybody there?")


@bounded
async def test_a_sender_that_waits_for_room_breaks_when_the_peer_closes(pair: Pair) -> None:
    one, other = pair
    async with trio.open_nursery() as nursery:

        async def send_too_much() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await clog(other)

        nursery.start_soon(send_too_much)
        await trio.testing.wait_all_tasks_blocked()
        await one.aclose()


@bounded
async def test_bytes_sent_before_a_close_arrive_however_many_there_are(pair: Pair) -> None:
    one, other = pair
    data = random.Random(1).randbytes(MANY)
    async with trio.open_nursery() as nursery:

        async def send_and_close() -> None:
            await one.send_all(data)
            await one.aclose()

        nursery.start_soon(send_and_close)
        assert await receive_all(other) == data


@bounded
async def test_close_can_be_repeated_and_everything_else_is_refused(pair: Pair) -> None:
    one, _ = pair
    await one.aclose()
    await one.aclose()
    for call in (
        lambda: one.send_all(b"x"),
        lambda: one.send_all(b""),
        lambda: one.receive_some(1),
        one.send_eof,
        one.wait_send_all_might_not_block,
    ):
        with pytest.raises(trio.ClosedResourceError):
            await call()


@bounded
async def test_close_is_done_even_when_cancelled(pair: Pair) -> None:
    one, other = pair
    with trio.CancelScope() as scope:
        scope.cancel()
        await one.aclose()
    assert scope.cancelled_caught
    assert await other.receive_some() == b""
    with pytest.raises(trio.ClosedResourceError):
        await one.receive_some()


@bounded
async def test_close_ends_the_calls_of_other_tasks(pair: Pair) -> None:
    one, _ = pair
    async with trio.open_nursery() as nursery:

        async def expect_closed(call: Any) -> None:
            with pytest.raises(trio.ClosedResourceError):
                await call()

        nursery.start_soon(expect_closed, one.receive_some)
        nursery.start_soon(expect_closed, lambda: clog(one))
        await trio.testing.wait_all_tasks_blocked()
        await one.aclose()


# Two tasks ------------------------------------------------------------------------------------------------------


@bounded
async def test_a_second_task_in_one_direction_is_refused_and_the_first_goes_on(pair: Pair) -> None:
    one, other = pair
    got = []
    async with trio.open_nursery() as nursery:

        async def receive() -> None:
            got.append(bytes(await one.receive_some()))

        nursery.start_soon(receive)
        nursery.start_soon(clog, one)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await one.receive_some()
        with pytest.raises(trio.BusyResourceError):
            await one.send_all(b"x")
        with pytest.raises(trio.BusyResourceError):
            await one.wait_send_all_might_not_block()
        await other.send_all(b"for the first")
        assert await receive_exactly(other, MANY) == bytes(MANY)
    assert got == [b"for the first"]


@bounded
async def test_a_reader_and_a_writer_of_one_stream_sleep_and_are_woken_independently(pair: Pair) -> None:
    one, other = pair
    order: list[Any] = []
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            for _ in range(3):
                order.append(bytes(await one.receive_some()))

        async def write() -> None:
            await clog(one)
            order.append("written")

        nursery.start_soon(read)
        nursery.start_soon(write)
        for number in range(2):
            await trio.testing.wait_all_tasks_blocked()
            await other.send_all(b"wake the reader %d" % number)
        await trio.testing.wait_all_tasks_blocked()
        assert order == [b"wake the reader 0", b"wake the reader 1"]
        assert await receive_exactly(other, MANY) == bytes(MANY)
        await trio.testing.wait_all_tasks_blocked()
        assert order[2:] == ["written"]
        await other.send_all(b"third")
    assert order[2:] == ["written", b"third"]


@bounded
async def test_cancelling_the_reader_leaves_a_sleeping_writer_wakeable(pair: Pair) -> None:
    one, other = pair
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def read() -> None:
            with scope:
                await one.receive_some()

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(clog, one)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert await receive_exactly(other, MANY) == bytes(MANY)
    assert scope.cancelled_caught


@bounded
async def test_cancelling_the_writer_leaves_a_sleeping_reader_wakeable(pair: Pair) -> None:
    one, other = pair
    got = []
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def write() -> None:
            with scope:
                await clog(one)

        async def read() -> None:
            got.append(bytes(await one.receive_some()))

        nursery.start_soon(write)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        await other.send_all(b"to the reader")
    assert got == [b"to the reader"]
    assert scope.cancelled_caught


# Cancellation and checkpoints -----------------------------------------------------------------------------------


@bounded
async def test_cancelled_receives_lose_nothing(pair: Pair) -> None:
    one, other = pair
    source = random.Random(5)
    data = source.randbytes(200_000)
    received = bytearray()
    cancelled = 0
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            at = 0
            while at < len(data):
                size = source.randint(1, 3000)
                await other.send_all(data[at : at + size])
                at += size
                for _ in range(source.randint(0, 3)):
                    await trio.lowlevel.checkpoint()

        async def cancel_soon(scope: trio.CancelScope) -> None:
            for _ in range(source.randint(0, 4)):
                await trio.lowlevel.checkpoint()
            scope.cancel()

        nursery.start_soon(send)
        while len(received) < len(data):
            with trio.CancelScope() as scope:
                nursery.start_soon(cancel_soon, scope)
                received += await one.receive_some(source.randint(1, 5000))
            cancelled += scope.cancelled_caught
    assert received == data
    assert cancelled


@bounded
async def test_every_call_is_a_checkpoint(pair: Pair) -> None:
    one, other = pair
    await other.send_all(b"two parts")
    await trio.testing.wait_all_tasks_blocked()
    for call in (
        lambda: one.send_all(b"x"),
        lambda: one.send_all(b""),
        lambda: one.receive_some(4),
        lambda: one.receive_some(),
        one.wait_send_all_might_not_block,
    ):
        with trio.testing.assert_checkpoints():
            await call()
    await other.receive_some()
    await other.aclose()
    for call in (one.receive_some, one.receive_some, one.aclose, one.aclose):
        with trio.testing.assert_checkpoints():
            await call()


@bounded
async def test_a_call_in_a_cancelled_scope_does_nothing(pair: Pair) -> None:
    one, other = pair
    await other.send_all(b"kept")
    await trio.testing.wait_all_tasks_blocked()
    for call in (one.receive_some, lambda: one.send_all(b"never sent")):
        with trio.CancelScope() as scope:
            scope.cancel()
            await call()
        assert scope.cancelled_caught
    assert await receive_exactly(one, 4) == b"kept"
    await one.send_eof()
    assert await other.receive_some() == b""


# Data -----------------------------------------------------------------------------------------------------------


@bounded
async def test_large_transfers_in_both_directions_at_once_arrive_whole(pair: Pair) -> None:
    sums: dict[str, tuple[int, int]] = {}

    async def send(stream: Any, seed: int) -> None:
        source, checksum, total = random.Random(seed), 0, 0
        while total < MANY:
            data = source.randbytes(source.choice([1, 7, 4096, source.randint(1, 300_000)]))
            checksum, total = zlib.crc32(data, checksum), total + len(data)
            await stream.send_all(data)
        await stream.send_eof()
        sums[f"sent {seed}"] = checksum, total

    async def receive(stream: Any, seed: int) -> None:
        source, checksum, total = random.Random(-seed), 0, 0
        while data := await stream.receive_some(source.randint(1, 200_000)):
            checksum, total = zlib.crc32(data, checksum), total + len(data)
        sums[f"received {seed}"] = checksum, total

    one, other = pair
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, one, 1)
        nursery.start_soon(send, other, 2)
        nursery.start_soon(receive, other, 1)
        nursery.start_soon(receive, one, 2)
    assert sums["sent 1"] == sums["received 1"]
    assert sums["sent 2"] == sums["received 2"]


@pytest.mark.parametrize(
    "make",
    [
        bytes,
        bytearray,
        memoryview,
        lambda data: memoryview(bytearray(data)),
        lambda data: memoryview(data).cast("I"),
        lambda data: memoryview(b"<" + data + b">")[1:-1],
        lambda data: memoryview(data).cast("B", (4, len(data) // 4)),
    ],
    ids=["bytes", "bytearray", "memoryview", "writable view", "view of words", "slice", "two dimensions"],
)
@bounded
async def test_any_contiguous_buffer_can_be_sent(pair: Pair, make: Any) -> None:
    one, other = pair
    data = bytes(range(64))
    await one.send_all(make(data))
    assert await receive_exactly(other, len(data)) == data


@pytest.mark.parametrize("wrong", [memoryview(b"abcdef")[::2], "text", None, 7, [1, 2]], ids=repr)
@bounded
async def test_what_is_no_contiguous_buffer_is_refused_and_the_stream_goes_on(pair: Pair, wrong: Any) -> None:
    one, other = pair
    with pytest.raises((TypeError, BufferError, ValueError, AttributeError)):
        await one.send_all(wrong)
    await one.send_all(b"good")
    assert await receive_exactly(other, 4) == b"good"


@bounded
async def test_sending_nothing_sends_nothing(pair: Pair) -> None:
    one, other = pair
    for nothing in (b"", bytearray(), memoryview(b""), memoryview(b"").cast("I")):
        await one.send_all(nothing)
    await one.send_all(b"something")
    assert await receive_exactly(other, 9) == b"something"


@bounded
async def test_what_is_received_is_the_callers_own_and_never_more_than_asked_for(pair: Pair) -> None:
    one, other = pair
    await one.send_all(b"abcdefghij")
    await trio.testing.wait_all_tasks_blocked()
    first = await other.receive_some(3)
    assert (bytes(first), bytes(await other.receive_some(1))) == (b"abc", b"d")
    assert bytes(await other.receive_some(1000)) == b"efghij"
    await one.send_all(b"overwrites nothing")
    assert bytes(first) == b"abc"


@pytest.mark.parametrize(("wrong", "error"), [(0, ValueError), (-1, ValueError), ("1", TypeError), (1.5, TypeError)])
@bounded
async def test_a_wrong_max_bytes_is_refused_and_the_stream_goes_on(pair: Pair, wrong: Any, error: Any) -> None:
    one, other = pair
    await one.send_all(b"x")
    with pytest.raises(error):
        await other.receive_some(wrong)
    assert await other.receive_some(1) == b"x"


@bounded
async def test_a_message_larger_than_all_buffers_comes_in_small_pieces(pair: Pair) -> None:
    one, other = pair
    data = random.Random(9).randbytes(300_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.send_all, data)
        received = bytearray()
        while len(received) < len(data):
            received += await other.receive_some(997)
    assert received == data


@bounded
async def test_a_sender_waits_for_a_slow_reader(pair: Pair) -> None:
    one, other = pair
    done = trio.Event()

    async def send() -> None:
        await clog(one)
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        left = MANY
        while left > MANY // 2:
            await trio.testing.wait_all_tasks_blocked()
            assert not done.is_set() or left < MANY // 2
            left -= len(await other.receive_some(50_000))
        await receive_exactly(other, left)
    assert done.is_set()


@bounded
async def test_waiting_for_room_ends_when_the_peer_has_read(pair: Pair) -> None:
    one, other = pair
    await one.wait_send_all_might_not_block()
    with trio.move_on_after(0.05):
        await clog(one)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.wait_send_all_might_not_block)
        with trio.move_on_after(0.05):
            await receive_all(other)


# Before the first byte ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closer", [0, 1], ids=["the client closes", "the server closes"])
@bounded
async def test_a_stream_closed_before_any_byte_is_an_end_of_file(rig: SmcRig | TcpRig, closer: int) -> None:
    streams = await rig.fresh_pair()
    await streams[closer].aclose()
    other = streams[1 - closer]
    assert await other.receive_some() == b""
    assert await other.receive_some() == b""
    await other.aclose()


@pytest.mark.parametrize("closer", [0, 1], ids=["the client closes", "the server closes"])
@bounded
async def test_a_reader_waiting_for_the_first_byte_sees_the_close(rig: SmcRig | TcpRig, closer: int) -> None:
    streams = await rig.fresh_pair()
    async with trio.open_nursery() as nursery, streams[1 - closer]:

        async def expect_the_end() -> None:
            assert await streams[1 - closer].receive_some() == b""

        async with trio.open_nursery() as waiting:
            waiting.start_soon(expect_the_end)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(streams[closer].aclose)


@pytest.mark.parametrize("closer", [0, 1], ids=["the client closes", "the server closes"])
@bounded
async def test_sending_to_a_peer_that_closed_before_any_byte_breaks_soon(rig: SmcRig | TcpRig, closer: int) -> None:
    streams = await rig.fresh_pair()
    await streams[closer].aclose()
    async with streams[1 - closer] as other:
        with pytest.raises(trio.BrokenResourceError):  # noqa: PT012 (which of them fails is the transport's)
            while True:
                await other.send_all(b"anybody there?")


@bounded
async def test_two_streams_that_were_never_used_close_without_trouble(rig: SmcRig | TcpRig) -> None:
    client, server = await rig.fresh_pair()
    await client.aclose()
    await server.aclose()


@bounded
async def test_both_ends_may_speak_first_and_in_two_tasks_each(rig: SmcRig | TcpRig) -> None:
    client, server = await rig.fresh_pair()
    got = {}

    async def receive(name: str, stream: Any) -> None:
        got[name] = await receive_exactly(stream, 5)

    async with client, server:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send_all, b"first")
            nursery.start_soon(receive, "client", client)
            nursery.start_soon(server.send_all, b"reply")
            nursery.start_soon(receive, "server", server)
        assert got == {"client": b"reply", "server": b"first"}

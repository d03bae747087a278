# SPDX-License-Identifier: Apache-2.0
"""asyncio's transports over shared memory do what they do over TCP: bytes, flow control, ends, protocols, names."""

from __future__ import annotations

import asyncio
import select
import socket
from typing import Any

import pytest
from asyncio_rig import (  # noqa: F401
    BIG,
    PLAIN_CLIENT,
    PLAIN_SERVER,
    SMC,
    SOON_S,
    TCP,
    Buffered,
    Echo,
    HalfClosing,
    Recorder,
    Rig,
    every_kind,
    manager,
    mode_of,
    run,
    warns_of_a_transport,
)

pytestmark = pytest.mark.usefixtures("manager")


# -- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("debug", [False, True])
def test_what_is_written_arrives_whatever_buffer_it_was_in(kind: str, debug: bool) -> None:
    async def main(rig: Rig) -> None:
        near, far = await rig.pair()
        near.transport.write(b"bytes ")
        near.transport.write(bytearray(b"array "))
        near.transport.write(memoryview(b"view "))
        near.transport.write(b"")
        near.transport.writelines([b"l", b"ine", bytearray(b"s")])
        assert await far.get(22) == b"bytes array view lines"
        far.transport.write(b"back")
        assert await near.get(4) == b"back"

    run(kind, main, debug=debug)


def test_a_server_may_speak_first(kind: str) -> None:
    class Greeter(Recorder):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.write(b"welcome")

    async def main(rig: Rig) -> None:
        near, _ = await rig.pair(server=Greeter, decided=False)
        assert await near.get(7) == b"welcome"
        assert mode_of(near.transport) in (rig.mode, None)

    run(kind, main)


def test_both_may_write_before_anything_is_decided_and_go_on_at_once(kind: str) -> None:
    class Writer(Recorder):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.write(BIG)
            if rigs[0].kind != TCP:
                assert transport.get_write_buffer_size() > 0

    rigs: list[Rig] = []

    async def main(rig: Rig) -> None:
        rigs.append(rig)
        near, far = await rig.pair(Writer, Writer, decided=False)
        assert await near.get(len(BIG)) == BIG
        assert await far.get(len(BIG)) == BIG
        await near.until(lambda: near.resumes == near.pauses)
        await far.until(lambda: far.resumes == far.pauses)

    run(kind, main)


def test_ping_pong_of_growing_messages(kind: str) -> None:
    async def main(rig: Rig) -> None:
        near, _ = await rig.pair(server=Echo)
        sent = 0
        for power in range(21):
            near.transport.write(BIG[: 1 << power])
            sent += 1 << power
            assert (await near.get(sent))[-(1 << power) :] == BIG[: 1 << power]

    run(kind, main)


def test_megabytes_in_both_directions_at_once(kind: str) -> None:
    async def main(rig: Rig) -> None:
        near, far = await rig.pair()

        async def push(one: Recorder) -> None:
            for at in range(0, len(BIG), 70_001):
                one.transport.write(BIG[at : at + 70_001])
                await one.until(lambda: one.resumes == one.pauses)

        await asyncio.gather(push(near), push(far))
        assert await near.get(len(BIG)) == BIG
        assert await far.get(len(BIG)) == BIG
        assert near.transport.get_write_buffer_size() == far.transport.get_write_buffer_size() == 0

    run(kind, main)


def test_many_connections_at_once(kind: str) -> None:
    async def main(rig: Rig) -> None:
        _, port = await rig.serve(Echo)

        async def one(number: int) -> str | None:
            transport, protocol = await rig.connect(Recorder, port)
            text = f"connection {number} ".encode() * 500
            transport.write(text)
            assert await protocol.get(len(text)) == text
            mode = mode_of(transport)
            transport.close()
            assert await protocol.closed() is None
            return mode

        modes = await asyncio.gather(*(one(number) for number in range(40)))
        assert set(modes) <= {rig.mode, None}

    run(kind, main)


# -- flow control ----------------------------------------------------------------------------------------------------


def test_a_reader_that_pauses_pauses_the_writer(kind: str) -> None:
    async def main(rig: Rig) -> None:
        near, far = await rig.pair()
        near.transport.set_write_buffer_limits(high=100_000, low=10_000)
        assert near.transport.get_write_buffer_limits() == (10_000, 100_000)
        far.transport.pause_reading()
        assert not far.transport.is_reading()
        sent = 0
        while not near.pauses:
            near.transport.write(BIG[:50_000])
            sent += 50_000
            await asyncio.sleep(0)
        assert near.transport.get_write_buffer_size() > 100_000
        before = len(far.received)
        await asyncio.sleep(SOON_S)
        assert (len(far.received), near.resumes) == (before, 0)
        far.transport.resume_reading()
        assert far.transport.is_reading()
        await near.until(lambda: near.resumes == 1)
        assert near.transport.get_write_buffer_size() <= 10_000
        assert len(await far.get(sent)) == sent

    run(kind, main)


def test_a_reader_may_pause_and_resume_while_it_receives(kind: str) -> None:
    class Hesitant(Recorder):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.transport.pause_reading()
            self.transport.pause_reading()
            asyncio.get_running_loop().call_soon(self.transport.resume_reading)

    async def main(rig: Rig) -> None:
        near, far = await rig.pair(server=Hesitant)
        near.transport.write(BIG)
        assert await far.get(len(BIG)) == BIG

    run(kind, main)


def test_reading_may_be_paused_from_the_first_moment(kind: str) -> None:
    class Paused(Recorder):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.pause_reading()

    async def main(rig: Rig) -> None:
        near, far = await rig.pair(Recorder, Paused, decided=False)
        near.transport.write(b"early")
        await asyncio.sleep(SOON_S)
        assert not far.received
        far.transport.resume_reading()
        assert await far.get(5) == b"early"

    run(kind, main)


# -- the end ---------------------------------------------------------------------------------------------------------


def test_half_close_lets_the_other_direction_go_on(kind: str) -> None:
    async def main(rig: Rig) -> None:
        near, far = await rig.pair(HalfClosing, HalfClosing)
        assert near.transport.can_write_eof()
        near.transport.write(BIG)
        near.transport.write_eof()
        near.transport.write_eof()
        await far.ended
        assert far.received == BIG
        with pytest.raises(RuntimeError, match="write_eof"):
            near.transport.write(b"too late")
        far.transport.write(b"still here")
        assert await near.get(10) == b"still here"
        far.transport.close()
        await near.ended
        near.transport.close()
        assert [await near.closed(), await far.closed()] == [None, None]

    run(kind, main)


def test_an_end_that_comes_before_anything_was_decided_is_told(kind: str) -> None:
    class Silent(HalfClosing):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.write_eof()

    async def main(rig: Rig) -> None:
        near, far = await rig.pair(Silent, HalfClosing, decided=False)
        await far.ended
        far.transport.write(b"answer")
        assert await near.get(6) == b"answer"
        far.transport.write_eof()
        await near.ended
        near.transport.close()
        assert await near.closed() is None

    run(kind, main)


def test_without_half_close_the_end_closes_the_transport(kind: str) -> None:
    async def main(rig: Rig) -> None:
        near, far = await rig.pair()
        near.transport.write(b"last words")
        near.transport.close()
        near.transport.close()
        assert near.transport.is_closing()
        assert [await near.closed(), await far.closed()] == [None, None]
        assert far.received == b"last words"
        assert far.ended.done()
        assert not near.ended.done()
        assert far.transport.is_closing()

    run(kind, main)


@pytest.mark.parametrize("decided", [False, True])
def test_close_sends_what_is_in_the_buffer_first(kind: str, decided: bool) -> None:
    async def main(rig: Rig) -> None:
        near, far = await rig.pair(decided=decided)
        near.transport.write(BIG)
        near.transport.close()
        assert await near.closed() is None
        assert await far.closed() is None
        assert far.received == BIG

    run(kind, main)


@pytest.mark.parametrize("decided", [False, True])
def test_a_transport_may_be_closed_before_anything_was_sent(kind: str, decided: bool) -> None:
    async def main(rig: Rig) -> None:
        near, far = await rig.pair(decided=decided)
        near.transport.close()
        assert [await near.closed(), await far.closed()] == [None, None]
        near, far = await rig.pair(decided=decided)
        far.transport.close()
        assert [await far.closed(), await near.closed()] == [None, None]

    run(kind, main)


def test_abort_throws_the_buffer_away(kind: str) -> None:
    async def main(rig: Rig) -> None:
        near, far = await rig.pair()
        far.transport.pause_reading()
        near.transport.write(BIG)
        near.transport.write(BIG)
        assert near.transport.get_write_buffer_size()
        near.transport.abort()
        assert near.transport.get_write_buffer_size() == 0
        assert await near.closed() is None
        far.transport.resume_reading()
        await far.closed()
        assert len(far.received) < 2 * len(BIG)
        assert far.received == (BIG + BIG)[: len(far.received)]

    run(kind, main)


def test_unread_bytes_make_a_close_a_reset(kind: str) -> None:
    async def main(rig: Rig) -> None:
        near, far = await rig.pair()
        far.transport.pause_reading()
        near.transport.write(b"nobody reads this")
        await asyncio.sleep(SOON_S)
        far.transport.abort()
        assert isinstance(await near.closed(), ConnectionResetError)
        near.transport.write(b"ignored")
        near.transport.close()

    run(kind, main)


def test_writing_to_one_who_has_gone_breaks_the_transport(kind: str) -> None:
    async def main(rig: Rig) -> None:
        near, far = await rig.pair(HalfClosing, HalfClosing)
        far.transport.close()
        await near.ended
        while not near.lost.done():
            near.transport.write(b"is anybody there?")
            await asyncio.sleep(0.001)
        assert isinstance(near.lost.result(), BrokenPipeError | ConnectionResetError)

    run(kind, main)


def test_an_error_in_the_protocol_closes_the_connection_and_is_reported(kind: str) -> None:
    class Faulty(Recorder):
        def data_received(self, data: bytes) -> None:
            raise ZeroDivisionError

    async def main(rig: Rig) -> None:
        near, far = await rig.pair(server=Faulty)
        near.transport.write(b"x")
        assert isinstance(await far.closed(), ZeroDivisionError)
        await near.closed()

    run(kind, main, complaints=1)


def test_wrong_arguments_raise_what_they_raise_over_tcp(kind: str) -> None:
    async def main(rig: Rig) -> None:
        near, _ = await rig.pair()
        with pytest.raises(TypeError):
            near.transport.write("text")
        with pytest.raises(TypeError):
            near.transport.write(None)
        with pytest.raises(ValueError):
            near.transport.set_write_buffer_limits(high=1, low=2)

    run(kind, main)


def test_a_transport_that_is_dropped_warns_and_ends_the_connection(kind: str) -> None:
    async def main(rig: Rig) -> None:
        near, far = await rig.pair()
        near.transport.pause_reading()
        rig.abandon()
        with warns_of_a_transport():
            near.transport = None
        assert await far.closed() is None

    run(kind, main)


def test_a_loop_may_be_closed_with_connections_open(kind: str) -> None:
    made: list[Any] = []

    async def main(rig: Rig) -> None:
        made.extend(await rig.pair())
        made[0].transport.write(b"x")
        rig.abandon()

    run(kind, main)
    with warns_of_a_transport():
        made.clear()


# -- protocols and names ---------------------------------------------------------------------------------------------


def test_a_buffered_protocol_receives_in_its_own_buffer(kind: str) -> None:
    async def main(rig: Rig) -> None:
        near, far = await rig.pair(server=Buffered)
        near.transport.write(BIG)
        near.transport.close()
        assert await far.lost is None
        assert far.received == BIG

    run(kind, main)


def test_a_protocol_may_be_replaced(kind: str) -> None:
    async def main(rig: Rig) -> None:
        near, far = await rig.pair()
        near.transport.write(b"first")
        await far.get(5)
        second = Recorder()
        assert far.transport.get_protocol() is far
        far.transport.set_protocol(second)
        near.transport.write(b"second")
        assert await second.get(6) == b"second"
        third = Buffered()
        far.transport.set_protocol(third)
        near.transport.write(b"third")
        near.transport.close()
        assert await third.lost is None
        assert (far.received, second.received, third.received) == (b"first", b"second", b"third")

    run(kind, main)


def test_names_are_those_of_tcp(kind: str) -> None:
    async def main(rig: Rig) -> None:
        near, far = await rig.pair()
        assert near.transport.get_extra_info("peername") == far.transport.get_extra_info("sockname")
        assert far.transport.get_extra_info("peername") == near.transport.get_extra_info("sockname")
        assert near.transport.get_extra_info("nothing of it", 7) == 7
        for one, other in ((near, far), (far, near)):
            sock = one.transport.get_extra_info("socket")
            assert sock.family == socket.AF_INET
            assert sock.type == socket.SOCK_STREAM
            assert sock.getsockname() == other.transport.get_extra_info("peername")
            assert sock.getpeername() == other.transport.get_extra_info("sockname")
            assert sock.gettimeout() == 0
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert repr(sock.getpeername()[1]) in repr(sock)
            with pytest.raises(RuntimeError, match="used by transport"):
                rig.loop.add_reader(sock.fileno(), print)
            assert str(sock.fileno()) in repr(one.transport)
        near.transport.write(b"x")  # asking for descriptors has changed nothing
        assert await far.get(1) == b"x"

    run(kind, main)


def test_whoever_polls_the_descriptor_sees_whether_the_peer_has_gone(kind: str) -> None:
    """As clients of HTTP do with a connection that they keep."""

    async def main(rig: Rig) -> None:
        near, far = await rig.pair(HalfClosing, HalfClosing)
        near.transport.write(b"x")
        assert await far.get(1) == b"x"
        far.transport.write(b"y")
        assert await near.get(1) == b"y"
        poller = select.poll()
        poller.register(near.transport.get_extra_info("socket").fileno(), select.POLLIN)
        assert poller.poll(0) == []
        near.transport.pause_reading()
        far.transport.close()
        await far.closed()
        while not poller.poll(0):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        near.transport.resume_reading()
        await near.ended

    run(kind, main)


def test_how_the_bytes_travel_is_told() -> None:
    async def main(rig: Rig) -> None:
        near, far = await rig.pair()
        near.transport.write(b"x" * 1000)
        await far.get(1000)
        sent, received = (one.transport.get_extra_info("smc_info") for one in (near, far))
        assert (sent.mode, sent.sent, received.received) == ("SMC", 1000, 1000)
        assert near.transport.get_extra_info("socket").smc_info() == sent
        assert sent.remote == far.transport.get_extra_info("sockname")

    run(SMC, main)


@pytest.mark.parametrize(("kind", "why"), [(PLAIN_CLIENT, "did not offer"), (PLAIN_SERVER, "published")])
def test_why_the_bytes_go_over_tcp_is_told(kind: str, why: str) -> None:
    async def main(rig: Rig) -> None:
        near, far = await rig.pair()
        [info] = [info for one in (near, far) if (info := one.transport.get_extra_info("smc_info")) is not None]
        assert info.mode == "TCP"
        assert why in info.reason or "in time" in info.reason  # another server had this port lately

    run(kind, main)

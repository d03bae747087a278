# SPDX-License-Identifier: Apache-2.0
"""`Connection`: lies in the rings, the other side's disappearance, forgotten and inherited connections."""

from __future__ import annotations

import errno
import gc
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing
from smc_stream_rig import SmcRig, bounded, leak_checked, port_of, receive_all, receive_exactly, tcp_of, until

from ism.driver import Device
from ism.errors import LocalProtocolError, RemoteProtocolError
from ism.shm.header import CONSUMER, FLAGS, PRODUCER, READER_PARKED, RING_BYTES, WRITER_PARKED
from ism.smc import SmcStream
from ism.smc import connection as connection_module
from ism.smc.connection import Connection


@pytest.fixture
def rig() -> Iterator[SmcRig]:
    with leak_checked() as made:
        yield made


def connection_of(stream: SmcStream) -> Connection:
    assert stream.connection is not None
    return stream.connection


async def until_gone(stream: SmcStream) -> None:
    connection = connection_of(stream)
    await until(lambda: connection._peer_gone)


# A peer that lies in the rings ----------------------------------------------------------------------------------


def word(offset: int, value: int) -> Callable[[memoryview], None]:
    def write(view: memoryview) -> None:
        struct.pack_into("<Q", view, offset, value)

    return write


def random_header(view: memoryview) -> None:
    view[:4096] = random.Random(8).randbytes(4096)


def flags_taken_back(view: memoryview) -> None:
    struct.pack_into("<I", view, FLAGS, 0)


READ_LIES = {
    "a producer cursor beyond the ring": word(PRODUCER, 1 << 40),
    "a producer cursor that went back": word(PRODUCER, 1),
    "a negative producer cursor": word(PRODUCER, (1 << 64) - 1),
    "random bytes": random_header,
}
WRITE_LIES = {
    "a consumer cursor beyond what was sent": word(CONSUMER, 1 << 40),
    "a consumer cursor that went back": word(CONSUMER, 1),
}


@pytest.mark.parametrize("liar", ["client", "server"])
@pytest.mark.parametrize("lie", READ_LIES.values(), ids=READ_LIES)
@bounded
async def test_a_lie_about_what_was_sent_breaks_that_connection_and_no_other(
    rig: SmcRig, lie: Callable[[memoryview], None], liar: str
) -> None:
    async with await rig.listen() as listener:
        streams = [(await rig.connect(port_of(listener)), await listener.accept()) for _ in range(2)]
    (client, server), (good_client, good_server) = streams
    one, other = (client, server) if liar == "client" else (server, client)
    async with client, server, good_client, good_server:
        await exchange(good_client, good_server)
        await exchange(one, other)
        async with trio.open_nursery() as nursery:

            async def expect_broken() -> None:
                with pytest.raises(trio.BrokenResourceError) as caught:
                    await other.receive_some()
                assert isinstance(caught.value.__cause__, ConnectionAbortedError)
                assert isinstance(caught.value.__cause__.__cause__, RemoteProtocolError)

            nursery.start_soon(expect_broken)
            await trio.testing.wait_all_tasks_blocked()
            lie(connection_of(one).tx.view)
            connection_of(one).tx.ring()
        for call in (other.receive_some, lambda: other.send_all(b"x"), other.wait_send_all_might_not_block):
            with trio.testing.assert_checkpoints(), pytest.raises(trio.BrokenResourceError):
                await call()
        with pytest.raises(trio.BrokenResourceError):
            await receive_all(one)  # who lied is told, too
        await exchange(good_client, good_server)


@pytest.mark.parametrize("lie", WRITE_LIES.values(), ids=WRITE_LIES)
@bounded
async def test_a_lie_about_what_was_read_breaks_a_sender_that_waits(
    rig: SmcRig, lie: Callable[[memoryview], None]
) -> None:
    client, server = await rig.pair()
    async with client, server:
        await exchange(client, server)
        async with trio.open_nursery() as nursery:

            async def expect_broken() -> None:
                with pytest.raises(trio.BrokenResourceError) as caught:
                    await client.send_all(bytes(1 << 20))
                assert isinstance(caught.value.__cause__, ConnectionAbortedError)

            nursery.start_soon(expect_broken)
            await trio.testing.wait_all_tasks_blocked()
            lie(connection_of(server).tx.view)
            connection_of(server).tx.ring()


@bounded
async def test_flags_that_are_taken_back_are_a_lie(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with client, server:
        await client.send_eof()
        assert await server.receive_some() == b""
        flags_taken_back(connection_of(client).tx.view)
        with pytest.raises(trio.BrokenResourceError):
            await server.receive_some()


@bounded
async def test_bits_without_a_meaning_change_nothing(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with client, server:
        struct.pack_into("<I", connection_of(client).tx.view, FLAGS, 0xFFFF0000)
        await exchange(client, server)
        await server.send_all(b"and back")
        assert await receive_exactly(client, 8) == b"and back"


@bounded
async def test_a_wrong_ring_size_in_the_header_is_a_lie(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with client, server:
        struct.pack_into("<Q", connection_of(client).tx.view, RING_BYTES, 1 << 30)
        await client.send_all(b"x")
        with pytest.raises(trio.BrokenResourceError):
            await server.receive_some()


@bounded
async def test_false_sleep_numbers_cost_doorbells_only(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with client, server:
        for number in range(1, 40, 2):
            word(READER_PARKED, number)(connection_of(client).tx.view)
            word(WRITER_PARKED, number)(connection_of(client).tx.view)
            await exchange(client, server)


async def exchange(one: SmcStream, other: SmcStream) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.send_all, b"some bytes")
        assert await receive_exactly(other, 10) == b"some bytes"
        nursery.start_soon(other.send_all, b"others")
        assert await receive_exactly(one, 6) == b"others"


# A peer that vanishes -------------------------------------------------------------------------------------------


async def vanish(stream: SmcStream) -> None:
    """What the kernel does for a process that was killed: TCP ends, and nobody says anything in shared memory."""
    tcp_of(stream).shutdown(socket.SHUT_RDWR)


@bounded
async def test_what_a_peer_sent_before_it_vanished_is_read_and_then_it_is_a_reset(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with client, server:
        await client.send_all(b"last words")
        await vanish(client)
        await until_gone(server)
        assert await receive_exactly(server, 10) == b"last words"
        with pytest.raises(trio.BrokenResourceError) as caught:
            await server.receive_some()
        assert isinstance(caught.value.__cause__, ConnectionResetError)


@bounded
async def test_a_peer_that_vanished_after_its_half_close_is_an_end_of_file(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with client, server:
        await client.send_all(b"all I have to say")
        await client.send_eof()
        await vanish(client)
        await until_gone(server)
        assert await receive_all(server) == b"all I have to say"
        with pytest.raises(trio.BrokenResourceError):
            await server.send_all(b"x")


@bounded
async def test_a_reader_learns_of_the_reset_although_the_writer_was_told_first(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with client, server:
        await client.send_all(b"half a messa")
        await vanish(client)
        await until_gone(server)
        with pytest.raises(trio.BrokenResourceError):
            await server.send_all(b"x")
        assert await receive_exactly(server, 12) == b"half a messa"
        for _ in range(3):
            with pytest.raises(trio.BrokenResourceError):
                await server.receive_some()


@pytest.mark.parametrize("amortise", [False, True])
@bounded
async def test_both_sleeping_tasks_of_a_stream_wake_when_the_peer_vanishes(rig: SmcRig, amortise: bool) -> None:
    client, server = await rig.pair()
    server.amortise_checkpoints = amortise
    async with client, server, trio.open_nursery() as nursery:

        async def expect_broken(call: Any) -> None:
            with pytest.raises(trio.BrokenResourceError):
                await call()

        nursery.start_soon(expect_broken, server.receive_some)
        nursery.start_soon(expect_broken, lambda: server.send_all(bytes(1 << 20)))
        await trio.testing.wait_all_tasks_blocked()
        await vanish(client)


@bounded
async def test_a_peer_whose_device_leaves_is_gone_although_tcp_stays(rig: SmcRig) -> None:
    device = Device(rig.fabric.plug())
    async with await rig.listen() as listener:
        guest = await rig.connect(port_of(listener), device=device)
        server = await listener.accept()
    async with server, guest:
        await exchange(guest, server)
        await guest.send_all(b"bye")
        async with trio.open_nursery() as nursery:

            async def expect_broken() -> None:
                assert await receive_exactly(server, 3) == b"bye"
                with pytest.raises(trio.BrokenResourceError):
                    await server.receive_some()

            nursery.start_soon(expect_broken)
            await trio.testing.wait_all_tasks_blocked()
            device.transport.lose("its machine was switched off")  # type: ignore[attr-defined]
        await server.aclose()
    device.close()


@bounded
async def test_a_side_that_cannot_ring_any_more_keeps_what_it_read_and_then_breaks(rig: SmcRig) -> None:
    device = Device(rig.fabric.plug())
    async with await rig.listen() as listener:
        lost = await rig.connect(port_of(listener), device=device)
        server = await listener.accept()
    async with lost, server:
        await exchange(lost, server)
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def fill() -> None:
                with scope:
                    await server.send_all(bytes(1 << 20))

            nursery.start_soon(fill)
            await trio.testing.wait_all_tasks_blocked()
            device.transport.lose("the manager was stopped")  # type: ignore[attr-defined]
            scope.cancel()
        received = 0
        with pytest.raises(trio.BrokenResourceError) as caught:  # noqa: PT012
            while True:
                received += len(await lost.receive_some())
        assert received >= 61440
        assert isinstance(caught.value.__cause__, ConnectionError)
    device.close()


@bounded
async def test_readiness_of_an_earlier_socket_with_the_same_number_is_ignored(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with client, server:
        connection_of(server)._on_tcp()
        await exchange(client, server)
        await client.aclose()
        assert await server.receive_some() == b""


# Closing --------------------------------------------------------------------------------------------------------


@bounded
async def test_a_closed_connection_refuses_everything_with_ebadf(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with client, server:
        connection = connection_of(client)
        connection.close()
        connection.close()
        for call in (
            lambda: connection.send(b"x"),
            lambda: connection.recv(1),
            connection.writable,
            connection.shutdown_write,
        ):
            with pytest.raises(OSError, match="Bad file descriptor") as caught:
                call()
            assert caught.value.errno == errno.EBADF
        connection.awake(writer=True)
        assert connection.closed


@bounded
async def test_an_abort_is_a_reset_although_nothing_was_unread(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with client, server:
        await client.send_all(b"before")
        connection_of(client).close(abort=True)
        assert await receive_exactly(server, 6) == b"before"
        with pytest.raises(trio.BrokenResourceError):
            await server.receive_some()


@bounded
async def test_a_connection_can_be_closed_while_threads_are_in_its_calls(rig: SmcRig) -> None:
    for seed in range(10):
        client, server = await rig.pair()
        async with client, server:
            connection, stop = connection_of(client), threading.Event()
            unexpected: list[Exception] = []
            data = random.Random(seed).randbytes(30_000)

            def pump(call: Any, stop: threading.Event = stop, unexpected: list[Exception] = unexpected) -> None:
                while not stop.is_set():
                    try:
                        call()
                    except (OSError, LocalProtocolError) as exc:
                        if getattr(exc, "errno", errno.EBADF) not in (errno.EBADF, errno.ECONNRESET, errno.EPIPE):
                            unexpected.append(exc)
                        return

            calls: list[Any] = [partial(connection.send, data), partial(connection.recv, 30_000)]
            async with trio.open_nursery() as nursery:
                for call in calls:
                    nursery.start_soon(partial(trio.to_thread.run_sync, pump, call))
                for _ in range(20):
                    connection_of(server).send(connection_of(server).recv(50_000) or b"-")
                    await trio.lowlevel.checkpoint()
                connection.close()
                stop.set()
            assert not unexpected


@pytest.mark.parametrize("in_a_cycle", [False, True])
@bounded
async def test_a_stream_that_is_dropped_without_close_warns_and_the_peer_reads_to_the_end(
    rig: SmcRig, in_a_cycle: bool
) -> None:
    client, server = await rig.pair()
    async with server:
        await client.send_all(b"before it was forgotten")
        tcp = weakref.ref(tcp_of(client)._sock)  # closed, with a warning, when it is dropped
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if in_a_cycle:
                client.itself = client  # type: ignore[attr-defined]
            del client
            gc.collect()
            assert await receive_all(server) == b"before it was forgotten"
            await until(lambda: any("unclosed" in str(warning.message) for warning in caught))
            assert {warning.category for warning in caught} == {ResourceWarning}
            said: list[str] = []

            def is_gone() -> bool:
                said.extend(str(warning.message) for warning in caught)
                caught.clear()  # a recorded warning refers to what it is about
                return tcp() is None and any("socket.socket" in text for text in said)

            await until(is_gone)


@bounded
async def test_a_stream_that_is_dropped_wakes_its_sleeping_peer(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with server, trio.open_nursery() as nursery:

        async def expect_the_end() -> None:
            assert await server.receive_some() == b""

        nursery.start_soon(expect_the_end)
        await trio.testing.wait_all_tasks_blocked()
        tcp = weakref.ref(tcp_of(client)._sock)  # cleared after its finalizer, which warns
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            del client
            gc.collect()
            await until(lambda: tcp() is None)


@bounded
async def test_a_forked_child_leaves_its_parents_connections_alone(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with client, server:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of fork with threads
            child = os.fork()
        if child == 0:
            try:
                connection_module._close_all()
                connection_of(client).close()
                os._exit(0)
            finally:
                os._exit(1)
        assert (await trio.to_thread.run_sync(os.waitpid, child, 0))[1] == 0
        await exchange(client, server)


EXITS = """
import sys, trio
from ism.driver import Device
from ism.smc import open_tcp_listeners, open_tcp_stream
from ism.testing import Fabric

async def main():
    fabric = Fabric()
    a, b = Device(fabric.plug()), Device(fabric.plug())
    (listener,) = await open_tcp_listeners(0, host="127.0.0.1", device=b)
    client = await open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1], device=a)
    server = await listener.accept()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send_all, b"bye")
        assert await server.receive_some() == b"bye"
    return client, server, listener

kept = trio.run(main)
"""


def test_a_program_that_exits_without_closing_exits_quietly() -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXITS], capture_output=True, text=True, timeout=120, check=False, env={**os.environ}
    )
    assert (done.returncode, done.stderr) == (0, "")


# A peer that empties the eventfd it was given, threads, and sockets closed underneath ---------------------------


@bounded
async def test_a_reader_learns_of_the_end_though_its_eventfd_is_emptied_at_once(
    rig: SmcRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = await rig.pair()
    monkeypatch.setattr(connection_of(server).rx, "wake", lambda: None)  # as if emptied the moment it was raised
    async with server, trio.open_nursery() as nursery:

        async def expect_the_reset() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await server.receive_some()

        nursery.start_soon(expect_the_reset)
        await trio.testing.wait_all_tasks_blocked()
        tcp_of(client).shutdown(trio.socket.SHUT_RDWR)  # what the kernel does for a process that is killed
    await client.aclose()


@bounded
async def test_a_waker_that_comes_late_disturbs_nobody_who_has_the_descriptor_by_then(rig: SmcRig) -> None:
    client, server = await rig.pair()
    wake = connection_of(server)._local_wake
    assert wake is not None
    number = connection_of(server).fd
    await server.aclose()
    await client.aclose()
    rig.let_go()
    await until(lambda: not os.path.exists(f"/proc/self/fd/{number}"))
    reader = os.eventfd(0)
    try:
        os.dup2(reader, number)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.lowlevel.wait_readable, number)
            await trio.testing.wait_all_tasks_blocked()
            wake()
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    finally:
        os.close(reader)
        os.close(number)


class EndsWhileAsked:
    """An endpoint during whose look at the ring the peer sends and closes, and another thread learns of the end."""

    def __init__(self, connection: Connection, meanwhile: Callable[[], None]) -> None:
        self._endpoint, self._connection, self._meanwhile = connection.endpoint, connection, meanwhile

    def __getattr__(self, name: str) -> Any:
        return getattr(self._endpoint, name)

    def rx_state(self) -> Any:
        state = self._endpoint.rx_state()
        self._meanwhile()
        self._connection._look()
        return state


@bounded
async def test_an_end_that_another_thread_learns_of_does_not_hide_the_last_bytes(rig: SmcRig) -> None:
    client, server = await rig.pair()
    ours, theirs = connection_of(server), connection_of(client)

    def last_words() -> None:
        if not theirs.closed:
            theirs.send(b"last words")
            theirs.close()

    monitored = EndsWhileAsked(ours, last_words)
    ours.endpoint, real = monitored, ours.endpoint  # type: ignore[assignment]
    assert ours.recv(100) is None
    ours.endpoint = real
    assert ours.recv(100) == b"last words"
    assert ours.recv(100) == b""
    await server.aclose()
    await client.aclose()


@bounded
async def test_closing_a_stream_whose_tcp_socket_was_closed_before_releases_everything(rig: SmcRig) -> None:
    client, server = await rig.pair()
    client.socket.close()
    await client.aclose()
    await server.aclose()

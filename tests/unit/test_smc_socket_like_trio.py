# SPDX-License-Identifier: Apache-2.0
"""A socket of `ism.smc` does what one of trio's does: every check runs on trio's too, which are the reference."""

from __future__ import annotations

import contextlib
import errno
import random
import socket as std
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing
from smc_stream_rig import SmcRig, bounded, leak_checked, until

import ism.smc

LOOPBACK = "127.0.0.1"
MANY = 1 << 23
"""More bytes than TCP takes that nobody reads: the kernel lets one side's buffer grow to 4 MiB."""
"""More than either transport buffers."""


@pytest.fixture(params=["trio", "SMC", "TCP"])
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def rig(kind: str) -> Iterator[SmcRig]:
    with leak_checked(directory=True) as made:
        made.mode = "off" if kind == "TCP" else "auto"
        yield made


class Sockets:
    """Makes sockets of one kind."""

    def __init__(self, kind: str, rig: SmcRig) -> None:
        self.kind, self.rig = kind, rig

    def client(self) -> Any:
        return trio.socket.socket() if self.kind == "trio" else ism.smc.socket(**self.rig.client_options)

    def server(self) -> Any:
        return trio.socket.socket() if self.kind == "trio" else ism.smc.socket(**self.rig.server_options)

    async def listening(self) -> Any:
        sock = self.server()
        await sock.bind((LOOPBACK, 0))
        sock.listen()
        return sock

    async def connected(self) -> tuple[Any, Any]:
        """Connected, nothing sent."""
        listener = await self.listening()
        with listener:
            client = self.client()
            await client.connect(listener.getsockname())
            server, address = await listener.accept()
            assert address == client.getsockname()
            return client, server

    async def pair(self) -> tuple[Any, Any]:
        """Connected, and it is known how bytes travel."""
        client, server = await self.connected()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send, b"c")
            assert await server.recv(1) == b"c"
        await server.send(b"s")
        assert await client.recv(1) == b"s"
        if self.kind != "trio":
            assert client.smc_info().mode == server.smc_info().mode == self.kind
        return client, server


@pytest.fixture
def sockets(kind: str, rig: SmcRig) -> Sockets:
    return Sockets(kind, rig)


@pytest.fixture(params=["from the client", "from the server"])
async def pair(request: pytest.FixtureRequest, sockets: Sockets) -> AsyncIterator[tuple[Any, Any]]:
    """Two connected sockets; the first of them acts."""
    client, server = await sockets.pair()
    with client, server:
        yield (client, server) if "client" in request.param else (server, client)


def number_of(error: type[BaseException] | int) -> Any:
    return pytest.raises(OSError, match=rf"^\[Errno {error}\]") if isinstance(error, int) else pytest.raises(error)


async def arrived(sock: Any) -> None:
    """What was sent is there."""
    await until(sock.is_readable)


# Bytes ----------------------------------------------------------------------------------------------------------


@bounded
async def test_bytes_are_received_in_any_way_and_in_order(pair: tuple[Any, Any]) -> None:
    one, other = pair
    assert await one.send(b"0123456789abcdefghijklmnop") == 26
    await arrived(other)
    assert await other.recv(2) == b"01"
    assert await other.recvfrom(2) == (b"23", None)
    buffer = bytearray(4)
    assert await other.recv_into(buffer) == 4
    assert buffer == b"4567"
    assert await other.recv_into(buffer, 2) == 2
    assert buffer == b"8967"
    assert await other.recv_into(memoryview(buffer)[3:], 0) == 1
    assert buffer == b"896a"
    assert await other.recvfrom_into(buffer, nbytes=1) == (1, None)
    assert buffer == b"b96a"
    assert await other.recvmsg(3) == (b"cde", [], 0, None)
    parts = [bytearray(2), memoryview(bytearray(3))]
    assert await other.recvmsg_into(parts) == (5, [], 0, None)
    assert [bytes(part) for part in parts] == [b"fg", b"hij"]
    assert await other.recv_into(buffer, flags=std.MSG_PEEK) == 4
    assert await other.recv(1000) == b"klmnop"


@bounded
async def test_bytes_are_sent_in_any_way_and_in_order(pair: tuple[Any, Any]) -> None:
    one, other = pair
    assert await one.send(bytearray(b"bytearray,")) == 10
    assert await one.send(memoryview(b"<view,>")[1:-1], std.MSG_NOSIGNAL) == 5
    assert await one.sendto(b"to,", (LOOPBACK, 9)) == 3
    assert await one.sendto(b"flags,", std.MSG_MORE, (LOOPBACK, 9)) == 6
    assert await one.sendmsg([b"one", memoryview(b"two"), bytearray(b"")]) == 6
    assert await one.sendmsg([b"three"], [], std.MSG_NOSIGNAL) == 5
    assert await one.sendmsg([]) == 0
    assert await one.send(b"") == 0
    got = b""
    while len(got) < 35:
        got += await other.recv(100)
    assert got == b"bytearray,view,to,flags,onetwothree"


@bounded
async def test_peeked_bytes_stay(pair: tuple[Any, Any]) -> None:
    one, other = pair
    await one.send(b"peek")
    for _ in range(3):
        assert await other.recv(2, std.MSG_PEEK) == b"pe"
    assert await other.recvmsg(9, 0, std.MSG_PEEK) == (b"peek", [], 0, None)
    assert await other.recv(9) == b"peek"
    await one.send(b"end")
    one.shutdown(std.SHUT_WR)
    assert await other.recv(9, std.MSG_PEEK) == b"end"
    assert await other.recv(9) == b"end"
    assert await other.recv(9, std.MSG_PEEK) == b""


@bounded
async def test_flags_for_blocking_sockets_change_nothing(pair: tuple[Any, Any]) -> None:
    one, other = pair
    await one.send(b"part")
    await arrived(other)
    assert await other.recv(10, std.MSG_WAITALL) == b"part"
    with trio.move_on_after(0.01) as scope:
        await other.recv(10, std.MSG_DONTWAIT)
    assert scope.cancelled_caught


@bounded
async def test_large_transfers_in_both_directions_at_once_arrive_whole(pair: tuple[Any, Any]) -> None:
    data = [random.Random(seed).randbytes(MANY) for seed in (1, 2)]

    async def send(sock: Any, what: bytes) -> None:
        view = memoryview(what)
        while view:
            view = view[await sock.send(view[:100_000]) :]
        sock.shutdown(std.SHUT_WR)

    async def receive(sock: Any, what: bytes) -> None:
        got, buffer = bytearray(), bytearray(70_000)
        while count := await sock.recv_into(buffer):
            got += buffer[:count]
        assert got == what

    async with trio.open_nursery() as nursery:
        for sender, receiver, what in ((pair[0], pair[1], data[0]), (pair[1], pair[0], data[1])):
            nursery.start_soon(send, sender, what)
            nursery.start_soon(receive, receiver, what)


@bounded
async def test_a_sender_waits_for_room_and_is_woken(pair: tuple[Any, Any]) -> None:
    one, other = pair
    sent = 0
    async with trio.open_nursery() as nursery:

        async def send_much() -> None:
            nonlocal sent
            while sent < MANY:
                sent += await one.send(bytes(min(100_000, MANY - sent)))

        nursery.start_soon(send_much)
        await trio.testing.wait_all_tasks_blocked()
        assert 0 < sent < MANY
        received = 0
        while received < MANY:
            received += len(await other.recv(1 << 20))
    assert sent == received == MANY


@bounded
async def test_urgent_data_takes_its_own_way(pair: tuple[Any, Any]) -> None:
    one, other = pair
    with number_of(errno.EINVAL):
        await other.recv(1, std.MSG_OOB)
    assert await one.send(b"before!", std.MSG_OOB) == 7
    await arrived(other)

    async def urgent() -> bytes:
        while True:
            try:
                found: bytes = await other.recv(1, std.MSG_OOB)
            except BlockingIOError:
                await trio.sleep(0.001)
            else:
                return found

    assert await urgent() == b"!"
    await one.send(b"after")
    got = b""
    while len(got) < 11:
        got += await other.recv(20)
    assert got == b"beforeafter"


# What is refused ------------------------------------------------------------------------------------------------

WRONG: list[tuple[str, Callable[[Any], Awaitable[Any]], type[BaseException] | int]] = [
    ("recv of less than nothing", lambda sock: sock.recv(-1), ValueError),
    ("recv of a part of a byte", lambda sock: sock.recv(1.5), TypeError),
    ("recv into a part of a byte", lambda sock: sock.recv_into(bytearray(2), 1.5), TypeError),
    ("recvfrom of less than nothing", lambda sock: sock.recvfrom(-1), ValueError),
    ("recvmsg of less than nothing", lambda sock: sock.recvmsg(-1), ValueError),
    ("no room for ancillary data", lambda sock: sock.recvmsg(1, -1), ValueError),
    ("recv into too little", lambda sock: sock.recv_into(bytearray(2), 3), ValueError),
    ("recv into less than nothing", lambda sock: sock.recv_into(bytearray(2), -1), ValueError),
    ("recv into what cannot be written", lambda sock: sock.recv_into(b"abc"), TypeError),
    ("recv into no buffer", lambda sock: sock.recv_into(7), TypeError),
    ("text", lambda sock: sock.send("text"), TypeError),
    ("numbers", lambda sock: sock.sendmsg(b"123"), TypeError),
    ("no address", lambda sock: sock.sendto(b"1", "nowhere"), ValueError),
    ("ancillary data", lambda sock: sock.sendmsg([b"x"], [(std.SOL_SOCKET, 99, b"1234")]), errno.EINVAL),
    ("accept", lambda sock: sock.accept(), errno.EINVAL),
]


@pytest.mark.parametrize(("call", "error"), [wrong[1:] for wrong in WRONG], ids=[wrong[0] for wrong in WRONG])
@bounded
async def test_what_is_wrong_is_refused_and_the_socket_goes_on(
    pair: tuple[Any, Any], call: Callable[[Any], Awaitable[Any]], error: Any
) -> None:
    one, other = pair
    with number_of(error):
        await call(one)
    await one.send(b"x")
    assert await other.recv(1) == b"x"
    await other.send(b"y")
    assert await one.recv(1) == b"y"


@bounded
async def test_a_socket_that_is_not_connected_says_so(sockets: Sockets) -> None:
    with sockets.client() as sock:
        for call, number in (
            (lambda: sock.recv(1), errno.ENOTCONN),
            (lambda: sock.send(b"x"), errno.EPIPE),
            (lambda: sock.sendto(b"x", (LOOPBACK, 9)), errno.EPIPE),
            (sock.accept, errno.EINVAL),
        ):
            with number_of(number), trio.testing.assert_checkpoints():
                await call()
        for refused, number in ((sock.getpeername, errno.ENOTCONN), (lambda: sock.shutdown(1), errno.ENOTCONN)):
            with number_of(number):
                refused()
        for address in ("nowhere", (LOOPBACK,), (LOOPBACK, 9, 0)):
            with pytest.raises(ValueError, match="address"):
                await sock.connect(address)


@bounded
async def test_a_connection_that_is_refused_says_so_and_the_socket_can_try_again(sockets: Sockets) -> None:
    with await sockets.listening() as listener, await sockets.listening() as closing:
        nobody = closing.getsockname()
        closing.close()
        with sockets.client() as sock:
            with number_of(errno.ECONNREFUSED):
                await sock.connect(nobody)
            with contextlib.suppress(ConnectionAbortedError):  # Linux says it once more
                await sock.connect(listener.getsockname())
            await sock.connect(listener.getsockname())
            server, _ = await listener.accept()
            with server:
                await sock.send(b"at last")
                assert await server.recv(10) == b"at last"


@bounded
async def test_a_connect_that_is_cancelled_closes_the_socket(sockets: Sockets) -> None:
    with await sockets.listening() as listener:
        sock = sockets.client()
        with trio.CancelScope() as scope:
            scope.cancel()
            await sock.connect(listener.getsockname())
        assert scope.cancelled_caught
        assert sock.fileno() == -1


@bounded
async def test_names_are_resolved(sockets: Sockets) -> None:
    with await sockets.listening() as listener, sockets.client() as sock:
        await sock.connect(("localhost", listener.getsockname()[1]))
        assert sock.getpeername() == listener.getsockname()


# Ends -----------------------------------------------------------------------------------------------------------


@bounded
async def test_half_close_ends_one_direction(pair: tuple[Any, Any]) -> None:
    one, other = pair
    assert not one.did_shutdown_SHUT_WR
    one.shutdown(std.SHUT_WR)
    assert one.did_shutdown_SHUT_WR
    one.shutdown(std.SHUT_WR)
    for call in (lambda: one.send(b"x"), lambda: one.sendmsg([b"x"])):
        with number_of(errno.EPIPE):
            await call()
    assert await other.recv(10) == b""
    assert await other.recv_into(bytearray(1)) == 0
    await other.send(b"still")
    assert await one.recv(10) == b"still"
    with number_of(errno.EINVAL):
        one.shutdown(7)


@bounded
async def test_receiving_can_be_ended_here(pair: tuple[Any, Any]) -> None:
    one, other = pair
    await other.send(b"there")
    await arrived(one)
    one.shutdown(std.SHUT_RD)
    assert await one.recv(10) == b"there"
    assert await one.recv(10) == b""
    assert not one.did_shutdown_SHUT_WR
    await one.send(b"x")
    assert await other.recv(1) == b"x"


@bounded
async def test_a_close_with_unread_bytes_is_a_reset_for_the_peer(pair: tuple[Any, Any]) -> None:
    one, other = pair
    await other.send(b"never read")
    await arrived(one)
    await one.send(b"last words")
    one.close()
    await arrived(other)
    with number_of(errno.ECONNRESET):
        while True:
            assert await other.recv(10) == b"last words"


@bounded
async def test_a_close_with_linger_zero_is_a_reset_for_the_peer(pair: tuple[Any, Any]) -> None:
    one, other = pair
    one.setsockopt(std.SOL_SOCKET, std.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()
    with number_of(errno.ECONNRESET):
        await other.recv(10)


@bounded
async def test_a_send_after_the_peers_close_breaks_soon(pair: tuple[Any, Any]) -> None:
    one, other = pair
    one.close()
    assert await other.recv(1) == b""
    with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012 (which of them fails is the transport's)
        while True:
            await other.send(b"anybody there?")


@bounded
async def test_closing_ends_the_calls_of_other_tasks(pair: tuple[Any, Any]) -> None:
    one, _ = pair

    async def send_for_ever() -> None:
        while True:
            await one.send(bytes(100_000))

    async def expect_closed(call: Callable[[], Awaitable[Any]]) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await call()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect_closed, lambda: one.recv(1))
        nursery.start_soon(expect_closed, send_for_ever)
        await trio.testing.wait_all_tasks_blocked()
        one.close()


@bounded
async def test_a_closed_socket_refuses_everything(pair: tuple[Any, Any]) -> None:
    one, _ = pair
    one.close()
    one.close()
    assert one.fileno() == -1
    for call in (
        lambda: one.send(b"x"),
        lambda: one.sendto(b"x", (LOOPBACK, 9)),
        lambda: one.sendmsg([b"x"]),
        lambda: one.recv(1),
        lambda: one.recv_into(bytearray(1)),
        lambda: one.recvfrom(1),
        lambda: one.recvfrom_into(bytearray(1)),
        lambda: one.recvmsg(1),
        lambda: one.recvmsg_into([bytearray(1)]),
        lambda: one.connect((LOOPBACK, 9)),
        one.accept,
    ):
        with number_of(errno.EBADF):
            await call()
    for refused in (one.getsockname, one.getpeername, lambda: one.shutdown(std.SHUT_WR), one.dup, one.listen):
        with number_of(errno.EBADF):
            refused()
    assert one.detach() == -1


# Tasks ----------------------------------------------------------------------------------------------------------


@bounded
async def test_a_second_task_that_would_wait_is_refused_and_the_first_goes_on(pair: tuple[Any, Any]) -> None:
    one, other = pair
    got = []

    async def receive() -> None:
        got.append(await one.recv(10))

    async def send_much() -> None:
        sent = 0
        while sent < MANY:
            sent += await one.send(bytes(MANY - sent))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        nursery.start_soon(send_much)
        await trio.testing.wait_all_tasks_blocked()
        for call in (lambda: one.recv(1), lambda: one.recv_into(bytearray(1)), lambda: one.recv(1, std.MSG_PEEK)):
            with pytest.raises(trio.BusyResourceError):
                await call()
        more = 0
        with contextlib.suppress(trio.BusyResourceError):
            while True:  # the kernel may take a little more even when a sender waits
                more += await one.send(bytes(100_000))
        with pytest.raises(trio.BusyResourceError):
            await one.wait_writable()
        await other.send(b"first")
        received = 0
        while received < MANY + more:
            received += len(await other.recv(1 << 20))
    assert got == [b"first"]


@bounded
async def test_every_call_is_a_checkpoint(pair: tuple[Any, Any]) -> None:
    one, other = pair
    await other.send(b"123456789")
    await arrived(one)
    for call in (
        lambda: one.send(b"x"),
        lambda: one.send(b""),
        lambda: one.sendto(b"x", (LOOPBACK, 9)),
        lambda: one.sendmsg([b"x"]),
        lambda: one.recv(1),
        lambda: one.recv(0),
        lambda: one.recv(1, std.MSG_PEEK),
        lambda: one.recv_into(bytearray(1)),
        lambda: one.recvfrom(1),
        lambda: one.recvfrom_into(bytearray(1)),
        lambda: one.recvmsg(1),
        lambda: one.recvmsg_into([bytearray(1)]),
        one.wait_writable,
    ):
        with trio.testing.assert_checkpoints():
            await call()


@bounded
async def test_a_call_in_a_cancelled_scope_does_nothing(pair: tuple[Any, Any]) -> None:
    one, other = pair
    await other.send(b"kept")
    await arrived(one)
    for call in (lambda: one.recv(1), lambda: one.send(b"never sent"), lambda: one.recv_into(bytearray(2))):
        with trio.CancelScope() as scope:
            scope.cancel()
            await call()
        assert scope.cancelled_caught
    assert await one.recv(10) == b"kept"
    one.shutdown(std.SHUT_WR)
    assert await other.recv(10) == b""


@bounded
async def test_readiness_shows_bytes_ends_and_room(pair: tuple[Any, Any]) -> None:
    one, other = pair
    assert not one.is_readable()
    await other.send(b"x")
    await arrived(one)
    await one.recv(1)
    assert not one.is_readable()
    await one.wait_writable()
    other.shutdown(std.SHUT_WR)
    await arrived(one)
    async with trio.open_nursery() as nursery:
        sent = 0
        with trio.move_on_after(0.05):
            while True:
                sent += await one.send(bytes(100_000))
        nursery.start_soon(one.wait_writable)
        await trio.testing.wait_all_tasks_blocked()
        received = 0
        while received < sent:
            received += len(await other.recv(1 << 20))


# What it is -----------------------------------------------------------------------------------------------------


@bounded
async def test_a_socket_tells_what_it_is(pair: tuple[Any, Any], kind: str) -> None:
    one, other = pair
    assert isinstance(one, trio.socket.SocketType)
    assert (one.family, one.type, one.proto) == (std.AF_INET, std.SOCK_STREAM, 0)
    assert one.getpeername() == other.getsockname()
    assert one.getsockname() == other.getpeername()
    assert one.fileno() > 2
    assert f"fd={one.fileno()}" in repr(one)
    assert ("ism.smc.socket" if kind != "trio" else "trio.socket.socket") in repr(one)
    one.setsockopt(std.IPPROTO_TCP, std.TCP_NODELAY, True)
    assert one.getsockopt(std.IPPROTO_TCP, std.TCP_NODELAY) == 1
    assert one.getsockopt(std.IPPROTO_TCP, std.TCP_NODELAY, 4) == b"\1\0\0\0"
    assert one.getsockopt(std.SOL_SOCKET, std.SO_ERROR) == 0
    with pytest.raises(TypeError):
        one.setsockopt(std.SOL_SOCKET, std.SO_BINDTODEVICE, None)
    assert not one.get_inheritable()
    one.set_inheritable(True)
    assert one.get_inheritable()


@bounded
async def test_a_pair_that_was_never_used_ends_as_tcp_does(sockets: Sockets) -> None:
    for closer in (0, 1):
        ends = await sockets.connected()
        with ends[0], ends[1]:
            ends[closer].close()
            assert await ends[1 - closer].recv(1) == b""


@pytest.mark.parametrize("how", [std.SHUT_WR, std.SHUT_RDWR])
@pytest.mark.parametrize("ender", [0, 1], ids=["client", "server"])
@bounded
async def test_a_shutdown_before_the_first_byte_reaches_the_peer(sockets: Sockets, ender: int, how: int) -> None:
    ends = await sockets.connected()
    with ends[0], ends[1]:
        one, other = ends[ender], ends[1 - ender]
        one.shutdown(how)
        assert one.did_shutdown_SHUT_WR
        with number_of(errno.EPIPE):
            await one.send(b"late")
        if how == std.SHUT_RDWR:
            assert await one.recv(1) == b""
        assert await other.recv(1) == b""
        if how == std.SHUT_WR:
            await other.send(b"still open")
            assert await one.recv(10) == b"still open"

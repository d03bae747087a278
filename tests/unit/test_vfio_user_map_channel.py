# SPDX-License-Identifier: Apache-2.0
"""The map channel: both ends together, and each end against a hostile other."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from vfio_user_rig import Device, ServerThread

from ism.errors import LocalProtocolError, RemoteProtocolError, TransportError
from ism.vfio_user.client import Client
from ism.vfio_user.connection import Connection
from ism.vfio_user.errors import MapChannelClosedError, VfioUserError, VfioUserTimeoutError
from ism.vfio_user.fds import Fd, close_all, recv_message, send_some
from ism.vfio_user.map_channel import MapChannelClient, client_capability, take_channel
from ism.vfio_user.map_channel_server import MapChannelServer, offer_channel
from ism.vfio_user.map_channel_wire import Packet, PacketType

PAGE = 4096
WINDOW = 1 << 20


class Handler:
    """Keeps what it is given; refuses what `refuse` names."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.fds: list[Fd] = []
        self.refuse: dict[str, Exception] = {}

    def _do(self, verb: str, *args: int, fd: Fd | None = None) -> None:
        if verb in self.refuse:
            raise self.refuse[verb]
        self.log.append((verb, *args))
        if fd is not None:
            self.fds.append(fd)

    def hello(self, page_size: int, window: int, /) -> None:
        self._do("hello", page_size, window)

    def map(self, offset: int, length: int, file_offset: int, rights: int, fd: Fd, /) -> None:
        self._do("map", offset, length, file_offset, rights, fd=fd)

    def unmap(self, offset: int, length: int, /) -> None:
        self._do("unmap", offset, length)

    def doorbell(self, slot: int, fd: Fd, /) -> None:
        self._do("doorbell", slot, fd=fd)

    def undoorbell(self, slot: int, /) -> None:
        self._do("undoorbell", slot)


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def packet(type: int, *, sequence: int = 1, **fields: int) -> bytes:
    return Packet(type=type, sequence=sequence, **fields).pack()


def test_the_packet_has_40_bytes_in_the_documented_places() -> None:
    data = packet(2, sequence=7, offset=0x1000, length=0x2000, file_offset=0x3000, rights=3, status=0)
    assert data == struct.pack("<HHIQQQII", 2, 1, 7, 0x1000, 0x2000, 0x3000, 3, 0)
    assert len(data) == 40


# The client's end


class ClientRig:
    """A `MapChannelClient` and the other end of its socket."""

    def __init__(self) -> None:
        self.other, ours = pair()
        self.handler = Handler()
        self.client = MapChannelClient(ours, self.handler, send_timeout_s=0.05)

    def ask(self, data: bytes, fds: Sequence[Fd] = ()) -> int:
        """Send one packet, have it processed, return the status of its answer."""
        send_some(self.other, data, fds)
        assert self.client.process()
        answer = Packet.unpack(self.other.recv(100))
        sent = Packet.unpack(data)
        assert (answer.type, answer.sequence, answer.version) == (sent.type | 0x8000, sent.sequence, 1)
        return answer.status

    def hello(self) -> None:
        assert self.ask(packet(1, offset=PAGE, length=WINDOW)) == 0


@pytest.fixture
def rig() -> Iterator[ClientRig]:
    it = ClientRig()
    yield it
    it.client.close()
    it.other.close()
    close_all(it.handler.fds)


@pytest.fixture
def memory() -> Iterator[Fd]:
    with Fd(os.memfd_create("memory")) as fd:
        os.ftruncate(fd.fileno(), WINDOW)
        yield fd


def test_each_request_reaches_the_handler_and_is_answered(rig: ClientRig, memory: Fd) -> None:
    rig.hello()
    assert rig.ask(packet(2, offset=PAGE, length=2 * PAGE, file_offset=PAGE, rights=3), [memory]) == 0
    assert rig.ask(packet(3, offset=PAGE, length=2 * PAGE)) == 0
    assert rig.ask(packet(4, offset=17), [memory]) == 0
    assert rig.ask(packet(5, offset=17)) == 0
    assert rig.handler.log == [
        ("hello", PAGE, WINDOW),
        ("map", PAGE, 2 * PAGE, PAGE, 3),
        ("unmap", PAGE, 2 * PAGE),
        ("doorbell", 17),
        ("undoorbell", 17),
    ]
    assert len(rig.handler.fds) == 2
    assert rig.client.window is not None
    assert rig.client.window.length == WINDOW


def test_nothing_to_do_is_no_trouble_and_several_packets_are_answered_in_order(rig: ClientRig) -> None:
    assert rig.client.process()
    for sequence, type in ((1, 1), (2, 5), (3, 5)):
        rig.other.send(packet(type, sequence=sequence, offset=PAGE, length=WINDOW if type == 1 else 0))
    assert rig.client.process()
    assert [Packet.unpack(rig.other.recv(100)).sequence for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("data", "fd_count", "status"),
    [
        (packet(1, offset=PAGE, length=WINDOW), 0, errno.EINVAL),  # a second HELLO
        (packet(2, offset=PAGE, length=PAGE, rights=3), 0, errno.EINVAL),
        (packet(2, offset=PAGE, length=PAGE, rights=0), 1, errno.EINVAL),
        (packet(2, offset=PAGE, length=PAGE, rights=4), 1, errno.EINVAL),
        (packet(2, offset=1, length=PAGE, rights=3), 1, errno.EINVAL),
        (packet(2, offset=0, length=PAGE - 1, rights=3), 1, errno.EINVAL),
        (packet(2, offset=0, length=0, rights=3), 1, errno.EINVAL),
        (packet(2, offset=WINDOW, length=PAGE, rights=3), 1, errno.EINVAL),
        (packet(2, offset=WINDOW - PAGE, length=2 * PAGE, rights=3), 1, errno.EINVAL),
        (packet(2, offset=(1 << 64) - PAGE, length=2 * PAGE, rights=3), 1, errno.EINVAL),
        (packet(2, offset=PAGE, length=(1 << 64) - PAGE, rights=3), 1, errno.EINVAL),
        (packet(2, offset=0, length=PAGE, file_offset=512, rights=3), 1, errno.EINVAL),
        (packet(2, offset=0, length=PAGE, file_offset=(1 << 64) - PAGE, rights=3), 1, errno.EINVAL),
        (packet(2, offset=0, length=PAGE, rights=3, status=1), 1, errno.EINVAL),
        (packet(3, offset=0, length=PAGE), 1, errno.EINVAL),
        (packet(3, offset=0, length=PAGE, rights=1), 0, errno.EINVAL),
        (packet(3, offset=512, length=PAGE), 0, errno.EINVAL),
        (packet(4, offset=1), 0, errno.EINVAL),
        (packet(4, offset=1, length=1), 1, errno.EINVAL),
        (packet(5, offset=1), 1, errno.EINVAL),
        (packet(2, offset=PAGE, length=PAGE, rights=3), 2, errno.EMFILE),
        (packet(6), 0, errno.ENOSYS),
        (packet(0), 0, errno.ENOSYS),
    ],
)
def test_a_request_that_does_not_fit_changes_nothing(
    rig: ClientRig, memory: Fd, data: bytes, fd_count: int, status: int
) -> None:
    rig.hello()
    before = len(os.listdir("/proc/self/fd"))
    assert rig.ask(data, [memory] * fd_count) == status
    assert rig.handler.log == [("hello", PAGE, WINDOW)]
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("page_size", "window"),
    [(0, WINDOW), (2048, WINDOW), (5000, 10000), (PAGE, 0), (PAGE, 100), (PAGE, (1 << 64) - PAGE)],
)
def test_a_window_that_makes_no_sense_is_refused(rig: ClientRig, page_size: int, window: int) -> None:
    assert rig.ask(packet(1, offset=page_size, length=window)) == errno.EINVAL
    assert rig.client.window is None


def test_nothing_is_done_before_hello(rig: ClientRig, memory: Fd) -> None:
    for data, fds in ((packet(2, offset=0, length=PAGE, rights=1), [memory]), (packet(5), [])):
        assert rig.ask(data, fds) == errno.EINVAL
    assert rig.handler.log == []


def test_an_oserror_of_the_handler_is_the_status_and_the_descriptor_is_closed(rig: ClientRig, memory: Fd) -> None:
    rig.hello()
    rig.handler.refuse = {"map": OSError(errno.ENOMEM, "no room"), "unmap": OSError("without a number")}
    before = len(os.listdir("/proc/self/fd"))
    assert rig.ask(packet(2, offset=0, length=PAGE, rights=1), [memory]) == errno.ENOMEM
    assert rig.ask(packet(3, offset=0, length=PAGE)) == errno.EIO
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_bug_in_the_handler_is_answered_and_shown(rig: ClientRig, memory: Fd) -> None:
    rig.hello()
    rig.handler.refuse = {"map": ZeroDivisionError()}
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ZeroDivisionError):
        rig.ask(packet(2, offset=0, length=PAGE, rights=1), [memory])
    assert Packet.unpack(rig.other.recv(100)).status == errno.EIO
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "data",
    [b"x", bytes(39), bytes(41), packet(1, version=2), packet(0x8001), os.urandom(0) + bytes(40), packet(0xFFFF)],
)
def test_a_packet_that_is_no_request_ends_the_channel(rig: ClientRig, memory: Fd, data: bytes) -> None:
    before = len(os.listdir("/proc/self/fd"))
    send_some(rig.other, data, [memory])
    with pytest.raises(RemoteProtocolError):
        rig.client.process()
    assert rig.client.fileno() == -1
    assert not rig.client.process()
    assert len(os.listdir("/proc/self/fd")) == before - 1  # the channel's socket


def test_the_end_of_the_channel_is_told(rig: ClientRig) -> None:
    rig.hello()
    rig.other.close()
    assert not rig.client.process()


def test_a_server_that_does_not_read_answers_ends_the_channel(rig: ClientRig) -> None:
    rig.hello()
    with pytest.raises(VfioUserTimeoutError):  # noqa: PT012 - at some point the socket is full
        while True:
            rig.other.send(packet(5), socket.MSG_DONTWAIT)
            rig.client.process()
    assert rig.client.fileno() == -1


# The server's end


class ServerRig:
    """A running `MapChannelServer` and the other end of its socket."""

    def __init__(self, **options: Any) -> None:
        ours, self.other = pair()
        self.other.setblocking(False)
        self.server = MapChannelServer(ours, **options)

    async def __aenter__(self) -> ServerRig:
        self._timeout = trio.fail_after(10)
        self._timeout.__enter__()
        self._manager = trio.open_nursery()
        self.nursery = await self._manager.__aenter__()
        self.nursery.start_soon(self.server.run)
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        self.nursery.cancel_scope.cancel()
        await self._manager.__aexit__(*exc_info)
        self._timeout.__exit__(*exc_info)
        self.other.close()

    async def take(self) -> tuple[Packet, list[Fd]]:
        while True:
            try:
                received = recv_message(self.other, buffer := bytearray(40), 4)
                return Packet.unpack(buffer), received.fds
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.other.fileno())

    async def answer(self, status: int = 0) -> Packet:
        """Take the next request and answer it."""
        request, fds = await self.take()
        close_all(fds)
        self.other.send(Packet(type=request.type | 0x8000, sequence=request.sequence, status=status).pack())
        return request

    async def hello(self) -> None:
        pending = self.server.hello_nowait(PAGE, WINDOW)
        await self.answer()
        await pending.wait()


async def test_requests_are_sent_at_once_and_answered_in_order(memory: Fd) -> None:
    async with ServerRig() as rig:
        await rig.hello()
        pendings = [
            rig.server.map_nowait(0, PAGE, 0, 1, memory),
            rig.server.doorbell_nowait(9, memory.fileno()),
            rig.server.unmap_nowait(0, PAGE),
            rig.server.undoorbell_nowait(9),
        ]
        assert not any(pending.done for pending in pendings)
        requests = [await rig.answer(status) for status in (0, 0, errno.ENOENT, 0)]
        assert [request.type for request in requests] == [2, 4, 3, 5]
        assert [request.sequence for request in requests] == [2, 3, 4, 5]
        assert (requests[0].length, requests[0].rights, requests[1].offset) == (PAGE, 1, 9)
        for pending in (pendings[0], pendings[1], pendings[3]):
            await pending.wait()
            await pending.wait()
        with pytest.raises(VfioUserError, match="UNMAP") as caught:
            await pendings[2].wait()
        assert caught.value.errno == errno.ENOENT
        assert rig.server.failure is None


async def test_descriptors_are_borrowed(memory: Fd) -> None:
    async with ServerRig() as rig:
        await rig.hello()
        with memory.dup() as copy:
            rig.server.map_nowait(0, PAGE, 0, 1, copy)
        request, fds = await rig.take()
        assert request.type == PacketType.MAP
        assert os.fstat(fds[0].fileno()).st_ino == os.fstat(memory.fileno()).st_ino
        close_all(fds)


async def test_requests_beyond_what_the_socket_holds_are_sent_later(memory: Fd) -> None:
    async with ServerRig() as rig:
        await rig.hello()
        pendings = [rig.server.map_nowait(0, PAGE, 0, 1, memory) for _ in range(1000)]
        for _ in pendings:
            await rig.answer()
        for pending in pendings:
            await pending.wait()


async def test_requests_that_cannot_be_are_not_sent(memory: Fd) -> None:
    async with ServerRig() as rig:
        with pytest.raises(LocalProtocolError):
            rig.server.unmap_nowait(0, PAGE)  # before HELLO
        await rig.hello()
        for call in (
            lambda: rig.server.map_nowait(1, PAGE, 0, 1, memory),
            lambda: rig.server.map_nowait(0, PAGE, 0, 0, memory),
            lambda: rig.server.unmap_nowait(WINDOW, PAGE),
            lambda: rig.server.hello_nowait(PAGE, WINDOW),
        ):
            with pytest.raises(LocalProtocolError):
                call()
        assert rig.server.failure is None


async def test_what_is_unanswered_is_bounded() -> None:
    async with ServerRig(max_outstanding=2) as rig:
        rig.server.hello_nowait(PAGE, WINDOW)
        rig.server.undoorbell_nowait(1)
        with pytest.raises(TransportError) as caught:
            rig.server.undoorbell_nowait(1)
        assert caught.value.errno == errno.EBUSY


@pytest.mark.parametrize(
    "garbage",
    [
        lambda p: b"x",
        lambda p: bytes(40),
        lambda p: bytes(41),
        lambda p: Packet(type=p.type, sequence=p.sequence).pack(),
        lambda p: Packet(type=p.type | 0x8000, sequence=p.sequence + 1).pack(),
        lambda p: Packet(type=0x8005, sequence=p.sequence).pack(),
        lambda p: Packet(type=p.type | 0x8000, sequence=p.sequence, version=2).pack(),
        lambda p: Packet(type=p.type | 0x8000, sequence=p.sequence, status=4096).pack(),
        lambda p: Packet(type=p.type | 0x8000, sequence=p.sequence, status=0xFFFF_FFFF).pack(),
    ],
)
async def test_garbage_from_the_client_ends_the_channel_for_all_who_wait(
    garbage: Callable[[Packet], bytes],
) -> None:
    async with ServerRig() as rig:
        await rig.hello()
        pendings = [rig.server.unmap_nowait(0, PAGE), rig.server.unmap_nowait(0, PAGE)]
        request, _ = await rig.take()
        rig.other.send(garbage(request))
        for pending in pendings:
            with pytest.raises(MapChannelClosedError, match="garbage"):
                await pending.wait()
        with pytest.raises(MapChannelClosedError):
            rig.server.unmap_nowait(0, PAGE)
        assert rig.server.failure is not None
        assert rig.server.failure.errno == errno.EPROTO


async def test_an_answer_nobody_waits_for_ends_the_channel() -> None:
    async with ServerRig() as rig:
        await rig.hello()
        rig.other.send(packet(0x8003, sequence=2))
        await trio.testing.wait_all_tasks_blocked()
        assert rig.server.failure is not None


async def test_an_answer_with_a_descriptor_ends_the_channel_and_it_is_closed() -> None:
    async with ServerRig() as rig:
        pending = rig.server.hello_nowait(PAGE, WINDOW)
        read, write = os.pipe()
        with Fd(read):
            with Fd(write) as end:
                send_some(rig.other, packet(0x8001, sequence=1), [end])
            with pytest.raises(MapChannelClosedError):
                await pending.wait()
            assert os.read(read, 1) == b""


async def test_a_client_that_leaves_fails_all_who_wait() -> None:
    async with ServerRig() as rig:
        await rig.hello()
        pending = rig.server.unmap_nowait(0, PAGE)
        rig.other.close()
        with pytest.raises(MapChannelClosedError):
            await pending.wait()
        with pytest.raises(MapChannelClosedError):
            await rig.server.undoorbell(1)


async def test_a_client_that_is_silent_is_given_up_on() -> None:
    async with ServerRig(timeout_s=0.02) as rig:
        pending = rig.server.hello_nowait(PAGE, WINDOW)
        with pytest.raises(MapChannelClosedError, match="did not answer HELLO") as caught:
            await pending.wait()
        assert caught.value.errno == errno.ETIMEDOUT


async def test_each_request_has_the_whole_time(autojump_clock: trio.testing.MockClock) -> None:
    ours, other = pair()
    other.setblocking(False)
    with other, trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            server = MapChannelServer(ours, timeout_s=10)
            nursery.start_soon(server.run)
            pending = server.hello_nowait(PAGE, WINDOW)
            for sequence in range(1, 6):
                await trio.sleep(8)
                kind = Packet.unpack(other.recv(40)).type
                other.send(packet(kind | 0x8000, sequence=sequence))
                await trio.testing.wait_all_tasks_blocked()
                await pending.wait()
                pending = server.undoorbell_nowait(1)
            with pytest.raises(MapChannelClosedError, match="UNDOORBELL"):
                await pending.wait()
            assert trio.current_time() - pending.deadline < 1


async def test_closing_and_cancelling_fail_who_waits() -> None:
    async with ServerRig() as rig:
        pending = rig.server.hello_nowait(PAGE, WINDOW)
        rig.server.close()
        rig.server.close()
        with pytest.raises(MapChannelClosedError):
            await pending.wait()
    async with ServerRig() as rig:
        pending = rig.server.hello_nowait(PAGE, WINDOW)
        rig.nursery.cancel_scope.cancel()
    with pytest.raises(MapChannelClosedError):
        await pending.wait()


async def test_a_caller_that_stops_waiting_does_not_disturb_the_channel() -> None:
    async with ServerRig() as rig:
        await rig.hello()
        with trio.move_on_after(0):
            await rig.server.unmap(0, PAGE)
        pending = rig.server.undoorbell_nowait(3)
        assert (await rig.answer()).type == PacketType.UNMAP
        await rig.answer()
        await pending.wait()


# Negotiation


class ChannelDevice(Device):
    """Offers the map channel and says HELLO and MAP as soon as the client writes."""

    async def version(self, capabilities: Mapping[str, Any], /) -> tuple[Mapping[str, Any], Sequence[Fd]]:
        offer = offer_channel(capabilities)
        if offer is None:
            return {}, []
        reply, fds, self.channel = offer
        assert self.connection is not None
        self.connection.start_soon(self.channel.run)
        return reply, fds

    async def region_write(self, index: int, offset: int, data: bytes, /) -> None:
        hello = self.channel.hello_nowait(PAGE, WINDOW)
        await self.channel.map(0, PAGE, 0, 3, self.file)
        await hello.wait()


@pytest.fixture
def channel_server(tmp_path: Path) -> Iterator[ServerThread]:
    def factory(connection: Connection) -> Device:
        return ChannelDevice(connection)

    with ServerThread(tmp_path / "s", factory=factory) as server:
        yield server


def test_a_client_that_asks_gets_the_channel_with_the_version_reply(channel_server: ServerThread) -> None:
    handler = Handler()
    with Client.connect(channel_server.path, capabilities=client_capability(), timeout_s=10) as client:
        sock = take_channel(client)
        assert sock is not None
        with MapChannelClient(sock, handler) as channel:
            client.region_write(0, 0, b"x", posted=True)
            sock.setblocking(True)
            while len(handler.log) < 2:
                sock.recv(1, socket.MSG_PEEK)
                assert channel.process()
            assert client.region_read(0, 0, 1) == b"\0"  # the device goes on once all is answered
    assert handler.log == [("hello", PAGE, WINDOW), ("map", 0, PAGE, 0, 3)]
    close_all(handler.fds)


def test_a_client_that_does_not_ask_gets_none(channel_server: ServerThread) -> None:
    with Client.connect(channel_server.path, timeout_s=10) as client:
        assert take_channel(client) is None


@pytest.mark.parametrize("asked", [None, {}, 1, {"version": 2}, {"version": True}, {"version": "1"}, []])
def test_another_version_of_the_channel_is_not_offered(asked: object) -> None:
    assert offer_channel({"map_channel": asked}) is None


@pytest.mark.parametrize("make", ["nothing", "file", "stream"])
def test_a_grant_without_the_right_socket_is_a_protocol_error(tmp_path: Path, make: str) -> None:
    class Lying(Device):
        async def version(self, capabilities: Mapping[str, Any], /) -> tuple[Mapping[str, Any], Sequence[Fd]]:
            if make == "nothing":
                fds = []
            elif make == "file":
                fds = [Fd(os.memfd_create("file"))]
            else:
                one, two = socket.socketpair()
                one.close()
                fds = [Fd(two.detach())]
            return {"map_channel": {"version": 1}}, fds

    with (
        ServerThread(tmp_path / "s", factory=lambda connection: Lying(connection)) as server,
        Client.connect(server.path, capabilities=client_capability()) as client,
        pytest.raises(RemoteProtocolError),
    ):
        take_channel(client)

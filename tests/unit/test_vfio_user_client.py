# SPDX-License-Identifier: Apache-2.0
"""The blocking client: against the real server, and against servers that misbehave."""

from __future__ import annotations

import errno
import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from vfio_user_rig import Device, ServerThread

from ism.errors import DeviceGoneError, LocalProtocolError, RemoteProtocolError, TransportError
from ism.vfio_user import wire
from ism.vfio_user.capabilities import encode_version
from ism.vfio_user.client import Client
from ism.vfio_user.connection import Connection
from ism.vfio_user.errors import MalformedMessageError, VfioUserError, VfioUserTimeoutError
from ism.vfio_user.fds import Fd, recv_message, send_message
from ism.vfio_user.handler import Limits
from ism.vfio_user.payloads import IrqAction, IrqData, MmapArea, RegionWrite, SetIrqs
from ism.vfio_user.wire import Command, Message, MessageReader


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerThread]:
    with ServerThread(tmp_path / "s") as thread:
        yield thread


@pytest.fixture
def client(server: ServerThread) -> Iterator[Client]:
    with Client.connect(server.path, timeout_s=10) as it:
        yield it


def errno_of(call: Callable[[], object]) -> int:
    with pytest.raises(VfioUserError) as caught:
        call()
    return caught.value.errno


def test_a_client_learns_what_the_device_is(client: Client) -> None:
    assert client.version == (0, 0)
    assert client.capabilities.max_msg_fds == 16
    info = client.device_info()
    assert (info.flags, info.num_regions, info.num_irqs) == (3, 4, 2)
    assert client.irq_info(0).count == 4
    region = client.region_info(0)
    assert (region.size, region.flags, region.fd) == (256, 3, None)
    assert errno_of(lambda: client.region_info(4)) == errno.EINVAL
    assert errno_of(lambda: client.irq_info(9)) == errno.EINVAL


def test_a_region_can_be_mapped(client: Client, server: ServerThread) -> None:
    region = client.region_info(1)
    assert region.areas == (MmapArea(offset=0, size=4096), MmapArea(offset=8192, size=4096))
    assert region.fd is not None
    with region.fd, mmap.mmap(region.fd.fileno(), 4096, offset=8192) as view:
        view[:5] = b"hello"
    assert os.pread(server.devices[0].file.fileno(), 5, 8192) == b"hello"


def test_a_region_with_more_areas_than_the_first_reply_holds_is_asked_for_again(tmp_path: Path) -> None:
    class Sparse(Device):
        async def region_info(self, index: int, /) -> object:  # type: ignore[override]
            areas = tuple(MmapArea(offset=i * 8192, size=4096) for i in range(1000))
            info = await super().region_info(1)
            return type(info)(index=1, size=1 << 24, flags=7, areas=areas, fd=info.fd)

    with (
        ServerThread(tmp_path / "many", factory=lambda connection: Sparse(connection)) as server,  # type: ignore[arg-type, return-value]
        Client.connect(server.path) as client,
    ):
        region = client.region_info(1)
        assert len(region.areas) == 1000
        assert region.fd is not None
        region.fd.close()


def test_reads_and_writes_and_refusals(client: Client) -> None:
    client.region_write(0, 10, b"abc")
    assert client.region_read(0, 9, 5) == b"\0abc\0"
    assert errno_of(lambda: client.region_read(0, 250, 10)) == errno.EINVAL
    assert errno_of(lambda: client.region_write(0, 0, b"EBSY")) == errno.EBUSY
    assert errno_of(lambda: client.region_write(2, 0, b"x")) == errno.EPERM
    with pytest.raises(LocalProtocolError, match="split"):
        client.region_read(0, 0, (1 << 20) + 1)


def test_posted_writes_are_done_before_the_next_read(client: Client) -> None:
    for value in range(200):
        client.region_write(0, value, bytes([value]), posted=True)
    assert client.region_read(0, 0, 200) == bytes(range(200))
    client.region_write(3, 0, b"refused, and nobody hears of it", posted=True)
    client.region_write_multi([RegionWrite(0, 1, b"x"), RegionWrite(0, 2, b"y")])
    client.region_write_multi([RegionWrite(0, 3, b"z")], posted=False)
    assert client.region_read(0, 0, 4) == b"\0xyz"
    with pytest.raises(LocalProtocolError):
        client.region_write_multi([RegionWrite(0, 1, b"123456789")])


def test_write_multi_needs_the_servers_offer(tmp_path: Path) -> None:
    with (
        ServerThread(tmp_path / "s", limits=Limits(write_multiple=False)) as server,
        Client.connect(server.path) as client,
        pytest.raises(LocalProtocolError, match="write_multiple"),
    ):
        client.region_write_multi([])


def test_reset_and_irqs(client: Client, server: ServerThread) -> None:
    with Fd(os.eventfd(0)) as one, Fd(os.eventfd(0)) as two:
        client.set_irq_eventfds(0, 0, [one, two.fileno(), None, one])
    client.disable_irqs(0)
    client.set_irqs(SetIrqs(data=IrqData.BOOL, action=IrqAction.MASK, index=1, count=1, bools=(True,)))
    client.reset()
    log = server.devices[0].log[1:]
    assert [(entry[1].data, entry[1].start, entry[1].count, entry[2]) for entry in log[:3]] == [
        (IrqData.EVENTFD, 0, 2, 2),
        (IrqData.EVENTFD, 2, 1, 0),
        (IrqData.EVENTFD, 3, 1, 1),
    ]
    assert log[3][1].disables
    assert log[4][1].bools == (True,)
    assert log[5] == ("reset",)


def test_eventfds_are_split_to_what_the_server_takes(tmp_path: Path) -> None:
    with ServerThread(tmp_path / "s", limits=Limits(max_msg_fds=2)) as server, Client.connect(server.path) as client:
        with Fd(os.eventfd(0)) as fd:
            client.set_irq_eventfds(0, 0, [fd, fd, fd])
            request = SetIrqs(data=IrqData.EVENTFD, action=IrqAction.TRIGGER, index=0, count=3)
            with pytest.raises(LocalProtocolError):
                client.set_irqs(request, [fd, fd, fd])
        assert [entry[2] for entry in server.devices[0].log[1:]] == [2, 1]


def test_the_server_reaches_mapped_memory_by_message_while_it_serves_a_request(
    client: Client, server: ServerThread
) -> None:
    device = server.devices[0]
    memory = bytearray(8192)
    memory[5:9] = b"ping"

    async def echo(offset: int, data: bytes) -> None:
        assert device.connection is not None
        await device.connection.dma_write(0x11000, await device.connection.dma_read(0x10005, 4))

    client.dma_map(0x10000, 8192, memory=memory)
    device.on_write = echo
    client.region_write(0, 0, b"x")
    assert memory[4096:4100] == b"ping"
    client.dma_unmap(0x10000, 8192)
    memory.append(0)  # no view is left
    assert errno_of(lambda: client.dma_unmap(0x10000, 8192)) == errno.ENOENT
    assert device.log[-2:] == [("dma_map", 0x10000, 8192, False), ("dma_unmap", 0x10000, 8192)]


def test_memory_of_a_descriptor_is_reached_both_ways(client: Client, server: ServerThread) -> None:
    device = server.devices[0]
    with Fd(os.memfd_create("ram")) as ram:
        os.ftruncate(ram.fileno(), 8192)
        client.dma_map(0, 4096, fd=ram, offset=4096)

        async def touch(offset: int, data: bytes) -> None:
            assert device.connection is not None
            os.pwrite(device.fds[0].fileno(), b"mapped ", 4096)
            await device.connection.dma_write(7, b"and sent")

        device.on_write = touch
        client.region_write(0, 0, b"x")
        assert os.pread(ram.fileno(), 15, 4096) == b"mapped and sent"


def test_a_refused_map_leaves_nothing_behind(client: Client) -> None:
    memory = bytearray(4096)
    assert errno_of(lambda: client.dma_map(0xBAD000, 4096, memory=memory)) == errno.EPERM
    memory.append(0)
    client.dma_map(0x1000, 4096, memory=bytearray(4096))
    assert errno_of(lambda: client.dma_map(0, 8192, memory=bytearray(8192))) == errno.EEXIST


def test_requests_that_arrive_when_nobody_waits_are_served_by_process(client: Client, server: ServerThread) -> None:
    client.dma_map(0, 4096, memory=bytearray(b"0123" * 1024))
    assert client.process()  # nothing there
    got: list[bytes] = []
    connection = server.devices[0].connection
    assert connection is not None
    thread = threading.Thread(target=lambda: got.append(server.call(connection.dma_read, 2, 4)))
    thread.start()
    poller = select.poll()
    poller.register(client.fileno(), select.POLLIN)
    assert poller.poll(10_000)
    assert client.process()
    thread.join(10)
    assert got == [b"2301"]
    server.stop()
    assert poller.poll(10_000)
    assert not client.process()


def test_many_threads_share_one_connection(client: Client) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for round in range(30):
                value = bytes([number, round])
                client.region_write(0, number * 2, value, posted=bool(round % 2))
                assert client.region_read(0, number * 2, 2) == value
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


def test_a_posted_write_does_not_wait_for_anothers_reply(client: Client, server: ServerThread) -> None:
    device = server.devices[0]
    entered = threading.Event()
    release = trio.Event()

    async def slow(offset: int, data: bytes) -> None:
        if data == b"slow":
            entered.set()
            await release.wait()

    device.on_write = slow
    thread = threading.Thread(target=client.region_write, args=(0, 0, b"slow"))
    thread.start()
    assert entered.wait(10)
    client.region_write(0, 8, b"fast", posted=True)  # returns while the other thread waits
    assert thread.is_alive()

    async def let_go() -> None:
        release.set()

    server.call(let_go)
    thread.join(10)
    assert not thread.is_alive()
    assert client.region_read(0, 8, 4) == b"fast"


def test_every_waiter_learns_of_the_servers_death_at_once(tmp_path: Path) -> None:
    hanging = threading.Semaphore(0)

    class Hanging(Device):
        async def region_read(self, index: int, offset: int, count: int, /) -> bytes:
            hanging.release()
            await trio.sleep_forever()
            raise AssertionError

    outcomes: list[type[BaseException]] = []

    def wait(client: Client) -> None:
        try:
            client.region_read(0, 0, 1)
        except Exception as error:
            outcomes.append(type(error))

    with (
        ServerThread(tmp_path / "s", factory=lambda connection: Hanging(connection)) as server,
        Client.connect(server.path, timeout_s=60) as client,
    ):
        threads = [threading.Thread(target=wait, args=(client,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert hanging.acquire(timeout=10)
        server.stop()
        for thread in threads:
            thread.join(10)
        assert outcomes == [DeviceGoneError] * 3
        for posted in (True, False):
            with pytest.raises(DeviceGoneError):
                client.region_write(0, 0, b"x", posted=posted)


def test_closing_wakes_who_waits(tmp_path: Path) -> None:
    entered = threading.Event()

    class Hanging(Device):
        async def region_read(self, index: int, offset: int, count: int, /) -> bytes:
            entered.set()
            await trio.sleep_forever()
            raise AssertionError

    outcomes: list[str] = []

    def wait(client: Client) -> None:
        try:
            client.region_read(0, 0, 1)
        except DeviceGoneError as error:
            outcomes.append(str(error))

    with ServerThread(tmp_path / "s", factory=lambda connection: Hanging(connection)) as server:
        client = Client.connect(server.path, timeout_s=60)
        thread = threading.Thread(target=wait, args=(client,))
        thread.start()
        assert entered.wait(10)
        client.close()
        client.close()
        thread.join(10)
        assert len(outcomes) == 1
        assert "closed here" in outcomes[0]
        assert client.fileno() == -1


def test_a_request_that_is_not_answered_times_out_and_its_late_reply_is_passed_over(
    client: Client, server: ServerThread
) -> None:
    entered, release = threading.Event(), trio.Event()

    async def slow(offset: int, data: bytes) -> None:
        entered.set()
        await release.wait()

    server.devices[0].on_write = slow
    with pytest.raises(VfioUserTimeoutError, match="REGION_WRITE"):
        client.region_write(0, 0, b"x", timeout_s=0.01)
    assert entered.wait(10)
    server.devices[0].on_write = None

    async def let_go() -> None:
        release.set()

    server.call(let_go)
    assert client.region_read(0, 0, 1) == b"x"


def test_nobody_listening_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="is its server running") as caught:
        Client.connect(tmp_path / "nothing")
    assert caught.value.errno == errno.ENOENT


# Servers that misbehave


class FakeServer:
    """A server thread that answers each message with what `answer` makes of it; None ends the connection."""

    def __init__(self, answer: Callable[[Message[Fd]], bytes | None], fds: list[Fd] | None = None) -> None:
        self.sock, self.theirs = socket.socketpair()
        self.answer, self.fds = answer, fds or []
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        reader: MessageReader[Fd] = MessageReader(max_message=1 << 20, max_fds=16)
        buffer = bytearray(1 << 16)
        while True:
            select.select([self.sock], [], [])
            try:
                received = recv_message(self.sock, buffer, 16)
            except OSError:
                return
            if received.size == 0:
                return
            reader.feed(memoryview(buffer)[: received.size], received.fds)
            while (message := reader.next_message()) is not None:
                data = self.answer(message)
                if data is None:
                    self.sock.shutdown(socket.SHUT_RDWR)
                    return
                if data:
                    send_message(self.sock, data, self.fds if message.command != Command.VERSION else (), timeout_s=5)

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.sock.close()
        for fd in self.fds:
            fd.close()


def after_version(answer: Callable[[Message[Fd]], bytes | None]) -> Callable[[Message[Fd]], bytes | None]:
    def both(message: Message[Fd]) -> bytes | None:
        if message.command == Command.VERSION:
            return wire.encode_reply(message.id, message.command, encode_version(0, 0, {}))
        return answer(message)

    return both


@pytest.mark.parametrize(
    "reply",
    [
        lambda m: wire.encode_reply(m.id, m.command, encode_version(1, 0, {})),
        lambda m: wire.encode_reply(m.id, m.command, encode_version(0, 1, {})),
        lambda m: wire.encode_reply(m.id, m.command, b"\0\0\0\0{}"),
        lambda m: wire.encode_reply(m.id, m.command),
        lambda m: wire.encode_error(m.id, m.command, errno.EINVAL),
        lambda m: b"\0" * 16,
        lambda m: b"",
        lambda m: None,
    ],
)
def test_a_version_reply_that_is_none_makes_no_client(reply: Callable[[Message[Fd]], bytes | None]) -> None:
    with FakeServer(reply) as server, pytest.raises((TransportError, RemoteProtocolError)):
        Client(server.theirs, timeout_s=0.2)
    assert server.theirs.fileno() == -1


def access_reply(message: Message[Fd], data: bytes, *, command: int | None = None, id: int | None = None) -> bytes:
    return wire.encode_reply(
        message.id if id is None else id, command or message.command, bytes(message.payload) + data
    )


@pytest.mark.parametrize(
    "answer",
    [
        lambda m: access_reply(m, b"abc"),  # too short
        lambda m: access_reply(m, b"abcde"),  # too long
        lambda m: wire.encode_reply(m.id, m.command, struct.pack("<QII", 1, 0, 4) + b"abcd"),  # another offset
        lambda m: access_reply(m, b"abcd", command=Command.REGION_WRITE),
        lambda m: access_reply(m, b"abcd", id=m.id ^ 0x8000),
        lambda m: struct.pack("<HHIII", m.id, m.command, 15, 1, 0),
        lambda m: struct.pack("<HHIII", m.id, m.command, 1 << 31, 1, 0),
    ],
)
def test_a_reply_that_does_not_fit_is_a_protocol_error(answer: Callable[[Message[Fd]], bytes]) -> None:
    with (
        FakeServer(after_version(answer)) as server,
        Client(server.theirs, timeout_s=5) as client,
        pytest.raises(RemoteProtocolError),
    ):
        client.region_read(0, 0, 4)


def test_descriptors_with_a_reply_that_takes_none_are_closed() -> None:
    read, write = os.pipe()
    with Fd(read):
        answer = after_version(lambda m: access_reply(m, b"abcd"))
        with (
            FakeServer(answer, [Fd(write)]) as server,
            Client(server.theirs, timeout_s=5) as client,
            pytest.raises(RemoteProtocolError, match="descriptors"),
        ):
            client.region_read(0, 0, 4)
        assert os.read(read, 1) == b""


def test_an_error_reply_without_errno_is_still_an_error() -> None:
    answer = after_version(lambda m: wire.encode_error(m.id, m.command, 0))
    with FakeServer(answer) as server, Client(server.theirs, timeout_s=5) as client:
        assert errno_of(client.reset) == errno.EIO


def test_requests_a_server_may_not_make_are_refused_and_the_call_goes_on() -> None:
    refusals: list[tuple[int, int]] = []
    asked: list[Message[Fd]] = []

    def answer(message: Message[Fd]) -> bytes:
        if message.is_reply:
            refusals.append((message.command, message.error))
            if len(refusals) < 5:
                return b""
            return wire.encode_reply(asked[0].id, asked[0].command)
        asked.append(message)
        return (
            wire.encode(1, Command.DMA_READ, struct.pack("<QQ", 0, 4))
            + wire.encode(2, Command.DMA_WRITE, struct.pack("<QQ", 0, 5) + b"abcd")
            + wire.encode(3, Command.DEVICE_RESET)
            + wire.encode(4, Command.DMA_READ, struct.pack("<QQ", 0, 1 << 40))
            + struct.pack("<HHIII", 5, Command.DMA_READ, 32, 0x40, 0)
            + bytes(16)
            + wire.encode(6, Command.DMA_READ, struct.pack("<QQ", 0, 4), no_reply=True)
        )

    with FakeServer(after_version(answer)) as server, Client(server.theirs, timeout_s=10) as client:
        client.reset()
    assert refusals == [
        (Command.DMA_READ, errno.EFAULT),
        (Command.DMA_WRITE, errno.EINVAL),
        (Command.DEVICE_RESET, errno.ENOSYS),
        (Command.DMA_READ, errno.E2BIG),
        (Command.DMA_READ, errno.EINVAL),
    ]


def test_a_server_that_does_not_read_costs_a_timeout() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        reply = wire.encode_reply(1, Command.VERSION, encode_version(0, 0, {}))
        ours.send(reply)
        with Client(theirs, timeout_s=0.05) as client, pytest.raises(TransportError):  # noqa: PT012
            while True:  # at some point the socket is full
                client.region_write(0, 0, bytes(1 << 16), posted=True)


def test_a_client_does_not_take_itself_for_broken_after_a_malformed_reply() -> None:
    answers = iter([b"abc", b"abcd"])
    answer = after_version(lambda m: access_reply(m, next(answers)))
    with FakeServer(answer) as server, Client(server.theirs, timeout_s=5) as client:
        with pytest.raises(MalformedMessageError):
            client.region_read(0, 0, 4)
        assert client.region_read(0, 0, 4) == b"abcd"


def test_descriptors_of_the_version_reply_are_taken_once_or_closed(tmp_path: Path) -> None:
    class Sending(Device):
        def __init__(self, connection: Connection) -> None:
            super().__init__(connection)
            self.version_reply = ({}, [Fd(os.eventfd(0))])

    with ServerThread(tmp_path / "s", factory=Sending) as server:
        with Client.connect(server.path) as client:
            fds = client.take_version_fds()
            assert len(fds) == 1
            assert client.take_version_fds() == []
            fds[0].close()
        Client.connect(server.path).close()

# SPDX-License-Identifier: Apache-2.0
"""The server over the life of a connection: DMA by message, the end, several clients."""

from __future__ import annotations

import errno
import os
import socket
import struct
from pathlib import Path

import pytest
import trio
import trio.testing
from vfio_user_rig import Device, RawClient, served

from ism.errors import LocalProtocolError, TransportError
from ism.vfio_user import wire
from ism.vfio_user.connection import Connection
from ism.vfio_user.errors import ClientGoneError, MalformedMessageError, VfioUserError, VfioUserTimeoutError
from ism.vfio_user.fds import Fd
from ism.vfio_user.handler import Limits, Stats
from ism.vfio_user.payloads import DmaMap
from ism.vfio_user.server import serve_connection, serve_unix
from ism.vfio_user.wire import Command

ACCESS = struct.Struct("<QII")


def access(region: int, offset: int, count: int) -> bytes:
    return ACCESS.pack(offset, region, count)


def dma_map(address: int, size: int = 4096, flags: int = 3) -> bytes:
    return DmaMap(flags=flags, offset=0, address=address, size=size).pack()


def eventfd() -> Fd:
    return Fd(os.eventfd(0))


# DMA by message


async def expect_dma(it: object, command: Command) -> wire.Message[Fd]:
    message = await it.raw.receive()  # type: ignore[attr-defined]
    assert message is not None
    assert (message.command, message.flags) == (command, 0)
    return message


async def test_the_device_reads_and_writes_client_memory_in_the_middle_of_a_request() -> None:
    async with served() as it:
        await it.raw.call(Command.DMA_MAP, dma_map(0x1000))

        async def copy(offset: int, data: bytes) -> None:
            assert it.device.connection is not None
            got = await it.device.connection.dma_read(0x1010, 4)
            await it.device.connection.dma_write(0x1020, got + data)

        it.device.on_write = copy
        await it.raw.send(wire.encode(1, Command.REGION_WRITE, access(0, 0, 2) + b"go"))
        await it.raw.send(wire.encode(2, Command.REGION_READ, access(0, 0, 2)))  # waits its turn
        read = await expect_dma(it, Command.DMA_READ)
        assert bytes(read.payload) == struct.pack("<QQ", 0x1010, 4)
        await it.raw.send(wire.encode_reply(read.id, read.command, struct.pack("<QQ", 0x1010, 4) + b"abcd"))
        write = await expect_dma(it, Command.DMA_WRITE)
        assert bytes(write.payload) == struct.pack("<QQ", 0x1020, 6) + b"abcdgo"
        await it.raw.send(wire.encode_reply(write.id, write.command))  # as short as QEMU's
        for id in (1, 2):
            reply = await it.raw.receive()
            assert reply is not None
            assert (reply.id, reply.error) == (id, 0)


async def test_dma_from_a_background_task_while_the_client_is_idle_or_busy() -> None:
    async with served() as it:
        await it.raw.call(Command.DMA_MAP, dma_map(0x1000))
        got = []

        async def background() -> None:
            for _ in range(2):
                got.append(await it.connection.dma_read(0x1000, 2))

        it.connection.start_soon(background)
        first = await expect_dma(it, Command.DMA_READ)
        assert (await it.raw.call(Command.DEVICE_RESET)).error == 0  # the client's own request is not held up
        await it.raw.send(wire.encode_reply(first.id, first.command, struct.pack("<QQ", 0x1000, 2) + b"ab"))
        second = await expect_dma(it, Command.DMA_READ)
        await it.raw.send(wire.encode_reply(second.id, second.command, struct.pack("<QQ", 0x1000, 2) + b"cd"))
        await trio.testing.wait_all_tasks_blocked()
        assert got == [b"ab", b"cd"]


async def test_a_long_transfer_is_split_to_what_the_client_takes() -> None:
    async with served(negotiate=False) as it:
        await it.raw.negotiate({"max_data_xfer_size": 1000})
        await it.raw.call(Command.DMA_MAP, dma_map(0, 4096))
        it.connection.start_soon(it.connection.dma_write, 0, bytes(2500))
        sizes = []
        for _ in range(3):
            write = await expect_dma(it, Command.DMA_WRITE)
            sizes.append(len(write.payload) - 16)
            await it.raw.send(wire.encode_reply(write.id, write.command, write.payload[:16]))
        assert sizes == [1000, 1000, 500]


async def test_dma_outside_the_maps_or_against_their_rights_is_never_sent() -> None:
    async with served() as it:
        await it.raw.call(Command.DMA_MAP, dma_map(0x1000, flags=1))
        for call, number in (
            (lambda: it.connection.dma_read(0x1FFF, 2), errno.EFAULT),
            (lambda: it.connection.dma_write(0x1000, b"x"), errno.EPERM),
        ):
            with pytest.raises(VfioUserError) as caught:
                await call()
            assert caught.value.errno == number


async def test_dma_answers_that_are_refusals_or_lies_are_errors() -> None:
    async with served() as it:
        await it.raw.call(Command.DMA_MAP, dma_map(0x1000))
        outcomes: list[BaseException] = []

        async def attempt() -> None:
            try:
                await it.connection.dma_read(0x1000, 4)
            except (VfioUserError, MalformedMessageError) as error:
                outcomes.append(error)

        for answer in (
            lambda id: wire.encode_error(id, Command.DMA_READ, errno.EFAULT),
            lambda id: wire.encode_error(id, Command.DMA_READ, 0),
            lambda id: wire.encode_reply(id, Command.DMA_READ, struct.pack("<QQ", 0x1000, 4) + b"abc"),
        ):
            it.connection.start_soon(attempt)
            request = await expect_dma(it, Command.DMA_READ)
            await it.raw.send(answer(request.id))
            await trio.testing.wait_all_tasks_blocked()
        assert [error.errno for error in outcomes] == [errno.EFAULT, errno.EIO, errno.EINVAL]


async def test_a_client_that_never_answers_dma_costs_a_timeout_not_the_connection() -> None:
    async with served(limits=Limits(dma_timeout_s=0.01)) as it:
        await it.raw.call(Command.DMA_MAP, dma_map(0x1000))

        async def wait_for_it(offset: int, data: bytes) -> None:
            await it.connection.dma_read(0x1000, 4)

        it.device.on_write = wait_for_it
        await it.raw.send(wire.encode(1, Command.REGION_WRITE, access(0, 0, 1) + b"x"))
        late = await expect_dma(it, Command.DMA_READ)
        reply = await it.raw.receive()
        assert reply is not None
        assert (reply.id, reply.error) == (1, errno.ETIMEDOUT)
        await it.raw.send(wire.encode_reply(late.id, late.command, struct.pack("<QQ", 0x1000, 4) + b"late"))
        assert (await it.raw.call(Command.DEVICE_RESET)).error == 0
        assert it.stats.stray_replies == 1


async def test_a_client_that_floods_while_dma_is_awaited_is_dropped() -> None:
    async with served(limits=Limits(max_queued_messages=10)) as it:
        await it.raw.call(Command.DMA_MAP, dma_map(0x1000))
        ended = trio.Event()

        async def attempt() -> None:
            with pytest.raises(ClientGoneError):
                await it.connection.dma_read(0x1000, 4)
            ended.set()

        async def hold(offset: int, data: bytes) -> None:
            await attempt()

        it.device.on_write = hold
        await it.raw.send(wire.encode(1, Command.REGION_WRITE, access(0, 0, 1) + b"x"))
        await expect_dma(it, Command.DMA_READ)
        await it.raw.send(wire.encode(2, Command.DEVICE_RESET) * 20)
        await ended.wait()
        assert it.stats.dropped == 1


async def test_a_reply_nobody_asked_for_is_counted_and_its_descriptors_closed() -> None:
    async with served() as it:
        read, write = os.pipe()
        with Fd(read), Fd(write) as end:
            await it.raw.send(wire.encode_reply(1, Command.DMA_READ), [end])
            end.close()
            assert (await it.raw.call(Command.DEVICE_RESET)).error == 0
            assert os.read(read, 1) == b""
        assert it.stats.stray_replies == 1


# The end


async def test_a_client_that_does_not_read_is_dropped_after_a_while() -> None:
    async with served(limits=Limits(send_timeout_s=0.01)) as it:
        big = wire.encode(1, Command.REGION_READ, access(1, 0, 1 << 16))
        it.device.memory = bytearray(1 << 16)
        with pytest.raises(OSError, match=r"Broken pipe|reset"):  # noqa: PT012 - the server leaves at some point
            while True:
                await it.raw.send(big)
        await it.device.gone.wait()
        assert it.stats.dropped == 1


async def test_dma_under_way_when_the_client_leaves_fails_at_once() -> None:
    async with served() as it:
        await it.raw.call(Command.DMA_MAP, dma_map(0x1000))
        outcome: list[str] = []

        async def attempt() -> None:
            try:
                await it.connection.dma_read(0x1000, 4)
            except ClientGoneError as error:
                outcome.append(str(error))

        it.connection.start_soon(attempt)
        await expect_dma(it, Command.DMA_READ)
        it.raw.close()
        await it.device.gone.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert outcome == ["the client closed the connection"]


async def test_a_background_task_that_fails_drops_its_client_only() -> None:
    async with served() as it:

        async def broken() -> None:
            raise ZeroDivisionError

        it.connection.start_soon(broken)
        assert await it.raw.receive() is None
        assert it.stats.failures == 1


async def test_closed_runs_when_the_server_is_cancelled() -> None:
    ours, theirs = socket.socketpair()
    device = Device()
    with ours, trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_connection, theirs, lambda connection: device)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert device.log == [("closed",)]
        assert ours.recv(1) == b""


async def test_a_handler_whose_end_hangs_is_not_waited_for() -> None:
    class Hanging(Device):
        async def closed(self) -> None:
            await super().closed()
            await trio.sleep_forever()

    ours, theirs = socket.socketpair()
    stats = Stats()
    ours.close()
    with trio.fail_after(10):
        await serve_connection(theirs, lambda connection: Hanging(), limits=Limits(close_timeout_s=0.01), stats=stats)
    assert stats.failures == 1


async def test_a_factory_that_fails_costs_its_client_only() -> None:
    ours, theirs = socket.socketpair()
    stats = Stats()

    def factory(connection: Connection) -> Device:
        raise ZeroDivisionError

    with ours, trio.fail_after(10):
        await serve_connection(theirs, factory, stats=stats)
        assert ours.recv(1) == b""
    assert (stats.connections, stats.failures) == (1, 1)


async def test_a_descriptor_the_handler_closed_too_early_costs_one_reply() -> None:
    async with served() as it:
        it.device.file.close()
        assert (
            await it.raw.refused(Command.DEVICE_GET_REGION_INFO, struct.pack("<IIIIQQ", 80, 0, 1, 0, 0, 0))
            == errno.EBADF
        )
        assert (await it.raw.call(Command.DEVICE_RESET)).error == 0
        assert it.stats.failures == 1


async def test_background_tasks_live_from_the_factory_until_after_closed() -> None:
    ours, theirs = socket.socketpair()
    log: list[str] = []
    connections: list[Connection] = []

    async def background() -> None:
        try:
            await trio.sleep_forever()
        finally:
            log.append("cancelled")

    class Logging(Device):
        async def closed(self) -> None:
            await super().closed()
            log.append("closed")

    def factory(connection: Connection) -> Device:
        connection.start_soon(background)
        connections.append(connection)
        return Logging(connection)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_connection, theirs, factory)
            await trio.testing.wait_all_tasks_blocked()
            ours.close()
    assert log == ["closed", "cancelled"]
    with pytest.raises(LocalProtocolError):
        connections[0].start_soon(background)


async def test_what_a_dropped_client_still_had_in_store_is_not_served() -> None:
    async with served() as it:

        async def drop(offset: int, data: bytes) -> None:
            it.connection.drop("the test says so")

        it.device.on_write = drop
        await it.raw.send(
            wire.encode(1, Command.REGION_WRITE, access(0, 0, 1) + b"x") + wire.encode(2, Command.DEVICE_RESET)
        )
        assert await it.raw.receive() is None
        await it.device.gone.wait()
        assert ("reset",) not in it.device.log


# Several clients


async def connect(path: Path) -> RawClient:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return RawClient(sock)


async def test_a_misbehaving_client_does_not_touch_another(tmp_path: Path) -> None:
    devices: list[Device] = []

    def factory(connection: Connection) -> Device:
        assert connection.peer.pid == os.getpid()
        assert (connection.peer.uid, connection.peer.gid) == (os.getuid(), os.getgid())
        devices.append(Device(connection))
        return devices[-1]

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            stats = await nursery.start(serve_unix, tmp_path / "s", factory)
            good, bad, hanging = [await connect(tmp_path / "s") for _ in range(3)]
            await good.negotiate()
            await bad.negotiate()
            await hanging.negotiate()
            await trio.testing.wait_all_tasks_blocked()

            async def hang(offset: int, data: bytes) -> None:
                await trio.sleep_forever()

            devices[2].on_write = hang
            await hanging.send(wire.encode(1, Command.REGION_WRITE, access(0, 0, 1) + b"x"))
            await bad.send(struct.pack("<HHIII", 1, 99, 16, 0xFFFF_FFFF, 3) + bytes(range(16)))
            await bad.send(struct.pack("<HHIII", 1, 2, 3, 4, 5) * 10)
            while await bad.receive() is not None:
                pass
            for value in (b"a", b"b"):
                await good.call(Command.REGION_WRITE, access(0, 0, 1) + value)
                assert (await good.call(Command.REGION_READ, access(0, 0, 1))).payload[16:] == value
            for client in (good, bad, hanging):
                client.close()
            for device in devices[:2]:
                await device.gone.wait()
            nursery.cancel_scope.cancel()
    assert [device.log.count(("closed",)) for device in devices] == [1, 1, 1]
    assert stats.connections == 3
    assert not (tmp_path / "s").exists()


async def test_clients_beyond_the_limit_are_turned_away(tmp_path: Path) -> None:
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            stats = await nursery.start(
                lambda task_status: serve_unix(
                    tmp_path / "s", lambda connection: Device(), max_clients=1, task_status=task_status
                )
            )
            one = await connect(tmp_path / "s")
            await one.negotiate()
            two = await connect(tmp_path / "s")
            assert await two.receive() is None
            assert stats.dropped == 1
            one.close()
            two.close()
            nursery.cancel_scope.cancel()


async def test_a_listening_socket_may_be_passed_in(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_unix, listener, lambda connection: Device())
            client = await connect(tmp_path / "s")
            assert (await client.negotiate()).error == 0
            client.close()
            nursery.cancel_scope.cancel()
    assert listener.fileno() == -1


async def test_a_path_in_use_is_an_error_of_the_caller(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("a file")
    with trio.fail_after(20), pytest.raises(TransportError):
        await serve_unix(tmp_path / "s", lambda connection: Device())


def test_errors_of_this_side_are_told_from_those_of_the_other() -> None:
    assert not issubclass(MalformedMessageError, LocalProtocolError)
    assert issubclass(VfioUserTimeoutError, TransportError)

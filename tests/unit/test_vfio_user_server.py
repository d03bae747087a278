# SPDX-License-Identifier: Apache-2.0
"""The server against a client that sends whatever it likes: one test per refusal, order, limits, the end."""

from __future__ import annotations

import errno
import os
import struct

import pytest
import trio
import trio.testing
from vfio_user_rig import QEMU_CAPABILITIES, served

from ism.vfio_user import payloads, wire
from ism.vfio_user.capabilities import encode_version, parse_version
from ism.vfio_user.fds import Fd, close_all
from ism.vfio_user.handler import Limits
from ism.vfio_user.payloads import DmaMap, IrqAction, IrqData, RegionWrite, SetIrqs
from ism.vfio_user.wire import Command

ACCESS = struct.Struct("<QII")


def access(region: int, offset: int, count: int) -> bytes:
    return ACCESS.pack(offset, region, count)


def dma_map(address: int, size: int = 4096, flags: int = 3) -> bytes:
    return DmaMap(flags=flags, offset=0, address=address, size=size).pack()


def eventfd() -> Fd:
    return Fd(os.eventfd(0))


# VERSION


async def test_qemus_proposal_gets_a_subset_of_it_in_no_more_bytes() -> None:
    async with served(negotiate=False) as it:
        proposal = encode_version(0, 0, QEMU_CAPABILITIES)
        reply = await it.raw.call(Command.VERSION, proposal)
        assert len(reply.payload) <= len(proposal)  # QEMU's buffer is its request
        major, minor, capabilities = parse_version(reply.payload)
        assert (major, minor) == (0, 0)
        assert set(capabilities.raw) <= set(QEMU_CAPABILITIES)
        assert capabilities.raw == {
            "max_msg_fds": 16,
            "max_data_xfer_size": 1 << 20,
            "max_dma_maps": 65535,
            "pgsizes": 4096,
            "write_multiple": True,
        }
        assert it.device.log[0] == ("version", QEMU_CAPABILITIES)


async def test_a_client_without_capabilities_is_told_none() -> None:
    async with served(negotiate=False) as it:
        reply = await it.raw.call(Command.VERSION, struct.pack("<HH", 0, 3))
        assert bytes(reply.payload) == struct.pack("<HH", 0, 0) + b'{"capabilities":{}}\0'


async def test_descriptors_go_with_the_version_reply_and_are_closed_here() -> None:
    async with served(negotiate=False) as it:
        fd = eventfd()
        it.device.version_reply = ({"extra": 1}, [fd])
        reply = await it.raw.call(Command.VERSION, encode_version(0, 0, {**QEMU_CAPABILITIES, "extra": {}}))
        assert parse_version(reply.payload)[2].raw["extra"] == 1
        assert len(reply.fds) == 1
        close_all(reply.fds)
        assert fd.closed


@pytest.mark.parametrize(
    ("message", "number"),
    [
        (wire.encode(7, Command.DEVICE_RESET), errno.EINVAL),
        (wire.encode(7, Command.VERSION, struct.pack("<HH", 1, 0)), errno.EINVAL),
        (wire.encode(7, Command.VERSION, b"\0\0"), errno.EINVAL),
        (wire.encode(7, Command.VERSION, struct.pack("<HH", 0, 0) + b"{}"), errno.EINVAL),
        (wire.encode(7, Command.VERSION, bytes(5000)), errno.EMSGSIZE),
        (struct.pack("<HHIII", 7, 1, 15, 0, 0), errno.EINVAL),
    ],
)
async def test_without_a_usable_version_there_is_no_connection(message: bytes, number: int) -> None:
    async with served(negotiate=False) as it:
        await it.raw.send(message)
        reply = await it.raw.receive()
        assert reply is not None
        assert (reply.flags, reply.error) == (0x21, number)
        assert await it.raw.receive() is None
        assert (it.stats.malformed, it.stats.dropped) == (1, 1)


async def test_version_with_descriptors_is_refused_and_they_are_closed() -> None:
    async with served(negotiate=False) as it:
        read, write = os.pipe()
        with Fd(read), Fd(write) as end:
            assert await it.raw.refused(Command.VERSION, encode_version(0, 0, {}), [end]) == errno.EINVAL
            end.close()
            os.set_blocking(read, False)
            assert os.read(read, 1) == b""  # nobody holds the other end any more


async def test_a_client_that_says_nothing_is_dropped() -> None:
    async with served(negotiate=False, limits=Limits(handshake_timeout_s=0.01)) as it:
        assert await it.raw.receive() is None
        assert it.stats.dropped == 1


async def test_a_handler_that_answers_what_was_not_proposed_fails_alone() -> None:
    async with served(negotiate=False) as it:
        fd = eventfd()
        it.device.version_reply = ({"surprise": 1}, [fd])
        assert await it.raw.refused(Command.VERSION, encode_version(0, 0, QEMU_CAPABILITIES)) == errno.EIO
        assert fd.closed
        assert it.stats.failures == 1


# Information


async def test_device_region_and_irq_information() -> None:
    async with served() as it:
        reply = await it.raw.call(Command.DEVICE_GET_INFO, struct.pack("<IIII", 16, 0, 0, 0))
        assert bytes(reply.payload) == struct.pack("<IIII", 16, 3, 4, 2)
        reply = await it.raw.call(Command.DEVICE_GET_REGION_INFO, struct.pack("<IIIIQQ", 32, 0, 0, 0, 0, 0))
        assert bytes(reply.payload) == struct.pack("<IIIIQQ", 32, 3, 0, 0, 256, 0)
        reply = await it.raw.call(Command.DEVICE_GET_IRQ_INFO, struct.pack("<IIII", 16, 0, 1, 0))
        assert bytes(reply.payload) == struct.pack("<IIII", 16, 2, 1, 1)


async def test_a_region_is_asked_for_twice_as_qemu_does_and_comes_with_its_descriptor() -> None:
    async with served() as it:
        small = await it.raw.call(Command.DEVICE_GET_REGION_INFO, struct.pack("<IIIIQQ", 32, 0, 1, 0, 0, 0))
        assert len(small.payload) == 32
        assert small.fds == []
        needed = struct.unpack_from("<I", small.payload)[0]
        assert needed == 80
        whole = await it.raw.call(Command.DEVICE_GET_REGION_INFO, struct.pack("<IIIIQQ", needed, 0, 1, 0, 0, 0))
        assert len(whole.payload) == 80
        assert os.fstat(whole.fds[0].fileno()).st_ino == os.fstat(it.device.file.fileno()).st_ino
        close_all(whole.fds)


@pytest.mark.parametrize(
    ("command", "payload"),
    [
        (Command.DEVICE_GET_INFO, struct.pack("<III", 16, 0, 0)),
        (Command.DEVICE_GET_INFO, struct.pack("<IIII", 15, 0, 0, 0)),
        (Command.DEVICE_GET_REGION_INFO, struct.pack("<IIIIQ", 32, 0, 0, 0, 0)),
        (Command.DEVICE_GET_REGION_INFO, struct.pack("<IIIIQQ", 31, 0, 0, 0, 0, 0)),
        (Command.DEVICE_GET_REGION_INFO, struct.pack("<IIIIQQ", 32, 0, 4, 0, 0, 0)),
        (Command.DEVICE_GET_IRQ_INFO, struct.pack("<IIII", 15, 0, 0, 0)),
        (Command.DEVICE_GET_IRQ_INFO, struct.pack("<IIII", 16, 0, 2, 0)),
        (Command.DEVICE_RESET, b"x"),
        (Command.VERSION, encode_version(0, 0, {})),
        (Command.DMA_READ, struct.pack("<QQ", 0, 1)),
        (Command.DMA_WRITE, struct.pack("<QQ", 0, 0)),
        (Command.REGION_READ, access(0, 250, 7)),
        (Command.REGION_READ, access(0, 1 << 63, 4)),
        (Command.REGION_READ, access(4, 0, 4)),
        (Command.REGION_READ, access(3, 0, 1)),
        (Command.REGION_READ, access(0, (1 << 64) - 2, 4)),
        (Command.REGION_READ, access(0, 0, 4) + b"x"),
        (Command.REGION_WRITE, access(0, 0, 4) + b"abc"),
        (Command.REGION_WRITE, access(0, 254, 4) + b"abcd"),
        (Command.REGION_WRITE, b"short"),
        (Command.REGION_WRITE_MULTI, struct.pack("<Q", 2) + bytes(24)),
        (Command.DMA_MAP, dma_map(0, 4095)),
        (Command.DMA_MAP, dma_map(0, 4096, 8)),
        (Command.DMA_MAP, b""),
        (Command.DMA_UNMAP, struct.pack("<IIQQ", 23, 0, 0, 4096)),
        (Command.DEVICE_SET_IRQS, struct.pack("<IIIII", 20, 33, 0, 0, 5)),
        (Command.DEVICE_SET_IRQS, struct.pack("<IIIII", 20, 33, 0, 1 << 31, 1 << 31)),
        (Command.DEVICE_SET_IRQS, struct.pack("<IIIII", 20, 33, 2, 0, 1)),
        (Command.DEVICE_SET_IRQS, struct.pack("<IIIII", 20, 9, 0, 0, 1)),  # type 0 is not maskable
        (Command.DEVICE_SET_IRQS, struct.pack("<IIIII", 20, 36, 1, 0, 1)),  # type 1 takes no eventfds
        (Command.DEVICE_SET_IRQS, struct.pack("<IIIII", 20, 7, 0, 0, 1)),
    ],
)
async def test_what_cannot_be_is_answered_einval_and_the_connection_goes_on(command: Command, payload: bytes) -> None:
    async with served() as it:
        before = list(it.device.log)
        assert await it.raw.refused(command, payload) == errno.EINVAL
        assert it.device.log == before
        assert (await it.raw.call(Command.DEVICE_RESET)).error == 0
        assert it.stats.errors == 1


@pytest.mark.parametrize(
    ("command", "payload", "number"),
    [
        (Command.DEVICE_GET_REGION_IO_FDS, struct.pack("<IIII", 64, 0, 0, 0), errno.ENOTSUP),
        (Command.DIRTY_PAGES, bytes(8), errno.ENOTSUP),
        (16, b"", errno.ENOSYS),
        (0, b"", errno.ENOSYS),
        (0xFFFF, b"", errno.ENOSYS),
        (Command.REGION_READ, access(0, 0, (1 << 20) + 1), errno.E2BIG),
        (Command.REGION_WRITE, access(2, 0, 1) + b"x", errno.EPERM),
        (Command.REGION_WRITE, access(0, 0, 4) + b"EBSY", errno.EBUSY),
        (Command.REGION_READ, access(2, 0, 1), errno.EIO),  # a bug in the device
        (Command.DMA_MAP, dma_map(0xBAD000), errno.EPERM),
        (Command.DMA_UNMAP, struct.pack("<IIQQ", 24, 1, 0, 4096), errno.ENOTSUP),
    ],
)
async def test_each_refusal_has_its_errno(command: int, payload: bytes, number: int) -> None:
    async with served() as it:
        assert await it.raw.refused(command, payload) == number
        assert (await it.raw.call(Command.DEVICE_RESET)).error == 0


async def test_an_unmap_ends_every_map_inside_its_range_and_cuts_none() -> None:
    async with served() as it:
        for address in (0x1000, 0x2000, 0x4000):
            await it.raw.call(Command.DMA_MAP, dma_map(address))
        await it.raw.call(Command.DMA_MAP, dma_map(0x8000, 0x2000))
        for address, size in ((0, 0x9000), (0x9000, 0x1000), (0x8000, 0x1000), (0x1000, 0)):
            assert await it.raw.refused(Command.DMA_UNMAP, struct.pack("<IIQQ", 24, 0, address, size)) == errno.EINVAL
        assert len(it.connection.dma_maps) == 4
        whole = await it.raw.call(Command.DMA_UNMAP, struct.pack("<IIQQ", 24, 0, 0, 0x8000))
        assert bytes(whole.payload) == struct.pack("<IIQQ", 24, 0, 0, 0x3000)
        assert [entry.address for entry in it.connection.dma_maps] == [0x8000]


async def test_others_run_while_one_unmap_ends_very_many_maps() -> None:
    async with served() as it:
        count = 20_000
        for number in range(count):
            it.connection.dma_maps.add(number * 4096, 4096, None)
        done = trio.Event()
        turns = 0

        async def turn() -> None:
            nonlocal turns
            while not done.is_set():
                turns += 1
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(turn)
            before = turns
            answer = await it.raw.call(Command.DMA_UNMAP, struct.pack("<IIQQ", 24, 0, 0, count * 4096))
            assert bytes(answer.payload) == struct.pack("<IIQQ", 24, 0, 0, count * 4096)
            assert turns - before > 10
            done.set()
        assert len(it.connection.dma_maps) == 0
        assert it.device.log.count(("dma_unmap", 4096, 4096)) == 1


@pytest.mark.parametrize("flags", [0x2, 0x20, 0x40, 0x1000_0000])
async def test_a_command_with_flags_that_mean_nothing_is_refused(flags: int) -> None:
    async with served() as it:
        await it.raw.send(struct.pack("<HHIII", 9, Command.DEVICE_RESET, 16, flags, 0))
        reply = await it.raw.receive()
        assert reply is not None
        assert (reply.id, reply.flags, reply.error) == (9, 0x21, errno.EINVAL)
        assert ("reset",) not in it.device.log


@pytest.mark.parametrize("command", [Command.REGION_READ, Command.DEVICE_RESET, Command.DMA_UNMAP])
async def test_descriptors_where_none_belong_are_refused_and_closed(command: Command) -> None:
    async with served() as it:
        read, write = os.pipe()
        with Fd(read), Fd(write) as end:
            assert await it.raw.refused(command, b"", [end]) == errno.EINVAL
            end.close()
            assert os.read(read, 1) == b""


# Access


async def test_reads_and_writes_reach_the_device_and_are_confirmed() -> None:
    async with served() as it:
        reply = await it.raw.call(Command.REGION_WRITE, access(0, 16, 4) + b"data")
        assert bytes(reply.payload) == access(0, 16, 4)
        reply = await it.raw.call(Command.REGION_READ, access(0, 14, 8))
        assert bytes(reply.payload) == access(0, 14, 8) + b"\0\0data\0\0"


async def test_an_access_of_no_bytes_does_nothing() -> None:
    async with served() as it:
        reply = await it.raw.call(Command.REGION_READ, access(0, 256, 0))
        assert bytes(reply.payload) == access(0, 256, 0)
        reply = await it.raw.call(Command.REGION_WRITE, access(0, 0, 0))
        assert reply.error == 0


async def test_a_posted_write_has_no_reply_even_when_it_is_refused() -> None:
    async with served() as it:
        for region in (0, 99):
            await it.raw.send(wire.encode(1, Command.REGION_WRITE, access(region, 0, 2) + b"ok", no_reply=True))
        reply = await it.raw.call(Command.REGION_READ, access(0, 0, 2))  # asserts that this is the next reply
        assert reply.payload[16:] == b"ok"
        assert it.stats.errors == 1


async def test_several_writes_in_one_message_are_made_in_order() -> None:
    async with served() as it:
        data = payloads.encode_region_write_multi([RegionWrite(0, i, bytes([i])) for i in range(40)])
        reply = await it.raw.call(Command.REGION_WRITE_MULTI, data)
        assert bytes(reply.payload) == struct.pack("<Q", 40)
        assert it.device.memory[:40] == bytes(range(40))


async def test_write_multi_must_have_been_negotiated() -> None:
    async with served(limits=Limits(write_multiple=False)) as it:
        assert await it.raw.refused(Command.REGION_WRITE_MULTI, struct.pack("<Q", 0)) == errno.ENOTSUP


async def test_a_message_in_pieces_and_messages_in_one_piece_are_served_in_order() -> None:
    async with served() as it:
        one = wire.encode(1, Command.REGION_WRITE, access(0, 0, 3) + b"one")
        two = wire.encode(2, Command.REGION_READ, access(0, 0, 3))
        stream = one + two + two + one + two
        for start, end in ((0, 5), (5, 17), (17, 60), (60, len(stream))):
            await it.raw.send(stream[start:end])
            await trio.testing.wait_all_tasks_blocked()
        replies = [await it.raw.receive() for _ in range(5)]
        assert [reply.id for reply in replies if reply is not None] == [1, 2, 2, 1, 2]


async def test_a_message_longer_than_the_limit_is_answered_and_ends_the_connection() -> None:
    async with served() as it:
        await it.raw.send(struct.pack("<HHIII", 3, Command.REGION_WRITE, 1 << 30, 0, 0))
        reply = await it.raw.receive()
        assert reply is not None
        assert (reply.id, reply.error) == (3, errno.EMSGSIZE)
        assert await it.raw.receive() is None


async def test_the_longest_write_goes_through() -> None:
    async with served() as it:
        with trio.fail_after(10):
            size = 1 << 20
            assert await it.raw.refused(Command.REGION_WRITE, access(0, 0, size) + bytes(size)) == errno.EINVAL


async def test_a_client_that_leaves_in_the_middle_of_a_message_is_no_trouble() -> None:
    async with served() as it:
        await it.raw.send(wire.encode(1, Command.REGION_READ, access(0, 0, 4))[:20])


# Interrupts and DMA maps


async def test_eventfds_reach_the_device_and_none_takes_them_away() -> None:
    async with served() as it:
        request = SetIrqs(data=IrqData.EVENTFD, action=IrqAction.TRIGGER, index=0, start=1, count=2)
        with eventfd() as one, eventfd() as two:
            assert (await it.raw.call(Command.DEVICE_SET_IRQS, request.pack(), [one, two])).error == 0
            os.eventfd_write(it.device.fds[1].fileno(), 5)
            assert os.eventfd_read(two.fileno()) == 5
        assert (await it.raw.call(Command.DEVICE_SET_IRQS, request.pack())).error == 0
        assert it.device.log[-2:] == [("set_irqs", request, 2), ("set_irqs", request, 0)]


async def test_more_descriptors_than_agreed_are_refused_and_closed() -> None:
    async with served(limits=Limits(max_msg_fds=2)) as it:
        request = SetIrqs(data=IrqData.EVENTFD, action=IrqAction.TRIGGER, index=0, count=4)
        read, write = os.pipe()
        with Fd(read), Fd(write) as end:
            assert await it.raw.refused(Command.DEVICE_SET_IRQS, request.pack(), [end] * 4) == errno.EMFILE
            end.close()
            assert os.read(read, 1) == b""
        assert it.stats.descriptors_lost == 1
        assert (await it.raw.call(Command.DEVICE_RESET)).error == 0


async def test_dma_maps_are_kept_apart_and_unmapped_one_or_all() -> None:
    async with served() as it:
        with Fd(os.memfd_create("ram")) as ram:
            assert (await it.raw.call(Command.DMA_MAP, dma_map(0x1000), [ram])).payload == b""
            assert await it.raw.refused(Command.DMA_MAP, dma_map(0, 0x2000)) == errno.EEXIST
            assert await it.raw.refused(Command.DMA_MAP, dma_map(0x8000), [ram, ram]) == errno.EINVAL
        for address in (0x4000, 0x6000):
            await it.raw.call(Command.DMA_MAP, dma_map(address))
        unmap = struct.pack("<IIQQ", 24, 0, 0x1000, 4096)
        assert bytes((await it.raw.call(Command.DMA_UNMAP, unmap)).payload) == unmap
        nothing = struct.pack("<IIQQ", 24, 0, 0x1000, 0)
        assert bytes((await it.raw.call(Command.DMA_UNMAP, unmap)).payload) == nothing
        await it.raw.call(Command.DMA_UNMAP, struct.pack("<IIQQ", 24, 2, 0, 0))
        assert it.device.log[-3:] == [("dma_unmap", a, 4096) for a in (0x1000, 0x6000, 0x4000)]
        assert len(it.connection.dma_maps) == 0


async def test_the_number_of_dma_maps_is_bounded() -> None:
    async with served(limits=Limits(max_dma_maps=1)) as it:
        await it.raw.call(Command.DMA_MAP, dma_map(0))
        assert await it.raw.refused(Command.DMA_MAP, dma_map(4096)) == errno.ENOSPC

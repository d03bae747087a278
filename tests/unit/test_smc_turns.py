# SPDX-License-Identifier: Apache-2.0
"""When tasks that move bytes over shared memory yield, and whether they spin while others want to run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio
from smc_stream_rig import SmcRig, bounded, leak_checked

from ism.smc.connection import Connection
from ism.smc.trio_wait import Turns


@pytest.fixture
def rig() -> Iterator[SmcRig]:
    with leak_checked() as made:
        yield made


async def take(turns: Turns, count: int = 1) -> None:
    for _ in range(count):
        left = turns.leave()
        await trio.lowlevel.checkpoint()
        turns.back(left)


@bounded
async def test_a_task_that_moves_bytes_by_itself_is_alone() -> None:
    turns, bystander = Turns(), Turns()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take, bystander)
    await take(turns)
    await take(turns)
    assert turns.alone


@bounded
async def test_tasks_that_take_turns_are_not_alone() -> None:
    both = Turns(), Turns()
    async with trio.open_nursery() as nursery:
        for turns in both:
            nursery.start_soon(take, turns, 10)
    assert not all(turns.alone for turns in both)
    await take(both[0])
    await take(both[0])
    assert both[0].alone, "the other one is done"


@bounded
async def test_a_task_that_sends_is_company_for_one_that_receives() -> None:
    receiver, sender, found = Turns(), Turns(), []

    async def send() -> None:
        for _ in range(10):
            await sender.over()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        for _ in range(10):
            await take(receiver)
            found.append(receiver.alone)
    assert False in found


@bounded
async def test_others_that_moved_bytes_while_a_task_slept_are_company() -> None:
    turns = Turns()
    turns.amortised = True
    left = turns.leave()
    await take(Turns())
    turns.back(left)
    assert not turns.alone
    turns.back(turns.leave())
    assert turns.alone


def test_each_run_is_a_crowd_of_its_own() -> None:
    async def first() -> None:
        turns = Turns()
        left = turns.leave()
        await trio.to_thread.run_sync(trio.run, take, Turns(), 3)
        turns.back(left)
        assert turns.alone

    trio.run(first)


class Waits:
    """Records whether receives were allowed to spin."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allowed: list[bool] = []
        plain = Connection.recv

        def recv(connection: Connection, max_bytes: int, wait: bool = True) -> bytes | None:
            self.allowed.append(wait)
            return plain(connection, max_bytes, wait)

        monkeypatch.setattr(Connection, "recv", recv)


@bounded
async def test_a_lone_receive_spins_and_one_in_a_crowd_sleeps(rig: SmcRig, monkeypatch: pytest.MonkeyPatch) -> None:
    client, server = await rig.pair()
    async with client, server:
        await client.send_all(b"1")
        await server.receive_some()
        waits = Waits(monkeypatch)
        await client.send_all(b"2")
        assert await server.receive_some() == b"2"
        assert waits.allowed == [True]
        waits.allowed.clear()

        async def echo() -> None:
            for _ in range(10):
                await client.send_all(b"x")
                await client.receive_some()

        async def answer() -> None:
            for _ in range(10):
                await server.receive_some()
                await server.send_all(b"y")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(echo)
            nursery.start_soon(answer)
        assert False in waits.allowed


@bounded
async def test_a_descriptor_is_not_given_away_while_a_receive_yields(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with client, server:
        await client.send_all(b"there")
        channel = server._channel
        channel._beginning += 1  # as another task's `yield_to_receive` has it meanwhile
        with pytest.raises(trio.BusyResourceError):
            server.socket.dup()  # type: ignore[attr-defined]
        channel._beginning -= 1
        assert await server.receive_some() == b"there"
        assert channel._beginning == 0


@bounded
async def test_a_stream_that_is_closed_while_a_receive_yields_is_closed_for_it(rig: SmcRig) -> None:
    client, server = await rig.pair()

    class Closing(Turns):
        """Another task closes the stream during the yield."""

        def back(self, left: int) -> None:
            super().back(left)
            server.socket.close()

    async with client:
        await client.send_all(b"there")
        assert await server.receive_some(1) == b"t"
        server._channel.receive_turns = Closing()
        with pytest.raises(trio.ClosedResourceError):
            await server.receive_some()
    await server.aclose()

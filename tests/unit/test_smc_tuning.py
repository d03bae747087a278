# SPDX-License-Identifier: Apache-2.0
"""Buffers that tune themselves: they grow under load and shrink when idle, and no byte is lost meanwhile."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from smc_stream_rig import SmcRig, bounded, open_descriptors

from ism.manager.quota import Quota
from ism.shm.header import Header
from ism.smc import SmcStream, tuning
from ism.virtio.ism_spec import Permission

HOME = 65536 - 4096
BLOCK = bytes(range(256)) * 1024


@pytest.fixture
def rig(request: pytest.FixtureRequest) -> Iterator[SmcRig]:
    before = open_descriptors()
    rig = SmcRig(one_device=getattr(request, "param", False))
    rig.buffer_size = None  # type: ignore[assignment] # what a program gets that says nothing
    yield rig
    rig.close()
    assert rig.regions == 0
    assert open_descriptors() == before


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idleness is found within milliseconds."""
    monkeypatch.setattr(tuning, "TICK_S", 0.002)
    monkeypatch.setattr(tuning, "IDLE_TICKS", 2)


async def eventually(condition: Any) -> None:
    while not condition():  # noqa: ASYNC110 (a thread of the library brings it about)
        await trio.sleep(0.002)


async def push(sender: SmcStream, receiver: SmcStream, total: int, *, most: int = 1 << 20) -> None:
    """Send so many bytes, receive them, compare checksums."""
    sent, received = hashlib.sha256(), hashlib.sha256()

    async def send() -> None:
        left = total
        while left:
            block = BLOCK[: min(left, random.randint(1, len(BLOCK)))]
            await sender.send_all(block)
            sent.update(block)
            left -= len(block)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        left = total
        while left:
            data = await receiver.receive_some(min(left, random.randint(1, most)))
            assert data
            received.update(data)
            left -= len(data)
    assert sent.digest() == received.digest()


async def push_until(sender: SmcStream, receiver: SmcStream, condition: Any) -> None:
    while not condition():
        await push(sender, receiver, 1 << 20)


@bounded
@pytest.mark.parametrize("rig", [False, True], indirect=True, ids=["two devices", "one device"])
async def test_a_busy_direction_grows_and_goes_home_when_it_idles(rig: SmcRig, fast: None) -> None:
    client, server = await rig.pair()
    async with client, server:
        at_first = rig.regions
        assert client.smc_info().receive_buffer == server.smc_info().receive_buffer == HOME
        await push_until(client, server, lambda: server.smc_info().receive_buffer > HOME)
        assert client.smc_info().send_buffer > HOME
        assert client.smc_info().receive_buffer == HOME, "the other direction is quiet"
        await eventually(lambda: client.smc_info().send_buffer == server.smc_info().receive_buffer == HOME)
        await eventually(lambda: rig.regions == at_first)
        await push_until(client, server, lambda: server.smc_info().receive_buffer > HOME)
        await push(server, client, 1 << 20)


@bounded
async def test_small_messages_that_are_answered_do_not_grow_anything(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with client, server:
        at_first = rig.regions
        for _ in range(2000):
            await client.send_all(b"q" * 200)
            assert len(await server.receive_some()) == 200
            await server.send_all(b"a" * 200)
            assert len(await client.receive_some()) == 200
        assert rig.regions == at_first


@bounded
async def test_a_buffer_whose_size_was_asked_for_stays_as_it_is(rig: SmcRig) -> None:
    rig.buffer_size = 65536
    client, server = await rig.pair()
    async with client, server:
        await push(client, server, 8 << 20)
        assert server.smc_info().receive_buffer == client.smc_info().send_buffer == HOME


@bounded
async def test_growth_ends_at_the_limit(rig: SmcRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISM_SMC_BUFFER_LIMIT", "1M")
    client, server = await rig.pair()
    async with client, server:
        await push_until(client, server, lambda: server.smc_info().receive_buffer > HOME)
        await push(client, server, 32 << 20)
        assert server.smc_info().receive_buffer == 1 << 20


@bounded
async def test_no_limit_means_no_growth(rig: SmcRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISM_SMC_BUFFER_LIMIT", "0")
    client, server = await rig.pair()
    async with client, server:
        await push(client, server, 8 << 20)
        assert server.smc_info().receive_buffer == HOME


@bounded
async def test_a_stream_goes_on_where_the_device_refuses_a_larger_buffer(rig: SmcRig, fast: None) -> None:
    account = rig.fabric.registry.devices[rig.server_device.devid].account
    client, server = await rig.pair()
    generous, account.quota = account.quota, Quota(bytes=1 << 20, regions=100, attachments=100)
    async with client, server:
        await push(client, server, 8 << 20)
        assert server.smc_info().receive_buffer == HOME
        account.quota = generous
        await push_until(client, server, lambda: server.smc_info().receive_buffer > HOME)


@bounded
async def test_a_stream_goes_on_where_the_sender_may_not_attach_to_the_larger_buffer(rig: SmcRig) -> None:
    client, server = await rig.pair()
    account = rig.fabric.registry.devices[rig.client_device.devid].account
    account.quota = Quota(bytes=1 << 30, regions=100, attachments=account.attachments)
    async with client, server:
        await push(client, server, 8 << 20)
        assert client.smc_info().send_buffer == HOME


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody offers anything but the test."""
    monkeypatch.setenv("ISM_SMC_BUFFER_LIMIT", "0")


def offer(end: SmcStream, token: int, length: int, number: int = 1) -> None:
    """Write an offer as a hostile `end` would, which owns what the other end sends into."""
    assert end.connection is not None
    words = end.connection.tx.view  # type: ignore[union-attr]
    for name, value in (("next_token", token), ("next_bytes", length), ("next_offer", number)):
        at = Header.offset_of(name)
        words[at : at + 8] = value.to_bytes(8, "little")


@bounded
async def test_a_peer_that_offers_the_region_of_another_connection_is_not_believed(rig: SmcRig, quiet: None) -> None:
    client, server = await rig.pair()
    other_client, other_server = await rig.pair()
    async with client, server, other_client, other_server:
        assert other_client.connection is not None
        offer(server, other_client.connection.tx.token, 65536)  # type: ignore[union-attr]
        await push(client, server, 1 << 20)
        assert client.smc_info().send_buffer == HOME
        await push(other_client, other_server, 1 << 20)


@bounded
@pytest.mark.parametrize("token", [0, 0xDEAD, 2**64 - 1])
@pytest.mark.parametrize("length", [0, 1, 65536, 2**63, 2**64 - 1])
async def test_an_offer_of_nothing_is_ignored(rig: SmcRig, quiet: None, token: int, length: int) -> None:
    client, server = await rig.pair()
    async with client, server:
        offer(server, token, length, 2**64 - 1)
        await push(client, server, 1 << 20)
        assert client.smc_info().send_buffer == HOME


@bounded
async def test_a_region_that_is_not_as_long_as_was_said_is_not_used(rig: SmcRig, quiet: None) -> None:
    client, server = await rig.pair()
    region = rig.server_device.alloc(65536, interrupt=False, grants=[(Permission(7), rig.client_device.devid)])
    async with client, server:
        offer(server, region.token, 1 << 20)
        await push(client, server, 1 << 20)
        assert client.smc_info().send_buffer == HOME
    region.close()


@bounded
async def test_what_was_sent_through_a_larger_buffer_is_read_after_the_sender_has_closed(rig: SmcRig) -> None:
    client, server = await rig.pair()
    async with server:
        async with client:
            await push_until(client, server, lambda: client.smc_info().send_buffer > HOME)
            await client.send_all(BLOCK * 3)
        got = bytearray()
        while data := await server.receive_some():
            got += data
        assert got == BLOCK * 3


@bounded
@pytest.mark.parametrize("seed", range(6))
async def test_nothing_is_lost_while_buffers_change_all_the_time(
    rig: SmcRig, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random.seed(seed)
    monkeypatch.setattr(tuning, "TICK_S", 0.0002)
    monkeypatch.setattr(tuning, "IDLE_TICKS", 1)
    client, server = await rig.pair()
    sizes = set()
    async with client, server:

        async def direction(sender: SmcStream, receiver: SmcStream) -> None:
            for _ in range(40):
                await push(sender, receiver, random.choice([1, 1000, 300_000, 3_000_000]))
                sizes.add(receiver.smc_info().receive_buffer)
                if random.random() < 0.5:
                    await trio.sleep(random.choice([0, 0.0005, 0.003]))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(direction, client, server)
            nursery.start_soon(direction, server, client)
    assert len(sizes) > 1


@bounded
async def test_a_device_that_is_closed_under_a_grown_connection_leaves_nothing(rig: SmcRig) -> None:
    client, server = await rig.pair()
    await push_until(client, server, lambda: client.smc_info().send_buffer > HOME)
    rig.server_device.close()
    await client.aclose()
    await server.aclose()

# SPDX-License-Identifier: Apache-2.0
"""What two live streams say on their TCP connection, recorded by a relay between them and judged by tshark."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from pcap import ERRORS, TSHARK, Direction, dissect, write_pcap

from ism.driver import Device
from ism.smc import SmcStream, open_tcp_listeners, open_tcp_stream
from ism.smc.connection import Connection
from ism.smc.identity import DEFAULT_CHID, DEFAULT_EID
from ism.testing import Fabric
from ism.virtio.ism_spec import IsmFeature

pytestmark = pytest.mark.skipif(TSHARK is None, reason="tshark is not installed (Debian package tshark)")

LIMIT_S = 60
FEATURES = (IsmFeature.EVENT_IRQ, IsmFeature.EVENT_VQ)
"""No directory: it would tell that the relay is between the two."""
PAYLOAD = b"application bytes that must not be seen on TCP"


@pytest.fixture
def devices() -> Iterator[tuple[Device, Device]]:
    fabric = Fabric(gid=0x1122334455667788)
    with Device(fabric.plug(features=FEATURES)) as client, Device(fabric.plug(features=FEATURES)) as server:
        yield client, server


class Relay:
    """A TCP proxy for one connection. Attributes: `pieces` (who sent what, in order)."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.pieces: list[tuple[Direction, bytes]] = []

    async def run(self, *, task_status: trio.TaskStatus[int]) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with listener:
            task_status.started(listener.socket.getsockname()[1])
            near = await listener.accept()
        far = await trio.open_tcp_stream("127.0.0.1", self._port)
        async with near, far, trio.open_nursery() as nursery:
            nursery.start_soon(self._copy, "client", near, far)
            nursery.start_soon(self._copy, "server", far, near)

    async def _copy(self, sender: Direction, source: trio.SocketStream, target: trio.SocketStream) -> None:
        try:
            async for data in source:
                self.pieces.append((sender, bytes(data)))
                await target.send_all(data)
            await target.send_eof()
        except trio.BrokenResourceError:
            pass  # the other half of the connection is gone


async def record(client_device: Device, server_device: Device, sizes: tuple[int, int]) -> tuple[Relay, Connection]:
    """Run a connection through a relay; returns what it recorded, and the client's connection (closed)."""
    (listener,) = await open_tcp_listeners(
        0, host="127.0.0.1", smc="require", device=server_device, buffer_size=sizes[1]
    )
    relay = Relay(listener.socket.getsockname()[1])
    async with trio.open_nursery() as nursery, listener:
        port = await nursery.start(relay.run)
        client = await open_tcp_stream("127.0.0.1", port, smc="require", device=client_device, buffer_size=sizes[0])
        server: SmcStream = await listener.accept()
        async with client, server:
            async with trio.open_nursery() as both:
                both.start_soon(client.send_all, PAYLOAD)
                received = b""
                while len(received) < len(PAYLOAD):
                    received += await server.receive_some()
            assert received == PAYLOAD
            ours, theirs = client.connection, server.connection
            assert ours is not None
            assert theirs is not None
            assert (ours.peer.token, theirs.peer.token) == (theirs.rx.token, ours.rx.token)
            assert (ours.tx.token, theirs.tx.token) == (theirs.rx.token, ours.rx.token)
    return relay, ours


def numbers(row: dict[str, list[str]], field: str) -> list[int]:
    return [int(value, 0) for value in row[field]]


@pytest.mark.parametrize(("sizes", "codes"), [((65536, 1 << 20), (2, 6)), ((1 << 20, 100_000), (6, 3))])
async def test_a_live_handshake_is_three_clean_messages_that_name_what_the_connection_uses(
    devices: tuple[Device, Device], tmp_path: Path, sizes: tuple[int, int], codes: tuple[int, int]
) -> None:
    with trio.fail_after(LIMIT_S):
        relay, connection = await record(*devices, sizes)
    client, server = devices
    path = tmp_path / "live.pcap"
    write_pcap(path, relay.pieces)
    assert dissect(path, ["frame.number", "_ws.expert.message"], ERRORS) == []
    kinds = [int(kind) for row in dissect(path, ["smc.clc_msg"], "smc") for kind in row["smc.clc_msg"]]
    assert kinds == [1, 2, 3]
    assert all(PAYLOAD not in data for _, data in relay.pieces)
    assert [sum(len(data) for who, data in relay.pieces if who == side) for side in ("client", "server")] == [
        224 + 130 + 1,
        130 + 1,
    ]

    fields = ["smc.proposal.ism.gid", "smc.proposal.smc.chid", "smc.proposal.eid"]
    (row,) = dissect(path, fields, "smc.clc_msg == 1")
    assert numbers(row, fields[0]) == [0, client.gid, client.devid]
    assert numbers(row, fields[1])[1:] == [DEFAULT_CHID] * 2
    assert [eid.strip() for eid in row[fields[2]]] == [DEFAULT_EID]
    for kind, number, role, device, token, code in (
        ("accept", 2, "server", server, connection.tx.token, codes[1]),
        ("confirm", 3, "client", client, connection.rx.token, codes[0]),
    ):
        names = [f"sender.{role}.ism.gid", "dmb.token", "dmbe.buffer.size", "smc.chid", f"{role}.linkid"]
        fields = [f"smc.{kind}.{name}" for name in [*names, "eid", "peer.host.name"]] + ["smc.reserved"]
        (row,) = dissect(path, fields, f"smc.clc_msg == {number}")
        values = [numbers(row, field) for field in fields[:5]]
        assert values == [[device.gid], [token], [code], [DEFAULT_CHID], [os.getpid()]]
        assert row[fields[5]][0].strip() == DEFAULT_EID
        assert row[fields[6]][0].strip() == socket.gethostname()[:32]
        assert f"{device.devid:016x}" in [value.replace(":", "") for value in row["smc.reserved"]]
    assert (connection.peer.gid, connection.peer.devid) == (server.gid, server.devid)
    assert connection.peer.host == socket.gethostname()[:32]


async def test_a_live_decline_is_clean_and_says_why(devices: tuple[Device, Device], tmp_path: Path) -> None:
    other = Fabric(gid=0x99)
    with Device(other.plug(features=FEATURES)) as stranger, trio.fail_after(LIMIT_S):
        (listener,) = await open_tcp_listeners(0, host="127.0.0.1", smc="require", device=stranger)
        relay = Relay(listener.socket.getsockname()[1])
        async with trio.open_nursery() as nursery, listener:
            port = await nursery.start(relay.run)
            client = await open_tcp_stream("127.0.0.1", port, smc="require", device=devices[0])
            server = await listener.accept()

            async def expect_broken(stream: SmcStream) -> None:
                with pytest.raises(trio.BrokenResourceError, match="same domain"):
                    await stream.receive_some()

            async with client, server, trio.open_nursery() as both:
                both.start_soon(expect_broken, client)
                both.start_soon(expect_broken, server)
    path = tmp_path / "declined.pcap"
    write_pcap(path, relay.pieces)
    assert dissect(path, ["frame.number", "_ws.expert.message"], ERRORS) == []
    kinds = [int(kind) for row in dissect(path, ["smc.clc_msg"], "smc") for kind in row["smc.clc_msg"]]
    assert kinds == [1, 4, 4]

# SPDX-License-Identifier: Apache-2.0
"""Who waits for room beside the driver's thread: a doorbell swallowed with an earlier one is told all the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from socket_pairs import LIMIT_S, SmcPairs, smc_pairs


@pytest.fixture
def pairs(tmp_path: Path) -> Iterator[SmcPairs]:
    with smc_pairs(tmp_path) as made:
        yield made


def test_room_that_is_rung_for_while_an_earlier_doorbell_is_handled_is_told(pairs: SmcPairs) -> None:
    client, server = pairs.make()
    with client, server:
        client.setblocking(False)
        client.fileno()  # from here on the driver's thread takes the doorbells
        channel: Any = client._channel
        connection = channel.connection
        told = threading.Event()
        drain, begun = connection.drain, threading.Event()

        def drain_late() -> None:
            if not begun.is_set():
                begun.set()
                while channel.send_now(b"x" * 65536):
                    pass
                assert channel.on_room(told.set)
                server.recv(1 << 20)  # rings for the sleep that was just announced, and the ring is reset below
            drain()

        connection.drain = drain_late
        try:
            connection.rx.wake()  # as when the peer has rung for something else
            assert told.wait(LIMIT_S)
        finally:
            channel.forget_room(told.set)
            del connection.drain

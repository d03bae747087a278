# SPDX-License-Identifier: Apache-2.0
"""Streams without a device manager, with one that is stopped, and with one that comes back."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import pytest
import trio
import trio.testing
from conversations import Talk, agree, client_first, finished, in_any_order
from smc_stream_rig import SmcRig, bounded, leak_checked, port_of, receive_all, until

import ism.smc
from ism.driver import Device
from ism.errors import TransportError
from ism.smc import default, info, link, trio_wait
from ism.smc.diagnosis import Diagnosis

LOOPBACK = "127.0.0.1"


@pytest.fixture
def rig() -> Iterator[SmcRig]:
    with leak_checked(directory=True) as made:
        yield made


@pytest.fixture(autouse=True)
def fallbacks(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Counters of fallbacks, fresh."""
    monkeypatch.setattr(info, "_fallbacks", counted := type(info._fallbacks)())
    monkeypatch.setattr(info, "_logged", set())
    return counted


# No manager, or one that is stopped ------------------------------------------------------------------------------


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """There is no default device; lends the list of attempts to open one."""
    attempts = []

    def refuse() -> Device:
        attempts.append(len(attempts))
        raise TransportError("there is no manager")

    monkeypatch.setattr(default, "open_device", refuse)
    monkeypatch.setattr(default, "_device", None)
    default.close_default()
    yield attempts
    default.close_default()


@in_any_order
@bounded
async def test_without_a_device_it_is_tcp_and_said_once(
    no_device: list[int], talk: Talk, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "ism.smc"):
        (listener,) = await ism.smc.open_tcp_listeners(0, host=LOOPBACK, smc="auto")
        async with listener:
            for _ in range(3):
                client = await ism.smc.open_tcp_stream(LOOPBACK, port_of(listener), smc="auto")
                server = await listener.accept()
                await finished(talk, client, server)
                assert agree(client, server) == "TCP"
                assert client.smc_info().code == server.smc_info().code == Diagnosis.NOSMCDDEV
                assert "there is no manager" in client.smc_info().reason
    assert len([one for one in caplog.records if "there is no manager" in one.getMessage()]) == 1
    assert len(no_device) == 1


@bounded
async def test_where_shared_memory_is_required_a_missing_device_is_an_error(no_device: list[int]) -> None:
    with pytest.raises(OSError, match="required"):
        await ism.smc.open_tcp_listeners(0, host=LOOPBACK, smc="require")
    (listener,) = await trio.open_tcp_listeners(0, host=LOOPBACK)
    async with listener:
        with pytest.raises(OSError, match="all attempts") as caught:
            await ism.smc.open_tcp_stream(LOOPBACK, listener.socket.getsockname()[1], smc="require")
        assert "required" in str(caught.value.__cause__.exceptions[0])  # type: ignore[union-attr]


@pytest.mark.parametrize("role", ["client", "server"])
@bounded
async def test_where_shared_memory_is_required_a_plain_peer_breaks_the_stream(rig: SmcRig, role: str) -> None:
    async def plain(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(b"GET / HTTP/1.0\r\n\r\n" + bytes(64))
            await receive_all(stream)

    if role == "client":
        (listener,) = await trio.open_tcp_listeners(0, host=LOOPBACK)
        async with listener:
            stream = await rig.connect(listener.socket.getsockname()[1], smc="require")
            other = await listener.accept()
    else:
        async with await rig.listen(smc="require") as smc_listener:
            other = await trio.open_tcp_stream(LOOPBACK, port_of(smc_listener))
            stream = await smc_listener.accept()
    async with stream, other, trio.open_nursery() as nursery:
        nursery.start_soon(plain, other)
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"x")
        assert stream.smc_info().mode == "broken"
        await stream.aclose()


@in_any_order
@pytest.mark.parametrize("stopped", ["client", "server"])
@bounded
async def test_a_manager_that_does_not_answer_holds_nobody_up_for_long(
    rig: SmcRig, talk: Talk, stopped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trio_wait, "COMMAND_WAIT_S", 0.02)
    monkeypatch.setattr(link, "RETRACT_WAIT_S", 0.02)
    device = rig.client_device if stopped == "client" else rig.server_device
    async with await rig.listen() as listener:
        device.transport.pause()  # type: ignore[attr-defined]
        client = await rig.connect(port_of(listener))
        server = await listener.accept()
        async with trio.open_nursery() as nursery:
            if stopped == "server":  # it cannot know before the manager has answered its claim

                async def resume() -> None:
                    await trio.sleep(0.1)
                    device.transport.resume()  # type: ignore[attr-defined]

                nursery.start_soon(resume)
            await finished(talk, client, server)
        device.transport.resume()  # type: ignore[attr-defined]
        assert agree(client, server) in ("TCP", "SMC")


@bounded
async def test_a_listener_whose_device_was_lost_is_found_again_with_the_next_one(
    rig: SmcRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[Device] = []

    def open_in_memory() -> Device:
        devices.append(rig.plug())
        return devices[-1]

    monkeypatch.setattr(default, "open_device", open_in_memory)
    monkeypatch.setattr(default, "_device", None)
    async with await rig.listen(device=None) as listener:
        devices[0].transport.lose("the manager was stopped")  # type: ignore[attr-defined]
        modes = []
        for _ in range(2):
            client = await rig.connect(port_of(listener))
            server = await listener.accept()
            await finished(client_first, client, server)
            modes.append(agree(client, server))
            await until(lambda: len(devices) == 2)
            await trio.testing.wait_all_tasks_blocked(0.05)
        assert modes == ["TCP", "SMC"]
    default.close_default()
    for device in devices:
        device.close()

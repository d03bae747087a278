# SPDX-License-Identifier: Apache-2.0
"""SMC streams between real processes and a real manager: kill -9 of either end, or of the manager, at each step.

The peer process runs this very file. Whatever dies, the survivor reads what was sent and is told how it ended, nothing
hangs, and the manager takes everything back.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from ism.driver import Device, open_device
from ism.errors import IsmError
from ism.manager.control import request
from ism.smc import SmcListener, SmcStream, default, open_tcp_listeners, open_tcp_stream
from ism.smc.handshake import identity_of
from ism.smc.handshake_machine import ClientHandshake, ServerHandshake
from ism.smc.trio_wait import default_device

pytestmark = pytest.mark.processes

LIMIT_S = 60
BUFFER = 65536
PATTERN = bytes(range(251)) * 4096
BYE = b"last words"


# Processes ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process(*command: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run a Python process; killed and reaped at the end, whatever happened."""
    path = os.pathsep.join(filter(None, sys.path))
    with subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    ) as started:
        try:
            yield started
        finally:
            started.kill()


async def said(started: subprocess.Popen[str]) -> str:
    """The next line that the process prints."""
    assert started.stdout is not None
    text = await trio.to_thread.run_sync(started.stdout.readline, abandon_on_cancel=True)
    assert text, "the process ended before it said anything"
    return text.strip()


async def ended(started: subprocess.Popen[str]) -> int:
    return await trio.to_thread.run_sync(started.wait, LIMIT_S)


class Host:
    """A manager in a process of its own, and this process's device of it. Attributes: `manager`, `device`, `name`."""

    def __init__(self, directory: Path, manager: subprocess.Popen[str]) -> None:
        self._control = directory / "control.sock"
        self.manager = manager
        self.name = f"vfio-user:{directory / 'device.sock'}"
        self.device: Device = self._when_it_runs()

    def _when_it_runs(self) -> Device:
        patience = time.monotonic() + LIMIT_S
        while True:
            try:
                return open_device(self.name)
            except IsmError:
                assert self.manager.poll() is None, "the manager ended"
                assert time.monotonic() < patience, "the manager does not serve"
                time.sleep(0.01)

    def totals(self) -> dict[str, int]:
        found: dict[str, int] = request(self._control, "status")["status"]["totals"]
        return found

    async def only_this_process_is_left(self) -> None:
        """The manager knows one device, this process's, and no region."""
        while True:
            found = await trio.to_thread.run_sync(self.totals)
            if found == {"devices": 1, "connected": 1, "regions": 0, "attachments": 0, "bytes": 0}:
                return
            await trio.sleep(0.01)

    def peer(self, role: str, *arguments: object) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
        return process(__file__, role, *map(str, arguments), ISM_DEVICE=self.name)

    async def listen(self) -> tuple[SmcListener, int]:
        (listener,) = await open_tcp_listeners(
            0, host="127.0.0.1", smc="require", device=self.device, buffer_size=BUFFER
        )
        return listener, listener.socket.getsockname()[1]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with process("-m", "ism", "manager", "--quiet", "--run-dir", str(tmp_path)) as manager:
        host = Host(tmp_path, manager)
        yield host
        host.device.close()


async def receive_exactly(stream: SmcStream, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = await stream.receive_some(count - len(data))
        assert part, f"the stream ended after {len(data)} of {count} bytes"
        data += part
    return bytes(data)


# Roles of the peer process --------------------------------------------------------------------------------------


def report(text: object) -> None:
    print(text, flush=True)


async def peer_connect_only(port: int) -> None:
    stream = await open_tcp_stream("127.0.0.1", port, smc="require")
    report("ready")
    await trio.sleep_forever()
    await stream.aclose()


async def peer_propose_only(port: int) -> None:
    device = await default_device()
    machine = ClientHandshake(identity_of(device))
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    await stream.send_all(machine.start())
    while machine.receive(await stream.receive_some(machine.bytes_wanted)) is None:
        pass
    report("ready")
    await trio.sleep_forever()


async def peer_read_the_offer_only() -> None:
    device = await default_device()
    machine = ServerHandshake(identity_of(device))
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    report(listener.socket.getsockname()[1])
    stream = await listener.accept()
    while machine.receive(await stream.receive_some(machine.bytes_wanted)) is None:
        pass
    report("ready")
    await trio.sleep_forever()


async def talking(port: int) -> SmcStream:
    stream = await open_tcp_stream("127.0.0.1", port, smc="require", buffer_size=BUFFER)
    await stream.send_all(b"hello")
    assert await receive_exactly(stream, 5) == b"hello"
    return stream


async def peer_idle(port: int) -> None:
    stream = await talking(port)
    await stream.send_all(BYE)
    report("ready")
    await trio.sleep_forever()


async def peer_send_for_ever(port: int) -> None:
    stream = await talking(port)
    report("ready")
    while True:
        await stream.send_all(PATTERN)


async def parked(call: Callable[[], Awaitable[object]]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        report("ready")


async def peer_park_writing(port: int) -> None:
    stream = await talking(port)
    await parked(lambda: stream.send_all(PATTERN))


async def peer_park_reading(port: int) -> None:
    stream = await talking(port)
    await stream.send_all(BYE)
    await parked(stream.receive_some)


async def peer_half_close(port: int) -> None:
    stream = await talking(port)
    await stream.send_all(BYE)
    await stream.send_eof()
    report("ready")
    await trio.sleep_forever()


async def peer_exit_without_closing(port: int) -> None:
    global kept
    kept = await talking(port)
    await kept.send_all(BYE)


async def peer_exit_with_unread_bytes(port: int) -> None:
    global kept
    kept = await talking(port)
    await kept.send_all(BYE)
    await kept.wait_send_all_might_not_block()
    assert kept.connection is not None
    while not kept.connection.endpoint.readable_bytes():  # noqa: ASYNC110 (the peer sets no event here)
        await trio.sleep(0.001)


async def peer_echo(port: int) -> None:
    async with await open_tcp_stream("127.0.0.1", port, smc="require", buffer_size=BUFFER) as stream:
        await stream.do_handshake()
        assert stream.connection is not None
        stream.connection.endpoint.max_spin_ns = 0
        async for data in stream:
            await stream.send_all(data)
    report("done")


async def peer_tell_mode(port: int) -> None:
    async with await open_tcp_stream("127.0.0.1", port, smc="auto") as stream:
        await stream.send_all(b"hello")
        assert await receive_exactly(stream, 5) == b"hello"
        report(stream.smc_info().mode)


kept: SmcStream


# Tests ----------------------------------------------------------------------------------------------------------


async def answer_hello(stream: SmcStream) -> None:
    assert await receive_exactly(stream, 5) == b"hello"
    await stream.send_all(b"hello")


async def expect_reset(stream: SmcStream) -> None:
    for _ in range(2):
        with pytest.raises(trio.BrokenResourceError) as caught:
            await stream.receive_some()
        assert isinstance(caught.value.__cause__, ConnectionResetError)
    with pytest.raises(trio.BrokenResourceError):
        await stream.send_all(b"x")


@contextlib.asynccontextmanager
async def killed(
    host: Host, role: str, *, talk: bool = True, before: Any = None, when: Callable[[], bool] = lambda: True
) -> Any:
    """Connect with a peer process, kill it when it says that it is ready, and lend the survivor's stream."""
    listener, port = await host.listen()
    async with listener:
        with host.peer(role, port) as peer:
            async with await listener.accept() as stream:
                async with trio.open_nursery() as nursery:
                    if talk:
                        await answer_hello(stream)
                    assert await said(peer) == "ready"
                    if before is not None:
                        nursery.start_soon(before, stream)
                        await trio.testing.wait_all_tasks_blocked()
                    while not when():  # noqa: ASYNC110 (the test's own time limit bounds it)
                        await trio.sleep(0.001)
                    peer.send_signal(signal.SIGKILL)
                    await ended(peer)
                yield stream
            await host.only_this_process_is_left()


async def test_killed_before_the_handshake_is_an_end_of_file(host: Host) -> None:
    with trio.fail_after(LIMIT_S):
        async with killed(host, "connect_only", talk=False) as stream:
            assert await stream.receive_some() == b""


async def test_a_client_killed_in_the_middle_of_the_handshake_ends_the_stream(host: Host) -> None:
    async def shake(stream: SmcStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            assert await stream.receive_some() == b""

    with trio.fail_after(LIMIT_S):
        listener, port = await host.listen()
        async with listener:
            with host.peer("propose_only", port) as peer:
                async with await listener.accept() as stream, trio.open_nursery() as nursery:
                    nursery.start_soon(shake, stream)
                    assert await said(peer) == "ready"
                    assert (await trio.to_thread.run_sync(host.totals))["regions"] == 1
                    peer.send_signal(signal.SIGKILL)
                await ended(peer)
        await host.only_this_process_is_left()


async def test_a_server_killed_in_the_middle_of_the_handshake_ends_the_stream(host: Host) -> None:
    with trio.fail_after(LIMIT_S), host.peer("read_the_offer_only") as peer:
        async with await open_tcp_stream(
            "127.0.0.1", int(await said(peer)), smc="require", device=host.device
        ) as stream:

            async def expect_the_end() -> None:
                with contextlib.suppress(trio.BrokenResourceError):
                    assert await stream.receive_some() == b""

            async with trio.open_nursery() as nursery:
                nursery.start_soon(expect_the_end)
                assert await said(peer) == "ready"
                peer.send_signal(signal.SIGKILL)
        await ended(peer)
        await host.only_this_process_is_left()


async def test_killed_while_idle_is_a_reset_after_what_was_sent(host: Host) -> None:
    with trio.fail_after(LIMIT_S):
        async with killed(host, "idle") as stream:
            assert await receive_exactly(stream, len(BYE)) == BYE
            await expect_reset(stream)


async def test_killed_in_the_middle_of_a_send_is_a_reset_after_what_was_sent(host: Host) -> None:
    received = bytearray()

    async def receive(stream: SmcStream) -> None:
        with pytest.raises(trio.BrokenResourceError) as caught:  # noqa: PT012
            while True:
                received.extend(await stream.receive_some())
        assert isinstance(caught.value.__cause__, ConnectionResetError)

    with trio.fail_after(LIMIT_S):
        async with killed(host, "send_for_ever", before=receive, when=lambda: bool(received)) as stream:
            await expect_reset(stream)
    assert received == (PATTERN * (len(received) // len(PATTERN) + 1))[: len(received)]


async def test_killed_while_parked_as_a_writer_is_a_reset_after_a_whole_ring(host: Host) -> None:
    with trio.fail_after(LIMIT_S):
        async with killed(host, "park_writing") as stream:
            ring = stream.connection.endpoint.rx_ring_bytes
            assert await receive_exactly(stream, ring) == PATTERN[:ring]
            await expect_reset(stream)


async def test_killed_while_parked_as_a_reader_wakes_a_reader(host: Host) -> None:
    async def receive(stream: SmcStream) -> None:
        assert await receive_exactly(stream, len(BYE)) == BYE
        await expect_reset(stream)

    with trio.fail_after(LIMIT_S):
        async with killed(host, "park_reading", before=receive):
            pass


async def test_killed_with_a_full_ring_wakes_a_writer_and_the_reader_is_told_too(host: Host) -> None:
    async def fill(stream: SmcStream) -> None:
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(PATTERN)

    with trio.fail_after(LIMIT_S):
        async with killed(host, "idle", before=fill) as stream:
            assert await receive_exactly(stream, len(BYE)) == BYE
            await expect_reset(stream)


async def test_killed_after_its_half_close_is_an_end_of_file(host: Host) -> None:
    with trio.fail_after(LIMIT_S):
        async with killed(host, "half_close") as stream:
            assert await receive_exactly(stream, len(BYE)) == BYE
            assert await stream.receive_some() == b""
            with pytest.raises(trio.BrokenResourceError):
                await stream.send_all(b"x")
            assert await stream.receive_some() == b""


async def test_a_program_that_exits_without_closing_ends_like_tcp(host: Host) -> None:
    with trio.fail_after(LIMIT_S):
        listener, port = await host.listen()
        async with listener:
            with host.peer("exit_without_closing", port) as peer:
                async with await listener.accept() as stream:
                    await answer_hello(stream)
                    assert await receive_exactly(stream, len(BYE)) == BYE
                    assert await stream.receive_some() == b""
                    assert await ended(peer) == 0
        await host.only_this_process_is_left()


async def test_a_program_that_exits_with_unread_bytes_resets_like_tcp(host: Host) -> None:
    with trio.fail_after(LIMIT_S):
        listener, port = await host.listen()
        async with listener:
            with host.peer("exit_with_unread_bytes", port) as peer:
                async with await listener.accept() as stream:
                    await answer_hello(stream)
                    await stream.send_all(b"never read")
                    assert await receive_exactly(stream, len(BYE)) == BYE
                    await expect_reset(stream)
                    assert await ended(peer) == 0
        await host.only_this_process_is_left()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
async def test_an_established_connection_survives_the_manager(host: Host, end: signal.Signals) -> None:
    async def exchange(stream: SmcStream, data: bytes) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            assert await receive_exactly(stream, len(data)) == data

    with trio.fail_after(LIMIT_S):
        listener, port = await host.listen()
        async with listener:
            with host.peer("echo", port) as peer:
                async with await listener.accept() as stream:
                    await stream.do_handshake()
                    assert stream.connection is not None
                    stream.connection.endpoint.max_spin_ns = 0  # so both ends sleep for every single message
                    await exchange(stream, b"with a manager")
                    host.manager.send_signal(end)
                    await ended(host.manager)
                    while host.device.gone is None:  # noqa: ASYNC110 (the driver's thread sets no event)
                        await trio.sleep(0.001)
                    for number in range(200):
                        await exchange(stream, b"without one: %d" % number)
                    await exchange(stream, PATTERN)
                    await stream.send_eof()
                    assert await stream.receive_some() == b""
                    assert await said(peer) == "done"
                    assert await ended(peer) == 0


async def test_an_end_is_noticed_without_the_manager_too(host: Host) -> None:
    with trio.fail_after(LIMIT_S):
        listener, port = await host.listen()
        async with listener:
            with host.peer("idle", port) as peer:
                async with await listener.accept() as stream, trio.open_nursery() as nursery:
                    await answer_hello(stream)
                    assert await said(peer) == "ready"
                    host.manager.send_signal(signal.SIGKILL)
                    await ended(host.manager)
                    assert await receive_exactly(stream, len(BYE)) == BYE
                    nursery.start_soon(expect_reset, stream)
                    await trio.testing.wait_all_tasks_blocked()
                    peer.send_signal(signal.SIGKILL)
                    await ended(peer)


async def test_a_listener_is_found_again_once_a_manager_is_back(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISM_DEVICE", host.name)
    default.close_default()

    async def mode_of_a_client(port: int) -> str:
        with host.peer("tell_mode", port) as peer:
            mode = await said(peer)
            assert await ended(peer) == 0
            return mode

    async def serve(stream: SmcStream) -> None:
        async with stream:
            await answer_hello(stream)
            assert await stream.receive_some() == b""

    with trio.fail_after(LIMIT_S):
        (listener,) = await open_tcp_listeners(0, host="127.0.0.1", smc="auto")
        async with listener, trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, serve, [listener])
            port = listener.socket.getsockname()[1]
            assert await mode_of_a_client(port) == "SMC"
            host.manager.send_signal(signal.SIGKILL)
            await ended(host.manager)
            assert await mode_of_a_client(port) == "TCP"
            with process("-m", "ism", "manager", "--quiet", "--run-dir", str(tmp_path)):
                while await mode_of_a_client(port) != "SMC":
                    pass  # the first one shows the server that its device is lost
                nursery.cancel_scope.cancel()
    default.close_default()


if __name__ == "__main__":
    trio.run(globals()[f"peer_{sys.argv[1]}"], *map(int, sys.argv[2:]))

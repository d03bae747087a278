# SPDX-License-Identifier: Apache-2.0
"""Who has nothing to do uses no processor: idle connections by the hundred, and a sender whose reader is slow.

Two processes and a manager of their own, both programs this very file. Nothing here looks at a clock: that a process
sleeps is read from what the kernel counts for each of its threads, how often it gave the processor up and how long it
had it. A stretch of time in which these stand still is waited for; one that goes on working never has such a stretch.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from ism.driver import open_device
from ism.errors import IsmError
from ism.smc import SmcStream, blocking, open_tcp_listeners, open_tcp_stream

pytestmark = pytest.mark.processes

LIMIT_S = 60.0
STRETCH_S = 1.0
CONNECTIONS = 100
MOST_WAKE_UPS = 10
"""Of all threads of a process in the stretch: far fewer than one for each connection."""
TOTAL = 64 << 20
"""More than any ring holds."""
SURFACES = ("trio", "blocking")


# What the kernel knows ------------------------------------------------------------------------------------------


def wake_ups(pid: int) -> dict[str, int]:
    """How often each thread of a process has given up the processor, of its own will or not."""
    found = {}
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            text = Path(f"/proc/{pid}/task/{thread}/status").read_text()
            found[thread] = sum(int(line.split()[1]) for line in text.splitlines() if "ctxt_switches" in line)
    return found


def states(pid: int) -> set[str]:
    """The states of all threads: S sleeps, R runs."""
    found = set()
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.add(Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()[0])
    return found


def ticks(pid: int) -> int:
    """User and system time of a process, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def worked(pids: list[int], before: list[dict[str, int]], ticks_before: list[int]) -> list[tuple[int, int]]:
    """For each process: wake-ups of its threads since, and ticks."""
    since = []
    for pid, threads, used in zip(pids, before, ticks_before, strict=True):
        now = wake_ups(pid)
        since.append((sum(count - threads.get(name, 0) for name, count in now.items()), ticks(pid) - used))
    return since


def becomes_quiet(*pids: int) -> None:
    """Wait for a stretch in which no process works."""
    patience = time.monotonic() + LIMIT_S
    while True:
        before, used = [wake_ups(pid) for pid in pids], [ticks(pid) for pid in pids]
        time.sleep(STRETCH_S)
        since = worked(list(pids), before, used)
        if all(count <= MOST_WAKE_UPS and spent == 0 for count, spent in since):
            return
        assert time.monotonic() < patience, f"wake-ups and ticks in {STRETCH_S} s, always: {since}"


# Processes ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process(*command: object, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run a Python process; killed and reaped at the end, whatever happened."""
    with subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
    ) as started:
        try:
            yield started
        finally:
            started.kill()


def said(started: subprocess.Popen[str]) -> str:
    """The next line that the process prints."""
    assert started.stdout is not None
    ready, _, _ = select.select([started.stdout], [], [], LIMIT_S)
    assert ready, "the process says nothing"
    text = started.stdout.readline()
    assert text, "the process ended before it said anything"
    return text.strip()


def says_nothing(started: subprocess.Popen[str]) -> bool:
    return not select.select([started.stdout], [], [], 0)[0]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[tuple[int, str]]:
    """A manager's pid, and what names its devices."""
    name = f"vfio-user:{tmp_path / 'device.sock'}"
    with process("-m", "ism", "manager", "--quiet", "--run-dir", tmp_path) as running:
        patience = time.monotonic() + LIMIT_S
        while True:
            try:
                open_device(name).close()
                break
            except IsmError:
                assert running.poll() is None, "the manager ended"
                assert time.monotonic() < patience, "the manager does not serve"
                time.sleep(0.01)
        yield running.pid, name


# Idle connections -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surface", SURFACES)
def test_a_hundred_idle_connections_wake_neither_end_nor_the_manager(manager: tuple[int, str], surface: str) -> None:
    pid, name = manager
    with process(__file__, f"{surface}_server", ISM_DEVICE=name) as server:
        port = said(server)
        with process(__file__, f"{surface}_client", port, ISM_DEVICE=name) as client:
            assert said(client) == said(server) == "all wait"
            becomes_quiet(client.pid, server.pid, pid)
            assert client.stdin is not None
            print("go on", file=client.stdin, flush=True)
            assert said(client) == "all answered", "they did not sleep, they were dead"


@pytest.mark.parametrize("surface", SURFACES)
def test_a_sender_whose_reader_does_not_read_sleeps_until_it_does(manager: tuple[int, str], surface: str) -> None:
    _, name = manager
    with process(__file__, f"{surface}_slow_reader", ISM_DEVICE=name) as reader:
        port = said(reader)
        with process(__file__, f"{surface}_sender", port, ISM_DEVICE=name) as sender:
            assert said(reader) == "read a byte"
            becomes_quiet(sender.pid)
            assert states(sender.pid) == {"S"}
            assert says_nothing(sender), "it has sent everything, although nobody reads"
            assert reader.stdin is not None
            print("go on", file=reader.stdin, flush=True)
            assert said(reader) == f"read {TOTAL} bytes"
            assert said(sender) == "sent"


# Roles of the two processes -------------------------------------------------------------------------------------


def report(text: object) -> None:
    print(text, flush=True)


async def trio_server() -> None:
    (listener,) = await open_tcp_listeners(0, host="127.0.0.1", smc="require")
    report(listener.socket.getsockname()[1])
    streams = []
    for _ in range(CONNECTIONS):
        streams.append(await listener.accept())
        assert await streams[-1].receive_some(1) == b"1"
        await streams[-1].send_all(b"1")

    async def echo(stream: SmcStream) -> None:
        await stream.send_all(await stream.receive_some(1))

    async with trio.open_nursery() as nursery:
        for stream in streams:
            nursery.start_soon(echo, stream)
        await trio.testing.wait_all_tasks_blocked(0.05)
        report("all wait")
    await trio.sleep_forever()


async def trio_client(port: int) -> None:
    streams = []
    for _ in range(CONNECTIONS):
        streams.append(await open_tcp_stream("127.0.0.1", port, smc="require"))
        await streams[-1].send_all(b"1")
        assert await streams[-1].receive_some(1) == b"1"

    async def wait(stream: SmcStream) -> None:
        assert await stream.receive_some(1) == b"2"

    async with trio.open_nursery() as nursery:
        for stream in streams:
            nursery.start_soon(wait, stream)
        await trio.testing.wait_all_tasks_blocked(0.05)
        report("all wait")
        await trio.to_thread.run_sync(sys.stdin.readline)
        for stream in streams:
            await stream.send_all(b"2")
    report("all answered")
    await trio.sleep_forever()


def _started(target: Any, connections: list[Any]) -> list[threading.Thread]:
    threads = [threading.Thread(target=target, args=(connection,), daemon=True) for connection in connections]
    for thread in threads:
        thread.start()
    return threads


def blocking_server() -> None:
    listener = blocking.create_server(("127.0.0.1", 0))
    report(listener.getsockname()[1])
    connections = []
    for _ in range(CONNECTIONS):
        connections.append(listener.accept()[0])
        assert connections[-1].recv(1) == b"1"
        connections[-1].sendall(b"1")
    _started(lambda connection: connection.sendall(connection.recv(1)), connections)
    report("all wait")
    sys.stdin.read()


def blocking_client(port: int) -> None:
    connections = []
    for _ in range(CONNECTIONS):
        connections.append(blocking.create_connection(("127.0.0.1", port)))
        connections[-1].sendall(b"1")
        assert connections[-1].recv(1) == b"1"
    assert {connection.smc_info().mode for connection in connections} == {"SMC"}
    answers: list[bytes] = []
    threads = _started(lambda connection: answers.append(connection.recv(1)), connections)
    report("all wait")
    sys.stdin.readline()
    for connection in connections:
        connection.sendall(b"2")
    for thread in threads:
        thread.join()
    assert answers == [b"2"] * CONNECTIONS
    report("all answered")
    sys.stdin.read()


async def trio_slow_reader() -> None:
    (listener,) = await open_tcp_listeners(0, host="127.0.0.1", smc="require")
    report(listener.socket.getsockname()[1])
    stream = await listener.accept()
    count = len(await stream.receive_some(1))
    report("read a byte")
    await trio.to_thread.run_sync(sys.stdin.readline)
    while data := await stream.receive_some(1 << 20):
        count += len(data)
    report(f"read {count} bytes")
    await trio.sleep_forever()


async def trio_sender(port: int) -> None:
    async with await open_tcp_stream("127.0.0.1", port, smc="require") as stream:
        await stream.send_all(bytes(TOTAL))
    report("sent")
    await trio.sleep_forever()


def blocking_slow_reader() -> None:
    listener = blocking.create_server(("127.0.0.1", 0))
    report(listener.getsockname()[1])
    connection = listener.accept()[0]
    count = len(connection.recv(1))
    assert connection.smc_info().mode == "SMC"
    report("read a byte")
    sys.stdin.readline()
    while data := connection.recv(1 << 20):
        count += len(data)
    report(f"read {count} bytes")
    sys.stdin.read()


def blocking_sender(port: int) -> None:
    with blocking.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(bytes(TOTAL))
    report("sent")
    sys.stdin.read()


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    function = globals()[role]
    numbers = [int(argument) for argument in arguments]
    if role.startswith("trio"):
        trio.run(function, *numbers)
    else:
        function(*numbers)

# SPDX-License-Identifier: Apache-2.0
"""`ism perf`: real servers and clients, each a process, over every surface and transport; and ends that misbehave."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from socket_pairs import manager_process

from ism.perf.parameters import Parameters
from ism.perf.protocol import Ask, Count, Go, Listen, Ready, Result, Way, decode, encode

pytestmark = pytest.mark.processes

LIMIT_S = 60
OURS = (
    "ISM_DEVICE",
    "ISM_RUN_DIR",
    "ISM_SMC",
    "ISM_SMC_PEERS",
    "ISM_SMC_BUFFER",
    "ISM_SMC_BUFFER_LIMIT",
    "ISM_SMC_SPIN_US",
)
PLAIN = {name: value for name, value in os.environ.items() if name not in OURS}
SURFACES = [
    (api, transport)
    for api in ("trio", "blocking", "asyncio", "view")
    for transport in ("smc", "tcp", "unix")
    if api != "view" or transport == "smc"
]


class Server:
    """A server in a process. Attributes: `process`, `port`."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        command = [sys.executable, "-m", "ism", "perf", "-s", "-p", "0", "-B", "127.0.0.1", *arguments]
        self.environment = environment
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "listening on port" in line, line + self.process.stdout.read()
        self.port = int(line.split()[-1])

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "ism", "perf", "-c", "127.0.0.1", "-p", str(self.port), *arguments]

    def test(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
            env=self.environment,
        )

    def measure(self, *arguments: str) -> dict[str, Any]:
        """Run a test that goes well and return its document."""
        done = self.test(*arguments, "-J")
        assert done.returncode == 0, done.stdout + done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def line_with(self, *words: str) -> str:
        """Read lines of the server until one that has all the words."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if all(word in line for word in words):
                return line
        raise AssertionError("the server ended")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
        )

    def talk(self) -> socket.socket:
        """Connect as something else than a client."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT_S)

    def still_serves(self) -> None:
        assert self.process.poll() is None
        assert self.measure("-n", "10K", "--transport", "tcp")["end"]["sum"]["out"]["receiver"]["bytes"] == 10240


@contextlib.contextmanager
def serving(environment: dict[str, str], *arguments: str) -> Iterator[Server]:
    server = Server(environment, *arguments)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    directory = tmp_path_factory.mktemp("run")
    with manager_process(directory) as environment:
        yield PLAIN | {name: value for name, value in environment.items() if value}


@pytest.fixture(scope="module")
def server(manager: dict[str, str]) -> Iterator[Server]:
    with serving(manager) as server:
        yield server


@pytest.fixture(scope="module")
def server_of_1_mib(manager: dict[str, str]) -> Iterator[Server]:
    """A server whose rings, and its clients', have 1 MiB and stay so."""
    with serving(manager | {"ISM_SMC_BUFFER": "1M"}) as server:
        yield server


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server, and its clients, without a manager."""
    with serving(PLAIN | {"ISM_RUN_DIR": str(tmp_path_factory.mktemp("nobody"))}) as server:
        yield server


# -- tests that go well ----------------------------------------------------------------------------------------------


def counted(found: dict[str, Any], direction: str) -> tuple[int, int]:
    ends = found["end"]["sum"][direction]
    return ends["sender"]["bytes"], ends["receiver"]["bytes"]


@pytest.mark.parametrize(("api", "transport"), SURFACES)
def test_both_directions_of_several_streams_arrive_whole(server: Server, api: str, transport: str) -> None:
    found = server.measure("-n", "3000001", "-P", "2", "--bidir", "--api", api, "--transport", transport)
    assert counted(found, "out") == counted(found, "in") == (3000001, 3000001)
    assert [stream["id"] for stream in found["start"]["streams"]] == [1, 2, 3, 4]
    for stream in found["start"]["streams"]:
        for end in ("client", "server"):
            assert stream[end]["mode"] == transport.upper(), stream
            assert stream[end]["receive_buffer"] > 4096
    assert found["intervals"][-1]["sum"]["out"]["bytes"] > 0
    for end in ("client", "server"):
        assert found["end"]["cpu"][end]["user_s"] >= 0
    assert found["end"]["cpu"]["s_per_gb"] > 0
    assert found["start"]["server"]["program"].startswith("ism perf ")


@pytest.mark.parametrize(("api", "transport"), SURFACES)
def test_round_trips_are_counted_one_by_one(server: Server, api: str, transport: str) -> None:
    found = server.measure("--latency", "-n", "6400", "--api", api, "--transport", transport)
    latency = found["end"]["latency"]
    assert latency["round_trips"] == 100
    values = [latency["percentiles_s"][name] for name in ("50", "90", "99", "99.9")]
    assert 0 < values[0] <= values[1] <= values[2] <= values[3] <= latency["max_s"]
    assert counted(found, "out") == (6400, 6400)
    assert sum(one["sum"]["out"]["round_trips"] for one in found["intervals"]) == 100


@pytest.mark.parametrize("api", ["trio", "blocking", "asyncio", "view"])
def test_round_trips_larger_than_the_ring_wrap_around_it(server_of_1_mib: Server, api: str) -> None:
    found = server_of_1_mib.measure("--latency", "-n", "12M", "-l", "3M", "--api", api)
    assert found["end"]["latency"]["round_trips"] == 4


@pytest.mark.parametrize("api", ["trio", "blocking", "asyncio", "view"])
def test_round_trips_at_a_rate_take_their_time(server: Server, api: str) -> None:
    found = server.measure("--latency", "--rate", "100", "-n", "640", "-P", "2", "--api", api)
    assert found["end"]["latency"]["round_trips"] == 10
    assert found["end"]["sum"]["out"]["sender"]["seconds"] >= 0.04  # five each, the last begins 40 ms after the first


@pytest.mark.parametrize("api", ["trio", "blocking", "asyncio", "view"])
@pytest.mark.parametrize("direction", [[], ["-R"]])
def test_time_ends_a_test_and_lines_tell_of_it(server: Server, api: str, direction: list[str]) -> None:
    done = server.test("-t", "0.3", "-i", "0.1", "--api", api, *direction)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    arrow = "<-" if direction else "->"
    assert f"[  1] {arrow} SMC, buffers 61440 in, 61440 out" in done.stdout  # as it begins
    for words in ("sender", "receiver", "CPU of the client", "CPU of the server", "s/GB", "GB/s", "Gbit/s"):
        assert words in done.stdout
    assert done.stdout.count(f"[  1] {arrow}") >= 4


def test_one_byte_is_a_test_as_well(server: Server) -> None:
    assert counted(server.measure("-n", "1", "-P", "3"), "out") == (1, 1)


def test_without_a_manager_the_reason_for_tcp_is_shown(alone: Server) -> None:
    done = alone.test("-n", "10K")
    assert done.returncode == 0, done.stderr
    assert "TCP (no virtio-ism device" in done.stdout
    assert done.stderr == ""
    stream = alone.measure("-n", "10K", "--api", "asyncio")["start"]["streams"][0]
    assert stream["client"]["mode"] == stream["server"]["mode"] == "TCP"
    assert "device manager" in stream["client"]["reason"]
    assert stream["client"]["code"] != 0


def test_what_needs_shared_memory_fails_without_a_manager_and_says_why(alone: Server) -> None:
    done = alone.test("-n", "10K", "--api", "view")
    assert done.returncode == 1
    assert done.stderr.startswith("ism: ")
    assert "views are of shared memory" in done.stderr
    assert done.stderr.count("\n") == 1
    alone.still_serves()


def test_a_one_off_server_ends_with_its_test(manager: dict[str, str]) -> None:
    with serving(manager, "-1") as server:
        server.measure("-n", "10K", "--transport", "tcp")
        assert server.process.wait(LIMIT_S) == 0


def test_a_server_ends_quietly_at_ctrl_c(manager: dict[str, str]) -> None:
    with serving(manager) as server:
        server.process.send_signal(signal.SIGINT)
        out, _ = server.process.communicate(timeout=LIMIT_S)
        assert server.process.returncode == 0
        assert out == ""


# -- clients that come and go ----------------------------------------------------------------------------------------


def test_ctrl_c_shows_the_totals_so_far(server: Server) -> None:
    with server.start("-t", "600", "-i", "0.05") as client:
        assert client.stdout is not None
        for line in client.stdout:
            if "0.05-" in line:
                break
        client.send_signal(signal.SIGINT)
        out, err = client.communicate(timeout=LIMIT_S)
    assert client.returncode == 130, err
    assert "sender" in out
    assert "receiver" in out
    assert "interrupted" in out
    server.still_serves()


@pytest.mark.parametrize(("api", "transport"), [*SURFACES])
@pytest.mark.parametrize("direction", [[], ["-R"]])
def test_a_server_survives_a_client_that_is_killed(
    server: Server, api: str, transport: str, direction: list[str]
) -> None:
    with server.start("-t", "600", "-i", "0.05", "--api", api, "--transport", transport, *direction) as client:
        assert client.stdout is not None
        for line in client.stdout:
            if "0.05-" in line:
                break
        client.kill()
        client.communicate(timeout=LIMIT_S)
    server.line_with("127.0.0.1: the client went away")
    server.still_serves()


def test_a_second_client_is_told_that_the_server_is_busy(server: Server) -> None:
    with server.start("-t", "600", "-i", "0.05", "--transport", "tcp") as client:
        assert client.stdout is not None
        for line in client.stdout:
            if "0.05-" in line:
                break
        done = server.test("-n", "1")
        assert done.returncode == 1
        assert "busy" in done.stderr
        client.send_signal(signal.SIGINT)
        client.communicate(timeout=LIMIT_S)
    server.still_serves()


def test_nobody_there_is_one_line(manager: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "ism", "perf", "-c", "127.0.0.1", "-p", str(port)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        env=manager,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("ism: cannot connect to 127.0.0.1 port ")
    assert done.stderr.count("\n") == 1


# -- ends that lie ---------------------------------------------------------------------------------------------------


def answer(sock: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(65536):
            data += part
    return data


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x00" * 100 + b"\n",
        b"[" * 50_000 + b"\n",
        b"x" * 300_000,
        encode(Go()),
        encode(Ask(Parameters())).replace(b'"streams": 1', b'"streams": 1000000'),
        encode(Ask(Parameters())).replace(b'"length": 65536', b'"length": 1e99'),
        b"",
    ],
)
def test_a_server_survives_garbage(server: Server, garbage: bytes) -> None:
    with server.talk() as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(garbage)
            sock.shutdown(socket.SHUT_WR)
        for line in answer(sock).splitlines():
            assert b'"failed"' in line
    server.still_serves()


def lines(sock: socket.socket) -> Iterator[Any]:
    for line in sock.makefile("rb"):
        yield decode(line.rstrip(b"\n"))


def test_streams_of_somebody_else_are_not_taken_for_the_client_s(server: Server) -> None:
    with server.talk() as sock:
        sock.sendall(encode(Ask(Parameters(transport="tcp", api="blocking", seconds=None, bytes=5))))
        said = lines(sock)
        listen = next(said)
        assert isinstance(listen, Listen)
        cookie = bytes.fromhex(listen.cookie)
        for hello in (b"x" * 17, bytes(16) + b"\x01", cookie + b"\x02", cookie + b"\x00", b"short"):
            with socket.create_connection(("127.0.0.1", listen.port), timeout=LIMIT_S) as stranger:
                stranger.sendall(hello)
                stranger.shutdown(socket.SHUT_WR)
                assert answer(stranger) == b""
        with socket.create_connection(("127.0.0.1", listen.port), timeout=LIMIT_S) as stream:
            stream.sendall(cookie + b"\x01")
            assert stream.recv(1) == b"\x06"
            assert isinstance(next(said), Ready)
            sock.sendall(encode(Go()))
            stream.sendall(b"12345")
            stream.shutdown(socket.SHUT_WR)
            result = next(said)
            assert isinstance(result, Result)
            assert [count.bytes for count in result.flows] == [5]
    server.still_serves()


def test_a_client_that_leaves_before_its_streams_are_open_is_forgotten(server: Server) -> None:
    for api in ("blocking", "trio", "asyncio"):
        with server.talk() as sock:
            sock.sendall(encode(Ask(Parameters(transport="tcp", api=api))))
            assert isinstance(next(lines(sock)), Listen)
        server.still_serves()


@pytest.fixture
def liar(tmp_path: Path) -> Iterator[tuple[Server, socket.socket]]:
    """What looks like a server to a client, and the listening socket behind it."""
    fake = Server.__new__(Server)
    fake.environment = PLAIN | {"ISM_RUN_DIR": str(tmp_path)}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LIMIT_S)
        fake.port = listener.getsockname()[1]
        yield fake, listener


@pytest.mark.parametrize(
    ("said", "word"),
    [
        (b"", "went away"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no message of this protocol"),
        (encode(Ready(())), "makes no sense now"),
        (encode(Listen(1, "0" * 32)), "Connection refused"),
        (b'{"say": "listen", "port": 1, "cookie": "/etc/passwd", "program": "", "host": ""}\n', "cookie"),
        (b'{"say": "failed", "reason": "\\u001b[31mred"}\n', "gave up: ?[31mred"),
    ],
)
def test_a_client_survives_what_is_no_server(liar: tuple[Server, socket.socket], said: bytes, word: str) -> None:
    fake, listener = liar
    with fake.start("-n", "1", "--transport", "tcp", "--api", "blocking") as client:
        sock, _ = listener.accept()
        with sock:
            assert sock.recv(65536)
            sock.sendall(said)
            if not said:
                sock.shutdown(socket.SHUT_WR)
            _, err = client.communicate(timeout=LIMIT_S)
    assert client.returncode == 1
    assert word in err
    assert err.isascii()
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_bytes_that_the_server_says_it_has_not_received_fail_the_test(liar: tuple[Server, socket.socket]) -> None:
    fake, listener = liar
    with (
        socket.create_server(("127.0.0.1", 0)) as streams,
        fake.start("-n", "1000", "--transport", "tcp", "--api", "blocking") as client,
    ):
        streams.settimeout(LIMIT_S)
        sock, _ = listener.accept()
        with sock:
            said = lines(sock)
            assert isinstance(next(said), Ask)
            sock.sendall(encode(Listen(streams.getsockname()[1], "0" * 32)))
            stream, _ = streams.accept()
            with stream:
                assert stream.recv(17, socket.MSG_WAITALL) == bytes(16) + b"\x01"
                stream.sendall(b"\x06")
                sock.sendall(encode(Ready((Way("TCP"),))))
                assert isinstance(next(said), Go)
                assert answer(stream) == bytes(range(256)) * 3 + bytes(range(232))
            sock.sendall(encode(Result((Count(999, 1.0),), 0.0, 0.0)))
            out, err = client.communicate(timeout=LIMIT_S)
    assert client.returncode == 1
    assert "receiver" in out
    assert err == "ism: stream 1: 1000 bytes were sent, and 999 received\n"

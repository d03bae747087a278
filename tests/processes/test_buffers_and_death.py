# SPDX-License-Identifier: Apache-2.0
"""Two processes whose buffers grow and shrink all the time, and kill -9 of either: what was sent is read, then the end.

The peer process runs this very file. In both, idleness counts after half a millisecond, so rings change hundreds of
times a second, under system calls and copies that run without the interpreter's lock.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ism.errors import IsmError
from ism.manager.control import request
from ism.smc import blocking, default, tuning

pytestmark = pytest.mark.processes

LIMIT_S = 60
PERIOD = 251 * 4096
PATTERN = bytes(range(251)) * 4096 * 3


def in_a_hurry() -> None:
    tuning.TICK_S, tuning.IDLE_TICKS = 0.0005, 1


class Checked:
    """Receives from a socket and compares with the pattern. Attributes: `count`, `sizes` (of the buffer, seen)."""

    def __init__(self, sock: blocking.socket, seed: int) -> None:
        self._sock, self._random, self.count, self.sizes = sock, random.Random(seed), 0, set[int]()

    def some(self) -> int:
        buffer = bytearray(self._random.choice([100, 5000, 65536, 1 << 20]))
        got = self._sock.recv_into(buffer)
        at = self.count % PERIOD
        assert buffer[:got] == PATTERN[at : at + got], f"bytes {self.count} to {self.count + got} are others"
        self.count += got
        self.sizes.add(self._sock.smc_info().receive_buffer)
        return got


def send_some(sock: blocking.socket, sent: int, rng: random.Random) -> int:
    if rng.random() < 0.02:
        time.sleep(rng.choice([0.001, 0.004]))  # so that the other side finds it idle
    at = sent % PERIOD
    return sock.send(memoryview(PATTERN)[at : at + rng.choice([1, 3000, 65536, 1_000_000])])


def peer(port: str, seed: str) -> None:
    """Send and receive until killed, or until the other end has had enough."""
    in_a_hurry()
    rng = random.Random(int(seed))
    with blocking.create_connection(("127.0.0.1", int(port))) as sock:
        print("ready", flush=True)

        def receive() -> None:
            checked = Checked(sock, int(seed) + 1)
            while checked.some():
                pass

        thread = threading.Thread(target=receive)
        thread.start()
        sent = 0
        with contextlib.suppress(ConnectionError):
            while thread.is_alive():
                sent += send_some(sock, sent, rng)
        thread.join()


@contextlib.contextmanager
def process(*command: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=env) as started:
        try:
            yield started
        finally:
            started.kill()


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ISM_DEVICE", f"vfio-user:{tmp_path / 'device.sock'}")
    monkeypatch.setenv("ISM_SMC", "require")
    monkeypatch.setattr(tuning, "TICK_S", tuning.TICK_S)
    monkeypatch.setattr(tuning, "IDLE_TICKS", tuning.IDLE_TICKS)
    in_a_hurry()
    with process("-m", "ism", "manager", "--quiet", "--run-dir", str(tmp_path)) as manager:
        deadline = time.monotonic() + LIMIT_S
        while True:
            try:
                default.open_default()
                break
            except (IsmError, OSError):
                assert manager.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
        yield tmp_path / "control.sock"
        default.close_default()


def only_this_process_is_left(control: Path) -> bool:
    totals = request(control, "status")["status"]["totals"]
    return bool(totals["devices"] == 1 and totals["regions"] == 0 and totals["attachments"] == 0)


def wait_until(condition: object, *arguments: object) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition(*arguments):  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("seed", range(8))
def test_a_process_killed_while_buffers_change_loses_nothing_that_it_sent(control: Path, seed: int) -> None:
    rng = random.Random(seed)
    with (
        blocking.create_server(("127.0.0.1", 0)) as listener,
        process(__file__, str(listener.getsockname()[1]), str(seed)) as other,
    ):
        listener.settimeout(LIMIT_S)
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(LIMIT_S)
            assert other.stdout is not None
            assert other.stdout.readline() == "ready\n"
            failures: list[BaseException] = []

            def send() -> None:
                sent = 0
                try:
                    with contextlib.suppress(ConnectionError):
                        while True:
                            sent += send_some(sock, sent, rng)
                except BaseException as exc:
                    failures.append(exc)
                    raise

            thread = threading.Thread(target=send)
            thread.start()
            checked = Checked(sock, seed)
            enough = rng.randrange(1 << 20, 80 << 20)
            while checked.count < enough or len(checked.sizes) < 2:
                assert checked.some()
            os.kill(other.pid, signal.SIGKILL)
            other.wait(LIMIT_S)
            with contextlib.suppress(ConnectionResetError):  # as in TCP, one of the two threads is told
                while checked.some():
                    pass
            thread.join(LIMIT_S)
            assert not thread.is_alive()
            assert not failures
    wait_until(only_this_process_is_left, control)


if __name__ == "__main__":
    peer(*sys.argv[1:])

# SPDX-License-Identifier: Apache-2.0
"""The directory between processes: a real manager, network namespaces, and kill -9 in the middle of claims."""

from __future__ import annotations

import queue
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transport_rig import PATIENCE_S, ManagerProcess

from ism.driver import Device
from ism.driver.control import Command
from ism.driver.directory import Claim, Directory, FourTuple
from ism.driver.vfio_user import VfioUserTransport
from ism.errors import DeviceError, DeviceGoneError, IsmError
from ism.paths import device_socket
from ism.virtio.ism_spec import EventType

pytestmark = pytest.mark.processes

V4 = bytes(10) + b"\xff\xff"
HERE, THERE = V4 + bytes([10, 0, 0, 1]), V4 + bytes([10, 0, 0, 2])
LOOPBACK = V4 + bytes([127, 0, 0, 1])
CLIENT = """
import sys
import threading
from ism.driver import Device
from ism.driver.directory import FourTuple
from ism.driver.vfio_user import VfioUserTransport
device = Device(VfioUserTransport.connect(sys.argv[1]))
directory = device.directory
loopback = bytes(10) + b"\\xff\\xff\\x7f\\0\\0\\1"
came = threading.Event()
def event(kind, devid):
    print(kind.name, devid, flush=True)
    came.set()
directory.listen(77, event)
print(directory.lookup(loopback, 80, 5), directory.intend(FourTuple(loopback, 40000, loopback, 80, 5), 77), flush=True)
order = sys.stdin.readline().strip()
if order == "wait":
    assert came.wait(30)
if order != "leave":
    print(directory.retract(77), flush=True)
sys.stdin.read()
"""
MORTAL_MANAGER = """
import os
import signal
import sys
from pathlib import Path
import trio
from ism.device.queue import DeviceQueue
from ism.manager.config import default_config
from ism.manager.server import run_manager
run_dir, what, when = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
push = DeviceQueue.push
def mortal(queue, chain, data):
    claim = "ack" if queue.index == 0 and len(data) == 17 else ""
    event = "event" if queue.index == 1 and data[:8] == (1 << 16).to_bytes(8, "little") else ""
    dies = what in (claim, event)
    if dies and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    due = push(queue, chain, data)
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)
    return due
DeviceQueue.push = mortal
class Ready:
    def started(self, manager):
        print("ready", flush=True)
trio.run(lambda: run_manager(default_config(run_dir), run_dir, task_status=Ready()))
"""


@contextmanager
def manager(directory: Path) -> Iterator[ManagerProcess]:
    served = ManagerProcess(directory)
    try:
        yield served
    finally:
        served.end(signal.SIGKILL)


class Client:
    """The client as a process."""

    def __init__(self, path: Path, *prefix: str) -> None:
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-c", CLIENT, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def order(self, word: str) -> None:
        assert self._process.stdin is not None
        print(word, file=self._process.stdin, flush=True)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=PATIENCE_S)


@contextmanager
def client(path: Path, *prefix: str) -> Iterator[Client]:
    made = Client(path, *prefix)
    try:
        yield made
    finally:
        made.kill()


@contextmanager
def device(path: Path) -> Iterator[tuple[Device, Directory]]:
    made = Device(VfioUserTransport.connect(path))
    try:
        assert made.directory is not None
        yield made, made.directory
    finally:
        made.close()


def claim(directory: Directory) -> Claim | None:
    command = directory.claim_nowait(FourTuple(LOOPBACK, 80, LOOPBACK, 40000, 5))
    command.wait()
    return directory.claimed(command)


def test_what_a_process_intends_another_claims_and_the_first_is_told(tmp_path: Path) -> None:
    with manager(tmp_path) as served, device(served.path) as (server, directory):
        directory.publish(LOOPBACK, 80, 5)
        with client(served.path) as one:
            assert one.line() == "1 True"
            claimed = claim(directory)
            assert claimed is not None
            assert claimed.nonce == 77
            assert claim(directory) is None
            assert one.line() == f"CLAIMED {server.devid}"
            one.order("wait")
            assert one.line() == "False"
            directory.start_nowait(claimed).expect_ok()
            assert one.line() == f"START {server.devid}"


def test_what_a_process_retracts_nobody_claims(tmp_path: Path) -> None:
    with manager(tmp_path) as served, device(served.path) as (_, directory):
        directory.publish(LOOPBACK, 80, 5)
        with client(served.path) as one:
            assert one.line() == "1 True"
            one.order("retract")
            assert one.line() == "True"
            assert claim(directory) is None


def test_with_a_killed_process_goes_its_intent(tmp_path: Path) -> None:
    with manager(tmp_path) as served, device(served.path) as (_, directory):
        directory.publish(LOOPBACK, 80, 5)
        with client(served.path) as one:
            assert one.line() == "1 True"
        deadline = time.monotonic() + PATIENCE_S
        while True:  # its four-tuple is refused to others until the manager has read that it is gone
            assert time.monotonic() < deadline, "the intent of a dead process is still there"
            try:
                assert directory.intend(FourTuple(LOOPBACK, 40000, LOOPBACK, 80, 5), 78)
                break
            except DeviceError:
                pass
        claimed = claim(directory)
        assert claimed is not None
        assert claimed.nonce == 78


@pytest.mark.parametrize("shared", [True, False])
def test_loopback_is_another_place_in_another_network_namespace(tmp_path: Path, shared: bool) -> None:
    prefix = [] if shared else ["unshare", "--map-root-user", "--net"]
    if not shared and (
        shutil.which("unshare") is None
        or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("this user cannot make network namespaces with unshare")
    with manager(tmp_path) as served, device(served.path) as (_, directory):
        directory.publish(LOOPBACK, 80, 5)  # both give their namespace the same name, as a liar would
        with client(served.path, *prefix) as one:
            assert one.line() == ("1 True" if shared else "0 False")


# -- kill -9


@pytest.mark.parametrize(
    ("what", "when", "acknowledged", "told"),
    [
        ("ack", "before", False, False),
        ("ack", "after", True, False),
        ("event", "before", True, False),
        ("event", "after", True, True),
    ],
)
def test_at_whatever_step_the_manager_dies_the_server_knows_what_the_client_knows(
    tmp_path: Path, what: str, when: str, acknowledged: bool, told: bool
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", MORTAL_MANAGER, str(tmp_path), what, when], stdout=subprocess.PIPE, text=True
    ) as served:
        assert served.stdout is not None
        assert served.stdout.readline() == "ready\n"
        path = device_socket(tmp_path)
        with device(path) as (client, one), device(path) as (_, two):
            two.publish(THERE, 80, 0)
            events: list[EventType] = []
            one.listen(77, lambda kind, devid: events.append(kind))
            assert one.intend(FourTuple(HERE, 40000, THERE, 80, 0), 77)
            command = two.claim_nowait(FourTuple(THERE, 80, HERE, 40000, 0))
            finished = threading.Event()
            command.then(finished.set)
            assert finished.wait(PATIENCE_S)
            if acknowledged:
                assert two.claimed(command) == Claim(77, client.devid)
            else:
                with pytest.raises(DeviceGoneError):
                    two.claimed(command)
            with pytest.raises(DeviceGoneError):
                one.retract(77)
            in_service = threading.Event()
            if client.service.soon(in_service.set):  # behind the client's own last look
                assert in_service.wait(PATIENCE_S)
            assert events == [EventType.CLAIMED] * told


class Race:
    """One device intends, and retracts some; another claims; the manager is killed when so many claims are made."""

    def __init__(self, served: ManagerProcess, client: Device, server: Device, kill_after: int, seed: int) -> None:
        self._served, self._kill_after = served, kill_after
        assert client.directory is not None
        assert server.directory is not None
        self.client, self.server = client.directory, server.directory
        self.server.publish(THERE, 80, 0)
        self._random = random.Random(seed)
        self._todo: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.told: set[int] = set()
        self.intents: dict[int, Command] = {}
        self.retracts: dict[int, Command] = {}
        self.claims: dict[int, Command] = {}
        self._claimed = 0

    def intend_and_retract(self) -> None:
        try:
            for nonce in range(1, 60000):
                self.client.listen(nonce, lambda kind, devid, nonce=nonce: self._on_event(kind, nonce))
                connection = FourTuple(HERE, nonce, THERE, 80, 0)
                self.intents[nonce] = self.client.intend_nowait(connection, nonce)
                self._todo.put(nonce)
                if self._random.random() < 0.5:
                    self.retracts[nonce] = self.client.retract_nowait(nonce)
                if nonce % 16 == 0:
                    self.intents[nonce].wait()
        except DeviceGoneError:
            pass
        finally:
            self._todo.put(None)

    def _on_event(self, kind: EventType, nonce: int) -> None:
        assert kind is EventType.CLAIMED
        self.told.add(nonce)

    def claim(self) -> None:
        while (nonce := self._todo.get(timeout=PATIENCE_S)) is not None:
            try:
                command = self.server.claim_nowait(FourTuple(THERE, 80, HERE, nonce, 0))
            except DeviceGoneError:
                continue
            self.claims[nonce] = command
            command.then(lambda command=command: self._on_claim(command))

    def _on_claim(self, command: Command) -> None:
        if command.reply[:1] == b"\0":
            self._claimed += 1
            if self._claimed == self._kill_after:
                self._served.send(signal.SIGKILL)

    def outcome(self, read: object, command: Command | None) -> object:
        """What a command came to: the answer, or None when there is none."""
        if command is None:
            return None
        finished = threading.Event()
        command.then(finished.set)
        assert finished.wait(PATIENCE_S)
        try:
            return read(command)  # type: ignore[operator]
        except IsmError:
            return None


@pytest.mark.parametrize("kill_after", [1, 5, 20, 77, 300])
def test_a_killed_manager_has_told_no_client_of_a_claim_that_the_server_does_not_know_of(
    tmp_path: Path, kill_after: int
) -> None:
    with manager(tmp_path) as served, device(served.path) as (one, _), device(served.path) as (two, _):
        race = Race(served, one, two, kill_after, seed=kill_after)
        threads = [threading.Thread(target=call) for call in (race.intend_and_retract, race.claim)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        acknowledged, retracted = set(), set()
        for nonce in race.intents:
            if race.outcome(race.server.claimed, race.claims.get(nonce)):
                acknowledged.add(nonce)
            if race.outcome(race.client.retracted, race.retracts.get(nonce)):
                retracted.add(nonce)
        assert len(acknowledged) >= kill_after
        assert one.gone is not None  # its last look is over: its commands are done
        assert race.told <= acknowledged
        assert not retracted & acknowledged
        confirmed = {nonce for nonce, command in race.retracts.items() if command.reply[:1] == b"\2"}
        refused = {nonce for nonce, command in race.intents.items() if command.reply[:1] != b"\0"}
        assert confirmed - refused <= acknowledged

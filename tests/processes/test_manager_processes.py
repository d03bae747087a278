# SPDX-License-Identifier: Apache-2.0
"""A manager and its clients as processes: kill -9, signals, what is left behind, what a reader can do to the owner."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ism.driver.device import Device
from ism.driver.vfio_user import VfioUserTransport
from ism.errors import TransportError
from ism.manager.control import request
from ism.memory import create_memfd, reopen_readonly
from ism.virtio.ism_spec import Permission

pytestmark = pytest.mark.processes

LIMIT_S = 30
MANAGER = """
import sys
from pathlib import Path
import trio
from ism.manager.config import default_config
from ism.manager.server import run_manager
assert not {"numba", "ism.smc", "ism.shm"} & set(sys.modules), "the manager must not need them"
directory = Path(sys.argv[1])
class Ready:
    def started(self, manager):
        print("ready", flush=True)
trio.run(lambda: run_manager(default_config(directory), directory, task_status=Ready()))
"""
CLIENT = """
import sys
from ism.driver.device import Device
from ism.driver.vfio_user import VfioUserTransport
from ism.virtio.ism_spec import Permission
device = Device(VfioUserTransport.connect(sys.argv[1]))
rights = Permission.READ | Permission.WRITE | Permission.ATTACH
if len(sys.argv) > 2:
    region = device.attach(int(sys.argv[2]), interrupt=True)
else:
    region = device.alloc(1 << 20, grants=[(rights, None)])
print(region.token, flush=True)
sys.stdin.read()
"""
READER = """
import ctypes, errno, fcntl, mmap, os, sys
fd = int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
SIZE = 4096
def refused(name, call):
    try:
        result = call()
    except OSError as error:
        print(name, errno.errorcode[error.errno])
        return
    print(name, "DONE", result)
def checked(result):
    if result in (-1, ctypes.c_void_p(-1).value):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
address = checked(libc.mmap(None, SIZE, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0))
print("read", ctypes.string_at(address, 5).decode())
protect = lambda: checked(libc.mprotect(ctypes.c_void_p(address), SIZE, mmap.PROT_READ | mmap.PROT_WRITE))
both = mmap.PROT_READ | mmap.PROT_WRITE
refused("mprotect", protect)
refused("map", lambda: checked(libc.mmap(None, SIZE, both, mmap.MAP_SHARED, fd, 0)))
refused("write", lambda: os.write(fd, b"x"))
again = fd
try:
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    print("reopen DONE")
except OSError as error:
    print("reopen", errno.errorcode[error.errno])
refused("map again", lambda: checked(libc.mmap(None, SIZE, both, mmap.MAP_SHARED, again, 0)))
refused("write again", lambda: os.write(again, b"x"))
refused("pwrite again", lambda: os.pwrite(again, b"x", 0))
refused("ftruncate", lambda: os.ftruncate(again, 0))
refused("grow", lambda: os.ftruncate(again, 1 << 20))
refused("punch", lambda: checked(libc.fallocate(again, 3, ctypes.c_long(0), ctypes.c_long(SIZE))))
refused("truncating open", lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_TRUNC))
private = checked(libc.mmap(None, SIZE, both, mmap.MAP_PRIVATE, fd, 0))
ctypes.memmove(private, b"12345", 5)
print("private DONE")
"""


@contextmanager
def process(code: str, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run Python code as a process; killed and reaped at the end, whatever happened."""
    started = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait(LIMIT_S)
        assert started.stdin is not None
        assert started.stdout is not None
        started.stdin.close()
        started.stdout.close()


@contextmanager
def manager(directory: Path) -> Iterator[subprocess.Popen[str]]:
    with process(MANAGER, str(directory)) as started:
        assert line(started) == "ready"
        yield started


def line(started: subprocess.Popen[str]) -> str:
    assert started.stdout is not None
    text = started.stdout.readline().strip()
    assert text, "the process ended before it said anything"
    return text


def totals(directory: Path) -> dict[str, int]:
    found: dict[str, int] = request(directory / "control.sock", "status")["status"]["totals"]
    return found


def descriptors(pid: int) -> list[str]:
    """List what a process has open, without numbers and without /dev/null, which costs nobody anything."""
    links = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        try:
            links.append(re.sub(r"[0-9]+", "", os.readlink(f"/proc/{pid}/fd/{number}")))
        except FileNotFoundError:
            pass  # closed meanwhile
    return sorted(link for link in links if link != os.devnull)


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


def test_a_killed_client_leaves_nothing_behind_and_its_peer_keeps_the_bytes(tmp_path: Path) -> None:
    with manager(tmp_path) as served:
        path = tmp_path / "device.sock"
        before = descriptors(served.pid)
        with process(CLIENT, str(path)) as owner:
            token = line(owner)
            device = Device(VfioUserTransport.connect(path))
            region = device.attach(int(token))
            region.view[:3] = b"abc"
            with process(CLIENT, str(path), token) as third:
                line(third)
                assert totals(tmp_path)["attachments"] == 2
                third.kill()
                eventually(lambda: totals(tmp_path)["attachments"] == 1)
            owner.kill()
            eventually(lambda: totals(tmp_path)["connected"] == 1)
            assert bytes(region.view[:3]) == b"abc"
            assert totals(tmp_path) == {"devices": 1, "connected": 1, "regions": 1, "attachments": 1, "bytes": 1 << 20}
            region.close()
            eventually(lambda: totals(tmp_path)["regions"] == 0)
            device.close()
        eventually(lambda: not any(totals(tmp_path).values()))
        eventually(lambda: descriptors(served.pid) == before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_manager_cleanly(tmp_path: Path, number: int) -> None:
    with manager(tmp_path) as served, process(CLIENT, str(tmp_path / "device.sock")) as client:
        line(client)
        served.send_signal(number)
        assert served.wait(LIMIT_S) == 0
        assert os.listdir(tmp_path) == []


def test_a_killed_manager_leaves_sockets_that_the_next_one_replaces(tmp_path: Path) -> None:
    with manager(tmp_path) as first:
        first.kill()
        first.wait(LIMIT_S)
        assert sorted(os.listdir(tmp_path)) == ["control.sock", "device.sock", "device.sock.map"]
        with pytest.raises(TransportError):
            VfioUserTransport.connect(tmp_path / "device.sock")
    with manager(tmp_path):
        assert not any(totals(tmp_path).values())


def test_regions_stay_usable_when_the_manager_is_killed(tmp_path: Path) -> None:
    with manager(tmp_path) as served:
        path = tmp_path / "device.sock"
        one, two = Device(VfioUserTransport.connect(path)), Device(VfioUserTransport.connect(path))
        rights = Permission.READ | Permission.WRITE | Permission.ATTACH
        mine = one.alloc(1 << 16, grants=[(rights, two.devid)])
        theirs = two.attach(mine.token)
        served.kill()
        served.wait(LIMIT_S)
        mine.view[:5] = b"still"
        assert bytes(theirs.view[:5]) == b"still"
        eventually(lambda: one.gone and two.gone)
        one.close()
        two.close()


def test_a_reader_cannot_change_the_owners_bytes_whatever_it_tries() -> None:
    """Run as root, file permissions stop nobody: what holds then is the seal, and the mode of the descriptor."""
    fd = create_memfd("region", 4096)
    with mmap.mmap(fd, 4096) as owner:
        owner[:5] = b"owner"
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0x10)
        readonly = reopen_readonly(fd)
        os.set_inheritable(readonly, True)
        try:
            with process(READER, str(readonly), pass_fds=[readonly]) as reader:
                output, _ = reader.communicate(timeout=LIMIT_S)
                assert reader.returncode == 0
        finally:
            os.close(readonly)
            os.close(fd)
        said = dict(text.rsplit(" ", 1) for text in output.splitlines())
        assert said.pop("read") == "owner"
        assert said.pop("private") == "DONE"
        if os.geteuid() == 0:
            assert said["reopen"] == "DONE"
        said.pop("reopen")
        assert len(said) == 10
        assert set(said.values()) <= {"EACCES", "EPERM", "EBADF"}, said
        assert owner[:5] == b"owner"
        owner[:5] = b"still"
        assert owner[:5] == b"still"


def test_what_the_reader_of_a_real_region_was_given_cannot_be_written(tmp_path: Path) -> None:
    """The same, with the descriptor that the manager really sends over the map channel."""
    with manager(tmp_path):
        path = tmp_path / "device.sock"
        owner, reader = Device(VfioUserTransport.connect(path)), Device(VfioUserTransport.connect(path))
        mine = owner.alloc(4096, grants=[(Permission.READ | Permission.ATTACH, None)])
        mine.view[:5] = b"owner"
        handler = reader.transport._channel._handler  # type: ignore[attr-defined]
        original, kept = handler.map, []

        def keep(offset: int, length: int, file_offset: int, rights: int, fd: Any) -> None:
            kept.append(os.dup(fd.fileno()))
            original(offset, length, file_offset, rights, fd)

        handler.map = keep
        theirs = reader.attach(mine.token)
        assert bytes(theirs.view[:5]) == b"owner"
        (number,) = kept
        assert fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(theirs.address), 4096, mmap.PROT_READ | mmap.PROT_WRITE) == -1
        again = os.open(f"/proc/self/fd/{number}", os.O_RDWR)
        for attempt in (
            lambda: mmap.mmap(again, 4096),
            lambda: os.write(again, b"x"),
            lambda: os.ftruncate(again, 0),
            lambda: os.posix_fallocate(again, 0, 1 << 20),
        ):
            with pytest.raises(OSError):
                attempt()
        os.close(again)
        os.close(number)
        assert bytes(theirs.view[:5]) == b"owner"
        owner.close()
        reader.close()

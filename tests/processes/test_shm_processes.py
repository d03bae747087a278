# SPDX-License-Identifier: Apache-2.0
"""Two real processes over memory files and eventfds: sleeps and wakes, streams, and death by kill -9.

The peer process runs this very file. Every wait has a limit, so a lost wake-up fails a test instead of hanging it.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator

import pytest

from ism.memory import PAGE_SIZE, Mapping, create_memfd
from ism.shm import HEADER_BYTES, Endpoint, Flags, RxState

pytestmark = pytest.mark.processes

LIMIT_S = 60
PATTERN = bytes(random.Random(7).randbytes(1 << 16))


class Part:
    """The first `length` bytes of a mapping."""

    def __init__(self, fd: int, length: int, *, write: bool) -> None:
        whole = -(-length // PAGE_SIZE) * PAGE_SIZE
        self.mapping = Mapping(whole)
        self.mapping.place(0, whole, fd, 0, write=write)
        self.address, self.length = self.mapping.address, length


class Side:
    """One process's endpoint with its eventfds. A receiver maps its own region read-only."""

    def __init__(self, ring: int, spin_ns: int, rx: int, tx: int, own_bell: int, peer_bell: int) -> None:
        self.bell = own_bell
        self.end = Endpoint(
            Part(rx, HEADER_BYTES + ring, write=False),
            Part(tx, HEADER_BYTES + ring, write=True),
            doorbell=lambda: os.eventfd_write(peer_bell, 1),
            max_spin_ns=spin_ns,
        )

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.bell)

    def sleep(self) -> None:
        poll = select.poll()
        poll.register(self.bell, select.POLLIN)
        if not poll.poll(LIMIT_S * 1000):
            raise TimeoutError("no doorbell: a wake-up was lost")

    def send_all(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            if sent := self.end.send(rest):
                rest = rest[sent:]
                continue
            self.drain()
            if self.end.park_writer():
                self.sleep()
                self.end.unpark_writer()

    def recv_some(self, limit: int) -> bytes:
        """Up to `limit` bytes; b"" at the end of the stream."""
        while True:
            if data := self.end.recv(limit):
                return data
            if self.end.rx_state() in {RxState.EOF, RxState.ABORTED}:
                return b""
            self.drain()
            if self.end.park_reader():
                self.sleep()
                self.end.unpark_reader()

    def recv_exactly(self, count: int) -> bytes:
        parts = []
        while count:
            parts.append(self.recv_some(count))
            assert parts[-1], "the stream ended early"
            count -= len(parts[-1])
        return b"".join(parts)


class Peer:
    """This process's side, and the process on the other one."""

    def __init__(self, role: str, ring: int, spin_ns: int, *arguments: int) -> None:
        fds = [create_memfd("ring", -(-(HEADER_BYTES + ring) // PAGE_SIZE) * PAGE_SIZE) for _ in range(2)]
        bells = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
        self.side = Side(ring, spin_ns, fds[0], fds[1], bells[0], bells[1])
        self.bells = bells
        theirs = [fds[1], fds[0], bells[1], bells[0]]
        self.process = subprocess.Popen(
            [sys.executable, __file__, role, *map(str, (ring, spin_ns, *theirs, *arguments))],
            pass_fds=theirs,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        for fd in fds:
            os.close(fd)

    def join(self) -> int:
        return self.process.wait(LIMIT_S)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(LIMIT_S)


@contextlib.contextmanager
def peer(role: str, ring: int, spin_ns: int, *arguments: int) -> Iterator[Peer]:
    other = Peer(role, ring, spin_ns, *arguments)
    try:
        yield other
    finally:
        if other.process.poll() is None:
            other.kill()
        for bell in other.bells:
            os.close(bell)


def odd_sizes(seed: int, total: int, largest: int) -> Iterator[int]:
    source = random.Random(seed)
    while total:
        size = min(total, source.choice([1, 3, 7, 63, 64, 65, source.randint(1, largest)]))
        yield size
        total -= size


def stream_of(total: int) -> bytes:
    return (PATTERN * (total // len(PATTERN) + 1))[:total]


# Roles of the peer process -------------------------------------------------------------------------------------------


def role_echo(side: Side, rounds: int, size: int) -> None:
    for _ in range(rounds):
        side.send_all(side.recv_exactly(size))


def role_send(side: Side, total: int, largest: int) -> None:
    data, at = stream_of(total), 0
    for size in odd_sizes(1, total, largest):
        side.send_all(data[at : at + size])
        at += size
    side.end.set_flags(Flags.DONE_WRITING)
    assert side.recv_some(1) == b""


def role_send_forever(side: Side, largest: int) -> None:
    at = 0
    for size in odd_sizes(2, 1 << 60, largest):
        start = at % len(PATTERN)
        side.send_all((PATTERN * 6)[start : start + size])
        at += size


def role_exchange(side: Side, total: int) -> None:
    """Send and receive `total` bytes at once, with both sides asleep on the one eventfd whenever both must wait."""
    data, got = stream_of(total), bytearray()
    sent = 0
    while sent < total or len(got) < total:
        before = sent, len(got)
        if sent < total:
            sent += side.end.send(memoryview(data)[sent : sent + 97], wait=False)
        if len(got) < total:
            got += side.end.recv(89, wait=False) or b""
        if before != (sent, len(got)):
            continue
        side.drain()
        asleep = [
            sent == total or side.end.park_writer(),
            len(got) == total or side.end.park_reader(),
        ]
        if all(asleep):
            side.sleep()
        side.end.unpark_writer()
        side.end.unpark_reader()
    assert got == data
    side.end.set_flags(Flags.DONE_WRITING)
    assert side.recv_some(1) == b""


# Tests ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", [1, 61504])
def test_no_wakeup_is_lost_in_thousands_of_sleeps(ring: int) -> None:
    rounds = 5000
    with peer("echo", ring, 0, rounds, 5) as other:
        for number in range(rounds):
            message = number.to_bytes(5, "little")
            other.side.send_all(message)
            assert other.side.recv_exactly(5) == message
        assert other.join() == 0


@pytest.mark.parametrize("spin_ns", [0, 20_000])
@pytest.mark.parametrize(("ring", "total"), [(5, 20_000), (4097, 2_000_000), (1 << 20, 60_000_000)])
def test_a_stream_of_odd_sizes_arrives_whole_and_ends(ring: int, total: int, spin_ns: int) -> None:
    with peer("send", ring, spin_ns, total, 3 * ring) as other:
        checksum, received = 0, 0
        sizes = random.Random(3)
        while data := other.side.recv_some(sizes.randint(1, 2 * ring)):
            checksum, received = zlib.crc32(data, checksum), received + len(data)
        other.side.end.set_flags(Flags.DONE_WRITING)
        assert (received, checksum) == (total, zlib.crc32(stream_of(total)))
        assert other.join() == 0


@pytest.mark.parametrize("ring", [13, 1000])
def test_reader_and_writer_can_sleep_on_one_eventfd(ring: int) -> None:
    total = 2000 * ring
    with peer("exchange", ring, 0, total) as other:
        role_exchange(other.side, total)
        assert other.join() == 0


@pytest.mark.parametrize("seed", range(6))
def test_what_a_killed_sender_published_is_still_whole(seed: int) -> None:
    with peer("send_forever", 100_003, 0, 300_000) as other:
        received = 0
        kill_after = random.Random(seed).randint(1, 3_000_000)
        while received < kill_after:
            received += check_pattern(other.side.recv_some(70_000), received)
        other.kill()
        while data := other.side.end.recv(1 << 20):
            received += check_pattern(data, received)
        assert other.side.end.rx_state() is RxState.EMPTY
        assert other.side.end.park_reader(), "death sets no flag: whoever watches the process must tell"


def check_pattern(data: bytes, at: int) -> int:
    start = at % len(PATTERN)
    assert data == (PATTERN * (len(data) // len(PATTERN) + 2))[start : start + len(data)]
    return len(data)


def test_a_killed_receiver_leaves_the_sender_with_a_full_ring_and_no_error() -> None:
    with peer("echo", 10_000, 0, 1_000_000, 64) as other:
        for _ in range(100):
            other.side.send_all(bytes(64))
            other.side.recv_exactly(64)
        other.kill()
        while other.side.end.send(bytes(1000)):
            pass
        assert other.side.end.park_writer()
        assert other.side.end.writable_bytes() == 0


ROLES = {
    "echo": role_echo,
    "send": role_send,
    "send_forever": role_send_forever,
    "exchange": role_exchange,
}

if __name__ == "__main__":
    role, (ring, spin, rx, tx, own, other_bell, *rest) = sys.argv[1], map(int, sys.argv[2:])
    ROLES[role](Side(ring, spin, rx, tx, own, other_bell), *rest)

# SPDX-License-Identifier: Apache-2.0
"""How fast is the bare ring between two processes: round trip, message rate, throughput?

Two processes, two regions, plain `Endpoint` calls from Python; no sockets, no event loop. Peers stay awake as long as
the adaptive spin allows and park on eventfds otherwise. Throughput ends when the receiver has acknowledged the last
byte, and is set against one thread's memcpy of the same message size in the same run. CPU is user plus system time of
both processes.
"""

from __future__ import annotations

import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from harness import PEER, cpus_of, pin_option, run, table

from ism.memory import PAGE_SIZE, Mapping, create_memfd
from ism.perf import plots
from ism.shm import HEADER_BYTES, MAX_SPIN_NS, Endpoint, compile_kernels

RING_BYTES = (1 << 20) - HEADER_BYTES


class Side:
    """One process's end of the connection."""

    def __init__(self, rx: int, tx: int, bell: int, peer_bell: int, spin_ns: int) -> None:
        self.bell = bell
        self.rung = self.slept = 0
        regions = [Mapping(HEADER_BYTES + RING_BYTES) for _ in range(2)]
        for region, fd in zip(regions, (rx, tx), strict=True):
            region.place(0, region.length, fd, 0)

        def ring() -> None:
            self.rung += 1
            os.eventfd_write(peer_bell, 1)

        self.end = Endpoint(*regions, doorbell=ring, max_spin_ns=spin_ns)
        self.poll = select.poll()
        self.poll.register(bell, select.POLLIN)

    def sleep(self) -> None:
        self.slept += 1
        if not self.poll.poll(30_000):
            raise TimeoutError("the peer process does not answer")

    def drain(self) -> None:
        try:
            os.eventfd_read(self.bell)
        except BlockingIOError:
            pass

    def recv_into(self, buffer: memoryview) -> int:
        while not (count := self.end.recv_into(buffer)):
            self.drain()
            if self.end.park_reader():
                self.sleep()
                self.end.unpark_reader()
        return count

    def recv_exactly(self, buffer: memoryview) -> None:
        got = 0
        while got < len(buffer):
            got += self.recv_into(buffer[got:] if got else buffer)

    def send_all(self, data: memoryview) -> None:
        sent = self.end.send(data)
        while sent < len(data):
            if count := self.end.send(data[sent:]):
                sent += count
                continue
            self.drain()
            if self.end.park_writer():
                self.sleep()
                self.end.unpark_writer()


def peer_echo(side: Side, rounds: int, size: int) -> None:
    buffer = memoryview(bytearray(size))
    for _ in range(rounds):
        side.recv_exactly(buffer)
        side.send_all(buffer)


def peer_sink(side: Side, rounds: int, size: int) -> None:
    buffer = memoryview(bytearray(size))
    left, cpu_ns = rounds * size, time.process_time_ns()
    while left:
        left -= side.recv_into(buffer[: min(size, left)] if left < size else buffer)
    side.send_all(memoryview((time.process_time_ns() - cpu_ns).to_bytes(8, "little")))


PEERS: dict[str, Callable[[Side, int, int], None]] = {"echo": peer_echo, "sink": peer_sink}


class Connection:
    """A `Side` in this process and a child that plays the other one."""

    def __init__(self, role: str, rounds: int, size: int, *, spin_ns: int, cpus: tuple[int, int] | None) -> None:
        fds = [create_memfd("bench", -(-(HEADER_BYTES + RING_BYTES) // PAGE_SIZE) * PAGE_SIZE) for _ in range(2)]
        self.bells = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
        passed = [fds[1], fds[0], self.bells[1], self.bells[0]]
        arguments = [role, rounds, size, spin_ns, -1 if cpus is None else cpus[1], *passed]
        ready, child_ready = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, __file__, PEER, *map(str, arguments), str(child_ready)],
            pass_fds=[*passed, child_ready],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        os.close(child_ready)
        if cpus is not None:
            os.sched_setaffinity(0, {cpus[0]})
        self.side = Side(fds[0], fds[1], self.bells[0], self.bells[1], spin_ns)
        os.read(ready, 1)
        for fd in (*fds, ready):
            os.close(fd)

    def finish(self) -> None:
        """Wait for the child."""
        self.process.wait(30)
        for bell in self.bells:
            os.close(bell)


def round_trips(rounds: int, size: int, *, spin_ns: int, cpus: tuple[int, int] | None) -> dict[str, float]:
    """Median and 99th percentile in us, and the share of round trips in which this side slept."""
    connection = Connection("echo", rounds, size, spin_ns=spin_ns, cpus=cpus)
    side, data = connection.side, memoryview(bytes(size))
    buffer, times = memoryview(bytearray(size)), []
    clock = time.perf_counter_ns
    for _ in range(rounds):
        start = clock()
        side.send_all(data)
        side.recv_exactly(buffer)
        times.append(clock() - start)
    connection.finish()
    times = sorted(times[rounds // 10 :])
    return {
        "p50_us": statistics.median(times) / 1e3,
        "p99_us": times[len(times) * 99 // 100] / 1e3,
        "slept": side.slept / rounds,
    }


def stream(rounds: int, size: int, *, spin_ns: int, cpus: tuple[int, int] | None) -> dict[str, float]:
    """Messages and bytes per second until the receiver has acknowledged all, and CPU seconds of both per GB."""
    connection = Connection("sink", rounds, size, spin_ns=spin_ns, cpus=cpus)
    side, data, acknowledgement = connection.side, memoryview(bytes(size)), memoryview(bytearray(8))
    cpu_ns, start = time.process_time_ns(), time.perf_counter()
    for _ in range(rounds):
        side.send_all(data)
    side.recv_exactly(acknowledgement)
    elapsed = time.perf_counter() - start
    cpu_ns = time.process_time_ns() - cpu_ns + int.from_bytes(acknowledgement, "little")
    connection.finish()
    total = rounds * size
    return {"kmsg_s": rounds / elapsed / 1e3, "GB_s": total / elapsed / 1e9, "cpu_s_per_GB": cpu_ns / total}


def memcpy_gb_s(size: int, total: int) -> float:
    source, target = memoryview(bytes(size)), memoryview(bytearray(size))
    rounds = max(1, total // size)
    start = time.perf_counter()
    for _ in range(rounds):
        target[:] = source
    return rounds * size / (time.perf_counter() - start) / 1e9


Sampler = Callable[[], dict[str, float]]


def interleaved(repeats: int, samplers: dict[str, Sampler]) -> dict[str, dict[str, float]]:
    """Take every sample in turn, `repeats` times; the medians of every figure."""
    rounds = [{name: sample() for name, sample in samplers.items()} for _ in range(repeats)]
    return {
        name: {key: statistics.median(row[name][key] for row in rounds) for key in rounds[0][name]} for name in samplers
    }


def show(title: str, figures: dict[str, dict[str, float]]) -> None:
    """Print one line per row."""
    columns = list(dict.fromkeys(key for row in figures.values() for key in row))
    rows = [[name, *(f"{row[key]:.3f}" if key in row else "" for key in columns)] for name, row in figures.items()]
    table(title, ("", *columns), rows)


def body(quick: bool, *, pin: bool) -> dict[str, dict[str, float]]:
    """Measure everything in turn and print the table."""
    compile_kernels(print)
    cpus = cpus_of(pin)
    scale, repeats = (100, 1) if quick else (1, 5)
    spin = MAX_SPIN_NS
    figures = interleaved(
        repeats,
        {
            "round trip 64 B": lambda: round_trips(100_000 // scale, 64, spin_ns=spin, cpus=cpus),
            "stream 64 B": lambda: stream(2_000_000 // scale, 64, spin_ns=spin, cpus=cpus),
            "stream 64 KiB": lambda: stream(100_000 // scale, 1 << 16, spin_ns=spin, cpus=cpus),
            "stream 1 MiB": lambda: stream(6_000 // scale, 1 << 20, spin_ns=spin, cpus=cpus),
            "memcpy 64 KiB": lambda: {"GB_s": memcpy_gb_s(1 << 16, (4 << 30) // scale)},
            "memcpy 1 MiB": lambda: {"GB_s": memcpy_gb_s(1 << 20, (4 << 30) // scale)},
        },
    )
    show("the bare ring between two processes", figures)
    return figures


def chart(figures: dict[str, dict[str, float]], path: str) -> None:
    """The throughputs."""
    bars = {name: row["GB_s"] for name, row in figures.items() if "GB_s" in row}
    plots.bar_chart(path, "The bare ring between two processes", "GB/s, median", "", {"GB/s": bars})


def run_peer(arguments: list[str]) -> None:
    role = PEERS[arguments[0]]
    rounds, size, spin_ns, cpu, rx, tx, bell, peer_bell, ready = map(int, arguments[1:])
    if cpu >= 0:
        os.sched_setaffinity(0, {cpu})
    side = Side(rx, tx, bell, peer_bell, spin_ns)
    os.write(ready, b"r")
    os.close(ready)
    role(side, rounds, size)


if __name__ == "__main__":
    if sys.argv[1:2] == [PEER]:
        run_peer(sys.argv[2:])
    else:
        run(__doc__ or "", body, chart, more=pin_option)

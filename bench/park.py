# SPDX-License-Identifier: Apache-2.0
"""What does a sleep cost: the round trip when both ends park on their eventfds each time?

The ring with spin 0, so that every receive parks, against a bare eventfd ping-pong (the floor: two wake-ups and
nothing else) and a blocking TCP connection over loopback, all between two processes in one run, interleaved. Two
processes on one CPU wake each other ten times faster than on two: without `--pin` the scheduler's placement decides
what is measured.
"""

from __future__ import annotations

import os
import socket
import statistics
import time

from harness import cpus_of, pin_option, run
from ring import interleaved, round_trips, show

from ism.perf import plots
from ism.shm import compile_kernels

MESSAGE = bytes(64)


def eventfd_round_trips(rounds: int, *, cpus: tuple[int, int] | None) -> dict[str, float]:
    """Two eventfds, blocking reads, one child process."""
    there, back = os.eventfd(0), os.eventfd(0)
    child = os.fork()
    if child == 0:
        if cpus is not None:
            os.sched_setaffinity(0, {cpus[1]})
        for _ in range(rounds):
            os.eventfd_read(there)
            os.eventfd_write(back, 1)
        os._exit(0)
    times = []
    for _ in range(rounds):
        start = time.perf_counter_ns()
        os.eventfd_write(there, 1)
        os.eventfd_read(back)
        times.append(time.perf_counter_ns() - start)
    os.waitpid(child, 0)
    os.close(there)
    os.close(back)
    return _summary(times)


def tcp_round_trips(rounds: int, *, cpus: tuple[int, int] | None) -> dict[str, float]:
    """Blocking loopback TCP without Nagle's delay, one child process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        child = os.fork()
        if child == 0:
            if cpus is not None:
                os.sched_setaffinity(0, {cpus[1]})
            with socket.create_connection(server.getsockname()) as peer:
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for _ in range(rounds):
                    peer.sendall(peer.recv(64, socket.MSG_WAITALL))
            os._exit(0)
        connection, _ = server.accept()
    times = []
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(rounds):
            start = time.perf_counter_ns()
            connection.sendall(MESSAGE)
            connection.recv(64, socket.MSG_WAITALL)
            times.append(time.perf_counter_ns() - start)
    os.waitpid(child, 0)
    return _summary(times)


def _summary(times: list[int]) -> dict[str, float]:
    kept = sorted(times[len(times) // 10 :])
    return {"p50_us": statistics.median(kept) / 1e3, "p99_us": kept[len(kept) * 99 // 100] / 1e3}


def body(quick: bool, *, pin: bool) -> dict[str, dict[str, float]]:
    """Measure all three in turn and print the table."""
    compile_kernels(print)
    cpus = cpus_of(pin)
    rounds, repeats = (500, 1) if quick else (20_000, 5)
    figures = interleaved(
        repeats,
        {
            "ring, parked": lambda: round_trips(rounds, 64, spin_ns=0, cpus=cpus),
            "eventfd": lambda: eventfd_round_trips(rounds, cpus=cpus),
            "blocking TCP": lambda: tcp_round_trips(rounds, cpus=cpus),
        },
    )
    show("round trip of two sleepers", figures)
    return figures


def chart(figures: dict[str, dict[str, float]], path: str) -> None:
    """One bar each."""
    bars = {key: {name: row[f"{key}_us"] for name, row in figures.items()} for key in ("p50", "p99")}
    plots.bar_chart(path, "Round trip of two sleepers", "microseconds", "", bars)


if __name__ == "__main__":
    run(__doc__ or "", body, chart, more=pin_option)

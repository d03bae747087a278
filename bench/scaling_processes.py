# SPDX-License-Identifier: Apache-2.0
"""How do costs grow with the number of processes that talk to one server: set-up, message rate, the manager's share?

One server process with blocking sockets, a thread for each client. 1, 2, 4 ... client processes, each with a device and
a connection of its own, exchange small messages with it, all at the same time. Counted are what one process more costs
(its device, its connection, the first byte), how many messages all of them exchange a second, and what the manager uses
of processor and memory: on the data path it has no part, so it should be idle however many talk. The same over TCP is
the scale for the rates: more processes than processors share these.
"""

from __future__ import annotations

import argparse
import os
import socket as std
import statistics
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import growth
from harness import PEER, Figures, answer, manager, peer, run

from ism.perf import plots
from ism.shm import compile_kernels
from ism.smc import blocking
from ism.smc.default import close_default, open_default

_MESSAGE = 64
_MAKE: dict[str, Callable[..., Any]] = {"smc": blocking.create_connection, "tcp": std.create_connection}


# -- the server ------------------------------------------------------------------------------------------------------


def far() -> None:
    """Echo, over both transports, a thread a connection."""
    growth.raise_descriptor_limit()
    listeners = {"smc": blocking.create_server(("127.0.0.1", 0)), "tcp": std.create_server(("127.0.0.1", 0))}
    for listener in listeners.values():
        listener.listen(256)
        threading.Thread(target=_accept, args=(listener,), daemon=True).start()
    answer({name: listener.getsockname()[1] for name, listener in listeners.items()}, {})


def _accept(listener: Any) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_echo, args=(connection,), daemon=True).start()


def _echo(connection: Any) -> None:
    with connection:
        connection.setsockopt(std.IPPROTO_TCP, std.TCP_NODELAY, 1)
        while data := connection.recv(4096):
            connection.sendall(data)


# -- a client --------------------------------------------------------------------------------------------------------


def client(orders: Connection, ports: dict[str, int]) -> None:
    """A process that connects, and exchanges messages when it is told to."""
    began = time.perf_counter()
    open_default()
    lines = {name: _MAKE[name](("127.0.0.1", ports[name])) for name in ports}
    for line in lines.values():
        line.setsockopt(std.IPPROTO_TCP, std.TCP_NODELAY, 1)
        line.sendall(b"x")
        line.recv(1)
    mode = lines["smc"].smc_info().mode
    orders.send((time.perf_counter() - began, mode))
    message = bytes(_MESSAGE)
    while order := orders.recv():
        name, seconds = order
        line, count = lines[name], 0
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            line.sendall(message)
            left = _MESSAGE
            while left:
                left -= len(line.recv(left))
            count += 1
        orders.send(count)
    for line in lines.values():
        line.close()
    close_default()


class Clients:
    """The client processes, which are forked from this one: it has the kernels loaded and no device open."""

    def __init__(self, ports: dict[str, int]) -> None:
        self._ports, self._fork = ports, get_context("fork")
        self._processes: list[tuple[Any, Connection]] = []

    def up_to(self, count: int) -> list[float]:
        """Start processes, one by one, until there are so many. Returns the seconds that each took to connect."""
        times = []
        while len(self._processes) < count:
            mine, theirs = self._fork.Pipe()
            process = self._fork.Process(target=client, args=(theirs, self._ports))
            process.start()
            theirs.close()
            self._processes.append((process, mine))
            took, mode = mine.recv()
            if mode != "SMC":
                raise SystemExit(f"a client's connection uses {mode}")
            times.append(took)
        return times

    def exchange(self, transport: str, seconds: float) -> float:
        """Have all of them exchange messages. Returns how many a second all together."""
        for _, orders in self._processes:
            orders.send((transport, seconds))
        return sum(orders.recv() for _, orders in self._processes) / seconds

    def close(self) -> None:
        """End them."""
        for _, orders in self._processes:
            orders.send(None)
        for process, orders in self._processes:
            process.join(20)
            if process.is_alive():
                process.kill()
            orders.close()


_SHOWN = {
    "one process more": ("set-up us", "manager's work for it us", "manager KiB", "manager fds", "server KiB"),
    "all exchange messages": ("smc messages/s", "tcp messages/s", "manager %", "smc server %", "tcp server %"),
}


def body(quick: bool, *, most: int) -> Figures:
    """Start processes up to the largest number, stopping at each."""
    growth.raise_descriptor_limit()
    compile_kernels(print)
    numbers = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= (4 if quick else most)]
    seconds, rounds = (0.1, 1) if quick else (1.0, 3)
    costs: dict[str, dict[int, float]] = {name: {} for names in _SHOWN.values() for name in names}
    with manager() as host, peer(__file__) as server:
        clients = Clients(server.hello)
        try:
            there, before = 0, growth.use_of(host.pid)
            server_before = growth.use_of(server.pid)
            for n in numbers:
                cpu_s = growth.cpu_s(host.pid)
                costs["set-up us"][n] = statistics.median(clients.up_to(n)) * 1e6
                costs["manager's work for it us"][n] = (growth.cpu_s(host.pid) - cpu_s) / (n - there) * 1e6
                there = n
                _rates(clients, n, seconds, rounds, host.pid, server.pid, costs)
                use = growth.use_of(host.pid)
                costs["manager KiB"][n] = (use.private_bytes - before.private_bytes) / 1024
                costs["manager fds"][n] = use.fds - before.fds
                costs["server KiB"][n] = (growth.use_of(server.pid).private_bytes - server_before.private_bytes) / 1024
        finally:
            clients.close()
    slopes = {}
    for title, names in _SHOWN.items():
        chosen = {name: costs[name] for name in names}
        slopes |= growth.show(f"{title}, by number of processes", "n", chosen, least=2)
    return {"n": numbers, "processors": os.cpu_count(), "costs": costs, "exponents": slopes}


def _rates(
    clients: Clients, n: int, seconds: float, rounds: int, manager_pid: int, server_pid: int, costs: dict[str, Any]
) -> None:
    """Let all exchange messages over both transports in turn."""
    rates: dict[str, list[float]] = {name: [] for name in _MAKE}
    shares: dict[str, list[float]] = {name: [] for name in ("manager", *_MAKE)}
    for _ in range(rounds):
        for name in _MAKE:
            before, server_before = growth.cpu_s(manager_pid), growth.cpu_s(server_pid)
            rates[name].append(clients.exchange(name, seconds))
            shares[name].append(100 * (growth.cpu_s(server_pid) - server_before) / seconds)
            if name == "smc":
                shares["manager"].append(100 * (growth.cpu_s(manager_pid) - before) / seconds)
    for name in _MAKE:
        costs[f"{name} messages/s"][n] = statistics.median(rates[name])
        costs[f"{name} server %"][n] = statistics.median(shares[name])
    costs["manager %"][n] = statistics.median(shares["manager"])


def chart(figures: Figures, path: str) -> None:
    """The rates of both transports."""
    names = ("smc messages/s", "tcp messages/s")
    lines = {name[:3]: [(float(n), rate) for n, rate in sorted(figures["costs"][name].items())] for name in names}
    title = "Round trips of many processes with one server"
    plots.line_chart(path, title, "client processes", "round trips a second, all together", lines)


def options_of(parser: argparse.ArgumentParser) -> None:
    """Add --most."""
    parser.add_argument("--most", type=int, default=64, metavar="N", help="how many processes at last (64)")


if __name__ == "__main__":
    if sys.argv[1:2] == [PEER]:
        far()
    else:
        run(__doc__ or "", body, chart, more=options_of)

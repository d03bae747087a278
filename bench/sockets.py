# SPDX-License-Identifier: Apache-2.0
"""What do drop-in sockets cost and gain: connection set-up, fallback, round trip, stream, against blocking TCP?

Two processes and blocking calls. The far end serves one echo loop over sockets of `ism.smc.blocking` and one over the
standard library's; this end connects to either with either class. Rounds of the cases in turn, ratios round by round.
"""

from __future__ import annotations

import json
import os
import socket as std
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import manager, run, table

from ism.smc import blocking

CASES = ("smc", "tcp", "fallback")
"""Shared memory on both ends; the standard library on both; our class with a plain server."""
_MESSAGE, _BLOCK = 64, 65536


# -- the far end -----------------------------------------------------------------------------------------------------


def far() -> None:
    """Serve until standard input ends; a line there is answered with the CPU seconds used."""
    listeners = {"smc": blocking.create_server(("127.0.0.1", 0)), "tcp": std.create_server(("127.0.0.1", 0))}
    for listener in listeners.values():
        threading.Thread(target=_accept, args=(listener,), daemon=True).start()
    print(json.dumps({name: listener.getsockname()[1] for name, listener in listeners.items()}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(time.process_time()), flush=True)


def _accept(listener: Any) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            _serve(connection)


def _serve(connection: Any) -> None:
    """Echo what comes, or after 'S' count so many bytes and then say so."""
    view = memoryview(bytearray(_BLOCK))
    first = connection.recv(9)
    if first[:1] == b"S":
        left = int.from_bytes(first[1:9], "little")
        while left > 0 and (count := connection.recv_into(view)):
            left -= count
        connection.sendall(b"!")
        return
    connection.sendall(first)
    while data := connection.recv(_BLOCK):
        connection.sendall(data)


# -- the near end ----------------------------------------------------------------------------------------------------


class Far:
    """The process at the far end."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        ports = json.loads(self._line())
        self._ends: dict[str, tuple[Callable[..., Any], int]] = {
            "smc": (blocking.create_connection, ports["smc"]),
            "tcp": (std.create_connection, ports["tcp"]),
            "fallback": (blocking.create_connection, ports["tcp"]),
        }

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def cpu_s(self) -> float:
        """CPU seconds of the far end."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._line())

    def connect(self, case: str) -> Any:
        """Connect as the case says."""
        make, port = self._ends[case]
        return make(("127.0.0.1", port))


def set_up(far_end: Far, case: str, count: int) -> dict[str, float]:
    """Connect, echo one byte, close, again and again."""
    times = []
    start = time.perf_counter()
    for _ in range(count):
        began = time.perf_counter()
        with far_end.connect(case) as connection:
            connection.sendall(b"x")
            connection.recv(1)
            times.append(time.perf_counter() - began)
    return {"first_byte_s": statistics.median(times), "per_s": count / (time.perf_counter() - start)}


def round_trip(far_end: Far, case: str, count: int) -> dict[str, float]:
    """Echo small messages, both ends awake."""
    message, times = bytes(_MESSAGE), []
    with far_end.connect(case) as connection:
        connection.sendall(b"x")
        connection.recv(1)
        for number in range(count + count // 10):
            began = time.perf_counter()
            connection.sendall(message)
            connection.recv(_MESSAGE)
            if number >= count // 10:
                times.append(time.perf_counter() - began)
    times.sort()
    return {"rtt_p50_s": times[len(times) // 2], "rtt_p99_s": times[len(times) * 99 // 100]}


def stream(far_end: Far, case: str, total: int) -> dict[str, float]:
    """Send blocks until the other end has them all."""
    block = bytes(_BLOCK)
    with far_end.connect(case) as connection:
        before = time.process_time() + far_end.cpu_s()
        connection.sendall(b"S" + total.to_bytes(8, "little"))
        start = time.perf_counter()
        for _ in range(total // _BLOCK):
            connection.sendall(block)
        connection.recv(1)
        took = time.perf_counter() - start
        cpu = time.process_time() + far_end.cpu_s() - before
    return {"bytes_per_s": total / took, "cpu_s_per_gb": cpu / (total / 1e9)}


_ROWS = (
    ("connect, accept, first byte echoed, us", "first_byte_s", 1e6, False),
    ("connections a second", "per_s", 1, True),
    ("round trip 64 B p50, us", "rtt_p50_s", 1e6, False),
    ("round trip 64 B p99, us", "rtt_p99_s", 1e6, False),
    ("stream 64 KiB, GB/s", "bytes_per_s", 1e-9, True),
    ("CPU of both ends, s/GB", "cpu_s_per_gb", 1, False),
)


def body(quick: bool) -> dict[str, Any]:
    """Run the rounds and print the table."""
    rounds, connections, pings, total = (1, 10, 50, 1 << 22) if quick else (5, 300, 3000, 1 << 29)
    samples: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parent))
    with manager():
        environment["ISM_DEVICE"] = os.environ["ISM_DEVICE"]
        command = [sys.executable, __file__, "--far"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            far_end = Far(process)
            for case in CASES:
                set_up(far_end, case, 5)
            for number in range(rounds):
                for case in CASES if number % 2 == 0 else CASES[::-1]:
                    samples[case].append(
                        set_up(far_end, case, connections)
                        | round_trip(far_end, case, pings)
                        | stream(far_end, case, total)
                    )
            assert process.stdin is not None
            process.stdin.close()
    rows = []
    figures: dict[str, Any] = {"rounds": samples, "against_tcp": {}}
    for label, name, scale, more in _ROWS:
        cells = [label]
        ratios = {}
        for case in CASES:
            values = [one[name] * scale for one in samples[case]]
            cells.append(f"{statistics.median(values):.4g} ({min(values):.4g}..{max(values):.4g})")
            pairs = zip(samples[case], samples["tcp"], strict=True)
            ratios[case] = statistics.median(
                (ours[name] / tcp[name]) if more else (tcp[name] / ours[name]) for ours, tcp in pairs
            )
        figures["against_tcp"][name] = ratios
        rows.append([*cells, f"{ratios['smc']:.2f}x", f"{ratios['fallback']:.2f}x"])
    table("blocking sockets, two processes", ("", *CASES, "smc/tcp", "fallback/tcp"), rows)
    extra = [
        fallback["first_byte_s"] - tcp["first_byte_s"]
        for fallback, tcp in zip(samples["fallback"], samples["tcp"], strict=True)
    ]
    figures["fallback_extra_s"] = statistics.median(extra)
    print(f"  a fallback connection's first byte comes {statistics.median(extra) * 1e6:.0f} us after plain TCP's")
    return figures


if __name__ == "__main__":
    if sys.argv[1:] == ["--far"]:
        far()
    else:
        run(__doc__ or "", body)

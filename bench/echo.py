# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of blocking sockets share: a far end that echoes or swallows, and three ways to connect to it.

The cases: `smc`, shared memory on both ends; `tcp`, the standard library on both; `fallback`, our class with a plain
server, so TCP in the end.
"""

from __future__ import annotations

import contextlib
import socket as std
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from harness import PEER, Peer, answer, peer, table

from ism.smc import blocking
from ism.smc.default import open_default
from ism.smc.group import release_idle

CASES = ("smc", "tcp", "fallback")
BLOCK = 65536
ECHO, SINK = b"E", b"S"
_HEAD_BYTES = 9


def far() -> None:
    """Serve both kinds of connections, a thread each."""
    listeners = {"smc": blocking.create_server(("127.0.0.1", 0)), "tcp": std.create_server(("127.0.0.1", 0))}
    for listener in listeners.values():
        listener.listen(512)
        threading.Thread(target=_accept, args=(listener,), daemon=True).start()
    hello = {name: listener.getsockname()[1] for name, listener in listeners.items()}
    answer(hello, {"cpu_s": time.process_time, "forget": forget})


def forget() -> bool:
    """Let go of the regions that are kept for later connections."""
    release_idle(open_default())
    return True


def _accept(listener: Any) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_serve, args=(connection,), daemon=True).start()


def _serve(connection: Any) -> None:
    """Echo what comes, or after 'S' count so many bytes and then say so; until the connection or this process ends."""
    with contextlib.suppress(OSError), connection:
        connection.setsockopt(std.IPPROTO_TCP, std.TCP_NODELAY, 1)
        first = connection.recv(_HEAD_BYTES)
        if first[:1] == SINK:
            view = memoryview(bytearray(BLOCK))
            left = int.from_bytes(first[1:], "little")
            while left > 0 and (count := connection.recv_into(view)):
                left -= count
            connection.sendall(b"!")
            return
        while first:
            connection.sendall(first)
            first = connection.recv(BLOCK)


class Ends:
    """The process at the far end, and connections to it."""

    def __init__(self, far_end: Peer) -> None:
        self._peer = far_end
        ports = far_end.hello
        self._ends: Mapping[str, tuple[Callable[..., Any], int]] = {
            "smc": (blocking.create_connection, ports["smc"]),
            "tcp": (std.create_connection, ports["tcp"]),
            "fallback": (blocking.create_connection, ports["tcp"]),
        }

    def connect(self, case: str) -> Any:
        """Connect as the case says; no byte has gone over it yet."""
        make, port = self._ends[case]
        connection = make(("127.0.0.1", port))
        connection.setsockopt(std.IPPROTO_TCP, std.TCP_NODELAY, 1)
        return connection

    def opened(self, case: str) -> Any:
        """Connect, and echo a byte."""
        connection = self.connect(case)
        connection.sendall(ECHO)
        connection.recv(1)
        return connection

    def cpu_s(self) -> float:
        """CPU seconds of both ends."""
        return time.process_time() + float(self._peer.ask("cpu_s"))

    def forget(self) -> None:
        """Have both ends let go of the regions that are kept for later connections."""
        forget()
        self._peer.ask("forget")


@contextmanager
def ends() -> Iterator[Ends]:
    """Run the far end; a manager must be there."""
    with peer(__file__) as far_end:
        found = Ends(far_end)
        for case in CASES:
            for _ in range(3):
                found.opened(case).close()
        with found.opened("smc") as connection:
            mode = connection.smc_info().mode
        if mode != "SMC":
            raise SystemExit(f"the two ends do not use shared memory but {mode}")
        yield found


Samples = Mapping[str, Sequence[Mapping[str, float]]]
"""For each case what was measured in each round."""


def in_turn(rounds: int, cases: Sequence[str], measure: Callable[[str], dict[str, float]]) -> dict[str, Any]:
    """Measure each case once a round, every other round in the opposite order."""
    samples: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
    for number in range(rounds):
        for case in cases if number % 2 == 0 else cases[::-1]:
            samples[case].append(measure(case))
    return samples


def show(title: str, samples: Samples, rows: Sequence[tuple[str, str, float, bool]]) -> dict[str, dict[str, float]]:
    """Print medians, ranges and, round by round, ratios to TCP, above 1 where ours is better; return the ratios.

    Args: `rows`: label, name of the figure, what to multiply it with, whether more is better.
    """
    ours = [case for case in samples if case != "tcp"]
    lines, ratios = [], {}
    for label, name, scale, more in rows:
        cells = [label]
        for values in ([one[name] * scale for one in samples[case]] for case in samples):
            cells.append(f"{statistics.median(values):.4g} ({min(values):.4g}..{max(values):.4g})")
        ratios[name] = {case: _ratio(samples, case, name, more=more) for case in ours}
        lines.append([*cells, *(f"{ratios[name][case]:.2f}x" for case in ours)])
    table(title, ("", *samples, *(f"{case}/tcp" for case in ours)), lines)
    return ratios


def _ratio(samples: Samples, case: str, name: str, *, more: bool) -> float:
    pairs = zip(samples[case], samples["tcp"], strict=True)
    return statistics.median(one[name] / tcp[name] if more else tcp[name] / one[name] for one, tcp in pairs)


def medians(samples: Samples, name: str, scale: float) -> dict[str, float]:
    """The median of one figure by case, as a chart takes it."""
    return {case: statistics.median(one[name] * scale for one in rounds) for case, rounds in samples.items()}


if __name__ == "__main__" and sys.argv[1:2] == [PEER]:
    far()

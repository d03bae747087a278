# SPDX-License-Identifier: Apache-2.0
"""What two kinds of threads of one end share: those that move bytes, and the one that talks and reports.

The moving ones run a function of `on_blocking`, `on_trio`, `on_asyncio` or `on_view`, and only they touch the streams.
They count in `Tally`s, plain integers that the other thread reads whenever it likes. The other one, the program's main
thread, begins, stops and aborts the `Run`, and sleeps on its descriptor until there is news.
"""

from __future__ import annotations

import hashlib
import os
import resource
import socket as std
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from ism.errors import IsmError
from ism.eventfd import drain
from ism.perf.histogram import Histogram
from ism.perf.parameters import Flow, Parameters
from ism.perf.protocol import COOKIE_BYTES, HELLO_BYTES, Way, printable

RECEIVE_BYTES: Final = 1 << 20
"""Largest buffer that is received into at once."""
HELLO_WAIT_S: Final = 15.0
ACCEPT_TICK_S: Final = 0.2
THREAD_TIMER_NS: Final = 200_000
LOOP_TIMER_NS: Final = 1_500_000
"""How much of the wait for the moment of an intended send is done awake: the timers of a thread are late by a part of
that, and those of event loops by up to a millisecond, since epoll counts in these."""
_LONGEST_SLEEP_S: Final = 0.1
_PATTERN: Final = bytes(range(256))


class PerfError(IsmError):
    """A measurement failed: the two ends, or what is between them. The message is one line."""


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU seconds of this process."""

    user_s: float
    system_s: float

    @classmethod
    def now(cls) -> Cpu:
        """Return what was used up to now, by all threads."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return cls(used.ru_utime, used.ru_stime)

    def since(self, before: Cpu) -> Cpu:
        """Return what was used between `before` and this."""
        return Cpu(self.user_s - before.user_s, self.system_s - before.system_s)


class Tally:
    """What one end has counted in one stream.

    Attributes: `flow`; `sends` (this end sends: data, or the requests of round trips); `bytes`; `seconds` (from the
    beginning to the last byte, and its acknowledgement where this end sends); and, where this end measures latency,
    `trips`, `total_ns`, `worst_ns` (since somebody has set it to 0), `histogram`.
    """

    __slots__ = ("bytes", "flow", "histogram", "seconds", "sends", "total_ns", "trips", "worst_ns")

    def __init__(self, flow: Flow, *, sends: bool, histogram: Histogram | None) -> None:
        self.flow, self.sends, self.histogram = flow, sends, histogram
        self.bytes = self.trips = self.total_ns = self.worst_ns = 0
        self.seconds = 0.0

    def trip(self, ns: int, size: int) -> None:
        """Count a round trip."""
        assert self.histogram is not None
        self.histogram.record(ns)
        self.trips += 1
        self.bytes += size
        self.total_ns += ns
        self.worst_ns = max(self.worst_ns, ns)


@dataclass(frozen=True, slots=True)
class Where:
    """Where the server listens for streams: `host` numeric, `port` 0 where a port is to be chosen; `name` (UNIX)."""

    host: str
    port: int
    name: str


class Run:
    """One measurement at one end.

    Attributes: `parameters`, `client`, `cookie`, `tallies`; `stopping` (send no more), `aborted`; what the moving
    threads tell: `port`, `ways` (None before), `done`, `error`; `began_ns`, `fd` (readable when there is news).
    """

    def __init__(self, parameters: Parameters, cookie: bytes, *, client: bool) -> None:
        """Raises FeatureMismatchError: a library that is needed is missing."""
        self.parameters, self.cookie, self.client = parameters, cookie, client
        measures = client and parameters.latency
        self.tallies = [
            Tally(flow, sends=(flow.direction == "out") == client, histogram=Histogram() if measures else None)
            for flow in parameters.flows()
        ]
        self.stopping = self.aborted = self.done = False
        self.port: int | None = None
        self.ways: tuple[Way, ...] | None = None
        self.error: BaseException | None = None
        self.began_ns = 0
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._go = threading.Event()
        self._abort: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._cpu = self._cpu_at_end = Cpu(0.0, 0.0)

    # -- the thread that talks --------------------------------------------------------------------------------------

    def start(self, work: Callable[[Run, Where], None], where: Where) -> None:
        """Open the streams in a thread, and later, when they are to begin, move the bytes."""

        def guarded() -> None:
            try:
                work(self, where)
            except BaseException as exc:  # told to the other thread, whatever it is
                self.error = exc
            self._cpu_at_end = Cpu.now()
            self.done = True
            self.tell()

        self._thread = threading.Thread(target=guarded, name="ism perf", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Let the bytes move."""
        self._cpu = Cpu.now()
        self.began_ns = time.perf_counter_ns()
        self._go.set()

    def seconds(self) -> float:
        """Seconds since the beginning."""
        return (time.perf_counter_ns() - self.began_ns) / 1e9

    def cpu(self) -> Cpu:
        """CPU seconds from the beginning to the end of the last stream."""
        return self._cpu_at_end.since(self._cpu)

    def stop(self) -> None:
        """Send no more; what was sent still arrives."""
        self.stopping = True

    def abort(self) -> None:
        """End it at once, wherever it is, and wait a moment for that."""
        with self._lock:
            self.stopping = self.aborted = True
            self._go.set()
            abort = self._abort
        if abort is not None and not self.done:
            abort()
        if self._thread is not None:
            self._thread.join(2.0)

    def close(self) -> None:
        """Let go of everything."""
        self.abort()
        with self._lock:
            fd, self.fd = self.fd, -1
        os.close(fd)

    def moved(self) -> int:
        """Bytes counted in all streams."""
        return sum(tally.bytes for tally in self.tallies)

    def news(self) -> None:
        """Forget that there was news; the attributes are looked at after this."""
        drain(self.fd)

    def tell(self) -> None:
        """Wake the thread that talks."""
        with self._lock:
            if self.fd >= 0:
                os.eventfd_write(self.fd, 1)

    # -- the threads that move bytes --------------------------------------------------------------------------------

    def on_abort(self, abort: Callable[[], None]) -> None:
        """Have `abort` called, from any thread, when this is to end at once. Raises PerfError if it has by now."""
        with self._lock:
            self._abort = abort
            if self.aborted:
                raise PerfError("aborted")

    def listening(self, port: int) -> None:
        """Tell that streams are accepted from now on."""
        self.port = port
        self.tell()

    def ready(self, ways: list[Way]) -> None:
        """Tell that all streams are open, and how their bytes travel."""
        self.ways = tuple(ways)
        self.tell()

    def wait(self) -> None:
        """Wait for the beginning. Raises PerfError when there is to be none."""
        self._go.wait()
        if self.aborted:
            raise PerfError("aborted")

    def hello(self, tally: Tally) -> bytes:
        """Return what the client sends first in a stream."""
        return self.cookie + bytes([tally.flow.id])

    def greeted(self, hello: bytes) -> int | None:
        """Return the index of the stream that begins with `hello`; None for one of somebody else."""
        index = hello[-1] - 1 if len(hello) == HELLO_BYTES else -1
        return index if hello[:COOKIE_BYTES] == self.cookie and 0 <= index < len(self.tallies) else None

    def block(self) -> bytes:
        """Return what is sent in one write. Of pages of its own: untouched ones would all be the kernel's zero page."""
        length = self.parameters.length
        return (_PATTERN * (length // len(_PATTERN) + 1))[:length]

    def receive_bytes(self) -> int:
        """Return how much to receive at once: a write of the other end, within reason."""
        return min(max(self.parameters.length, 65536), RECEIVE_BYTES)

    def pieces(self, tally: Tally, block: bytes) -> Iterator[bytes]:
        """Give what is to be sent next, until it is enough; each is counted once the next is asked for."""
        size, left = len(block), tally.flow.quota
        if left is None:
            while not self.stopping:
                yield block
                tally.bytes += size
            return
        while left >= size and not self.stopping:
            yield block
            tally.bytes += size
            left -= size
        if 0 < left < size and not self.stopping:
            yield block[:left]
            tally.bytes += left

    def intended(self, tally: Tally) -> Iterator[int]:
        """Give the moment, in ns, at which each round trip is to begin, until it is enough; 0: at once.

        With a rate these moments are fixed in advance. A round trip that begins late because the one before it took
        long has waited by then, and that is part of its latency.
        """
        length, rate = self.parameters.length, self.parameters.rate
        left = None if tally.flow.quota is None else tally.flow.quota // length
        number = 0
        while not self.stopping and (left is None or number < left):
            yield self.began_ns + number * 1_000_000_000 // rate if rate else 0
            number += 1

    def sleep_s(self, moment_ns: int, awake_ns: int = LOOP_TIMER_NS) -> float:
        """Return how long to sleep before the last part, `awake_ns`, of the wait for a moment."""
        return min(max(0, moment_ns - awake_ns - time.perf_counter_ns()) / 1e9, _LONGEST_SLEEP_S)

    def ended(self, tally: Tally) -> None:
        """Note that the last byte of a stream was received, or its acknowledgement."""
        tally.seconds = self.seconds()


def unix_name(cookie: bytes) -> str:
    """Return the (abstract) UNIX address of a test: no file, nothing to clean up, and no other socket of the host."""
    return "\0ism-perf-" + hashlib.sha256(cookie).hexdigest()[:24]


def way_of(sock: Any, info: Any = None) -> Way:
    """Describe a stream.

    Args: `sock`: has `getsockopt` and `family`; `info`: an `ism.smc.Info`, None where there is none.
    """
    if info is not None and info.mode == "SMC":
        return Way("SMC", "", 0, info.receive_buffer, info.send_buffer)
    buffers = [sock.getsockopt(std.SOL_SOCKET, option) for option in (std.SO_RCVBUF, std.SO_SNDBUF)]
    if info is not None:
        return Way(info.mode, printable(info.reason), info.code, *buffers)
    return Way("UNIX" if sock.family == std.AF_UNIX else "TCP", "", 0, *buffers)

# SPDX-License-Identifier: Apache-2.0
"""`ism perf -c`: asks a server for one test, plays its part of it, and reports.

The main thread talks, keeps the time and reports; a thread of the test moves the bytes. While that runs, this one only
reads counters, so that reporting does not disturb what is reported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, Final, TypeVar

from ism.errors import IsmError
from ism.perf.control import OPEN_S, Control, Idle, numeric_host, reason_of, surface, wait
from ism.perf.flows import PerfError, Run, Where, unix_name
from ism.perf.histogram import Histogram
from ism.perf.parameters import Parameters
from ism.perf.protocol import Ask, Busy, Count, Go, Listen, Message, Ready, Result, Stop
from ism.perf.report import (
    Interval,
    Latencies,
    Moved,
    Report,
    Used,
    connected_lines,
    describe,
    interval_header,
    interval_lines,
    total_lines,
)
from ism.perf.server import PROGRAM, Say

_CONNECT_S: Final = 10.0
_ASK_S: Final = 20.0
_END_S: Final = 30.0
_TICK_S: Final = 1.0
_LAST_WORD_S: Final = 0.3
_MERGED_TAIL: Final = 0.2
"""What is left at the end, if it is less than this part of an interval, is no line of its own."""
M = TypeVar("M", bound=Message)


class Client:
    """One test. Attributes: `report`, which holds what is known at any time, also after a failure."""

    def __init__(self, host: str, port: int, parameters: Parameters, *, interval_s: float, say: Say) -> None:
        """Args: `interval_s`: 0 for no intervals; `say`: is given lines as they come."""
        self._host, self._port, self._parameters = host, port, parameters
        self._interval_s, self._say = interval_s, say
        began = datetime.now().astimezone().isoformat(timespec="seconds")
        self.report = Report(
            program=PROGRAM,
            host=socket.gethostname(),
            address=host,
            port=port,
            began=began,
            parameters=parameters,
        )
        self._interrupted = False
        self._wake = -1

    def run(self) -> None:
        """Do it. Raises PerfError and other IsmErrors, KeyboardInterrupt before the beginning."""
        try:
            with contextlib.ExitStack() as stack:
                self._run(stack)
        except OSError as exc:
            raise PerfError(reason_of(exc)) from exc

    def _run(self, stack: contextlib.ExitStack) -> None:
        report, parameters = self.report, self._parameters
        control = Control(stack.enter_context(self._connect()), client=True)
        report.address = control.peer
        self._say(f"{control.peer} port {self._port}: {describe(parameters)}")
        control.send(Ask(parameters, program=PROGRAM))
        listen = self._expect(control, Listen, _ASK_S + OPEN_S)
        report.server_program, report.server_host = listen.program, listen.host
        run = Run(parameters, bytes.fromhex(listen.cookie), client=True)
        stack.callback(run.close)
        try:
            self._open(control, run, listen.port)
            with self._interruptible(run):
                result = self._measure(control, run)
        except PerfError:
            raise
        except (IsmError, OSError) as exc:
            control.give_up(exc)
            raise
        self._conclude(run, result)

    def _connect(self) -> socket.socket:
        try:
            return socket.create_connection((self._host, self._port), _CONNECT_S)
        except OSError as exc:
            where = f"{self._host} port {self._port}"
            raise PerfError(f"cannot connect to {where}: {reason_of(exc)}; does `ism perf -s` run there?") from exc

    # -- before -----------------------------------------------------------------------------------------------------

    def _expect(self, control: Control, kind: type[M], patience_s: float) -> M:
        message = control.receive(time.monotonic() + patience_s)
        if isinstance(message, Busy):
            raise PerfError("the server is busy with another test; try again later")
        if not isinstance(message, kind):
            raise PerfError(f"the server did not answer within {patience_s:g} s")
        return message

    def _open(self, control: Control, run: Run, port: int) -> None:
        """Open the streams; then both ends know how their bytes travel."""
        host = numeric_host(control.sock.getpeername())
        run.start(surface(self._parameters), Where(host, port, unix_name(run.cookie)))
        ready: Message | None = None
        end_s = time.monotonic() + OPEN_S
        while ready is None or run.ways is None:
            if time.monotonic() > end_s:
                raise PerfError(f"the streams were not open after {OPEN_S:g} s")
            fds = [run.fd]
            ready = control.receive(min(end_s, time.monotonic() + _TICK_S), fds) or ready
            run.news()
            if run.error is not None:
                raise self._failure(control, run.error)
        assert isinstance(ready, Ready)
        if len(ready.ways) != len(run.tallies):
            raise PerfError(f"the server knows of {len(ready.ways)} streams instead of {len(run.tallies)}")
        self.report.ways, self.report.server_ways = run.ways, ready.ways
        for line in connected_lines(self.report):
            self._say(line)

    def _failure(self, control: Control, error: BaseException) -> Exception:
        """Return what went wrong: what the server says of it, if it says something soon."""
        try:
            control.receive(time.monotonic() + _LAST_WORD_S)
        except PerfError as exc:
            if "gave up" in str(exc):
                return exc
        except IsmError:
            pass
        control.give_up(error)
        if self._parameters.transport == "unix" and isinstance(error, ConnectionRefusedError):
            return PerfError("no UNIX socket of the server is here: unix is for two programs of one host and network")
        return PerfError(f"a stream broke: {reason_of(error)}")

    # -- the measurement --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _interruptible(self, run: Run) -> Iterator[None]:
        """Have the first Ctrl-C stop the test in good order, and a second one end the program."""

        def interrupt(*_: Any) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            os.eventfd_write(self._wake, 1)

        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, interrupt) if main else None
        try:
            yield
        finally:
            if main:
                signal.signal(signal.SIGINT, before)
            os.close(self._wake)

    def _measure(self, control: Control, run: Run) -> Result:
        if self._interval_s:
            self._say(interval_header(self._parameters))
        meter = _Meter(run, self.report, self._say if self._interval_s else None, self._interval_s)
        control.send(Go())
        run.begin()
        result: Result | None = None
        idle, end_s, stopped = Idle(run), self._parameters.seconds, False
        while result is None or not run.done:
            now = run.seconds()
            if not stopped and (self._interrupted or (end_s is not None and now >= end_s)):
                stopped, stopped_s = True, now
                if result is None:
                    control.send(Stop())  # before the streams end: to the server that would be too early
                run.stop()
            if stopped and now > stopped_s + _END_S:
                raise PerfError(f"the test did not end within {_END_S:g} s of its time")
            next_s = min(now + _TICK_S, meter.next_s, now + _TICK_S if stopped or end_s is None else end_s)
            fds = [run.fd] if stopped else [run.fd, self._wake]
            left_s = max(0.0, next_s - run.seconds())
            if result is None:
                message = control.receive(time.monotonic() + left_s, fds)
                result = message if isinstance(message, Result) else None
            else:
                wait(fds, left_s)  # the server has said everything, and closes
            run.news()
            if run.error is not None:
                raise self._failure(control, run.error)
            meter.tick()
            idle.check()
        meter.end()
        return result

    def _conclude(self, run: Run, result: Result) -> None:
        report, used = self.report, run.cpu()
        if len(result.flows) != len(run.tallies):
            raise PerfError(f"the server counted {len(result.flows)} streams instead of {len(run.tallies)}")
        report.counts = [Count(tally.bytes, tally.seconds) for tally in run.tallies]
        report.server_counts = result.flows
        report.cpu, report.server_cpu = Used(used.user_s, used.system_s), Used(result.user_s, result.system_s)
        report.interrupted = self._interrupted
        if self._parameters.latency:
            report.latencies = _latencies(run)
        for line in total_lines(report):
            self._say(line)
        if problem := report.mismatch():
            raise PerfError(problem)


def _latencies(run: Run) -> Latencies:
    together = Histogram()
    together.add(tally.histogram for tally in run.tallies if tally.histogram is not None)
    return Latencies(len(together), together.mean_ns(), together.max_ns, together.percentiles_ns())


class _Meter:
    """Makes intervals of the counters. Attributes: `next_s` (when the next one ends, in seconds of the run)."""

    def __init__(self, run: Run, report: Report, say: Callable[[str], None] | None, interval_s: float) -> None:
        self._run, self._report, self._say, self._interval_s = run, report, say, interval_s
        self._begin_s = 0.0
        self._before = [(0, 0, 0) for _ in run.tallies]
        self.next_s = interval_s if say is not None else float("inf")

    def tick(self) -> None:
        """End an interval if it is time."""
        now = self._run.seconds()
        if now >= self.next_s and not self._run.done:
            self._take(now)
            self.next_s += self._interval_s * max(1, -(-(now - self.next_s) // self._interval_s))

    def end(self) -> None:
        """End the last interval, unless next to nothing is left of it."""
        end_s = max(tally.seconds for tally in self._run.tallies)
        if self._say is not None and (
            not self._report.intervals or end_s - self._begin_s > self._interval_s * _MERGED_TAIL
        ):
            self._take(end_s)

    def _take(self, now_s: float) -> None:
        streams = []
        for index, tally in enumerate(self._run.tallies):
            size, trips, total_ns = self._before[index]
            self._before[index] = tally.bytes, tally.trips, tally.total_ns
            worst_ns, tally.worst_ns = tally.worst_ns, 0
            done, spent_ns = self._before[index][1] - trips, self._before[index][2] - total_ns
            mean_ns = spent_ns / done if done else 0.0
            streams.append(
                Moved(
                    flow=tally.flow,
                    bytes=self._before[index][0] - size,
                    trips=done,
                    mean_ns=mean_ns,
                    worst_ns=worst_ns,
                )
            )
        interval = Interval(self._begin_s, now_s, tuple(streams))
        self._begin_s = now_s
        self._report.intervals.append(interval)
        assert self._say is not None
        for line in interval_lines(interval):
            self._say(line)

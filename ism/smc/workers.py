# SPDX-License-Identifier: Apache-2.0
"""A few daemon threads for what must wait for the device while no thread of the application does.

A device that does not answer keeps only these threads busy, not the program's. Threads are made on demand and end when
they have had nothing to do for a while; a program that ends does not wait for them. A forked child starts with none.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable

log = logging.getLogger("ism.smc")

MAX_THREADS = 32
_IDLE_S = 5.0


class Workers:
    """Runs jobs in threads of its own, at most so many at once, in the order in which they were given."""

    def __init__(self, max_threads: int = MAX_THREADS) -> None:
        self._max_threads = max_threads
        self._jobs: deque[Callable[[], None]] = deque()
        self._some = threading.Condition()
        self._threads = self._idle = 0

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job soon. What it raises is logged. Never waits. Raises RuntimeError when no thread can be started."""
        with self._some:
            self._jobs.append(job)
            if self._idle >= len(self._jobs):
                self._some.notify()
                return
            if self._threads == self._max_threads:
                return
            self._threads += 1
        try:
            threading.Thread(target=self._run, name="ism-smc worker", daemon=True).start()
        except RuntimeError:
            with self._some:
                self._threads -= 1
                if not self._threads:
                    self._jobs.remove(job)
                    raise

    def _run(self) -> None:
        while True:
            with self._some:
                self._idle += 1
                there = self._some.wait_for(lambda: self._jobs, _IDLE_S)
                self._idle -= 1
                if not there:
                    self._threads -= 1
                    return
                job = self._jobs.popleft()
            try:
                job()
            except Exception:
                log.exception("a handshake's job failed")
            del job  # not kept until the next: it refers to a connection, which the program may drop


_workers = Workers()


def submit(job: Callable[[], None]) -> None:
    """Run a job in one of the process's workers; see `Workers.submit`."""
    _workers.submit(job)


def _after_fork() -> None:
    global _workers  # noqa: PLW0603 (one set a process)
    _workers = Workers()


os.register_at_fork(after_in_child=_after_fork)

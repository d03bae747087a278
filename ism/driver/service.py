# SPDX-License-Identifier: Apache-2.0
"""The driver's one background thread: it waits on descriptors and runs their callbacks.

It exists because some things must be answered although no call of the application is under way: the device asks to
map or unmap chunks, a peer detaches, the manager dies. It is not on the data path: a region's interrupt is an eventfd
on which the application waits itself. Callbacks must be short and must not wait for what this thread does; one that
raises is logged and its descriptor is watched no longer, since it may not have been drained.

States: no thread yet -> running -> closing -> ended. After `close` no callback begins; the one that runs may finish.
A callback may add and remove descriptors, its own too, and may close the service. Callbacks run one at a time, most in
the service thread, some in a thread that waits for an answer and serves in its place (`serve_until`); the kernel tells
only one of the two of a descriptor, and `close` returns when neither runs a callback any more.

Only this process's thread: after a fork the child shares the kernel's epoll set with its parent and must not touch it,
so here it gets errors and no-ops.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from ism.errors import DeviceGoneError, TransportError
from ism.eventfd import DESCRIPTOR_ADVICE, drain, make_eventfd, raise_eventfd

_AWAKE_S = 0.0003
"""How long a thread that waits for an answer polls before it sleeps: about the time of a command."""

_WAY_S = 0.01
"""How long a thread that waits for an answer waits for another one to leave off serving."""

log = logging.getLogger("ism.driver")


class Service:
    """Watch descriptors from a daemon thread, started by the first `add` or `every`."""

    def __init__(self, name: str) -> None:
        """Raises TransportError when the process has no descriptors left."""
        self._name = name
        self._pid = os.getpid()
        self._wake = make_eventfd()
        try:
            self._epoll = select.epoll()
            self._epoll.register(self._wake, select.EPOLLIN)
        except OSError as exc:
            os.close(self._wake)
            raise TransportError(f"{name}: cannot watch descriptors: {exc.strerror}; {DESCRIPTOR_ADVICE}") from exc
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._tick: Callable[[], None] | None = None
        self._tick_s = -1.0
        self._one_at_a_time = threading.Lock()
        self._in_callback = 0
        self._serving = threading.Lock()
        self._server = 0
        self._gives_way = self._way_wanted = False
        self._nudge = -1
        self._soon: deque[Callable[[], None]] = deque()

    @property
    def is_current(self) -> bool:
        """Whether the caller is inside a callback."""
        return self._in_callback == threading.get_ident()

    def every(self, interval_s: float, callback: Callable[[], None]) -> None:
        """Also call `callback` about every `interval_s` seconds (for devices without interrupts).

        One that raises is logged and called no more. Raises as `add`.
        """
        with self._lock:
            self._check_open()
            self._tick, self._tick_s = callback, interval_s
            self._start()
            raise_eventfd(self._wake)  # a thread that is waiting already learns of the interval

    def add(self, fd: int, callback: Callable[[], None], *, hangup_only: bool = False) -> None:
        """Call `callback` from the service thread whenever `fd` is readable, or with `hangup_only` when it hung up.

        The descriptor stays the caller's, who removes it before closing it.
        Raises: DeviceGoneError after `close` or in a forked child; OSError when it cannot be watched, or is already;
            TransportError when no thread can be started.
        """
        with self._lock:
            self._check_open()
            self._epoll.register(fd, select.EPOLLRDHUP if hangup_only else select.EPOLLIN)
            self._callbacks[fd] = callback
            try:
                self._start()
            except BaseException:
                del self._callbacks[fd]
                self._epoll.unregister(fd)
                raise

    def _check_open(self) -> None:
        if self._pid != os.getpid():
            raise DeviceGoneError(f"{self._name} was started before a fork; open a device in the child")
        if self._closing:
            raise DeviceGoneError(f"{self._name} is closed")

    def _start(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError as exc:
                raise TransportError(f"{self._name}: {exc}; raise the limit of processes (ulimit -u)") from exc
            self._thread = thread

    def soon(self, callback: Callable[[], None]) -> bool:
        """Have `callback` called once in the service thread, from any thread and without waiting.

        Returns: False when no thread will do it: the service has none, or is closed.
        """
        if self._pid != os.getpid():
            return False
        with self._lock:
            if self._closing or self._thread is None:
                return False
            self._soon.append(callback)
            raise_eventfd(self._wake)
        return True

    def remove(self, fd: int) -> None:
        """Stop watching `fd`; unknown descriptors are ignored. A callback that runs now may still finish."""
        if self._pid != os.getpid():
            return
        with self._lock:
            if self._callbacks.pop(fd, None) is not None and not self._closing:
                with contextlib.suppress(OSError):  # closed by its owner, who should have removed it first
                    self._epoll.unregister(fd)

    def close(self) -> None:
        """Stop the thread and wait for it, and for whoever serves in its place, unless in a callback. Idempotent."""
        if self._pid != os.getpid():
            return
        with self._lock:
            first, self._closing = not self._closing, True
            self._callbacks.clear()
            thread = self._thread
            if first and thread is not None:
                raise_eventfd(self._wake)
            if self._nudge >= 0:
                raise_eventfd(self._nudge)
        if self.is_current:
            return  # the thread ends by itself
        with self._serving:
            pass  # whoever served in the thread's place has left
        if thread is not None:
            thread.join()
        elif first:
            with self._lock:
                self._release()

    def _release(self) -> None:
        self._epoll.close()
        os.close(self._wake)
        if self._nudge >= 0:
            os.close(self._nudge)
            self._nudge = -1

    # -- another thread in the service thread's place -----------------------------------------------------------

    def serve_until(
        self, done: Callable[[], bool], fds: Sequence[int], timeout_s: float, *, gives_way: bool = False
    ) -> None:
        """Run the callbacks of `fds` in the calling thread until `done()`, or the time is up.

        Whoever waits for an answer gets it this way without a detour through another thread, and for the first
        moments awake: putting a processor to sleep and waking it costs more than the whole command. One thread at a
        time; while one serves, others (and callbacks) return at once and wait as if there were no such thing.

        Args: `gives_way`: the caller waits for what another thread of this process does meanwhile, and returns early
            when that one waits for an answer itself: two that are awake at once take the interpreter from each other.
        """
        if self.is_current or not self._serving.acquire(blocking=False):
            if self.is_current or gives_way or not self._gives_way:
                return
            self.make_way()
            self.nudge()
            if not self._serving.acquire(timeout=_WAY_S):
                return  # a callback takes its time
        taken: dict[int, Callable[[], None]] = {}
        try:
            self._server = threading.get_ident()
            self._gives_way, self._way_wanted = gives_way, False
            taken = self._take_over(fds)
            poller = select.poll()
            for fd in (self._nudge, *taken):
                poller.register(fd, select.POLLIN)
            start = time.monotonic()
            awake_until, deadline = start + _AWAKE_S, start + timeout_s
            while not done():
                now = time.monotonic()
                if now >= deadline or self._is_closing() or self._has_to_go():
                    return
                awake = now < awake_until
                ready = poller.poll(0 if awake else (deadline - now) * 1000)
                if awake and not ready:
                    os.sched_yield()  # the manager may have been woken on this very processor
                for fd, _events in ready:
                    if self._is_closing():
                        return
                    if fd == self._nudge:
                        drain(fd)
                    elif not self._guard(taken[fd]):
                        self.remove(fd)
                        poller.unregister(fd)
        finally:
            self._hand_back(taken)
            self._gives_way, self._server = False, 0
            self._serving.release()

    def make_way(self) -> None:
        """Have whoever serves and gives way return soon: another thread is about to wait for an answer."""
        if self._gives_way:
            self._way_wanted = True

    def _has_to_go(self) -> bool:
        return self._gives_way and self._way_wanted

    def nudge(self) -> None:
        """Make a thread inside `serve_until` ask `done()` again, when what it waits for was done elsewhere."""
        if self._serving.locked() and self._server != threading.get_ident():
            with self._lock:
                if self._nudge >= 0:
                    raise_eventfd(self._nudge)

    def _take_over(self, fds: Sequence[int]) -> dict[int, Callable[[], None]]:
        with self._lock:
            self._check_open()
            if self._nudge < 0:
                self._nudge = make_eventfd()
            taken = {fd: self._callbacks[fd] for fd in fds if fd in self._callbacks}
            for fd in taken:
                self._epoll.modify(fd, 0)
            return taken

    def _hand_back(self, taken: dict[int, Callable[[], None]]) -> None:
        """What is readable by now wakes the service thread: epoll is level-triggered."""
        with self._lock:
            for fd, callback in taken.items():
                if not self._closing and self._callbacks.get(fd) is callback:
                    self._epoll.modify(fd, select.EPOLLIN)

    def _is_closing(self) -> bool:
        return self._closing

    def _run(self) -> None:
        while not self._is_closing():
            ready = self._epoll.poll(self._tick_s)
            tick = self._tick
            if tick is not None and not self._is_closing() and not self._guard(tick):
                self._tick, self._tick_s = None, -1.0
            for fd, _events in ready:
                if self._is_closing():
                    break
                if fd == self._wake:
                    os.eventfd_read(fd)
                    while self._soon and not self._is_closing():
                        self._guard(self._soon.popleft())
                    continue
                with self._lock:
                    callback = self._callbacks.get(fd)
                if callback is not None and not self._guard(callback):
                    self.remove(fd)
        # whoever closed has woken this thread, and whoever serves in its place
        with self._serving, self._lock:
            self._release()

    def _guard(self, callback: Callable[[], None]) -> bool:
        with self._one_at_a_time:
            self._in_callback = threading.get_ident()
            try:
                callback()
            except Exception:
                log.exception("%s: a callback failed; what it watched is watched no longer", self._name)
                return False
            finally:
                self._in_callback = 0
            return True

# SPDX-License-Identifier: Apache-2.0
"""What trio needs to wait for things that know no event loop: a command of the driver, a `Link`, a `Connection`.

Each of them calls back from some thread, or makes a descriptor readable; here a task sleeps until then. Nothing is
decided here, and no thread is waited in, but for opening the process's device. A wait that is cancelled takes back
what it had asked for; what it waited for goes on.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Generator
from time import perf_counter
from typing import TypeVar

import trio

from ism.driver import Device
from ism.driver.control import Command
from ism.smc import default
from ism.smc.connection import Connection
from ism.smc.link import Link
from ism.smc.rendezvous import COMMAND_WAIT_S

_POLL_S = 0.005
TURN_S = 0.0001
"""How long a task may go on, with amortised checkpoints, before others run."""
T = TypeVar("T")


async def default_device() -> Device:
    """Return the process's device without blocking the event loop. Raises as `default.open_default`."""
    device = default.opened()
    if device is not None:
        return device
    return await trio.to_thread.run_sync(default.open_default, abandon_on_cancel=True)


class Signal:
    """Given once, from any thread; tasks of the run in which it was made wait for it."""

    __slots__ = ("_event", "_token", "given")

    def __init__(self) -> None:
        self.given = False
        self._event = trio.Event()
        self._token = trio.lowlevel.current_trio_token()

    def give(self) -> None:
        """Let whoever waits go on. Never waits itself."""
        self.given = True
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._event.set)

    async def wait(self, timeout_s: float = float("inf")) -> bool:
        """Wait until it is given, or the time is up; tell whether it is."""
        if not self.given:
            with trio.move_on_after(timeout_s):
                await self._event.wait()
        return self.given


async def command_done(command: Command) -> bool:
    """Wait until the device has answered a command, as long as a connect waits for that; tell whether it has."""
    if not command.done:
        signal = Signal()
        command.then(signal.give)
        await signal.wait(COMMAND_WAIT_S)
    return command.done


async def run_steps(steps: Generator[Command, None, T]) -> T:
    """Run the steps of `rendezvous`. Raises what they raise."""
    with contextlib.closing(steps):
        try:
            command = next(steps)
            while True:
                await command_done(command)
                command = steps.send(None)
        except StopIteration as stop:
            result: T = stop.value
            return result


class _Crowd:
    """The tasks of one run that move bytes. Attributes: `turns` (taken by all of them)."""

    __slots__ = ("turns",)

    def __init__(self) -> None:
        self.turns = 0


_CROWD: trio.lowlevel.RunVar[_Crowd] = trio.lowlevel.RunVar("ism.smc.crowd")


class Turns:
    """When a task that moves bytes lets others run: in each call, or once in a while.

    Trio's rule is that every call yields, which costs more than the rest of the call. With `amortised` a call still
    sees cancellation, but yields only when the task has run for `TURN_S`; sleeping is yielding too.

    A send yields last (`over`): the peer works on what was sent meanwhile. A receive yields first (between `leave` and
    `back`): what it waits for is on its way meanwhile, and when it has come it is not held up.

    A spin keeps all tasks from running. So a receive spins only if nobody else in this run has moved bytes while the
    task last yielded or slept. In a crowd it yields once more, then it sleeps, and the others go on.
    Attributes: `amortised`, `alone` (whether a spin is likely to hold up nobody).
    """

    __slots__ = ("_crowd", "_ends_s", "_slept", "alone", "amortised")

    def __init__(self) -> None:
        self.amortised = self._slept = False
        self.alone = True
        self._ends_s = 0.0
        self._crowd: _Crowd | None = None

    def due(self) -> bool:
        """Whether it is time to yield."""
        return not self.amortised or perf_counter() >= self._ends_s

    def leave(self) -> int:
        """Note that others may run from now on. Returns what `back` needs."""
        crowd = self._crowd or self._join()
        crowd.turns += 1
        return crowd.turns

    def back(self, left: int) -> None:
        """Note that others have run since `leave`: a new turn begins."""
        assert self._crowd is not None
        self.alone = self._crowd.turns == left
        if self.amortised:
            self._ends_s = perf_counter() + TURN_S

    def slept(self) -> None:
        """Note that the task has slept in a call that ends with `over`, which need not yield then."""
        self._slept = True
        self._ends_s = perf_counter() + TURN_S

    def forget(self) -> None:
        """Note that the call that slept has failed, and not ended with `over`: the next one yields for itself."""
        self._slept = False

    async def over(self) -> None:
        """Yield, if it is time to. Never raises Cancelled. The last thing a call does that may have slept."""
        if self._slept:
            self._slept = False
        elif not self.amortised or perf_counter() >= self._ends_s:
            (self._crowd or self._join()).turns += 1
            await trio.lowlevel.cancel_shielded_checkpoint()
            if self.amortised:
                self._ends_s = perf_counter() + TURN_S

    def _join(self) -> _Crowd:
        try:
            self._crowd = _CROWD.get()
        except LookupError:
            self._crowd = _Crowd()
            _CROWD.set(self._crowd)
        return self._crowd


class LinkWaiter:
    """Lets up to two tasks wait for one link: one of them polls TCP for it, so that no other thread is needed."""

    __slots__ = ("_link", "_polling", "_tcp")

    def __init__(self, link: Link, tcp: trio.socket.SocketType) -> None:
        self._link, self._tcp = link, tcp
        self._polling = False

    async def until(self, done: Callable[[], bool]) -> None:
        """Wait until `done()`, which only a change of the link can make true; bounded by the link's own deadlines."""
        if self._polling:
            while not done():
                await self._change(done, polls=False)
            return
        self._polling = True
        self._link.driving(True)
        try:
            while not done():
                await self._change(done, polls=True)
        finally:
            self._link.driving(False)
            self._polling = False

    async def _change(self, done: Callable[[], bool], *, polls: bool) -> None:
        """Sleep until the link has changed, its deadline is over or (`polls`) TCP is readable; then see to it."""
        link, readable = self._link, False
        with trio.CancelScope() as sleep:
            token = trio.lowlevel.current_trio_token()

            def wake() -> None:
                with contextlib.suppress(trio.RunFinishedError):
                    token.run_sync_soon(sleep.cancel)

            link.on_change(wake)
            try:
                if done():
                    return
                sleep.deadline = trio.current_time() + max(0.0, link.deadline_s - time.monotonic())
                readable = await self._sleep(polls=polls and link.reads())
            finally:
                link.forget(wake)
        if readable:
            link.pump()
        if time.monotonic() >= link.deadline_s:
            link.expire()

    async def _sleep(self, *, polls: bool) -> bool:
        if not polls:
            await trio.sleep_forever()
        try:
            await trio.lowlevel.wait_readable(self._tcp)
        except trio.BusyResourceError:
            await trio.sleep(_POLL_S)  # the program waits on this descriptor itself
        except trio.ClosedResourceError:
            return False
        return True


class Sleeper:
    """Lets up to two tasks of one connection sleep on its one descriptor: one waits on it, the other on that one."""

    __slots__ = ("_lot", "_waiting")

    def __init__(self) -> None:
        self._waiting = False
        self._lot = trio.lowlevel.ParkingLot()

    async def sleep(self, connection: Connection) -> None:
        """Wait until the descriptor was readable, and reset it. May return for nothing: look again.

        Raises ClosedResourceError when another task closes the connection meanwhile.
        """
        if self._waiting:
            await self._lot.park()
            if connection.closed:
                raise trio.ClosedResourceError("another task closed this connection")
            return
        self._waiting = True
        try:
            try:
                await trio.lowlevel.wait_readable(connection.fd)
            except trio.ClosedResourceError:
                if connection.closed:
                    raise
                return  # a `Waker` it was
            if not connection.closed:
                connection.drain()
        finally:
            self._waiting = False
            self._lot.unpark_all()


class Waker:
    """Wakes the task that sleeps on a connection's descriptor, from any thread, whatever state the descriptor is in."""

    __slots__ = ("_connection", "_token")

    def __init__(self, connection: Connection) -> None:
        self._connection, self._token = weakref.ref(connection), trio.lowlevel.current_trio_token()

    def __call__(self) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._wake)

    def _wake(self) -> None:
        connection = self._connection()
        if connection is not None and not connection.closed:  # else the number may be somebody else's by now
            trio.lowlevel.notify_closing(connection.fd)

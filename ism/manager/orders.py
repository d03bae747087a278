# SPDX-License-Identifier: Apache-2.0
"""What one client is told to map, unmap and wire, in order, and what happens once it has.

It owns the order: orders go out over the map channel as they come, many at a time, and are finished in the order in
which they were given. A step (`then`) is taken when everything before it is finished; a control command is completed by
one. Without a map channel nothing has to be told: steps are taken at once.

The client is hostile: it may refuse, answer late or not at all. Whoever gave an order is told of a refusal; an answer
that does not come ends the channel, and with it this client's device alone. What waits is bounded by what the registry
lets the device hold, and by one order to wire per region.
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

import trio

from ism.device.contract import MapChunks, UnmapChunks
from ism.errors import LocalProtocolError, TransportError
from ism.manager.memories import Memories
from ism.memory import reopen_readonly
from ism.vfio_user.errors import MapChannelClosedError
from ism.vfio_user.fds import Fd
from ism.vfio_user.map_channel_server import MapChannelServer, PendingAnswer
from ism.vfio_user.map_channel_wire import RIGHT_READ, RIGHT_WRITE
from ism.virtio.ism_spec import Permission

logger = logging.getLogger("ism.manager")

MAX_UNANSWERED = 256

Refused = Callable[[TransportError], None]


class Order(Protocol):
    """One thing to be done by the client."""

    def ready(self) -> bool:
        """Tell whether it can go out now. May raise OSError."""
        ...

    async def wait_ready(self) -> None:
        """Wait until it may be ready."""
        ...

    def wait_no_longer(self) -> None:
        """It has waited as long as an order may: be ready, to be sent as far as that is possible."""
        ...

    def send(self, channel: MapChannelServer) -> PendingAnswer | None:
        """Send it; None when there is nothing to send. Raises OSError, TransportError."""
        ...

    def finish(self, refused: TransportError | None) -> None:
        """The client has done it, or refused; also called when nobody will ever know."""
        ...


class MapOrder:
    """Map chunks with the rights of the effect, after the seal that a read-only mapping needs."""

    __slots__ = ("_effect", "_late", "_memories", "_narrows", "_refused", "_writes")

    def __init__(self, effect: MapChunks, memories: Memories, refused: Refused, *, narrows: bool = False) -> None:
        """Args: `narrows`: it takes rights away from a client that has not asked; should the manager be short of a
        descriptor then, or the writers not come to an end, the client loses its mapping rather than its device."""
        self._late = False
        self._effect, self._memories, self._refused, self._narrows = effect, memories, refused, narrows
        self._writes = bool(effect.rights & Permission.WRITE)
        if self._writes:
            memories.writer_begins(effect.memory)

    def ready(self) -> bool:
        return self._writes or self._late or self._memories.may_share_readonly(self._effect.memory)

    async def wait_ready(self) -> None:
        await self._memories.wait_writers_gone(self._effect.memory)

    def wait_no_longer(self) -> None:
        self._late = True

    def send(self, channel: MapChannelServer) -> PendingAnswer:
        effect = self._effect
        if self._writes:
            rights = RIGHT_READ | RIGHT_WRITE
            return channel.map_nowait(effect.offset, effect.length, effect.file_offset, rights, effect.memory.fd)
        try:
            if self._late and not self._memories.may_share_readonly(effect.memory):
                raise OSError(errno.ETIMEDOUT, "a writer of the region does not come to an end")
            number = reopen_readonly(effect.memory.fd)
        except OSError:
            if not self._narrows:
                raise
            return channel.unmap_nowait(effect.offset, effect.length)
        with Fd(number) as fd:
            return channel.map_nowait(effect.offset, effect.length, effect.file_offset, RIGHT_READ, fd)

    def finish(self, refused: TransportError | None) -> None:
        if self._writes:
            self._memories.writer_ends(self._effect.memory)
        if refused is not None:
            self._refused(refused)


class UnmapOrder:
    """Put zero pages over chunks."""

    __slots__ = ("_effect", "_refused")

    def __init__(self, effect: UnmapChunks, refused: Refused) -> None:
        self._effect, self._refused = effect, refused

    def ready(self) -> bool:
        return True

    async def wait_ready(self) -> None:
        pass

    def wait_no_longer(self) -> None:
        pass

    def send(self, channel: MapChannelServer) -> PendingAnswer:
        return channel.unmap_nowait(self._effect.offset, self._effect.length)

    def finish(self, refused: TransportError | None) -> None:
        if refused is not None:
            self._refused(refused)


class _Entry:
    __slots__ = ("answer", "failure", "given_s", "order", "sent", "step")

    def __init__(self, order: Order | None, step: Callable[[], None] | None) -> None:
        self.order, self.step = order, step
        self.given_s = trio.current_time()
        self.sent = order is None
        self.answer: PendingAnswer | None = None
        self.failure: TransportError | None = None


class Orders:
    """The orders of one client. `channel` None: it has no map channel."""

    def __init__(self, window_size: int, page_size: int, wait_s: float) -> None:
        """Args: `wait_s`: how long an order may wait until it can go out: clients that map one another's regions in
        turn could otherwise make each other, and whoever shares with them, wait for ever."""
        self._window_size, self._page_size, self._wait_s = window_size, page_size, wait_s
        self._channel: MapChannelServer | None = None
        self._greeted = False
        self._sending = self._advancing = False
        self._not_ready: Order | None = None
        self._was_not_ready = False
        self._ready_s = 0.0
        self._closed = False
        self._entries: deque[_Entry] = deque()
        self._unsent: deque[_Entry] = deque()
        self._unanswered = 0
        self._waiting: set[trio.Event] = set()
        self._idle = trio.lowlevel.ParkingLot()

    @property
    def has_channel(self) -> bool:
        """Whether the client maps memory itself."""
        return self._channel is not None

    def open(self, channel: MapChannelServer, *, greeted: bool = False) -> None:
        """Use this channel from now on; `run` and the channel's own `run` are started by the caller.

        Args: `greeted`: the window has been announced to it.
        """
        self._channel, self._greeted = channel, greeted

    def give(self, order: Order) -> None:
        """Add an order; it goes out now if it can."""
        if self._closed or self._channel is None:
            order.finish(None)
            return
        entry = _Entry(order, None)
        self._entries.append(entry)
        self._unsent.append(entry)
        self._send_ready()
        self._advance()

    def then(self, step: Callable[[], None]) -> None:
        """Take a step when all orders given so far are finished: now, when they are. Never after `close`."""
        if self._closed:
            return
        if self._entries:
            self._entries.append(_Entry(None, step))
        else:
            step()

    async def wait_done(self) -> None:
        """Wait until the orders given so far are finished, or never will be."""
        if self._entries:
            done = trio.Event()
            self._waiting.add(done)
            self._entries.append(_Entry(None, done.set))
            try:
                await done.wait()
            finally:
                self._waiting.discard(done)

    async def run(self) -> None:
        """See to orders that cannot go out at once: they are sent when they are ready. Never returns."""
        while True:
            while self._not_ready is None:
                await self._idle.park()
            order = self._not_ready
            with trio.move_on_after(self._wait_s) as waiting:
                await order.wait_ready()
            if waiting.cancelled_caught:
                order.wait_no_longer()
            self._send_ready()
            self._advance()
            await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Forget everything: orders end, steps are not taken, nobody waits."""
        self._closed = True
        entries, self._entries = self._entries, deque()
        self._unsent.clear()
        for entry in entries:
            if entry.order is not None:
                entry.order.finish(None)
        for done in self._waiting:
            done.set()
        if self._channel is not None:
            self._channel.close()

    def _advance(self) -> None:
        """Finish what is finished, in order: called by each answer. A step that leads here finds this under way."""
        if self._advancing:
            return
        self._advancing = True
        try:
            while self._entries and self._settled(self._entries[0]):
                entry = self._entries.popleft()
                if entry.step is not None:
                    entry.step()
                self._send_ready()
        finally:
            self._advancing = False

    def _settled(self, entry: _Entry) -> bool:
        """Finish the order of the entry when its answer is there; tell whether nothing is left to wait for."""
        order, answer = entry.order, entry.answer
        if order is None:
            return True
        if not entry.sent or (answer is not None and not answer.done):
            return False
        refused = entry.failure if answer is None else answer.error
        if isinstance(refused, MapChannelClosedError):
            return False  # whoever runs the channel sees to it, and closes this
        self._unanswered -= answer is not None
        entry.order = None
        order.finish(refused)
        return True

    def _send_ready(self) -> None:
        """Send what can go, in order. An order that gives another one while it is sent finds this under way."""
        if self._sending:
            return
        self._sending = True
        self._not_ready = None
        try:
            self._send_in_order()
        finally:
            self._sending = False
        if self._waits_for_readiness():
            self._idle.unpark_all()

    def _waits_for_readiness(self) -> bool:
        return self._not_ready is not None

    def _send_in_order(self) -> None:
        while self._unsent and self._unanswered < MAX_UNANSWERED:
            entry = self._unsent[0]
            assert entry.order is not None
            assert self._channel is not None
            try:
                if not entry.order.ready():
                    self._not_ready, self._was_not_ready = entry.order, True
                    return
                if self._was_not_ready:
                    self._was_not_ready = False
                    self._ready_s = trio.current_time()  # those behind it have waited for others, not for this client
                if not self._greeted:
                    self._greeted = True
                    self._channel.hello_nowait(self._page_size, self._window_size)
                # an order's time runs from when it was given, however many stand before it: others may wait for it
                self._channel.since_s = max(entry.given_s, self._ready_s)
                entry.answer = entry.order.send(self._channel)
                self._unanswered += entry.answer is not None
            except TransportError as error:
                entry.failure = error
            except LocalProtocolError as error:
                entry.failure = TransportError(f"cannot be sent to the client: {error}", errno.EINVAL)
            except OSError as error:
                entry.failure = TransportError(f"cannot be sent to the client: {error}", error.errno or errno.EIO)
            entry.sent = True
            self._unsent.popleft()
            if entry.answer is not None:
                entry.answer.then(self._advance)

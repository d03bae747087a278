# SPDX-License-Identifier: Apache-2.0
"""Events from the device to the driver, over queue 1 (virtio-ism proposal, event queue).

The driver posts writable buffers; each event takes one, and the used length says which structure it holds. Events that
find no buffer wait in a bounded backlog, and beyond it they are dropped and counted: an event is a hint to look at
shared state, so an UPDATE of a region that is waiting already says what a second one would. UPDATE events have a bound
of their own, one for every region, so that other events never crowd them out. A buffer that is too small
for its event is handed back with length 0 and the event is dropped, so that a driver with small buffers cannot block
the queue.

Buffers are looked for when there is an event, so the driver is asked to notify only while events wait for them: one
that posts a buffer again after each event sends the device no message.
"""

from __future__ import annotations

from collections import deque
from collections.abc import MutableMapping

from ism.device.queue import DeviceQueue
from ism.virtio.ism_spec import EventType, UpdateEvent

BACKLOG_EVENTS = 256
BACKLOG_UPDATES = 1 << 14
"""As many as a device may hold regions, and more: a region without a vector has nothing else to be woken by."""

_TYPE = slice(0, UpdateEvent.offset_of("offset"))
_TYPE_AND_REGION = slice(0, UpdateEvent.offset_of("devid"))
_UPDATE = int(EventType.UPDATE).to_bytes(_TYPE.stop, "little")


class EventQueue:
    """The backlog in front of one event queue. Counters: `events_posted`, `events_merged`, `events_dropped`."""

    def __init__(self, queue: DeviceQueue, stats: MutableMapping[str, int]) -> None:
        """Post to `queue`, count in `stats`."""
        self._queue = queue
        self._stats = stats
        self._backlog: deque[bytes] = deque()
        self._updates: set[bytes] = set()  # type and region of the UPDATE events in the backlog
        self._others = 0  # events of other types in it

    def reset(self) -> None:
        """Forget what waits."""
        self._backlog.clear()
        self._updates.clear()
        self._others = 0

    def post(self, payload: bytes) -> bool:
        """Send one event now, or as soon as the driver posts a buffer.

        Returns: whether an interrupt is due. Raises: RemoteProtocolError when the queue is malformed.
        """
        is_update = payload[_TYPE] == _UPDATE
        if is_update and payload[_TYPE_AND_REGION] in self._updates:
            self._stats["events_merged"] += 1
        elif len(self._updates) >= BACKLOG_UPDATES if is_update else self._others >= BACKLOG_EVENTS:
            self._stats["events_dropped"] += 1
        else:
            self._backlog.append(payload)
            if is_update:
                self._updates.add(payload[_TYPE_AND_REGION])
            else:
                self._others += 1
        return self.flush()

    def flush(self) -> bool:
        """Send what waits, as far as there are buffers. Returns and raises as `post`."""
        due = False
        while self._backlog:
            chain = self._queue.pop()
            if chain is None:
                if self._queue.spare_notify(False):
                    continue  # buffers that came before the driver could know are not announced: look once more
                return due
            payload = self._backlog.popleft()
            if payload[_TYPE] == _UPDATE:
                self._updates.discard(payload[_TYPE_AND_REGION])
            else:
                self._others -= 1
            fits = chain.writable_size >= len(payload)
            self._stats["events_posted" if fits else "events_dropped"] += 1
            due |= self._queue.push(chain, payload if fits else b"")
        self._queue.spare_notify(True)
        return due

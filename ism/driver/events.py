# SPDX-License-Identifier: Apache-2.0
"""The event queue: what the device says unasked (virtio-ism proposal, events). Optional: feature EVENT_VQ.

Buffers are posted in advance and posted again at once; an event that does not parse is counted and skipped. Events
carry no payload that matters more than their being there: receivers look at the shared memory again.

`deliver` is called without the queue's lock and must not raise: the events behind it would be lost.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ism.driver.transport import Transport
from ism.driver.virtqueue import VirtQueue, usable_entries
from ism.virtio.ism_spec import EVENT_QUEUE_SIZE, DirectoryEvent, EventType, PeerEvent, UpdateEvent

log = logging.getLogger("ism.driver")


@dataclass(frozen=True, slots=True)
class Event:
    """One event. `offset`: first area of the region concerned; `peers`: holders now, None with UPDATE."""

    kind: EventType
    offset: int
    devid: int
    peers: int | None


@dataclass(frozen=True, slots=True)
class IntentEvent:
    """One event of the directory: what happened to the intent `nonce`, by the server's device `devid`."""

    kind: EventType
    nonce: int
    devid: int


def parse(raw: bytes) -> Event | IntentEvent | None:
    """Decode an event; None when it is none that this driver knows."""
    if len(raw) >= PeerEvent.SIZE:
        peer = PeerEvent.unpack(raw)
        if peer.ev_type in (EventType.ATTACH, EventType.DETACH):
            return Event(EventType(peer.ev_type), peer.offset, peer.devid, peer.peers)
        intent = DirectoryEvent.unpack(raw)
        if intent.ev_type in (EventType.CLAIMED, EventType.START):
            return IntentEvent(EventType(intent.ev_type), intent.nonce, intent.devid)
    if len(raw) >= UpdateEvent.SIZE:
        update = UpdateEvent.unpack(raw)
        if update.ev_type == EventType.UPDATE:
            return Event(EventType.UPDATE, update.offset, update.devid, None)
    return None


class EventQueue:
    """Queue 1. `reap` hands each event to `deliver`. Thread-safe."""

    def __init__(
        self,
        transport: Transport,
        size: int,
        notify: Callable[[], None],
        deliver: Callable[[Event | IntentEvent], None],
    ) -> None:
        """`size`: entries that the device offers; `notify` writes the queue's notify register."""
        entries = usable_entries(size, EVENT_QUEUE_SIZE)
        self.queue = VirtQueue(transport, entries, slots=entries, out_size=0, in_size=PeerEvent.SIZE)
        self._notify, self._deliver = notify, deliver
        self._lock = threading.Lock()
        self._closed = False
        self.unknown = 0

    def post_all(self) -> None:
        """Give the device all buffers, once the device is live."""
        with self._lock:
            if self._closed:
                return
            must_notify = False
            while self.queue.free:
                must_notify |= self.queue.submit(self.queue.free.pop(), b"", PeerEvent.SIZE)
        if must_notify:
            self._notify()

    def reap(self) -> None:
        """Deliver what has come and post the buffers again.

        Raises: RemoteProtocolError on a broken used ring; TransportError when the buffers cannot be notified.
        """
        events: list[Event | IntentEvent] = []
        with self._lock:
            if self._closed:
                return
            for used in self.queue.reap():
                event = parse(self.queue.written(used.slot, used.written))
                self.queue.release(used.slot)
                if event is None:
                    self.unknown += 1
                    if not self.unknown & (self.unknown - 1):  # a device that does it again and again fills no log
                        log.warning("the device sent %d events this driver does not know", self.unknown)
                else:
                    events.append(event)
        try:
            self.post_all()
        finally:
            for event in events:
                self._deliver(event)

    def close(self) -> None:
        """Free the queue's memory; the device must have been reset."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self.queue.close()

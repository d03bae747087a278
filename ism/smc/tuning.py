# SPDX-License-Identifier: Apache-2.0
"""Buffers that tune themselves: gives a busy connection larger rings, and takes them back when it idles.

`ism.shm.move` says how a stream goes on in another ring; this module decides when, and asks the device for the regions.
Each connection that may tune has a `Tuner`, for both directions:

    receiving    home -> wanted (the ring is full often) -> offered -> in use -> wanted ... ; home again with the sender
    sending      home -> attached (the peer has offered) -> in use -> home (nothing sent for `IDLE_TICKS`)

Sizes go from the first (`FIRST_BYTES`) up in steps of four to the connection's limit. A step that the device refuses,
or that cannot be made because a thread is in mid-call, is tried again at the next tick. A step of either direction is
a turn, of which a connection has `TURNS`, and gets one back with each tick: a peer that moves back and forth, or offers
rings without end, costs this side and the manager no more than that. A direction shrinks in one step, when the sender
has been idle and all is consumed; a peer that never goes home keeps this side's memory, up to the limit, until the
connection ends.

Commands to the device wait, so they are given by a worker (`workers`), one at a time for each connection; idleness is
looked for by one thread of the process, once a second, which exists while any connection has a larger ring. Neither
holds up a call of the program. A tuner owns the regions that are all ring, the connection those with the headers.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from ism.errors import DeviceError, IsmError, LocalProtocolError, QuotaError, RemoteProtocolError
from ism.ids import DevId, Token
from ism.smc import workers
from ism.virtio.ism_spec import Permission

if TYPE_CHECKING:
    from ism.driver import Device, Region
    from ism.shm import Endpoint

log = logging.getLogger("ism.smc")

FIRST_BYTES = 4 * 1024 * 1024
"""The first larger ring. It is more than a core keeps for itself: in a ring that the reader's core holds whole, each
line that is written must be taken from there. 64 KiB messages were a third faster than in 1 MiB, of 1 MiB twice."""
STEP = 4
LARGEST_OFFER = 1 << 30
"""A peer's ring that is larger is not attached."""
PROCESS_BYTES = 1 << 30
"""All larger rings in which a process receives, together."""
TICK_S = 1.0
IDLE_TICKS = 3
TURNS = 8
"""Regions that a connection may ask the device for without waiting for a tick."""

_SENDER_RIGHTS = Permission.READ | Permission.WRITE | Permission.ATTACH


class Tuner:
    """The larger rings of one connection. Thread-safe; nothing but `look` and `tick` waits for the device."""

    def __init__(self, endpoint: Endpoint, device: Device, peer: DevId, limit: int) -> None:
        """Args: `limit`: largest ring to receive in, bytes; 0: this side's does not grow, the peer's may."""
        self._endpoint, self._device, self._peer, self._limit = endpoint, device, peer, limit
        self._mutex = threading.Lock()
        self._job = threading.Lock()
        self._regions: list[Region] = []
        self._offer: tuple[int, int, int] | None = None
        self._turns = TURNS
        self._queued = self._closed = self._refused = self._unfinished = False
        self._armed = limit > endpoint.rx_ring_bytes
        self._sent_seen, self._idle_ticks = 0, 0
        self._receiving_bytes = endpoint.rx_ring_bytes
        endpoint.attend = self._attend
        endpoint.may_grow = self._armed

    @property
    def needs_ticks(self) -> bool:
        """Whether a larger ring of either direction is held, or was refused, so that idleness has to be looked for."""
        waits = self._refused or self._unfinished or self._offer is not None or self._turns < TURNS
        return not self._closed and bool(self._regions or waits)

    def _attend(self) -> None:
        """Have somebody look, soon; called from inside a send or a receive."""
        if self._queued or self._closed:
            return
        self._queued = True
        try:
            workers.submit(self.look)
        except RuntimeError:
            self._queued = False  # no thread: the buffers stay as they are

    def look(self) -> None:
        """Do what is due: let go of rings no longer used, take the peer's offer, offer a larger one."""
        with self._job:
            self._queued = self._unfinished = False
            for step in (self._retire, self._take_offer, self._grow):
                self._try(step)
        if self.needs_ticks:
            _watched.add(self)

    def _try(self, step: Callable[[], None]) -> None:
        try:
            step()
        except LocalProtocolError:
            self._unfinished = True  # closed meanwhile, or a thread is in mid-call
        except (IsmError, OSError) as exc:
            log.debug("a buffer of a connection with device %#x was not changed: %s", self._peer, exc)

    def _retire(self) -> None:
        for region in list(self._regions):
            if self._endpoint.uses(region) is False:
                with self._mutex:
                    if region not in self._regions:
                        continue
                    self._regions.remove(region)
                _grown.add(-region.length if region.owned else 0)
                region.close()

    def _keep(self, region: Region) -> bool:
        """Hold a region from now on; False, and it is closed, when the connection is closed."""
        with self._mutex:
            if not self._closed:
                self._regions.append(region)
                _grown.add(region.length if region.owned else 0)
                return True
        region.close()
        return False

    def _take_offer(self) -> None:
        self._offer = offer = self._endpoint.read_offer() or self._offer
        if offer is None or self._endpoint.ring_pending or not self._may_take_turn():
            return  # one that was attached is used first: a peer that withdraws it for another has to wait
        number, token, length = offer
        if not number or not 0 < length <= LARGEST_OFFER:
            self._offer = None
            return
        if 2 * length > self._device.free_window:
            return  # at a later tick, perhaps
        try:
            region = self._device.attach(Token(token), Permission.READ | Permission.WRITE, offered_by=self._peer)
        except (RemoteProtocolError, DeviceError) as exc:
            if not isinstance(exc, QuotaError):
                self._offer = None  # it was not the peer's to offer, or is gone
            raise
        self._offer = None
        if region.length != length:
            region.close()
        elif self._keep(region):
            self._endpoint.use_ring(region, number)

    def _may_take_turn(self) -> bool:
        if self._turns == 0:
            return False
        self._turns -= 1
        return True

    def _grow(self) -> None:
        endpoint = self._endpoint
        if not self._armed:
            return
        if endpoint.rx_ring_bytes != self._receiving_bytes:
            self._receiving_bytes = endpoint.rx_ring_bytes
            endpoint.may_grow = self._receiving_bytes < self._limit
            return
        if endpoint.may_grow or endpoint.offer_pending or self._receiving_bytes >= self._limit:
            return  # nothing was asked for, or the peer has yet to move to what it was offered
        size = min(self._limit, max(FIRST_BYTES, STEP * self._receiving_bytes))
        self._refused = True
        if not self._may_take_turn():
            return
        if _grown.total + size > PROCESS_BYTES or 2 * size > self._device.free_window:
            return
        grants = [] if self._peer == self._device.devid else [(_SENDER_RIGHTS, self._peer)]
        try:
            region = self._device.alloc(size, interrupt=False, grants=grants)
        except QuotaError:
            if size // STEP <= self._receiving_bytes:
                raise
            region = self._device.alloc(size // STEP, interrupt=False, grants=grants)
        self._refused = False
        if self._keep(region):
            endpoint.offer_ring(region, region.token)

    # -- idling ------------------------------------------------------------------------------------------------------

    def tick(self) -> bool:
        """See whether a larger ring idles, once a second. Returns whether to look again."""
        if self._closed:
            return False
        if not self._job.acquire(blocking=False):
            return True
        try:
            endpoint = self._endpoint
            self._turns = min(TURNS, self._turns + 1)
            if self._refused:
                self._refused = False
                endpoint.may_grow = True
            if self._unfinished or self._offer is not None:
                self._unfinished = False
                self._try(self._take_offer)
                self._try(self._grow)
            idle = endpoint.sent_bytes == self._sent_seen
            self._sent_seen, self._idle_ticks = endpoint.sent_bytes, self._idle_ticks + 1 if idle else 0
            if self._idle_ticks >= IDLE_TICKS:
                endpoint.go_home()
            endpoint.follow()
            self._retire()
        except LocalProtocolError:
            pass  # closed, or a thread is in mid-call: not idle
        except IsmError:
            return False  # the peer lies: the connection ends
        finally:
            self._job.release()
        return self.needs_ticks

    def close(self) -> None:
        """Let go of every region; the endpoint is closed."""
        with self._mutex:
            self._closed = True
            regions, self._regions = self._regions, []
        for region in regions:
            _grown.add(-region.length if region.owned else 0)
            region.close()


class _Grown:
    """Bytes of all larger rings in which this process receives."""

    def __init__(self) -> None:
        self._lock, self.total = threading.Lock(), 0

    def add(self, count: int) -> None:
        """Count more, or fewer."""
        with self._lock:
            self.total += count


class _Watch:
    """The thread that looks for idle rings; it ends when there are none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tuners: weakref.WeakSet[Tuner] = weakref.WeakSet()
        self._running = False

    def add(self, tuner: Tuner) -> None:
        """Look at this one too, until it says that it is not needed."""
        with self._lock:
            self._tuners.add(tuner)
            if self._running:
                return
            try:
                threading.Thread(target=self._run, name="ism-smc buffers", daemon=True).start()
            except RuntimeError:
                return  # the next that grows tries again
            self._running = True

    def _run(self) -> None:
        while True:
            time.sleep(TICK_S)
            with self._lock:
                tuners = list(self._tuners)
            done = [tuner for tuner in tuners if not _ticked(tuner)]
            with self._lock:
                # one that was given a ring since its tick has been added again, or will be
                for tuner in done:
                    if not tuner.needs_ticks:
                        self._tuners.discard(tuner)
                if not self._tuners:
                    self._running = False
                    return
            del tuners, done


def _ticked(tuner: Tuner) -> bool:
    try:
        return tuner.tick()
    except Exception:
        log.exception("the buffers of a connection are not looked after any more")
        return False


_grown, _watched = _Grown(), _Watch()


def _after_fork() -> None:
    global _grown, _watched
    _grown, _watched = _Grown(), _Watch()


os.register_at_fork(after_in_child=_after_fork)

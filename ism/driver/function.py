# SPDX-License-Identifier: Apache-2.0
"""One virtio-ism function, initialised and served: registers, queues, interrupts, its loss and its end. No regions.

States: opening -> live -> gone (the manager died, the device needs a reset, a protocol error) or closed. The order of
the initialisation is virtio 1.3 section 3.1.1. `ism.driver.device` puts regions on top: it says what to do with an
event, and whom to wake when the device is lost.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

from ism.driver import capabilities
from ism.driver.control import ControlQueue
from ism.driver.events import Event, EventQueue, IntentEvent
from ism.driver.service import Service
from ism.driver.transport import Transport
from ism.driver.vectors import Vectors
from ism.driver.virtio_pci import VirtioPci
from ism.errors import (
    DeviceGoneError,
    FeatureMismatchError,
    IsmError,
    LocalProtocolError,
    RemoteProtocolError,
)
from ism.eventfd import drain, make_eventfd
from ism.ids import DevId, Gid
from ism.memory import PAGE_SIZE
from ism.virtio.ism_spec import QUEUE_CONTROL, QUEUE_EVENTS, IsmFeature
from ism.virtio.pci import Feature, Isr, Status

log = logging.getLogger("ism.driver")

VECTOR_CONFIG, VECTOR_CONTROL, VECTOR_EVENTS, VECTOR_REGIONS = range(4)
_OPTIONAL = (IsmFeature.EVENT_IRQ, IsmFeature.EVENT_VQ, IsmFeature.DIRECTORY, IsmFeature.TRAPPED)
_POLL_INTERVAL_S = 0.001
_POLLS_PER_STATUS = 100
_LOOK_INTERVAL_S = 5.0
"""How often a device is looked at whose death nobody tells of. Rarely: a read that is under way in QEMU when the
manager dies can end QEMU (docs/vm.md)."""
_ALL_ONES = 0xFF
"""What the status register of a PCI function reads that does not answer."""
_PCI_COMMAND = 4
_PCI_COMMAND_OFF = 0
_PCI_COMMAND_MEMORY_AND_MASTER = 0x6
_PCI_COMMAND_INTX_DISABLE = 0x400


class Function(ABC):
    """An initialised function.

    Attributes: `gid`, `devid` (the device's name), `chunk_size`, `features` (accepted feature bits), `transport`,
    `service` (its thread), `control` (commands one by one), `atomic` (whether an atomic exchange in a region is one:
    not where accesses to the window are trapped, always or after each interrupt).
    """

    def __init__(self, transport: Transport, *, interrupts: bool = True) -> None:
        """Initialise the device (virtio 1.3 section 3.1.1). The transport belongs to the device from here on.

        Args: `interrupts`: False polls the queues, as happens to functions that have too few vectors and no line.
        Raises: FeatureMismatchError, RemoteProtocolError, TransportError; the transport is closed then.
        """
        self.transport = transport
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._gone: str | None = None
        self._silent_loss = False
        self._next_look_s = time.monotonic() + _LOOK_INTERVAL_S
        self._live = False
        self._closed = False
        self._polls = 0
        self._queue_fds: list[int] = []
        self._answers: tuple[int, ...] = ()
        self._serves: tuple[int, ...] = ()
        try:
            self.service = Service(f"ism-driver {transport.name}")
        except BaseException:
            transport.close()
            raise
        try:
            self._initialise(interrupts)
        except BaseException:
            self._closed = True
            self._release_everything()
            raise

    @abstractmethod
    def _deliver(self, event: Event | IntentEvent) -> None:
        """Handle an event of the device, in the service thread."""

    @abstractmethod
    def _wake_sleepers(self) -> None:
        """Wake whoever sleeps on a descriptor that no vector raises; called with the lock held."""

    @abstractmethod
    def _forget_sleepers(self) -> list[int]:
        """Drop all regions and return the descriptors among them that no vector owns; called with the lock held."""

    # -- initialisation ---------------------------------------------------------------------------------------------

    def _initialise(self, interrupts: bool) -> None:
        transport = self.transport
        transport.start(self.service, self._on_gone)
        capabilities.identify(transport)
        # the line stays disabled unless somebody listens to it: others may share it
        self._write_command(_PCI_COMMAND_MEMORY_AND_MASTER | _PCI_COMMAND_INTX_DISABLE)
        self._caps = capabilities.find(transport)
        self._pci = pci = VirtioPci(transport, self._caps)
        pci.reset()
        pci.add_status(Status.ACKNOWLEDGE)
        pci.add_status(Status.DRIVER)
        try:
            required = frozenset({int(Feature.VERSION_1)})
            optional = frozenset(map(int, (Feature.ACCESS_PLATFORM, *_OPTIONAL)))
            self.features = pci.negotiate(required, optional)
            self._read_config()
            self._set_up_queues(interrupts)
            pci.add_status(Status.DRIVER_OK)
        except BaseException:
            self._give_up()
            raise
        with self._lock:
            self._live = True
            lost = self._gone
        if lost is not None:  # from here on `_fail` tells whoever waits; until now nobody did
            raise DeviceGoneError(lost)
        if self._events is not None:
            self._events.post_all()

    def _give_up(self) -> None:
        """Say FAILED, and keep the device away from queue memory that is about to be freed."""
        try:
            self._pci.add_status(Status.FAILED)
            self._write_command(_PCI_COMMAND_OFF)
        except IsmError as exc:
            log.debug("%s: not told that the driver gave up: %s", self.transport.name, exc)

    def _write_command(self, bits: int) -> None:
        self.transport.config_write(_PCI_COMMAND, bits.to_bytes(2, "little"))

    def _read_config(self) -> None:
        name, config = self.transport.name, self._pci.read_config()
        chunk, window = config.chunk_size, self._caps.regions.length
        if chunk < PAGE_SIZE or chunk & (chunk - 1) or chunk > window:
            raise RemoteProtocolError(
                f"{name}: chunk_size {chunk} is not a power of two from a page ({PAGE_SIZE}) to the window ({window})"
            )
        self.gid, self.devid = Gid(config.gid), DevId(config.devid)
        self.chunk_size = chunk
        self._notify_size = config.notify_size or 1  # early devices leave it 0 and mean 1

    def _set_up_queues(self, interrupts: bool) -> None:
        transport, pci = self.transport, self._pci
        sizes = [pci.queue_max_size(index) for index in range(min(pci.queue_count(), 2))]
        if not sizes or sizes[QUEUE_CONTROL] < 2:
            raise FeatureMismatchError(f"{transport.name} has no control queue", ["control queue"])
        has_events = IsmFeature.EVENT_VQ in self.features and len(sizes) > QUEUE_EVENTS and sizes[QUEUE_EVENTS] >= 2
        vectors = transport.vector_count() if interrupts else 0
        self._interrupts = vectors > VECTOR_REGIONS
        if self._interrupts:
            for _ in range(VECTOR_REGIONS):
                self._queue_fds.append(make_eventfd())
            transport.set_vectors(0, self._queue_fds)
            pci.set_config_vector(VECTOR_CONFIG)
            self._answers, self._serves = (self._queue_fds[VECTOR_CONTROL],), tuple(self._queue_fds[VECTOR_CONTROL:])
        line = transport.enable_intx() if interrupts and not self._interrupts else None
        self.atomic = line is None and IsmFeature.TRAPPED not in self.features
        if line is not None:
            self._answers = self._serves = (line,)
        self._vectors = Vectors(transport, self.service, VECTOR_REGIONS, vectors)
        self.control = ControlQueue(
            transport,
            sizes[QUEUE_CONTROL],
            lambda: self._notify(QUEUE_CONTROL),
            poll=None if self._answers else lambda: self._reap(self.control.reap),
            serve=self._serve if self._answers else None,
            done_elsewhere=self.service.nudge,
        )
        self._events = None
        if has_events:
            self._events = EventQueue(transport, sizes[QUEUE_EVENTS], lambda: self._notify(QUEUE_EVENTS), self._deliver)
        self._notify_at: dict[int, int] = {}
        for index, owner in ((QUEUE_CONTROL, self.control), (QUEUE_EVENTS, self._events)):
            if owner is not None:
                queue = owner.queue
                self._notify_at[index] = pci.enable_queue(
                    index,
                    size=queue.size,
                    desc=queue.desc,
                    driver=queue.driver,
                    device=queue.device,
                    vector=VECTOR_CONTROL + index if self._interrupts else None,
                )
        if self._interrupts:
            for fd, callback in zip(
                self._queue_fds, (self._on_config_change, self._on_control, self._on_events), strict=True
            ):
                self.service.add(fd, callback)
        elif line is not None:
            self.service.add(line, self._on_line)
            self._write_command(_PCI_COMMAND_MEMORY_AND_MASTER)
        else:
            self.service.every(_POLL_INTERVAL_S, self._poll)
            return
        if not self.transport.tells_of_loss:
            self.service.every(_LOOK_INTERVAL_S, self._look)

    def _notify(self, index: int) -> None:
        place = self._caps.notify
        try:
            self.transport.bar_write(place.bar, self._notify_at[index], index.to_bytes(2, "little"), posted=True)
        except IsmError as exc:
            # the chains are the device's already: a device that cannot be told of them cannot be used any more
            self._fail(f"{self.transport.name}: the device cannot be notified of commands: {exc}")
            raise

    def _serve(self, done: Callable[[], bool], timeout_s: float) -> None:
        """Take answers in the thread that waits for one."""
        self.service.serve_until(done, (*self._answers, *self.transport.answer_fds()), timeout_s)

    def serve_until(self, done: Callable[[], bool], timeout_s: float, fds: Sequence[int] = ()) -> None:
        """Take answers, events, and what comes on further watched descriptors, in the calling thread until `done()`.

        May return early, as when another thread waits for an answer itself (`Service.serve_until`, `gives_way`), and
        at once when another thread does it, or the device has no interrupts.
        """
        if self._serves and self._pid == os.getpid() and not self._closed:
            fds = (*self._serves, *self.transport.answer_fds(), *fds)
            self.service.serve_until(done, fds, timeout_s, gives_way=True)

    # -- what the service thread does -------------------------------------------------------------------------------

    def _on_config_change(self) -> None:
        drain(self._queue_fds[VECTOR_CONFIG])
        self._check_status()

    def _look(self) -> None:
        """Called now and then, and whenever the service thread has been woken for something else."""
        now_s = time.monotonic()
        if self._gone is None and now_s >= self._next_look_s:
            self._next_look_s = now_s + _LOOK_INTERVAL_S
            self._check_status()

    def _check_status(self) -> None:
        try:
            status = self._pci.status
        except IsmError as exc:
            log.warning("%s: the device status cannot be read: %s", self.transport.name, exc)
            return
        if status == _ALL_ONES:
            self._silent_loss = True
            self._fail(
                f"{self.transport.name}: its registers read all ones: the device manager is gone, or does not answer; "
                "this machine has to be shut down and started again, or the device plugged in again"
            )
        elif status & Status.NEEDS_RESET:
            self._fail(
                f"{self.transport.name}: the device found a broken queue and needs a reset: close it and open it again"
            )

    def _on_control(self) -> None:
        drain(self._queue_fds[VECTOR_CONTROL])
        self._reap(self.control.reap)

    def _on_events(self) -> None:
        drain(self._queue_fds[VECTOR_EVENTS])
        if self._events is not None:
            self._reap(self._events.reap)

    def _on_line(self) -> None:
        """Serve INTx, one line for the queues and the configuration (virtio 1.3 section 4.1.5.3).

        Reading the ISR status takes the device's hand off the line. What happens from there on asserts it again, and
        interrupts once more after `rearm_intx`, so everything that was before it is found by looking at the queues now.
        """
        if self._gone is not None:
            # nobody rearms it: the descriptor is watched no longer
            self.service.remove(self._answers[0])
            return
        try:
            isr = self._pci.read_isr()
            self.transport.rearm_intx()
        except IsmError as exc:
            self._fail(f"{self.transport.name}: its interrupt cannot be served: {exc}")
            return
        self._reap(self.control.reap)
        if self._events is not None:
            self._reap(self._events.reap)
        if Isr.CONFIG in isr:
            self._check_status()

    def _poll(self) -> None:
        if self._gone is not None:
            return
        self._reap(self.control.reap)
        if self._events is not None:
            self._reap(self._events.reap)
        self._polls += 1
        if self._polls % _POLLS_PER_STATUS == 0:
            self._check_status()

    def _reap(self, reap: Callable[[], None]) -> None:
        try:
            reap()
        except IsmError as exc:
            self._fail(f"{self.transport.name}: {exc}")

    def _on_gone(self, reason: str) -> None:
        self._fail(f"{self.transport.name}: {reason}")

    def _fail(self, reason: str) -> None:
        with self._lock:
            if self._gone is not None or self._closed:
                return
            self._gone = reason
            if not self._live:
                return  # whoever initialises looks itself
            self._wake_sleepers()
        log.warning("%s", reason)
        self.control.refuse(reason)
        self._vectors.wake_all()
        # events are delivered by callbacks of the service alone, and nobody waits for one here: it may be waiting for
        # what the caller holds
        if self.service.is_current or not self.service.soon(lambda: self._end_commands(reason)):
            self._end_commands(reason)

    def _end_commands(self, reason: str) -> None:
        """Fail the commands that are not answered, once no answer comes any more.

        A device that is told FAILED serves no queue from there on, should it live.
        """
        silent = not self._silent_loss and self._silenced(lambda: self._pci.add_status(Status.FAILED))
        self._last_look(self.control.reap)
        if self._events is not None:
            self._last_look(self._events.reap)
        self.control.fail(reason, certain=silent)

    def _silenced(self, order: Callable[[], None]) -> bool:
        """Give an order after which the device writes nothing more; tell whether that is sure: done, or gone."""
        try:
            order()
        except DeviceGoneError:
            return True
        except IsmError as exc:
            log.debug("%s: at the end: %s", self.transport.name, exc)
            return False
        return True

    def _last_look(self, reap: Callable[[], None]) -> None:
        try:
            reap()
        except IsmError as exc:
            log.debug("%s: at the end: %s", self.transport.name, exc)

    # -- use --------------------------------------------------------------------------------------------------------

    @property
    def gone(self) -> str | None:
        """Why the device can no longer be used, None while it can."""
        return self._gone

    def check_usable(self) -> None:
        """Raise DeviceGoneError when no command can succeed any more."""
        if self._pid != os.getpid():
            raise DeviceGoneError(f"{self.transport.name} was opened before a fork; open a device in the child")
        if self._gone is not None or self._closed:
            raise DeviceGoneError(self._gone or f"{self.transport.name} is closed")

    def _check_may_wait(self) -> None:
        self.check_usable()
        if self.service.is_current:
            raise LocalProtocolError(
                f"{self.transport.name}: a callback of the driver's service thread may not wait for the device, whose "
                "answers that thread takes: do it in another thread"
            )

    def ring_slot(self, slot: int) -> None:
        """Ring a notify slot through the notify area (virtio-ism proposal, notify).

        Raises: DeviceGoneError, TransportError, RemoteProtocolError (the device has no such slot).
        """
        self.check_usable()
        area = self._caps.doorbells
        at = slot * self._notify_size
        width = 4 if self._notify_size >= 4 and (area.offset + at) % 4 == 0 else 1
        if at + width > area.length:
            raise RemoteProtocolError(f"{self.transport.name}: notify slot {slot} lies outside the notify area")
        self.transport.bar_write(area.bar, area.offset + at, (1).to_bytes(width, "little"), posted=True)

    # -- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Reset the device, which lets every region go, and close the transport. Idempotent.

        Commands that other threads wait for raise DeviceGoneError. Nobody may ring a region, or wait on its
        descriptor, any more; memory stays readable through views.
        Raises: LocalProtocolError from a callback of the driver.
        """
        if self._pid != os.getpid():
            self._closed = True
            return
        if self.service.is_current and not self._closed:
            raise LocalProtocolError(f"{self.transport.name} cannot be closed from a callback of its own thread")
        with self._lock:
            if self._closed:
                return
            self._closed = True
        silent = self._silenced(self._pci.reset)
        self._last_look(self.control.reap)
        self.control.fail(self._gone or f"{self.transport.name} is closed", certain=silent)
        self._release_everything()

    def _release_everything(self) -> None:
        """Free what there is, in an order in which nothing uses what is freed; a step that fails stops no other."""
        steps: list[Callable[[], None]] = [self.service.close]
        for name in ("control", "_events", "_vectors"):
            owner = getattr(self, name, None)  # initialisation may have ended before it was made
            if owner is not None:
                steps.append(owner.close)
        for step in (*steps, self._close_descriptors, self.transport.close):
            try:
                step()
            except (IsmError, OSError) as exc:
                log.debug("%s: while closing: %s", self.transport.name, exc)

    def _close_descriptors(self) -> None:
        with self._lock:
            self._queue_fds += self._forget_sleepers()
            fds, self._queue_fds = self._queue_fds, []
        for fd in fds:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

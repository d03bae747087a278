# SPDX-License-Identifier: Apache-2.0
"""A virtio-ism device as a program of this guest uses it: initialisation, regions, events, the end.

States: opening -> live -> gone (the manager died, the device needs a reset, a protocol error) or closed. In `gone`
every command raises DeviceGoneError with the reason; regions stay mapped, so connections over them go on as long as
both peers live. Usable from any thread and without an event loop; commands block for about the device's answer.

Threads. Callers wait for answers that the service thread takes from the queues, so nothing that waits may be called
from its callbacks: that is refused with LocalProtocolError. Closing a region never waits: attach and release of one
token take turns (`_in_transition`), and a release that finds the turn taken is left to whoever has it. One lock guards
what regions the device holds; it is never held across a call to the transport, the queues or a callback. An eventfd
without a vector is raised under that lock, and closed only after its region was taken out under it.

A process that forks gets nothing of this in the child: the child opens its own device.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ism.driver.control import COMMAND_TIMEOUT_S, Command, Placement, ack_error
from ism.driver.directory import Directory
from ism.driver.events import Event, IntentEvent
from ism.driver.function import Function
from ism.driver.region import Region
from ism.driver.transport import Span, Transport
from ism.driver.vectors import Binding
from ism.driver.virtio_pci import feature_name
from ism.errors import (
    DeviceError,
    DeviceGoneError,
    FeatureMismatchError,
    IsmError,
    QuotaError,
    RemoteProtocolError,
    TransportError,
)
from ism.eventfd import make_eventfd, raise_eventfd
from ism.ids import DevId, Token
from ism.memory import Mapping
from ism.virtio.ism_spec import Ack, EventType, IsmFeature, Permission

log = logging.getLogger("ism.driver")

ALL_GRANTED = Permission(0)

Grants = Sequence[tuple[Permission, DevId | None]]


@dataclass(slots=True)
class Held:
    """What the driver keeps of one region that the device holds, however many `Region` objects name it."""

    token: Token
    mapping: Mapping
    slot: int
    binding: Binding | None
    owned: bool
    count: int = 1
    on_event: Callable[[Event], None] | None = None


class Device(Function):
    """An initialised virtio-ism device.

    Attributes: as `Function`: `gid`, `devid`, `chunk_size`, `features`, `transport`, `control`; `directory`, None
    unless DIRECTORY and EVENT_VQ are negotiated.
    """

    directory: Directory | None = None

    def __init__(self, transport: Transport, *, interrupts: bool = True) -> None:
        """Initialise the device; arguments and errors as `Function`."""
        self._held: dict[Token, Held] = {}
        self._held_bytes = 0
        self._by_offset: dict[int, Held] = {}
        self._in_transition: dict[Token, deque[Held]] = {}
        self._releases_begun = self._releases_done = 0
        super().__init__(transport, interrupts=interrupts)
        self._settled = threading.Condition(self._lock)

    def _set_up_queues(self, interrupts: bool) -> None:
        super()._set_up_queues(interrupts)
        if self._events is not None and IsmFeature.DIRECTORY in self.features:
            self.directory = Directory(self.control, self.check_usable, self._check_may_wait)

    def _deliver(self, event: Event | IntentEvent) -> None:
        if isinstance(event, IntentEvent):
            if self.directory is not None:
                self.directory.deliver(event)
            return
        with self._lock:
            held = self._by_offset.get(event.offset)
            if held is None:
                return  # detached meanwhile
            callback = held.on_event
            if event.kind == EventType.UPDATE:
                if held.binding is not None:
                    raise_eventfd(held.binding.fd)
                return
        if callback is not None:
            try:
                callback(event)
            except Exception:
                log.exception("%s: an on_event callback failed", self.transport.name)

    def _wake_sleepers(self) -> None:
        for held in self._held.values():
            if held.binding is not None and held.binding.vector < 0:
                raise_eventfd(held.binding.fd)

    def _forget_sleepers(self) -> list[int]:
        left = []
        for held in self._held.values():
            binding, held.binding = held.binding, None
            if binding is not None and binding.vector < 0:
                left.append(binding.fd)
        self._held.clear()
        self._held_bytes = 0
        self._by_offset.clear()
        return left

    @contextmanager
    def _exclusive(self, token: Token) -> Iterator[None]:
        """One attach or detach of a token at a time: the device may give the same chunks out again in between."""
        with self._settled:
            if not self._settled.wait_for(lambda: token not in self._in_transition, COMMAND_TIMEOUT_S):
                raise TransportError(
                    f"{self.transport.name}: an earlier attach or detach of region {token:#018x} is not answered"
                )
            self._in_transition[token] = deque()
        try:
            yield
        finally:
            self._settle(token)

    def _settle(self, token: Token) -> None:
        """Give the turn of the token to the next release that waits for it, else to anybody."""
        with self._settled:
            waiting = self._in_transition[token]
            if not waiting:
                del self._in_transition[token]
                self._settled.notify_all()
                return
            held = waiting.popleft()
        self._detach(held)

    @property
    def holds_regions(self) -> bool:
        """Whether any region that this device attached to, or allocated, is still open here."""
        with self._lock:
            return bool(self._held)

    @property
    def free_window(self) -> int:
        """Bytes of the window in which no region of this device is; those about to be let go count as free."""
        with self._lock:
            return self._caps.regions.length - self._held_bytes

    def alloc(self, size: int, *, interrupt: bool = True, grants: Grants = ()) -> Region:
        """Make a new region, zero-filled, owned by this device; nobody else may attach until granted.

        Args:
            size: bytes, at least 1, rounded up to `chunk_size`.
            interrupt: whether the region gets an eventfd that tells of doorbells.
            grants: (permissions, devid or None for everybody) to set at once, in order.
        Raises: QuotaError, DeviceError, DeviceGoneError, TransportError, RemoteProtocolError (a broken device),
            FeatureMismatchError (the device has no way to tell of doorbells), ValueError (size),
            LocalProtocolError (from a callback of the driver).
        Source: virtio-ism proposal, ALLOC_REGION.
        """
        if not 0 < size < 1 << 63:
            raise ValueError(f"a region of {size} bytes is impossible")
        self._check_may_wait()
        placement = self._with_room(lambda: self.control.alloc(size))
        return self._hold(placement, interrupt=interrupt, grants=grants, owned=True, least=size)

    def attach(
        self,
        token: Token,
        rights: Permission = ALL_GRANTED,
        *,
        interrupt: bool = False,
        offered_by: DevId | None = None,
    ) -> Region:
        """Attach to a peer's region.

        Args:
            rights: READ, WRITE or both; 0 asks for all that is granted.
            interrupt: whether the region gets an eventfd that tells of doorbells.
            offered_by: the device that named the token, when it may lie: a region that this device holds already is
                then refused, because it serves somebody else. Only this device itself can offer a region of its own,
                once.
        Raises: RemoteProtocolError (not `offered_by`'s to offer), PermissionDeniedError, QuotaError, DeviceError
            (ENOENT: unknown token), DeviceGoneError, TransportError, FeatureMismatchError and LocalProtocolError as
            `alloc`.
        Source: virtio-ism proposal, ATTACH_REGION.
        """
        self._check_may_wait()
        with self._exclusive(token):
            if offered_by is not None and not self._may_offer(token, offered_by):
                raise RemoteProtocolError(
                    f"device {offered_by:#x} named region {token:#018x}, which serves another connection", event="token"
                )
            placement = self._with_room(lambda: self.control.attach(token, rights))
            readonly = rights == Permission.READ
            with self._lock:
                held = self._held.get(token)
            if held is None:
                return self._hold(placement, interrupt=interrupt, grants=(), owned=False, readonly=readonly)
            try:
                if interrupt and held.binding is None:
                    held.binding = self._bind(token)
            except BaseException:
                self._detach_now(token, lambda: None)
                raise
            with self._lock:
                held.count += 1
            return Region(self, held, owned=False, readonly=readonly)

    def _with_room(self, place: Callable[[], Placement]) -> Placement:
        """Call `place`; once more when there was no room, but regions are about to be let go."""
        with self._settled:
            begun = self._releases_begun
            pending = self._releases_done < begun
        try:
            return place()
        except QuotaError:
            if not pending:
                raise
            with self._settled:
                self._settled.wait_for(lambda: self._releases_done >= begun, COMMAND_TIMEOUT_S)
        return place()

    def _may_offer(self, token: Token, peer: DevId) -> bool:
        with self._lock:
            held = self._held.get(token)
        if peer == self.devid:
            if held is None:  # this process, the peer, has let it go already
                raise ack_error("ATTACH_REGION", Ack.ENOENT, token)
            return held.owned and held.count == 1
        return held is None

    def _hold(
        self,
        placement: Placement,
        *,
        interrupt: bool,
        grants: Grants,
        owned: bool,
        least: int = 1,
        readonly: bool = False,
    ) -> Region:
        token, first = placement.token, placement.areas[0].offset
        mapping: Mapping | None = None
        binding: Binding | None = None
        try:
            spans = self._checked(placement, least)
            mapping = self.transport.map_spans(self._caps.regions.bar, spans)
            with self.control.one_kick():
                commands = [self.control.grant(token, what, peer) for what, peer in grants]
                vector = self._submit_vector(token) if interrupt else None
            if interrupt:
                binding = self._bound(vector)
            for command in commands:
                command.expect_ok()
            held = Held(token, mapping, first // self.chunk_size, binding, owned)
            with self._lock:
                if self._gone is not None or self._closed:
                    raise DeviceGoneError(self._gone or f"{self.transport.name} is closed")
                if token in self._held or first in self._by_offset:
                    raise RemoteProtocolError(
                        f"{self.transport.name}: region {token:#018x} at {first} is, or is where, another one is",
                        event="areas",
                    )
                self._held[token] = held
                self._held_bytes += mapping.length
                self._by_offset[first] = held
        except BaseException:
            self._detach_now(token, lambda: self._let_go(mapping, binding))
            raise
        return Region(self, held, owned=owned, readonly=readonly)

    def _detach_now(self, token: Token, finish: Callable[[], None]) -> None:
        """Take back an attach that came to nothing; `finish` runs when the device knows. Raises nothing."""
        try:
            command = self.control.detach(token)
        except IsmError:
            finish()
            return
        command.then(finish)
        try:
            command.wait()
        except IsmError as exc:
            log.debug("%s: %s", self.transport.name, exc)

    def _bind(self, token: Token) -> Binding:
        """Give a region an interrupt: a vector, or UPDATE events when there are none."""
        return self._bound(self._submit_vector(token))

    def _submit_vector(self, token: Token) -> tuple[Binding, Command] | None:
        """Begin to give a region a vector, if there are any; `_bound` waits for it."""
        if not self._interrupts or (self._events is not None and self._vectors.exhausted):
            return None
        try:
            binding = self._vectors.acquire()
        except TransportError as exc:
            if self._events is None or exc.errno != errno.EMFILE:
                raise
            return None  # the manager keeps no more eventfds of this client
        try:
            # not only when EVENT_IRQ was offered: devices of the proposal's time offer nothing and can do it
            return binding, self.control.event_vector(token, binding.vector)
        except BaseException:
            self._vectors.release(binding)
            raise

    def _bound(self, begun: tuple[Binding, Command] | None) -> Binding:
        if begun is None:
            return self._software_binding(None)
        binding, command = begun
        try:
            command.expect_ok()
        except BaseException as exc:
            self._vectors.release(binding)
            if not isinstance(exc, DeviceError) or exc.ack != Ack.ERR:
                raise
            return self._software_binding(exc)
        return binding

    def _software_binding(self, cause: DeviceError | None) -> Binding:
        """Make an eventfd into which the service thread turns the UPDATE events of a region without a vector."""
        if self._events is None:
            raise FeatureMismatchError(
                f"{self.transport.name} cannot tell of doorbells: it binds no vectors to regions and has no event "
                "queue; ask for a region without interrupt and look at its memory from time to time",
                [feature_name(IsmFeature.EVENT_IRQ), feature_name(IsmFeature.EVENT_VQ)],
            ) from cause
        return Binding(-1, make_eventfd(), shared=True)

    def _let_go(self, mapping: Mapping | None, binding: Binding | None) -> None:
        """Give back what this process holds of a region that the device has let go."""
        if mapping is not None:
            try:
                mapping.clear()
            except OSError as exc:  # the kernel has no memory for the call: the pages stay until the mapping goes
                log.debug("%s: a mapping was not cleared: %s", self.transport.name, exc)
        if binding is None:
            return
        if binding.vector < 0:
            os.close(binding.fd)
        else:
            self._vectors.release(binding)

    def _checked(self, placement: Placement, least: int) -> list[Span]:
        name, window, chunk = (
            f"{self.transport.name}: region {placement.token:#018x}",
            self._caps.regions,
            self.chunk_size,
        )
        spans = []
        for area in placement.areas:
            if (
                area.length <= 0
                or area.length % chunk
                or area.offset % chunk
                or area.offset + area.length > window.length
            ):
                raise RemoteProtocolError(
                    f"{name} has an area {area.offset}+{area.length} that is not made of chunks inside the window of "
                    f"{window.length} bytes",
                    event="areas",
                )
            spans.append(Span(window.offset + area.offset, area.length))
        end = 0
        for area in sorted(placement.areas, key=lambda area: area.offset):
            if area.offset < end:
                raise RemoteProtocolError(f"{name} has two areas over one chunk at {area.offset}", event="areas")
            end = area.offset + area.length
        if placement.size < least:
            raise RemoteProtocolError(f"{name} has {placement.size} bytes, {least} were asked for", event="areas")
        return spans

    def release(self, region: Region) -> None:
        """Undo one attach or the alloc, without waiting for the device (`Region.close` calls this)."""
        if self._pid != os.getpid():
            region.closed = True
            return
        held = region._held
        with self._lock:
            if region.closed:
                return
            region.closed = True
            if self._closed:
                return  # with the device went the region
            self._releases_begun += 1
            waiting = self._in_transition.get(held.token)
            if waiting is not None:
                waiting.append(held)
                return
            self._in_transition[held.token] = deque()
        self._detach(held)

    def _detach(self, held: Held) -> None:
        """Let one attach go; the turn of the token is the caller's and ends when the device knows."""
        with self._lock:
            held.count -= 1
            last = held.count == 0
            if last and self._held.get(held.token) is held:
                del self._held[held.token]
                self._held_bytes -= held.mapping.length
                del self._by_offset[held.slot * self.chunk_size]

        def finish() -> None:
            try:
                if last:
                    binding, held.binding = held.binding, None
                    self._let_go(held.mapping, binding)
            finally:
                with self._settled:
                    self._releases_done += 1
                    self._settled.notify_all()
                self._settle(held.token)

        try:
            command = self.control.detach(held.token)
        except IsmError:
            finish()
        else:
            command.then(finish)

    def grant(self, token: Token, permissions: Permission, peer: DevId | None = None) -> None:
        """Set what a device (or, with None, every device without an entry) may do with a region.

        Raises: DeviceError by ack (ERR: neither the owner's nor a MANAGE holder's to grant, or no such device; ENOENT),
            DeviceGoneError, TransportError, LocalProtocolError (from a callback of the driver).
        Source: virtio-ism proposal, GRANT.
        """
        self._check_may_wait()
        self.control.grant(token, permissions, peer).expect_ok()

    def wake(self, region: Region) -> None:
        """Make the descriptor of a region readable here (`Region.wake` calls this)."""
        with self._lock:
            if not region.closed and not self._closed and region._held.binding is not None:
                raise_eventfd(region._held.binding.fd)

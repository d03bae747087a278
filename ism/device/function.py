# SPDX-License-Identifier: Apache-2.0
"""One emulated virtio-ism PCI function, sans-io: register accesses in, values, requests and effects out.

It ties the parts together: configuration space, the BARs with the virtio structures, MSI-X and doorbells, the status
machine, the control and event queues. It follows virtio 1.3 sections 2 to 4 and the virtio-ism proposal. It owns the
driver-visible state of one device; regions belong to the registry, memory and mappings to the host. Whoever uses it
calls it from one thread at a time.

What the driver writes is hostile: every access of any width at any offset is defined, work is bounded per call, and a
driver that breaks the rules of virtqueues finds its own device in NEEDS_RESET, nothing else.

A control command takes three steps, since its mappings must exist before it is acknowledged:

    work = function.bar_write(...)             the driver notified: chains are popped, commands decided
    for request in work.requests:
        carry out request.effects              by the host, as slowly as it must
        effects = function.complete(request)   the reply is written, the chain handed back; maybe an interrupt, and
                                               what must come after the ack
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ism.device import bars
from ism.device.bars import Layout
from ism.device.commands import MAX_READABLE, Commands, Reply, refusal
from ism.device.common_cfg import Change, CommonRegisters
from ism.device.config_space import ConfigSpace
from ism.device.contract import Effect, FunctionConfig, GuestMemory, Registry
from ism.device.events import EventQueue
from ism.device.interrupts import Interrupts
from ism.device.msix import MsixRegisters
from ism.device.queue import Chain, DeviceQueue
from ism.errors import LocalProtocolError, RemoteProtocolError
from ism.ids import Token
from ism.virtio import ism_spec
from ism.virtio.ism_spec import QUEUE_CONTROL, QUEUE_EVENTS, Ack, IsmFeature
from ism.virtio.pci import Feature, Isr, Status

logger = logging.getLogger(__name__)

MAX_DOORBELL_BYTES = 8
COUNTERS = (
    "resets",
    "refused_features",
    "malformed_queues",
    "bad_notifies",
    "commands",
    "refused_commands",
    "unknown_commands",
    "abandoned_commands",
    "doorbells",
    "bad_doorbells",
    "events_posted",
    "events_merged",
    "events_dropped",
)


class WindowAccess(Protocol):
    """The regions window for accesses that are trapped: what is mapped in it, zeros elsewhere."""

    def read(self, offset: int, n: int) -> bytes:
        """Read exactly `n` bytes."""
        ...

    def write(self, offset: int, data: bytes) -> None:
        """Write where a writable region is mapped, drop the rest."""
        ...


@dataclass(eq=False, slots=True)
class Request:
    """A control command whose effects are under way. The host reads `effects` and gives the object back.

    `effects` are in place before `IsmFunction.complete`.
    """

    effects: Sequence[Effect]
    _chain: Chain
    _reply: Reply
    _epoch: int
    _done: bool = False

    @property
    def late(self) -> bool:
        """Whether it is decided when it is completed: what others have asked for before should be done by then."""
        return self._reply.late is not None


@dataclass(slots=True)
class Work:
    """What a register access asks of the host: first `effects`, in order, then each request, in order.

    The `effects` that name this device are in place before the access is answered: a driver that has reset its device
    finds nothing mapped. The requests are not waited for.

    `more`: chains are left; the host calls `IsmFunction.run` when it has time for them.
    """

    effects: list[Effect] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    more: bool = False


class IsmFunction:
    """One PCI function.

    Attributes: `config` (as given), `layout` (BARs and structures), `stats` (counters by name, see `COUNTERS`).
    """

    def __init__(
        self,
        config: FunctionConfig,
        registry: Registry,
        memory: GuestMemory,
        *,
        window: WindowAccess | None = None,
        chains_per_call: int = ism_spec.CONTROL_QUEUE_SIZE,
    ) -> None:
        """Build the function in its state after power on.

        Args:
            config: checked here.
            registry: knows `config.devid`; asked for every command.
            memory: guest memory of this device.
            window: serves accesses to BAR 4 that come here; without it they read zeros and write nothing.
            chains_per_call: most commands that one call starts.
        Raises: ValueError, naming the field, for an unusable configuration.
        """
        self.config = config
        self.layout = Layout(config)
        self.stats = dict.fromkeys(COUNTERS, 0)
        self._registry = registry
        self._window = window
        self._chains_per_call = chains_per_call
        self._space = ConfigSpace(self.layout)
        self._msix = MsixRegisters(self.layout)
        self._interrupts = Interrupts(config.devid, config.vectors, self._space)
        sizes = (ism_spec.CONTROL_QUEUE_SIZE, ism_spec.EVENT_QUEUE_SIZE)[: self.layout.num_queues]
        self._queues = [DeviceQueue(index, size, memory) for index, size in enumerate(sizes)]
        self._common = CommonRegisters(offered_features(config), self._queues, config.vectors)
        self._events = EventQueue(self._queues[QUEUE_EVENTS], self.stats) if len(self._queues) > 1 else None
        event_irq = IsmFeature.EVENT_IRQ in config.features
        self._commands = Commands(registry, config.devid, config.vectors, event_irq=event_irq)
        self._device_config = ism_spec.Config(
            gid=config.gid,
            devid=config.devid,
            chunk_size=config.chunk_size,
            notify_size=ism_spec.NOTIFY_SIZE,
        ).pack()
        self._epoch = 0

    def add_feature(self, feature: IsmFeature) -> None:
        """Offer one more feature bit. Raises LocalProtocolError once a driver has begun."""
        if self._common.status:
            raise LocalProtocolError(f"feature {feature.name} comes too late: a driver has begun")
        self._common.offered |= 1 << feature

    # configuration space

    def config_read(self, offset: int, n: int) -> bytes:
        """Read exactly `n` bytes of configuration space; beyond its 256 bytes all is zero.

        Reading `pci_cfg_data` makes the access that the PCI configuration access capability names
        (virtio 1.3 section 4.1.4.9).
        """
        access = self._space.cfg_access() if self._touches_cfg_data(offset, n) else None
        if access:
            self._space.cfg_data = self.bar_read(access.bar, access.offset, access.length)
        return self._space.read(offset, n)

    def config_write(self, offset: int, data: bytes) -> Work:
        """Write to configuration space; bits that are not writable keep their value."""
        was_asserted = self._interrupts.intx_asserted
        was_master = self._space.bus_master
        self._space.write(offset, data)
        self._interrupts.refresh()
        work = Work()
        if self._space.bus_master and not was_master:
            for index in (QUEUE_CONTROL, QUEUE_EVENTS):
                self._notify(index, work)
        if not was_asserted:
            work.effects += self._interrupts.reassert()
        access = self._space.cfg_access() if self._touches_cfg_data(offset, len(data)) else None
        if access:
            done = self.bar_write(access.bar, access.offset, self._space.cfg_data[: access.length])
            work = Work(work.effects + done.effects, work.requests + done.requests, work.more or done.more)
        return work

    def _touches_cfg_data(self, offset: int, n: int) -> bool:
        return offset < self._space.cfg_data_offset + 4 and offset + n > self._space.cfg_data_offset

    # BARs

    def bar_size(self, bar: int) -> int:
        """Bytes of the BAR; 0 when there is none, and for the upper half of a 64-bit one."""
        return self.layout.bar_size(bar)

    def bar_read(self, bar: int, offset: int, n: int) -> bytes:
        """Read exactly `n` bytes; what is no register reads zero. Reading the ISR status clears it."""
        if bar == bars.BAR_VIRTIO:
            return self._virtio_read(offset, n)
        if bar == bars.BAR_MSIX:
            return self._msix.read(offset, n)
        if bar == bars.BAR_REGIONS and self._window and offset + n <= self.config.window_size:
            return self._window.read(offset, n)
        return bytes(n)

    def bar_write(self, bar: int, offset: int, data: bytes) -> Work:
        """Write; what is no register is ignored."""
        if bar == bars.BAR_VIRTIO:
            return self._virtio_write(offset, data)
        if bar == bars.BAR_MSIX:
            self._msix.write(offset, data)
        elif bar == bars.BAR_NOTIFY:
            return self._doorbells(offset, len(data))
        elif bar == bars.BAR_REGIONS and self._window and offset + len(data) <= self.config.window_size:
            self._window.write(offset, data)
        return Work()

    def _virtio_read(self, offset: int, n: int) -> bytes:
        # an access belongs to the structure it begins in; what it reaches of the next page reads zero
        at = offset % bars.STRUCTURE_STRIDE
        match offset - at:
            case bars.COMMON_OFFSET:
                return self._common.read(at, n)
            case bars.ISR_OFFSET if at == 0 and n:
                return bytes([self._interrupts.read_isr()]).ljust(n, b"\0")
            case bars.DEVICE_OFFSET:
                return self._device_config[at : at + n].ljust(n, b"\0")
        return bytes(n)

    def _virtio_write(self, offset: int, data: bytes) -> Work:
        at = offset % bars.STRUCTURE_STRIDE
        work = Work()
        match offset - at:
            case bars.COMMON_OFFSET:
                change = self._common.write(at, data)
                if Change.RESET in change:
                    work.effects += self._reset_device()
                if Change.REFUSED in change:
                    self.stats["refused_features"] += 1
                if Change.BROKEN in change:
                    work.effects += self._break(self._common.fault)
            case bars.QUEUE_NOTIFY_OFFSET:
                for index in _touched(at, len(data), bars.QUEUE_NOTIFY_MULTIPLIER, self.layout.num_queues):
                    self._notify(index, work)
                if at + len(data) > self.layout.queue_notify_length:
                    self.stats["bad_notifies"] += 1
        return work

    # queues

    def run(self) -> Work:
        """Start commands that were left over when `Work.more` was set; harmless at any other time."""
        work = Work()
        self._run_control(work)
        return work

    def complete(self, request: Request) -> list[Effect]:
        """Write the reply of a command whose effects are in place, and hand its chain back.

        Commands may be completed in any order. After a reset, or when the device needs one, nothing is written, and a
        command that is decided late is never decided.

        Returns: the interrupt, when one is due; then what must come after the ack.
        Raises: LocalProtocolError when the request was completed before.
        """
        self._finish(request)
        if not self._current(request):
            self.stats["abandoned_commands"] += 1
            return []
        queue, reply = self._queues[QUEUE_CONTROL], request._reply
        if reply.late is not None:
            reply = reply.late()
            self._count(reply)
        effects: list[Effect] = []
        before = queue.used
        try:
            if queue.push(request._chain, reply.data):
                effects += self._interrupts.raise_for(queue.vector, Isr.QUEUE)
        except RemoteProtocolError as exc:
            effects += self._break(str(exc))
        if reply.commit is not None and queue.used != before:
            effects += reply.commit()
        return effects

    def give_up(self, request: Request, ack: Ack = Ack.ENOMEM) -> list[Effect]:
        """Answer `ack` to a command whose effects the host could not carry out; it still has to be completed.

        A region that the command attached is detached again.

        Returns: effects that undo the command, to be carried out before `complete`.
        Raises: LocalProtocolError when the request was completed before.
        """
        if request._done:
            raise LocalProtocolError("a control command was given up after it was completed")
        if request._reply.late is not None or request._reply.ack is Ack.OK:
            self.stats["refused_commands"] += 1
        gained, request._reply = request._reply.gained, refusal(ack)
        if not gained or request._epoch != self._epoch:
            return []
        return list(self._registry.detach(self.config.devid, Token(gained)).effects)

    def post_event(self, payload: bytes) -> list[Effect]:
        """Put an event on the event queue, or into the backlog when the driver has posted no buffer.

        Dropped and counted unless the driver negotiated the event queue, enabled it, and is running.

        Returns: the interrupt, when one is due.
        """
        if not self._events_running():
            self.stats["events_dropped"] += 1
            return []
        assert self._events
        try:
            due = self._events.post(payload)
        except RemoteProtocolError as exc:
            return self._break(str(exc))
        return list(self._interrupts.raise_for(self._queues[QUEUE_EVENTS].vector, Isr.QUEUE)) if due else []

    def _notify(self, index: int, work: Work) -> None:
        if index == QUEUE_CONTROL:
            self._run_control(work)
        elif self._events_running():
            assert self._events
            try:
                if self._events.flush():
                    work.effects += self._interrupts.raise_for(self._queues[index].vector, Isr.QUEUE)
            except RemoteProtocolError as exc:
                work.effects += self._break(str(exc))

    @property
    def _serving(self) -> bool:
        """Whether the queues may be touched: a driver that is killed may leave them to others, its kernel sees to that.

        uio_pci_generic and vfio-pci take bus mastering away when a program ends in whatever way.
        """
        return self._common.running and self._space.bus_master

    def _events_running(self) -> bool:
        return self._serving and self._common.negotiated(IsmFeature.EVENT_VQ) and self._queues[QUEUE_EVENTS].enabled

    def _run_control(self, work: Work) -> None:
        queue = self._queues[QUEUE_CONTROL]
        if not self._serving or not queue.enabled:
            return
        try:
            for _ in range(self._chains_per_call):
                chain = queue.pop()
                if chain is None:
                    return
                work.requests.append(self._start(queue, chain))
            work.more = queue.available() > 0
        except RemoteProtocolError as exc:
            work.effects += self._break(str(exc))

    def _start(self, queue: DeviceQueue, chain: Chain) -> Request:
        readable = queue.read(chain, MAX_READABLE)
        capacity = chain.writable_size
        if len(readable) < ism_spec.CommandHeader.SIZE or not capacity:
            raise RemoteProtocolError(
                f"queue {queue.index}: a command of {chain.readable_size} bytes with {capacity} bytes for its reply: "
                f"at least {ism_spec.CommandHeader.SIZE} and 1 are needed",
                state=f"queue {queue.index}",
            )
        directory = self._common.negotiated(IsmFeature.DIRECTORY)
        reply = self._commands.execute(readable, capacity, directory=directory)
        self.stats["commands"] += 1
        if not reply.known:
            self.stats["unknown_commands"] += 1
        if reply.late is None:
            self._count(reply)
        return Request(reply.effects, chain, reply, self._epoch)

    def _count(self, reply: Reply) -> None:
        if reply.ack is not Ack.OK:
            self.stats["refused_commands"] += 1

    def _finish(self, request: Request) -> None:
        if request._done:
            raise LocalProtocolError("a control command was completed twice")
        request._done = True

    def _current(self, request: Request) -> bool:
        return request._epoch == self._epoch and self._serving

    def _break(self, problem: str) -> list[Effect]:
        """Put the device in NEEDS_RESET (virtio 1.3 section 2.1.2)."""
        self.stats["malformed_queues"] += 1
        count = self.stats["malformed_queues"]
        if not count & (count - 1):  # a driver that does it again and again does not fill the log
            logger.warning("device %#x %s needs a reset: %s", self.config.devid, self.config.name, problem)
        was_running = self._common.running
        self._common.status |= Status.NEEDS_RESET
        return list(self._interrupts.raise_for(self._common.config_vector, Isr.CONFIG)) if was_running else []

    # doorbells

    def _doorbells(self, offset: int, n: int) -> Work:
        work = Work()
        slots = _touched(offset, n, ism_spec.NOTIFY_SIZE, self.layout.slots) if n <= MAX_DOORBELL_BYTES else range(0)
        for slot in slots:
            self.stats["doorbells"] += 1
            work.effects += self._registry.doorbell(self.config.devid, slot)
        if n > MAX_DOORBELL_BYTES or offset + n > self.layout.notify_length:
            self.stats["bad_doorbells"] += 1
        return work

    # interrupts

    @property
    def msix_enabled(self) -> bool:
        """Whether the driver uses MSI-X."""
        return self._space.msix_enabled

    def set_msix_enabled(self, enabled: bool) -> list[Effect]:
        """Turn MSI-X on or off, as the client does by giving or taking eventfds without a configuration write.

        Returns: an interrupt when INTA is asserted by that.
        """
        was_asserted = self._interrupts.intx_asserted
        self._space.enable_msix(enabled)
        self._interrupts.refresh()
        return [] if was_asserted else list(self._interrupts.reassert())

    @property
    def intx_asserted(self) -> bool:
        """Whether INTA is asserted; a client that unmasks INTx gets an interrupt then."""
        return self._interrupts.intx_asserted

    def route(self, vector: int) -> int | None:
        """Say how the host raises an `Interrupt` effect of this device, and set the ISR status where that is due.

        Args: `vector`: of the effect.
        Returns: an index of the MSI-X table, `INTX` (from `ism.device.interrupts`), or None for nothing.
        """
        return self._interrupts.route(vector)

    # resets

    @property
    def status(self) -> Status:
        """Device status as the driver reads it."""
        return self._common.status

    def reset(self) -> list[Effect]:
        """Reset the whole function, as PCI does, or because its client is gone.

        Returns: effects that release what the device held. Requests that are under way may be completed or forgotten.
        """
        self._space.reset()
        self._msix.reset()
        self._common.reset()
        return self._reset_device()

    def _reset_device(self) -> list[Effect]:
        self.stats["resets"] += 1
        self._epoch += 1
        if self._events:
            self._events.reset()
        self._interrupts.reset()
        return list(self._registry.reset(self.config.devid))


def offered_features(config: FunctionConfig) -> int:
    """Feature bits that a function built from `config` offers, as one number."""
    bits = {Feature.VERSION_1, Feature.ACCESS_PLATFORM, *config.features}
    return sum(1 << bit for bit in bits)


def _touched(offset: int, n: int, stride: int, count: int) -> range:
    """Numbers of the words of `stride` bytes, below `count`, that an access of `n` bytes at `offset` touches."""
    return range(min(offset // stride, count), min(-(-(offset + n) // stride), count)) if n else range(0)

# SPDX-License-Identifier: Apache-2.0
"""One device that has a client: the emulated function behind a vfio-user connection.

It owns what the client brought (DMA maps, eventfds, its end of the map channel) and ties it to the function, the
registry and the host. It decides nothing about registers (`ism.device`) nor regions (`registry`). Follows the vfio-user
specification and vfio.h. The client is hostile: whatever it does or fails to do costs it its own device and nothing
else, and when it goes everything goes with it.

A control command is completed once the client has mapped what the command made appear; a client without a map channel
reaches its window by trapped accesses, and nothing has to be waited for. Several commands may be under way; they are
completed in the order in which they were started.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import trio

from ism.device.bars import BAR_REGIONS
from ism.device.config_space import CONFIG_SIZE
from ism.device.contract import Effect, FunctionConfig, MapChunks, UnmapChunks, WiringChanged
from ism.device.function import IsmFunction, Request, Work
from ism.device.interrupts import INTX
from ism.errors import TransportError
from ism.ids import DevId, Token
from ism.manager.dma import GuestRam
from ism.manager.doorbells import Wire, Wish, wish
from ism.manager.host import DomainHost
from ism.manager.memories import TrappedWindow
from ism.manager.metered import MeteredRegistry
from ism.manager.orders import MapOrder, Orders, Refused, UnmapOrder
from ism.manager.quota import TokenBucket
from ism.manager.vectors import Intx, Vectors, check_eventfds
from ism.memory import create_memfd
from ism.vfio_user.connection import Connection
from ism.vfio_user.errors import VfioUserError
from ism.vfio_user.fds import Fd
from ism.vfio_user.map_channel_server import GONE, MapChannelServer, PendingAnswer, offer_channel
from ism.vfio_user.payloads import (
    DeviceFlag,
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    IrqAction,
    IrqData,
    IrqFlag,
    IrqInfo,
    RegionFlag,
    RegionInfo,
    SetIrqs,
)
from ism.virtio.ism_spec import IsmFeature

logger = logging.getLogger("ism.manager")

_COMMANDS_PER_TURN: Final = 8
_EFFECTS_PER_TURN: Final = 256
VFIO_REGIONS: Final = 9
VFIO_CONFIG_REGION: Final = 7
VFIO_BARS: Final = 6
VFIO_IRQS: Final = 5
VFIO_IRQ_INTX: Final = 0
VFIO_IRQ_MSIX: Final = 2
"""Indices of vfio-pci (vfio.h)."""


@dataclass(frozen=True, slots=True)
class _WireChange:
    """A change of one eventfd under way: the client's answer, what it lacks then, and what it has then."""

    answer: PendingAnswer
    old: Wire | None
    new: Wire | None


class DeviceHost:
    """A device while it has a client. Implements `ism.vfio_user.handler.DeviceHandler` and `host.Connected`.

    Attributes: `name`, `devid`, `connection`, `function`, `registry` (counts commands), `ram`, `since_s` (trio time).
    """

    def __init__(
        self,
        domain: DomainHost,
        connection: Connection,
        *,
        name: str,
        devid: DevId,
        window_size: int,
        vectors: int,
        features: frozenset[int],
        map_timeout_s: float,
        may_keep: Callable[[int, int], bool],
        agent_of: Callable[[int], socket.socket | None],
        gone: Callable[[DeviceHost], None],
    ) -> None:
        """Connect a device that the registry knows to its client.

        Args: `may_keep`: whether a descriptor from the client may stay, by its number, and how many it then has here;
            `agent_of`: the connection of the map agent in a process, if it has one;
            `gone`: called last, when the client has gone and everything is released.
        Raises: ValueError for a shape no function can be built from.
        """
        self.name, self.devid, self.connection = name, devid, connection
        self.since_s = trio.current_time()
        self._domain, self._gone, self._map_timeout_s = domain, gone, map_timeout_s
        self._may_keep, self._agent_of = may_keep, agent_of
        self._page_size, self._window_size = domain.registry.chunk_size, window_size
        self._placeholder: Fd | None = None
        self._takes_doorbells = False
        registry = domain.registry
        rate = registry.devices[devid].account.quota.commands_per_s
        self.registry = MeteredRegistry(registry, TokenBucket(rate, now_s=self.since_s), trio.current_time)
        self.ram = GuestRam()
        self.function = IsmFunction(
            FunctionConfig(registry.gid, devid, registry.chunk_size, window_size, vectors, features, name),
            self.registry,
            self.ram,
            window=TrappedWindow(registry, devid, domain.shared.memories),
            chains_per_call=_COMMANDS_PER_TURN,
        )
        self._vectors = Vectors(vectors)
        self._intx = Intx()
        self._orders = Orders(window_size, registry.chunk_size, map_timeout_s)
        self._wires: dict[Token, Wire] = {}
        self._rewiring: set[Token] = set()
        registry.devices[devid].can_reopen = False
        self._namespace = network_namespace(connection.peer.pid)
        domain.connect(devid, self)

    @property
    def has_channel(self) -> bool:
        """Whether the client maps memory itself."""
        return self._orders.has_channel

    @property
    def has_agent(self) -> bool:
        """Whether a map agent in a virtual machine's VMM maps for the client."""
        return self.has_channel and self._placeholder is not None

    # -- vfio-user -------------------------------------------------------------------------------------------------

    async def version(self, capabilities: Mapping[str, Any]) -> tuple[Mapping[str, Any], Sequence[Fd]]:
        """Give the client a map channel if it asks for one; then it is a process, and its own namespace counts.

        QEMU does not ask, and is a virtual machine; if it has a map agent, that is where its channel leads.
        """
        directory = self._domain.registry.directory
        directory.set_scope(self.devid, ("device", self.devid))
        try:
            offer = offer_channel(capabilities, timeout_s=self._map_timeout_s)
        except OSError as error:
            raise VfioUserError(error.errno or errno.EMFILE, "no map channel can be made") from error
        if offer is None:
            await self._meet_agent()
            return {}, ()
        added, fds, channel = offer
        self._takes_doorbells = True
        self._domain.registry.devices[self.devid].can_reopen = True
        directory.set_scope(self.devid, ("namespace", self._namespace))
        self._orders.open(channel)
        self.connection.start_soon(self._run_channel, channel)
        self.connection.start_soon(self._run_orders)
        return added, fds

    async def _meet_agent(self) -> None:
        """Announce the window to the map agent of this client, if there is one. Raises VfioUserError."""
        sock = self._agent_of(self.connection.peer.pid)
        if sock is None:
            self.function.add_feature(IsmFeature.TRAPPED)
            return
        channel = MapChannelServer(sock, timeout_s=self._map_timeout_s)
        self.connection.start_soon(self._run_channel, channel)
        try:
            placeholder = self._placeholder = Fd(create_memfd("ism-window", self._window_size))
            await channel.hello(self._page_size, self._window_size, os.fstat(placeholder.fileno()).st_ino)
        except (OSError, TransportError, VfioUserError) as error:
            channel.close()
            raise VfioUserError(errno.EPROTO, f"the map agent of pid {self.connection.peer.pid}: {error}") from error
        self._domain.registry.devices[self.devid].can_reopen = True
        self._orders.open(channel, greeted=True)
        self.connection.start_soon(self._run_orders)

    async def device_info(self) -> DeviceInfo:
        """Describe a PCI device that can be reset."""
        return DeviceInfo(flags=DeviceFlag.RESET | DeviceFlag.PCI, num_regions=VFIO_REGIONS, num_irqs=VFIO_IRQS)

    async def region_info(self, index: int) -> RegionInfo:
        """Describe a BAR or configuration space.

        None can be mapped, since regions come over the map channel; but a client with a map agent maps an empty file in
        place of the regions, over which the agent then puts them.
        """
        if index == BAR_REGIONS and self._placeholder is not None:
            flags = RegionFlag.READ | RegionFlag.WRITE | RegionFlag.MMAP
            return RegionInfo(index=index, size=self._window_size, flags=flags, fd=self._placeholder)
        size = self.function.bar_size(index) if index < VFIO_BARS else 0
        if index == VFIO_CONFIG_REGION:
            size = CONFIG_SIZE
        return RegionInfo(index=index, size=size, flags=RegionFlag.READ | RegionFlag.WRITE if size else 0)

    async def irq_info(self, index: int) -> IrqInfo:
        """Describe INTA or the MSI-X vectors; there are no others."""
        if index == VFIO_IRQ_INTX:
            flags = IrqFlag.EVENTFD | IrqFlag.MASKABLE | IrqFlag.AUTOMASKED
            return IrqInfo(flags=flags, index=index, count=1)
        if index == VFIO_IRQ_MSIX:
            return IrqInfo(flags=IrqFlag.EVENTFD, index=index, count=self._vectors.count)
        return IrqInfo(flags=0, index=index, count=0)

    async def region_read(self, index: int, offset: int, count: int) -> bytes:
        """Read registers, or the window as it is mapped for this device."""
        if index == VFIO_CONFIG_REGION:
            return self.function.config_read(offset, count)
        try:
            return self.function.bar_read(index, offset, count)
        except OSError as error:
            raise VfioUserError(error.errno or errno.EIO, "the region's memory cannot be reached") from error

    async def region_write(self, index: int, offset: int, data: bytes) -> None:
        """Write registers, ring doorbells, or write to the window where this device may."""
        had_msix = self.function.msix_enabled
        try:
            if index == VFIO_CONFIG_REGION:
                work = self.function.config_write(offset, data)
            else:
                work = self.function.bar_write(index, offset, data)
        except OSError as error:
            raise VfioUserError(error.errno or errno.EIO, "the region's memory cannot be reached") from error
        if index == BAR_REGIONS:
            return
        self._do(work)
        if had_msix != self.function.msix_enabled:
            self._rewire_vectors(range(self._vectors.count))
        if any(isinstance(effect, UnmapChunks) for effect in work.effects):
            await self._orders.wait_done()  # a reset: the driver may take it that its mappings are gone

    async def set_irqs(self, request: SetIrqs, fds: list[Fd]) -> None:
        """Take or give back eventfds; trigger, mask or unmask."""
        if request.index == VFIO_IRQ_INTX:
            self._set_intx(request, fds)
        elif request.index == VFIO_IRQ_MSIX:
            self._check_may_keep(fds, self._vectors.bound + len(fds))
            self._set_msix(request, fds)
        elif not request.disables:
            raise VfioUserError(errno.EINVAL, f"interrupt type {request.index} does not exist")

    async def dma_map(self, request: DmaMap, fd: Fd | None) -> None:
        """Let the device use a part of the client's memory."""
        if fd is not None:
            self._check_may_keep([fd], 0)
        self.ram.add(
            request.address,
            request.size,
            fd,
            request.offset,
            readable=request.readable,
            writable=request.writable,
        )

    async def dma_unmap(self, request: DmaUnmap) -> None:
        """End a map; no task holds on to guest memory between two awaits."""
        self.ram.remove(request.address, request.size)

    async def reset(self) -> None:
        """Reset the function; the client's eventfds and DMA maps stay."""
        self._carry_out(self.function.reset())
        if self._vectors:
            self._carry_out(self.function.set_msix_enabled(True))
        await self._orders.wait_done()

    async def closed(self) -> None:
        """Release everything; the peers are told, some at a time: others are served in between."""
        self._domain.disconnect(self.devid)
        self._orders.close()
        effects = self.function.reset()
        try:
            for wire in self._wires.values():
                self._forget(wire)
            self._wires.clear()
            self._vectors.clear()
            self._intx.set(None)
            self.ram.clear()
            if self._placeholder is not None:
                self._placeholder.close()
            for start in range(0, len(effects), _EFFECTS_PER_TURN):
                self._domain.carry_out(effects[start : start + _EFFECTS_PER_TURN])
                await trio.lowlevel.checkpoint()
        finally:
            self._gone(self)

    # -- host ------------------------------------------------------------------------------------------------------

    def give(self, effect: MapChunks | UnmapChunks) -> None:
        """Order the client to map or unmap on somebody else's behalf; a client that refuses loses its device."""
        self._order(effect, self._lost)

    def interrupt(self, vector: int) -> None:
        """Raise an interrupt, as the function routes it."""
        route = self.function.route(vector)
        if route == INTX:
            self._intx.signal()
        elif route is not None:
            self._vectors.signal(route)

    def post(self, payload: bytes) -> Sequence[Effect]:
        """Put an event on the event queue."""
        return self.function.post_event(payload)

    def exclusive_eventfd(self, vector: int) -> Fd | None:
        """Return the eventfd of a vector that serves one region only, if MSI-X is on and it has one."""
        if not self.function.msix_enabled or self._domain.registry.shares_vector(self.devid, vector):
            return None
        return self._vectors.get(vector)

    def rewire(self, token: Token) -> None:
        """Have the client's eventfd for a region looked at when its turn comes."""
        if not self._takes_doorbells or token in self._rewiring:
            return
        if token not in self._wires and wish(self._domain.registry, self._domain.devices, self.devid, token) is None:
            return
        self._rewiring.add(token)
        self._orders.give(_WireOrder(self, token))

    # -- commands --------------------------------------------------------------------------------------------------

    def _do(self, work: Work) -> None:
        """Carry out what a register access asks for."""
        self._carry_out(work.effects)
        for request in work.requests:
            self._start(request)
        if work.more:
            self.connection.start_soon(self._run_on)

    async def _run_on(self) -> None:
        await trio.lowlevel.checkpoint()
        self._do(self.function.run())

    def _start(self, request: Request) -> None:
        """Begin a command: its mappings first, then its completion, then what nobody waits for."""
        refusals: list[TransportError] = []
        wiring = []
        for effect in request.effects:
            if isinstance(effect, MapChunks | UnmapChunks) and effect.devid == self.devid:
                self._order(effect, refusals.append if isinstance(effect, MapChunks) else self._lost)
            elif isinstance(effect, WiringChanged):
                wiring.append(effect)
            else:
                self._domain.carry_out((effect,))
        if request.late:
            self.connection.start_soon(self._complete_late, request)
            return
        self._orders.then(lambda: self._complete(request, refusals))
        self._domain.carry_out(wiring)

    async def _complete_late(self, request: Request) -> None:
        """Complete a CLAIM once every message that was there when it came is handled.

        The client's INTEND is among them: it was sent before the connection was made that the server claims.
        """
        await trio.lowlevel.checkpoint()
        self._orders.then(lambda: self._complete(request, []))

    def _complete(self, request: Request, refusals: list[TransportError]) -> None:
        if self.connection.over is not None:
            return  # its driver has looked at the queues for the last time
        if refusals:
            logger.info("device %s: a mapping failed, its command with it: %s", self.name, refusals[0])
            undone = self.function.give_up(request)
            if not undone:
                self._lost(refusals[0])  # not a region it gained but one it was to keep with fewer rights
            self._carry_out(undone)
            self._orders.then(lambda: self._complete(request, []))
            return
        self._carry_out(self.function.complete(request))

    def _carry_out(self, effects: Sequence[Effect]) -> None:
        self._domain.carry_out(effects)

    def _order(self, effect: MapChunks | UnmapChunks, refused: Refused) -> None:
        if not self.has_channel:
            return
        if isinstance(effect, MapChunks):
            narrows = refused == self._lost
            self._orders.give(MapOrder(effect, self._domain.shared.memories, refused, narrows=narrows))
        else:
            self._orders.give(UnmapOrder(effect, refused))

    def _lost(self, error: TransportError) -> None:
        self.connection.drop(f"it does not map what it is told to: {error}")

    def _check_may_keep(self, fds: Sequence[Fd], held: int) -> None:
        if not all(self._may_keep(fd.fileno(), held) for fd in fds):
            raise VfioUserError(errno.EMFILE, "the manager keeps no more descriptors for this client")

    # -- interrupts ------------------------------------------------------------------------------------------------

    def _set_intx(self, request: SetIrqs, fds: list[Fd]) -> None:
        chosen = request.data is not IrqData.BOOL or request.bools[0]
        if request.disables:
            self._intx.set(None)
        elif request.action is IrqAction.TRIGGER and request.data is IrqData.EVENTFD:
            check_eventfds(fds)
            self._intx.set(fds[0] if fds else None)
            if self.function.intx_asserted:
                self._intx.signal()
        elif request.data is IrqData.EVENTFD:
            raise VfioUserError(errno.EINVAL, "INTA is masked and unmasked by message, not by eventfd")
        elif chosen and request.action is IrqAction.TRIGGER:
            self._intx.signal()
        elif chosen and request.action is IrqAction.MASK:
            self._intx.mask()
        elif chosen:
            self._intx.unmask(self.function.intx_asserted)

    def _set_msix(self, request: SetIrqs, fds: list[Fd]) -> None:
        touched = range(request.start, request.start + request.count)
        if request.disables:
            self._vectors.clear()
            touched = range(self._vectors.count)
            self._carry_out(self.function.set_msix_enabled(False))
        elif request.data is IrqData.EVENTFD and fds:
            check_eventfds(fds)
            self._carry_out(self.function.set_msix_enabled(True))
            self._vectors.set(request.start, fds)
        elif request.data is IrqData.EVENTFD:
            self._vectors.unset(request.start, request.count)
        else:
            for vector in touched:
                if request.data is IrqData.NONE or request.bools[vector - request.start]:
                    self._vectors.signal(vector)
            return
        self._rewire_vectors(touched)

    def _rewire_vectors(self, vectors: range) -> None:
        """Have the peers look again whose regions are bound to these vectors."""
        registry = self._domain.registry
        bound = registry.devices[self.devid].by_vector.keys() & set(vectors)
        for vector in bound:
            if registry.shares_vector(self.devid, vector):
                continue  # no peer has its eventfd for a doorbell, nor may have
            self._domain.carry_out([WiringChanged(token) for token in registry.tokens_on_vector(self.devid, vector)])

    # -- doorbells -------------------------------------------------------------------------------------------------

    def _send_wire(self, token: Token, channel: MapChannelServer) -> _WireChange | None:
        """Make what the client has what it should have; None when it is."""
        self._rewiring.discard(token)
        old = self._wires.get(token)
        wanted = wish(self._domain.registry, self._domain.devices, self.devid, token)
        if wanted is not None:
            same_slot = old is not None and old.slot == wanted.slot
            if old is not None and same_slot and _fulfils(old, wanted):
                return None
            if old is None or same_slot:
                change = self._exchange(token, old, wanted, channel)
                if change is not None or old is None:
                    return change
        if old is None:
            return None
        # The client gave the region back, or nobody else holds it, or what it has is wrong and no other can be had.
        answer = channel.undoorbell_nowait(old.slot)
        del self._wires[token]
        if wanted is not None and wanted.slot != old.slot:
            self.rewire(token)
        return _WireChange(answer, old, None)

    def _exchange(self, token: Token, old: Wire | None, wanted: Wish, channel: MapChannelServer) -> _WireChange | None:
        """Give the client what it should have for the slot; None when that is not to be had now."""
        new: Wire | None = None
        try:
            new = Wire(wanted.slot, wanted.peer_fd or self._fan_out(token), wanted.peer_fd is None)
            answer = channel.doorbell_nowait(new.slot, new.fd)
        except (OSError, TransportError) as error:
            logger.warning("device %s rings a region by register: %s", self.name, error)
            self._forget(new)
            return None
        self._wires[token] = new
        return _WireChange(answer, old, new)

    def _fan_out(self, token: Token) -> Fd:
        return self._domain.shared.fan_out.open(lambda: self._domain.ring(self.devid, token))

    def _wire_done(self, token: Token, change: _WireChange, refused: TransportError | None) -> None:
        if refused is not None and change.old is not None:
            self._lost(refused)  # it may ring the old one for ever, where nobody listens
        elif refused is not None:
            logger.info("device %s rings a region by register: %s", self.name, refused)
            if self._wires.get(token) is change.new:  # else a later change takes care of it
                self._forget(self._wires.pop(token))
        if change.old is not None:
            self._forget(change.old)
            self._domain.ring(self.devid, token)

    def _forget(self, wire: Wire | None) -> None:
        if wire is not None and wire.fans_out:
            self._domain.shared.fan_out.forget(wire.fd)

    # -- tasks -----------------------------------------------------------------------------------------------------

    async def _run_channel(self, channel: MapChannelServer) -> None:
        await channel.run()
        if not self.has_channel:
            return  # an agent that did not greet: VERSION is refused, and says so
        self._orders.close()
        failure = channel.failure
        self.connection.drop(str(failure), departed=failure is not None and failure.errno in GONE)

    async def _run_orders(self) -> None:
        await self._orders.run()


class _WireOrder:
    """Give a client the eventfd for one region that it should have when this goes out. Implements `orders.Order`."""

    __slots__ = ("_change", "_device", "_token")

    def __init__(self, device: DeviceHost, token: Token) -> None:
        self._device, self._token = device, token
        self._change: _WireChange | None = None

    def ready(self) -> bool:
        return True

    async def wait_ready(self) -> None:
        pass

    def wait_no_longer(self) -> None:
        pass

    def send(self, channel: MapChannelServer) -> PendingAnswer | None:
        self._change = self._device._send_wire(self._token, channel)
        return self._change.answer if self._change is not None else None

    def finish(self, refused: TransportError | None) -> None:
        self._device._rewiring.discard(self._token)
        if self._change is not None:
            self._device._wire_done(self._token, self._change, refused)


def _fulfils(wire: Wire, wanted: Wish) -> bool:
    """Tell whether what the client has for the slot is what it should have."""
    return wire.fans_out if wanted.peer_fd is None else wire.fd is wanted.peer_fd


def network_namespace(pid: int) -> Hashable:
    """Say which network namespace a process is in; 0 when that cannot be read."""
    try:
        found = os.stat(f"/proc/{pid}/ns/net")
    except OSError:
        return 0
    return found.st_dev, found.st_ino

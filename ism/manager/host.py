# SPDX-License-Identifier: Apache-2.0
"""Carrying out the registry's effects among the devices of one domain.

It owns who is connected and what all devices of a manager share (the fan-out eventfds, the seals). It
decides nothing: the registry did. Effects on the device that asked are orders that its command waits for; effects on
other devices become orders of those devices and are waited for by nobody here, so a client that is slow, or dead,
or hostile delays only itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Protocol

from ism.device.contract import (
    Effect,
    Interrupt,
    MapChunks,
    PostEvent,
    SealWrites,
    UnmapChunks,
    WiringChanged,
)
from ism.ids import DevId, Token
from ism.manager.doorbells import FanOut, Wired, Wiring
from ism.manager.memories import Memories
from ism.manager.registry import DomainRegistry

logger = logging.getLogger("ism.manager")


class Shared:
    """What all devices of one manager share. Close it when no device is left."""

    def __init__(self) -> None:
        """Raises OSError when descriptors are short."""
        self.memories = Memories()
        self.fan_out = FanOut()

    def close(self) -> None:
        """Close the descriptor."""
        self.fan_out.close()


class Connected(Wired, Protocol):
    """A device with a client, as the host uses it."""

    def give(self, effect: MapChunks | UnmapChunks) -> None:
        """Have the client map or unmap, in order."""
        ...

    def interrupt(self, vector: int) -> None:
        """Raise an interrupt, as the function routes it."""
        ...

    def post(self, payload: bytes) -> Sequence[Effect]:
        """Put an event on the event queue; returns the interrupt that is due."""
        ...


class DomainHost:
    """One domain: its registry, and the devices that have a client.

    Attributes: `name`; `registry`; `shared`; `devices` (connected ones, by devid); `silent` (no effect is carried out
    any more: the manager ends, and what its clients share among themselves goes on without it).
    """

    def __init__(self, name: str, registry: DomainRegistry, shared: Shared) -> None:
        self.name, self.registry, self.shared = name, registry, shared
        self.devices: dict[DevId, Connected] = {}
        self.silent = False
        self._wiring = Wiring(registry, self.devices)

    def connect(self, devid: DevId, device: Connected) -> None:
        """Let effects reach a device; the registry knows it already."""
        assert devid not in self.devices
        self.devices[devid] = device

    def disconnect(self, devid: DevId) -> None:
        """Drop effects on a device from now on."""
        del self.devices[devid]

    def carry_out(self, effects: Iterable[Effect]) -> None:
        """Carry out effects in order. None of them is waited for."""
        if self.silent:
            return
        for effect in effects:
            try:
                self._carry_out_one(effect)
            except Exception:
                # one device's trouble is not to keep the rest from what concerns them
                logger.exception("an effect failed in domain %s: %r", self.name, effect)

    def _carry_out_one(self, effect: Effect) -> None:
        if isinstance(effect, WiringChanged):
            self._wiring.changed(effect.token)
            return
        if isinstance(effect, SealWrites):
            self.shared.memories.require_seal(effect.memory)
            return
        device = self.devices.get(effect.devid)
        if device is None:
            return
        if isinstance(effect, Interrupt):
            device.interrupt(effect.vector)
        elif isinstance(effect, PostEvent):
            self.carry_out(device.post(effect.payload))
        else:
            device.give(effect)

    def ring(self, devid: DevId, token: Token) -> None:
        """Tell all other holders, for a device that wrote its fan-out eventfd."""
        self.carry_out(self.registry.ring(devid, token))

# SPDX-License-Identifier: Apache-2.0
"""A registry as one device sees it, with the device's commands a second counted.

Over the rate a command is refused with ENOMEM and changes nothing, but for DETACH, WITHDRAW, RETRACT and reset, which
only give back: they are counted and always let through. The decisions themselves are the registry's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ism.device.contract import Decision, DirectoryService, Effect, Outcome
from ism.ids import DevId, Token
from ism.manager.quota import TokenBucket
from ism.manager.registry import DomainRegistry
from ism.virtio.ism_spec import Ack, ClaimRequest, IntendRequest, ListenerRequest, RetractRequest, StartRequest

_OVER_RATE = Outcome(Ack.ENOMEM)
_REFUSED = Decision(Ack.ENOMEM)


class MeteredRegistry:
    """Implements `ism.device.contract.Registry` for one device. Attributes: `over_rate` (commands refused here)."""

    def __init__(self, registry: DomainRegistry, bucket: TokenBucket, now_s: Callable[[], float]) -> None:
        """Count in `bucket`, at the time that `now_s` says."""
        self._registry, self._bucket, self._now_s = registry, bucket, now_s
        self.over_rate = 0
        self._directory = _MeteredDirectory(registry.directory, self._may, self._count)

    @property
    def directory(self) -> DirectoryService:
        """The registry's, counted too."""
        return self._directory

    def _count(self) -> None:
        self._bucket.take(self._now_s())

    def _may(self) -> bool:
        if self._bucket.take(self._now_s()):
            return True
        self.over_rate += 1
        return False

    def alloc(self, devid: DevId, size: int, max_areas: int) -> Outcome:
        """See the registry."""
        return self._registry.alloc(devid, size, max_areas) if self._may() else _OVER_RATE

    def attach(self, devid: DevId, token: Token, rw_perm: int, max_areas: int) -> Outcome:
        """See the registry."""
        return self._registry.attach(devid, token, rw_perm, max_areas) if self._may() else _OVER_RATE

    def detach(self, devid: DevId, token: Token) -> Outcome:
        """See the registry."""
        self._count()
        return self._registry.detach(devid, token)

    def grant_default(self, devid: DevId, token: Token, permissions: int) -> Outcome:
        """See the registry."""
        return self._registry.grant_default(devid, token, permissions) if self._may() else _OVER_RATE

    def grant_device(self, devid: DevId, token: Token, permissions: int, peer: DevId) -> Outcome:
        """See the registry."""
        return self._registry.grant_device(devid, token, permissions, peer) if self._may() else _OVER_RATE

    def event_vector(self, devid: DevId, token: Token, vector: int | None) -> Outcome:
        """See the registry."""
        return self._registry.event_vector(devid, token, vector) if self._may() else _OVER_RATE

    def doorbell(self, devid: DevId, slot: int) -> Sequence[Effect]:
        """See the registry; not counted."""
        return self._registry.doorbell(devid, slot)

    def reset(self, devid: DevId) -> Sequence[Effect]:
        """See the registry; not counted."""
        return self._registry.reset(devid)


class _MeteredDirectory:
    """Implements `ism.device.contract.DirectoryService`: the domain's; asks `may` of each command, or tells `count`."""

    def __init__(self, directory: DirectoryService, may: Callable[[], bool], count: Callable[[], None]) -> None:
        self._directory, self._may, self._count = directory, may, count

    def publish(self, devid: DevId, request: ListenerRequest) -> Decision:
        return self._directory.publish(devid, request) if self._may() else _REFUSED

    def withdraw(self, devid: DevId, request: ListenerRequest) -> Decision:
        self._count()
        return self._directory.withdraw(devid, request)

    def lookup(self, devid: DevId, request: ListenerRequest) -> Decision:
        return self._directory.lookup(devid, request) if self._may() else _REFUSED

    def intend(self, devid: DevId, request: IntendRequest) -> Decision:
        return self._directory.intend(devid, request) if self._may() else _REFUSED

    def claim(self, devid: DevId, request: ClaimRequest) -> Decision:
        return self._directory.claim(devid, request) if self._may() else _REFUSED

    def retract(self, devid: DevId, request: RetractRequest) -> Decision:
        self._count()
        return self._directory.retract(devid, request)

    def start(self, devid: DevId, request: StartRequest) -> Decision:
        return self._directory.start(devid, request) if self._may() else _REFUSED

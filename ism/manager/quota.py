# SPDX-License-Identifier: Apache-2.0
"""What a device and a domain may use, and what they use: plain counters, no clock, no I/O.

The charge rule (virtio-ism thread of October 2022: a malicious reference occupies only the attacker's share): a
region's bytes are charged to its owner; once the owner has let go, to every device that still holds it, to each of
them whole. A device that holds what its owner dropped can therefore be over its quota: it may then neither allocate
nor attach until it is below again. A domain is charged the bytes that exist, each region once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Quota:
    """Limits of one device.

    Attributes: `bytes`; `regions` (owned); `attachments` (regions of others that it holds); `commands_per_s`
    (control commands a second, 0 = any number).
    """

    bytes: int
    regions: int
    attachments: int
    commands_per_s: int = 0


class Account:
    """What one device uses of its quota.

    Attributes: `quota`, `bytes` (charged), `regions` (owned), `attachments` (held, owned by others).
    """

    __slots__ = ("attachments", "bytes", "quota", "regions")

    def __init__(self, quota: Quota) -> None:
        self.quota = quota
        self.bytes = self.regions = self.attachments = 0

    def may_own(self, size: int) -> bool:
        """Tell whether one more region of `size` bytes is within the quota."""
        return self.regions < self.quota.regions and self.bytes + size <= self.quota.bytes

    def may_attach(self) -> bool:
        """Tell whether one more region of another device is within the quota."""
        return self.attachments < self.quota.attachments and self.bytes <= self.quota.bytes

    def own(self, size: int) -> None:
        """Charge a region that the device allocated."""
        self.regions += 1
        self.bytes += size

    def disown(self, size: int) -> None:
        """Take back `own`."""
        self.regions -= 1
        self.bytes -= size
        assert self.regions >= 0
        assert self.bytes >= 0

    def attach(self) -> None:
        """Count a region of another device."""
        self.attachments += 1

    def inherit(self, size: int) -> None:
        """Charge a region that the device holds and whose owner has let go."""
        self.bytes += size

    def detach(self, inherited: int = 0) -> None:
        """Take back `attach`, and `inherited` bytes of `inherit`."""
        self.attachments -= 1
        self.bytes -= inherited
        assert self.attachments >= 0
        assert self.bytes >= 0


class DomainAccount:
    """Bytes of the regions that exist in one domain.

    Attributes: `limit` (bytes, 0 = none), `bytes`.
    """

    __slots__ = ("bytes", "limit")

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.bytes = 0

    def may_add(self, size: int) -> bool:
        """Tell whether a region of `size` bytes is within the limit."""
        return not self.limit or self.bytes + size <= self.limit

    def add(self, size: int) -> None:
        """Count a region."""
        self.bytes += size

    def remove(self, size: int) -> None:
        """Take back `add`."""
        self.bytes -= size
        assert self.bytes >= 0


class TokenBucket:
    """A rate limit: `rate` a second, bursts up to `burst`; rate 0 allows everything.

    Time is passed in, in seconds of any clock that does not go back.
    """

    __slots__ = ("_at_s", "_level", "burst", "rate")

    def __init__(self, rate: int, burst: int | None = None, *, now_s: float = 0.0) -> None:
        """Start full. `burst` defaults to one second's worth."""
        self.rate = rate
        self.burst = float(burst if burst is not None else max(rate, 1))
        self._level = self.burst
        self._at_s = now_s

    def take(self, now_s: float, count: int = 1) -> bool:
        """Take `count` if that many are there; tell whether they were."""
        if not self.rate:
            return True
        self._level = min(self.burst, self._level + max(0.0, now_s - self._at_s) * self.rate)
        self._at_s = max(self._at_s, now_s)
        if self._level < count:
            return False
        self._level -= count
        return True

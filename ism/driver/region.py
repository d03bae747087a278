# SPDX-License-Identifier: Apache-2.0
"""One shared region as this guest holds it: a contiguous mapping, a doorbell, an interrupt.

States: attached -> closed. A closed region raises StaleRegionError; views of its memory that are still referenced
stay valid addresses (they read as zero once the device has taken the chunks back). When the device is closed or gone
the region stays readable. Bytes: whatever the layer above agrees on; every byte that a peer may write is hostile.

Any thread, except that nobody may ring a region, or wait on its descriptor, while another thread closes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ism.driver.events import Event
from ism.driver.vectors import Binding
from ism.errors import StaleRegionError
from ism.eventfd import raise_eventfd
from ism.ids import DevId, Token
from ism.virtio.ism_spec import Permission

if TYPE_CHECKING:
    from ism.driver.device import Device, Held


class Region:
    """A region that this device holds. Made by `Device.alloc` and `Device.attach`.

    Attributes: `token`; `owned` (this device allocated it); `address`, `length` (bytes) of the contiguous mapping;
    `view` (memoryview of it, read-only when READ alone was asked for); `closed`.
    """

    def __init__(self, device: Device, held: Held, *, owned: bool, readonly: bool = False) -> None:
        self._device, self._held = device, held
        self.token: Token = held.token
        self.owned = owned
        self.address, self.length = held.mapping.address, held.mapping.length
        self.view = held.mapping.view.toreadonly() if readonly else held.mapping.view
        self.closed = False

    @property
    def device(self) -> Device:
        """The device that holds it."""
        return self._device

    @property
    def binding(self) -> Binding:
        """The interrupt. Raises StaleRegionError when closed (or its device is), or when it was made without one."""
        binding = self._held.binding
        if self.closed or binding is None:
            raise StaleRegionError(
                f"region {self.token:#018x} is closed, its device is closed, or it was made without an interrupt"
            )
        return binding

    def fileno(self) -> int:
        """Eventfd that becomes readable when a peer rings the doorbell; reset it by `drain` before looking at memory.

        Owned by the region. Raises StaleRegionError.
        """
        return self.binding.fd

    def wake(self) -> None:
        """Make `fileno()` readable here, as a doorbell would: nothing when closed or without an interrupt."""
        self._device.wake(self)

    def ring(self) -> None:
        """Ring the doorbell: every other holder's interrupt is raised. Never blocks for a peer.

        Raises: StaleRegionError when closed, DeviceGoneError when the device is lost and no direct doorbell is wired.
        Ordering: stores made before are visible to whoever wakes (the system call orders them).
        """
        if self.closed:
            raise StaleRegionError(f"region {self.token:#018x} is closed")
        held = self._held
        if held.owned and not self.owned and held.binding is not None:
            # both ends are this device: the other holder that the doorbell is meant for is this process itself
            direct: int | None = held.binding.fd
        else:
            direct = self._device.transport.doorbell_fd(held.slot)
        if direct is None:
            self._device.ring_slot(held.slot)
        else:
            raise_eventfd(direct)

    def grant(self, permissions: Permission, peer: DevId | None = None) -> None:
        """Set what a device (or, with None, every device without an entry) may do with the region.

        Raises: DeviceError by ack, DeviceGoneError, TransportError, StaleRegionError.
        """
        if self.closed:
            raise StaleRegionError(f"region {self.token:#018x} is closed")
        self._device.grant(self.token, permissions, peer)

    def on_event(self, callback: Callable[[Event], None] | None) -> None:
        """Call `callback` from the driver's service thread when a peer attaches or detaches (needs EVENT_VQ).

        It must be short and must not make calls that wait (alloc, attach, grant, `Device.close`: LocalProtocolError);
        `close` of a region is allowed. One that raises is logged.
        """
        self._held.on_event = callback

    def close(self) -> None:
        """Detach, without waiting for the device. As the owner: the token dies, peers keep the memory they have.

        Idempotent, from any thread and from callbacks. Raises nothing: a device that is gone holds nothing.
        """
        self._device.release(self)

# SPDX-License-Identifier: Apache-2.0
"""How one function interrupts its driver: MSI-X when it is enabled, else the ISR status and INTA.

It owns the ISR status (virtio 1.3 section 4.1.4.5) and keeps the interrupt status bit of configuration space equal to
it. Masking single vectors is not its business: the vfio-user client emulates the MSI-X table.

Doorbells of regions reach it as well. A region has no bit in the ISR status, so without MSI-X its doorbell sets the
queue bit: a driver that uses INTA looks at its regions whenever it looks at its queues.
"""

from __future__ import annotations

from ism.device.config_space import ConfigSpace
from ism.device.contract import Interrupt
from ism.ids import DevId
from ism.virtio.pci import NO_VECTOR, Isr

INTX = -1
"""In place of an MSI-X vector: the INTA pin."""


class Interrupts:
    """Interrupt state of one function. Attributes: `isr` (ISR status)."""

    def __init__(self, devid: DevId, vectors: int, space: ConfigSpace) -> None:
        """Serve the device `devid` with a table of `vectors`; `space` says what is enabled."""
        self._devid = devid
        self._vectors = vectors
        self._space = space
        self.isr = Isr(0)

    def reset(self) -> None:
        """Forget what is pending."""
        self.isr = Isr(0)
        self.refresh()

    def refresh(self) -> None:
        """Show in configuration space whether INTA is pending; due whenever that or MSI-X enable changes."""
        self._space.set_interrupt_status(bool(self.isr) and not self._space.msix_enabled)

    @property
    def intx_asserted(self) -> bool:
        """Whether the INTA pin is asserted now: something is pending, MSI-X is off, the driver allows INTx."""
        return bool(self.isr) and not self._space.msix_enabled and not self._space.intx_disabled

    def raise_for(self, vector: int, cause: Isr) -> list[Interrupt]:
        """Interrupt for a queue or the configuration, whose vector is `vector`; returns the effect, if any."""
        if self._space.msix_enabled:
            return [] if vector == NO_VECTOR else [Interrupt(self._devid, vector)]
        self.isr |= cause
        self.refresh()
        return self.reassert()

    def reassert(self) -> list[Interrupt]:
        """Interrupt again when INTA is asserted: the driver has just allowed INTx, or turned MSI-X off."""
        return [Interrupt(self._devid, NO_VECTOR)] if self.intx_asserted else []

    def route(self, vector: int) -> int | None:
        """Say what an `Interrupt` with this vector raises: a vector of the MSI-X table, `INTX`, or None for nothing."""
        if self._space.msix_enabled:
            return vector if 0 <= vector < self._vectors else None
        if vector != NO_VECTOR:
            self.isr |= Isr.QUEUE
            self.refresh()
        return INTX if self.intx_asserted else None

    def read_isr(self) -> int:
        """Read the ISR status, which clears it and lets go of INTA."""
        value, self.isr = self.isr, Isr(0)
        self.refresh()
        return value

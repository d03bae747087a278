# SPDX-License-Identifier: Apache-2.0
"""What a listening trio socket has in the manager's directory, and the first moment of each connection it accepts.

Publishing needs a device, which may have to be opened, and the manager's answers; `begin` waits for neither, so that
`listen` is as synchronous as it is everywhere: a worker opens the device, and each answer sends the next command, in
the driver's thread. Whoever accepts waits for that, within limits: clients that come earlier speak TCP, as both ends
know. When the process's device is lost the address is published with its successor, once a connection shows the loss.
"""

from __future__ import annotations

import _thread
import os
import sys
import threading
import weakref
from collections.abc import Callable, Generator
from typing import Any

from ism.driver import Device
from ism.driver.control import Command
from ism.errors import IsmError
from ism.smc import default, workers
from ism.smc.diagnosis import Diagnosis
from ism.smc.policy import Policy
from ism.smc.rendezvous import COMMAND_WAIT_S, OFF, Fallback, Publication, RawSocket, no_device
from ism.smc.trio_channel import TrioChannel
from ism.smc.trio_wait import Signal

_LOST = Fallback(Diagnosis.NOSMCDDEV, "the virtio-ism device was lost; a new one is being opened")
_LATE = Fallback(Diagnosis.PEERNOSMC, "the connection came before the address was published")


_beginning: weakref.WeakSet[Listening] = weakref.WeakSet()
_beginning_lock = threading.Lock()


def _after_fork() -> None:
    global _beginning_lock  # noqa: PLW0603 (one a process)
    _beginning_lock = threading.Lock()
    _beginning.clear()


os.register_at_fork(after_in_child=_after_fork)


async def all_begun() -> None:
    """Wait for what this process is publishing: who listens, then connects to it, is to find it."""
    if _beginning:
        with _beginning_lock:
            found = list(_beginning)
        for listening in found:
            await listening.begun()


class Listening:
    """One listening socket's publication. `begin` and `close` from any thread."""

    def __init__(self, sock: RawSocket, policy: Policy, device: Device | None) -> None:
        """Args: `sock`: kept, and asked for its address; `device`: None: the process's."""
        self._sock, self._policy, self._given = sock, policy, device
        self._closed = False
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._publication: Publication | None = None
        self._fallback: Fallback | None = OFF if self._policy.mode == "off" else None
        self._under_way = False
        self._patient = True
        self._waiters: list[Callable[[], None]] = []

    @property
    def failure(self) -> Fallback | None:
        """Why nothing is published, None when something is, or may be soon."""
        return self._fallback

    def begin(self) -> None:
        """Publish the address; never waits."""
        if self._policy.mode == "off" or self._under_way:
            return
        self._under_way = self._patient = True
        with _beginning_lock:
            _beginning.add(self)
        try:
            device = self._given or default.opened()
        except (IsmError, OSError) as exc:
            self._end(no_device(exc))
            return
        if device is not None:
            self._publish(device)
            return
        try:
            workers.submit(self._open_and_publish)
        except RuntimeError as exc:
            self._end(no_device(exc))

    def _open_and_publish(self) -> None:
        try:
            device = default.open_default()
        except (IsmError, OSError) as exc:
            self._end(no_device(exc))
        else:
            self._publish(device)

    def _publish(self, device: Device) -> None:
        try:
            publication = Publication(device, self._sock, self._policy)
        except (OSError, ValueError) as exc:
            self._end(Fallback(Diagnosis.CNFERR, f"the address cannot be published: {exc}"))
            return
        with self._lock:
            self._publication = publication
        self._go_on(publication, publication.publish_steps())

    def _go_on(self, publication: Publication, steps: Generator[Command, None, None]) -> None:
        """Take the steps whose commands are answered; the next answer calls this again, in the thread it comes in."""
        try:
            while True:
                command = next(steps)
                if not command.done:
                    command.then(lambda: self._go_on(publication, steps))
                    return
        except StopIteration:
            failure = None
        except IsmError as exc:
            failure = Fallback(Diagnosis.CNFERR, f"the address could not be published: {exc}")
        self._end(failure if self._policy.mode != "require" else None)  # a client that requires it too needs none
        with self._lock:
            late = self._closed
        if late:
            publication.withdraw()

    def _end(self, failure: Fallback | None) -> None:
        with self._lock:
            self._fallback, self._under_way = failure, False
            waiters, self._waiters = self._waiters, []
        with _beginning_lock:
            _beginning.discard(self)
        for wake in waiters:
            wake()

    async def begun(self, timeout_s: float = COMMAND_WAIT_S) -> None:
        """Wait until the address is published or cannot be, or the time is up."""
        if self._pid != os.getpid():
            self._reset()  # a copy made by fork publishes for itself, with a device of its own
            self.begin()
        signal = Signal()
        with self._lock:
            if not (self._under_way and self._patient):
                return
            self._waiters.append(signal.give)
        self._patient = await signal.wait(timeout_s)

    def accepted(self, channel: TrioChannel, peer: Any) -> None:
        """Begin to decide about an accepted connection; never waits."""
        with self._lock:
            publication, fallback = self._publication, self._fallback
        if publication is not None and publication.device.gone is not None and self._given is None:
            channel.not_shared(_LOST, peer)
            self.begin()
        elif fallback is not None:
            channel.not_shared(fallback, peer)
            if fallback.code == Diagnosis.NOSMCDDEV:
                self.begin()  # is there one by now? It is looked for no more often than once a second
        elif publication is not None:
            channel.accepted(publication, peer)
        else:
            channel.not_shared(_LATE, peer)

    def close(self) -> None:
        """Take everything back; never waits."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._closed = True
            publication, self._publication = self._publication, None
        if publication is not None:
            publication.withdraw()

    def __del__(self) -> None:
        if getattr(self, "_publication", None) is not None and self._pid == os.getpid() and not sys.is_finalizing():
            _thread.start_new_thread(self.close, ())  # not here: a destructor may run inside the driver's locks

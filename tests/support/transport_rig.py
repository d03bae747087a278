# SPDX-License-Identifier: Apache-2.0
"""What the transport suite runs on: one domain of fresh devices, in memory or behind a real manager's socket.

A `Rig` makes transports and devices and closes what a test left open. The manager runs in a thread of its own, or as
a process where a test wants to stop or kill it.
"""

from __future__ import annotations

import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import trio

from ism.driver import Device, Transport
from ism.driver.vfio_user import VfioUserTransport
from ism.manager.config import DeviceShape, DomainConfig, FreshConfig, ManagerConfig, SocketConfig
from ism.manager.quota import Quota
from ism.manager.server import run_manager
from ism.paths import device_socket
from ism.testing import Fabric, InMemoryTransport
from ism.virtio.ism_spec import Permission

CHUNK = 4096
PATIENCE_S = 30.0
READ_WRITE = Permission.READ | Permission.WRITE
SHARED = READ_WRITE | Permission.ATTACH


@dataclass(frozen=True)
class Shape:
    """What every device of a rig looks like; `chunks` in its window."""

    chunks: int = 256
    vectors: int = 16
    quota: Quota = field(default_factory=lambda: Quota(bytes=1 << 30, regions=1024, attachments=1024))


class Rig(Protocol):
    kind: str
    line_only: bool

    def transport(self) -> Transport: ...

    def device(self, *, interrupts: bool = True) -> Device: ...

    def lose(self) -> None:
        """End the manager, without a word to the devices."""
        ...

    def close(self) -> None: ...


class WithoutVectors:
    """Another transport, but for its MSI-X vectors: what is left is the interrupt line, as with uio_pci_generic."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def vector_count(self) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Devices:
    line_only = False

    def __init__(self) -> None:
        self._opened: list[Device | Transport] = []

    def transport(self) -> Transport:
        made = self._connect()
        self._opened.append(made)
        return made

    def device(self, *, interrupts: bool = True) -> Device:
        transport = self._connect()
        made = Device(WithoutVectors(transport) if self.line_only else transport, interrupts=interrupts)
        self._opened.append(made)
        return made

    def _connect(self) -> Transport:
        raise NotImplementedError

    def close(self) -> None:
        for thing in self._opened:
            thing.close()
        self._opened.clear()


class InMemoryRig(_Devices):
    kind = "in-memory"

    def __init__(self, shape: Shape, *, features: Iterable[int] | None = None) -> None:
        super().__init__()
        self.fabric = Fabric(chunk_size=CHUNK)
        self._shape = shape
        self._ports: list[InMemoryTransport] = []
        self._features = {} if features is None else {"features": tuple(features)}

    def _connect(self) -> Transport:
        shape = self._shape
        self._ports.append(
            self.fabric.plug(
                vectors=shape.vectors, window_size=shape.chunks * CHUNK, quota=shape.quota, **self._features
            )
        )
        return self._ports[-1]

    def lose(self) -> None:
        for port in self._ports:
            port.lose("the device manager is gone")


class ManagerThread:
    """A manager in a thread. `path` is the socket of fresh devices; `manager` may be looked at through `ask`."""

    def __init__(self, run_dir: Path, shape: Shape) -> None:
        self.path = device_socket(run_dir)
        fresh = FreshConfig(
            "default",
            SocketConfig(self.path),
            DeviceShape(window_size=shape.chunks * CHUNK, vectors=shape.vectors, quota=shape.quota),
        )
        config = ManagerConfig("(test)", (DomainConfig(chunk_size=CHUNK),), (), fresh)
        ready: queue.SimpleQueue[Any] = queue.SimpleQueue()

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                await nursery.start(run_manager, config, run_dir)
                ready.put((trio.lowlevel.current_trio_token(), nursery.cancel_scope))

        def run() -> None:
            try:
                trio.run(main)
            except BaseException as exc:
                ready.put(exc)
                raise

        self._thread = threading.Thread(target=run, name="manager")
        self._thread.start()
        started = ready.get(timeout=PATIENCE_S)
        if isinstance(started, BaseException):
            self._thread.join(PATIENCE_S)
            raise started
        self._token, self._scope = started

    def stop(self) -> None:
        if self._thread.is_alive():
            self._token.run_sync_soon(self._scope.cancel)
            self._thread.join(PATIENCE_S)
            assert not self._thread.is_alive(), "the manager does not end"


class VfioUserRig(_Devices):
    kind = "vfio-user"

    def __init__(self, run_dir: Path, shape: Shape) -> None:
        super().__init__()
        self.manager = ManagerThread(run_dir, shape)

    def _connect(self) -> Transport:
        return VfioUserTransport.connect(self.manager.path)

    def lose(self) -> None:
        self.manager.stop()

    def close(self) -> None:
        super().close()
        self.manager.stop()


class ManagerProcess:
    """`python -m ism manager` as a process that can be stopped and killed."""

    def __init__(self, run_dir: Path) -> None:
        self.path = device_socket(run_dir)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ism", "manager", "-v", "--run-dir", str(run_dir)],
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert self._process.stderr is not None
        deadline = time.monotonic() + PATIENCE_S
        seen = b""
        while b" runs in " not in seen:
            assert time.monotonic() < deadline, f"the manager does not start: {seen!r}"
            assert readable(self._process.stderr.fileno()), f"the manager says nothing: {seen!r}"
            more = os.read(self._process.stderr.fileno(), 65536)
            assert more, f"the manager ended: {seen!r}"
            seen += more

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self._process.poll() is None:
            self._process.send_signal(number)
        assert self._process.stderr is not None
        code = self._process.wait(PATIENCE_S)
        self._process.stderr.close()
        return code


def readable(fd: int, timeout_s: float = PATIENCE_S) -> bool:
    """Wait until a descriptor is readable."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))


def together(calls: Sequence[Callable[[], None]]) -> None:
    """Run each call in a thread of its own; raise the first error, or AssertionError when one does not end."""
    errors: list[BaseException] = []

    def guard(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=guard, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads), "a call does not end"
    if errors:
        raise errors[0]


def open_descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            pass  # the one that listed them
    return found

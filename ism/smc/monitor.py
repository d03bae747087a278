# SPDX-License-Identifier: Apache-2.0
"""What `ism ss` asks a process: its sockets that use, or could have used, shared memory.

Each process with a device listens on a UNIX socket of its own in the manager's run directory, `ss/PID-N.sock`, and
answers whoever connects (the directory belongs to the user) with one JSON object, then closes. Nothing is kept for it
but a weak reference to each socket, so a connection costs nothing; what is shown is read when it is asked for.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import socket
import sys
import threading
import weakref
from pathlib import Path
from typing import Any, Protocol

from ism import paths
from ism.driver import Device
from ism.errors import IsmError
from ism.smc import info, workers

log = logging.getLogger("ism.smc")

_SEND_S = 2.0
_BACKLOG = 8


class HasInfo(Protocol):
    """A socket or stream."""

    def smc_info(self) -> info.Info: ...


_tracked: weakref.WeakSet[HasInfo] = weakref.WeakSet()
_lock = threading.Lock()
_monitors: list[_Monitor] = []


def track(sock: HasInfo) -> None:
    """Show a socket in `ism ss` for as long as it exists."""
    with _lock:
        _tracked.add(sock)


def forget(sock: HasInfo) -> None:
    """Show a socket no more."""
    with _lock:
        _tracked.discard(sock)


def report() -> dict[str, Any]:
    """Describe this process and its sockets, as plain values."""
    with _lock:
        socks = list(_tracked)
    connections = []
    for sock in socks:
        with contextlib.suppress(OSError, IsmError, ValueError):
            shown = info.as_dict(sock.smc_info())
            if shown["local"] is not None:
                connections.append(shown)
    return {
        "pid": os.getpid(),
        "uid": os.getuid(),
        "program": Path(sys.argv[0]).name if sys.argv and sys.argv[0] else Path(sys.executable).name,
        "connections": connections,
        "fallbacks": info.counters(),
    }


def directory_of(device_name: str | None) -> Path:
    """Return where the processes of a device's manager listen: beside its sockets."""
    kind, _, where = (device_name or "").partition(":")
    return (Path(where).parent if kind == "vfio-user" and where else paths.run_dir()) / "ss"


def start(device: Device, directory: Path) -> None:
    """Listen for `ism ss`, in the device's thread. A directory that cannot be used is no error: it is logged."""
    try:
        monitor = _Monitor(device, directory)
    except (OSError, IsmError) as exc:
        log.debug("this process is not shown by `ism ss`: %s", exc)
        return
    with _lock:
        for old in [old for old in _monitors if old.device.gone is not None]:
            _monitors.remove(old)
            old.close()
        _monitors.append(monitor)


class _Monitor:
    """One listening socket."""

    def __init__(self, device: Device, directory: Path) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        self.device = device
        self.path = directory / f"{os.getpid()}-{device.devid:x}.sock"
        self._pid = os.getpid()
        self._listener = socket.SocketType(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._listener.bind(str(self.path))
            self._listener.listen(_BACKLOG)
            self._listener.setblocking(False)
            device.service.add(self._listener.fileno(), self._on_client)
        except BaseException:
            self._listener.close()
            raise

    def _on_client(self) -> None:
        try:
            fd, _address = self._listener._accept()  # type: ignore[attr-defined]
        except OSError:
            return
        workers.submit(lambda: _answer(fd))

    def close(self) -> None:
        """Stop listening."""
        if self._pid == os.getpid():
            self.device.service.remove(self._listener.fileno())
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._listener.close()


def _answer(fd: int) -> None:
    with contextlib.closing(socket.SocketType(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)) as sock:
        sock.settimeout(_SEND_S)
        with contextlib.suppress(OSError):
            sock.sendall(json.dumps(report(), default=str).encode() + b"\n")


@atexit.register
def _at_exit() -> None:
    """Leave no socket that nobody answers."""
    for monitor in _monitors:
        with contextlib.suppress(OSError):
            monitor.path.unlink()


def stop() -> None:
    """Stop listening, for all devices of this process."""
    with _lock:
        monitors, _monitors[:] = list(_monitors), []
    for monitor in monitors:
        monitor.close()


def _after_fork() -> None:
    global _lock  # noqa: PLW0603 (a lock belongs to one process)
    _lock = threading.Lock()
    _monitors.clear()
    for sock in list(_tracked):
        renew = getattr(getattr(sock, "_channel", None), "renew_locks", None)
        if renew is not None:
            renew()
    _tracked.clear()


os.register_at_fork(after_in_child=_after_fork)


# -- the asking side -------------------------------------------------------------------------------------------------


def ask_all(directory: Path, timeout_s: float = 2.0) -> list[dict[str, Any]]:
    """Ask every process that listens in a directory. Sockets that nobody answers are removed."""
    found = []
    for path in sorted(directory.glob("*.sock")) if directory.is_dir() else []:
        try:
            found.append(_ask(path, timeout_s))
        except ConnectionRefusedError:
            with contextlib.suppress(OSError):
                path.unlink()  # its process is gone
        except (OSError, ValueError) as exc:
            log.debug("%s does not answer: %s", path, exc)
    return found


def _ask(path: Path, timeout_s: float) -> dict[str, Any]:
    with contextlib.closing(socket.SocketType(socket.AF_UNIX, socket.SOCK_STREAM)) as sock:
        sock.settimeout(timeout_s)
        sock.connect(str(path))
        data = bytearray()
        while more := sock.recv(1 << 16):
            data += more
    answer = json.loads(data)
    if not isinstance(answer, dict):
        raise ValueError("no object")
    return answer

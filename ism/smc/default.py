# SPDX-License-Identifier: Apache-2.0
"""The device that a process uses when it names none: opened once, on first use, and again after a fork.

Whoever uses no event loop calls `open_default`, which blocks; `trio_wait.default_device` is the same for trio. A device
that could not be opened is not tried again for a second: every connection of a program without one would wait.
"""

from __future__ import annotations

import os
import threading
import time

from ism.driver import Device, open_device
from ism.driver.select import ENVIRONMENT
from ism.errors import IsmError
from ism.smc import monitor

RETRY_S = 1.0

_lock = threading.Lock()
_device: Device | None = None
_retired: list[Device] = []
_failure: IsmError | OSError | None = None
_failed_s = 0.0


def open_default() -> Device:
    """Return the process's device, opened if need be. Blocks.

    Raises: TransportError, FeatureMismatchError, OSError; the same again for `RETRY_S` after it was raised first.
    """
    global _device, _failure, _failed_s  # noqa: PLW0603 (one device a process)
    with _lock:
        if _device is not None and _device.gone is not None:
            _retire(_device)
            _device = None
        for old in [device for device in _retired if not device.holds_regions]:
            _retired.remove(old)
            old.close()
        if _device is None:
            _raise_recent()
            try:
                _device = _open()
            except (IsmError, OSError) as exc:
                _failure, _failed_s = exc, time.monotonic()
                raise
            _failure = None
        return _device


def _retire(device: Device) -> None:
    """Keep a device that was lost: its connections may live on, and with them what it has mapped."""
    from ism.smc.group import release_idle

    _retired.append(device)
    release_idle(device)


def _open() -> Device:
    from ism.shm import compile_kernels

    device = open_device()
    try:
        compile_kernels()  # at the first connection, not in the middle of it
    except BaseException:
        device.close()
        raise
    monitor.start(device, monitor.directory_of(os.environ.get(ENVIRONMENT)))
    return device


def opened() -> Device | None:
    """Return the process's device without blocking, None when `open_default` must open one. Raises as that does."""
    device = _device
    if device is not None:
        return device if device.gone is None else None
    _raise_recent()
    return None


def _raise_recent() -> None:
    failure = _failure
    if failure is not None and time.monotonic() < _failed_s + RETRY_S:
        raise failure.with_traceback(None)


def close_default() -> None:
    """Close the process's device, if it has one; its connections must be closed. The next use opens another."""
    global _device, _failure
    with _lock:
        device, _device, _failure = _device, None, None
    monitor.stop()
    if device is not None:
        device.close()


def _after_fork() -> None:
    global _device, _lock, _failure
    _device, _lock, _failure = None, threading.Lock(), None
    _retired.clear()


os.register_at_fork(after_in_child=_after_fork)

# SPDX-License-Identifier: Apache-2.0
"""The device that a process uses when it names none: opened once, on first use, and again after a fork."""

from __future__ import annotations

import os
import threading

import trio

from ism.driver import Device, open_device
from ism.shm import compile_kernels

_lock = threading.Lock()
_device: Device | None = None
_retired: list[Device] = []


def open_default() -> Device:
    """Return the process's device, opened if need be. Blocks. Raises TransportError, FeatureMismatchError."""
    global _device  # noqa: PLW0603 (one device a process)
    with _lock:
        if _device is not None and _device.gone is not None:
            _retired.append(_device)  # its connections may live on, and with them what it has mapped
            _device = None
        for old in [device for device in _retired if not device.holds_regions]:
            _retired.remove(old)
            old.close()
        if _device is None:
            compile_kernels()  # at the first connection, not in the middle of it
            _device = open_device()
        return _device


async def default_device() -> Device:
    """Return the process's device without blocking the event loop. Raises as `open_default`."""
    device = _device
    if device is not None and device.gone is None:
        return device
    return await trio.to_thread.run_sync(open_default)


def close_default() -> None:
    """Close the process's device, if it has one; its connections must be closed. The next use opens another."""
    global _device
    with _lock:
        device, _device = _device, None
    if device is not None:
        device.close()


def _after_fork() -> None:
    global _device, _lock
    _device, _lock = None, threading.Lock()
    _retired.clear()


os.register_at_fork(after_in_child=_after_fork)

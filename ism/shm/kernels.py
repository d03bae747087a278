# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels: which exist, with which signature, and how they come from the cache or the compiler.

Compiling takes seconds, once per machine and version, so it never happens silently: the first real compilation logs a
warning on the logger `ism.shm`, and programs with a user in front of them call `compile_kernels(progress)` first. The
result lies in Numba's cache beside this package, or in the user's cache folder when the package is not writable.
Several processes that start at once compile once: a file lock next to the cache makes the others wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from numba import config
from numba.core import event

from ism.errors import FeatureMismatchError
from ism.shm import move, offer, park, ring
from ism.shm.interop import NewObject, ReadableBuffer, RingState, WritableBuffer
from ism.shm.jit import depends_on, kernel, numba_types

logger = logging.getLogger("ism.shm")

LOCK_NAME = "ism-shm.lock"
_LOCK_TIMEOUT_S = 60.0
_LOCK_POLL_S = 0.05

_COMMAND = numba_types.int64(RingState, numba_types.int64)
Command = Callable[[int, int], int]


class Kernels(NamedTuple):
    """Compiled kernels as plain builtin functions.

    The first argument is the address of the private words; of `exchange`, that of a shared word.
    """

    send: Callable[[int, Any, int], int]
    recv: Callable[[int, int, int], bytes | None]
    recv_into: Callable[[int, Any, int], int]
    reserve: Command
    commit: Command
    writable_bytes: Command
    readable_bytes: Command
    consume: Command
    flags_of_peer: Command
    rx_state: Command
    set_flags: Command
    start: Command
    park_reader: Command
    park_writer: Command
    unpark: Command
    ring_if_parked: Command
    offer_ring: Command
    follow: Command
    read_offer: Command
    go_home: Command
    readable_beyond: Command
    uses: Command
    take_owed: Command
    receive_error: Command
    change_gates: Command
    exchange: Callable[[int, int, int], int]


_SOURCES: dict[str, tuple[Callable[..., Any], Any]] = {
    "send": (ring.send, numba_types.int64(RingState, ReadableBuffer, numba_types.int64)),
    "recv": (ring.recv, NewObject(RingState, numba_types.int64, numba_types.int64)),
    "recv_into": (ring.recv_into, numba_types.int64(RingState, WritableBuffer, numba_types.int64)),
    "reserve": (ring.reserve, _COMMAND),
    "commit": (ring.commit, _COMMAND),
    "writable_bytes": (ring.writable_bytes, _COMMAND),
    "readable_bytes": (ring.readable_bytes, _COMMAND),
    "consume": (ring.consume, _COMMAND),
    "flags_of_peer": (ring.flags_of_peer, _COMMAND),
    "rx_state": (ring.rx_state, _COMMAND),
    "set_flags": (ring.set_flags, _COMMAND),
    "start": (ring.start, _COMMAND),
    "park_reader": (park.park_reader, _COMMAND),
    "park_writer": (park.park_writer, _COMMAND),
    "unpark": (park.unpark, _COMMAND),
    "ring_if_parked": (park.ring_if_parked, _COMMAND),
    "offer_ring": (move.offer_ring, _COMMAND),
    "follow": (move.follow, _COMMAND),
    "read_offer": (move.read_offer, _COMMAND),
    "go_home": (move.go_home, _COMMAND),
    "readable_beyond": (move.readable_beyond, _COMMAND),
    "uses": (move.uses, _COMMAND),
    "take_owed": (ring.take_owed, _COMMAND),
    "receive_error": (ring.receive_error, _COMMAND),
    "change_gates": (ring.change_gates, _COMMAND),
    "exchange": (offer.exchange, numba_types.int64(numba_types.int64, numba_types.int64, numba_types.int64)),
}
assert tuple(_SOURCES) == Kernels._fields

_loading = threading.Lock()
_loaded: list[Kernels] = []
"""The kernels, once loaded."""


def load_kernels() -> Kernels:
    """Load the kernels, from the cache if they are there, else compiled now with a warning in the log.

    Raises:
        FeatureMismatchError: Numba is switched off (NUMBA_DISABLE_JIT).
    """
    return _loaded[0] if _loaded else _load(None)


def compile_kernels(progress: Callable[[str], None] | None = None) -> None:
    """Make sure the kernels are compiled and cached for this machine, telling the user what happens.

    Args:
        progress: called with one line of text before something slow begins; not called when all is cached.

    Raises:
        FeatureMismatchError: Numba is switched off (NUMBA_DISABLE_JIT).
    """
    if not _loaded:
        _load(progress)


class _Teller(event.Listener):
    """Tell once per load that kernels are being compiled; cache hits raise no event."""

    def __init__(self, progress: Callable[[str], None] | None) -> None:
        self._progress, self._thread, self._told = progress, threading.get_ident(), False

    def on_start(self, happening: Any) -> None:
        if self._told or threading.get_ident() != self._thread:
            return
        self._told = True
        text = "compiling the ring kernels for this machine, once; this takes a few seconds"
        logger.warning(text)
        if self._progress is not None:
            self._progress(text)

    def on_end(self, happening: Any) -> None:
        pass


def _load(progress: Callable[[str], None] | None) -> Kernels:
    if getattr(config, "DISABLE_JIT", 0):
        raise FeatureMismatchError(
            "Numba is switched off by NUMBA_DISABLE_JIT, but the rings are compiled code: unset the variable",
            ["numba jit"],
        )
    with _loading:
        if _loaded:
            return _loaded[0]
        dispatchers = _dispatchers()
        with _cache_lock(next(iter(dispatchers.values()))), event.install_listener("numba:compile", _Teller(progress)):
            for name, (_, signature) in _SOURCES.items():
                dispatchers[name].compile(signature)
        compiled = {name: dispatchers[name].get_overload(sig.args) for name, (_, sig) in _SOURCES.items()}
        _loaded.append(Kernels(**compiled))
        return _loaded[0]


def _dispatchers() -> dict[str, Any]:
    try:
        made = {name: kernel(function, cache=True) for name, (function, _) in _SOURCES.items()}
        stamp = _source_stamp()
        for dispatcher in made.values():
            depends_on(dispatcher, stamp)
        return made
    except RuntimeError as exc:
        # Numba found no writable folder at all: neither beside the source nor in the user's cache.
        logger.warning("the ring kernels cannot be cached and are compiled by every process: %s", exc)
        return {name: kernel(function, cache=False) for name, (function, _) in _SOURCES.items()}


def _source_stamp() -> tuple[tuple[str, int, int], ...]:
    """Say which sources the kernels are made of: helpers of all modules here are compiled into them."""
    found = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        status = path.stat()
        found.append((path.name, status.st_size, status.st_mtime_ns))
    return tuple(found)


@contextlib.contextmanager
def _cache_lock(dispatcher: Any) -> Iterator[None]:
    """Let one process at a time compile into the cache folder; waits no longer than `_LOCK_TIMEOUT_S`."""
    folder = dispatcher.stats.cache_path
    if not folder or not os.path.isdir(folder):
        yield
        return
    try:
        fd = os.open(os.path.join(folder, LOCK_NAME), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        yield
        return
    try:
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_LOCK_POLL_S)
        yield  # without the lock after the deadline: Numba replaces files atomically, work is only done twice
    finally:
        os.close(fd)

# SPDX-License-Identifier: Apache-2.0
"""The peers by name: what they are, what each needs, and how that is installed. Light to import."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ism.errors import ConfigError

if TYPE_CHECKING:
    from ism.perf.versus.peers_sockets import Peer

_PIP: Final = "pip install 'virtio-ism[peers]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One peer.

    Attributes: `name`; `label`; `family` (several are asked for by it); `module` (which has it; "": it is not
    the two ends that play it); `needs` (a Python package by its import name), `program`: what must be there; `install`
    (a command); `swept` (measured at every message size).
    """

    name: str
    label: str
    family: str
    module: str = ""
    needs: str = ""
    program: str = ""
    install: str = ""
    swept: bool = False

    def present(self) -> bool:
        """Whether what it needs is installed."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return False
        return not self.program or shutil.which(self.program) is not None

    def load(self) -> Peer:
        """Import it. Raises ImportError."""
        peer: Peer = importlib.import_module(f"ism.perf.versus.{self.module}").PEERS[self.name]
        return peer


def _sockets(name: str, label: str, module: str = "peers_sockets", *, swept: bool = False) -> Entry:
    return Entry(name=name, label=label, family=name.partition("-")[0], module=module, swept=swept)


CATALOG: Final = (
    _sockets("smc-blocking", "smc, blocking", swept=True),
    _sockets("smc-trio", "smc, trio", "peers_trio"),
    _sockets("smc-trio-amortised", "smc, trio, amortised", "peers_trio", swept=True),
    _sockets("smc-view", "smc, blocking, view", swept=True),
    _sockets("tcp-blocking", "TCP, blocking", swept=True),
    _sockets("tcp-spinning", "TCP, spinning"),
    _sockets("tcp-trio", "TCP, trio", "peers_trio", swept=True),
    _sockets("tcp-asyncio", "TCP, asyncio", "peers_asyncio"),
    _sockets("unix-blocking", "UNIX, blocking", swept=True),
    _sockets("unix-trio", "UNIX, trio", "peers_trio"),
    Entry(name="uvloop", label="TCP, uvloop", family="uvloop", module="peers_asyncio", needs="uvloop", install=_PIP),
    Entry(name="pipe", label="multiprocessing.Pipe", family="pipe", module="peers_sockets"),
    Entry(name="iceoryx2", label="iceoryx2, polling", family="iceoryx2", module="peers_iceoryx2", needs="iceoryx2",
          install=f"{_PIP} (its wheel wants glibc 2.34)", swept=True),
    Entry(name="zmq-ipc", label="ZeroMQ, ipc", family="zmq", module="peers_zmq", needs="zmq", install=_PIP, swept=True),
    Entry(name="zmq-tcp", label="ZeroMQ, TCP", family="zmq", module="peers_zmq", needs="zmq", install=_PIP),
    Entry(name="iperf3", label="iperf3 (C)", family="iperf3", program="iperf3", install="apt-get install iperf3"),
)  # fmt: skip
BY_NAME: Final = {entry.name: entry for entry in CATALOG}
MEMCPY: Final = "memcpy"
"""Stands where a peer's name does: one thread copies messages, with nobody at the other end."""


def chosen(names: str | None) -> list[Entry]:
    """Return the entries for names and families, by commas; None: all. Raises ConfigError."""
    if names is None:
        return list(CATALOG)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if not any(name in (entry.name, entry.family) for entry in CATALOG):
            known = ", ".join(dict.fromkeys(text for entry in CATALOG for text in (entry.family, entry.name)))
            raise ConfigError("command line", "--peers", f"{name!r} is none of {known}")
    if not wanted:
        raise ConfigError("command line", "--peers", "names nobody")
    return [entry for entry in CATALOG if entry.name in wanted or entry.family in wanted]

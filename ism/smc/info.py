# SPDX-License-Identifier: Apache-2.0
"""How a connection's bytes travel, and why: what `smc_info()` returns, and the process's counters of fallbacks.

Nothing here decides. Each fallback is counted by reason and logged, the first time for each peer address.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ism.smc.diagnosis import Diagnosis, words

if TYPE_CHECKING:
    from ism.smc.link import Link
    from ism.smc.rendezvous import Fallback

log = logging.getLogger("ism.smc")

_EXPECTED = frozenset({Diagnosis.PEERNOSMC, Diagnosis.CNFERR, Diagnosis.OPTUNSUPP, Diagnosis.PEERDECL})
_MAX_LOGGED = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Info:
    """How the bytes of one socket travel.

    Attributes: `mode` ("SMC", "TCP", "pending": it is not decided yet, "broken"); `state` (of the connection, as in
    docs/handshake.md; "LISTEN"; "" when TCP knows it alone); `reason` (in words, "" for SMC),
    `code` (CLC diagnosis, 0 for SMC); `peer_gid`, `peer_devid`, `peer_host`, of the peer's device (0, 0, "" in TCP);
    `receive_buffer`, `send_buffer` (bytes of the rings); `sent`, `received` (bytes through shared memory); `reused`
    (whether it receives in a region that an earlier connection has left; None in TCP); `local`, `remote` (socket
    addresses, None when not known).
    """

    mode: str
    state: str = ""
    reason: str = ""
    code: int = 0
    peer_gid: int = 0
    peer_devid: int = 0
    peer_host: str = ""
    receive_buffer: int = 0
    send_buffer: int = 0
    sent: int = 0
    received: int = 0
    reused: bool | None = None
    local: Any = None
    remote: Any = None

    def __str__(self) -> str:
        return self.mode if self.mode in ("SMC", "pending") else f"{self.mode} ({self.reason}, 0x{self.code:08x})"


def as_dict(info: Info) -> dict[str, Any]:
    """Return the attributes as plain values."""
    return {name: getattr(info, name) for name in info.__slots__}


def listening(fallback: Fallback | None, local: Any) -> Info:
    """Describe a listening socket; `fallback`: why nobody finds it in the directory, if that is so."""
    code, why = (fallback.code, fallback.why) if fallback is not None else (0, "")
    return Info(mode="TCP" if why else "SMC", state="LISTEN", reason=why, code=code, local=local)


def describe(link: Link | None, fallback: Fallback | None, local: Any, remote: Any) -> Info:
    """Describe a socket by its link, or by why it has none."""
    if link is None:
        code, why = (fallback.code, fallback.why) if fallback is not None else (0, "")
        return Info(mode="TCP", reason=why or "no connection", code=code, local=local, remote=remote)
    connection = link.connection
    if connection is not None:
        peer, endpoint = connection.peer, connection.endpoint
        return Info(
            mode="SMC",
            state=connection.state.name,
            peer_gid=peer.gid,
            peer_devid=peer.devid,
            peer_host=peer.host,
            receive_buffer=endpoint.rx_ring_bytes,
            send_buffer=endpoint.tx_ring_bytes,
            sent=endpoint.sent_bytes,
            received=endpoint.received_bytes,
            reused=link.reused,
            local=local,
            remote=remote,
        )
    if not link.settled:
        return Info(mode="pending", state="INIT", reason="the two ends have not agreed yet", local=local, remote=remote)
    if link.error is not None:
        return Info(mode="broken", reason=str(link.error), code=link.code, local=local, remote=remote)
    return Info(mode="TCP", reason=link.why, code=link.code, local=local, remote=remote)


_lock = threading.Lock()
_fallbacks: Counter[int] = Counter()
_logged: set[tuple[int, object]] = set()


def count_fallback(code: int, why: str, remote: Any) -> None:
    """Count a connection that goes over TCP, and log it if it is the first of its reason with this peer."""
    host = remote[0] if isinstance(remote, tuple) and remote else None
    with _lock:
        _fallbacks[code] += 1
        first = (code, host) not in _logged and len(_logged) < _MAX_LOGGED
        if first:
            _logged.add((code, host))
    if first:
        level = logging.INFO if code in _EXPECTED else logging.WARNING
        log.log(level, "TCP%s: %s (0x%08x)", f" with {host}" if host else "", why, code)


def _after_fork() -> None:
    global _lock  # noqa: PLW0603 (a lock belongs to one process)
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def counters() -> dict[str, int]:
    """Return how many connections of this process went over TCP, by reason in words."""
    with _lock:
        return {words(code): count for code, count in sorted(_fallbacks.items())}

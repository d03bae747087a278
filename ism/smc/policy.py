# SPDX-License-Identifier: Apache-2.0
"""Whether a socket is to use shared memory: what a program or its environment says. Values only.

ISM_SMC        "auto" (the default): where the directory, or ISM_SMC_PEERS, says that both ends do; else TCP.
               "require": always; a connection that cannot fails. The directory says that the peer does; a peer
               that it does not know (behind NAT, or without a directory) must say "require" too.
               "off": never.
ISM_SMC_PEERS  where there is no directory: peers that are known to use shared memory, NETWORK[:PORT] by commas
               ("10.0.0.0/24:9000,[fd00::]/64,127.0.0.1"); PORT is the server's. The same on both ends.
ISM_SMC_BUFFER bytes of the region each side receives in ("256K", "4M"); it neither grows nor shrinks then
ISM_SMC_BUFFER_LIMIT  bytes up to which the ring grows, from ISM_SMC_BUFFER on if that is set too; 0: not at all
ISM_SMC_SPIN_US longest spin of a wait, microseconds, 0..50
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal, cast

from ism.errors import ConfigError
from ism.shm.header import HEADER_BYTES
from ism.smc.handshake import DEFAULT_BUFFER, DEFAULT_LIMIT, SMALLEST_BUFFER

Mode = Literal["auto", "require", "off"]
MODES = ("auto", "require", "off")
MAX_SPIN_US = 50
_LARGEST_BUFFER = 1 << 30
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_VARIABLES = ("", "_PEERS", "_BUFFER", "_BUFFER_LIMIT", "_SPIN_US")
_SIZE = re.compile(r"(\d+)\s*([KMG]?)(?:iB|B)?", re.IGNORECASE)
_PEER = re.compile(r"(?:\[([^\]]+)\](/\d+)?|([^:\[\]]+))(?::(\d+|\*))?")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Policy:
    """What is wanted of a socket.

    Attributes: `mode`; `buffer_size` (bytes of the region this side receives in); `buffer_limit` (bytes up to which its
    ring may grow, 0: not at all); `peers` (network, server's port or 0 for any); `spin_us` (longest spin).
    """

    mode: Mode = "auto"
    buffer_size: int = DEFAULT_BUFFER
    buffer_limit: int = DEFAULT_LIMIT
    peers: tuple[tuple[Network, int], ...] = field(default=())
    spin_us: int = MAX_SPIN_US

    def configured(self, peer: str, server_port: int) -> bool:
        """Whether the peer at this address is known to use shared memory, without a directory."""
        if not self.peers:
            return False
        address = plain(ipaddress.ip_address(peer.partition("%")[0]))
        return any(
            port in (0, server_port) and network.version == address.version and address in network
            for network, port in self.peers
        )

    def with_mode(self, mode: Mode | None) -> Policy:
        """Return the policy with another mode; None keeps it. Raises ValueError."""
        if mode is None:
            return self
        if mode not in MODES:
            raise ValueError(f"smc is {mode!r}, must be one of {', '.join(MODES)}")
        return replace(self, mode=mode)

    def with_buffer(self, size: int | None) -> Policy:
        """Return the policy with a buffer of a size, bytes, which stays so; None keeps it. Raises ValueError."""
        if size is None:
            return self
        if not 1 <= size <= _LARGEST_BUFFER:
            raise ValueError(f"buffer_size is {size} bytes, must be 1..{_LARGEST_BUFFER}")
        return replace(self, buffer_size=size, buffer_limit=0)


def buffer_for_option(value: int) -> int:
    """Return the region's size for a program's SO_RCVBUF: what TCP would double, here with its header page, bytes."""
    return min(max(2 * value + HEADER_BYTES, SMALLEST_BUFFER), _LARGEST_BUFFER)


def plain(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return an IPv4 address for a v4-mapped one."""
    return getattr(address, "ipv4_mapped", None) or address


def from_environment() -> Policy:
    """Return the policy that the environment asks for. Raises ConfigError naming the variable."""
    environ = os.environ
    return _parse(*(environ.get(f"ISM_SMC{name}", "") for name in _VARIABLES))


@lru_cache(maxsize=16)
def _parse(mode: str, peers: str, buffer: str, limit: str, spin: str) -> Policy:
    if mode and mode not in MODES:
        raise ConfigError("environment", "ISM_SMC", f"is {mode!r}, must be one of {', '.join(MODES)}")
    if spin and not (spin.isascii() and spin.isdigit() and int(spin) <= MAX_SPIN_US):
        raise ConfigError("environment", "ISM_SMC_SPIN_US", f"is {spin!r}, must be 0..{MAX_SPIN_US}")
    return Policy(
        mode=cast("Mode", mode or "auto"),
        buffer_size=_size("ISM_SMC_BUFFER", buffer, SMALLEST_BUFFER) if buffer else DEFAULT_BUFFER,
        buffer_limit=_size("ISM_SMC_BUFFER_LIMIT", limit, 0) if limit else 0 if buffer else DEFAULT_LIMIT,
        peers=tuple(_peer(text.strip()) for text in peers.split(",") if text.strip()),
        spin_us=int(spin) if spin else MAX_SPIN_US,
    )


def _size(variable: str, text: str, least: int) -> int:
    match = _SIZE.fullmatch(text.strip())
    size = int(match[1]) * _UNITS[match[2].upper()] if match else -1
    if not least <= size <= _LARGEST_BUFFER:
        raise ConfigError("environment", variable, f"is {text!r}, must be {least // 1024}K to 1G")
    return size


def _peer(text: str) -> tuple[Network, int]:
    match = _PEER.fullmatch(text)
    try:
        if match is None:
            raise ValueError("expected NETWORK or NETWORK:PORT, IPv6 in brackets")
        network = ipaddress.ip_network((match[1] or match[3]) + (match[2] or ""))
        port = 0 if match[4] in (None, "*") else int(match[4])
        if port > 65535:
            raise ValueError("the port is above 65535")
    except ValueError as exc:
        raise ConfigError("environment", "ISM_SMC_PEERS", f"{text!r}: {exc}") from None
    return network, port

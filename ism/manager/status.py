# SPDX-License-Identifier: Apache-2.0
"""What `ism status` shows, as plain values: domains, devices, regions, totals. It reads and changes nothing.

A token gives nothing without a grant, but it names a region for good, so only its first 16 bits are shown unless
whole tokens are asked for.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any

from ism.ids import DevId
from ism.manager.devices import DeviceHost
from ism.manager.directory import LOOPBACK_V4_NETWORK, Member
from ism.manager.host import DomainHost
from ism.manager.regions import Device, Region


def domain_status(domain: DomainHost, names: Mapping[DevId, str], *, whole_tokens: bool) -> dict[str, Any]:
    """Describe one domain. Args: `names` of its devices, connected or not."""
    registry = domain.registry
    return {
        "name": domain.name,
        "gid": f"{registry.gid:#x}",
        "chunk_size": registry.chunk_size,
        "bytes": registry.account.bytes,
        "bytes_limit": registry.account.limit,
        "devices": [
            _device(device, registry.directory.members[devid], names.get(devid, ""), domain.devices.get(devid))
            for devid, device in registry.devices.items()
        ],
        "listeners": [
            {"address": shown_address(address), "port": port, "device": names.get(devid, f"{devid:#x}")}
            for address, port, devid in registry.directory.listeners()
        ],
        "regions": [_region(region, names, whole_tokens) for region in registry.regions.values()],
    }


def totals(domains: Iterable[DomainHost]) -> dict[str, int]:
    """Sum up all domains."""
    listed = list(domains)
    return {
        "devices": sum(len(domain.registry.devices) for domain in listed),
        "connected": sum(len(domain.devices) for domain in listed),
        "regions": sum(len(domain.registry.regions) for domain in listed),
        "attachments": sum(
            device.account.attachments for domain in listed for device in domain.registry.devices.values()
        ),
        "bytes": sum(domain.registry.account.bytes for domain in listed),
    }


def shown_address(address: bytes) -> str:
    """Write an address of the directory as people do."""
    if address == LOOPBACK_V4_NETWORK:
        return "127.0.0.0/8"
    shown = ipaddress.IPv6Address(address)
    return str(shown.ipv4_mapped or shown)


def _device(device: Device, listed: Member, name: str, connected: object) -> dict[str, Any]:
    account, quota = device.account, device.account.quota
    shown: dict[str, Any] = {
        "name": name,
        "devid": f"{device.devid:#x}",
        "connected": connected is not None,
        "regions": account.regions,
        "attachments": account.attachments,
        "bytes": account.bytes,
        "window": device.window.window_size,
        "window_free": device.window.free_bytes,
        "listeners": len(listed.listeners),
        "intents": len(listed.intents),
        "directory": {
            "claims": listed.stats.claims,
            "retractions": listed.stats.retractions,
            "refused": listed.stats.refused,
        },
        "quota": {
            "bytes": quota.bytes,
            "regions": quota.regions,
            "attachments": quota.attachments,
            "commands_per_s": quota.commands_per_s,
        },
        "stats": {
            "refused": device.stats.refused,
            "rings": device.stats.doorbells,
            "unknown_rings": device.stats.unknown_doorbells,
        },
    }
    if isinstance(connected, DeviceHost):
        peer = connected.connection.peer
        shown["client"] = {
            "pid": peer.pid,
            "uid": peer.uid,
            "gid": peer.gid,
            "maps": connected.has_channel,
            "agent": connected.has_agent,
        }
        shown["stats"] |= connected.function.stats | {"over_rate": connected.registry.over_rate}
    return shown


def _region(region: Region, names: Mapping[DevId, str], whole_token: bool) -> dict[str, Any]:
    return {
        "token": f"{region.token:#018x}" if whole_token else f"{region.token >> 48:#06x}...",
        "size": region.size,
        "owner": names.get(region.owner, f"{region.owner:#x}"),
        "alive": region.alive,
        "sealed": region.sealed,
        "holders": len(region.holders),
    }

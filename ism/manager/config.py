# SPDX-License-Identifier: Apache-2.0
"""The manager's configuration: TOML in, dataclasses or ConfigError out. `docs/manager.md` is the reference.

It reads one file and nothing else: no directory is looked at, no name is resolved; user and group names, sockets that
exist already and the like are the server's to find out. Every error names the file and the dotted key.
"""

from __future__ import annotations

import ipaddress
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ism.device.bars import IMPLEMENTED
from ism.errors import ConfigError
from ism.manager.config_reader import TableReader, brief
from ism.manager.directory import Network, is_private_network, network_of
from ism.manager.quota import Quota
from ism.paths import control_socket, device_socket
from ism.virtio.ism_spec import DEFAULT_CHUNK_SIZE, MIN_CHUNK_SIZE, IsmFeature

GIB = 1 << 30
U64_MAX = (1 << 64) - 1
MIN_VECTORS, MAX_VECTORS = 3, 2048
MAX_CHUNKS = 1 << 24
MAX_CHUNK_SIZE = GIB
AGENT_SUFFIX = ".map"
"""Added to a device socket's path: where map agents introduce themselves."""
SOCKET_PATH_MAX = 107 - len(AGENT_SUFFIX)
LOG_LEVELS = ("debug", "info", "warning", "error")
DEFAULT_NAME = "default"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MODE = re.compile(r"0?[0-7]{3}")
_OWNER = re.compile(r"(?=.)([A-Za-z0-9._-]{0,64})(?::([A-Za-z0-9._-]{1,64}))?")


@dataclass(frozen=True, slots=True)
class DeviceShape:
    """What a device looks like and may use.

    Attributes: `window_size` (bytes), `vectors` (MSI-X table size), `quota`, `features` (device feature bits offered).
    """

    window_size: int = 8 * GIB
    vectors: int = 2048
    quota: Quota = field(default_factory=lambda: Quota(bytes=4 * GIB, regions=4096, attachments=8192))
    features: frozenset[int] = IMPLEMENTED


@dataclass(frozen=True, slots=True)
class SocketConfig:
    """One listening socket: absolute path, permission bits, owner ("" = the manager's own user or group)."""

    path: Path
    mode: int = 0o600
    user: str = ""
    group: str = ""
    key: str = ""

    def for_agents(self) -> SocketConfig:
        """Return the socket beside this one for map agents, with the same owner and permissions."""
        return replace(self, path=self.path.with_name(self.path.name + AGENT_SUFFIX))


@dataclass(frozen=True, slots=True)
class DomainConfig:
    """A domain: its devices share with each other and with nobody else. `gid` 0 = derived; `bytes_limit` 0 = none."""

    name: str = DEFAULT_NAME
    gid: int = 0
    chunk_size: int = DEFAULT_CHUNK_SIZE
    bytes_limit: int = 0


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """A named device with a socket of its own, for one client at a time. `devid` 0 = derived from the name."""

    name: str
    domain: str
    socket: SocketConfig
    devid: int = 0
    shape: DeviceShape = field(default_factory=DeviceShape)
    addresses: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = ()


@dataclass(frozen=True, slots=True)
class FreshConfig:
    """The socket on which every connection is a device of its own."""

    domain: str
    socket: SocketConfig
    shape: DeviceShape = field(default_factory=DeviceShape)


@dataclass(frozen=True, slots=True)
class ManagerConfig:
    """Everything. `fresh` is None when switched off; `file` is for messages."""

    file: str
    domains: tuple[DomainConfig, ...]
    devices: tuple[DeviceConfig, ...]
    fresh: FreshConfig | None
    log_level: str = "info"
    max_clients: int = 1024
    map_timeout_s: float = 5.0


def default_config(run_dir: Path) -> ManagerConfig:
    """Return what holds without a configuration file: one domain, one socket that gives fresh devices."""
    return parse_config("", "(defaults)", run_dir)


def load_config(path: Path, run_dir: Path) -> ManagerConfig:
    """Read a configuration file.

    Args: `run_dir`: where sockets with a relative path, or none, are.
    Raises: ConfigError for an unreadable file and for everything in it that cannot be used.
    """
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise ConfigError(str(path), "", f"cannot be read: {exc.strerror}") from exc
    return parse_config(data, str(path), run_dir)


def parse_config(data: bytes | str, file: str, run_dir: Path) -> ManagerConfig:
    """Read a configuration from memory; `file` is for messages. Raises ConfigError and nothing else."""
    try:
        text = data if isinstance(data, str) else data.decode()
        document = tomllib.loads(text)
    except UnicodeDecodeError as exc:
        raise ConfigError(file, "", f"is not UTF-8 at byte {exc.start}") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(file, "", f"is not TOML: {exc}") from exc
    return _Parser(file, run_dir).read(document)


class _Parser:
    def __init__(self, file: str, run_dir: Path) -> None:
        self._file = file
        self._run_dir = run_dir

    def read(self, document: dict[str, Any]) -> ManagerConfig:
        top = TableReader(self._file, "", document)
        manager = top.table("manager")
        log_level = manager.string("log_level", "info", choices=LOG_LEVELS)
        max_clients = manager.integer("max_clients", 1024, low=1, high=1 << 20)
        map_timeout_s = manager.number("map_timeout_s", 5.0, low=0.01, high=600.0)
        manager.close()

        defaults_table = top.table("defaults")
        defaults = self._shape(defaults_table, DeviceShape())
        defaults_table.close()

        domain_tables = top.tables("domain")
        domains = tuple(self._domain(table) for table in domain_tables) or (DomainConfig(),)
        self._unique(domain_tables, "name", [domain.name for domain in domains])
        self._unique(domain_tables, "gid", [domain.gid or None for domain in domains])
        by_name = {domain.name: domain for domain in domains}

        device_tables = top.tables("device")
        devices = tuple(self._device(table, by_name, defaults) for table in device_tables)
        self._unique(device_tables, "name", [device.name for device in devices])
        self._unique(
            device_tables, "devid", [(device.domain, device.devid) if device.devid else None for device in devices]
        )
        self._check_addresses(device_tables, devices)

        fresh_table = top.table("fresh")
        fresh = self._fresh(fresh_table, by_name, defaults)
        fresh_table.close()
        top.close()

        sockets = [device.socket for device in devices]
        self._check_sockets(sockets if fresh is None else [*sockets, fresh.socket])
        return ManagerConfig(self._file, domains, devices, fresh, log_level, max_clients, map_timeout_s)

    def _domain(self, table: TableReader) -> DomainConfig:
        domain = DomainConfig(
            name=self._name(table),
            gid=table.integer("gid", 0, low=1, high=U64_MAX),
            chunk_size=table.size(
                "chunk_size", DEFAULT_CHUNK_SIZE, low=MIN_CHUNK_SIZE, high=MAX_CHUNK_SIZE, power_of_two=True
            ),
            bytes_limit=table.size("bytes", 0),
        )
        table.close()
        return domain

    def _device(self, table: TableReader, domains: dict[str, DomainConfig], defaults: DeviceShape) -> DeviceConfig:
        name = self._name(table)
        domain = self._domain_of(table, domains)
        device = DeviceConfig(
            name=name,
            domain=domain.name,
            socket=self._socket(table, self._run_dir / f"{name}.sock"),
            devid=table.integer("devid", 0, low=1, high=U64_MAX),
            shape=self._shape(table, defaults, domain),
            addresses=self._addresses(table),
        )
        table.close()
        return device

    def _fresh(self, table: TableReader, domains: dict[str, DomainConfig], defaults: DeviceShape) -> FreshConfig | None:
        enabled = table.boolean("enabled", True)
        domain = self._domain_of(table, domains) if enabled or table.has("domain") else None
        socket = self._socket(table, device_socket(self._run_dir))
        shape = self._shape(table, defaults, domain)
        return FreshConfig(domain.name, socket, shape) if enabled and domain is not None else None

    def _shape(self, table: TableReader, base: DeviceShape, domain: DomainConfig | None = None) -> DeviceShape:
        window = table.size("window", base.window_size, low=MIN_CHUNK_SIZE, power_of_two=True)
        if domain is not None and not domain.chunk_size <= window <= domain.chunk_size * MAX_CHUNKS:
            table.fail(
                "window",
                f"expected 1 to {MAX_CHUNKS} chunks of domain {domain.name!r} ({domain.chunk_size} bytes each), "
                f"not {window} bytes",
            )
        vectors = table.integer("vectors", base.vectors, low=MIN_VECTORS, high=MAX_VECTORS)
        limits = table.table("quota")
        quota = Quota(
            bytes=limits.size("bytes", base.quota.bytes),
            regions=limits.integer("regions", base.quota.regions, low=0, high=1 << 20),
            attachments=limits.integer("attachments", base.quota.attachments, low=0, high=1 << 20),
            commands_per_s=limits.integer("commands_per_s", base.quota.commands_per_s, low=0, high=10**9),
        )
        limits.close()
        return DeviceShape(window, vectors, quota, self._features(table, base.features))

    @staticmethod
    def _features(table: TableReader, base: frozenset[int]) -> frozenset[int]:
        if not table.has("features"):
            return base
        known = {IsmFeature(bit).name.lower(): bit for bit in IMPLEMENTED}
        names = table.strings("features")
        for name in names:
            if name not in known:
                table.fail("features", f"expected some of {', '.join(sorted(known))}, not {brief(name)}")
        return frozenset(known[name] for name in names)

    def _socket(self, table: TableReader, default: Path) -> SocketConfig:
        shown = table.string("socket", str(default))
        if not shown or "\0" in shown:
            table.fail("socket", f"expected a path, not {brief(shown)}")
        try:
            path = self._run_dir / shown
            length = len(bytes(path))
        except UnicodeEncodeError:
            table.fail("socket", f"{brief(shown)} is not a path on this system")
        if length > SOCKET_PATH_MAX:
            table.fail("socket", f"the path has {length} bytes, a device socket's has at most {SOCKET_PATH_MAX}")
        if path.name.endswith(AGENT_SUFFIX):
            table.fail("socket", f"{path} ends in {AGENT_SUFFIX}, which is kept for the sockets of map agents")
        mode = table.string("socket_mode", "0600")
        if _MODE.fullmatch(mode) is None:
            table.fail("socket_mode", f'expected permission bits as an octal string such as "0660", not {brief(mode)}')
        owner = table.string("socket_owner", "")
        match = _OWNER.fullmatch(owner) if owner else None
        if owner and match is None:
            table.fail("socket_owner", f'expected "user", "user:group" or ":group", not {brief(owner)}')
        user, group = (match[1] or "", match[2] or "") if match else ("", "")
        return SocketConfig(path, int(mode, 8), user, group, table.where)

    @staticmethod
    def _addresses(table: TableReader) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
        networks = []
        for text in table.strings("addresses"):
            try:
                networks.append(ipaddress.ip_network(text))
            except ValueError:
                table.fail(
                    "addresses", f'expected addresses or networks such as "10.0.0.7" or "fd00::/64", not {brief(text)}'
                )
        return tuple(networks)

    @staticmethod
    def _name(table: TableReader) -> str:
        name = table.string("name")
        if _NAME.fullmatch(name) is None:
            table.fail("name", f"expected 1 to 64 letters, digits, '.', '_' or '-', not {brief(name)}")
        return name

    @staticmethod
    def _domain_of(table: TableReader, domains: dict[str, DomainConfig]) -> DomainConfig:
        default = next(iter(domains)) if len(domains) == 1 else DEFAULT_NAME
        name = table.string("domain", default)
        if name not in domains:
            there = ", ".join(sorted(domains))
            if name == DEFAULT_NAME and not table.has("domain"):
                off = " (or fresh.enabled = false)" if table.where == "fresh" else ""
                table.fail("domain", f"several domains are configured, so it must be said which: {there}{off}")
            table.fail("domain", f"there is no domain {brief(name)}; there are: {there}")
        return domains[name]

    @staticmethod
    def _unique(tables: list[TableReader], key: str, values: Iterable[object]) -> None:
        seen: dict[object, TableReader] = {}
        for table, value in zip(tables, values, strict=False):
            if value is not None and value in seen:
                table.fail(key, f"the same as {seen[value].where}.{key}")
            seen[value] = table

    @staticmethod
    def _check_addresses(tables: list[TableReader], devices: Iterable[DeviceConfig]) -> None:
        seen: dict[tuple[str, Network], TableReader] = {}
        for table, device in zip(tables, devices, strict=True):
            for address in device.addresses:
                network = network_of(address)
                if is_private_network(network):
                    table.fail("addresses", f"{address} is in every network namespace and cannot be one device's")
                other = seen.setdefault((device.domain, network), table)
                if other is not table:
                    table.fail("addresses", f"{address} is in {other.where}.addresses too")

    def _check_sockets(self, sockets: Iterable[SocketConfig]) -> None:
        seen = {_normal(control_socket(self._run_dir)): "the control socket"}
        for socket in sockets:
            path = _normal(socket.path)
            if path in seen:
                raise ConfigError(self._file, f"{socket.key}.socket", f"{socket.path} is also {seen[path]}")
            seen[path] = f"{socket.key}.socket"


def _normal(path: Path) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == ".." and parts and parts[-1] not in ("/", ".."):
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)

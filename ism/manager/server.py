# SPDX-License-Identifier: Apache-2.0
"""The manager as a whole: its domains, the sockets that give devices to clients, the control socket, its end.

It owns the list of devices and who may connect; a device that has a client is `devices`. Every client is served in
tasks of its own, and whatever one of them does ends with its own device. When the last of something runs out, new
clients are refused with a line in the log, and those that are here are served on.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import trio

from ism import __version__
from ism.errors import ConfigError
from ism.ids import DevId, Gid
from ism.manager.agents import AgentSocket
from ism.manager.config import DeviceConfig, DeviceShape, DomainConfig, ManagerConfig, SocketConfig
from ism.manager.control_server import serve_control, unknown_op
from ism.manager.devices import DeviceHost
from ism.manager.directory import network_of
from ism.manager.host import DomainHost, Shared
from ism.manager.registry import DomainRegistry
from ism.manager.sockets import RunDirectory, listen, raise_descriptor_limit
from ism.manager.status import domain_status, totals
from ism.memory import create_memfd
from ism.paths import control_socket
from ism.vfio_user.errors import VfioUserError
from ism.vfio_user.fds import Fd
from ism.vfio_user.payloads import DeviceInfo, DmaMap, DmaUnmap, IrqInfo, RegionInfo, SetIrqs
from ism.vfio_user.server import Connection, DeviceHandler, HandlerFactory, Limits, serve_connection

logger = logging.getLogger("ism.manager")

CLIENTS_PART = 8
"""One client may have eventfds for its vectors up to this part of the manager's descriptors."""
RESERVED_DESCRIPTORS = 64
ACCEPT_PAUSE_S = 0.1
FRESH_BIT = 1 << 63
"""Set in the devid of a fresh device, clear in that of a named one: they never meet."""


class Started(Protocol):
    """What `nursery.start` passes in."""

    def started(self, value: Manager, /) -> None: ...


class _Busy:
    """In place of a device: refuses VERSION, so that a client learns why it gets none. Nothing else is ever asked."""

    def __init__(self, reason: str) -> None:
        self._error = VfioUserError(errno.EBUSY, reason)

    async def version(self, capabilities: Mapping[str, Any]) -> tuple[Mapping[str, Any], Sequence[Fd]]:
        raise self._error

    async def device_info(self) -> DeviceInfo:
        raise self._error

    async def region_info(self, index: int) -> RegionInfo:
        raise self._error

    async def irq_info(self, index: int) -> IrqInfo:
        raise self._error

    async def region_read(self, index: int, offset: int, count: int) -> bytes:
        raise self._error

    async def region_write(self, index: int, offset: int, data: bytes) -> None:
        raise self._error

    async def set_irqs(self, request: SetIrqs, fds: list[Fd]) -> None:
        raise self._error

    async def dma_map(self, request: DmaMap, fd: Fd | None) -> None:
        raise self._error

    async def dma_unmap(self, request: DmaUnmap) -> None:
        raise self._error

    async def reset(self) -> None:
        raise self._error

    async def closed(self) -> None:
        pass


class Manager:
    """All domains and devices of one manager.

    Attributes: `config`; `domains` (by name); `descriptor_limit`; `refused` (clients turned away).
    """

    def __init__(self, config: ManagerConfig, run_dir: Path, *, descriptor_limit: int = 0) -> None:
        """Make the domains, and the named devices in them. Raises ConfigError when two derived numbers are the same."""
        self.config = config
        self.run_dir = run_dir
        self.descriptor_limit = descriptor_limit
        self.refused = 0
        self.clients = 0
        self.domains: dict[str, DomainHost] = {}
        self._started_s = trio.current_time()
        self._names: dict[str, dict[DevId, str]] = {}
        self._fresh_count = 0
        self._shared = Shared()
        try:
            for domain in config.domains:
                self._add_domain(domain)
            for device in config.devices:
                self._add_named(device)
        except BaseException:
            self._shared.close()
            raise

    # -- devices ---------------------------------------------------------------------------------------------------

    def named(self, config: DeviceConfig, agents: AgentSocket) -> HandlerFactory:
        """Return what gives a named device to a client: the first one, until that is gone."""
        devid = self._devid_of(config)
        domain = self.domains[config.domain]

        def connect(connection: Connection) -> DeviceHandler:
            there = domain.devices.get(devid)
            if isinstance(there, DeviceHost):
                reason = f"device {config.name} is in use by the client pid {there.connection.peer.pid}"
                logger.warning("client pid %d refused: %s", connection.peer.pid, reason)
                return _Busy(reason)
            return self._host(domain, connection, config.name, devid, config.shape, agents, lambda _: None)

        return connect

    def fresh(self, domain_name: str, shape: DeviceShape, agents: AgentSocket) -> HandlerFactory:
        """Return what makes a device for each client, and removes it with the client."""
        domain = self.domains[domain_name]
        names = self._names[domain_name]

        def remove(device: DeviceHost) -> None:
            domain.carry_out(domain.registry.remove_device(device.devid))
            del names[device.devid]

        def connect(connection: Connection) -> DeviceHandler:
            devid = DevId(FRESH_BIT | secrets.randbits(63))
            while devid in domain.registry.devices:
                devid = DevId(FRESH_BIT | secrets.randbits(63))
            self._fresh_count += 1
            name = f"fresh-{self._fresh_count}"
            domain.registry.add_device(devid, shape.window_size, shape.quota)
            names[devid] = name
            try:
                return self._host(domain, connection, name, devid, shape, agents, remove)
            except BaseException:
                domain.registry.remove_device(devid)
                del names[devid]
                raise

        return connect

    def _host(
        self,
        domain: DomainHost,
        connection: Connection,
        name: str,
        devid: DevId,
        shape: DeviceShape,
        agents: AgentSocket,
        gone: Callable[[DeviceHost], None],
    ) -> DeviceHost:
        def closed(device: DeviceHost) -> None:
            logger.info("device %s is free: the client pid %d is gone", name, connection.peer.pid)
            gone(device)

        device = DeviceHost(
            domain,
            connection,
            name=name,
            devid=devid,
            window_size=shape.window_size,
            vectors=shape.vectors,
            features=shape.features,
            map_timeout_s=self.config.map_timeout_s,
            may_keep=self._may_keep,
            agent_of=agents.take,
            gone=closed,
        )
        logger.info("device %s (%#x in %s) serves the client pid %d", name, devid, domain.name, connection.peer.pid)
        return device

    def _add_domain(self, config: DomainConfig) -> None:
        gid = config.gid or derived_number("domain", str(self.run_dir), config.name)
        if any(domain.registry.gid == gid for domain in self.domains.values()):
            raise ConfigError(self.config.file, f"domain {config.name}", f"its gid {gid:#x} is another domain's too")
        registry = DomainRegistry(
            Gid(gid), config.chunk_size, bytes_limit=config.bytes_limit, create_memory=self._create_memory
        )
        self.domains[config.name] = DomainHost(config.name, registry, self._shared)
        self._names[config.name] = {}

    def _add_named(self, config: DeviceConfig) -> None:
        devid = self._devid_of(config)
        domain = self.domains[config.domain]
        if devid in domain.registry.devices:
            raise ConfigError(
                self.config.file, f"device {config.name}", f"its devid {devid:#x} is another device's too"
            )
        domain.registry.add_device(devid, config.shape.window_size, config.shape.quota)
        self._names[config.domain][devid] = config.name
        for network in config.addresses:
            domain.registry.directory.bind(network_of(network), devid)

    @staticmethod
    def _devid_of(config: DeviceConfig) -> DevId:
        return DevId(config.devid or derived_number("device", config.domain, config.name) & ~FRESH_BIT or 1)

    def _create_memory(self, name: str, size: int) -> int:
        fd = create_memfd(name, size)
        if self.short_of_descriptors(fd):
            os.close(fd)
            raise OSError(errno.EMFILE, "the manager's last descriptors are kept for what is running")
        return fd

    def _may_keep(self, newest: int, held: int) -> bool:
        """Tell whether a client's descriptor may stay: no client gets more than its part, none the last ones."""
        part = self.descriptor_limit // CLIENTS_PART if self.descriptor_limit else held
        return held <= part and not self.short_of_descriptors(newest)

    def short_of_descriptors(self, newest: int) -> bool:
        """Tell whether the descriptor just opened is one of the last: the kernel gives the lowest free number."""
        limit = self.descriptor_limit
        return bool(limit) and newest >= limit - min(RESERVED_DESCRIPTORS, limit // 8)

    # -- control ---------------------------------------------------------------------------------------------------

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a control request. Raises RemoteProtocolError for one that is unknown."""
        if request["op"] != "status":
            raise unknown_op(request, ("status",))
        return {"status": self.status(whole_tokens=request.get("tokens") is True)}

    def status(self, *, whole_tokens: bool = False) -> dict[str, Any]:
        """Describe everything, as plain values."""
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(trio.current_time() - self._started_s, 3),
            "run_dir": str(self.run_dir),
            "config": self.config.file,
            "clients": self.clients,
            "clients_refused": self.refused,
            "domains": [
                domain_status(domain, self._names[name], whole_tokens=whole_tokens)
                for name, domain in self.domains.items()
            ],
            "totals": totals(self.domains.values()),
        }

    # -- tasks -----------------------------------------------------------------------------------------------------

    async def run_doorbells(self) -> None:
        """Listen on the fan-out eventfds, for ever."""
        await self._shared.fan_out.run()

    def fall_silent(self) -> None:
        """Tell clients nothing any more, before their devices are released."""
        for domain in self.domains.values():
            domain.silent = True

    async def serve_all(
        self, listeners: Sequence[tuple[socket.socket, HandlerFactory]], scope: trio.CancelScope
    ) -> None:
        """Serve the clients of several sockets until `scope` is cancelled."""
        with scope:
            async with trio.open_nursery() as nursery:
                for sock, connect in listeners:
                    nursery.start_soon(self.serve, sock, connect)

    def close(self) -> None:
        """Close what is shared; no client may be left."""
        self._shared.close()

    async def serve(self, listener: socket.socket, connect: HandlerFactory) -> None:
        """Serve the clients of one listening socket, for ever. Cancellation: releases all its devices."""
        limits = Limits()
        async with trio.open_nursery() as nursery:
            while True:
                await trio.lowlevel.wait_readable(listener)
                try:
                    sock, _ = listener.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    continue
                except OSError as error:
                    logger.error("no client can be accepted: %s; raise LimitNOFILE or ulimit -n", error)
                    await trio.sleep(ACCEPT_PAUSE_S)
                    continue
                refusal = self._refusal(sock)
                if refusal:
                    self.refused += 1
                    logger.error("a client was turned away: %s", refusal)
                    sock.close()
                    continue
                self.clients += 1
                nursery.start_soon(self._serve_one, sock, connect, limits)

    def _refusal(self, sock: socket.socket) -> str:
        if self.clients >= self.config.max_clients:
            return f"{self.clients} are served already (manager.max_clients)"
        if self.short_of_descriptors(sock.fileno()):
            return f"the limit of {self.descriptor_limit} descriptors is near; raise LimitNOFILE or ulimit -n"
        return ""

    async def _serve_one(self, sock: socket.socket, connect: HandlerFactory, limits: Limits) -> None:
        try:
            await serve_connection(sock, connect, limits=limits)
        except Exception:
            logger.exception("a client's connection failed; it is closed")
        finally:
            self.clients -= 1


def derived_number(*parts: str) -> int:
    """Derive 64 bits, not 0, from names and this host's identity: the same for every start, another elsewhere."""
    identity = b""
    for path in ("/etc/machine-id", "/proc/sys/kernel/hostname"):
        with contextlib.suppress(OSError):
            identity = Path(path).read_bytes()
            break
    text = "\0".join((*parts, str(os.geteuid()))).encode()
    return int.from_bytes(hashlib.sha256(identity + b"\0" + text).digest()[:8], "big") or 1


async def run_manager(config: ManagerConfig, run_dir: Path, *, task_status: Started = trio.TASK_STATUS_IGNORED) -> None:
    """Run a manager until it is cancelled, or SIGTERM or SIGINT comes (in the main thread).

    Args:
        config: from `load_config` or `default_config`.
        run_dir: for the sockets; made with mode 0700 if it is missing.
        task_status: `await nursery.start(run_manager, config, run_dir)` returns the `Manager` once clients can connect.
    Raises: TransportError when another manager runs there, or a socket cannot be made; ConfigError.
    Cancellation: the sockets are removed, and every client's device ends as if the manager had died: clients are told
        nothing about each other, so that established connections go on.
    """
    with contextlib.ExitStack() as stack:
        directory = RunDirectory(run_dir)
        stack.callback(directory.close)
        limit = raise_descriptor_limit()
        manager = Manager(config, run_dir, descriptor_limit=limit)
        stack.callback(manager.close)
        devices: list[tuple[socket.socket, HandlerFactory]] = []
        agent_sockets: list[AgentSocket] = []
        for device in config.devices:
            listener = listen(device.socket, config.file)
            stack.callback(listener.close)
            agents = AgentSocket(device.socket, config.file)
            stack.callback(agents.close)
            devices.append((listener.sock, manager.named(device, agents)))
            agent_sockets.append(agents)
        if config.fresh is not None:
            listener = listen(config.fresh.socket, config.file)
            stack.callback(listener.close)
            agents = AgentSocket(config.fresh.socket, config.file)
            stack.callback(agents.close)
            devices.append((listener.sock, manager.fresh(config.fresh.domain, config.fresh.shape, agents)))
            agent_sockets.append(agents)
        control = listen(SocketConfig(control_socket(run_dir)), config.file)
        stack.callback(control.close)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(manager.run_doorbells)
            nursery.start_soon(serve_control, control.sock, manager.answer)
            clients = trio.CancelScope(shield=True)
            nursery.start_soon(manager.serve_all, devices, clients)
            for agents in agent_sockets:
                nursery.start_soon(agents.serve)
            if threading.current_thread() is threading.main_thread():
                await nursery.start(_wait_for_signal, nursery.cancel_scope)
            logger.info("manager pid %d runs in %s, at most %d descriptors", os.getpid(), run_dir, limit)
            for device in config.devices:
                logger.info("device %s of domain %s: %s", device.name, device.domain, device.socket.path)
            if config.fresh is not None:
                logger.info(
                    "a fresh device of domain %s a connection: %s", config.fresh.domain, config.fresh.socket.path
                )
            task_status.started(manager)
            try:
                await trio.sleep_forever()
            finally:
                manager.fall_silent()
                clients.cancel()


async def _wait_for_signal(scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
        task_status.started()
        async for number in received:
            logger.info("%s: the manager ends", signal.Signals(number).name)
            scope.cancel()

# SPDX-License-Identifier: Apache-2.0
"""A whole manager in this process, and real drivers and clients on its sockets, in threads."""

from __future__ import annotations

import gc
import os
import re
import select
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import trio

from ism.driver.device import Device
from ism.driver.region import Region
from ism.driver.vfio_user import VfioUserTransport
from ism.eventfd import raise_eventfd
from ism.manager.config import parse_config
from ism.manager.server import Manager, run_manager
from ism.vfio_user.client import Client
from ism.vfio_user.fds import Fd
from ism.virtio.ism_spec import Permission

T = TypeVar("T")
READ, WRITE = Permission.READ, Permission.WRITE
ATTACH_RW = READ | WRITE | Permission.ATTACH
ATTACH_RO = READ | Permission.ATTACH
SMALL = """
[defaults]
window = "16 MiB"
vectors = 16
[defaults.quota]
bytes = "8 MiB"
regions = 20
"""
TEST_S = 30


@asynccontextmanager
async def manager(tmp_path: Path, text: str = "") -> AsyncIterator[Manager]:
    """Run a manager; at the end nothing is left: no descriptor, no socket, no device of a client."""
    run_dir = tmp_path / "run"
    with Fd(os.eventfd(0)) as fd:
        raise_eventfd(fd.fileno())  # it keeps what it opens for as long as the process lives
    gc.collect()
    before = descriptors()
    with trio.fail_after(TEST_S):
        async with trio.open_nursery() as nursery:
            running = await nursery.start(run_manager, parse_config(SMALL + text, "test.toml", run_dir), run_dir)
            yield running
            await eventually(lambda: running.clients == 0)
            nursery.cancel_scope.cancel()
    assert os.listdir(run_dir) == []
    assert all(not domain.registry.regions for domain in running.domains.values())
    assert all(domain.registry.account.bytes == 0 for domain in running.domains.values())
    gc.collect()
    assert descriptors() == before


def descriptors() -> list[str]:
    """List what every open descriptor of this process refers to, without numbers."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(re.sub(r"[0-9]+", "", os.readlink(f"/proc/self/fd/{number}")))
        except FileNotFoundError:
            pass  # it was the listing's own
    return sorted(links)


async def blocking(call: Callable[[], T]) -> T:
    """Run what blocks in a thread."""
    return await trio.to_thread.run_sync(call)


async def eventually(condition: Callable[[], object]) -> None:
    """Wait until a condition holds; the test's deadline is the limit."""
    while not condition():  # noqa: ASYNC110 - what clients in other threads do sets no event here
        await trio.sleep(0.002)


def connect(running: Manager, name: str = "device", *, channel: bool = True) -> Device:
    path = running.run_dir / f"{name}.sock"
    if channel:
        return Device(VfioUserTransport.connect(path))
    return Device(VfioUserTransport(Client.connect(path), str(path)))


async def devices(running: Manager, count: int) -> list[Device]:
    return [await blocking(lambda: connect(running)) for _ in range(count)]


async def close(*opened: Device) -> None:
    for device in opened:
        await blocking(device.close)


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


async def rings(ringer: Region, *heard: Region) -> None:
    """Ring once; all of `heard` hear it."""
    ringer.ring()
    for region in heard:
        await trio.lowlevel.wait_readable(region.fileno())
        os.eventfd_read(region.fileno())


async def settled(running: Manager, *regions: Region) -> None:
    """Wait until all clients have done as told: changing eventfds rings once more than anybody asked for."""
    connected = running.domains["default"].devices.values()
    await eventually(lambda: all(not device._orders._entries for device in connected))
    for region in regions:
        if readable(region.fileno()):
            os.eventfd_read(region.fileno())


def wired(region: Region) -> int | None:
    return region.device.transport.doorbell_fd(region._held.slot)

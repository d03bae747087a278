# SPDX-License-Identifier: Apache-2.0
"""The directory of a whole manager: real drivers in threads, namespaces, bound addresses, quotas, status."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from manager_rig import blocking, close, connect, devices, eventually, manager

from ism.driver.device import Device
from ism.driver.directory import Claim, Directory, FourTuple
from ism.errors import DeviceError, DeviceGoneError, QuotaError
from ism.manager.devices import network_namespace
from ism.manager.server import Manager
from ism.virtio.ism_spec import EventType, IsmFeature

V4 = bytes(10) + b"\xff\xff"
HERE, THERE = V4 + bytes([10, 0, 0, 1]), V4 + bytes([10, 0, 0, 2])
LOOPBACK, NETWORK = V4 + bytes([127, 0, 0, 1]), V4 + bytes([127, 0, 0, 0])
NONCE = 0x77


def directory_of(device: Device) -> Directory:
    assert device.directory is not None
    return device.directory


def members(running: Manager, name: str = "default") -> Any:
    return running.domains[name].registry.directory.members


async def claim(device: Device, connection: FourTuple) -> Claim | None:
    directory = directory_of(device)
    command = directory.claim_nowait(connection)
    await blocking(command.wait)
    return directory.claimed(command)


async def test_a_connection_is_published_intended_claimed_started_and_withdrawn(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        a, b = await devices(running, 2)
        assert {IsmFeature.DIRECTORY, IsmFeature.EVENT_VQ} <= a.features
        seen: list[tuple[EventType, int]] = []
        directory_of(a).listen(NONCE, lambda kind, devid: seen.append((kind, devid)))
        await blocking(lambda: directory_of(b).publish(LOOPBACK, 80, 1))
        assert await blocking(lambda: directory_of(a).lookup(LOOPBACK, 80, 1)) == 1
        intent = FourTuple(LOOPBACK, 40000, LOOPBACK, 80, 1)
        assert await blocking(lambda: directory_of(a).intend(intent, NONCE))
        claimed = await claim(b, FourTuple(LOOPBACK, 80, LOOPBACK, 40000, 1))
        assert claimed == Claim(NONCE, a.devid)
        await eventually(lambda: seen == [(EventType.CLAIMED, b.devid)])
        assert await blocking(lambda: directory_of(a).retract(NONCE)) is False
        directory_of(b).start_nowait(claimed)
        await eventually(lambda: (EventType.START, b.devid) in seen)
        await blocking(directory_of(b).withdraw(LOOPBACK, 80, 1).expect_ok)
        assert await blocking(lambda: directory_of(a).intend(intent, 1)) is False
        await close(a, b)


async def test_a_process_is_known_by_its_namespace_and_another_client_by_its_device(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        process = await blocking(lambda: connect(running))
        machine = await blocking(lambda: connect(running, channel=False))
        assert members(running)[process.devid].scope == ("namespace", network_namespace(os.getpid()))
        assert members(running)[machine.devid].scope == ("device", machine.devid)
        for device in (process, machine):
            await blocking(lambda device=device: directory_of(device).publish(NETWORK, 80, 0))
        for device in (process, machine):
            assert await blocking(lambda device=device: directory_of(device).lookup(LOOPBACK, 80, 0)) == 1
        await close(process, machine)


async def test_a_named_device_has_the_scope_of_whoever_is_its_client(tmp_path: Path) -> None:
    async with manager(tmp_path, '[[device]]\nname="vm"') as running:
        first = await blocking(lambda: connect(running, "vm"))
        assert members(running)[first.devid].scope[0] == "namespace"
        await close(first)
        await eventually(lambda: running.clients == 0)
        second = await blocking(lambda: connect(running, "vm", channel=False))
        assert members(running)[second.devid].scope == ("device", second.devid)
        await close(second)


def test_a_namespace_that_cannot_be_read_is_zero() -> None:
    assert network_namespace(0) == 0
    here = os.stat("/proc/self/ns/net")
    assert network_namespace(os.getpid()) == (here.st_dev, here.st_ino)


async def test_bound_addresses_are_their_devices_and_domains_are_apart(tmp_path: Path) -> None:
    text = """
    [[domain]]
    name = "red"
    [[domain]]
    name = "blue"
    [fresh]
    domain = "red"
    [[device]]
    name = "vm"
    domain = "red"
    addresses = ["10.0.0.2", "fd00::/64"]
    [[device]]
    name = "other"
    domain = "blue"
    addresses = ["10.0.0.2"]
    """
    async with manager(tmp_path, text) as running:
        vm, other, fresh = [await blocking(lambda n=n: connect(running, n)) for n in ("vm", "other", "device")]
        with pytest.raises(DeviceError, match="belongs to another device"):
            await blocking(lambda: directory_of(fresh).publish(THERE, 80, 0))
        await blocking(lambda: directory_of(other).publish(THERE, 80, 0))
        assert await blocking(lambda: directory_of(fresh).lookup(THERE, 80, 0)) == 0
        await blocking(lambda: directory_of(vm).publish(THERE, 80, 0))
        with pytest.raises(DeviceError):
            await blocking(lambda: directory_of(fresh).intend(FourTuple(THERE, 1, THERE, 80, 0), NONCE))
        assert await blocking(lambda: directory_of(fresh).intend(FourTuple(HERE, 1, THERE, 80, 0), NONCE))
        assert await claim(other, FourTuple(THERE, 80, HERE, 1, 0)) is None
        assert await claim(vm, FourTuple(THERE, 80, HERE, 1, 0)) == Claim(NONCE, fresh.devid)
        await close(vm, other, fresh)


async def test_a_client_that_dies_leaves_no_entry(tmp_path: Path) -> None:
    async with manager(tmp_path, '[[device]]\nname="vm"') as running:
        a, vm = await devices(running, 1) + [await blocking(lambda: connect(running, "vm"))]
        for port, device in enumerate((a, vm), start=1):
            await blocking(lambda device=device: directory_of(device).publish(THERE, 80, 0))
            intent = FourTuple(HERE, port, THERE, 80, 0)
            await blocking(lambda device=device, i=intent: directory_of(device).intend(i, device.devid))
        assert len(list(running.domains["default"].registry.directory.listeners())) == 2
        for device in (a, vm):
            with socket.socket(fileno=os.dup(device.transport._client.fileno())) as sock:
                sock.shutdown(socket.SHUT_RDWR)  # as when a process is killed: no goodbye
        await eventually(lambda: running.clients == 0)
        assert list(members(running)) == [vm.devid]
        member = members(running)[vm.devid]
        assert not member.listeners
        assert not member.intents
        await close(a, vm)


async def test_commands_of_the_directory_count_in_the_quota(tmp_path: Path) -> None:
    text = '[[device]]\nname="vm"\n[device.quota]\ncommands_per_s=3'
    async with manager(tmp_path, text) as running:
        vm = await blocking(lambda: connect(running, "vm"))
        members(running)[vm.devid]
        vm_host: Any = running.domains["default"].devices[vm.devid]
        vm_host.registry._bucket._at_s = float("inf")  # no second passes
        for _ in range(3):
            await blocking(lambda: directory_of(vm).publish(THERE, 80, 0))
        with pytest.raises(QuotaError):
            await blocking(lambda: directory_of(vm).publish(THERE, 80, 0))
        with pytest.raises(QuotaError):
            await claim(vm, FourTuple(THERE, 80, HERE, 1, 0))
        await blocking(directory_of(vm).withdraw(THERE, 80, 0).expect_ok)
        assert await blocking(lambda: directory_of(vm).retract(5)) is False
        assert vm_host.registry.over_rate == 2
        await close(vm)


async def test_status_lists_who_listens_where_and_counts(tmp_path: Path) -> None:
    async with manager(tmp_path, '[[device]]\nname="vm"') as running:
        vm = await blocking(lambda: connect(running, "vm"))
        directory = directory_of(vm)
        places = [(THERE, 80), (NETWORK, 81), (bytes(15) + b"\1", 82), (bytes.fromhex("fd") + bytes(14) + b"\7", 83)]
        for address, port in places:
            await blocking(lambda a=address, p=port: directory.publish(a, p, 0))
        for port in (1, 2, 3):
            await blocking(lambda p=port: directory.intend(FourTuple(HERE, p, THERE, 80, 0), p))
        assert await claim(vm, FourTuple(THERE, 80, HERE, 1, 0)) is not None
        assert await blocking(lambda: directory.retract(2))
        with pytest.raises(DeviceError):
            await blocking(lambda: directory.publish(bytes(16), 80, 0))
        (domain,) = running.status()["domains"]
        assert domain["listeners"] == [
            {"address": "10.0.0.2", "port": 80, "device": "vm"},
            {"address": "127.0.0.0/8", "port": 81, "device": "vm"},
            {"address": "::1", "port": 82, "device": "vm"},
            {"address": "fd00::7", "port": 83, "device": "vm"},
        ]
        (device,) = domain["devices"]
        assert (device["listeners"], device["intents"]) == (4, 1)
        assert device["directory"] == {"claims": 1, "retractions": 1, "refused": 1}
        await close(vm)


async def test_a_manager_that_ends_acknowledges_a_claim_without_telling_the_client_but_never_the_reverse(
    tmp_path: Path,
) -> None:
    async with manager(tmp_path) as running:
        a, b = await devices(running, 2)
        seen: list[EventType] = []
        directory_of(a).listen(NONCE, lambda kind, devid: seen.append(kind))
        await blocking(lambda: directory_of(b).publish(THERE, 80, 0))
        assert await blocking(lambda: directory_of(a).intend(FourTuple(HERE, 1, THERE, 80, 0), NONCE))
        running.domains["default"].silent = True
        command = directory_of(b).claim_nowait(FourTuple(THERE, 80, HERE, 1, 0))
        await eventually(lambda: members(running)[b.devid].stats.claims)
        await close(a, b)
        assert seen == []
        assert directory_of(b).claimed(command) == Claim(NONCE, a.devid)


async def test_a_claim_of_a_client_that_was_just_dropped_never_happens(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        a, b = await devices(running, 2)
        await blocking(lambda: directory_of(b).publish(THERE, 80, 0))
        assert await blocking(lambda: directory_of(a).intend(FourTuple(HERE, 1, THERE, 80, 0), NONCE))
        host: Any = running.domains["default"].devices[b.devid]
        steps: list[Any] = []
        host._orders.then = steps.append
        command = directory_of(b).claim_nowait(FourTuple(THERE, 80, HERE, 1, 0))
        await eventually(lambda: steps)
        host.connection.drop("it was slow")  # its driver looks for the last time, before the function is reset
        steps[0]()
        with pytest.raises(DeviceGoneError):
            await blocking(lambda: command.wait())
        assert await blocking(lambda: directory_of(a).retract(NONCE)) is True
        await close(a, b)


async def test_an_intent_that_was_sent_before_a_claim_is_found_by_it(tmp_path: Path) -> None:
    async with manager(tmp_path) as running:
        a, b = await devices(running, 2)
        await blocking(lambda: directory_of(b).publish(THERE, 80, 0))
        found = 0
        for port in range(1, 101):
            intent = directory_of(a).intend_nowait(FourTuple(HERE, port, THERE, 80, 0), port)
            command = directory_of(b).claim_nowait(FourTuple(THERE, 80, HERE, port, 0))
            await blocking(intent.wait)
            await blocking(command.wait)
            found += directory_of(b).claimed(command) == Claim(port, a.devid)
        assert found == 100
        await close(a, b)

# SPDX-License-Identifier: Apache-2.0
"""Guests whose device is not the usual one: without this project's features, or without the map agent."""

from __future__ import annotations

import pytest
from vm_programs import ECHO, SEND, SERVE
from vm_rig import GuestDriver

from ism.guests.lab import address_of
from ism.virtio.ism_spec import Permission

pytestmark = pytest.mark.vm
PORT = 9000
A = address_of(1)
SHARED = int(Permission.READ | Permission.WRITE | Permission.ATTACH)


@pytest.mark.parametrize("features", ['["event_irq"]', '["event_vq"]'])
def test_sockets_work_on_a_plain_device_where_the_peers_are_configured(make_lab, features: str) -> None:
    lab = make_lab(network="pair", features=features)
    a, b = lab.add("a"), lab.add("b")
    peers = {"ISM_SMC_PEERS": "10.77.0.0/24"}
    server = a.start_python(SERVE, {"host": A, "port": PORT}, env=peers)
    server.wait_line("listening")
    sent = b.python(SEND, {"host": A, "port": PORT, "mib": 8}, env=peers, timeout_s=120)
    assert (sent["same"], sent["mode"]) == (True, "SMC")
    server.result()


def test_a_guest_without_the_map_agent_reaches_the_same_memory_by_trapped_accesses(make_lab) -> None:
    lab = make_lab(network="pair")
    a, b = lab.add("a", agent=False), lab.add("b")
    assert {device["name"]: device["client"]["agent"] for device in lab.devices()} == {"a": False, "b": True}
    one, other = GuestDriver(a), GuestDriver(b)
    token = one.alloc("shared", 65536)
    one.grant("shared", SHARED, other.devid)
    other.attach("shared", token)
    one.write("shared", 4096, "by messages")
    assert other.read("shared", 4096, 11) == "by messages"
    other.write("shared", 8192, "mapped")
    assert one.read("shared", 8192, 6) == "mapped"
    other.ring("shared")
    one.wait_rung("shared")


def test_sockets_work_without_the_map_agent(make_lab) -> None:
    lab = make_lab(network="pair")
    a, b = lab.add("a", agent=False), lab.add("b")
    server = a.start_python(SERVE, {"host": A, "port": PORT, "echo": True})
    server.wait_line("listening")
    assert b.python(ECHO, {"host": A, "port": PORT, "rounds": 5, "words": 16}, timeout_s=120) == "SMC"
    server.result()

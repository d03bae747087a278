# SPDX-License-Identifier: Apache-2.0
"""`ism vm` as its user runs it, to its end, and the example whose two scripts run in two guests."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ism.guests import measure
from ism.guests.lab import Parts, address_of
from ism.guests.payload import FOLDER

pytestmark = pytest.mark.vm
PATIENCE_S = 240.0
PATIENCE = pytest.mark.timeout(300)
EXAMPLE = "examples/cross_vm_rpc"


def ism(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ism", "vm", *arguments],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@PATIENCE
@pytest.mark.usefixtures("parts")
def test_the_demo_sends_a_file_over_both_and_calls_the_service() -> None:
    done = ism("demo", "--size", "8M")
    assert (done.stderr, done.returncode) == ("", 0), done.stdout
    (digest,) = re.findall(r"^SHA-256 verified over shared memory: ([0-9a-f]{64})$", done.stdout, re.MULTILINE)
    assert f"SHA-256 verified over TCP: {digest}\n" in done.stdout
    assert re.search(r"^shared memory: 8,388,608 bytes .*connection: SMC$", done.stdout, re.MULTILINE)
    assert re.search(r"^TCP: 8,388,608 bytes .*connection: TCP \(", done.stdout, re.MULTILINE)
    assert re.search(r"^  sum of 1,000,000 numbers: -?[\d,]+, as here", done.stdout, re.MULTILINE)
    assert "  at once: 64 calls, each with the answer that is its own" in done.stdout
    assert "  connection: SMC\n" in done.stdout
    for name in ("a", "b"):
        line = rf"^guest {name} .* QEMU pid \d+, Linux \d\S+, virtio-ism at 0000:\S+, bound to vfio-pci$"
        assert re.search(line, done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"round trip p50, awake .* us .* us .*x", done.stdout)


@PATIENCE
def test_ctrl_c_ends_the_demo_with_its_guests(parts: Parts) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "ism", "vm", "demo", "--size", "8M"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as demo:  # fmt: skip
        assert demo.stdout is not None
        for line in demo.stdout:
            if line.startswith("guest b"):
                break
        pid = int(line.split("QEMU pid ")[1].split(",")[0])
        demo.send_signal(signal.SIGINT)
        _, errors = demo.communicate(timeout=PATIENCE_S)
    assert (errors.strip(), demo.returncode) == ("Aborted!", 1)
    assert not Path(f"/proc/{pid}").exists()


@PATIENCE
def test_the_example_answers_from_one_guest_to_the_other_and_serves_the_next_client(make_lab: Any) -> None:
    lab = make_lab(network="pair")
    a, b = lab.add("a"), lab.add("b")
    assert measure.has_file(a, f"{EXAMPLE}/service.py")
    service = measure.start_script(a, f"{EXAMPLE}/service.py", address_of(1), "9200", env=measure.REQUIRE)
    service.wait_line("listening on 10.77.0.1 port 9200", PATIENCE_S)
    as_a_user = ["python3", f"{FOLDER}/{EXAMPLE}/client.py", address_of(1), "9200"]
    clients = [
        lambda: measure.start_script(b, f"{EXAMPLE}/client.py", address_of(1), "9200", env=measure.REQUIRE),
        lambda: b.start(as_a_user, env=measure.REQUIRE),
    ]
    for start in clients:
        client = start()
        assert client.wait(PATIENCE_S) == 0, client.output
        assert [line.partition(":")[0] for line in client.output.splitlines()] == [
            "sum of 1,000,000 numbers", "running sums", "at once", "connection",
        ]  # fmt: skip
        assert client.output.endswith("connection: SMC\n")
        service.wait_line("a client is done", PATIENCE_S)
    service.signal(signal.SIGINT)
    assert service.wait(PATIENCE_S) == 0, service.output
    client = measure.start_script(b, f"{EXAMPLE}/client.py", address_of(1), "9200", env=measure.OFF)
    assert client.wait(PATIENCE_S) == 1
    assert client.output.startswith("client: ")
    assert client.output.count("\n") == 1


@PATIENCE
@pytest.mark.usefixtures("parts")
def test_the_benchmark_yields_every_figure() -> None:
    began = time.monotonic()
    done = ism("bench", "--quick", "--json", "-")
    took = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert set(figures) == {
        "first_byte_s", "forwarded_doorbell", "guest_doorbell", "host", "ratios", "region_1_mib", "rounds",
        "tcp_mtu_9000", "versions",
    }  # fmt: skip
    assert set(figures["ratios"]) == {"awake", "awake_mtu_9000", "blocking", "stream", "stream_mtu_9000"}
    assert [(each["transport"], each["mode"]) for each in figures["rounds"]] == [("smc", "SMC"), ("tcp", "TCP")]
    assert set(figures["forwarded_doorbell"]) == {"median_s", "p99_s", "manager_cpu_s"}
    assert set(figures["region_1_mib"]) == {"alloc_s", "grant_s", "detach_s"}
    assert set(figures["guest_doorbell"]) == {"round_trip_s", "ring_s"}
    for number in _numbers({name: value for name, value in figures.items() if name not in ("host", "versions")}):
        assert 0 < number < float("inf")
    assert sum(figures["first_byte_s"]) < took
    assert "64-byte round trip" in done.stderr


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for each in value.values() for number in _numbers(each)]
    if isinstance(value, list):
        return [number for each in value for number in _numbers(each)]
    return [value] if isinstance(value, int | float) else []

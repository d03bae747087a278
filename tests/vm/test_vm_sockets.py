# SPDX-License-Identifier: Apache-2.0
"""Sockets between guests, and between a guest and a process of the host: every byte, over shared memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from vm_programs import ECHO, SEND, SERVE

from ism.guests.lab import HOST_ADDRESS, Lab, address_of

pytestmark = pytest.mark.vm
PORT = 9000
A, B = address_of(1), address_of(2)
PATIENCE_S = 120.0


class HostProgram:
    """One of the programs as a process of the host, in the guests' network."""

    def __init__(self, lab: Lab, code: str, argument: Any) -> None:
        text = f"import json\nargument = json.loads({json.dumps(json.dumps(argument))})\nresult = None\n{code}"
        text += '\nprint("=" + json.dumps(result), flush=True)\n'
        self.process = subprocess.Popen(
            lab.host_command([sys.executable, "-c", text]), env=lab.environment(), stdout=subprocess.PIPE, text=True
        )

    def wait_line(self, wanted: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(wanted):
                return line.rstrip("\n")
        raise AssertionError(f"the program ended without {wanted!r}")

    def result(self) -> Any:
        answer = json.loads(self.wait_line("=")[1:])
        self.end()
        return answer

    def end(self) -> None:
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process.kill() if self.process.poll() is None else None
        self.process.wait()


def served(line: str) -> list[Any]:
    return json.loads(line.removeprefix("served "))


def test_two_guests_echo_and_stream_64_mib_over_shared_memory(make_lab) -> None:
    lab = make_lab(network="pair")
    a, b = lab.add("a"), lab.add("b")
    server = a.start_python(SERVE, {"host": A, "port": PORT, "echo": True})
    server.wait_line("listening")
    assert b.python(ECHO, {"host": A, "port": PORT, "rounds": 200, "words": 16}, timeout_s=PATIENCE_S) == "SMC"
    assert served(server.wait_line("served"))[:2] == [200 * 64, "SMC"]
    server.result()
    server = a.start_python(SERVE, {"host": A, "port": PORT})
    server.wait_line("listening")
    sent = b.python(SEND, {"host": A, "port": PORT, "mib": 64}, timeout_s=PATIENCE_S)
    assert (sent["same"], sent["mode"]) == (True, "SMC")
    assert served(server.wait_line("served"))[:2] == [64 << 20, "SMC"]
    status = lab.status()
    assert status["totals"]["regions"] == 0


def test_a_guest_and_a_process_of_the_host_talk_both_ways(make_lab) -> None:
    lab = make_lab(["a"], network="bridge")
    a = lab.add("a")
    server = a.start_python(SERVE, {"host": A, "port": PORT})
    server.wait_line("listening")
    sent = HostProgram(lab, SEND, {"host": A, "port": PORT, "mib": 8}).result()
    assert (sent["same"], sent["mode"]) == (True, "SMC")
    assert served(server.wait_line("served"))[:2] == [8 << 20, "SMC"]
    host = HostProgram(lab, SERVE, {"host": HOST_ADDRESS, "port": PORT})
    host.wait_line("listening")
    sent = a.python(SEND, {"host": HOST_ADDRESS, "port": PORT, "mib": 8}, timeout_s=PATIENCE_S)
    assert (sent["same"], sent["mode"]) == (True, "SMC")
    assert served(host.wait_line("served"))[:2] == [8 << 20, "SMC"]
    host.end()


def test_unmodified_programs_under_ism_run_in_both_guests_use_shared_memory(make_lab) -> None:
    lab = make_lab(network="pair")
    a, b = lab.add("a"), lab.add("b")
    a.write("/srv/hello.txt", b"hello from a" * 1000)
    server = a.start(
        ["ism", "run", "--require", "-m", "http.server", "8000", "--bind", A, "--directory", "/srv"],
        env={"PYTHONUNBUFFERED": "1"},
    )
    server.wait_line("Serving HTTP", PATIENCE_S)
    fetch = f"import urllib.request as u; print(len(u.urlopen('http://{A}:8000/hello.txt').read()))"
    assert b.run(["ism", "run", "--require", "-c", fetch], timeout_s=PATIENCE_S).split()[-1] == "12000"


def test_a_guest_killed_in_mid_stream_ends_the_connection_and_nothing_is_left(make_lab) -> None:
    lab = make_lab(network="pair")
    a, b = lab.add("a"), lab.add("b")
    server = a.start_python(
        """
        import trio, ism.smc
        async def main():
            listeners = await ism.smc.open_tcp_listeners(argument["port"], host=argument["host"])
            print("listening", flush=True)
            stream = await listeners[0].accept()
            count = 0
            try:
                async for part in stream:
                    count += len(part)
                return ["end", count]
            except trio.BrokenResourceError as exc:
                return ["broken", count]
        result = trio.run(main)
        """,
        {"host": A, "port": PORT},
    )
    server.wait_line("listening")
    client = b.start_python(SEND, {"host": A, "port": PORT, "mib": 1 << 16, "progress": True})
    for _ in range(3):
        client.wait_line("sent", PATIENCE_S)
    b.kill()
    how, count = server.result(PATIENCE_S)
    assert how == "broken"
    assert count >= 1 << 20
    lab.wait_status(lambda status: status["totals"]["regions"] == 0)
    assert [device["name"] for device in lab.devices() if device["connected"]] == ["a"]


def test_a_guest_that_reboots_works_again(make_lab) -> None:
    lab = make_lab(network="pair")
    a, b = lab.add("a"), lab.add("b")
    server = a.start_python(SERVE, {"host": A, "port": PORT, "once": False})
    server.wait_line("listening")
    assert b.python(SEND, {"host": A, "port": PORT, "mib": 1}, timeout_s=PATIENCE_S)["mode"] == "SMC"
    lab.reboot(b)
    assert b.python(SEND, {"host": A, "port": PORT, "mib": 4}, timeout_s=PATIENCE_S) | {"seconds": 0} == {
        "same": True, "mode": "SMC", "reason": "", "seconds": 0,
    }  # fmt: skip

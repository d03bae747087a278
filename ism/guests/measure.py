# SPDX-License-Identifier: Apache-2.0
"""What `ism vm demo` and `ism vm bench` measure between guests, and the programs that guests run for it.

The programs are text: they run in a guest's Python, find their `argument` there, and use `ism.smc` as any program does.
Here on the host is only what starts them and reads what they write. Blocking calls on both sides of a comparison: the
sockets of `ism.smc.blocking` against those of the standard library, with TCP_NODELAY.

Two round trips are told apart. *Blocking*: each end waits in `recv`, so that it sleeps and has to be woken unless the
answer comes within the library's own spin. *Awake*: each end asks again and again (MSG_DONTWAIT), so that nobody sleeps
and nothing is measured but the way of the bytes.
"""

from __future__ import annotations

import json
import select
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from ism import paths
from ism.driver import open_device
from ism.eventfd import drain
from ism.guests.guest import Guest, GuestProcess
from ism.guests.lab import Lab, address_of
from ism.guests.machine import MachineError
from ism.guests.payload import FOLDER
from ism.virtio.ism_spec import Permission
from ism.vmm.agent import agent_library

Transport = Literal["smc", "tcp"]
REQUIRE: Final = {"ISM_SMC": "require"}
OFF: Final = {"ISM_SMC": "off"}
_START_S: Final = 60.0
_PATIENCE_S: Final = 300.0
_SHARED: Final = Permission.READ | Permission.WRITE | Permission.ATTACH
_MEASURED: Final = "measured "

# -- programs -------------------------------------------------------------------------------------------------------

_FAR: Final = """
import json, socket as std, sys, threading
from ism.smc import blocking

def serve(connection):
    connection.setsockopt(std.IPPROTO_TCP, std.TCP_NODELAY, 1)
    request = connection.recv(9, std.MSG_WAITALL)
    kind, count = request[:1], int.from_bytes(request[1:], "little")
    if kind == b"S":
        view = memoryview(bytearray(65536))
        while count > 0:
            received = connection.recv_into(view)
            if not received:
                return
            count -= received
        connection.sendall(b"!")
        return
    connection.sendall(b"!")
    receive, send, flags = connection.recv, connection.sendall, std.MSG_DONTWAIT if kind == b"P" else 0
    while True:
        try:
            data = receive(65536, flags)
        except BlockingIOError:
            continue
        if not data:
            return
        send(data)

def accept(listener):
    while True:
        connection, _ = listener.accept()
        with connection:
            try:
                serve(connection)
            except ConnectionError:
                pass

listeners = {"smc": blocking.create_server((argument, 0)), "tcp": std.create_server((argument, 0))}
for listener in listeners.values():
    threading.Thread(target=accept, args=(listener,), daemon=True).start()
print("ports", json.dumps({name: listener.getsockname()[1] for name, listener in listeners.items()}), flush=True)
sys.stdin.read(1)
"""
"""Serves both transports: counts a stream (S), or echoes, waiting (E) or asking again and again (P)."""

_NEAR: Final = """
import json, socket as std, statistics, time
from ism.smc import blocking

def connect(which, kind, count=0):
    connection = (blocking if which == "smc" else std).create_connection((argument["host"], argument["ports"][which]))
    connection.setsockopt(std.IPPROTO_TCP, std.TCP_NODELAY, 1)
    connection.sendall(kind + count.to_bytes(8, "little"))
    return connection

def round_trip(which, kind):
    message, times, count = bytes(64), [], argument["pings"]
    with connect(which, kind) as connection:
        send, receive, flags = connection.sendall, connection.recv, std.MSG_DONTWAIT if kind == b"P" else 0
        clock = time.perf_counter
        assert connection.recv(1) == b"!"
        for number in range(count + count // 10):
            began = clock()
            send(message)
            while True:
                try:
                    receive(64, flags)
                    break
                except BlockingIOError:
                    pass
            if number >= count // 10:
                times.append(clock() - began)
        mode = connection.smc_info().mode if which == "smc" else "TCP"
    return statistics.median(times), mode

def stream(which):
    total, block = argument["total"], bytes(65536)
    if not total:
        return 0.0
    with connect(which, b"S", total) as connection:
        began = time.perf_counter()
        for _ in range(total // len(block)):
            connection.sendall(block)
        assert connection.recv(1) == b"!"
        return total / (time.perf_counter() - began)

for number in range(argument["rounds"]):
    order = argument["transports"]
    for which in order if number % 2 == 0 else order[::-1]:
        blocking_s, mode = round_trip(which, b"E")
        awake_s, _ = round_trip(which, b"P")
        found = {
            "transport": which, "mode": mode, "blocking_s": blocking_s, "awake_s": awake_s,
            "bytes_per_s": stream(which),
        }
        print("measured", json.dumps(found), flush=True)
"""

_MAKE: Final = """
import hashlib, os
path, size = argument
block, digest = os.urandom(1 << 20), hashlib.sha256()
with open(path, "wb") as file:
    for at in range(0, size, len(block)):
        turn = at // len(block) * 4099 % len(block)
        part = (block[turn:] + block[:turn])[: size - at]
        digest.update(part)
        file.write(part)
result = digest.hexdigest()
"""
"""Writes a file in which no block is like another; the result is its SHA-256."""

_RECEIVE: Final = """
import hashlib, json, time
from ism.smc import blocking as socket

size, data = argument["size"], memoryview(bytearray(b"-") * argument["size"])
with socket.create_server((argument["host"], 0)) as listener:
    print("port", listener.getsockname()[1], flush=True)
    connection, _ = listener.accept()
with connection:
    assert connection.recv(1) == b"?"
    connection.sendall(b"!")
    received, began = 0, time.perf_counter()
    told = began
    while received < size:
        count = connection.recv_into(data[received:])
        if not count:
            raise SystemExit(f"the stream ended after {received} of {size} bytes")
        received += count
        now = time.perf_counter()
        if now - told > 0.05:
            told = now
            print("bytes", received, flush=True)
    seconds = time.perf_counter() - began
    info = connection.smc_info()
    connection.sendall(b"!")
print("bytes", received, flush=True)
print("done", flush=True)
result = {
    "sha256": hashlib.sha256(data).hexdigest(), "seconds": seconds, "mode": info.mode, "reason": str(info.reason),
}
"""

_SEND: Final = """
from ism.smc import blocking as socket

with open(argument["path"], "rb") as file:
    data = memoryview(file.read())
with socket.create_connection((argument["host"], argument["port"])) as connection:
    connection.sendall(b"?")
    assert connection.recv(1) == b"!", "the receiver is gone"
    for at in range(0, len(data), 1 << 18):
        connection.sendall(data[at : at + (1 << 18)])
    assert connection.recv(1) == b"!", "the receiver is gone"
    result = connection.smc_info().mode
"""

_SCRIPT: Final = """
import os, runpy, sys
sys.argv = argument
sys.path.insert(0, os.path.dirname(argument[0]))
runpy.run_path(argument[0], run_name="__main__")
"""
"""Runs a script as `python SCRIPT` would, but for the seconds that an emulated guest takes to import Numba."""

_REGIONS: Final = """
import statistics, time
from ism.driver.select import open_device
from ism.virtio.ism_spec import Permission

times = {"alloc_s": [], "grant_s": [], "detach_s": []}

def timed(name, action):
    began = time.perf_counter()
    found = action()
    times[name].append(time.perf_counter() - began)
    return found

with open_device() as device:
    for _ in range(argument["count"]):
        token = timed("alloc_s", lambda: device.control.alloc(argument["size"])).token
        timed("grant_s", lambda: device.control.grant(token, Permission.READ, None).expect_ok())
        timed("detach_s", lambda: device.control.detach(token).expect_ok())
result = {name: statistics.median(values) for name, values in times.items()}
"""

_RUNG: Final = """
import select
from ism.driver.select import open_device
from ism.eventfd import drain
from ism.virtio.ism_spec import Permission

with open_device() as device:
    everybody = (Permission.READ | Permission.WRITE | Permission.ATTACH, None)
    region = device.alloc(65536, grants=[everybody])
    print("token", region.token, flush=True)
    poll = select.poll()
    poll.register(region, select.POLLIN)
    for _ in range(argument):
        assert poll.poll(30_000), "no doorbell came"
        drain(region.fileno())
        region.ring()
"""

_RINGS: Final = """
import select, statistics, time
from ism.driver.select import open_device
from ism.eventfd import drain

token, count = argument
trips, rings = [], []
with open_device() as device:
    region = device.attach(token, interrupt=True)
    poll = select.poll()
    poll.register(region, select.POLLIN)
    for _ in range(count):
        began = time.perf_counter()
        region.ring()
        rings.append(time.perf_counter() - began)
        assert poll.poll(30_000), "no doorbell came"
        drain(region.fileno())
        trips.append(time.perf_counter() - began)
result = {"round_trip_s": statistics.median(trips), "ring_s": statistics.median(rings)}
"""

_FIRST_SERVER: Final = """
from ism.smc import blocking as socket

with socket.create_server((argument, 0)) as listener:
    print("port", listener.getsockname()[1], flush=True)
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"!")
            connection.recv(1)
"""

_FIRST_CLIENT: Final = """
from ism.smc import blocking as socket

with socket.create_connection(tuple(argument)) as connection:
    assert connection.recv(1) == b"!"
    print("first", connection.smc_info().mode, flush=True)
"""


# -- sockets --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """One transport in one round. Attributes: medians of round trips of 64 bytes, throughput of 64 KiB messages."""

    transport: Transport
    mode: str
    blocking_s: float
    awake_s: float
    bytes_per_s: float

    @property
    def best_s(self) -> float:
        """The shorter of the two round trips."""
        return min(self.blocking_s, self.awake_s)


@dataclass
class Comparison:
    """Rounds of both transports, in turn between the same two guests."""

    smc: list[Sample] = field(default_factory=list)
    tcp: list[Sample] = field(default_factory=list)

    def median(self, transport: Transport, name: str) -> float:
        """Median over the rounds of one attribute of `Sample`; NaN where there were none."""
        values = [getattr(sample, name) for sample in getattr(self, transport)]
        return float(statistics.median(values)) if values else float("nan")

    def ratios(self) -> dict[str, float]:
        """Medians of the ratios round by round; above 1 shared memory is better.

        `awake` compares with the better round trip of TCP, waiting or awake.
        """
        pairs = list(zip(self.smc, self.tcp, strict=True))
        found = {
            "awake": [tcp.best_s / smc.awake_s for smc, tcp in pairs],
            "blocking": [tcp.blocking_s / smc.blocking_s for smc, tcp in pairs],
            "stream": [smc.bytes_per_s / tcp.bytes_per_s for smc, tcp in pairs if tcp.bytes_per_s],
        }
        return {name: float(statistics.median(values)) for name, values in found.items() if values}


def compare(
    far: Guest,
    near: Guest,
    host: str,
    *,
    rounds: int,
    pings: int,
    total: int,
    transports: Sequence[Transport] = ("smc", "tcp"),
    report: Callable[[Sample], None] = lambda _: None,
) -> Comparison:
    """Measure round trips and streams from `near` to `far`, whose address is `host`; `report` is told of each sample.

    Args: `pings`: round trips for each sample; `total`: bytes of each stream, a multiple of 64 KiB, 0 for none.
    Raises: MachineError; also when a connection that should go through shared memory does not.
    """
    server = far.start_python(_FAR, host, env=REQUIRE)
    ports = json.loads(server.wait_line("ports", _START_S).removeprefix("ports "))
    argument = {
        "host": host, "ports": ports, "rounds": rounds, "pings": pings, "total": total, "transports": list(transports),
    }  # fmt: skip
    client = near.start_python(_NEAR, argument, env=REQUIRE)
    result = Comparison()
    for _ in range(rounds * len(transports)):
        sample = Sample(**json.loads(client.wait_line(_MEASURED, _PATIENCE_S).removeprefix(_MEASURED)))
        if sample.transport == "smc" and sample.mode != "SMC":
            raise MachineError(near.name, f"the connection went over {sample.mode}, not through shared memory")
        (result.smc if sample.transport == "smc" else result.tcp).append(sample)
        report(sample)
    client.result(_START_S)
    server.send(b"\n")
    server.result(_START_S)
    return result


# -- a file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Transfer:
    """A file that went from one guest to the other.

    Attributes: `size` (bytes), `seconds` (at the receiver, once the connection is established), `mode` and `reason` (of
    the receiver's connection), `sender_mode`, `sha256` (of what arrived).
    """

    size: int
    seconds: float
    mode: str
    reason: str
    sender_mode: str
    sha256: str


def make_file(guest: Guest, path: str, size: int) -> str:
    """Write a file of random bytes in a guest; returns its SHA-256. Raises MachineError."""
    return str(guest.python(_MAKE, [path, size], timeout_s=_PATIENCE_S))


def transfer(
    receiver: Guest,
    sender: Guest,
    host: str,
    path: str,
    size: int,
    *,
    env: dict[str, str],
    progress: Callable[[int], None] = lambda _: None,
) -> Transfer:
    """Send a file of `sender` to `receiver`, whose address is `host`; `progress` is told how many bytes have arrived.

    Args: `env`: of both programs, `REQUIRE` or `OFF`.
    Raises: MachineError.
    """
    server = receiver.start_python(_RECEIVE, {"host": host, "size": size}, env=env)
    port = int(server.wait_line("port", _START_S).split()[1])
    client = sender.start_python(_SEND, {"host": host, "port": port, "path": path}, env=env)
    while not (line := server.wait_line(lambda line: line.startswith(("bytes", "done")), _PATIENCE_S)).startswith(
        "done"
    ):
        progress(int(line.split()[1]))
    found = server.result(_PATIENCE_S)
    return Transfer(
        size=size,
        seconds=found["seconds"],
        mode=found["mode"],
        reason=found["reason"],
        sender_mode=client.result(_START_S),
        sha256=found["sha256"],
    )


def start_script(guest: Guest, path: str, *arguments: str, env: dict[str, str] | None = None) -> GuestProcess:
    """Start a script of this project's checkout in a guest, such as `examples/echo_server.py`."""
    return guest.start_python(_SCRIPT, [f"{FOLDER}/{path}", *arguments], env=env)


def has_file(guest: Guest, path: str) -> bool:
    """Tell whether a guest has a file of this project's checkout: not if this is installed without one."""
    return bool(guest.python("import os; result = os.path.exists(argument)", f"{FOLDER}/{path}"))


# -- device and manager ---------------------------------------------------------------------------------------------


def region_commands(guest: Guest, *, count: int, size: int = 1 << 20) -> dict[str, float]:
    """Measure medians of `alloc_s` and `detach_s` of a region, and of `grant_s`, which maps nothing. In the guest."""
    found: dict[str, float] = guest.python(_REGIONS, {"count": count, "size": size}, timeout_s=_PATIENCE_S)
    return found


def guest_doorbell(far: Guest, near: Guest, *, count: int) -> dict[str, float]:
    """Measure a doorbell to a sleeping program in the other guest and back: medians `round_trip_s` and `ring_s`.

    `ring_s` is what the one who rings pays: a trapped write.
    """
    server = far.start_python(_RUNG, count)
    token = int(server.wait_line("token", _START_S).split()[1])
    found: dict[str, float] = near.python(_RINGS, [token, count], timeout_s=_PATIENCE_S)
    server.result(_START_S)
    return found


def forwarded_doorbell(lab: Lab, *, count: int) -> dict[str, float]:
    """Measure doorbells that the lab's manager forwards, between two devices of processes of this host.

    Returns: `median_s` and `p99_s`, from the write of the notify register until the peer's eventfd is readable: the way
    to the manager, its work, and the way back; `manager_cpu_s`, its processor time for each. Raises IsmError.
    """
    name = f"vfio-user:{paths.device_socket(lab.run_dir)}"
    times = []
    with open_device(name) as rung, open_device(name) as ringer:
        region = rung.alloc(1 << 16, grants=[(_SHARED, ringer.devid)])
        placement = ringer.control.attach(region.token, Permission(0))
        slot = placement.areas[0].offset // ringer.chunk_size
        poll = select.poll()
        poll.register(region.fileno(), select.POLLIN)
        used = _cpu_s(lab.manager.pid)
        for _ in range(count):
            drain(region.fileno())
            began = time.perf_counter()
            ringer.ring_slot(slot)
            if not poll.poll(5000):
                raise MachineError("manager", "it did not forward a doorbell")
            times.append(time.perf_counter() - began)
        used = _cpu_s(lab.manager.pid) - used
        ringer.control.detach(region.token).expect_ok()
        region.close()
    times.sort()
    return {"median_s": statistics.median(times), "p99_s": times[count * 99 // 100], "manager_cpu_s": used / count}


def _cpu_s(pid: int) -> float:
    """Return the processor time of all threads of a process."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


# -- from the start to the first byte -------------------------------------------------------------------------------


def first_bytes(lab: Lab, near: str, *, count: int, cold: bool = False) -> list[float]:
    """Measure from the start of guest `near` until its program has received a byte through shared memory.

    Guest 1 of the lab has to run, and `near` not to. Each is ended but the last one, so `near` runs afterwards.

    Args: `cold`: the guest boots, which warms up its Python on the way; else it is restored from its saved state.
    Returns: seconds, one for each of `count` starts. Raises MachineError.
    """
    host = address_of(1)
    server = lab.guests[lab.names[0]].start_python(_FIRST_SERVER, host, env=REQUIRE)
    port = int(server.wait_line("port", _START_S).split()[1])
    times = []
    for number in range(count):
        if number:
            lab.guests[near].quit()
            lab.wait_status(lambda status: status["totals"]["connected"] == 1)
        began = time.perf_counter()
        guest = _boot(lab, near) if cold else lab.add(near)
        client = guest.start_python(_FIRST_CLIENT, [host, port], env=REQUIRE)
        mode = client.wait_line("first", _START_S).split()[1]
        times.append(time.perf_counter() - began)
        client.result(_START_S)
        if mode != "SMC":
            raise MachineError(near, f"its first byte came over {mode}")
    server.signal(9)
    server.wait(_START_S)
    return times


def _boot(lab: Lab, name: str) -> Guest:
    """Boot a guest of the lab's `pair` network, with its device."""
    wire = ["-netdev", f"stream,id=net0,server=off,addr.type=unix,addr.path={lab.folder / 'wire.sock'}"]
    hardware = replace(lab.parts.hardware, devices=wire, environment={"LD_PRELOAD": str(agent_library())})
    guest = lab.boot(name, hardware)
    lab.plug(guest)
    lab.bind(guest)
    return guest


def set_mtu(guests: Sequence[Guest], mtu: int) -> None:
    """Set the largest packet of the guests' network. Raises MachineError."""
    for guest in guests:
        guest.run(["ip", "link", "set", "eth0", "mtu", str(mtu)])


def facts(guest: Guest, bdf: str) -> dict[str, Any]:
    """Return what a guest says of itself: `kernel`, and `driver` (of the PCI function `bdf`). Raises MachineError."""
    code = """
        import os
        driver = f"/sys/bus/pci/devices/{argument}/driver"
        result = {"kernel": os.uname().release, "driver": os.path.basename(os.path.realpath(driver))}
    """
    found: dict[str, Any] = guest.python(code, bdf)
    return found

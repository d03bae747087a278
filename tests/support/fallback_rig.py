# SPDX-License-Identifier: Apache-2.0
"""Connections of blocking sockets that may end as SMC or as TCP: who makes them, what is said, what is asserted.

Both ends are sockets of this process, each with a device of its own (or none), so that a test can hold the device of
one end while the other goes on. A conversation is checked byte by byte at both ends and has a time limit.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from ism.device.contract import Effect, PostEvent
from ism.driver import Device, open_device
from ism.errors import IsmError, TransportError
from ism.manager.control import request
from ism.shm import compile_kernels
from ism.smc import blocking, default, info
from ism.smc.addresses import packed
from ism.smc.diagnosis import Diagnosis, words
from ism.smc.info import Info
from ism.smc.rendezvous import scope_of
from ism.testing import Fabric
from ism.virtio.ism_spec import DirectoryEvent, EventType

LIMIT_S = 20
LOOPBACK = "127.0.0.1"
SIZE = 100 * 1024 + 7
BUFFER = 64 * 1024
"""Of the regions: what is sent goes round the ring."""
ORDERS = ("client", "server", "both")
"""Who speaks first."""
LAST_WORDS = b"after the other half was closed"
compile_kernels()  # not in the middle of a test with limits
_PIECES = (1, 7, 4096, 65536, 333)


# Devices --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def using(device: Device | None) -> Iterator[None]:
    """Make `device` the one that sockets of this process use; None: there is none."""

    def open_default() -> Device:
        if device is None:
            raise TransportError("no manager runs here")
        return device

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(default, "open_default", open_default)
        yield


@dataclass
class Ends:
    """Two hosts' worth of devices.

    Attributes: `client`, `server` (None: no manager there); `again` (the two have had a connection to each listening
    socket, whose regions they keep).
    """

    client: Device | None
    server: Device | None
    again: bool = False
    _open: list[Any] = field(default_factory=list)

    def listen(self, host: str = LOOPBACK, *, smc: Any = None, **options: Any) -> Any:
        """Return a listening socket of the server's."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = self.keep(self._listening(blocking.socket(family, smc=smc), host, **options))
        if self.again and smc is None:
            self.use(listener)
        return listener

    def use(self, listener: Any, host: str = "") -> None:
        """Make a connection over shared memory, and end it."""
        bound, port = listener.getsockname()[:2]
        client = self.connect((host or {"0.0.0.0": LOOPBACK, "::": "::1"}.get(bound, bound), port))
        server = self.accept(listener)
        converse(client, server, size=100)
        check(client, server, "SMC")
        for sock in (client, server):
            self._open.remove(sock)
            sock.close()

    def _listening(self, sock: Any, host: str, *, dualstack: bool = False, port: int = 0) -> Any:
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dualstack else 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        with using(self.server):
            sock.listen()
        return sock

    def connect(self, address: Any, *, smc: Any = None) -> Any:
        """Return a socket of the client's, connected."""
        sock = self.keep(blocking.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, smc=smc))
        with using(self.client):
            sock.connect(address[:2])
        return sock

    def pair(self, **options: Any) -> tuple[Any, Any]:
        """Return client and server, connected by TCP."""
        listener = self.listen(**options)
        client = self.connect(listener.getsockname())
        return client, self.accept(listener)

    def accept(self, listener: Any) -> Any:
        """Return the next connection of a listening socket."""
        return self.keep(listener.accept()[0])

    def publish(self, address: Any) -> None:
        """Put an address in the directory by hand, in the name of the server's device."""
        assert self.server is not None
        assert self.server.directory is not None
        with socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET) as sock:
            self.server.directory.publish(packed(address[0]), address[1], scope_of(sock))

    def keep(self, sock: Any) -> Any:
        """Close a socket at the end."""
        self._open.append(sock)
        return sock

    def close(self) -> None:
        for sock in reversed(self._open):
            sock.close()
        for device in (self.client, self.server):
            if device is not None:
                device.close()


class Fabrics(Ends):
    """Two in-memory devices. Attributes: `fabric` (of the client, and of the server unless in `other`)."""

    def __init__(self, *, other: Fabric | None = None, namespace: int = 0, **plug: Any) -> None:
        self.fabric = Fabric()
        super().__init__(Device(self.fabric.plug()), Device((other or self.fabric).plug(namespace=namespace, **plug)))

    def lose_events(self, *kinds: EventType) -> None:
        """Let no event of these kinds of the directory reach the client any more."""
        assert self.client is not None
        devid, carry_out = self.client.devid, self.fabric._one

        def one(effect: Effect) -> None:
            lost = isinstance(effect, PostEvent) and effect.devid == devid
            if not (lost and DirectoryEvent.unpack(effect.payload).ev_type in kinds):
                carry_out(effect)

        self.fabric._one = one  # type: ignore[method-assign]

    def kill(self, *which: str) -> None:
        """Make devices vanish, as a manager that is killed does: of "client" and "server", or both."""
        for name in which or ("client", "server"):
            device = getattr(self, name)
            device.transport.lose("the manager was killed")


@contextlib.contextmanager
def fabrics(**options: Any) -> Iterator[Fabrics]:
    """Lend two in-memory devices; what was made with them is closed at the end."""
    rig = Fabrics(**options)
    try:
        yield rig
    finally:
        rig.close()


class ManagerProcess:
    """A manager in a process of its own. Attributes: `directory`, `pid`."""

    def __init__(self, directory: Path, pid: int) -> None:
        self.directory, self.pid = directory, pid

    def device(self, name: str = "device") -> Device:
        """Open a device of it; at the beginning, as soon as it serves."""
        patience = time.monotonic() + LIMIT_S
        while True:
            try:
                return open_device(self.device_name(name))
            except IsmError:
                assert Path(f"/proc/{self.pid}").exists(), "the manager ended"
                assert time.monotonic() < patience, "the manager does not serve"
                time.sleep(0.005)

    def device_name(self, name: str = "device") -> str:
        """What ISM_DEVICE has to say."""
        return f"vfio-user:{self.directory / name}.sock"

    def ends(self, client: str = "device", server: str = "device") -> Ends:
        """Open a device for each end."""
        return Ends(self.device(client), self.device(server))

    def totals(self) -> dict[str, int]:
        """What `ism status` counts."""
        found: dict[str, int] = request(self.directory / "control.sock", "status")["status"]["totals"]
        return found

    def serves(self) -> bool:
        """Whether it answers."""
        try:
            return bool(request(self.directory / "control.sock", "status")["status"]["pid"] == self.pid)
        except (IsmError, OSError):
            return False

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop it, then let it go on."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)


_FACTORY = """
import gc, os, signal, sys
from pathlib import Path
import trio
from ism.manager.config import parse_config
from ism.manager.server import run_manager
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    directory = Path(line.rstrip())
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        file = directory / "manager.toml"
        text = file.read_text() if file.exists() else ""
        trio.run(run_manager, parse_config(text, str(file), directory), directory)
        os._exit(0)
    print(pid, flush=True)
"""


class Managers:
    """Makes managers quickly: each is a fork of a process that has imported everything."""

    def __init__(self) -> None:
        self._factory = subprocess.Popen(
            [sys.executable, "-c", _FACTORY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._made: list[ManagerProcess] = []

    def start(self, directory: Path, configuration: str = "") -> ManagerProcess:
        """Run a manager, with a configuration in TOML; killed at the end."""
        directory.mkdir(exist_ok=True)
        if configuration:
            (directory / "manager.toml").write_text(configuration)
        assert self._factory.stdin is not None
        assert self._factory.stdout is not None
        self._factory.stdin.write(f"{directory}\n")
        self._factory.stdin.flush()
        made = ManagerProcess(directory, int(self._factory.stdout.readline()))
        self._made.append(made)
        until(made.serves)
        return made

    def close(self) -> None:
        for manager in self._made:
            manager.signal(signal.SIGKILL)
        self._factory.kill()
        self._factory.communicate(timeout=LIMIT_S)


@contextlib.contextmanager
def manager_factory() -> Iterator[Managers]:
    """Lend what makes managers; what it made is killed at the end."""
    managers = Managers()
    try:
        yield managers
    finally:
        managers.close()


# Threads --------------------------------------------------------------------------------------------------------


class Call(threading.Thread):
    """A call in a thread of its own, which a test that fails does not wait for."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._result: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as exc:
            self._error = exc

    @property
    def failed(self) -> bool:
        """Whether it has raised."""
        return self._error is not None

    def result(self, limit_s: float = LIMIT_S) -> Any:
        """Wait for the call and return, or raise, what it did."""
        self.join(limit_s)
        assert not self.is_alive(), f"hangs for more than {limit_s} s"
        if self._error is not None:
            raise self._error
        return self._result


def together(*calls: Callable[[], Any], limit_s: float = LIMIT_S) -> list[Any]:
    """Run calls in threads at the same time; return their results, or raise the first error."""
    deadline = time.monotonic() + limit_s
    running = [Call(call) for call in calls]
    while any(call.is_alive() for call in running):
        for call in running:
            call.join(0.05 if len(running) > 1 else limit_s)
            if call.failed:
                call.result()
        assert time.monotonic() < deadline, f"hangs for more than {limit_s} s"
    return [call.result() for call in running]


def until(condition: Callable[[], Any], limit_s: float = LIMIT_S) -> None:
    """Wait for something that another thread or process does and tells nobody."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.001)


# Conversations --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def pattern(seed: int, size: int = SIZE) -> bytes:
    """Bytes of which no part looks like another."""
    return random.Random(seed).randbytes(size)


class EndedBeforeItBegan(AssertionError):
    """The stream ended, in order, before a byte came."""


def receive_exactly(sock: Any, count: int) -> bytes:
    """Receive so many bytes, in pieces of several sizes."""
    data = bytearray()
    turn = 0
    while len(data) < count:
        part = sock.recv(min(count - len(data), _PIECES[turn % len(_PIECES)]))
        if not part and not data:
            raise EndedBeforeItBegan(f"the stream ended before the first of {count} bytes")
        assert part, f"the stream ended after {len(data)} of {count} bytes"
        data += part
        turn += 1
    return bytes(data)


def same(found: bytes, expected: bytes) -> None:
    """Compare without printing 100 KiB."""
    if found != expected:
        at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(found))
        raise AssertionError(f"at {at}: {found[at : at + 60]!r} instead of {expected[at : at + 60]!r}")


def talk(sock: Any, mine: bytes, theirs: bytes, *, when: str) -> None:
    """One end of an exchange: `when` it sends, "first", "second" or at "once"."""
    sending = Call(lambda: sock.sendall(mine)) if when == "once" else None
    if when == "first":
        sock.sendall(mine)
    try:
        same(receive_exactly(sock, len(theirs)), theirs)
    except AssertionError:
        if sending is not None and sending.failed:
            sending.result()  # an error is told once: to whoever sends, if he comes first
        raise
    if when == "second":
        sock.sendall(mine)
    if sending is not None:
        sending.result()


def converse(client: Any, server: Any, first: str = "both", size: int = SIZE) -> None:
    """Exchange `size` patterned bytes each way, then close in halves; check every byte at both ends."""
    together(*_ends(client, server, first, size))


def attempt(client: Any, server: Any, first: str = "both", size: int = SIZE) -> tuple[OSError | None, OSError | None]:
    """As `converse`, where the connection may break: returns the error of each end, which closes when it has one.

    An end that has only waited may be told that it is the end, as in TCP when the other program dies.
    """

    def end(sock: Any, call: Callable[[], None]) -> OSError | None:
        try:
            call()
        except OSError as exc:
            sock.close()
            return exc
        except EndedBeforeItBegan as exc:
            sock.close()
            return ConnectionError(str(exc))
        return None

    one, other = _ends(client, server, first, size)
    errors = together(lambda: end(client, one), lambda: end(server, other))
    return errors[0], errors[1]


def _ends(client: Any, server: Any, first: str, size: int) -> tuple[Callable[[], None], Callable[[], None]]:
    up, down = pattern(1, size), pattern(2, size)
    turns = {"client": ("first", "second"), "server": ("second", "first"), "both": ("once", "once")}[first]

    def client_end() -> None:
        talk(client, up, down, when=turns[0])
        client.shutdown(socket.SHUT_WR)
        same(receive_exactly(client, len(LAST_WORDS)), LAST_WORDS)
        assert client.recv(100) == b""

    def server_end() -> None:
        talk(server, down, up, when=turns[1])
        assert server.recv(100) == b""
        server.sendall(LAST_WORDS)
        server.shutdown(socket.SHUT_WR)

    return client_end, server_end


def exchange(client: Any, server: Any) -> None:
    """Make both ends decide: the client sends a little."""
    together(lambda: client.sendall(b"hello"), lambda: same(receive_exactly(server, 5), b"hello"))


def mode_of(sock: Any) -> str:
    """ "SMC", "TCP", or what a socket says of itself that is not settled."""
    return sock.smc_info().mode if isinstance(sock, blocking.socket) else "TCP"


def check(
    client: Any,
    server: Any,
    mode: str,
    *,
    client_code: Diagnosis | Sequence[Diagnosis] = (),
    server_code: Diagnosis | Sequence[Diagnosis] = (),
    client_why: str = "",
    server_why: str = "",
) -> None:
    """Assert that both ends are in `mode`, and say why, with the code, or one of the codes, that are given."""
    assert (mode_of(client), mode_of(server)) == (mode, mode), [_shown(client), _shown(server)]
    for sock, code, why in ((client, client_code, client_why), (server, server_code, server_why)):
        if not isinstance(sock, blocking.socket):
            continue
        found: Info = sock.smc_info()
        if mode == "SMC":
            assert (found.code, found.reason, str(found)) == (0, "", "SMC")
            assert found.receive_buffer
            assert found.send_buffer
            assert found.peer_devid
            continue
        assert found.code in (code if isinstance(code, Sequence) else (code,)), found
        assert why in found.reason, found
        assert found.reason
        assert found.receive_buffer == found.send_buffer == found.peer_devid == 0


def _shown(sock: Any) -> str:
    return str(sock.smc_info()) if isinstance(sock, blocking.socket) else "plain"


@contextlib.contextmanager
def counted(*codes: Diagnosis) -> Iterator[None]:
    """Check that exactly these fallbacks are counted inside."""
    before = info.counters()
    yield
    after = info.counters()
    found = {reason: after[reason] - before.get(reason, 0) for reason in after if after[reason] != before.get(reason)}
    expected: dict[str, int] = {}
    for code in codes:
        expected[words(code)] = expected.get(words(code), 0) + 1
    assert found == expected


# A proxy --------------------------------------------------------------------------------------------------------


class Proxy:
    """Forwards the bytes, and the ends, of every connection to another address. Attributes: `address`."""

    def __init__(
        self, target: Any, host: str = LOOPBACK, make: Callable[..., Any] = socket.socket, *, port: int = 0
    ) -> None:
        """Args: `make` makes its sockets, as `socket.socket`."""
        self._make, self._target = make, target
        self._listener = make(socket.AF_INET)
        self._listener.bind((host, port))
        self._listener.listen()
        self.address = self._listener.getsockname()
        self._open: list[Any] = []
        self._accepting = Call(self._run)

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                inside, _ = self._listener.accept()
                outside = self._make(socket.AF_INET)
                self._open += [inside, outside]
                outside.connect(self._target)
                Call(lambda one=inside, other=outside: self._forward(one, other))
                Call(lambda one=inside, other=outside: self._forward(other, one))

    @staticmethod
    def _forward(source: Any, sink: Any) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(8192):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for sock in self._open:
            sock.close()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join(LIMIT_S)
        self._listener.close()

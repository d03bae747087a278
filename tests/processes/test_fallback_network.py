# SPDX-License-Identifier: Apache-2.0
"""Between two ends stands a network: a router, NAT in both directions, a proxy, addresses that mean two things.

Three network namespaces of the test's own: a client's, a server's, and a router's between them.

    client 10.77.1.2 ---- 10.77.1.1 router 10.77.2.1 ---- 10.77.2.2 server

Sockets are made by threads inside the namespaces, with devices of one manager in this process's; where the manager's
own knowledge of namespaces counts, the ends are processes in them. Needs root, `ip` and `nft`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fallback_rig import (
    LOOPBACK,
    ORDERS,
    Call,
    Ends,
    ManagerProcess,
    Proxy,
    check,
    converse,
    manager_factory,
    pattern,
    talk,
)

from ism.smc import blocking
from ism.smc.diagnosis import Diagnosis

pytestmark = pytest.mark.processes

CLIENT, ROUTER_C = "10.77.1.2", "10.77.1.1"
SERVER, ROUTER_S = "10.77.2.2", "10.77.2.1"
CLONE_NEWNET = 0x40000000
first = pytest.mark.parametrize("first", ORDERS)


class Networks:
    """The three namespaces. Attributes: `client`, `router`, `server` (their names)."""

    def __init__(self) -> None:
        self.client, self.router, self.server = (f"ism-{os.getpid()}-{name}" for name in "crs")
        self._made: list[str] = []

    def make(self) -> None:
        for name in (self.client, self.router, self.server):
            ip("netns", "add", name)
            self._made.append(name)
            ip("-n", name, "link", "set", "lo", "up")
        for name, inside, outside in ((self.client, CLIENT, ROUTER_C), (self.server, SERVER, ROUTER_S)):
            end = name[-1]
            ip("-n", name, "link", "add", "up0", "type", "veth", "peer", "name", end, "netns", self.router)
            for where, link, address in ((name, "up0", inside), (self.router, end, outside)):
                ip("-n", where, "address", "add", f"{address}/24", "dev", link)
                ip("-n", where, "link", "set", link, "up")
            ip("-n", name, "route", "add", "default", "via", outside)
        self.inside(self.router, lambda: Path("/proc/sys/net/ipv4/ip_forward").write_text("1"))

    def close(self) -> None:
        for name in self._made:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def inside(self, name: str, call: Callable[[], Any]) -> Any:
        """Make a call in a thread inside a namespace; its sockets belong there for as long as they live."""

        def run() -> Any:
            libc = ctypes.CDLL(None, use_errno=True)
            with open(f"/run/netns/{name}") as namespace:
                if libc.setns(namespace.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            return call()

        return Call(run).result()

    def translate(self, rules: str) -> None:
        """Give the router rules for NAT, in place of those it had."""
        script = f"flush ruleset\ntable ip nat {{\n{rules}\n}}\n"
        command = ["ip", "netns", "exec", self.router, "nft", "-f", "-"]
        subprocess.run(command, input=script, text=True, check=True, capture_output=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def networks() -> Iterator[Networks]:
    missing = [tool for tool in ("ip", "nft") if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and {', '.join(missing) or 'ip, nft'} (tests/install-tools)")
    made = Networks()
    try:
        try:
            made.make()
            made.translate("")
        except (OSError, subprocess.CalledProcessError) as exc:
            pytest.skip(f"no network namespaces or no NAT here: {getattr(exc, 'stderr', '') or exc}")
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ManagerProcess]:
    with manager_factory() as managers:
        yield managers.start(tmp_path_factory.mktemp("run"))


class Hosts(Ends):
    """Two ends, each in a namespace of its own."""

    def __init__(self, manager: ManagerProcess, networks: Networks) -> None:
        super().__init__(manager.device(), manager.device())
        self._networks = networks

    def listen(self, host: str = SERVER, **options: Any) -> Any:
        again, self.again = self.again, False
        listener = self._networks.inside(self._networks.server, lambda: super(Hosts, self).listen(host, **options))
        self.again = again
        if again:
            self.use(listener, SERVER)
        return listener

    def connect(self, address: Any, **options: Any) -> Any:
        return self._networks.inside(self._networks.client, lambda: super(Hosts, self).connect(address, **options))


@pytest.fixture(params=["first", "again"])
def hosts(
    manager: ManagerProcess, networks: Networks, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Hosts]:
    """Two devices, with or without an earlier connection whose regions are kept."""
    monkeypatch.setenv("ISM_SMC_BUFFER", "64K")
    networks.translate("")
    made = Hosts(manager, networks)
    made.again = request.param == "again"
    yield made
    made.close()


def tcp_on_both(client: Any, server: Any) -> None:
    check(client, server, "TCP", client_code=Diagnosis.PEERNOSMC, server_code=Diagnosis.PEERNOSMC)


@first
@pytest.mark.parametrize("host", [SERVER, "0.0.0.0"])
def test_through_a_router_it_is_shared_memory(hosts: Hosts, host: str, first: str) -> None:
    listener = hosts.listen(host)
    client = hosts.connect((SERVER, listener.getsockname()[1]))
    server = hosts.accept(listener)
    assert server.getpeername()[0] == CLIENT
    converse(client, server, first)
    check(client, server, "SMC")


@first
def test_a_client_whose_address_is_translated_gets_tcp(hosts: Hosts, networks: Networks, first: str) -> None:
    listener = hosts.listen()
    networks.translate("chain out { type nat hook postrouting priority 100;\nip daddr 10.77.2.2 masquerade;\n}")
    client = hosts.connect(listener.getsockname())
    assert client.smc_info().mode == "pending"  # the destination is one that is published
    server = hosts.accept(listener)
    assert server.getpeername()[0] == ROUTER_S
    converse(client, server, first)
    tcp_on_both(client, server)


@first
def test_a_server_whose_address_is_translated_gets_tcp(hosts: Hosts, networks: Networks, first: str) -> None:
    listener = hosts.listen()
    port = listener.getsockname()[1]
    networks.translate(
        "chain in { type nat hook prerouting priority -100;\n"
        f"ip daddr {ROUTER_C} tcp dport 7000 dnat to {SERVER}:{port};\n}}"
    )
    client = hosts.connect((ROUTER_C, 7000))
    server = hosts.accept(listener)
    assert server.getsockname()[0] == SERVER
    converse(client, server, first)
    tcp_on_both(client, server)


@first
def test_both_addresses_translated_to_others_that_are_published_gets_tcp(
    hosts: Hosts, networks: Networks, first: str
) -> None:
    listener = hosts.listen()
    port = listener.getsockname()[1]
    networks.translate(
        "chain in { type nat hook prerouting priority -100;\n"
        f"ip daddr {ROUTER_C} tcp dport 7000 dnat to {SERVER}:{port};\n}}\n"
        "chain out { type nat hook postrouting priority 100;\nip daddr 10.77.2.2 masquerade;\n}"
    )
    hosts.publish((ROUTER_C, 7000))
    client = hosts.connect((ROUTER_C, 7000))
    assert client.smc_info().mode == "pending"
    server = hosts.accept(listener)
    converse(client, server, first)
    tcp_on_both(client, server)


@first
@pytest.mark.parametrize("published", [False, True], ids=["unknown", "published"])
def test_a_proxy_in_another_namespace_makes_it_tcp(
    hosts: Hosts, networks: Networks, first: str, published: bool
) -> None:
    listener = hosts.listen()

    def make(family: int) -> socket.socket:
        made: socket.socket = networks.inside(networks.router, lambda: socket.socket(family))
        return made

    proxy = Proxy(listener.getsockname(), ROUTER_C, make)
    try:
        if published:
            hosts.publish(proxy.address)
        client = hosts.connect(proxy.address)
        assert client.smc_info().mode == ("pending" if published else "TCP")
        server = hosts.accept(listener)
        assert server.getpeername()[0] == ROUTER_S
        converse(client, server, first)
        tcp_on_both(client, server)
    finally:
        proxy.close()


def test_an_address_that_comes_after_listening_is_published_by_the_first_connection(
    hosts: Hosts, networks: Networks
) -> None:
    hosts.again = False
    listener = hosts.listen("0.0.0.0")
    ip("-n", networks.server, "address", "add", "10.77.2.3/24", "dev", "up0")
    try:
        modes = []
        for _ in range(2):
            client = hosts.connect(("10.77.2.3", listener.getsockname()[1]))
            server = hosts.accept(listener)
            converse(client, server, size=1000)
            assert client.smc_info().mode == server.smc_info().mode
            modes.append(client.smc_info().mode)
        assert modes == ["TCP", "SMC"]
    finally:
        ip("-n", networks.server, "address", "delete", "10.77.2.3/24", "dev", "up0")


def test_a_loopback_address_means_another_host_in_each_namespace(hosts: Hosts, networks: Networks) -> None:
    """The same port listens on 127.0.0.1 in both: with SMC in the server's, as a plain program in the client's."""
    hosts.again = False
    listener = hosts.listen(LOOPBACK)
    port = listener.getsockname()[1]
    plain = networks.inside(networks.client, lambda: socket.create_server((LOOPBACK, port)))
    with plain:
        client = hosts.connect((LOOPBACK, port))
        server = hosts.keep(plain.accept()[0])
        converse(client, server)
        check(client, server, "TCP", client_code=Diagnosis.PEERNOSMC)


# Ends that are processes ----------------------------------------------------------------------------------------


def process_serve(host: str, port: str) -> None:
    with blocking.create_server((host, int(port))) as listener:
        print(listener.getsockname()[1], flush=True)
        server, _ = listener.accept()
        with server:
            talk(server, pattern(2), pattern(1), when="second")
            print(server.smc_info(), flush=True)
            assert server.recv(1) == b""


def process_call(host: str, port: str) -> None:
    with blocking.create_connection((host, int(port))) as client:
        talk(client, pattern(1), pattern(2), when="first")
        print(client.smc_info(), flush=True)


def started(manager: ManagerProcess, namespace: str, *role: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "ISM_DEVICE": manager.device_name(),
    }
    command = ["ip", "netns", "exec", namespace, sys.executable, __file__, *role]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("host", "mode"), [(SERVER, "SMC"), (LOOPBACK, "TCP")])
def test_processes_in_two_namespaces(networks: Networks, manager: ManagerProcess, host: str, mode: str) -> None:
    """With a loopback address the client meets a proxy of its own namespace, which leads to that of the server."""
    networks.translate("")
    with started(manager, networks.server, "serve", host, "0") as server:
        try:
            assert server.stdout is not None
            port = server.stdout.readline().strip()
            where = networks.client if host == SERVER else networks.server
            relay = None if host == SERVER else Relay(networks, int(port))
            with started(manager, networks.client, "call", host, port) as client:
                try:
                    assert client.stdout is not None
                    said = client.stdout.readline(), server.stdout.readline()
                    assert client.wait(20) == 0
                    assert server.wait(20) == 0
                finally:
                    client.kill()
            if relay is not None:
                relay.close()
            assert [text.split()[0] for text in said] == [mode, mode], (said, where)
        finally:
            server.kill()


class Relay(Proxy):
    """Listens on a loopback port of the client's namespace and connects to the same one of the server's."""

    def __init__(self, networks: Networks, port: int) -> None:
        made = iter([networks.client, *[networks.server] * 9])
        super().__init__(
            (LOOPBACK, port),
            make=lambda family: networks.inside(next(made), lambda: socket.socket(family)),
            port=port,
        )


if __name__ == "__main__":
    globals()[f"process_{sys.argv[1]}"](*sys.argv[2:])

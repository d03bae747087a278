# SPDX-License-Identifier: Apache-2.0
"""Blocking sockets by the dozen, in several threads, forgotten, and across a fork, with a manager of their own."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fallback_rig import (
    LIMIT_S,
    Call,
    Ends,
    ManagerProcess,
    check,
    converse,
    manager_factory,
    pattern,
    receive_exactly,
    same,
    together,
    until,
)

from ism.smc.diagnosis import Diagnosis
from ism.smc.group import link_groups
from ism.smc.link import Stage

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ManagerProcess]:
    with manager_factory() as managers:
        yield managers.start(tmp_path_factory.mktemp("run"))


@pytest.fixture
def ends(manager: ManagerProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    monkeypatch.setenv("ISM_SMC_BUFFER", "64K")
    made = manager.ends()
    yield made
    made.close()
    until(lambda: not any(manager.totals().values()))


def greeted(ends: Ends) -> tuple[Any, Any]:
    """Return a pair that uses shared memory."""
    client, server = ends.pair()
    together(lambda: client.sendall(b"hello"), lambda: same(receive_exactly(server, 5), b"hello"))
    check(client, server, "SMC")
    return client, server


# Lazy, and again ------------------------------------------------------------------------------------------------


def test_connect_and_accept_wait_for_nobody_and_unused_connections_cost_no_region(
    ends: Ends, manager: ManagerProcess
) -> None:
    listener = ends.listen()
    listener.settimeout(LIMIT_S)
    clients = [ends.connect(listener.getsockname()) for _ in range(40)]  # before anybody accepts
    servers = [ends.accept(listener) for _ in range(40)]
    assert manager.totals()["regions"] == manager.totals()["attachments"] == 0
    assert {client.smc_info().mode for client in clients + servers} == {"pending"}
    by_port = {server.getpeername()[1]: server for server in servers}
    used = clients[7]
    converse(used, by_port[used.getsockname()[1]])
    check(used, by_port[used.getsockname()[1]], "SMC")
    assert manager.totals()["regions"] == 2


def test_fifty_short_connections_use_the_same_few_regions(ends: Ends, manager: ManagerProcess) -> None:
    listener = ends.listen()
    for turn in range(50):
        client = ends.connect(listener.getsockname())
        server = ends.accept(listener)
        converse(client, server, size=1000 + turn)
        check(client, server, "SMC")
        client.close()
        server.close()
    for device in (ends.client, ends.server):
        assert link_groups(device).made <= 3
    assert manager.totals()["regions"] <= 6


def test_bytes_of_an_earlier_connection_are_never_seen_in_a_later_one(ends: Ends) -> None:
    listener = ends.listen()
    for turn in range(6):
        client = ends.connect(listener.getsockname())
        server = ends.accept(listener)
        up, down = pattern(turn, 5000), pattern(100 + turn, 7000)
        passed(client, server, up)
        passed(server, client, down, more=b"unread")
        client.close()  # with unread bytes, so that these regions are not quiet
        server.close()


def passed(sender: Any, receiver: Any, data: bytes, *, more: bytes = b"") -> None:
    """Send data, and more that nobody receives."""
    together(lambda: sender.sendall(data + more), lambda: same(receive_exactly(receiver, len(data)), data))


# Threads --------------------------------------------------------------------------------------------------------


def test_several_threads_send_whole_messages_through_one_socket(ends: Ends) -> None:
    client, server = greeted(ends)
    size, each, threads = 300, 40, 6

    def send(letter: int) -> None:
        for _ in range(each):
            client.sendall(bytes([letter]) * size)

    def receive() -> None:
        for _ in range(each * threads):
            message = receive_exactly(server, size)
            assert len(set(message)) == 1, "two messages are mixed"

    together(receive, *(lambda letter=letter: send(letter) for letter in range(threads)))


def test_several_threads_receive_everything_once(ends: Ends) -> None:
    client, server = greeted(ends)
    whole = bytes(range(256)) * 400
    taken: list[bytes] = []

    def receive() -> None:
        while data := server.recv(777):
            taken.append(data)

    def send() -> None:
        client.sendall(whole)
        client.shutdown(socket.SHUT_WR)

    together(send, receive, receive, receive)
    assert sorted(b"".join(taken)) == sorted(whole)


def test_the_first_send_and_receive_of_many_threads_at_once_make_one_handshake(ends: Ends) -> None:
    for _ in range(5):
        client, server = ends.pair()
        looking = [Call(sock.smc_info) for sock in (client, server, client, server)]
        converse(client, server, size=3000)
        assert all(call.result() for call in looking)
        check(client, server, "SMC")


@pytest.mark.parametrize("smc", ["SMC", "undecided"])
@pytest.mark.parametrize("who", ["client", "server"])
def test_close_in_another_thread_wakes_whoever_receives(ends: Ends, who: str, smc: str) -> None:
    client, server = greeted(ends) if smc == "SMC" else ends.pair()
    sleeper, other = (client, server) if who == "client" else (server, client)
    receiving = Call(lambda: sleeper.recv(1))
    wait_until_asleep(receiving)
    sleeper.close()
    with pytest.raises(OSError) as caught:
        receiving.result()
    assert caught.value.errno in (errno.EBADF, errno.ECONNRESET, errno.ECONNABORTED)
    with contextlib.suppress(ConnectionResetError):
        assert other.recv(1) == b""


def test_shutdown_in_another_thread_ends_a_receive(ends: Ends) -> None:
    client, _server = greeted(ends)
    receiving = Call(lambda: client.recv(1))
    wait_until_asleep(receiving)
    client.shutdown(socket.SHUT_RDWR)
    assert receiving.result() == b""


def test_close_in_another_thread_wakes_whoever_sends(ends: Ends) -> None:
    client, _server = greeted(ends)
    sending = Call(lambda: client.sendall(pattern(1)))  # more than fits
    wait_until_asleep(sending)
    client.close()
    with pytest.raises(OSError):
        sending.result()


def wait_until_asleep(call: Call) -> None:
    """Wait until a thread has used no processor for a while: it sleeps in the kernel."""
    path = Path(f"/proc/self/task/{call.native_id}/stat")
    quiet = 0
    while quiet < 5:
        state = path.read_text().rpartition(")")[2].split()[0]
        quiet = quiet + 1 if state == "S" else 0
        time.sleep(0.002)


# Forgotten ------------------------------------------------------------------------------------------------------


def forget(ends: Ends, last: list[Any]) -> list[str]:
    """Drop a socket of which `last` is the only other reference; return the warnings that come of it."""
    ends._open.remove(last[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        last.clear()
        gc.collect()
    return [str(warning.message) for warning in caught if warning.category is ResourceWarning]


def test_a_forgotten_socket_warns_once_and_ends_properly(ends: Ends) -> None:
    client, server = greeted(ends)
    client.sendall(b"last words")
    last = [client]
    del client
    caught = forget(ends, last)
    assert len(caught) == 1
    assert "unclosed" in caught[0]
    assert receive_exactly(server, 10) == b"last words"
    assert server.recv(1) == b""


def test_a_forgotten_undecided_socket_warns_and_ends(ends: Ends) -> None:
    client, server = ends.pair()
    last = [client]
    del client
    caught = forget(ends, last)
    assert len(caught) == 1
    assert server.recv(1) == b""


def test_a_forgotten_listener_is_withdrawn(ends: Ends) -> None:
    listener = ends.listen()
    address = listener.getsockname()
    last = [listener]
    del listener
    caught = forget(ends, last)
    assert len(caught) == 1
    until(lambda: refused(address))
    with socket.create_server(address) as plain:
        client = ends.connect(address)
        server = ends.keep(plain.accept()[0])
        converse(client, server)
        assert client.smc_info().mode == "TCP"


def refused(address: Any) -> bool:
    with socket.socket() as sock:
        sock.settimeout(1)
        return sock.connect_ex(address) == errno.ECONNREFUSED


# Across a fork --------------------------------------------------------------------------------------------------


def in_a_child(call: Callable[[], None]) -> str:
    """Run a call in a forked child, which then ends without any cleaning up; return what it raised there."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        signal.alarm(LIMIT_S)
        try:
            call()
            said = "nothing"
        except BaseException as exc:
            said = f"{type(exc).__name__} {getattr(exc, 'errno', '')}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read().decode()
    assert os.waitpid(pid, 0)[1] == 0
    return said


USES: dict[str, Callable[[Any], Any]] = {
    "recv": lambda sock: sock.recv(10),
    "recv_into": lambda sock: sock.recv_into(bytearray(10)),
    "send": lambda sock: sock.send(b"from the child"),
    "sendall": lambda sock: sock.sendall(b"from the child"),
    "shutdown": lambda sock: sock.shutdown(socket.SHUT_RDWR),
    "close": lambda sock: sock.close(),
    "fileno": lambda sock: sock.fileno(),
    "info": lambda sock: sock.smc_info(),
}
"""What a child may try with a connection of its parent."""


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("state", ["SMC", "undecided", "waiting"])
def test_a_child_that_uses_a_connection_of_its_parent_does_not_disturb_it(
    ends: Ends, manager: ManagerProcess, state: str, use: str
) -> None:
    listener = ends.listen()
    client = ends.connect(listener.getsockname())
    server = None if state == "waiting" else ends.accept(listener)
    if state == "SMC":
        together(lambda: client.sendall(b"hello"), lambda: same(receive_exactly(server, 5), b"hello"))
        client.sendall(b"for the parent")
    elif state == "undecided":
        until(lambda: client._link.stage is Stage.AGREED)
    ring = None if state != "SMC" else (server._link.connection.endpoint.received_bytes, manager.totals())
    said = in_a_child(
        lambda: USES[use](server if state == "SMC" else client)
    )  # the server's would be given to the child
    if use in ("recv", "recv_into", "send", "sendall"):
        assert said.split()[0] in ("OSError", "ConnectionAbortedError", "ConnectionResetError"), said
    if state == "SMC":
        assert (server._link.connection.endpoint.received_bytes, manager.totals()) == ring
        assert receive_exactly(server, 14) == b"for the parent"
    if server is None:
        server = ends.accept(listener)
    converse(client, server)
    if state == "undecided":  # a server's socket that nobody had used may be the child's
        check(client, server, "TCP", client_code=Diagnosis.OPTUNSUPP, server_code=Diagnosis.OPTUNSUPP)
    else:
        check(client, server, "SMC")


def test_a_child_that_closes_everything_withdraws_nothing(ends: Ends, manager: ManagerProcess) -> None:
    listener = ends.listen()
    client, server = ends.connect(listener.getsockname()), ends.accept(listener)
    together(lambda: client.sendall(b"hello"), lambda: same(receive_exactly(server, 5), b"hello"))

    def close_all() -> None:
        for sock in (client, server, listener):
            sock.close()
        for device in (ends.client, ends.server):
            device.close()

    assert in_a_child(close_all) == "nothing"
    converse(client, server)
    check(client, server, "SMC")
    later = ends.connect(listener.getsockname())
    converse(later, ends.accept(listener))
    check(later, ends._open[-1], "SMC")
    assert manager.totals()["connected"] == 2

# SPDX-License-Identifier: Apache-2.0
"""Descriptors of connections over shared memory that are given away: a relay is behind them, in both directions."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fallback_rig import (
    LIMIT_S,
    Call,
    Ends,
    ManagerProcess,
    check,
    manager_factory,
    pattern,
    receive_exactly,
    same,
    talk,
    together,
    until,
)

from ism.smc import blocking, monitor
from ism.smc.relay import relay_of

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ManagerProcess]:
    with manager_factory() as managers:
        yield managers.start(tmp_path_factory.mktemp("run"))


@pytest.fixture
def ends(manager: ManagerProcess) -> Iterator[Ends]:
    made = manager.ends()
    yield made
    made.close()
    until(lambda: not any(manager.totals().values()))


@pytest.fixture(params=["client", "server"])
def given(ends: Ends, request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Who gives away, and the other: connected over shared memory."""
    client, server = ends.pair()
    to_and_fro(client, server)
    check(client, server, "SMC")
    return (client, server) if request.param == "client" else (server, client)


def to_and_fro(one: Any, other: Any) -> None:
    """Have both send at once, and check every byte."""
    up, down = pattern(1), pattern(2)
    together(lambda: talk(one, up, down, when="once"), lambda: talk(other, down, up, when="once"))


def plain(ends: Ends, fd: int) -> socket.SocketType:
    """Return the interpreter's own socket for a descriptor, as TLS uses it: nothing of ours is in it."""
    made = ends.keep(socket.SocketType(fileno=fd))
    made.settimeout(LIMIT_S)
    return made


def test_a_copy_and_the_first_carry_the_same_stream(ends: Ends, given: tuple[Any, Any]) -> None:
    giver, other = given
    names = giver.getsockname(), giver.getpeername()
    copy = ends.keep(giver.dup())
    to_and_fro(copy, other)
    to_and_fro(giver, other)
    with blocking.socket(fileno=os.dup(giver.fileno())) as third:
        for sock in (giver, copy, third):
            assert (sock.getsockname(), sock.getpeername()) == names
    assert giver.smc_info().mode == "SMC"
    shown = [one for one in monitor.report()["connections"] if (one["local"], one["remote"]) == names]
    assert len(shown) == 1
    giver.close()
    to_and_fro(copy, other)  # the connection lives as long as a copy
    copy.close()
    assert other.recv(1) == b""


def test_a_detached_descriptor_keeps_its_number_and_passes_large_streams_both_ways(
    ends: Ends, given: tuple[Any, Any]
) -> None:
    giver, other = given
    fd = giver.fileno()
    raw = plain(ends, giver.detach())
    assert raw.fileno() == fd
    up, down = pattern(1, 8 << 20), pattern(2, 8 << 20)
    together(
        lambda: raw.sendall(up),
        lambda: other.sendall(down),
        lambda: same(receive_exactly(raw, len(down)), down),
        lambda: same(receive_exactly(other, len(up)), up),
    )


def test_what_was_in_the_ring_before_is_there_and_after_it_the_end(ends: Ends, given: tuple[Any, Any]) -> None:
    giver, other = given
    other.sendall(b"sent before")
    other.shutdown(socket.SHUT_WR)
    raw = plain(ends, giver.detach())
    assert receive_exactly(raw, 11) == b"sent before"
    assert raw.recv(1) == b""
    raw.sendall(b"answer")  # half closed: this direction lives
    assert receive_exactly(other, 6) == b"answer"
    raw.close()
    assert other.recv(1) == b""
    until(lambda: relay_of(raw.fileno()) is None)


def test_what_was_written_before_a_close_arrives(ends: Ends, given: tuple[Any, Any]) -> None:
    giver, other = given
    raw = plain(ends, giver.detach())
    data = pattern(3, 3 << 20)  # more than a ring holds
    sending = Call(lambda: (raw.sendall(data), raw.close()))
    assert receive_exactly(other, len(data)) == data
    sending.result()
    assert other.recv(1) == b""


def test_a_reset_of_the_peer_reaches_the_descriptor(ends: Ends, given: tuple[Any, Any]) -> None:
    giver, other = given
    raw = plain(ends, giver.detach())
    other.sendall(b"before it")
    assert receive_exactly(raw, 9) == b"before it"
    other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    other.close()
    with pytest.raises(ConnectionResetError):
        raw.recv(1)


@pytest.mark.parametrize("how", ["with linger", "with unread bytes"])
def test_a_reset_of_the_descriptor_reaches_the_peer(ends: Ends, given: tuple[Any, Any], how: str) -> None:
    giver, other = given
    raw = plain(ends, giver.detach())
    if how == "with linger":
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    else:
        other.sendall(b"unread")
        until(lambda: raw.recv(6, socket.MSG_PEEK) == b"unread")
    raw.close()
    with pytest.raises(ConnectionResetError):
        other.recv(1)


def test_a_peer_that_sends_to_a_closed_descriptor_is_told(ends: Ends, given: tuple[Any, Any]) -> None:
    giver, other = given
    plain(ends, giver.detach()).close()

    def send() -> bool:
        try:
            other.sendall(b"is anybody there")
        except (BrokenPipeError, ConnectionResetError):
            return True
        return False

    until(send)


def test_a_descriptor_from_its_number_is_a_socket_of_the_same_stream(ends: Ends, given: tuple[Any, Any]) -> None:
    giver, other = given
    copy = ends.keep(blocking.fromfd(giver.fileno(), giver.family, giver.type))
    to_and_fro(copy, other)
    to_and_fro(giver, other)


def test_polling_a_descriptor_with_a_relay_tells_of_its_bytes(ends: Ends, given: tuple[Any, Any]) -> None:
    import select

    giver, other = given
    copy = ends.keep(giver.dup())
    assert not select.select([copy, giver], [], [], 0)[0]
    other.sendall(b"x")
    assert select.select([copy], [], [], LIMIT_S)[0] == [copy]
    assert giver.recv(1) == b"x"
    assert not select.select([copy, giver], [], [], 0)[0]


def test_urgent_data_passes_both_ways_in_line_and_out_of_it(ends: Ends, given: tuple[Any, Any]) -> None:
    giver, other = given
    giver.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    other.sendall(b"ABOR\r\n", socket.MSG_OOB)
    assert receive_exactly(giver, 6) == b"ABOR\r\n"
    giver.sendall(b"data!", socket.MSG_OOB)
    assert receive_exactly(other, 4) == b"data"
    until(lambda: urgent(other) == b"!")
    to_and_fro(giver, other)


def urgent(sock: Any) -> bytes | None:
    try:
        found: bytes = sock.recv(1, socket.MSG_OOB)
    except OSError:
        return None
    return found


# TLS in the middle of a stream ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    directory = tmp_path_factory.mktemp("certificate")
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    try:
        subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl command to make a certificate with")
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate, key)
    client = ssl.create_default_context(cafile=str(certificate))
    client.check_hostname = False
    return client, server


@pytest.mark.parametrize("before", ["fresh", "after bytes"])
def test_tls_begins_on_a_fresh_connection_and_after_bytes(
    ends: Ends, contexts: tuple[ssl.SSLContext, ssl.SSLContext], before: str
) -> None:
    client, server = ends.pair()
    if before == "after bytes":
        to_and_fro(client, server)
        check(client, server, "SMC")
    wrapping = Call(lambda: contexts[1].wrap_socket(server, server_side=True))
    with contexts[0].wrap_socket(client) as safe_client, wrapping.result() as safe_server:
        data = pattern(4, 300_000)
        together(lambda: safe_client.sendall(data), lambda: same(receive_exactly(safe_server, len(data)), data))
        together(lambda: safe_server.sendall(data), lambda: same(receive_exactly(safe_client, len(data)), data))


# The end of the program -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("close", ["closes", "leaves it open"])
def test_a_program_that_ends_right_after_it_wrote_loses_nothing(
    ends: Ends, manager: ManagerProcess, close: str, tmp_path: Path
) -> None:
    program = textwrap.dedent(
        f"""
        import socket as std, sys
        from ism.smc import blocking as socket
        sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
        sock.sendall(b"hello")
        assert sock.smc_info().mode == "SMC"
        raw = std.SocketType(fileno=sock.detach())
        raw.sendall(b"x" * 3_000_000)
        {"raw.close()" if close == "closes" else ""}
        """
    )
    listener = ends.listen()
    environment = {**os.environ, "ISM_DEVICE": manager.device_name()}
    command = [sys.executable, "-W", "ignore", "-c", program, str(listener.getsockname()[1])]
    with subprocess.Popen(command, env=environment) as process, contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        server = ends.accept(listener)
        assert receive_exactly(server, 5) == b"hello"
        assert receive_exactly(server, 3_000_000) == b"x" * 3_000_000
        assert server.recv(1) == b""
        stack.pop_all()
        assert process.wait(LIMIT_S) == 0


@pytest.mark.parametrize("when", ["undecided", "in shared memory"])
def test_a_child_serves_what_its_parent_has_accepted(ends: Ends, when: str) -> None:
    if when == "in shared memory":  # taken from the start, since the pair has one of an earlier connection
        client, server = ends.pair()
        to_and_fro(client, server)
        client.close()
        server.close()
    listener = ends.listen()
    client = ends.connect(listener.getsockname())
    server = ends.accept(listener)
    if when == "in shared memory":
        client.sendall(b"first")
        until(lambda: server.smc_info().mode == "SMC")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork among threads
        child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            if when == "in shared memory":
                receive_exactly(server, 5)
            server.sendall(server.recv(100).upper())
            server.close()
        os._exit(0)
    server.close()  # as a server that forks for each connection does
    client.sendall(b"from the child")
    assert receive_exactly(client, 14) == b"FROM THE CHILD"
    assert client.recv(1) == b""
    assert os.waitpid(child, 0)[1] == 0
    assert client.smc_info().mode == ("TCP" if when == "undecided" else "SMC")

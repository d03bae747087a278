# SPDX-License-Identifier: Apache-2.0
"""What `ism.smc` makes sockets of: trio's helpers over its factory, descriptors given away, options that decide."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import socket as std
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing
from smc_stream_rig import SmcRig, bounded, leak_checked, receive_all, receive_exactly, until

import ism.smc
from ism.driver import Device
from ism.ids import DevId
from ism.smc import SmcSocket, default, trio_factory
from ism.smc.diagnosis import Diagnosis

LOOPBACK = "127.0.0.1"


@pytest.fixture
def rig() -> Iterator[SmcRig]:
    with leak_checked(directory=True) as made:
        yield made


async def listening(rig: SmcRig, **options: Any) -> SmcSocket:
    sock = ism.smc.socket(**{**rig.server_options, **options})
    assert isinstance(sock, SmcSocket)
    await sock.bind((LOOPBACK, 0))
    sock.listen()
    return sock


async def connected(rig: SmcRig, listener: SmcSocket, **options: Any) -> tuple[SmcSocket, SmcSocket]:
    """Connected, nothing sent."""
    client = ism.smc.socket(**{**rig.client_options, **options})
    assert isinstance(client, SmcSocket)
    await client.connect(listener.getsockname())
    return client, (await listener.accept())[0]


async def greet(client: trio.socket.SocketType, server: trio.socket.SocketType) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send, b"c")
        assert await server.recv(1) == b"c"
    await server.send(b"s")
    assert await client.recv(1) == b"s"


async def pair(rig: SmcRig, **options: Any) -> tuple[SmcSocket, SmcSocket]:
    """Connected, and it is known how bytes travel."""
    with await listening(rig, **options) as listener:
        client, server = await connected(rig, listener)
    await greet(client, server)
    return client, server


def modes(*sockets: SmcSocket) -> set[str]:
    return {sock.smc_info().mode for sock in sockets}


def not_supported() -> Any:
    return pytest.raises(OSError, match=rf"^\[Errno {errno.EOPNOTSUPP}\]")


# trio's own helpers ---------------------------------------------------------------------------------------------


@bounded
async def test_a_program_of_trios_helpers_changes_one_line(rig: SmcRig) -> None:
    """Its sockets come from the factory; what they are over shows `smc_info`."""
    trio.socket.set_custom_socket_factory(ism.smc.SocketFactory(device=rig.client_device))
    seen = []

    async def double(stream: trio.SocketStream) -> None:
        seen.append(stream.socket)
        await stream.send_all(await receive_exactly(stream, 4) * 2)
        assert await receive_all(stream) == b""

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, double, 0, host=LOOPBACK))
        async with await trio.open_tcp_stream(LOOPBACK, listener.socket.getsockname()[1]) as client:
            assert isinstance(client, trio.SocketStream)
            await client.send_all(b"echo")
            assert await receive_exactly(client, 8) == b"echoecho"
            await client.send_eof()
            assert await client.receive_some() == b""
            seen.append(client.socket)
        nursery.cancel_scope.cancel()
    assert all(isinstance(sock, SmcSocket) for sock in seen)
    assert modes(*seen) == {"SMC"}


@bounded
async def test_the_factory_is_not_asked_for_the_sockets_underneath(rig: SmcRig) -> None:
    class Counting(ism.smc.SocketFactory):
        made = 0

        def socket(self, *args: Any) -> Any:
            Counting.made += 1
            return super().socket(*args)

    trio.socket.set_custom_socket_factory(Counting(device=rig.client_device))
    sock = trio.socket.socket()
    assert isinstance(sock, SmcSocket)
    with trio.socket.socket(std.AF_INET, std.SOCK_DGRAM) as datagram:
        assert not isinstance(datagram, SmcSocket)
    assert Counting.made == 2
    client, server = await pair(rig)
    assert Counting.made == 2
    for one in (client, server, sock):
        one.close()


@bounded
async def test_trios_streams_pass_their_own_suite_over_these_sockets(rig: SmcRig) -> None:
    async def stream_maker() -> tuple[trio.SocketStream, trio.SocketStream]:
        client, server = await pair(rig)
        return trio.SocketStream(client), trio.SocketStream(server)

    async def clogged_stream_maker() -> tuple[trio.SocketStream, trio.SocketStream]:
        streams = await stream_maker()
        for stream in streams:
            assert isinstance(stream.socket, SmcSocket)
            connection = stream.socket.channel.connection
            assert connection is not None
            while connection.send(bytes(4096)):
                pass
        return streams

    await trio.testing.check_half_closeable_stream(stream_maker, clogged_stream_maker)


@pytest.mark.parametrize("smc", ["auto", "off"])
@bounded
async def test_streams_and_listeners_can_be_made_from_sockets(rig: SmcRig, smc: Any) -> None:
    sock = await listening(rig, smc=smc)
    async with ism.smc.SocketListener(sock) as listener:
        assert listener.socket is sock
        raw = ism.smc.socket(**rig.client_options)
        await raw.connect(sock.getsockname())
        stream = ism.smc.SocketStream(raw)
        assert stream.socket is raw
        async with stream, await listener.accept() as server:
            assert isinstance(server, ism.smc.SmcStream)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, b"hello")
                assert await receive_exactly(server, 5) == b"hello"
            assert stream.smc_info().mode == server.smc_info().mode == ("SMC" if smc == "auto" else "TCP")


@bounded
async def test_streams_of_other_trio_sockets_are_plain() -> None:
    left, right = map(ism.smc.SocketStream, ism.smc.socketpair())
    async with left, right:
        await left.send_all(b"over UNIX")
        assert await receive_exactly(right, 9) == b"over UNIX"
        assert left.smc_info().mode == "TCP"
        await left.send_eof()
        assert await right.receive_some() == b""
    plain = trio.socket.socket()
    await plain.bind((LOOPBACK, 0))
    plain.listen()
    async with ism.smc.SocketListener(plain) as listener:
        client = await trio.open_tcp_stream(LOOPBACK, plain.getsockname()[1])
        async with client, await listener.accept() as server:
            await client.send_all(b"plain")
            assert await receive_exactly(server, 5) == b"plain"


@bounded
async def test_what_is_no_connected_trio_socket_makes_no_stream() -> None:
    with pytest.raises(TypeError):
        ism.smc.SocketStream(object())  # type: ignore[arg-type]
    with ism.smc.socket(type=std.SOCK_DGRAM) as datagram, pytest.raises(ValueError, match="SOCK_STREAM"):
        ism.smc.SocketStream(datagram)
    with ism.smc.socket(smc="off") as sock, pytest.raises(ValueError, match="listening"):
        ism.smc.SocketListener(sock)
    with trio.socket.socket(std.AF_INET, std.SOCK_DGRAM) as datagram, pytest.raises(ValueError, match="TCP"):
        SmcSocket(datagram)
    with ism.smc.socket(smc="off") as sock, pytest.raises(TypeError):
        SmcSocket(sock)


# What makes sockets ---------------------------------------------------------------------------------------------


@bounded
async def test_only_tcp_sockets_are_of_this_kind() -> None:
    with contextlib.ExitStack() as stack:
        made = [
            stack.enter_context(sock)
            for sock in (
                ism.smc.socket(std.AF_UNIX),
                ism.smc.socket(std.AF_INET, std.SOCK_DGRAM),
                *ism.smc.socketpair(),
                ism.smc.from_stdlib_socket(std.socket(std.AF_INET6, std.SOCK_DGRAM)),
            )
        ]
        assert not any(isinstance(sock, SmcSocket) for sock in made)
        for family in (std.AF_INET, std.AF_INET6):
            for proto in (0, std.IPPROTO_TCP):
                sock = stack.enter_context(ism.smc.socket(family, std.SOCK_STREAM, proto))
                assert isinstance(sock, SmcSocket)
                assert (sock.family, sock.proto) == (family, proto)


@bounded
async def test_descriptors_become_sockets_of_the_right_kind(rig: SmcRig) -> None:
    client, server = await pair(rig, smc="off")
    with client, server:
        for make in (
            lambda: ism.smc.fromfd(client.fileno(), std.AF_INET, std.SOCK_STREAM),
            lambda: ism.smc.from_stdlib_socket(std.socket(fileno=os.dup(client.fileno()))),
            lambda: ism.smc.socket(fileno=os.dup(client.fileno())),
        ):
            with make() as twin:
                assert isinstance(twin, SmcSocket)
                assert twin.getpeername() == server.getsockname()
                await twin.send(b"by the twin")
                assert await server.recv(20) == b"by the twin"
                assert twin.smc_info().mode == "TCP"
    left, right = std.socketpair()
    with left, right, ism.smc.fromfd(left.fileno(), std.AF_INET, std.SOCK_STREAM) as twin:
        assert not isinstance(twin, SmcSocket)


@bounded
async def test_a_listening_socket_that_comes_from_elsewhere_is_published(rig: SmcRig) -> None:
    plain = trio.socket.socket()
    await plain.bind((LOOPBACK, 0))
    plain.listen()
    with SmcSocket(plain, **rig.server_options) as listener:
        client, server = await connected(rig, listener)
        with client, server:
            await greet(client, server)
            assert modes(client, server) == {"SMC"}


@bounded
async def test_listening_never_waits_and_accepting_waits_for_the_device(
    rig: SmcRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[Device] = []

    def open_in_memory() -> Device:
        devices.append(rig.plug())
        return devices[-1]

    monkeypatch.setattr(default, "open_device", open_in_memory)
    monkeypatch.setattr(default, "_device", None)
    with await listening(rig, device=None) as listener:
        client, server = await connected(rig, listener)  # found though nobody has waited for the device
        assert await listener.published() is None
        assert len(devices) == 1
        with client, server:
            await greet(client, server)
            assert modes(client, server) == {"SMC"}
            assert server.smc_info().peer_devid == rig.client_device.devid
    default.close_default()


@bounded
async def test_what_is_published_is_taken_back(rig: SmcRig) -> None:
    def published() -> int:
        return len(rig.fabric.registry.directory.members[DevId(rig.server_device.devid)].listeners)

    for take_back in (lambda sock: sock.close(), lambda sock: os.close(sock.detach())):
        listener = await listening(rig)
        await until(lambda: published() == 1)
        take_back(listener)
        await until(lambda: published() == 0)
    with await listening(rig, smc="off") as listener:
        assert (await listener.published()) is not None
    assert published() == 0


@bounded
async def test_what_is_dropped_is_closed_and_taken_back_with_a_warning(rig: SmcRig) -> None:
    members = rig.fabric.registry.directory.members
    listener: SmcSocket | None = await listening(rig)
    assert listener is not None
    client, server = await connected(rig, listener)
    undecided = ism.smc.socket(**rig.client_options)
    await undecided.connect(listener.getsockname())
    await greet(client, server)
    await client.send(b"last words")
    with pytest.warns(ResourceWarning, match="unclosed"):  # noqa: PT031 (the collector runs when it likes)
        del client, undecided, listener
        gc.collect()
        await until(lambda: not members[DevId(rig.server_device.devid)].listeners)
        await until(lambda: not members[DevId(rig.client_device.devid)].intents)
        with server:
            assert await server.recv(20) == b"last words"
            assert await server.recv(20) == b""
        gc.collect()


# Descriptors given away -----------------------------------------------------------------------------------------


@bounded
async def test_a_connection_in_shared_memory_goes_on_behind_a_descriptor_given_away(rig: SmcRig) -> None:
    client, server = await pair(rig)
    names = client.getsockname(), client.getpeername()
    with client, server:
        with client.dup() as twin:
            await greet(twin, server)
            await greet(client, server)
            assert (twin.getsockname(), twin.getpeername()) == names
            assert (client.getsockname(), client.getpeername()) == names
            assert modes(client, server) == {"SMC"}
        with std.socket(fileno=server.detach()) as raw:
            raw.setblocking(True)
            await client.send(b"to a descriptor")
            assert await trio.to_thread.run_sync(raw.recv, 20) == b"to a descriptor"
            assert server.fileno() == -1
        assert await client.recv(1) == b""


@bounded
async def test_a_connection_that_a_task_waits_on_is_not_given_away(rig: SmcRig) -> None:
    client, server = await pair(rig)
    with client, server:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.recv, 1)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                client.dup()
            await server.send(b"x")
        await greet(client, server)


@bounded
async def test_a_plain_connection_can_be_given_away(rig: SmcRig) -> None:
    client, server = await pair(rig, smc="off")
    with client, server:
        with client.dup() as twin:
            await twin.send(b"by the twin")
        assert await server.recv(20) == b"by the twin"
        with std.socket(fileno=client.detach()) as raw:
            raw.send(b"by the descriptor")
            assert await server.recv(20) == b"by the descriptor"
        assert client.fileno() == -1


@pytest.mark.parametrize("how", ["dup", "detach"])
@bounded
async def test_a_socket_given_away_before_it_connects_is_plain(rig: SmcRig, how: str) -> None:
    with await listening(rig) as listener:
        client = ism.smc.socket(**rig.client_options)
        with client.dup() if how == "dup" else ism.smc.socket(fileno=client.detach(), smc="off") as twin:
            await twin.connect(listener.getsockname())
            server, _ = await listener.accept()
            with server:
                await greet(twin, server)
                assert modes(server, twin) == {"TCP"}
                if how == "dup":
                    await client.send(b"by the first")
                    assert await server.recv(20) == b"by the first"
        client.close()


@bounded
async def test_a_client_given_away_while_undecided_is_plain_and_the_server_agrees(rig: SmcRig) -> None:
    with await listening(rig) as listener:
        client = ism.smc.socket(**rig.client_options)
        await client.connect(listener.getsockname())
        with client, client.dup() as twin:  # not accepted yet, so nobody has claimed it
            server, _ = await listener.accept()
            with server:
                await greet(twin, server)
                assert modes(client, server) == {"TCP"}
                assert client.smc_info().code == Diagnosis.PEERNOSMC


@bounded
async def test_a_server_given_away_while_undecided_declines_first(rig: SmcRig) -> None:
    with await listening(rig) as listener:
        client, server = await connected(rig, listener)
        with client, server:
            with server.dup() as twin:
                await twin.send(b"by the twin")
                assert await client.recv(20) == b"by the twin"
            assert modes(client, server) == {"TCP"}


@bounded
async def test_where_shared_memory_is_required_nothing_is_given_away(rig: SmcRig) -> None:
    with ism.smc.socket(smc="require", device=rig.client_device) as sock:
        with not_supported():
            sock.dup()
        with not_supported():
            sock.setsockopt(std.SOL_SOCKET, std.SO_OOBINLINE, 1)


# Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "connected", "listening"])
@bounded
async def test_urgent_data_in_line_makes_it_tcp(rig: SmcRig, when: str) -> None:
    with await listening(rig) as listener:
        if when == "listening":
            listener.setsockopt(std.SOL_SOCKET, std.SO_OOBINLINE, 1)
        client = ism.smc.socket(**rig.client_options)
        if when == "before":
            client.setsockopt(std.SOL_SOCKET, std.SO_OOBINLINE, 1)
        await client.connect(listener.getsockname())
        server, _ = await listener.accept()
        with client, server:
            if when == "connected":
                client.setsockopt(std.SOL_SOCKET, std.SO_OOBINLINE, 1)
            await greet(client, server)
            assert modes(client, server) == {"TCP"}
            in_line, other = (server, client) if when == "listening" else (client, server)
            await other.send(b"abc!", std.MSG_OOB)
            got = b""
            while len(got) < 4:
                got += await in_line.recv(10)
            assert got == b"abc!"


@bounded
async def test_urgent_data_is_put_in_line_over_shared_memory_too(rig: SmcRig) -> None:
    client, server = await pair(rig)
    with client, server:
        client.setsockopt(std.SOL_SOCKET, std.SO_OOBINLINE, 0)
        await greet(client, server)
        client.setsockopt(std.SOL_SOCKET, std.SO_OOBINLINE, 1)
        await greet(client, server)
        await server.send(b"abc!", std.MSG_OOB)
        got = b""
        while len(got) < 4:
            got += await client.recv(10)
        assert got == b"abc!"
        assert modes(client, server) == {"SMC"}


@bounded
async def test_the_receive_buffer_option_sizes_the_region(rig: SmcRig) -> None:
    with ism.smc.socket(**rig.server_options) as listener:
        await listener.bind((LOOPBACK, 0))
        listener.setsockopt(std.SOL_SOCKET, std.SO_RCVBUF, 100_000)
        listener.listen()
        client = ism.smc.socket(**rig.client_options)
        client.setsockopt(std.SOL_SOCKET, std.SO_RCVBUF, 1 << 20)
        await client.connect(listener.getsockname())
        server, _ = await listener.accept()
        with client, server:
            await greet(client, server)
            assert server.smc_info().receive_buffer >= 200_000
            assert client.smc_info().receive_buffer >= 2 << 20
            assert client.smc_info().send_buffer == server.smc_info().receive_buffer


@bounded
async def test_flags_that_shared_memory_cannot_do_are_refused(rig: SmcRig) -> None:
    client, server = await pair(rig)
    with client, server:
        for call in (lambda: client.recv(1, std.MSG_ERRQUEUE), lambda: client.send(b"x", 0x4000000)):
            with not_supported():
                await call()
        await greet(client, server)


# While it is undecided --------------------------------------------------------------------------------------------


@bounded
async def test_a_socket_says_that_it_is_pending(rig: SmcRig) -> None:
    with ism.smc.socket(**rig.client_options) as sock:
        assert sock.smc_info().mode == "TCP"
        assert sock.smc_info().remote is None
    with await listening(rig) as listener:
        client, server = await connected(rig, listener)
        with client, server:
            assert client.smc_info().mode == "pending"
            assert client.smc_info().remote == listener.getsockname()
            assert not client.is_readable()
            assert not server.is_readable()
            await client.wait_writable()
            assert client.smc_info().mode == "SMC"


@bounded
async def test_a_poll_for_readiness_begins_the_handshake(rig: SmcRig) -> None:
    with await listening(rig) as listener:
        client, server = await connected(rig, listener)
        with client, server:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.send, b"speaks first")
                await until(client.is_readable)
            assert await client.recv(20) == b"speaks first"


@bounded
async def test_a_second_task_is_refused_while_it_is_undecided_too(rig: SmcRig) -> None:
    with await listening(rig) as listener:
        client = ism.smc.socket(**rig.client_options)
        await client.connect(listener.getsockname())  # nobody accepts
        with client:
            async with trio.open_nursery() as nursery:

                async def wait() -> None:
                    with pytest.raises(trio.ClosedResourceError):
                        await client.recv(1)

                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
                with pytest.raises(trio.BusyResourceError):
                    await client.recv(1)
                client.close()


@bounded
async def test_a_handshake_that_broke_breaks_every_call(rig: SmcRig) -> None:
    with await listening(rig, smc="require") as listener:
        async with await trio.open_tcp_stream(LOOPBACK, listener.getsockname()[1]) as client:
            server, _ = await listener.accept()
            with server:
                await client.send_all(bytes(100))
                for call in (lambda: server.recv(1), lambda: server.send(b"x"), lambda: server.sendmsg([b"x"])):
                    with trio.testing.assert_checkpoints(), pytest.raises(ConnectionResetError):
                        await call()
                assert server.smc_info().mode == "broken"
                with pytest.raises(OSError, match=f"Errno {errno.ENOTCONN}"):
                    server.shutdown(std.SHUT_WR)


# The module ------------------------------------------------------------------------------------------------------

OWN = {
    "Info",
    "SmcListener",
    "SmcSocket",
    "SmcStream",
    "SocketFactory",
    "SocketListener",
    "SocketStream",
    "counters",
    "open_tcp_listeners",
    "open_tcp_stream",
    "serve_tcp",
}
OVERRIDDEN = {"socket", "from_stdlib_socket", "fromfd"}


def public(module: Any) -> set[str]:
    return {name for name in dir(module) if not name.startswith("_")}


def test_the_module_has_every_public_name_of_trios_and_they_are_the_same() -> None:
    found = public(trio.socket)
    submodules = {name for name in public(ism.smc) if sys.modules.get(f"ism.smc.{name}") is getattr(ism.smc, name)}
    assert public(ism.smc) - submodules == found | OWN
    assert not submodules & found
    for name in found - OVERRIDDEN:
        assert getattr(ism.smc, name) is getattr(trio.socket, name)
    for name in OVERRIDDEN:
        assert getattr(ism.smc, name) is getattr(trio_factory, name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ism.smc.nonsense  # noqa: B018


def test_a_socket_has_every_method_of_trios() -> None:
    wanted = {name for name in vars(trio.socket.SocketType) if not name.startswith("__") or name in ("__enter__",)}
    assert wanted <= set(vars(SmcSocket))


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import ism.smc", {"trio", "numba"}),
        ("import ism.smc.blocking", {"trio"}),
        ("from ism.smc import blocking", {"trio"}),
        ("from ism.smc import Info", {"trio", "numba"}),
    ],
)
def test_what_is_not_used_is_not_imported(statement: str, absent: set[str]) -> None:
    program = f"import sys; {statement}; print(*({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""


def test_a_star_import_gives_everything() -> None:
    program = "from ism.smc import *; print(AF_INET6.name, socket.__module__, open_tcp_stream.__module__, gaierror)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "AF_INET6 ism.smc.trio_factory ism.smc.stream <class 'socket.gaierror'>\n"

# SPDX-License-Identifier: Apache-2.0
"""asyncio's loop over shared memory does what it does over TCP: files, servers, streams, TLS, sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import socket
import ssl
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import trustme
from asyncio_rig import BIG, LIMIT_S, LOOPBACK, SMC, SOON_S, TCP, Echo, Recorder, Rig, every_kind, manager, mode_of, run  # noqa: F401

import ism.smc.asyncio
from ism.smc import blocking, default

pytestmark = pytest.mark.usefixtures("manager")


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decided", [False, True])
def test_files_are_sent_by_the_transport(kind: str, decided: bool) -> None:
    async def main(rig: Rig) -> None:
        near, far = await rig.pair(decided=decided)
        with tempfile.TemporaryFile() as file:
            file.write(BIG)
            file.flush()
            near.transport.write(b"before")
            assert await rig.loop.sendfile(near.transport, file, 5, 3_000_000) == 3_000_000
            assert file.tell() == 3_000_005
            near.transport.write(b"after")
            expected = b"before" + BIG[5:3_000_005] + b"after"
            assert await far.get(len(expected)) == expected
            assert await rig.loop.sendfile(near.transport, io.BytesIO(b"no file"), fallback=True) == 7

    run(kind, main)


# -- servers ---------------------------------------------------------------------------------------------------------


def test_a_server_that_closes_accepts_nobody_and_leaves_connections_alone(kind: str) -> None:
    accepted: list[Recorder] = []

    def make() -> Recorder:
        accepted.append(Recorder())
        return accepted[-1]

    async def main(rig: Rig) -> None:
        server, port = await rig.serve(make)
        assert server.is_serving()
        assert server.get_loop() is rig.loop
        transport, near = await rig.connect(Recorder, port)
        transport.write(b"x")
        while not accepted:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await accepted[0].get(1)
        server.close()
        assert not server.is_serving()
        assert server.sockets == ()
        with pytest.raises(ConnectionRefusedError):
            await rig.connect(Recorder, port)
        transport.write(b"y")
        assert await accepted[0].get(2) == b"xy"
        transport.close()
        await near.closed()
        await accepted[0].closed()
        await server.wait_closed()

    run(kind, main)


def test_a_server_may_start_later_and_serve_until_cancelled(kind: str) -> None:
    async def main(rig: Rig) -> None:
        server, port = await rig.serve(Recorder, start_serving=False)
        assert not server.is_serving()
        await server.start_serving()
        forever = asyncio.create_task(server.serve_forever())
        transport, near = await rig.connect(Recorder, port)
        transport.write(b"x")
        await asyncio.sleep(0.01)
        transport.close()
        await near.closed()
        forever.cancel()
        with pytest.raises(asyncio.CancelledError):
            await forever
        assert not server.is_serving()

    run(kind, main)


# -- streams ---------------------------------------------------------------------------------------------------------


async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer each line in capitals, until the end."""
    try:
        while line := await reader.readline():
            writer.write(line.upper())
            await writer.drain()
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


STREAMS = {"asyncio's": asyncio, "ism.smc's": ism.smc.asyncio}


@pytest.mark.parametrize("factory", [asyncio.SelectorEventLoop, ism.smc.asyncio.EventLoop])
@pytest.mark.parametrize("server", STREAMS)
@pytest.mark.parametrize("client", STREAMS)
def test_streams_in_any_selector_loop(factory: Any, server: str, client: str) -> None:
    ours = factory is ism.smc.asyncio.EventLoop
    expected = SMC if ours or (server == client == "ism.smc's") else TCP

    async def main() -> None:
        async with asyncio.timeout(LIMIT_S):
            listening = await STREAMS[server].start_server(shout, LOOPBACK, 0, limit=1 << 20)
            assert listening.get_loop() is asyncio.get_running_loop()
            port = listening.sockets[0].getsockname()[1]
            reader, writer = await STREAMS[client].open_connection(LOOPBACK, port, limit=1 << 20)
            for number in range(100):
                writer.write(f"line {number}\n".encode())
                assert await reader.readline() == f"LINE {number}\n".encode()
            writer.write(b"a" * 900_000 + b"\n")
            await writer.drain()
            assert await reader.readuntil(b"\n") == b"A" * 900_000 + b"\n"
            assert mode_of(writer) in (expected, None)
            writer.write(b"the end\n")
            writer.write_eof()
            assert await reader.read() == b"THE END\n"
            writer.close()
            await writer.wait_closed()
            listening.close()
            await listening.wait_closed()

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


def test_a_cancelled_read_loses_nothing_and_a_timeout_is_kept(kind: str) -> None:
    async def main(rig: Rig) -> None:
        def handler() -> Any:
            return asyncio.StreamReaderProtocol(asyncio.StreamReader(), shout)

        _, port = await rig.serve(handler)
        reader = asyncio.StreamReader()
        transport, protocol = await rig.connect(lambda: asyncio.StreamReaderProtocol(reader), port)
        writer = asyncio.StreamWriter(transport, protocol, reader, rig.loop)
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SOON_S):
                await reader.readline()
        assert time.monotonic() - began < 10 * SOON_S
        reading = asyncio.create_task(reader.readline())
        await asyncio.sleep(0)
        reading.cancel()
        writer.write(b"one\ntwo\n")
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert [await reader.readline(), await reader.readline()] == [b"ONE\n", b"TWO\n"]
        writer.close()
        await writer.wait_closed()

    run(kind, main)


def test_a_cancelled_connect_leaves_nothing_behind(kind: str) -> None:
    async def main(rig: Rig) -> None:
        _, port = await rig.serve(Recorder)
        for pause in (0, 1, 2, 3, 5, 8):
            connecting = asyncio.create_task(rig.connect(Recorder, port))
            for _ in range(pause):
                await asyncio.sleep(0)
            if connecting.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await connecting
            else:
                (await connecting)[0].close()
        transport, near = await rig.connect(Recorder, port)
        transport.close()
        await near.closed()

    run(kind, main)


@pytest.mark.parametrize("module", [socket, blocking])
def test_what_waits_is_held_by_the_loop(module: Any) -> None:
    received: list[bytes] = []

    class Client(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            received.append(data)

    async def main(rig: Rig) -> None:
        with module.socket() as listener:
            listener.bind((LOOPBACK, 0))
            listener.listen()
            listener.setblocking(False)
            await rig.connect(Client, listener.getsockname()[1])  # nobody keeps what this returns
            gc.collect()
            server, _ = await rig.loop.sock_accept(listener)
            gc.collect()
            with server:
                await rig.loop.sock_sendall(server, b"x")
                while not received:
                    gc.collect()
                    await asyncio.sleep(0.001)

    run(SMC, main)


def test_a_refused_connection_is_refused(kind: str) -> None:
    async def main(rig: Rig) -> None:
        with contextlib.closing(socket.SocketType(socket.AF_INET, socket.SOCK_STREAM)) as bound:
            bound.bind((LOOPBACK, 0))
            with pytest.raises(ConnectionRefusedError):
                await rig.connect(Recorder, bound.getsockname()[1])

    run(kind, main)


# -- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS contexts of a client and a server that know each other."""
    authority = trustme.CA()
    client, server = ssl.create_default_context(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.configure_trust(client)
    authority.issue_cert(LOOPBACK).configure_cert(server)
    return client, server


def test_tls_runs_over_it(kind: str, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    async def main(rig: Rig) -> None:
        _, port = await rig.serve(Echo, ssl=contexts[1])
        transport, near = await rig.connect(Recorder, port, ssl=contexts[0])
        transport.write(BIG)
        assert await near.get(len(BIG)) == BIG
        assert mode_of(transport) in (rig.mode, None)
        assert transport.get_extra_info("cipher")
        assert transport.get_extra_info("peercert")
        if kind == SMC:
            assert transport.get_extra_info("smc_info").sent > len(BIG)
        transport.close()
        assert await near.closed() is None

    run(kind, main)


def test_a_connection_may_be_upgraded_to_tls(kind: str, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    async def main(rig: Rig) -> None:
        near, far = await rig.pair()
        near.transport.write(b"STARTTLS\n")
        assert await far.get(9) == b"STARTTLS\n"
        upgraded = await asyncio.gather(
            rig.loop.start_tls(far.transport, far, contexts[1], server_side=True),
            rig.loop.start_tls(near.transport, near, contexts[0], server_hostname=LOOPBACK),
        )
        upgraded[1].write(b"secret")
        assert await far.get(15) == b"STARTTLS\nsecret"
        upgraded[0].write(b"answer")
        assert await near.get(6) == b"answer"
        upgraded[1].close()
        await near.closed()

    run(kind, main)


# -- sockets in the loop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [(socket, socket), (blocking, blocking), (blocking, socket), (socket, blocking)])
def test_sockets_are_used_in_the_loop(kinds: tuple[Any, Any]) -> None:
    async def main(rig: Rig) -> None:
        loop = rig.loop
        client_module, server_module = kinds
        with server_module.socket() as listener, client_module.socket() as client:
            listener.bind((LOOPBACK, 0))
            listener.listen()
            listener.setblocking(False)
            client.setblocking(False)
            await loop.sock_connect(client, listener.getsockname())
            server, address = await loop.sock_accept(listener)
            with server:
                assert address == client.getsockname()
                await loop.sock_sendall(client, b"hello")
                assert await loop.sock_recv(server, 100) == b"hello"
                waiting = asyncio.create_task(loop.sock_recv(client, 100))
                await asyncio.sleep(0.01)
                await loop.sock_sendall(server, b"back")
                assert await waiting == b"back"
                cancelled = asyncio.create_task(loop.sock_recv(client, 100))
                await asyncio.sleep(0.01)
                cancelled.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await cancelled

                async def receive(sock: Any, count: int) -> bytes:
                    data, buffer = bytearray(), bytearray(100_000)
                    while len(data) < count:
                        got = await loop.sock_recv_into(sock, buffer)
                        data += buffer[:got]
                    return bytes(data)

                sending = asyncio.create_task(loop.sock_sendall(client, BIG))
                await asyncio.sleep(SOON_S)
                assert not sending.done()  # nobody has received, and the loop went on
                assert await receive(server, len(BIG)) == BIG
                await sending
                with tempfile.TemporaryFile() as file:
                    file.write(BIG)
                    file.seek(0)
                    receiving = asyncio.create_task(receive(server, len(BIG)))
                    assert await loop.sock_sendfile(client, file) == len(BIG)
                    assert await receiving == BIG
                if kinds == (blocking, blocking):
                    assert client.smc_info().mode == server.smc_info().mode == "SMC"
                client.shutdown(socket.SHUT_WR)
                assert await loop.sock_recv(server, 1) == b""

    run(SMC, main)


def test_a_socket_that_was_used_in_the_loop_may_get_a_transport() -> None:
    async def main(rig: Rig) -> None:
        loop = rig.loop
        with blocking.socket() as listener:
            listener.bind((LOOPBACK, 0))
            listener.listen()
            listener.setblocking(False)
            client = blocking.socket()
            client.setblocking(False)
            await loop.sock_connect(client, listener.getsockname())
            server, _ = await loop.sock_accept(listener)
            await asyncio.gather(loop.sock_sendall(client, b"x"), loop.sock_recv(server, 1))
            waiting = asyncio.create_task(loop.sock_recv(server, 1))
            await asyncio.sleep(0)
            waiting.cancel()
            near = (await loop.create_connection(Recorder, sock=client))[1]
            far = (await loop.connect_accepted_socket(Recorder, server))[1]
            near.transport.write(BIG)
            assert await far.get(len(BIG)) == BIG
            far.transport.write(BIG)
            assert await near.get(len(BIG)) == BIG
            assert mode_of(near.transport) == mode_of(far.transport) == SMC
            near.transport.close()
            await near.closed()
            await far.closed()

    run(SMC, main)


# -- what is switched off, or missing --------------------------------------------------------------------------------


def test_sockets_that_are_no_tcp_are_as_ever(tmp_path: Path) -> None:
    async def main(rig: Rig) -> None:
        server = await asyncio.start_unix_server(shout, tmp_path / "socket")
        reader, writer = await asyncio.open_unix_connection(tmp_path / "socket")
        writer.write(b"unix\n")
        assert await reader.readline() == b"UNIX\n"
        writer.close()
        server.close()

    run(SMC, main)


def test_without_a_manager_the_bytes_go_over_tcp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISM_RUN_DIR", str(tmp_path))
    default.close_default()

    async def main(rig: Rig) -> None:
        rig.kind = TCP
        near, far = await rig.pair()
        near.transport.write(b"anyhow")
        assert await far.get(6) == b"anyhow"
        for one in (near, far):
            assert "no device manager" in one.transport.get_extra_info("smc_info").reason

    try:
        run(SMC, main)
    finally:
        monkeypatch.undo()
        default.close_default()


def test_the_policy_makes_such_loops() -> None:
    policy = ism.smc.asyncio.EventLoopPolicy()
    with contextlib.closing(policy.new_event_loop()) as loop:
        assert isinstance(loop, ism.smc.asyncio.EventLoop)
        assert isinstance(loop, asyncio.SelectorEventLoop)

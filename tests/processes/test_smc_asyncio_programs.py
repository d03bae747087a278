# SPDX-License-Identifier: Apache-2.0
"""Programs that know asyncio only, in processes of their own: over shared memory under `ism run`, over TCP without.

One of them dies, or the manager does; nobody hangs, and nobody loses what was sent.
"""

from __future__ import annotations

import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from test_examples import LIMIT_S, run_dir, running  # noqa: F401

pytestmark = pytest.mark.processes

SERVER = """
    import asyncio

    async def echo(reader, writer):
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            print("end", flush=True)
        except OSError as exc:
            print(type(exc).__name__, flush=True)
        info = writer.get_extra_info("smc_info")
        print(*(("plain", 0, 0) if info is None else (info.mode, info.sent, info.received)), flush=True)
        writer.close()

    async def main():
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    asyncio.run(main())
"""
CLIENT = """
    import asyncio, sys

    async def main():
        reader, writer = await asyncio.open_connection("127.0.0.1", int(sys.argv[1]))
        data = bytes(range(256)) * 8192
        sending = asyncio.create_task(send(writer, data))
        assert await reader.readexactly(len(data)) == data
        await sending
        info = writer.get_extra_info("smc_info")
        print(*(("plain", 0, 0) if info is None else (info.mode, info.sent, info.received)))
        print(info.reason if info else "")
        writer.close()
        await writer.wait_closed()

    async def send(writer, data):
        for at in range(0, len(data), 50000):
            writer.write(data[at:at + 50000])
            await writer.drain()

    asyncio.run(main())
"""
WAITING_CLIENT = """
    import asyncio, sys

    async def main():
        reader, writer = await asyncio.open_connection("127.0.0.1", int(sys.argv[1]))
        writer.write(b"hello")
        await reader.readexactly(5)
        info = writer.get_extra_info("smc_info")
        print(info.mode, flush=True)
        try:
            for _ in range(int(sys.argv[2])):
                line = await asyncio.to_thread(sys.stdin.readline) if len(sys.argv) > 3 else "x"
                writer.write(line.encode())
                await writer.drain()
                print((await reader.readexactly(len(line))).decode().strip(), flush=True)
            print(await reader.read())
        except (OSError, asyncio.IncompleteReadError) as exc:
            print(type(exc).__name__)

    asyncio.run(main())
"""
SIZE = 256 * 8192
UNDER_ISM = ("-m", "ism", "run")


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str, str], str]:
    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(textwrap.dedent(text))
        return str(tmp_path / name)

    return write


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize(
    ("client_run", "server_run", "client_says", "server_says"),
    [
        (UNDER_ISM, UNDER_ISM, f"SMC {SIZE} {SIZE}", f"SMC {SIZE} {SIZE}"),
        (UNDER_ISM, (), "TCP 0 0", "plain 0 0"),
        ((), UNDER_ISM, "plain 0 0", "TCP 0 0"),
        ((), (), "plain 0 0", "plain 0 0"),
    ],
)
def test_unmodified_programs_of_asyncio(
    run_dir: Path,  # noqa: F811
    program: Callable[[str, str], str],
    client_run: tuple[str, ...],
    server_run: tuple[str, ...],
    client_says: str,
    server_says: str,
) -> None:
    with running(*server_run, program("server.py", SERVER), run_dir=run_dir) as server:
        port = read_line(server)
        for _ in range(2):
            with running(*client_run, program("client.py", CLIENT), port, run_dir=run_dir) as client:
                output, errors = client.communicate(timeout=LIMIT_S)
            said, why = output.splitlines()
            assert (said, errors, client.returncode) == (client_says, "", 0)
            assert bool(why) == (client_says == "TCP 0 0")
            assert [read_line(server), read_line(server)] == ["end", server_says]


def test_a_server_that_is_killed_is_a_reset(run_dir: Path, program: Callable[[str, str], str]) -> None:  # noqa: F811
    with running(*UNDER_ISM, program("server.py", SERVER), run_dir=run_dir) as server:
        port = read_line(server)
        waiting = program("waiting.py", WAITING_CLIENT)
        with running(*UNDER_ISM, waiting, port, "0", run_dir=run_dir) as client:
            assert read_line(client) == "SMC"
            server.kill()
            output, errors = client.communicate(timeout=LIMIT_S)
            assert (output.strip(), errors, client.returncode) == ("ConnectionResetError", "", 0)


def test_a_client_that_is_killed_is_a_reset(run_dir: Path, program: Callable[[str, str], str]) -> None:  # noqa: F811
    with running(*UNDER_ISM, program("server.py", SERVER), run_dir=run_dir) as server:
        port = read_line(server)
        waiting = program("waiting.py", WAITING_CLIENT)
        with running(*UNDER_ISM, waiting, port, "0", run_dir=run_dir) as client:
            assert read_line(client) == "SMC"
            client.kill()
            assert [read_line(server), read_line(server)] == ["ConnectionResetError", "SMC 5 5"]


def test_connections_outlive_the_manager(tmp_path: Path, program: Callable[[str, str], str]) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    manager_run = ("-m", "ism", "manager", "--run-dir", str(directory))
    with running(*manager_run, run_dir=directory) as manager:
        assert manager.stderr is not None
        while "device.sock" not in manager.stderr.readline():
            assert manager.poll() is None
        with running(*UNDER_ISM, program("server.py", SERVER), run_dir=directory) as server:
            port = read_line(server)
            waiting = program("waiting.py", WAITING_CLIENT)
            with running(*UNDER_ISM, waiting, port, "200", run_dir=directory) as client:
                assert read_line(client) == "SMC"
                assert [read_line(client) for _ in range(100)] == ["x"] * 100
                manager.kill()
                assert [read_line(client) for _ in range(100)] == ["x"] * 100
                with running(*UNDER_ISM, program("client.py", CLIENT), port, run_dir=directory) as second:
                    output, _ = second.communicate(timeout=LIMIT_S)
                    assert output.splitlines()[0] == "TCP 0 0"
                assert [read_line(server), read_line(server)] == ["end", "TCP 0 0"]
                server.kill()
                assert read_line(client) == "ConnectionResetError"


def test_a_loop_that_is_chosen_by_its_class_is_ours(run_dir: Path, program: Callable[[str, str], str]) -> None:  # noqa: F811
    code = """
        import asyncio
        for loop in (asyncio.SelectorEventLoop(), asyncio.new_event_loop()):
            print(type(loop).__module__)
            loop.close()
    """
    with running(*UNDER_ISM, program("loops.py", code), run_dir=run_dir) as process:
        output, errors = process.communicate(timeout=LIMIT_S)
        assert (output.split(), errors) == (["ism.smc.asyncio"] * 2, "")

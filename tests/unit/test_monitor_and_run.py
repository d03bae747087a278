# SPDX-License-Identifier: Apache-2.0
"""`ism run` runs a program as Python does, with other sockets; `ism ss` shows the sockets of all such programs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fallback_rig import (
    LIMIT_S,
    LOOPBACK,
    Ends,
    ManagerProcess,
    Managers,
    converse,
    fabrics,
    manager_factory,
    until,
)

from ism.cli.ss import ss
from ism.smc import blocking, monitor
from ism.smc.diagnosis import Diagnosis

NOBODY = {"ISM_RUN_DIR": "/nonexistent/ism", "ISM_DEVICE": ""}
SHOW = """
import json, os, sys
def of(name):
    return repr(globals().get(name, "absent")).partition(" at 0x")[0]
print(json.dumps({
    "argv": sys.argv,
    "path": sys.path,
    "names": {name: of(name) for name in ("__name__", "__file__", "__package__", "__spec__", "__cached__", "__doc__")},
    "main": sys.modules["__main__"].__dict__ is globals(),
    "annotations": "__annotations__" in globals() or "no",
    "extra": sorted(name for name in globals() if not name.startswith("__")),
    "cwd": os.getcwd(),
}))
"""


def python(*arguments: str | Path, ism: Sequence[str] | None, cwd: Path, **options: Any) -> Any:
    """Run a program, with `ism run` and these options of it, or (None) with Python itself."""
    command = [sys.executable, *(["-m", "ism", "run", *ism] if ism is not None else []), *map(str, arguments)]
    environment = {**os.environ, **NOBODY, "PYTHONPATH": os.pathsep.join(source_path()), **options.pop("env", {})}
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=LIMIT_S, check=False, **options
    )


def source_path() -> list[str]:
    """Where this project is, so that a program that runs elsewhere uses it."""
    return [str(Path(blocking.__file__).parents[2])]


# Programs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a script, a symbolic link to it, a module, packages, a directory and an archive to run."""
    made = tmp_path_factory.mktemp("programs")
    (made / "scripts").mkdir()
    (made / "scripts" / "show.py").write_text(f'"""What it is."""\n{SHOW}')
    (made / "linked.py").symlink_to(made / "scripts" / "show.py")
    (made / "module.py").write_text(SHOW)
    (made / "package").mkdir()
    (made / "package" / "__init__.py").write_text("")
    (made / "package" / "__main__.py").write_text(SHOW)
    (made / "package" / "inner.py").write_text(SHOW)
    (made / "directory").mkdir()
    (made / "directory" / "__main__.py").write_text(SHOW)
    with zipfile.ZipFile(made / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", SHOW)
    return made


@pytest.mark.parametrize(
    "how",
    [
        ["scripts/show.py", "a", "--require", "-m"],
        ["./scripts/../scripts/show.py"],
        ["linked.py", "--", "x"],
        ["-m", "module", "a", "b"],
        ["-m", "package", "-c", "d"],
        ["-m", "package.inner"],
        ["-c", SHOW, "a", "--help"],
        ["directory", "a"],
        ["archive.zip", "a"],
    ],
    ids=lambda how: how[0] if len(how[0]) > 2 else f"{how[0]} {how[1][:20].strip()}",
)
def test_a_program_sees_what_it_sees_under_python_itself(programs: Path, how: list[str]) -> None:
    expected, found = (python(*how, ism=ism, cwd=programs) for ism in (None, []))
    assert found.stderr == expected.stderr == ""
    assert found.returncode == expected.returncode == 0
    assert json.loads(found.stdout) == json.loads(expected.stdout)


ENDS = {
    "nothing": "",
    "a number": "import sys; sys.exit(3)",
    "a text": "import sys; sys.exit('because')",
    "None": "import sys; sys.exit()",
    "an exception": "def broken():\n    raise ValueError('of the program')\nbroken()",
    "a chain": "try:\n    1 / 0\nexcept ZeroDivisionError as exc:\n    raise KeyError('x') from exc",
    "at once": "import os; os._exit(7)",
    "a syntax error": "x = = 1",
    "its own hook": "import sys\nsys.excepthook = lambda *a: print('hook', a[0].__name__)\nraise ValueError",
    "later": "import atexit, threading, time\n"
    "def late():\n    time.sleep(0.1)\n    print('late', sys_is_there())\n"
    "def sys_is_there():\n    import __main__\n    return __main__.sys_is_there is sys_is_there\n"
    "threading.Thread(target=late).start()\natexit.register(lambda: print('at exit', sys_is_there()))\n",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_program_ends_as_under_python_itself(tmp_path: Path, end: str) -> None:
    (tmp_path / "program.py").write_text(ENDS[end])
    expected, found = (python("program.py", ism=ism, cwd=tmp_path) for ism in (None, []))
    assert (found.returncode, found.stdout) == (expected.returncode, expected.stdout)
    assert found.stderr == expected.stderr


def test_an_interrupted_program_ends_with_130(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)\nwhile True: pass")
    found = python("program.py", ism=[], cwd=tmp_path)
    assert found.returncode == 130
    assert found.stderr.endswith("KeyboardInterrupt\n")
    assert "ism/" not in found.stderr


PRINT = "import os, sys; print(*(os.environ.get(n) for n in sys.argv[1:]))"


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        (["--require"], "ISM_SMC", "require"),
        (["--device", "vfio-user:/x"], "ISM_DEVICE", "vfio-user:/x"),
        (["--device=vfio-user:/x"], "ISM_DEVICE", "vfio-user:/x"),
        (["--buffer", "256K"], "ISM_SMC_BUFFER", "256K"),
        (["--buffer=4M", "--spin-us=7", "--"], "ISM_SMC_SPIN_US", "7"),
    ],
)
def test_options_are_for_the_program_and_what_it_starts(
    tmp_path: Path, options: list[str], name: str, value: str
) -> None:
    found = python("-c", PRINT, name, ism=options, cwd=tmp_path)
    assert (found.stdout.strip(), found.stderr) == (value, "")


@pytest.mark.parametrize(
    ("options", "arguments", "environment", "said"),
    [
        ([], ["nowhere.py"], {}, "nowhere.py"),
        ([], ["python", "program.py"], {}, "python"),
        ([], ["python3"], {}, "python3"),
        ([], ["-m", "no.such.module"], {}, "no.such.module"),
        ([], ["-m"], {}, "usage"),
        ([], ["-c"], {}, "usage"),
        ([], [], {}, "usage"),
        (["--unheard-of"], ["program.py"], {}, "--unheard-of"),
        (["--buffer"], [], {}, "--buffer"),
        (["--buffer=lots"], ["program.py"], {}, "ISM_SMC_BUFFER"),
        (["--spin-us=9999"], ["program.py"], {}, "ISM_SMC_SPIN_US"),
        ([], ["program.py"], {"ISM_SMC": "always"}, "ISM_SMC"),
        ([], ["program.py"], {"ISM_SMC_PEERS": "10.0.0.0/99"}, "ISM_SMC_PEERS"),
    ],
)
def test_a_mistake_gives_one_clear_line(
    tmp_path: Path, options: list[str], arguments: list[str], environment: dict[str, str], said: str
) -> None:
    (tmp_path / "program.py").write_text("print('ran')")
    found = python(*arguments, ism=options, cwd=tmp_path, env=environment)
    assert found.returncode not in (0, -signal.SIGSEGV)
    assert found.stdout == ""
    assert said in found.stderr
    assert "Traceback" not in found.stderr
    assert len(found.stderr.strip().splitlines()) <= 2, found.stderr


def test_help_says_how(tmp_path: Path) -> None:
    found = python(ism=["--help"], cwd=tmp_path)
    assert found.returncode == 0
    assert "--require" in found.stdout
    assert "PROGRAM" in found.stdout


INSTALLED = """
import socket, ssl, http.client, socketserver
from socket import create_connection
import ism.smc.blocking as smc
assert socket.socket is smc.socket
listener = socket.create_server(("127.0.0.1", 0))
client = create_connection(listener.getsockname())
server, _ = listener.accept()
assert type(listener) is type(client) is type(server) is smc.socket, (type(listener), type(client), type(server))
client.sendall(b"hello")
assert server.recv(10) == b"hello"
assert client.smc_info().mode == "TCP" and client.smc_info().reason, client.smc_info()
one, other = socket.socketpair()
one.sendall(b"x")
assert other.recv(1) == b"x"
assert not issubclass(ssl.SSLSocket, smc.socket)
for sock in (listener, client, server, one, other):
    sock.close()
print("done")
"""


def test_every_function_that_makes_sockets_makes_those_of_ism_smc(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(INSTALLED)
    found = python("program.py", ism=[], cwd=tmp_path)
    assert (found.stdout, found.returncode) == ("done\n", 0), found.stderr


def test_a_connection_that_is_required_to_use_shared_memory_fails_without_a_manager(tmp_path: Path) -> None:
    with socket.create_server((LOOPBACK, 0)) as plain:
        code = f"import socket; socket.create_connection({plain.getsockname()!r})"
        found = python("-c", code, ism=["--require"], cwd=tmp_path)
    assert found.returncode == 1
    assert "shared memory is required" in found.stderr.splitlines()[-1]


# Two programs, and what `ism ss` says of them -------------------------------------------------------------------

SERVER = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
kept = []
while True:
    server, _ = listener.accept()
    server.sendall(server.recv(100).upper())
    kept.append(server)
"""
CLIENT = """
import socket, sys
client = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
client.sendall(b"hello")
print(client.recv(100).decode(), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def managers() -> Iterator[Managers]:
    with manager_factory() as made:
        yield made


@pytest.fixture
def manager(managers: Managers, tmp_path: Path) -> ManagerProcess:
    return managers.start(tmp_path / "run")


@contextlib.contextmanager
def running(manager: ManagerProcess, code: str, *arguments: object, plain: bool = False) -> Iterator[Any]:
    """Run code as a program until the end of the test, under `ism run` unless `plain`."""
    command = [sys.executable, *([] if plain else ["-m", "ism", "run"]), "-c", code, *map(str, arguments)]
    environment = {**os.environ, "ISM_RUN_DIR": str(manager.directory), "PYTHONPATH": os.pathsep.join(source_path())}
    environment.pop("ISM_DEVICE", None)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: Any) -> str:
    text = process.stdout.readline().strip()
    assert text, "the program ended"
    return str(text)


def asked(manager: ManagerProcess, *options: str) -> str:
    result = CliRunner().invoke(ss, ["--run-dir", str(manager.directory), *options])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.processes
def test_two_programs_use_shared_memory_and_ss_shows_both_ends(manager: ManagerProcess) -> None:
    assert asked(manager, "-s") == "processes 0, \n" or "processes 0" in asked(manager, "-s")
    with running(manager, SERVER) as server:
        port = int(line(server))
        with running(manager, CLIENT, port) as client:
            assert line(client) == "HELLO"
            shown = json.loads(asked(manager, "--json"))
            assert {process["pid"] for process in shown} == {server.pid, client.pid}
            ends = [one for process in shown for one in process["connections"]]
            assert [one["mode"] for one in ends] == ["SMC", "SMC"]
            assert {one["state"] for one in ends} == {"ACTIVE"}
            assert sorted((one["sent"], one["received"]) for one in ends) == [(5, 5), (5, 5)]
            assert ends[0]["local"] == ends[1]["remote"]
            assert all(process["fallbacks"] == {} for process in shown)

            table = asked(manager)
            assert table.count(" SMC ") == 2
            assert "ACTIVE" in table
            assert str(client.pid) in table
            assert "LISTEN" not in table
            assert "LISTEN" in asked(manager, "--all")
            summary = asked(manager, "-s").splitlines()
            assert summary == ["processes 2, SMC 2"]
            assert len(list((manager.directory / "ss").iterdir())) == 2
            client.kill()
            client.wait(LIMIT_S)
            until(lambda: len(json.loads(asked(manager, "--json"))) == 1)
            assert len(list((manager.directory / "ss").iterdir())) == 1, "the socket of a dead process is left"


@pytest.mark.processes
@pytest.mark.parametrize("plain", ["client", "server"])
def test_where_one_end_is_plain_the_other_is_shown_as_tcp_with_the_reason(manager: ManagerProcess, plain: str) -> None:
    with running(manager, SERVER, plain=plain == "server") as server:
        port = int(line(server))
        with running(manager, CLIENT, port, plain=plain == "client") as client:
            assert line(client) == "HELLO"
            (shown,) = json.loads(asked(manager, "--json"))
            assert shown["pid"] == (server if plain == "client" else client).pid
            (one,) = shown["connections"]
            assert (one["mode"], one["code"]) == ("TCP", Diagnosis.PEERNOSMC)
            assert one["reason"]
            assert shown["fallbacks"] == {Diagnosis.PEERNOSMC.words: 1}
            assert one["reason"] in asked(manager)
            assert "0x03010000" in asked(manager)
            assert asked(manager, "-s").splitlines() == [
                "processes 1, TCP 1",
                f"TCP since the processes started: 1 ({Diagnosis.PEERNOSMC.words})",
            ]


FORKING_SERVER = """
import socketserver
class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(self.request.recv(100).upper())
        self.request.recv(1)
with socketserver.ForkingTCPServer(("127.0.0.1", 0), Handler) as server:
    print(server.server_address[1], flush=True)
    server.serve_forever()
"""
PREFORKING_SERVER = """
import os, signal, socket
listener = socket.create_server(("127.0.0.1", 0))
children = []
for _ in range(2):
    pid = os.fork()
    if not pid:
        signal.alarm(60)
        kept = []
        while True:
            server, _ = listener.accept()
            server.sendall(server.recv(100).upper())
            kept.append(server)
    children.append(pid)
print(listener.getsockname()[1], flush=True)
try:
    input()
finally:
    for pid in children:
        os.kill(pid, signal.SIGKILL)
"""


@pytest.mark.processes
@pytest.mark.parametrize("plain", [False, True], ids=["smc", "plain"])
def test_a_server_that_forks_for_each_connection_serves_it_over_tcp(manager: ManagerProcess, plain: bool) -> None:
    with running(manager, FORKING_SERVER) as server, running(manager, CLIENT, line(server), plain=plain) as client:
        assert line(client) == "HELLO"
        shown = json.loads(asked(manager, "--json"))
        modes = {one["mode"] for process in shown for one in process["connections"]}
        assert modes == (set() if plain else {"TCP"})
        client.communicate("", LIMIT_S)
        server.send_signal(signal.SIGINT)
        assert server.wait(LIMIT_S) == 130


@pytest.mark.processes
def test_children_that_accept_from_an_inherited_listener_agree_with_their_clients(manager: ManagerProcess) -> None:
    with running(manager, PREFORKING_SERVER) as server:
        port = line(server)
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(running(manager, CLIENT, port)) for _ in range(4)]
            assert [line(client) for client in clients] == ["HELLO"] * 4
            ends = [one for process in json.loads(asked(manager, "--json")) for one in process["connections"]]
            modes: dict[tuple[Any, ...], set[str]] = {}
            for one in ends:
                ports = tuple(sorted((one["local"][1], one["remote"][1])))
                modes.setdefault(ports, set()).add(one["mode"])
            assert len(modes) == 4
            assert all(len(found) == 1 for found in modes.values()), ends
            assert {"SMC"} in modes.values()
        server.communicate("\n", LIMIT_S)


@pytest.mark.processes
def test_a_program_that_ends_takes_its_socket_along(manager: ManagerProcess) -> None:
    code = "import socket; socket.create_server(('127.0.0.1', 0)).close(); print('made', flush=True); input()"
    with running(manager, code) as program:
        assert line(program) == "made"
        assert len(list((manager.directory / "ss").iterdir())) == 1
        program.communicate("\n", LIMIT_S)
        assert program.returncode == 0
    assert list((manager.directory / "ss").iterdir()) == []


# The asking side ------------------------------------------------------------------------------------------------


def test_no_directory_means_nobody(tmp_path: Path) -> None:
    assert monitor.ask_all(tmp_path / "ss") == []
    result = CliRunner().invoke(ss, ["--run-dir", str(tmp_path)])
    assert result.exit_code == 0


def test_a_socket_that_nobody_answers_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "1-1.sock"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
    assert monitor.ask_all(tmp_path) == []
    assert not path.exists()


@pytest.mark.parametrize("answer", [b"", b"{", b"[]", b"\xff\xfe", b"null", None], ids=repr)
def test_processes_that_answer_nonsense_or_nothing_are_left_out(tmp_path: Path, answer: bytes | None) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "1-1.sock"))
        listener.listen()

        def reply() -> None:
            sock, _ = listener.accept()
            with sock:
                if answer is None:
                    sock.recv(1)  # until the asker's patience ends
                else:
                    sock.sendall(answer)

        replying = threading.Thread(target=reply)
        replying.start()
        assert monitor.ask_all(tmp_path, 0.2) == []
        replying.join(LIMIT_S)
    assert (tmp_path / "1-1.sock").exists()


def test_a_device_is_shown_once_with_its_sockets(tmp_path: Path) -> None:
    with fabrics() as rig:
        assert rig.server is not None
        monitor.start(rig.server, tmp_path / "ss")
        try:
            before = connections(tmp_path)
            client, server = rig.pair()
            converse(client, server, size=100)
            shown = [one for one in connections(tmp_path) if one not in before]
            assert sorted(one["mode"] for one in shown) == ["SMC", "SMC", "SMC"]  # with the listener
            assert sum(one["state"] == "LISTEN" for one in shown) == 1
            del client, server
        finally:
            monitor.stop()
        assert list((tmp_path / "ss").iterdir()) == []


def connections(directory: Path) -> list[dict[str, Any]]:
    (process,) = monitor.ask_all(directory / "ss")
    assert process["pid"] == os.getpid()
    found: list[dict[str, Any]] = process["connections"]
    return found


def test_a_directory_that_cannot_be_used_is_no_error(tmp_path: Path) -> None:
    with fabrics() as rig:
        assert rig.client is not None
        (tmp_path / "file").write_text("")
        monitor.start(rig.client, tmp_path / "file")
        monitor.start(rig.client, tmp_path / ("long" * 40))
        assert monitor.ask_all(tmp_path) == []
        monitor.stop()


def test_reasons_are_counted_for_each_connection() -> None:
    ends = Ends(None, None)
    try:
        before = monitor.report()["fallbacks"].get(Diagnosis.NOSMCDDEV.words, 0)
        with socket.create_server((LOOPBACK, 0)) as plain:
            for _ in range(3):
                ends.connect(plain.getsockname())
        assert monitor.report()["fallbacks"][Diagnosis.NOSMCDDEV.words] == before + 3
    finally:
        ends.close()

# SPDX-License-Identifier: Apache-2.0
"""Run an unmodified Python program with its TCP sockets over shared memory: `ism run`, `python -m ism.smc.run`.

    ism run [--require] [--device NAME] [--buffer SIZE] [--spin-us N] PROGRAM [ARGUMENTS]
    ism run -m MODULE [ARGUMENTS]
    ism run -c CODE [ARGUMENTS]

Before the program's first line `socket.socket` becomes the class of `ism.smc.blocking`, and with it every function of
the standard library's module that makes sockets. Where the program imports trio, its runs get the socket factory of
`ism.smc`; where it imports asyncio, its loops get the transports of `ism.smc.asyncio`. TLS stays on TCP: the class of
the `ssl` module was made from the old one. Processes that `multiprocessing` starts begin in the same way; other
programs that it starts are as they would be anyhow.
"""

from __future__ import annotations

import builtins
import importlib.abc
import importlib.machinery
import io
import os
import pkgutil
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ism.errors import ConfigError

USAGE = "usage: ism run [--require] [--device NAME] [--buffer SIZE] [--spin-us N] PROGRAM | -m MODULE | -c CODE [ARGS]"

_VARIABLES = {"--device": "ISM_DEVICE", "--buffer": "ISM_SMC_BUFFER", "--spin-us": "ISM_SMC_SPIN_US"}


def install() -> None:
    """Put the blocking surface in place of the standard library's sockets in this process, trio's and asyncio's too.

    Raises: ConfigError for an environment variable that cannot be used. Idempotent.
    """
    import socket
    import ssl  # noqa: F401 (its class must be made from the standard library's before that is replaced)

    from ism.smc import policy

    policy.from_environment()
    from ism.smc import blocking

    if socket.socket is blocking.socket:
        return
    socket.socket = blocking.socket  # type: ignore[misc]
    replace_sendfile()
    _when_imported("trio", _set_up_trio)
    _when_imported("asyncio", _set_up_asyncio)
    _when_imported("multiprocessing.spawn", _set_up_spawn)
    _when_imported("socketserver", _set_up_forking_servers)


def replace_sendfile() -> None:
    """Let `os.sendfile`, which event loops hand a socket's descriptor, know the sockets of the blocking surface."""
    from functools import wraps

    from ism.smc import blocking

    plain = os.sendfile

    @wraps(plain)
    def sendfile(out_fd: int, in_fd: int, offset: int | None, count: int, *rest: Any, **options: Any) -> int:
        sock = None if rest or options else blocking.socket_of(out_fd)
        if sock is None:
            return plain(out_fd, in_fd, offset, count, *rest, **options)
        return sock.send_from(in_fd, offset, count)

    os.sendfile = sendfile


def _set_up_trio(trio: Any) -> None:
    from functools import wraps

    from ism.smc import SocketFactory

    def with_factory(start: Any) -> Any:
        @wraps(start)
        def run(async_fn: Any, *args: Any, **options: Any) -> Any:
            async def main(*args: Any) -> Any:
                trio.socket.set_custom_socket_factory(SocketFactory())
                return await async_fn(*args)

            return start(main, *args, **options)

        return run

    trio.run = with_factory(trio.run)
    trio.lowlevel.start_guest_run = with_factory(trio.lowlevel.start_guest_run)


def _set_up_asyncio(asyncio: Any) -> None:
    from ism.smc.asyncio import EventLoop, EventLoopPolicy

    asyncio.set_event_loop_policy(EventLoopPolicy())
    asyncio.SelectorEventLoop = EventLoop  # servers that choose a loop by its class (uvicorn) take this one


def _set_up_spawn(spawn: Any) -> None:
    """Have the processes that `multiprocessing` starts anew begin as this one did; those that it forks do anyhow."""
    plain_command_line = spawn.get_command_line

    def get_command_line(**options: Any) -> list[str]:
        command: list[str] = plain_command_line(**options)
        if "-c" in command:
            at = command.index("-c") + 1
            command[at] = f"from ism.smc.run import install; install(); {command[at]}"
        return command

    spawn.get_command_line = get_command_line


def _set_up_forking_servers(socketserver: Any) -> None:
    """Keep servers that fork for each connection on TCP: a connection over shared memory stays the parent's."""
    from ism.smc import blocking
    from ism.smc.diagnosis import Diagnosis
    from ism.smc.rendezvous import Fallback

    forking = getattr(socketserver, "ForkingMixIn", None)
    if forking is None:
        return

    def server_activate(server: Any) -> None:
        sock = server.socket
        if isinstance(sock, blocking.socket):
            sock._policy = sock._policy.with_mode("off")
            sock._fallback = Fallback(Diagnosis.CNFERR, "the server forks for each connection")
        super(forking, server).server_activate()

    forking.server_activate = server_activate


def _when_imported(name: str, then: Callable[[ModuleType], None]) -> None:
    """Call `then` with a module once it is imported: now, if it is."""
    module = sys.modules.get(name)
    if module is not None:
        then(module)
    else:
        sys.meta_path.insert(0, _Finder(name, then))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as all the others do, and has something done after it."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self._name, self._then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._then)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: Any, then: Callable[[ModuleType], None]) -> None:
        self._inner, self._then = inner, then

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._inner.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        module.__loader__ = self._inner
        self._then(module)


def main(arguments: Sequence[str]) -> None:
    """Run a program as the command line says. Ends as the program does. Raises ConfigError; SystemExit for usage."""
    rest = list(arguments)
    while rest and rest[0].startswith("--"):
        option, equals, value = rest.pop(0).partition("=")
        if option == "--":
            break
        if option == "--help":
            print(USAGE)
            return
        if option == "--require" and not equals:
            os.environ["ISM_SMC"] = "require"
        elif option in _VARIABLES and (equals or rest):
            os.environ[_VARIABLES[option]] = value if equals else rest.pop(0)
        else:
            sys.exit(f"ism run: unknown option, or one without its value: {option}\n{USAGE}")
    if not rest or (rest[0] in ("-m", "-c") and len(rest) < 2):
        sys.exit(USAGE)
    if rest[0] not in ("-m", "-c") and not Path(rest[0]).exists():
        hint = "; leave the interpreter out" if Path(rest[0]).name.startswith("python") else ""
        sys.exit(f"ism run: there is no program {rest[0]}{hint}")
    install()
    _run(rest)


def _run(rest: list[str]) -> None:
    """Do what the interpreter does with the same arguments, in a `__main__` of its own."""
    module = sys.modules["__main__"] = ModuleType("__main__")
    module.__dict__.update(__annotations__={}, __builtins__=builtins)
    run_as_main: Any = runpy._run_module_as_main  # type: ignore[attr-defined] # the interpreter's own way for -m
    what = rest[0]
    if what == "-m":
        sys.argv = ["-m", *rest[2:]]
        _first_on_path(str(Path.cwd()))
        _end_as_python(lambda: run_as_main(rest[1]))
    elif what == "-c":
        sys.argv = ["-c", *rest[2:]]
        _first_on_path("")
        module.__loader__ = importlib.machinery.BuiltinImporter
        _end_as_python(lambda: exec(compile(rest[1], "<string>", "exec"), module.__dict__))
    else:
        sys.argv = rest
        path = os.path.join(Path.cwd(), what)  # its dots stay, as the interpreter leaves them
        if pkgutil.get_importer(path) is not None:  # a directory or an archive with a __main__ inside
            sys.path.insert(0, path)
            del sys.path[1 : 1 + (not sys.flags.safe_path)]
            _end_as_python(lambda: run_as_main("__main__", False))
        else:
            _first_on_path(str(Path(what).resolve().parent))
            _end_as_python(lambda: _run_file(path, module))


def _first_on_path(entry: str) -> None:
    """Put the program's entry in the place of the one that is there for `ism` itself."""
    if not sys.flags.safe_path:
        sys.path[0] = entry


def _run_file(path: str, module: ModuleType) -> None:
    with io.open_code(path) as file:
        code: Any = pkgutil.read_code(file)  # None unless it is compiled
    if code is None:
        with io.open_code(path) as file:
            code = compile(file.read(), path, "exec")
    module.__dict__.update(__file__=path, __cached__=None)
    module.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
    exec(code, module.__dict__)


def _end_as_python(run: Callable[[], object]) -> None:
    """Run; an error is shown as the interpreter shows it, without a line of this project in the traceback."""
    try:
        run()
    except SystemExit:
        raise
    except BaseException as exc:
        trace = exc.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        sys.excepthook(type(exc), exc.with_traceback(trace), trace)
        sys.exit(130 if isinstance(exc, KeyboardInterrupt) else 1)


if __name__ == "__main__":
    sys.path[0] = str(Path.cwd())  # this module's own folder would hide the standard library's `socket` and `asyncio`
    try:
        main(sys.argv[1:])
    except ConfigError as exc:
        sys.exit(f"ism run: {exc}")

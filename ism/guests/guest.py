# SPDX-License-Identifier: Apache-2.0
"""What runs inside a machine, as the host's programs see it: start something, read what it writes, wait for its end.

It owns the host's end of the command port, and one thread that reads it. The other end is `inside`. Blocking calls from
any thread; every wait has a limit.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import queue
import socket
import textwrap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ism.guests.machine import Machine, MachineError


class GuestProgramError(MachineError):
    """A program in the guest ended with an error. Attributes: `code`, `output`."""

    def __init__(self, name: str, what: str, code: int, output: str) -> None:
        self.code, self.output = code, output
        super().__init__(name, f"{what} ended with {code}: {output.strip()[-2000:]}")


class GuestProcess:
    """Something that was started in a guest. Attributes: `id`, `what`."""

    def __init__(self, guest: Guest, ident: int, what: str) -> None:
        self.id, self.what = ident, what
        self._guest = guest
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._text = ""
        self._read_to = 0
        self._end: dict[str, Any] | None = None

    @property
    def output(self) -> str:
        """What it has written so far, as far as it was waited for."""
        return self._text

    def wait_line(self, wanted: Callable[[str], bool] | str, timeout_s: float = 60.0) -> str:
        """Wait for a line that contains `wanted`, after those that were returned before. Raises MachineError."""
        matches = (lambda line: wanted in line) if isinstance(wanted, str) else wanted
        deadline = time.monotonic() + timeout_s
        while True:
            while (end := self._text.find("\n", self._read_to)) >= 0:
                line = self._text[self._read_to : end]
                self._read_to = end + 1
                if matches(line):
                    return line
            if self._end is not None:
                raise GuestProgramError(self._guest.name, self.what, self._end["end"], self._text)
            self._take(deadline)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Wait for its end; returns the exit code, negative for a signal. Raises MachineError when it takes longer."""
        deadline = time.monotonic() + timeout_s
        while self._end is None:
            self._take(deadline)
        return int(self._end["end"])

    def result(self, timeout_s: float = 60.0) -> Any:
        """Wait for its end and return its `result`. Raises GuestProgramError unless it ended well."""
        code = self.wait(timeout_s)
        assert self._end is not None
        if code:
            raise GuestProgramError(self._guest.name, self.what, code, self._text)
        return self._end.get("result")

    def send(self, data: bytes) -> None:
        """Write to its standard input."""
        self._guest.ask("input", of=self.id, data=base64.b64encode(data).decode())

    def signal(self, number: int) -> None:
        """Send a signal to it and what it started."""
        self._guest.ask("signal", of=self.id, number=number)

    def _take(self, deadline: float) -> None:
        try:
            message = self._messages.get(timeout=max(deadline - time.monotonic(), 0))
        except queue.Empty:
            raise MachineError(
                self._guest.name, f"{self.what} takes too long; it has written: {self._text.strip()[-2000:]}"
            ) from None
        if message is None:
            self._messages.put(None)
            raise MachineError(self._guest.name, f"the guest is gone while {self.what} was waited for")
        if "out" in message:
            self._text += message["out"]
        elif "end" in message:
            self._end = message


class Guest:
    """The inside of a machine. Attributes: `name`, `machine`."""

    def __init__(self, machine: Machine) -> None:
        """Connect to the command port. Raises MachineError."""
        self.name, self.machine = machine.name, machine
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._sock.connect(str(machine.command_socket))
        except OSError as exc:
            raise MachineError(self.name, f"no command port: {exc.strerror}") from exc
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._open: dict[int, GuestProcess] = {}
        self._ready = threading.Event()
        self._gone = False
        self._reader = threading.Thread(target=self._read, name=f"guest-{self.name}", daemon=True)
        self._reader.start()

    def wait_ready(self, timeout_s: float = 180.0) -> None:
        """Wait until a guest that boots has come up. Raises MachineError, with the end of its console."""
        deadline = time.monotonic() + timeout_s
        while not self._ready.wait(0.2):
            if self._gone or time.monotonic() > deadline:
                raise MachineError(self.name, f"it does not come up: {self.machine.console()[-500:]}")

    def reboot(self, timeout_s: float = 180.0) -> None:
        """Have the guest's kernel restart the machine, and wait until it is up. Raises MachineError."""
        self._ready.clear()
        self.start(["reboot", "-f"])
        self.wait_ready(timeout_s)
        self.personalize()

    def personalize(self) -> None:
        """Give a restored guest randomness, time and a name of its own."""
        seed = base64.b64encode(os.urandom(64)).decode()
        self.ask("personalize", seed=seed, time_s=time.time(), hostname=self.name)

    def start(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | None = None
    ) -> GuestProcess:
        """Start a program."""
        return self._start(" ".join(argv)[:80], argv=list(argv), env=dict(env or {}), cwd=cwd)

    def start_python(self, code: str, argument: Any = None, *, env: Mapping[str, str] | None = None) -> GuestProcess:
        """Run Python code in a fork of the warm interpreter; its variable `argument` is given, `result` is taken."""
        code = textwrap.dedent(code)
        return self._start("Python code", code=code, argument=argument, env=dict(env or {}))

    def run(self, argv: Sequence[str], *, timeout_s: float = 60.0, env: Mapping[str, str] | None = None) -> str:
        """Run a program to its end and return what it wrote. Raises GuestProgramError, MachineError."""
        process = self.start(argv, env=env)
        process.result(timeout_s)
        return process.output

    def python(
        self, code: str, argument: Any = None, *, timeout_s: float = 60.0, env: Mapping[str, str] | None = None
    ) -> Any:
        """Run Python code to its end and return its `result`. Raises GuestProgramError, MachineError."""
        return self.start_python(code, argument, env=env).result(timeout_s)

    def write(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Write a file; meant for small ones."""
        self.ask("write", path=path, data=base64.b64encode(data).decode(), mode=mode)

    def read(self, path: str) -> bytes:
        """Read a file; meant for small ones."""
        code = "import base64; result = base64.b64encode(open(argument, 'rb').read()).decode()"
        return base64.b64decode(self.python(code, path))

    def ask(self, do: str, *, timeout_s: float = 30.0, **fields: Any) -> None:
        """Ask for something that is done at once, and wait until it is. Raises GuestProgramError, MachineError."""
        self._send(do, do, fields).result(timeout_s)

    def quit(self) -> None:
        """Switch the machine off."""
        self.machine.quit()
        self._close()

    def kill(self) -> None:
        """End the machine as if QEMU had crashed."""
        self.machine.kill()
        self._close()

    def _close(self) -> None:
        self._gone = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._sock.close()

    def _start(self, what: str, **fields: Any) -> GuestProcess:
        return self._send("start", what, fields)

    def _send(self, do: str, what: str, fields: dict[str, Any]) -> GuestProcess:
        with self._lock:
            process = GuestProcess(self, next(self._ids), what)
            self._open[process.id] = process
            if self._gone:
                raise MachineError(self.name, f"the guest is gone before {what}")
            try:
                self._sock.sendall(json.dumps({"do": do, "id": process.id, **fields}).encode() + b"\n")
            except OSError as exc:
                raise MachineError(self.name, f"the guest is gone before {what}") from exc
        return process

    def _read(self) -> None:
        try:
            with self._sock.makefile("rb") as file:
                for line in file:
                    self._take(json.loads(line))
        except (OSError, ValueError):
            pass
        self._gone = True
        self._lose_all()

    def _lose_all(self) -> None:
        with self._lock:
            for process in self._open.values():
                process._messages.put(None)
            self._open.clear()

    def _take(self, message: dict[str, Any]) -> None:
        if "ready" in message:
            self._lose_all()  # it has booted: nothing of before is there
            self._ready.set()
            return
        process = self._open.get(message["id"])
        if process is not None:
            process._messages.put(message)
            if "end" in message:
                with self._lock:
                    self._open.pop(process.id, None)

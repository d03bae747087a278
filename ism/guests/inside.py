# SPDX-License-Identifier: Apache-2.0
"""The guest's end: runs what the host asks for, from a Python that is warm already.

It runs in the guest only, as one file without this project's other modules; it is read here for its text. It owns the
port `ism.command`, a virtio console port on which both ends write lines of JSON, and the processes it starts for it.
It believes the host, which owns the guest anyway.

Requests, each with `id`: `start` (`argv`, a program; or `code` with `argument`, run by a fork of this process, whose
imports are done, and whose variable `result` is the answer), `signal` (`number`), `input` (`data`), `write` (`path`,
`data`, `mode`), `preload` (`code`, run here, so that every fork has what it imports), `personalize` (`seed`, `time_s`,
`hostname`): a restored guest has the randomness and the clock of every other one until it is told. Answers, each with
the request's `id`: `out` (text, as it comes), `end` (exit code, negative for a signal, with `result` when there is
one). Data is base64. Once, first: `ready`.
"""

import base64
import contextlib
import fcntl
import importlib
import io
import json
import os
import random
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

RNDADDENTROPY_RESEED = 0x5207  # RNDRESEEDCRNG, linux/random.h
PORT = "ism.command"


def warm_up() -> None:
    """Import what is slow to import, and make Numba set up its code generator, by one kernel."""
    import asyncio  # noqa: F401
    import concurrent.futures  # noqa: F401
    import dataclasses  # noqa: F401
    import hashlib  # noqa: F401
    import ipaddress  # noqa: F401
    import logging.handlers  # noqa: F401

    import numba
    import numpy
    import trio  # noqa: F401

    @numba.njit("int64(int64[::1])", cache=False)
    def total(numbers):  # type: ignore[no-untyped-def]
        answer = 0
        for number in numbers:
            answer += number
        return answer

    total(numpy.arange(3))


def open_port() -> int:
    """Find and open the port."""
    while True:
        for name in Path("/sys/class/virtio-ports").glob("*/name"):
            if name.read_text().strip() == PORT:
                with contextlib.suppress(OSError):
                    return os.open(f"/dev/{name.parent.name}", os.O_RDWR)
        time.sleep(0.01)


class Child:
    """A process that was asked for: its id, and the pipes it writes to."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.id = request["id"]
        self.result: list[bytes] = []
        self.result_fd = -1
        read, write = os.pipe()
        stdin_read, self.stdin = os.pipe()
        environment = {**os.environ, **request.get("env", {})}
        if "argv" in request:
            try:
                process = subprocess.Popen(
                    request["argv"],
                    stdin=stdin_read, stdout=write, stderr=write, env=environment,
                    cwd=request.get("cwd"), start_new_session=True,
                )  # fmt: skip
                self.pid = process.pid
                process.returncode = 0  # reaped here, not by Popen
            finally:
                os.close(write)
                os.close(stdin_read)
        else:
            self.result_fd, result_write = os.pipe()
            self.pid = os.fork()
            if self.pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.setsid()
                os.dup2(stdin_read, 0)
                os.dup2(write, 1)
                os.dup2(write, 2)
                os.dup2(result_write, 3)
                os.closerange(4, 1 << 12)
                os.environ.update(request.get("env", {}))
                os._exit(run_code(request["code"], request.get("argument")))
            for fd in (write, stdin_read, result_write):
                os.close(fd)
        self.out = read


def run_code(code: str, argument: object) -> int:
    """In the fork: run the code; its `result` goes to descriptor 3."""
    random.seed()
    sys.stdin = io.TextIOWrapper(io.FileIO(0))
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), line_buffering=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), line_buffering=True)
    scope: dict[str, Any] = {"__name__": "__main__", "argument": argument, "result": None}
    status = 0
    try:
        exec(compile(code, "<guest>", "exec"), scope)
        with open(3, "wb") as out:
            out.write(json.dumps(scope["result"]).encode())
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else 0 if exc.code is None else 1
        if status and not isinstance(exc.code, int):
            print(exc.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


class Server:
    """Serves the port until it is told to stop, which it never is: the machine is switched off."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.selector = selectors.DefaultSelector()
        self.children: dict[int, Child] = {}
        self.inbox = b""
        wake_read, wake_write = socket.socketpair()
        wake_read.setblocking(False)
        wake_write.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
        self.wake, self.wake_write = wake_read, wake_write
        self.selector.register(wake_read, selectors.EVENT_READ, self.reap)
        self.selector.register(port, selectors.EVENT_READ, self.receive)

    def send(self, message: dict[str, Any]) -> None:
        """Write one line; a port takes part of it at a time."""
        data = json.dumps(message).encode() + b"\n"
        while data:
            try:
                data = data[os.write(self.port, data) :]
            except OSError:
                time.sleep(0.01)  # nobody is connected on the other side

    def run(self) -> None:
        """Serve."""
        self.send({"ready": True, "versions": {"python": sys.version.split()[0]}})
        while True:
            for key, _ in self.selector.select():
                key.data()

    def receive(self) -> None:
        """Take what the host has written."""
        try:
            data = os.read(self.port, 1 << 16)
        except OSError:
            data = b""
        if not data:
            time.sleep(0.01)  # not connected
            return
        *lines, self.inbox = (self.inbox + data).split(b"\n")
        for line in lines:
            if not line:
                continue
            request = json.loads(line)
            try:
                self.handle(request)
            except Exception as exc:
                self.send({"id": request.get("id"), "out": f"{exc!r}\n"})
                self.send({"id": request.get("id"), "end": 127})

    def handle(self, request: dict[str, Any]) -> None:
        """Do what one line asks for."""
        do = request["do"]
        if do == "start":
            child = Child(request)
            self.children[child.id] = child
            self.selector.register(child.out, selectors.EVENT_READ, lambda: self.forward(child))
            if child.result_fd >= 0:
                self.selector.register(child.result_fd, selectors.EVENT_READ, lambda: self.collect(child))
            return
        child = self.children.get(request.get("of"))  # type: ignore[arg-type, assignment]
        if do == "signal":
            if child is not None:
                os.killpg(child.pid, request["number"])
        elif do == "input":
            if child is not None:
                os.write(child.stdin, base64.b64decode(request["data"]))
        elif do == "write":
            path = Path(request["path"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(request["data"]))
            path.chmod(request["mode"])
        elif do == "preload":
            importlib.invalidate_caches()
            exec(compile(request["code"], "<preload>", "exec"), {})
        elif do == "personalize":
            self.personalize(request)
        else:
            raise ValueError(f"no such request: {do}")
        self.send({"id": request["id"], "end": 0})

    @staticmethod
    def personalize(request: dict[str, Any]) -> None:
        """Become a machine of its own."""
        with open("/dev/urandom", "wb", buffering=0) as device:
            device.write(base64.b64decode(request["seed"]))
            fcntl.ioctl(device, RNDADDENTROPY_RESEED)
        random.seed()
        time.clock_settime(time.CLOCK_REALTIME, request["time_s"])
        socket.sethostname(request["hostname"])

    def forward(self, child: Child) -> None:
        """Send on what a child has written."""
        if child.out < 0:
            return  # finished in the same turn
        data = os.read(child.out, 1 << 15)
        if data:
            self.send({"id": child.id, "out": data.decode(errors="replace")})
        else:
            self.selector.unregister(child.out)
            os.close(child.out)
            child.out = -1

    def collect(self, child: Child) -> None:
        """Take a part of a child's result."""
        if child.result_fd < 0:
            return
        data = os.read(child.result_fd, 1 << 16)
        if data:
            child.result.append(data)
        else:
            self.selector.unregister(child.result_fd)
            os.close(child.result_fd)
            child.result_fd = -1

    def reap(self) -> None:
        """See which children have ended."""
        with contextlib.suppress(BlockingIOError):
            self.wake.recv(4096)
        for child in list(self.children.values()):
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                self.finish(child, os.waitstatus_to_exitcode(status))

    def finish(self, child: Child, code: int) -> None:
        """Report the end of a child, after everything it wrote; what its own children hold open is not waited for."""
        for fd, take in ((child.out, self.forward), (child.result_fd, self.collect)):
            if fd >= 0:
                os.set_blocking(fd, False)
                with contextlib.suppress(BlockingIOError):
                    while (child.out if fd == child.out else child.result_fd) == fd:
                        take(child)
        for fd in (child.out, child.result_fd):
            if fd >= 0:
                self.selector.unregister(fd)
                os.close(fd)
        os.close(child.stdin)
        del self.children[child.id]
        answer: dict[str, Any] = {"id": child.id, "end": code}
        if child.result:
            answer["result"] = json.loads(b"".join(child.result))
        self.send(answer)


def main() -> None:
    """Warm up, then serve."""
    port = open_port()
    if "ism.cold" not in Path("/proc/cmdline").read_text():
        warm_up()
    # RNDRESEEDCRNG is harmless here and proves that the ioctl is there before a test depends on it.
    with contextlib.suppress(OSError), open("/dev/urandom", "wb", buffering=0) as device:
        fcntl.ioctl(device, RNDADDENTROPY_RESEED, struct.pack("i", 0))
    Server(port).run()


if __name__ == "__main__":
    main()

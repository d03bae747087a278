# SPDX-License-Identifier: Apache-2.0
"""The two ends, seen by the process that directs them: start, tell, hear, and start again after a failure.

Also the manager they connect to, in a directory of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ism import paths
from ism.errors import IsmError
from ism.memory import PAGE_SIZE, create_memfd
from ism.perf.versus.end import LIMIT_S

_START_S: Final = 30.0
_END_S: Final = 5.0
_GRACE_S: Final = 10.0
_CAUSE_S: Final = 0.5
"""How long the other end is waited for when one has failed: the cause may be there."""
_ENDS_WITH_PARENT: Final = ("setpriv", "--pdeathsig", "TERM", "--") if shutil.which("setpriv") else ()


class PairError(IsmError):
    """An end failed, died, or did not answer."""


@contextlib.contextmanager
def manager(directory: Path) -> Iterator[dict[str, str]]:
    """Run a manager. Yields the environment of a program that uses it. Raises PairError."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ISM_SMC", "ISM_DEVICE"))}
    command = [*_ENDS_WITH_PARENT, sys.executable, "-m", "ism", "manager", "--quiet", "--run-dir", str(directory)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            deadline_s = time.monotonic() + _START_S
            while not paths.control_socket(directory).exists():
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise PairError("the manager did not start; its error is above")
                time.sleep(0.02)
            device = f"vfio-user:{paths.device_socket(directory)}"
            yield environment | {"ISM_DEVICE": device, "ISM_SMC": "require", "ISM_RUN_DIR": str(directory)}
        finally:
            process.terminate()


class _Process:
    """One end. Attributes: `role`, `lines` (heard, not yet taken)."""

    def __init__(self, role: str, cpu: int | None, fd: int, directory: Path, environment: dict[str, str]) -> None:
        place = "-" if cpu is None else str(cpu)
        self.role, self._rest = role, b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ism.perf.versus.end", role, place, str(fd), str(directory)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[fd], env=environment,
        )  # fmt: skip
        self.lines: list[dict[str, Any]] = []

    def tell(self, **command: Any) -> None:
        """Send a command. Raises PairError."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as exc:
            raise PairError(f"the {self.role} end has gone: {exc}") from exc

    def read(self) -> None:
        """Take in what there is. Raises PairError at the end."""
        assert self.process.stdout is not None
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        if not data:
            raise PairError(f"the {self.role} end ended by itself, status {self.process.wait(_END_S)}")
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.lines += (json.loads(line) for line in lines)

    def end(self, *, at_once: bool) -> None:
        """Let it end, or make it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if at_once:
            self.process.kill()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Pair:
    """Both ends, in one placement. Attributes: `cpus` (near, far), None: wherever the scheduler puts them."""

    def __init__(self, cpus: tuple[int, int] | None, environment: dict[str, str]) -> None:
        self.cpus, self._environment = cpus, environment
        self._directory = tempfile.TemporaryDirectory(prefix="ism-ends-")
        self._fd = create_memfd("ism-probe", PAGE_SIZE)
        self._ends: list[_Process] = []
        self._starts = 0

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.stop(at_once=kind is not None)
        os.close(self._fd)
        self._directory.cleanup()

    def stop(self, *, at_once: bool = False) -> None:
        """End both, `at_once`: in the middle of what they do. The next command starts them again."""
        ends, self._ends = self._ends, []
        for end in ends:
            end.end(at_once=at_once)

    def pids(self) -> list[int]:
        """Return the processes of both ends, as far as they are started."""
        return [end.process.pid for end in self._ends]

    def _both(self) -> list[_Process]:
        if not self._ends:
            os.ftruncate(self._fd, PAGE_SIZE)
            os.pwrite(self._fd, bytes(PAGE_SIZE), 0)
            near, far = self.cpus or (None, None)
            self._starts += 1
            directory = Path(self._directory.name) / str(self._starts)  # a killed end leaves its sockets behind
            directory.mkdir()
            self._ends = [
                _Process(role, cpu, self._fd, directory, self._environment)
                for role, cpu in (("near", near), ("far", far))
            ]
            self.together("ready")
        return self._ends

    def _hear(self, wanted: _Process, timeout_s: float) -> dict[str, Any]:
        """Return the next line of one end, unless the other one fails meanwhile. Raises PairError."""
        deadline_s = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            for end in self._ends:
                assert end.process.stdout is not None
                selector.register(end.process.stdout, selectors.EVENT_READ, end)
            while True:
                found = [
                    f"{end.role} end: {line['error']}" for end in self._ends for line in end.lines if "error" in line
                ]
                if len(found) == len(self._ends) or (found and time.monotonic() > deadline_s):
                    raise PairError("; ".join(found))
                if found:
                    deadline_s = min(deadline_s, time.monotonic() + _CAUSE_S)
                elif wanted.lines:
                    return wanted.lines.pop(0)
                if (left_s := deadline_s - time.monotonic()) <= 0 and not found:
                    raise PairError(f"the {wanted.role} end did not answer in {timeout_s:g} s")
                for key, _ in selector.select(max(left_s, 0.0)):
                    try:
                        key.data.read()
                    except PairError as exc:
                        raise PairError("; ".join([*found, str(exc)])) from exc

    def together(self, do: str) -> list[Any]:
        """Let both do the same at once. Returns both results, the near end's first. Raises PairError."""
        ends = self._ends or self._both()
        for end in ends:
            end.tell(do=do)
        return [self._hear(end, LIMIT_S + _GRACE_S)["result"] for end in ends]

    def probe(self) -> tuple[float | None, float]:
        """Look where the ends are. Raises PairError.

        Returns: the round trip of a cache line between both, seconds, None: could not be taken; the turn of a loop in
            Python on the slower of both CPUs, seconds.
        """
        (near_s, near_count_s), (_, far_count_s) = self.together("probe")
        return near_s, max(near_count_s, far_count_s)

    def memcpy(self, size: int, seconds: float) -> dict[str, Any]:
        """Let the near end copy. Raises PairError."""
        near = self._both()[0]
        near.tell(do="memcpy", size=size, seconds=seconds)
        result: dict[str, Any] = self._hear(near, LIMIT_S + _GRACE_S)["result"]
        return result

    def sample(self, peer: str, script: dict[str, Any], spin_us: int | None = None) -> dict[str, Any]:
        """Take one sample. Raises PairError, after which both ends are new."""
        try:
            near, far = self._both()
            far.tell(do="serve", peer=peer, size=script["size"], spin_us=spin_us)
            address = self._hear(far, LIMIT_S)["address"]
            near.tell(do="run", peer=peer, address=address, script=script, spin_us=spin_us)
            result: dict[str, Any] = self._hear(near, LIMIT_S + _GRACE_S)["result"]
            self._hear(far, LIMIT_S + _GRACE_S)
        except PairError:
            self.stop(at_once=True)
            raise
        return result

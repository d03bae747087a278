# SPDX-License-Identifier: Apache-2.0
"""QEMU's machine protocol, as much of it as starting, saving and changing a machine takes. Blocking, one thread.

Source: QEMU's documentation, "QMP": lines of JSON on a UNIX socket; a greeting, then one answer a command, events in
between.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from ism.errors import IsmError


class QmpError(IsmError):
    """QEMU refused a command, or does not answer. Attributes: `command`."""

    def __init__(self, command: str, problem: str) -> None:
        self.command = command
        super().__init__(f"QEMU: {command}: {problem}")


class Qmp:
    """A connection to one QEMU."""

    def __init__(self, path: Path, *, timeout_s: float = 60.0) -> None:
        """Connect and leave the negotiation mode. Raises QmpError, OSError."""
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(timeout_s)
        self._file = self._sock.makefile("r")
        try:
            self._sock.connect(str(path))
            self._next()
            self.run("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def run(self, command: str, **arguments: Any) -> Any:
        """Run a command; underscores of argument names become dashes. Returns: its `return`. Raises QmpError."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._sock.sendall(json.dumps({"execute": command, "arguments": named}).encode() + b"\n")
        while True:
            try:
                answer = self._next()
            except OSError as exc:
                raise QmpError(command, f"no answer: {exc}") from exc
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise QmpError(command, answer["error"].get("desc", "refused"))

    def close(self) -> None:
        """Close the connection."""
        self._file.close()
        self._sock.close()

    def _next(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            raise ConnectionError("QEMU is gone")
        message: dict[str, Any] = json.loads(line)
        return message

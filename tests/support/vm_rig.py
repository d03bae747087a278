# SPDX-License-Identifier: Apache-2.0
"""Programs inside guests, and a driver in a guest that a test uses call by call."""

from __future__ import annotations

import json
from typing import Any

from ism.guests.guest import Guest

ANSWER_S = 60.0

_INTERPRETER = """
import json, sys, traceback
scope = {}
print("interpreter", flush=True)
for line in sys.stdin:
    code, argument = json.loads(line)
    scope["argument"], scope["result"] = argument, None
    try:
        exec(code, scope)
        print("=" + json.dumps(["result", scope["result"]]), flush=True)
    except BaseException as exc:
        traceback.print_exc()
        print("=" + json.dumps(["error", type(exc).__name__, str(exc)]), flush=True)
"""


class InGuestError(Exception):
    """An exception in the guest. Attributes: `kind` (its class)."""

    def __init__(self, kind: str, text: str) -> None:
        self.kind = kind
        super().__init__(f"{kind}: {text}")


class Interpreter:
    """Python in a guest, statement by statement; variables stay. `result` is what a call returns."""

    def __init__(self, guest: Guest) -> None:
        self._process = guest.start_python(_INTERPRETER)
        self._process.wait_line("interpreter", ANSWER_S)

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.signal(9)
        assert self._process.wait(ANSWER_S) == -9

    def __call__(self, code: str, argument: Any = None, *, timeout_s: float = ANSWER_S) -> Any:
        """Run code; raises InGuestError for what it raises."""
        self._process.send(json.dumps([code, argument]).encode() + b"\n")
        kind, *answer = json.loads(self._process.wait_line(lambda line: line.startswith("="), timeout_s)[1:])
        if kind == "error":
            raise InGuestError(*answer)
        return answer[0]


class GuestDriver(Interpreter):
    """An open device in a guest: `d`; regions by name in `r`."""

    def __init__(
        self,
        guest: Guest,
        device: str | None = None,
        environment: dict[str, str] | None = None,
        constants: dict[str, str] | None = None,
    ) -> None:
        """Open a device. Args: `constants`: of `ism.driver.function`, as Python source."""
        super().__init__(guest)
        self(
            "import os, select\n"
            "os.environ.update(argument[1])\n"
            "from ism.driver import function\n"
            "for name, value in argument[2].items(): setattr(function, name, eval(value))\n"
            "from ism.driver.select import open_device\n"
            "from ism.virtio.ism_spec import Permission\n"
            "d = open_device(argument[0])\n"
            "r = {}\n",
            [device, environment or {}, constants or {}],
        )
        self.devid: int = self("result = d.devid")

    def alloc(self, name: str, size: int) -> int:
        """Make a region; returns its token."""
        token: int = self("r[argument[0]] = d.alloc(argument[1]); result = r[argument[0]].token", [name, size])
        return token

    def grant(self, name: str, permissions: int, peer: int | None = None) -> None:
        """Grant rights for a region."""
        code = "from ism.ids import DevId\nr[argument[0]].grant(Permission(argument[1]), argument[2])"
        self(code, [name, permissions, peer])

    def attach(self, name: str, token: int, rights: int = 0, *, interrupt: bool = True) -> None:
        """Attach to a region."""
        code = "r[argument[0]] = d.attach(argument[1], Permission(argument[2]), interrupt=argument[3])"
        self(code, [name, token, rights, interrupt])

    def write(self, name: str, offset: int, data: str) -> None:
        """Store bytes in a region, whatever the rights."""
        code = (
            "import ctypes\nname, at, text = argument\nctypes.memmove(r[name].address + at, text.encode(), len(text))"
        )
        self(code, [name, offset, data])

    def read(self, name: str, offset: int, length: int) -> str:
        """Load bytes of a region; NULs as dots."""
        code = "name, at, n = argument; result = bytes(r[name].view[at:at + n]).replace(b'\\0', b'.').decode('latin-1')"
        text: str = self(code, [name, offset, length])
        return text

    def ring(self, name: str) -> None:
        """Ring a region's doorbell."""
        self("r[argument].ring()", name)

    def wait_rung(self, name: str) -> None:
        """Wait until a region was rung, and take it."""
        code = (
            "from ism.eventfd import drain\n"
            "ready, _, _ = select.select([r[argument]], [], [], 30)\n"
            "assert ready, 'no doorbell came'\n"
            "os.read(r[argument].fileno(), 8)"
        )
        self(code, name)

    def close(self, name: str) -> None:
        """Let a region go."""
        self("r.pop(argument).close(); import gc; gc.collect()", name)

# SPDX-License-Identifier: Apache-2.0
"""`python -m ism.perf.versus.end near|far CPU FD DIRECTORY`: one of the two ends, told what to do line by line.

Commands come by standard input and results go to standard output, one JSON object a line: see `COMMANDS`. CPU is a
number or "-". FD is the memory file of `probe`. DIRECTORY is for sockets with names. A command that takes longer than
LIMIT_S ends the process, whatever it waits for.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from ism.perf.versus.probe import Probe

LIMIT_S: Final = 60
_SPIN: Final = "ISM_SMC_SPIN_US"


class End:
    """One end. Attributes: `near`."""

    def __init__(self, *, near: bool, fd: int, directory: Path) -> None:
        self.near, self._fd, self._directory = near, fd, directory
        self._probe: Probe | None = None

    def _say(self, **message: Any) -> None:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()

    def ready(self, _: dict[str, Any]) -> Any:
        """Compile everything that is compiled."""
        from ism.perf.versus.probe import Probe
        from ism.shm import compile_kernels
        from ism.smc.default import open_default

        compile_kernels()
        open_default()
        self._probe = Probe(self._fd, near=self.near)

    def probe(self, _: dict[str, Any]) -> Any:
        """Play with the other end, then count. Returns seconds a round trip, or None; and of a turn of a loop."""
        from ism.perf.versus.probe import count_s

        assert self._probe is not None
        return [self._probe.run(), count_s()]

    def serve(self, command: dict[str, Any]) -> None:
        """Far: play `peer` for one connection with messages of `size`. Says the address first."""
        from ism.perf.versus.catalog import BY_NAME

        _set_spin(command["spin_us"])
        peer = BY_NAME[command["peer"]].load()
        peer.serve(self._directory, command["size"], lambda address: self._say(address=address))

    def run(self, command: dict[str, Any]) -> dict[str, Any]:
        """Near: take one sample of `peer`, which serves at `address`, by `script`."""
        from ism.perf.versus.catalog import BY_NAME
        from ism.perf.versus.figures import Script

        _set_spin(command["spin_us"])
        return BY_NAME[command["peer"]].load().run(command["address"], Script(**command["script"])).as_json()

    def memcpy(self, command: dict[str, Any]) -> dict[str, Any]:
        """Near: copy messages of `size` from and to the same place for `seconds`."""
        from ism.perf.versus.copying import copy

        return copy(command["size"], command["seconds"]).as_json()

    def obey(self) -> None:
        """Do what standard input says, until it ends."""
        does: dict[str, Callable[[dict[str, Any]], Any]] = {name: getattr(self, name) for name in COMMANDS}
        for line in sys.stdin:
            command = json.loads(line)
            signal.alarm(LIMIT_S)
            try:
                result = does[command["do"]](command)
            except Exception as exc:
                traceback.print_exc(limit=-4)
                self._say(error=f"{type(exc).__name__}: {exc}")
            else:
                self._say(result=result)
            finally:
                signal.alarm(0)


COMMANDS: Final = ("ready", "probe", "serve", "run", "memcpy")


def _set_spin(spin_us: int | None) -> None:
    """Set how long sockets over shared memory spin; None: as long as they do by themselves."""
    if spin_us is None:
        os.environ.pop(_SPIN, None)
    else:
        os.environ[_SPIN] = str(spin_us)


def main(role: str, cpu: str, fd: str, directory: str) -> None:
    """Take the CPU before anything makes a thread, and begin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever directs this end is told, and ends it
    if cpu != "-":
        os.sched_setaffinity(0, {int(cpu)})
    End(near=role == "near", fd=int(fd), directory=Path(directory)).obey()


if __name__ == "__main__":
    main(*sys.argv[1:])

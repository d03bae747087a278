# SPDX-License-Identifier: Apache-2.0
"""Real guests for the tests of this folder: made once from packages, restored for each test."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ism.guests.lab import Lab, Parts, ready
from ism.guests.store import SetupError
from ism.vmm.errors import AgentBuildError

MakeLab = Callable[..., Lab]


@pytest.fixture(scope="session")
def parts() -> Parts:
    """Everything guests are made from. Skips when it cannot be fetched; once it is there, nothing is skipped."""
    try:
        return ready(progress=lambda line: print(f"vm: {line}"))
    except SetupError as exc:
        if exc.fetching:
            pytest.skip(f"no guests: {exc}")
        raise
    except AgentBuildError as exc:
        if shutil.which("cc") or shutil.which("gcc"):
            raise
        pytest.skip(f"no guests: {exc}")


@pytest.fixture
def make_lab(parts: Parts) -> Iterator[MakeLab]:
    """A maker of labs, ended with the test; what went wrong in them is printed when the test fails."""
    labs: list[Lab] = []

    def make(*args: Any, **kwargs: Any) -> Lab:
        lab = Lab(parts, *args, **kwargs)
        labs.append(lab)
        return lab

    yield make
    for lab in reversed(labs):
        for guest in lab.guests.values():
            print(f"=== {guest.name}\n{guest.machine.log()}")
        print(f"=== manager\n{lab.manager_log()}")
        lab.close()

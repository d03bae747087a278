# SPDX-License-Identifier: Apache-2.0
"""Builds the map agent (`agent.c`), the library QEMU is started with in LD_PRELOAD, with the host's compiler.

Owns the file in the cache. It is loaded into other processes, so only a file, in a directory, that nobody but the
caller can change is used. Never loads the library itself; what it does is said at the head of `agent.c`.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from ism.paths import make_folders, untrusted
from ism.vmm.errors import AgentBuildError

SOURCE: Final = Path(__file__).with_name("agent.c")
FLAGS: Final = (
    *("-std=gnu11", "-O2", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-fstack-protector-strong"),
    *("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror"),
    *("-Wl,-z,relro", "-Wl,-z,now", "-Wl,-z,defs"),
)
LIBRARIES: Final = ("-ldl",)
COMPILERS: Final = ("cc", "gcc", "clang")

_TIMEOUT_S: Final = 120
_MESSAGE_LINES: Final = 4
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


def agent_library(cache_dir: Path | None = None) -> Path:
    """Return the map agent, built unless the cache has it: the path to name in LD_PRELOAD.

    Args:
        cache_dir: where the library is kept; made when it is missing. None: XDG_CACHE_HOME/ism, else ~/.cache/ism.
    Returns: an absolute path; the file's name changes with the source, the flags and the machine.
    Raises: AgentBuildError when there is no compiler ($CC, else cc, gcc or clang), when it fails, or when the cache
        cannot be written, can be written by others, or cannot be named in LD_PRELOAD (spaces, colons).
    """
    source = SOURCE.read_bytes()
    what = "\0".join((*FLAGS, *LIBRARIES, platform.machine()))
    digest = hashlib.sha256(source + b"\0" + what.encode()).hexdigest()[:16]
    directory = (_default_cache() if cache_dir is None else cache_dir).absolute()
    result = directory / f"agent-{digest}.so"
    if any(letter in str(result) for letter in ": \t\n"):
        raise AgentBuildError(
            f"LD_PRELOAD cannot name {str(result)!r}, with a space or colon in it; name another cache with "
            "XDG_CACHE_HOME"
        )
    try:
        make_folders(directory)
        changeable = untrusted(directory)
        if changeable is not None:
            raise AgentBuildError(
                f"the map agent's cache {directory} is not safe: {changeable} belongs to somebody else, or others may "
                "write to it; chmod go-w it, or name another one with XDG_CACHE_HOME"
            )
        if not _is_private(result):
            _build(source, result)
    except OSError as error:
        raise AgentBuildError(
            f"the map agent cannot be kept in {directory}: {error.strerror or error}; name another cache with "
            "XDG_CACHE_HOME"
        ) from error
    return result


def _default_cache() -> Path:
    explicit = os.environ.get("XDG_CACHE_HOME", "")
    # relative paths are to be ignored (XDG Base Directory Specification)
    base = Path(explicit) if explicit.startswith("/") else Path.home() / ".cache"
    return base / "ism"


def _is_private(path: Path) -> bool:
    """Whether it is there, a file, the caller's, and nobody else may write to it."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & _OTHERS_WRITE


def _compiler() -> list[str]:
    explicit = shlex.split(os.environ.get("CC", ""))
    for name in (explicit[0],) if explicit else COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return [found, *explicit[1:]]
    tried = f"$CC is {explicit[0]!r}, which is not there" if explicit else f"none of {', '.join(COMPILERS)} is there"
    raise AgentBuildError(f"the map agent for QEMU needs a C compiler: {tried}; apt-get install gcc libc6-dev")


def _build(source: bytes, result: Path) -> None:
    compiler = _compiler()
    handle, name = tempfile.mkstemp(prefix=".agent-", suffix=".so", dir=result.parent)
    os.close(handle)
    made = Path(name)
    try:
        # the source that was hashed, whatever its file holds by now
        command = [*compiler, *FLAGS, "-x", "c", "-", "-o", name, "-x", "none", *LIBRARIES]
        _run(command, source)
        made.chmod(0o644)
        made.replace(result)
    finally:
        made.unlink(missing_ok=True)


def _run(command: list[str], source: bytes) -> None:
    try:
        done = subprocess.run(
            command,
            input=source,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as error:
        raise AgentBuildError(f"{command[0]} did not build the map agent within {_TIMEOUT_S} s") from error
    except OSError as error:
        raise AgentBuildError(f"the C compiler {command[0]} cannot be run: {error.strerror or error}") from error
    if done.returncode != 0:
        text = done.stderr.decode(errors="replace").strip().splitlines()[:_MESSAGE_LINES]
        said = " | ".join(line.strip() for line in text) or f"exit status {done.returncode}"
        raise AgentBuildError(
            f"{command[0]} cannot build the map agent: {said} (headers missing? apt-get install gcc libc6-dev)"
        )

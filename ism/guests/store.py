# SPDX-License-Identifier: Apache-2.0
"""The cache of what virtual machines are made from: `~/.cache/ism-vm`, or ISM_VM_CACHE.

It owns the folder and one rule: an entry is named by a hash of everything it was made from, is built beside its place
and appears there whole, or not at all. So two builders at once do no harm and a killed one leaves only litter, which
the next one removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ism.errors import IsmError
from ism.paths import make_folders, untrusted


class SetupError(IsmError):
    """Something that virtual machines are made from cannot be had here.

    Attributes: `step` (what was being done), `fetching` (True: the network or a registry is the cause).
    """

    def __init__(self, step: str, problem: str, *, fetching: bool = False) -> None:
        self.step, self.fetching = step, fetching
        super().__init__(f"{step}: {problem}")


Progress = Callable[[str], None]
"""Told what is being done, a line each time."""


def silent(_: str) -> None:
    """Report progress to nobody."""


def key_of(*parts: object) -> str:
    """Name what is made from `parts`: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        text = str(part).encode()
        digest.update(b"%d:" % len(text) + text)
    return digest.hexdigest()[:16]


class Store:
    """The cache folder. Make one with `Store.default()`."""

    def __init__(self, folder: Path) -> None:
        """Raises SetupError when the folder cannot be made."""
        self.folder = folder
        try:
            make_folders(folder.absolute())
            changeable = untrusted(folder)
        except OSError as exc:
            raise SetupError("cache", f"{folder}: {exc.strerror}; name another folder in ISM_VM_CACHE") from exc
        if changeable is not None:
            raise SetupError(
                "cache",
                f"{folder} is not safe: {changeable} belongs to somebody else, or others may write to it, and what is "
                "in the cache is run. Name another folder in ISM_VM_CACHE",
            )

    @classmethod
    def default(cls) -> Store:
        """Open the user's cache: ISM_VM_CACHE, else XDG_CACHE_HOME/ism-vm, else ~/.cache/ism-vm."""
        explicit = os.environ.get("ISM_VM_CACHE")
        if explicit:
            return cls(Path(explicit).expanduser().absolute())
        base = os.environ.get("XDG_CACHE_HOME")
        return cls((Path(base) if base else Path.home() / ".cache") / "ism-vm")

    def path(self, name: str) -> Path:
        """Say where an entry is or would be."""
        return self.folder / name

    def entry(self, name: str, build: Callable[[Path], None]) -> Path:
        """Return the entry's path; `build(place)` makes it at `place`, a file or folder, if it is not there.

        Raises: whatever `build` raises; SetupError when the disk does not take it.
        """
        path = self.path(name)
        if path.exists():
            os.utime(path)  # used lately: `prune` keeps it
            return path
        with self._locked(name):
            if path.exists():
                return path
            self._remove_litter(name)
            scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=self.folder))
            try:
                place = scratch / "made"
                build(place)
                os.rename(place, path)
            except OSError as exc:
                raise SetupError(name, f"{exc.filename or self.folder}: {exc.strerror}") from exc
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        return path

    def prune(self, prefix: str, keep: int) -> None:
        """Remove all but the `keep` entries used last whose names begin with `prefix`."""
        used: list[tuple[float, Path]] = []
        for path in self.folder.glob(f"{prefix}*"):
            with contextlib.suppress(FileNotFoundError):
                used.append((path.stat().st_mtime, path))
        for _, path in sorted(used, reverse=True)[keep:]:
            litter = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=self.folder))
            with contextlib.suppress(FileNotFoundError):
                path.rename(litter / "old")  # gone as a whole, before a part of it is
            shutil.rmtree(litter, ignore_errors=True)

    def _remove_litter(self, name: str) -> None:
        for left in self.folder.glob(f".{name}.*"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        fd = os.open(self.folder / f".{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

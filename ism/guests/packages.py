# SPDX-License-Identifier: Apache-2.0
"""Debian packages without installing anything: an apt with folders of its own, and dpkg-deb to unpack.

It owns a folder of package lists and files in the cache. It never touches the host's package state and needs no root.
What is fetched is checked by apt against Debian's signatures (package debian-archive-keyring). Sources: apt-get(8),
apt.conf(5), dpkg-deb(1).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from ism.guests.store import Progress, SetupError, Store

SUITE: Final = "trixie"
BACKPORTS: Final = "trixie-backports"
ARCHITECTURE: Final = "amd64"
_KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
_MIRROR: Final = "http://deb.debian.org/debian"
_URI = re.compile(r"^'([^']+)' (\S+) (\d+)")
_TRIES: Final = 3
_UNREACHABLE: Final = re.compile(
    "resolv|connect|timed? ?out|unreachable|refused|reset|Failed to fetch|Temporary failure|Service Unavailable", re.I
)
"""How apt and pip speak of a network or a registry that is not there; everything else is an error of the recipe."""
_LINKS: Final = ("bin", "lib", "lib64", "sbin")


def unreachable(said: str) -> bool:
    """Tell whether what a program said before it failed means that the network, or a registry, is not there."""
    return _UNREACHABLE.search(said) is not None


def _telling(lines: Sequence[str]) -> str:
    """Pick the line that says most: the first that names what could not be had, else the last."""
    for line in lines:
        if "Failed to fetch" in line or "No space left" in line:
            return f"{line} (the mirror is named by ISM_VM_MIRROR)" if "Failed to fetch" in line else line
    return lines[-1] if lines else ""


@dataclass(frozen=True, slots=True)
class Deb:
    """A package file: its name in the archive, which holds name, version and architecture."""

    file: str

    @property
    def package(self) -> str:
        """The package's name."""
        return self.file.split("_", 1)[0]

    @property
    def version(self) -> str:
        """The package's version."""
        return unquote(self.file.split("_")[1])


class Apt:
    """An apt of our own for one suite and its backports."""

    def __init__(self, store: Store, progress: Progress) -> None:
        """Raises SetupError when the host has no apt, dpkg-deb or keyring."""
        self._folder = store.path("apt")
        self._progress = progress
        for tool in ("apt-get", "apt-cache", "dpkg-deb", "tar"):
            if shutil.which(tool) is None:
                raise SetupError("packages", f"there is no {tool}: guests are made on Debian", fetching=True)
        if not Path(_KEYRING).exists():
            raise SetupError("packages", f"no {_KEYRING}: apt-get install debian-archive-keyring", fetching=True)
        for part in ("state/lists/partial", "lists/partial", "cache/archives/partial"):
            (self._folder / part).mkdir(parents=True, exist_ok=True)
        (self._folder / "status").touch()
        mirror = os.environ.get("ISM_VM_MIRROR", _MIRROR)
        (self._folder / "sources.list").write_text(
            "".join(f"deb [signed-by={_KEYRING}] {mirror} {suite} main\n" for suite in (SUITE, BACKPORTS))
        )
        folder = self._folder
        values = {
            "Dir::State": folder / "state",
            "Dir::State::status": folder / "status",
            "Dir::State::lists": folder / "lists",
            "Dir::Cache": folder / "cache",
            "Dir::Etc::sourcelist": folder / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::parts": "/dev/null",
            "APT::Architecture": ARCHITECTURE,
            "APT::Architectures": ARCHITECTURE,
            "APT::Sandbox::User": "root",
            "APT::Update::Error-Mode": "any",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "Acquire::http::Timeout": "60",
        }
        # A file, not options: the host's own files, with their hooks, are read before options count.
        self._config = folder / "apt.conf"
        self._config.write_text("".join(f'{key} "{value}";\n' for key, value in values.items()))

    def update(self) -> None:
        """Fetch the lists. Raises SetupError(fetching)."""
        self._progress("package lists")
        self._run(["apt-get", "-qq", "update"], "package lists", tries=_TRIES)

    def resolve(self, packages: Sequence[str]) -> tuple[Deb, ...]:
        """Name the packages and everything they need, nothing taken as installed; `name/suite` as apt has it.

        Raises: SetupError.
        """
        out = self._run(
            ["apt-get", "-y", "-qq", "--print-uris", "--no-install-recommends", "install", *packages],
            "packages",
        )
        found = [match[2] for line in out.splitlines() if (match := _URI.match(line))]
        # Files that are fetched already are not printed; a simulation names everything.
        plan = self._run(["apt-get", "-y", "-s", "--no-install-recommends", "install", *packages], "packages")
        versions = dict(re.findall(r"^Inst (\S+) \(([^ ]+) ", plan, re.MULTILINE))
        known = {Deb(name).package for name in found}
        for package, version in versions.items():
            if package not in known:
                found.append(self._file_there(package, version))
        return tuple(sorted((Deb(name) for name in found), key=lambda deb: deb.package))

    def fetch(self, packages: Sequence[str]) -> None:
        """Fetch the package files of `packages` and all they need. Raises SetupError(fetching)."""
        self._run(
            [
                "apt-get", "-y", "-qq", "--download-only", "--no-install-recommends",
                "install", *packages,
            ],
            "packages",
            tries=_TRIES,
        )  # fmt: skip

    def fetch_alone(self, package: str, version: str = "") -> Deb:
        """Fetch one package without what it needs. Raises SetupError(fetching)."""
        archives = self._folder / "cache" / "archives"
        wanted = f"{package}={version}" if version else package
        self._run(["apt-get", "-qq", "download", wanted], package, tries=_TRIES, cwd=archives)
        files = sorted(archives.glob(f"{package}_*.deb"), key=lambda file: file.stat().st_mtime)
        if not files:
            raise SetupError("packages", f"apt fetched no file for {package}")
        return Deb(files[-1].name)

    def depends(self, package: str) -> str:
        """Name the first package that `package` (`name/suite` allowed) depends on. Raises SetupError."""
        name, _, suite = package.partition("/")
        out = self._run(["apt-cache", "show", name], package)
        wanted = self._version_in(name, suite or SUITE)
        for stanza in out.split("\n\n"):
            version = re.search(r"^Version: (\S+)", stanza, re.MULTILINE)
            depends = re.search(r"^Depends: (\S+)", stanza, re.MULTILINE)
            if version and depends and version[1] == wanted:
                return depends[1].rstrip(",")
        raise SetupError("packages", f"{package} depends on nothing")

    def unpack(self, debs: Sequence[Deb], root: Path) -> None:
        """Unpack package files into a root with merged /usr. Maintainer scripts are not run. Raises SetupError."""
        for name in _LINKS:
            (root / "usr" / name).mkdir(parents=True, exist_ok=True)
            if not (root / name).is_symlink():
                (root / name).symlink_to(f"usr/{name}")
        for deb in debs:
            file = self._folder / "cache" / "archives" / deb.file
            with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", file], stdout=subprocess.PIPE) as source:
                taken = subprocess.run(
                    ["tar", "x", "--keep-directory-symlink", "--no-same-owner", "-C", root],
                    stdin=source.stdout, capture_output=True, check=False,
                )  # fmt: skip
            if source.returncode or taken.returncode:
                raise SetupError(
                    "unpack", f"{file.name}: {_telling(taken.stderr.decode(errors='replace').strip().splitlines())}"
                )

    def _version_in(self, package: str, suite: str) -> str:
        out = self._run(["apt-cache", "madison", package], package)
        for line in out.splitlines():
            columns = [column.strip() for column in line.split("|")]
            if len(columns) == 3 and f" {suite}/" in columns[2]:
                return columns[1]
        raise SetupError("packages", f"there is no {package} in {suite}")

    def _file_there(self, package: str, version: str) -> str:
        stem = f"{package.partition(':')[0]}_{version.replace(':', '%3a')}_"
        for file in (self._folder / "cache" / "archives").glob("*.deb"):
            if file.name.startswith(stem):
                return file.name
        raise SetupError("packages", f"apt names no file for {package} {version}")

    def _run(self, argv: Sequence[str | Path], what: str, *, tries: int = 1, cwd: Path | None = None) -> str:
        environment = {
            **os.environ,
            "LC_ALL": "C",
            "DEBIAN_FRONTEND": "noninteractive",
            "APT_CONFIG": str(self._config),
        }
        for attempt in range(tries):
            done = subprocess.run(
                argv, capture_output=True, text=True, check=False, env=environment, cwd=cwd or self._folder
            )
            if done.returncode == 0:
                return done.stdout
            if attempt + 1 < tries:
                self._progress(f"{what}: trying again")
        said = (done.stderr or done.stdout).strip()
        lines = said.splitlines()
        raise SetupError(
            what,
            _telling(lines) or f"{argv[0]} ended with {done.returncode}",
            fetching=unreachable(said),
        )

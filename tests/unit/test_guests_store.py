# SPDX-License-Identifier: Apache-2.0
"""The cache that virtual machines are made in: whole entries or none, one builder at a time, the used ones kept."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from ism.guests.packages import Deb
from ism.guests.store import SetupError, Store, key_of


def test_an_entry_is_built_once_and_appears_whole(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    built: list[Path] = []

    def build(place: Path) -> None:
        assert not store.path("entry").exists()
        built.append(place)
        place.mkdir()
        (place / "file").write_text("whole")
        assert not store.path("entry").exists()

    for _ in range(2):
        assert (store.entry("entry", build) / "file").read_text() == "whole"
    assert len(built) == 1
    assert [path.name for path in store.folder.iterdir() if path.name.startswith(".entry.") and path.is_dir()] == []


def test_a_failed_build_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")

    def fail(place: Path) -> None:
        place.write_text("half")
        raise SetupError("building", "no")

    with pytest.raises(SetupError, match="building: no"):
        store.entry("entry", fail)
    assert not store.path("entry").exists()
    assert store.entry("entry", lambda place: place.write_text("whole") and None).read_text() == "whole"


def test_what_a_killed_builder_left_is_removed_by_the_next(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    (tmp_path / "cache" / ".entry.left").mkdir()
    store.entry("entry", lambda place: place.touch())
    assert not (tmp_path / "cache" / ".entry.left").exists()


def test_two_builders_of_one_entry_do_not_meet(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    first_inside, go_on = threading.Event(), threading.Event()
    calls: list[int] = []

    def build(place: Path) -> None:
        calls.append(1)
        first_inside.set()
        assert go_on.wait(30)
        place.touch()

    threads = [threading.Thread(target=store.entry, args=("entry", build)) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert first_inside.wait(30)
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert calls == [1]


def test_pruning_keeps_what_was_used_last(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    for age, name in enumerate(["state-c", "state-b", "state-a"]):
        store.entry(name, lambda place: place.mkdir())
        os.utime(store.path(name), (1000 - age, 1000 - age))
    store.entry("state-a", lambda place: place.mkdir())  # used again
    (store.folder / "other").touch()
    store.prune("state-", 2)
    assert sorted(path.name for path in store.folder.iterdir() if not path.name.startswith(".")) == [
        "other",
        "state-a",
        "state-c",
    ]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="ISM_VM_CACHE"):
        Store(tmp_path / "file" / "cache")


def test_the_default_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("ISM_VM_CACHE", raising=False)
    assert Store.default().folder == tmp_path / "xdg" / "ism-vm"
    monkeypatch.setenv("ISM_VM_CACHE", str(tmp_path / "own"))
    assert Store.default().folder == tmp_path / "own"


def test_keys_tell_parts_apart() -> None:
    assert key_of("ab", "c") != key_of("a", "bc")
    assert key_of("a", 1) == key_of("a", "1")


def test_a_package_file_says_its_package_and_version() -> None:
    deb = Deb("qemu-system-x86_1%3a11.1.3+ds-1~bpo13+1_amd64.deb")
    assert (deb.package, deb.version) == ("qemu-system-x86", "1:11.1.3+ds-1~bpo13+1")

# SPDX-License-Identifier: Apache-2.0
"""The socket at a path."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from ism.errors import TransportError
from ism.vfio_user.listener import UnixListener


def refused(path: Path) -> int:
    with pytest.raises(TransportError) as caught:
        UnixListener(path)
    assert str(path) in str(caught.value)
    return caught.value.errno


def test_the_socket_is_private_unless_told_otherwise(tmp_path: Path) -> None:
    with UnixListener(tmp_path / "a"), UnixListener(tmp_path / "b", mode=0o660):
        assert stat.S_IMODE(os.lstat(tmp_path / "a").st_mode) == 0o600
        assert stat.S_IMODE(os.lstat(tmp_path / "b").st_mode) == 0o660


def test_a_stale_socket_is_replaced_and_the_path_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with UnixListener(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    assert not path.exists()


def test_a_socket_somebody_answers_on_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with UnixListener(path):
        assert refused(path) == errno.EADDRINUSE
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_a_server_of_another_kind_counts_as_somebody(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with UnixListener(path, kind=socket.SOCK_SEQPACKET):
        assert refused(path) == errno.EADDRINUSE


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_not_a_socket_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        (tmp_path / "target").write_text("precious")
        path.symlink_to(tmp_path / "target")
    assert refused(path) == errno.EEXIST
    assert path.exists()


def test_a_path_that_somebody_else_took_over_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with UnixListener(path):
        os.rename(path, tmp_path / "old")
        path.write_text("another's")
    assert path.read_text() == "another's"


def test_a_directory_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    assert refused(tmp_path / "no" / "s") == errno.ENOENT
    assert refused(tmp_path / ("x" * 200)) == errno.EINVAL

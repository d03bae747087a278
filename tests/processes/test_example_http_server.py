# SPDX-License-Identifier: Apache-2.0
"""Python's own web server and clients, unmodified, as the example's README starts them."""

from __future__ import annotations

import contextlib
import hashlib
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_examples import EXAMPLES, LIMIT_S, run_dir, running  # noqa: F401

pytestmark = pytest.mark.processes

CLIENT = EXAMPLES / "http_server" / "client.py"
UNDER_ISM = ("-m", "ism", "run")
PAGES = {"small.txt": b"a page\n", "large.bin": bytes(range(256)) * 20_000}


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    folder = tmp_path / "pages"
    folder.mkdir()
    for name, content in PAGES.items():
        (folder / name).write_bytes(content)
    return folder


@contextlib.contextmanager
def serving(pages: Path, *, under: tuple[str, ...] = UNDER_ISM, run_dir: Path) -> Iterator[str]:  # noqa: F811
    """Run the server. Lends its port; afterwards it has ended as it does when one interrupts it."""
    command = (*under, "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(pages), "0")
    with running("-u", *command, run_dir=run_dir) as server:
        assert server.stdout is not None
        found = re.match(r"Serving HTTP on 127\.0\.0\.1 port (\d+) ", server.stdout.readline())
        assert found
        yield found[1]
        server.send_signal(signal.SIGINT)
        output, errors = server.communicate(timeout=LIMIT_S)
        assert "Traceback" not in errors, errors
        assert ("Keyboard interrupt received" in output, server.returncode) == (True, 0)


def fetch(port: str, *names: str, under: tuple[str, ...] = UNDER_ISM, run_dir: Path) -> list[str]:  # noqa: F811
    """Run the client. Returns what it says of the way of each page's bytes."""
    with running(*under, str(CLIENT), "127.0.0.1", port, *names, run_dir=run_dir) as client:
        output, errors = client.communicate(timeout=LIMIT_S)
    assert (errors, client.returncode) == ("", 0)
    lines = output.splitlines()
    for name, line in zip(names, lines[::2], strict=True):
        assert line == f"{name} {len(PAGES[name])} {hashlib.sha256(PAGES[name]).hexdigest()}"
    return lines[1::2]


def test_the_pages_come_through_shared_memory(run_dir: Path, pages: Path) -> None:  # noqa: F811
    with serving(pages, run_dir=run_dir) as port:
        for _ in range(2):
            for name, said in zip(PAGES, fetch(port, *PAGES, run_dir=run_dir), strict=True):
                found = re.fullmatch(r"SMC, (\d+) bytes sent, (\d+) received", said)
                assert found, said
                assert 0 < int(found[1]) < 1000
                assert len(PAGES[name]) < int(found[2]) < len(PAGES[name]) + 1000


def test_a_plain_server_is_talked_to_over_tcp(run_dir: Path, pages: Path) -> None:  # noqa: F811
    with serving(pages, under=(), run_dir=run_dir) as port:
        why = "TCP (nobody has published the server's address in the directory, 0x03010000)"
        assert fetch(port, *PAGES, run_dir=run_dir) == [why] * len(PAGES)


def test_a_plain_client_is_answered_over_tcp(run_dir: Path, pages: Path) -> None:  # noqa: F811
    with serving(pages, run_dir=run_dir) as port:
        known = "TCP (this end knows of nothing else)"
        assert fetch(port, *PAGES, under=(), run_dir=run_dir) == [known] * len(PAGES)


def test_where_shared_memory_is_required_a_plain_server_is_an_error(run_dir: Path, pages: Path) -> None:  # noqa: F811
    with serving(pages, under=(), run_dir=run_dir) as port:
        command = (*UNDER_ISM, "--require", str(CLIENT), "127.0.0.1", port, "small.txt")
        with running(*command, run_dir=run_dir) as client:
            output, errors = client.communicate(timeout=LIMIT_S)
        assert (output, client.returncode) == ("", 1)
        assert "shared memory" in errors or "Connection reset" in errors, errors


def test_anybody_else_is_answered_too(run_dir: Path, pages: Path) -> None:  # noqa: F811
    with serving(pages, run_dir=run_dir) as port:
        command = ["curl", "--silent", "--fail", f"http://127.0.0.1:{port}/small.txt"]
        try:
            page = subprocess.run(command, capture_output=True, timeout=LIMIT_S, check=True).stdout
        except FileNotFoundError:
            pytest.skip("there is no curl")
        assert page == PAGES["small.txt"]

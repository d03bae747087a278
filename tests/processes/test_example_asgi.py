# SPDX-License-Identifier: Apache-2.0
"""The ASGI example as its README starts it: hypercorn and httpx unmodified, over shared memory, and over TCP without.

HTTPS too, where an event loop carries it: httpx takes the authority from SSL_CERT_FILE.
"""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from test_examples import EXAMPLES, LIMIT_S, run_dir, running  # noqa: F401

pytestmark = pytest.mark.processes

FOLDER = EXAMPLES / "asgi"
UNDER_ISM = ("-m", "ism", "run")
SIZE = 256 * 20_000
WORKERS = {
    "trio": ("--worker-class", "trio"),
    "asyncio": ("--worker-class", "asyncio"),
    "trio in the first process": ("--worker-class", "trio", "--workers", "0"),
    "two of trio": ("--worker-class", "trio", "--workers", "2"),
}


@contextlib.contextmanager
def serving(*options: str, under: tuple[str, ...] = UNDER_ISM, run_dir: Path) -> Iterator[str]:  # noqa: F811
    """Run hypercorn. Lends its URL; afterwards it has ended without a complaint."""
    command = (*under, "-m", "hypercorn", "--bind", "127.0.0.1:0", *options, f"{FOLDER / 'app'}:app")
    with running(*command, run_dir=run_dir) as server:
        assert server.stderr is not None
        line = server.stderr.readline()
        found = re.search(r"Running on (https?://127\.0\.0\.1:\d+) ", line)
        assert found, line + server.stderr.read()
        yield found[1]
        server.send_signal(signal.SIGINT)
        output, errors = server.communicate(timeout=LIMIT_S)
        assert "Traceback" not in errors, errors
        assert (output, server.returncode) == ("", 0)


def talk(url: str, *how: str, under: tuple[str, ...] = UNDER_ISM, run_dir: Path) -> str:  # noqa: F811
    """Run the client. Returns what it says of the way of the bytes."""
    with running(*under, str(FOLDER / "client.py"), url, *how, run_dir=run_dir) as client:
        output, errors = client.communicate(timeout=LIMIT_S)
    assert (errors, client.returncode) == ("", 0)
    greeting, sizes, said = output.splitlines()
    assert (greeting, sizes) == ("hello from ASGI", f"{SIZE} bytes up, {SIZE} bytes down")
    return said


def over_shared_memory(said: str) -> bool:
    """Whether the bytes of all requests and answers went through shared memory, and not much else."""
    found = re.fullmatch(r"SMC, (\d+) bytes sent, (\d+) received", said)
    return found is not None and all(SIZE < int(count) < 1.01 * SIZE for count in found.groups())


@pytest.mark.parametrize("worker", WORKERS)
def test_hypercorn_and_httpx_talk_through_shared_memory(run_dir: Path, worker: str) -> None:  # noqa: F811
    with serving(*WORKERS[worker], run_dir=run_dir) as url:
        for how in ((), ("trio",), ("asyncio",)):
            said = talk(url, *how, run_dir=run_dir)
            assert over_shared_memory(said), (how, said)


def test_a_plain_server_is_talked_to_over_tcp(run_dir: Path) -> None:  # noqa: F811
    with serving(*WORKERS["trio"], under=(), run_dir=run_dir) as url:
        for how in ((), ("trio",), ("asyncio",)):
            said = talk(url, *how, run_dir=run_dir)
            assert said == "TCP (nobody has published the server's address in the directory, 0x03010000)"


@pytest.mark.parametrize("worker", ["trio", "asyncio"])
def test_a_plain_client_is_answered_over_tcp(run_dir: Path, worker: str) -> None:  # noqa: F811
    with serving(*WORKERS[worker], run_dir=run_dir) as url:
        for how in ((), ("trio",), ("asyncio",)):
            assert talk(url, *how, under=(), run_dir=run_dir) == "TCP (this end knows of nothing else)"


@pytest.mark.parametrize("worker", ["trio", "asyncio"])
def test_https_runs_through_shared_memory(
    run_dir: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    worker: str,
) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "authority")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "certificate")
    certificate.private_key_pem.write_to_path(tmp_path / "key")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority"))
    files = ("--certfile", str(tmp_path / "certificate"), "--keyfile", str(tmp_path / "key"))
    with serving(*WORKERS[worker], *files, run_dir=run_dir) as url:
        assert url.startswith("https:")
        for how in ("trio", "asyncio"):
            said = talk(url, how, run_dir=run_dir)
            assert over_shared_memory(said), (how, said)
        assert talk(url, "sync", run_dir=run_dir).startswith("TCP (")

# SPDX-License-Identifier: Apache-2.0
"""`ism demo`: the whole path once. A manager, two processes, a file through shared memory, the hash, the comparison."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from ism import paths
from ism.errors import IsmError

if TYPE_CHECKING:
    from ism.perf.compare import Comparison

_START_TIMEOUT_S = 15.0
_PEER_TIMEOUT_S = 60.0


@click.command()
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def demo(file: Path | None) -> None:
    """Send FILE (default: Python's standard library as a tar) from one process to another, and compare with TCP."""
    console = Console(highlight=False)
    with ExitStack() as stack:
        _compile(console)
        stack.enter_context(_manager(console))
        if file is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ism-demo-")))
            with console.status("packing Python's standard library"):
                file = _pack_library(folder / "stdlib.tar")
        _transfer(console, file)
        with console.status("comparing with TCP, three rounds in turn"):
            result = _compare()
        console.print(_table(result))


def _compile(console: Console) -> None:
    from ism.shm import compile_kernels

    with console.status("loading the ring kernels") as status:
        compile_kernels(status.update)


@contextmanager
def _manager(console: Console) -> Iterator[None]:
    """Use the manager that the environment names or that runs already; else run one for the demo."""
    if os.environ.get("ISM_DEVICE") or _listens(paths.run_dir()):
        console.print("device manager: the one that runs already")
        yield
        return
    with tempfile.TemporaryDirectory(prefix="ism-demo-run-") as directory:
        command = [sys.executable, "-m", "ism", "manager", "--quiet", "--run-dir", directory]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
            try:
                _wait_until_listening(process, Path(directory))
                console.print("device manager: started for this demo")
                os.environ["ISM_DEVICE"] = f"vfio-user:{paths.device_socket(Path(directory))}"
                yield
            finally:
                os.environ.pop("ISM_DEVICE", None)
                process.terminate()
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    process.kill()


def _listens(directory: Path) -> bool:
    from ism.manager import control

    try:
        control.request(paths.control_socket(directory), "status")
    except IsmError:
        return False
    return True


def _wait_until_listening(process: subprocess.Popen[bytes], directory: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not _listens(directory):
        if process.poll() is not None:
            raise click.ClickException(f"the device manager ended with status {process.returncode}")
        if time.monotonic() > deadline:
            raise click.ClickException(f"the device manager did not answer within {_START_TIMEOUT_S:g} s")
        time.sleep(0.02)


def _pack_library(target: Path) -> Path:
    """Tar the standard library without caches and installed packages."""

    def wanted(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        skipped = {"__pycache__", "site-packages", "dist-packages"}
        return None if skipped & set(entry.name.split("/")) else entry

    with tarfile.open(target, "w") as tar:
        tar.add(sysconfig.get_path("stdlib"), arcname="stdlib", filter=wanted)
    return target


def _peer(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ism.cli.demo_peer", *arguments],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )


def _lines(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        yield json.loads(line)


def _transfer(console: Console, file: Path) -> None:
    size = file.stat().st_size
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with ExitStack() as stack:
        receiver = stack.enter_context(_peer("receive"))
        stack.callback(receiver.kill)
        reports = _lines(receiver)
        first = next(reports, None)
        if first is None:
            raise click.ClickException("the receiving process ended before it listened; its error is above")
        sender = stack.enter_context(_peer("send", str(first["port"]), str(file)))
        stack.callback(sender.kill)
        last: dict[str, Any] = {}
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task(f"{file.name}: process {sender.pid} to process {receiver.pid}", total=size)
            for last in reports:
                if "bytes" in last:
                    progress.update(bar, completed=last["bytes"])
        sent = list(_lines(sender))
        failed = [p.args for p in (receiver, sender) if p.wait(_PEER_TIMEOUT_S) != 0]
    if failed or not sent or "sha256" not in last:
        raise click.ClickException("the transfer failed; the error of the process is above")
    if sent[-1]["sha256"] != last["sha256"]:
        raise click.ClickException(f"SHA-256 differs: sent {sent[-1]['sha256']}, received {last['sha256']}")
    rate = size / last["seconds"] / 1e6
    console.print(
        f"{file.name}: {size:,} bytes in {last['seconds']:.2f} s ({rate:,.0f} MB/s with hashing at both ends)"
    )
    console.print(f"SHA-256 [bold green]verified[/]: {last['sha256']}", soft_wrap=True)


def _compare() -> Comparison:
    import trio

    from ism.perf.compare import compare, far_end
    from ism.smc.default import close_default

    try:
        with far_end() as far:
            return trio.run(compare, far)
    finally:
        close_default()


def _table(result: Comparison) -> Table:
    table = Table(title="two processes, trio streams, medians of interleaved rounds")
    for name in ("", "ism.smc", "TCP", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    rows = (
        (f"round trip, {result.message_size} B", "rtt_p50", 1e6, "us"),
        (f"stream, {result.stream_size // 1024} KiB messages", "throughput", 1e-9, "GB/s"),
        ("CPU of both ends", "cpu_s_per_gb", 1, "s/GB"),
    )
    for label, name, scale, unit in rows:
        smc, tcp = (result.median(transport, name) * scale for transport in ("smc", "tcp"))
        table.add_row(label, f"{smc:.2f} {unit}", f"{tcp:.2f} {unit}", f"{result.ratio(name):.1f}x")
    return table

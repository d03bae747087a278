# SPDX-License-Identifier: Apache-2.0
"""`ism vm`: two virtual machines of this project's own making, what goes between them, and how fast.

What guests are made from, how they are wired and what is measured is in `ism.guests`; here is what the user sees of it.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

if TYPE_CHECKING:
    from ism.guests.guest import Guest
    from ism.guests.lab import Lab, Parts
    from ism.guests.measure import Comparison, Sample, Transfer

_MIB = 1 << 20
_LARGEST = 128 * _MIB
_FILE = "/dev/shm/file"
_EXAMPLE = "examples/cross_vm_rpc"
_RPC_PORT = 9200
_ANSWER_S = 120.0


@click.group()
def vm() -> None:
    """Set up virtual machines on this host, without changing it, and see shared memory between two of them.

    QEMU, a Linux kernel and Python come from Debian's and Python's archives into a cache (~/.cache/ism-vm, or
    ISM_VM_CACHE). The first command takes a minute or two and fetches about 180 MB; later ones take seconds.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        former = signal.signal(number, _end)
        click.get_current_context().call_on_close(partial(signal.signal, number, former))


def _end(number: int, _: object) -> None:
    """End in good order: machines are switched off, folders removed."""
    raise SystemExit(128 + number)


# -- setup ----------------------------------------------------------------------------------------------------------


@vm.command()
@click.option("--refresh", is_flag=True, help="Ask for newer packages, also where everything is there.")
def setup(refresh: bool) -> None:
    """Fetch, build and boot once what the other commands start from."""
    from ism.guests.lab import ready

    console = _console()
    with _steps(console) as step:
        parts = ready(progress=step, refresh=refresh)
    console.print(f"QEMU {parts.image.versions['qemu']}, Linux {parts.image.versions['kernel']}", soft_wrap=True)
    things = (
        ("QEMU and tools", parts.image.tools.folder),
        ("guest's files", parts.image.root),
        ("guest's disk", parts.image.disk),
        ("kernel", parts.image.kernel.parent),
        ("ramdisk", parts.image.ramdisk),
        ("this project's disk", parts.payload),
        ("state of a guest that runs", parts.state),
    )
    for what, path in things:
        console.print(f"  {_used(path) / 1e6:6,.0f} MB  {what}")
    console.print(f"  {_used(parts.store.folder) / 1e6:6,.0f} MB  all of {parts.store.folder}", soft_wrap=True)


def _used(path: Path) -> int:
    """Count the bytes that a file, or all in a folder, takes on the disk. What goes meanwhile counts as nothing."""
    total = 0
    seen: set[tuple[int, int]] = set()
    names = [path, *(Path(top, name) for top, _, files in os.walk(path) for name in files)]
    for name in names:
        try:
            found = name.lstat()
        except OSError:
            continue
        if (found.st_dev, found.st_ino) not in seen:
            seen.add((found.st_dev, found.st_ino))
            total += found.st_blocks * 512
    return total


# -- demo -----------------------------------------------------------------------------------------------------------


def _size(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """Read 64M, 512K or a number of bytes."""
    number, unit = (value[:-1], value[-1].upper()) if value[-1:].isalpha() else (value, "")
    scale = {"": 1, "K": 1 << 10, "M": _MIB}.get(unit, 0)
    if not (number.isascii() and number.isdigit() and 0 < int(number) * scale <= _LARGEST):
        raise click.BadParameter(f"{value!r} is not a size up to {_LARGEST // _MIB}M, such as 64M", ctx, param)
    return int(number) * scale


@vm.command()
@click.option(
    "--size", default="64M", metavar="SIZE", show_default=True, callback=_size, help="Of the file, up to 128M."
)
def demo(size: int) -> None:
    """Send a file from one virtual machine to another through shared memory, then over TCP; call an RPC service."""
    from ism.guests.lab import address_of
    from ism.guests.measure import OFF, REQUIRE, compare, make_file, transfer

    console = _console()
    with _two_guests(console) as lab:
        a, b, host = lab.guests["a"], lab.guests["b"], address_of(1)
        with _done(console, "warming up with 4 MiB over each"):
            make_file(b, _FILE, 4 * _MIB)
            for environment in (REQUIRE, OFF):
                transfer(a, b, host, _FILE, 4 * _MIB, env=environment)
        with _done(console, f"file of {size:,} random bytes in guest b"):
            digest = make_file(b, _FILE, size)
        smc = _transfer(console, a, b, size, digest, "shared memory", REQUIRE)
        tcp = _transfer(console, a, b, size, digest, "TCP", OFF)
        with _done(console, "round trips of 64 bytes and streams, both transports in turn"):
            trips = compare(a, b, host, rounds=3, pings=500, total=32 * _MIB)
        _rpc(console, a, b, host)
        console.print(_table(trips, smc, tcp))
        _note(console, lab)


def _transfer(console: Console, a: Guest, b: Guest, size: int, digest: str, what: str, env: dict[str, str]) -> Transfer:
    """Send the file, show it, and see that it arrived as it should. Raises ClickException."""
    from ism.guests.lab import address_of
    from ism.guests.measure import transfer

    with _progress(console, f"{what}: guest b to guest a", size) as tell:
        found = transfer(a, b, address_of(1), _FILE, size, env=env, progress=tell)
    because = f" ({found.reason})" if found.reason else ""
    console.print(
        f"{what}: {size:,} bytes in {found.seconds:.3f} s, {size / found.seconds / 1e6:,.0f} MB/s; "
        f"connection: {found.mode}{because}",
        soft_wrap=True,
    )
    wanted = "SMC" if what == "shared memory" else "TCP"
    if {found.mode, found.sender_mode} != {wanted}:
        raise click.ClickException(f"the ends say {found.sender_mode} and {found.mode}, it should be {wanted}")
    if found.sha256 != digest:
        raise click.ClickException(f"SHA-256 differs over {what}: sent {digest}, received {found.sha256}")
    console.print(f"SHA-256 [bold green]verified[/] over {what}: {digest}", soft_wrap=True)
    return found


def _rpc(console: Console, a: Guest, b: Guest, host: str) -> None:
    """Run the example's two scripts. Raises MachineError, with what they have written."""
    from ism.guests.measure import REQUIRE, has_file, start_script

    if not has_file(a, f"{_EXAMPLE}/service.py"):
        console.print("RPC: left out, the examples are not here; a checkout of the project has them")
        return
    with _done(console, f"RPC: {_EXAMPLE}, service in guest a, client in guest b"):
        service = start_script(a, f"{_EXAMPLE}/service.py", host, str(_RPC_PORT), env=REQUIRE)
        service.wait_line("listening", _ANSWER_S)
        client = start_script(b, f"{_EXAMPLE}/client.py", host, str(_RPC_PORT), env=REQUIRE)
        client.result(_ANSWER_S)
        service.signal(2)
        service.wait(_ANSWER_S)
    for line in client.output.splitlines():
        console.print(f"  {line}", soft_wrap=True)


def _table(trips: Comparison, smc: Transfer, tcp: Transfer) -> Table:
    ratios = trips.ratios()
    table = _new_table("guest b to guest a, blocking sockets")
    rates = [found.size / found.seconds / 1e6 for found in (smc, tcp)]
    table.add_row("file, once", *(f"{rate:,.0f} MB/s" for rate in rates), f"{rates[0] / rates[1]:.1f}x")
    _stream_row(table, trips, ratios)
    _trip_rows(table, trips, ratios)
    return table


# -- bench ----------------------------------------------------------------------------------------------------------


@vm.command()
@click.option("--quick", is_flag=True, help="A fraction of it: shows that it works.")
@click.option("--cold", is_flag=True, help="Also a guest that boots, which takes half a minute under emulation.")
@click.option(
    "--json", "output", type=click.File("w", lazy=False), metavar="FILE", help="Write the figures here; `-` for stdout."
)
def bench(quick: bool, cold: bool, output: IO[str] | None) -> None:
    """Measure shared memory against TCP between the same two guests, and what the device costs.

    Rounds in turn, ratios round by round; both ends have one processor each. Blocking sockets on both sides. "Waiting":
    each end sleeps in recv; "awake": each asks again and again, and is compared with the better of TCP's two.
    """
    from ism.guests.lab import Lab, ready

    console = _console(stderr=output is not None and output.name == "<stdout>")
    began = time.monotonic()
    with _steps(console) as step:
        parts = ready(progress=step)
    host = {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "machine": platform.machine()}
    host["kvm"] = parts.hardware.kvm
    console.print(f"host: {host['cpus']} processors, load {host['load']:.1f} before the guests start")
    with Lab(parts, network="pair") as lab:
        with _done(console, "guest a"):
            lab.add("a")
        figures = _measure(console, lab, quick=quick, cold=cold)
        figures["host"] = host
        figures["versions"] = dict(parts.image.versions)
        _note(console, lab)
    console.print(f"took {time.monotonic() - began:.0f} s")
    if output is not None:
        output.write(json.dumps(figures, indent=1) + "\n")


def _measure(console: Console, lab: Lab, *, quick: bool, cold: bool) -> dict[str, Any]:
    """Measure everything, and show it as it comes."""
    from ism.guests import measure
    from ism.guests.lab import address_of

    a, host = lab.guests["a"], address_of(1)
    figures: dict[str, Any] = {}
    if cold:
        with _done(console, "boot to first byte"):
            figures["cold_first_byte_s"] = measure.first_bytes(lab, "b", count=1, cold=True)
        lab.guests["b"].quit()
        lab.wait_status(lambda status: status["totals"]["connected"] == 1)
    with _done(console, "restore to first byte"):
        figures["first_byte_s"] = measure.first_bytes(lab, "b", count=1 if quick else 3)
    b = lab.guests["b"]
    with _done(console, "sockets"):
        rounds = measure.compare(
            a, b, host,
            rounds=1 if quick else 5, pings=100 if quick else 1500, total=4 * _MIB if quick else 128 * _MIB,
            report=lambda sample: _tell(console, sample),
        )  # fmt: skip
    with _done(console, "TCP with packets of 9000 bytes"):
        measure.set_mtu((a, b), 9000)
        jumbo = measure.compare(
            a, b, host,
            rounds=1 if quick else 3, pings=100 if quick else 1500, total=4 * _MIB if quick else 64 * _MIB,
            transports=("tcp",),
        )  # fmt: skip
        measure.set_mtu((a, b), 1500)
    with _done(console, "doorbells, region commands"):
        figures["guest_doorbell"] = measure.guest_doorbell(a, b, count=50 if quick else 1000)
        figures["region_1_mib"] = measure.region_commands(b, count=10 if quick else 200)
        figures["forwarded_doorbell"] = measure.forwarded_doorbell(lab, count=100 if quick else 5000)
    figures["rounds"] = [
        {name: getattr(sample, name) for name in ("transport", "mode", "blocking_s", "awake_s", "bytes_per_s")}
        for sample in (*rounds.smc, *rounds.tcp)
    ]
    figures["ratios"] = rounds.ratios()
    figures["tcp_mtu_9000"] = {name: jumbo.median("tcp", name) for name in ("blocking_s", "awake_s", "bytes_per_s")}
    figures["ratios"]["stream_mtu_9000"] = rounds.median("smc", "bytes_per_s") / jumbo.median("tcp", "bytes_per_s")
    figures["ratios"]["awake_mtu_9000"] = jumbo.median("tcp", "best_s") / rounds.median("smc", "awake_s")
    _show(console, figures, rounds, jumbo)
    return figures


def _tell(console: Console, sample: Sample) -> None:
    trips = f"{sample.blocking_s * 1e6:,.0f} us waiting, {sample.awake_s * 1e6:,.0f} us awake"
    console.print(f"  {sample.transport}: {trips}, {sample.bytes_per_s / 1e6:,.0f} MB/s")


def _show(console: Console, figures: dict[str, Any], rounds: Comparison, jumbo: Comparison) -> None:
    ratios = figures["ratios"]
    table = _new_table(f"two guests, blocking sockets, medians of {len(rounds.smc)} interleaved rounds")
    _trip_rows(table, rounds, ratios)
    _stream_row(table, rounds, ratios)
    large = jumbo.median("tcp", "bytes_per_s") / 1e6
    table.add_row("  TCP with MTU 9000", "", f"{large:,.0f} MB/s", f"{ratios['stream_mtu_9000']:.1f}x")
    trip = jumbo.median("tcp", "best_s") * 1e6
    table.add_row("round trip awake, MTU 9000", "", f"{trip:,.0f} us", f"{ratios['awake_mtu_9000']:.1f}x")
    console.print(table)
    forwarded, bell, region = figures["forwarded_doorbell"], figures["guest_doorbell"], figures["region_1_mib"]
    lines = [
        ("doorbell through the manager, between processes of the host", f"{forwarded['median_s'] * 1e6:,.0f} us"),
        ("  the manager's processor time, of that", f"{forwarded['manager_cpu_s'] * 1e6:,.0f} us"),
        ("doorbell to a sleeping program in the other guest and back", f"{bell['round_trip_s'] * 1e6:,.0f} us"),
        ("  ringing it, of that, for each side", f"{bell['ring_s'] * 1e6:,.0f} us"),
        ("1 MiB region: alloc, with its mapping in QEMU", f"{region['alloc_s'] * 1e6:,.0f} us"),
        ("1 MiB region: detach, with its unmapping", f"{region['detach_s'] * 1e6:,.0f} us"),
        ("a command that maps nothing (grant)", f"{region['grant_s'] * 1e6:,.0f} us"),
        ("restored guest, from its start to the first byte", _seconds(figures["first_byte_s"])),
    ]
    if "cold_first_byte_s" in figures:
        lines.append(("booting guest, to the first byte", _seconds(figures["cold_first_byte_s"])))
    for what, value in lines:
        console.print(f"  {what}: {value}")


def _seconds(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} s"


# -- what they share ------------------------------------------------------------------------------------------------


def _console(*, stderr: bool = False) -> Console:
    return Console(highlight=False, stderr=stderr)


@contextmanager
def _two_guests(console: Console) -> Iterator[Lab]:
    """Bring up a manager and two guests, step by step."""
    from ism.guests.lab import Lab, ready
    from ism.guests.measure import facts

    began = time.monotonic()
    with _steps(console) as step:
        parts: Parts = ready(progress=step)
    _line(console, "cache", began, str(parts.store.folder))
    began = time.monotonic()
    with Lab(parts, network="pair") as lab:
        _line(console, "manager", began, f"pid {lab.manager.pid}, a device for each guest")
        for name in lab.names:
            began = time.monotonic()
            with console.status(f"guest {name}"):
                guest = lab.add(name)
                bdf = lab.find(guest)
                found = facts(guest, bdf)
            pid = guest.machine.process.pid
            what = f"QEMU pid {pid}, Linux {found['kernel']}, virtio-ism at {bdf}, bound to {found['driver']}"
            _line(console, f"guest {name}", began, what)
        yield lab


def _line(console: Console, what: str, began: float, rest: str) -> None:
    console.print(f"{what:10}{time.monotonic() - began:6.1f} s   {rest}", soft_wrap=True)


@contextmanager
def _steps(console: Console) -> Iterator[Callable[[str], None]]:
    """Show each step while it is done, and how long it took afterwards; nothing when there is none."""
    current: list[tuple[str, float]] = []

    def end() -> None:
        for what, began in current:
            console.print(f"  {time.monotonic() - began:5.1f} s  {what}", soft_wrap=True)
        current.clear()

    with console.status("looking into the cache") as status:

        def step(what: str) -> None:
            end()
            current.append((what, time.monotonic()))
            status.update(what)

        yield step
        end()


@contextmanager
def _done(console: Console, what: str) -> Iterator[None]:
    """Show what is being done, and afterwards how long it took."""
    began = time.monotonic()
    with console.status(what):
        yield
    console.print(f"{what}: {time.monotonic() - began:.1f} s", soft_wrap=True)


@contextmanager
def _progress(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar, or, where there is no terminal, a line each quarter."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task(what, total=total)
            yield lambda count: progress.update(bar, completed=count)
        return
    shown = [0]

    def tell(count: int) -> None:
        if (quarter := count * 4 // total) > shown[0]:
            shown[0] = quarter
            console.print(f"  {what}: {count * 100 // total} %")

    yield tell


def _new_table(title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("", "ism.smc", "TCP", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    return table


def _stream_row(table: Table, rounds: Comparison, ratios: dict[str, float]) -> None:
    smc, tcp = rounds.median("smc", "bytes_per_s") / 1e6, rounds.median("tcp", "bytes_per_s") / 1e6
    table.add_row("stream, 64 KiB messages", f"{smc:,.0f} MB/s", f"{tcp:,.0f} MB/s", f"{ratios['stream']:.1f}x")


def _trip_rows(table: Table, trips: Comparison, ratios: dict[str, float]) -> None:
    for label, name, key in (("awake", "awake_s", "awake"), ("waiting", "blocking_s", "blocking")):
        smc = trips.median("smc", name) * 1e6
        tcp = trips.median("tcp", "best_s" if key == "awake" else name) * 1e6
        table.add_row(f"64-byte round trip p50, {label}", f"{smc:,.0f} us", f"{tcp:,.0f} us", f"{ratios[key]:.1f}x")


def _note(console: Console, lab: Lab) -> None:
    if not lab.parts.hardware.kvm:
        console.print(
            "The guests are emulated in software (no KVM): everything takes several times as long. The ratios count.\n"
            "Waiting: plain blocking receives. A receiver of ism.smc looks for up to 200 us before it sleeps, which\n"
            "costs 600 us here: the figure jumps when other work keeps a guest from running. Awake: both ends poll."
        )

# SPDX-License-Identifier: Apache-2.0
"""`ism perf`: measure throughput and latency between two ends, as iperf3 and sockperf do."""

from __future__ import annotations

import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

import click

from ism.perf.parameters import APIS, DEFAULT_LENGTH, DEFAULT_SECONDS, TRANSPORTS, Parameters, parse_size

DEFAULT_PORT = 5208
_INTERRUPTED = 130
_CLIENT_ONLY = (
    "seconds", "size", "length", "streams", "reverse", "both", "interval", "latency", "rate", "api", "transport",
    "as_json",
)  # fmt: skip


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as exc:
        raise click.BadParameter(str(exc)) from None


@click.group(invoke_without_command=True, subcommand_metavar="", context_settings={"max_content_width": 100})
@click.option("-s", "--server", is_flag=True, help="Serve tests, one at a time, until interrupted.")
@click.option("-c", "--client", "host", metavar="HOST", help="Run one test with the server on HOST.")
@click.option("-p", "--port", type=click.IntRange(0, 65535), default=DEFAULT_PORT, show_default=True, metavar="PORT",
              help="Port of the server. Streams get ports of their own choice.")  # fmt: skip
@click.option("-B", "--bind", metavar="ADDRESS", help="Server: listen on this address only.")
@click.option("-1", "--one-off", is_flag=True, help="Server: end after one test.")
@click.option("-t", "--time", "seconds", type=float, metavar="SECS",
              help=f"Send for so long.  [default: {DEFAULT_SECONDS:g}]")  # fmt: skip
@click.option("-n", "--bytes", "size", type=_size, metavar="BYTES",
              help="Send so much in each direction instead, by all streams together.")  # fmt: skip
@click.option("-l", "--length", type=_size, metavar="SIZE",
              help=f"Bytes of one write, or message.  [default: {DEFAULT_LENGTH[False]}; {DEFAULT_LENGTH[True]} with "
              "--latency]")  # fmt: skip
@click.option("-P", "--parallel", "streams", type=int, default=1, show_default=True, metavar="STREAMS",
              help="Streams in each direction.")  # fmt: skip
@click.option("-R", "--reverse", is_flag=True, help="The server sends.")
@click.option("--bidir", "both", is_flag=True, help="Both ends send, each in streams of its own.")
@click.option("-i", "--interval", type=click.FloatRange(0, 3600), default=1.0, show_default=True, metavar="SECS",
              help="Report this often; 0: only at the end.")  # fmt: skip
@click.option("--latency", is_flag=True, help="Measure round trips, one at a time in each stream.")
@click.option("--rate", type=int, default=0, metavar="N",
              help="With --latency: begin N round trips a second in each stream, at moments fixed in advance. One that "
              "has to wait for an earlier one is counted from the moment it was meant to begin, so that a stall is "
              "not hidden (no coordinated omission).")  # fmt: skip
@click.option("--api", type=click.Choice(APIS), default="trio", show_default=True,
              help="How both ends use the streams. view: writing and reading in place, without a copy.")  # fmt: skip
@click.option("--transport", type=click.Choice(TRANSPORTS), default="smc", show_default=True,
              help="smc: shared memory where both ends can, else TCP, as is shown.")  # fmt: skip
@click.option("-J", "--json", "as_json", is_flag=True, help="Print one JSON document, at the end.")
@click.pass_context
def perf(ctx: click.Context, /, server: bool, host: str | None, port: int, **options: Any) -> None:
    """Measure throughput and latency between two ends.

    \b
    ism perf -s [-p PORT]
    ism perf -c HOST [-t SECS | -n BYTES] [-l SIZE] [-P STREAMS] [-R | --bidir]
    ism perf -c HOST --latency [--rate N]
    ism perf compare [--quick] [--json FILE] [--html FILE]   (with their peers; see its --help)
    """
    given = {name for name in ctx.params if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT}
    if ctx.invoked_subcommand is not None:
        if given:
            raise click.UsageError(f"these options do not go with {ctx.invoked_subcommand}")
        return
    if server == (host is not None):
        raise click.UsageError("give either -s, to serve, or -c HOST, to run a test")
    logging.getLogger("ism.smc").addHandler(logging.NullHandler())  # how bytes travel is shown for every stream
    if server:
        _refuse(given, _CLIENT_ONLY, "-s")
        _serve(options["bind"], port, options["one_off"])
    else:
        _refuse(given, ("bind", "one_off"), "-c")
        assert host is not None
        _test(host, port, options)


def _refuse(given: set[str], unwanted: tuple[str, ...], role: str) -> None:
    for parameter in perf.params:
        if parameter.name in given and parameter.name in unwanted:
            raise click.UsageError(f"{parameter.opts[0]} does not go with {role}")


def _say(line: str) -> None:
    click.echo(line)
    sys.stdout.flush()


def _serve(bind: str | None, port: int, one_off: bool) -> None:
    from ism.perf.server import listen, serve

    with listen(bind, port) as listener:
        try:
            _say(f"listening on port {listener.getsockname()[1]}")
            good = serve(listener, _say, one_off=one_off)
        except KeyboardInterrupt:
            return
    sys.exit(0 if good else 1)


def parameters_of(options: dict[str, Any]) -> Parameters:
    """Return what the options ask for. Raises ValueError, TypeError."""
    seconds, size, latency = options["seconds"], options["size"], options["latency"]
    length = options["length"]
    return Parameters(
        latency=latency,
        seconds=DEFAULT_SECONDS if seconds is None and size is None else seconds,
        bytes=size,
        length=DEFAULT_LENGTH[latency] if length is None else length,
        **{name: options[name] for name in ("streams", "reverse", "both", "rate", "api", "transport")},
    )


def _test(host: str, port: int, options: dict[str, Any]) -> None:
    try:
        parameters = parameters_of(options)
    except (ValueError, TypeError) as exc:
        raise click.UsageError(str(exc)) from None
    from ism.errors import IsmError
    from ism.perf.client import Client
    from ism.perf.report import document

    as_json = options["as_json"]
    client = Client(host, port, parameters, interval_s=options["interval"], say=(lambda _: None) if as_json else _say)
    try:
        client.run()
    except IsmError as exc:
        client.report.error = str(exc)
        if not as_json:
            raise
    except KeyboardInterrupt:
        client.report.error, client.report.interrupted = "interrupted", True
    if as_json:
        _say(json.dumps(document(client.report), indent=2))
    if client.report.interrupted:
        sys.exit(_INTERRUPTED)
    sys.exit(1 if client.report.error else 0)


# -- compare ---------------------------------------------------------------------------------------------------------


@perf.command(context_settings={"max_content_width": 100})
@click.option("--quick", is_flag=True, help="Three rounds of short samples, pinned only: below two minutes.")
@click.option("--json", "json_file", metavar="FILE", help="Write everything as one JSON document; -: standard output.")
@click.option("--html", "html_file", metavar="FILE", help="Write a page with tables and charts; needs matplotlib.")
@click.option("--rounds", type=click.IntRange(1, 100), metavar="N", help="Rounds.  [default: 5; 3 with --quick]")
@click.option("--peers", metavar="A,B,...", help="Only these, by name or family.  [default: all that are installed]")
@click.option("--seconds", type=click.FloatRange(0.001, 10), metavar="SECS", help="Length of a sample, about.")
@click.option(
    "--warm-up", type=click.FloatRange(0, 10), metavar="SECS", help="Time before it, in which nothing counts."
)
@click.option("--patience", type=click.IntRange(0, 10), metavar="N",
              help="Take a sample that others disturb again, so often at most.  [default: 2; quick: 1]")  # fmt: skip
@click.option("--sizes", metavar="A,B,...", help='Message sizes of the charts; none: "".  [default: 64,256,...,1M]')
@click.option("--cpus", metavar="A,B", help="CPUs of the two ends.  [default: two cores close together]")
@click.option("--seed", type=int, help="Of the order of the samples.  [default: the time]")
def compare(json_file: str | None, html_file: str | None, **options: Any) -> None:
    """Measure these sockets and their peers on this machine, in one run.

    Two processes and a device manager of their own; every peer that is not installed is named and left out.
    """
    import time

    from ism.perf.versus.catalog import chosen
    from ism.perf.versus.machine import two_cpus
    from ism.perf.versus.rounds import SIZES, Options

    entries = chosen(options["peers"])
    quick = options["quick"]
    sizes: tuple[int, ...] = SIZES
    if options["sizes"] is not None:
        sizes = tuple(_size(text.strip()) for text in options["sizes"].split(",") if text.strip())
    given = Options(
        rounds=options["rounds"] or (3 if quick else 5),
        free_rounds=0 if quick else 2,
        sweep_rounds=1 if quick else 3,
        warm_s=_or(options["warm_up"], 0.1 if quick else 0.25),
        measure_s=_or(options["seconds"], 0.1 if quick else 0.25),
        patience=(1 if quick else 2) if options["patience"] is None else options["patience"],
        sizes=sizes,
        seed=int(time.time()) if options["seed"] is None else options["seed"],
        cpus=two_cpus(options["cpus"]),
    )
    for name in (json_file, html_file):
        if name not in (None, "-") and not Path(str(name)).absolute().parent.is_dir():
            raise click.FileError(str(name), "its folder does not exist")
    if html_file is not None:
        from ism.perf.plots import require

        require()
    from ism.perf.versus import result, text

    signal.signal(signal.SIGTERM, _terminated)
    document = result.measure(entries, given, lambda line: click.echo(line, err=True))
    click.echo(text.report(document), err=json_file == "-")
    if json_file is not None:
        _write(json_file, json.dumps(document, indent=1))
    if html_file is not None:
        from ism.perf.versus.page import page

        _write(html_file, page(document))


def _terminated(*_: object) -> None:
    """End as Ctrl-C does: what was started ends, and nothing is left behind."""
    sys.exit(128 + signal.SIGTERM)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _write(name: str, content: str) -> None:
    try:
        with click.open_file(name, "w", encoding="utf-8") as file:
            file.write(content + "\n")
    except OSError as exc:
        raise click.FileError(name, exc.strerror or str(exc)) from exc

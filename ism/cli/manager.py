# SPDX-License-Identifier: Apache-2.0
"""`ism manager`: run the device manager in the foreground."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from ism import paths


@click.command()
@click.option("--config", type=click.Path(path_type=Path), help="TOML file with domains and devices (docs/manager.md).")
@click.option("--run-dir", type=click.Path(file_okay=False, path_type=Path), help="Directory of the sockets.")
@click.option("-v", "--verbose", is_flag=True, help="Log everything.")
@click.option("-q", "--quiet", is_flag=True, help="Log only what went wrong.")
def manager(config: Path | None, run_dir: Path | None, verbose: bool, quiet: bool) -> None:
    """Run the device manager of this host.

    Without --config it serves one socket on which every connection is a fresh device of one domain.
    """
    import trio

    from ism.manager.config import default_config, load_config
    from ism.manager.server import run_manager

    directory = run_dir or paths.run_dir()
    settings = default_config(directory) if config is None else load_config(config, directory)
    level = "DEBUG" if verbose else "WARNING" if quiet else settings.log_level.upper()
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=level)
    trio.run(run_manager, settings, directory)

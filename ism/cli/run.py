# SPDX-License-Identifier: Apache-2.0
"""`ism run`: run an unmodified Python program with its TCP sockets over shared memory."""

from __future__ import annotations

import click


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}, add_help_option=False
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(arguments: tuple[str, ...]) -> None:
    """Run a Python program with its TCP sockets over shared memory.

    ism run [--require] [--device NAME] [--buffer SIZE] [--spin-us N] PROGRAM | -m MODULE | -c CODE [ARGUMENTS]

    A connection uses shared memory when both ends are run this way (or use ism.smc) and a device manager runs; every
    other one is TCP, and `ism ss` says why. With --require it fails instead.
    """
    from ism.smc.run import main

    main(arguments)

"""The entry point: one typer application, a command a file."""

from __future__ import annotations

import sys

import typer

from cli.bootstrap import bootstrap
from cli.experiment import experiment
from cli.init import init
from cli.join import join
from cli.simulate import simulate
from protocol.errors import UserError

app = typer.Typer(
    name="sentinel-node",
    help="Strangers pre-train one language model together over the internet, safely.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

for command in (init, bootstrap, join, simulate, experiment):
    app.command()(command)


def main() -> None:
    """Run the command line. What a person can mend is one line on stderr and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"sentinel-node: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

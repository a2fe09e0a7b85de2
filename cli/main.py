"""The entry point: one typer application, a command a file."""

from __future__ import annotations

import sys
import traceback

import typer

from cli.bans import bans
from cli.bootstrap import bootstrap
from cli.demo import demo
from cli.experiment import experiment
from cli.failures import explain
from cli.init import init
from cli.join import join
from cli.peers import peers
from cli.simulate import simulate
from cli.verify import verify

app = typer.Typer(
    name="sentinel-node",
    help="Strangers pre-train one language model together over the internet, safely.",
    epilog="`sentinel-node demo` shows all of it on this machine. `sentinel-node COMMAND --help` has examples.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

app.command()(init)
app.command()(bootstrap)
app.command()(join)
app.command()(verify)
app.command()(peers)
app.command()(bans)
app.command()(demo)
app.command()(simulate)
app.command()(experiment)


def main() -> None:
    """Run the command line. An error is one line on stderr: exit code 2 for what a person can mend, else 1."""
    try:
        app()
    except Exception as error:  # noqa: BLE001 - the outermost edge: nobody else would tell the person
        failure = explain(error)
        if failure.is_bug:
            traceback.print_exception(error)
        print(f"sentinel-node: {failure.line}", file=sys.stderr)
        sys.exit(failure.code)


if __name__ == "__main__":
    main()

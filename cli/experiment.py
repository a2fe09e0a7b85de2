"""`sentinel-node experiment`: the paper's tables, and ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from protocol.errors import UserError


def experiment(
    name: Annotated[str, typer.Argument(help="`paper`, `beyond`, `ablation` or `scale`.")],
    out: Annotated[Path, typer.Option(help="Where tables, plots and finished runs go.", metavar="DIR")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny meshes and few rounds: minutes, to see that it works.")
    ] = False,
    jobs: Annotated[int | None, typer.Option(help="Runs at once; by default one a core.", min=1)] = None,
) -> None:
    """Run one of the experiments and write its tables (Markdown, CSV) and plots (PNG).

    Interrupted, it goes on where it stopped when started again with the same --out.

    Examples:

        sentinel-node experiment paper --quick --out results/quick

        sentinel-node experiment beyond --out results/beyond --jobs 2
    """
    from benchmarks.experiment import default_jobs, run_cases
    from benchmarks.experiment_plan import PLANS, plan
    from benchmarks.experiment_plots import write_plots
    from benchmarks.experiment_tables import build_tables, write_tables

    if name not in PLANS:
        raise UserError(f"There is no experiment {name}", f"Use one of {', '.join(PLANS)}")
    cases = plan(name, quick=quick)
    # Timings need the machine for themselves.
    at_once = 1 if name == "scale" else (jobs or default_jobs())
    try:
        results = run_cases(cases, out, at_once, print)
        write_tables(name, build_tables(name, results), out)
        plots = write_plots(name, results, out)
    except OSError as error:
        raise UserError(
            f"Cannot write to {out}: {error.strerror}", "Name a writable folder with --out"
        ) from None
    print(f"tables  {out / f'{name}.md'}")
    for path in plots:
        print(f"plot    {path}")

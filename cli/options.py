"""Options that several commands share, said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import platformdirs
import typer

DEFAULT_HOME = Path(platformdirs.user_data_dir("sentinel-node"))

InviteText = Annotated[
    str, typer.Argument(help="The invite that `sentinel-node bootstrap` printed.", metavar="INVITE")
]
Listen = Annotated[
    list[str] | None,
    typer.Option(
        help="Multiaddr to listen on, e.g. `/ip4/0.0.0.0/tcp/31337`; may be given several times.",
        metavar="MADDR",
    ),
]
IdentityFile = Annotated[
    Path | None, typer.Option(help="Key file of this peer; made if it does not exist.", metavar="FILE")
]
Threads = Annotated[
    int,
    typer.Option(
        help="CPU threads to compute with, and as many for p2pd; 0: both decide by themselves.", min=0
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")]

Schedule = Annotated[
    Literal["overlapped", "synchronous"],
    typer.Option(help="`overlapped` (suits long links) or `synchronous`.", metavar="KIND"),
]
Wire = Annotated[
    Literal["fp32", "bf16"],
    typer.Option(help="Number format between stages: `fp32` or `bf16`.", metavar="FORMAT"),
]

AttackSpec = Annotated[
    str | None,
    typer.Option(
        help="Attack the run, which must be a testbed: `zeros`, `random-sign:0.3`, ... (docs/verification.md).",
        metavar="SPEC",
    ),
]
AttackDirection = Annotated[
    Literal["activation", "gradient", "both"],
    typer.Option(help="What is corrupted: `activation`, `gradient` or `both`.", metavar="DIR"),
]
AttackStart = Annotated[int, typer.Option(help="The first round that is attacked.", min=0)]

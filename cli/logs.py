"""How the commands log: structured lines on stderr, for people on a terminal and as JSON elsewhere."""

from __future__ import annotations

import logging
import os
import sys

import structlog


def configure(*, verbose: bool = False, quiet: bool = False) -> None:
    """`quiet`: warnings and worse only. For people on a terminal; one JSON object a line elsewhere."""
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    render: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(level),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            render,
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    # Libraries that configure their loggers when imported, which is later.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # The libraries below speak the standard logging; of them only what a person should act on.
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="%(name)s: %(message)s", force=True)
    logging.getLogger("hivemind").setLevel(logging.ERROR)

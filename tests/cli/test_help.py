"""Help answers at once, has examples, and loses nothing on a narrow terminal."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cli.conftest import Invoke

COMMANDS = ["init", "bootstrap", "join", "verify", "peers", "bans", "demo", "simulate", "experiment"]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, command: str, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERMINAL_WIDTH", str(width))
    outcome = invoke(command, "--help")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in outcome.out, "something was cut off"
    examples = [line.strip() for line in lines if line.strip().startswith(f"sentinel-node {command}")]
    assert examples
    assert "Examples:" in outcome.out


def test_help_lists_the_commands(invoke: Invoke) -> None:
    outcome = invoke("--help")
    assert outcome.code == 0
    for command in COMMANDS:
        assert f" {command} " in outcome.out


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["join"],
        ["init"],
        ["init", "--preset", "tiny", "--out", "x", "--rounds", "0"],
        ["init", "--preset", "tiny", "--out", "x", "--schedule", "slow"],
        ["demo", "--wire", "int4"],
        ["demo", "--stages", "three"],
        ["demo", "--attack-direction", "sideways"],
        ["join", "sentinel1-x", "--duty", "2"],
        ["peers", "--what"],
    ],
    ids=" ".join,
)
def test_usage_errors(invoke: Invoke, words: list[str]) -> None:
    outcome = invoke(*words)
    assert outcome.code == 2
    assert "Usage:" in outcome.err
    assert "Traceback" not in outcome.err


def test_the_command_line_imports_nothing_that_takes_seconds() -> None:
    """If this fails, import what a new command needs inside it: see the docstring of `cli`."""
    slow = "{'torch', 'transformers', 'hivemind', 'datasets', 'scipy', 'matplotlib'}"
    script = f"import sys, cli.main; print(*sorted({slow} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == ""

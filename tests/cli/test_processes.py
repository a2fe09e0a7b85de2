"""Commands as processes of their own: a run's whole life, signals, and what is left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psutil
import pytest

from benchmarks.swarm import become
from bootstrap.seed import Seed
from protocol.host import LOOPBACK
from protocol.identity import Identity
from protocol.invite import Invite
from protocol.manifest import SignedManifest
from tests.cli.conftest import LISTEN, hosted, serving
from tests.swarms import small_manifest

PATIENCE = 90.0


def until(is_done: Callable[[], Any], what: str, *, seconds: float = PATIENCE) -> Any:
    """The first true result, looking ten times a second."""
    deadline = monotonic() + seconds
    while not (result := is_done()):
        assert monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        sleep(0.1)
    return result


def daemons_using(folder: Path) -> list[psutil.Process]:
    """p2pd processes, whosever child they are now, with their identity in `folder`."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        if "p2pd" in (process.info["name"] or "") and any(
            str(folder) in word for word in process.info["cmdline"] or ()
        ):
            found.append(process)
    return found


@dataclass
class Command:
    process: ForkServerProcess
    out: Path
    err: Path

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self, seconds: float = PATIENCE) -> int:
        """Wait for its end; gives its exit code."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"did not end: {self.err.read_text()}"
        return self.process.exitcode

    def events(self) -> list[dict[str, Any]]:
        """Its log so far, one JSON object a line."""
        lines = self.err.read_text().splitlines() if self.err.exists() else []
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def logs(self, event: str) -> None:
        until(lambda: any(line["event"] == event for line in self.events()) or self._ended(), f"{event!r}")

    def _ended(self) -> bool:
        assert self.process.is_alive(), f"ended: {self.err.read_text()}"
        return False


@dataclass
class Shell:
    """Starts commands as one would type them, forked from a server that has imported everything once."""

    folder: Path
    context: Any
    started: list[Command] = field(default_factory=list)

    def __call__(self, *words: str | Path) -> Command:
        name = f"{len(self.started)}-{words[0]}"
        out, err = self.folder / f"{name}.out", self.folder / f"{name}.err"
        process = self.context.Process(target=become, args=([str(word) for word in words], out, err))
        process.start()
        self.started.append(Command(process, out, err))
        return self.started[-1]


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cli.main", "bootstrap.seed", "node.volunteer", "node.presets"])
    shell = Shell(tmp_path, context)
    yield shell
    for command in shell.started:
        if command.process.is_alive():
            command.process.kill()
        command.process.join(10)
    until(lambda: not daemons_using(tmp_path), "p2pd to go")


@pytest.mark.timeout(400)
def test_a_run_from_init_to_leaving(shell: Shell, tmp_path: Path) -> None:
    manifest = tmp_path / "run.toml"
    assert shell("init", "--preset", "tiny", "--stages", "2", "--out", manifest).end() == 0
    run = SignedManifest.read(manifest).run

    seed = shell("bootstrap", "--manifest", manifest, "--identity", tmp_path / "seed.key", *LISTEN)
    seed.logs("bootstrap peer is up")
    invite = until(lambda: seed.out.read_text().strip(), "the invite")
    assert Invite.parse(invite).run == run
    assert seed.out.read_text().count("\n") == 1, "stdout is the invite and nothing else"

    nodes = [
        shell("join", invite, "--stage", stage, "--threads", "1", "--cache-dir", tmp_path / stage, *LISTEN)
        for stage in ("0", "1")
    ]
    for node in nodes:
        node.logs("serving")

    def peers() -> list[dict[str, Any]]:
        asked = shell("peers", invite, "--json", *LISTEN)
        assert asked.end() == 0, asked.err.read_text()
        found = json.loads(asked.out.read_text())
        assert found["run"] == run.hex()
        rows: list[dict[str, Any]] = found["peers"]
        return rows

    # A pause of five seconds inside `peers` is its own; the first answer may come before the first round's end.
    rows = until(lambda: [row for row in peers() if row["microbatches"]], "peers that have worked")
    assert sorted(row["stage"] for row in rows) == [0, 1]
    for row in rows:
        expected = Identity.load(tmp_path / str(row["stage"]) / "node.key").peer_id
        assert row["peer"] == expected
        assert row["state"] in ("serving", "waiting")
        keys = {"weights_version", "throughput", "load", "last_seen", "state_digest", "lost", "refused"}
        assert keys <= row.keys()

    head, tail = nodes
    head.signal(signal.SIGTERM)
    assert head.end() == 0, head.err.read_text()
    assert any(line["event"] == "left" for line in head.events())
    assert [row["stage"] for row in peers()] == [1], "the record of who left was withdrawn"
    assert not daemons_using(tmp_path / "0")

    tail.signal(signal.SIGINT)
    assert tail.end() == 0, tail.err.read_text()
    seed.signal(signal.SIGTERM)
    assert seed.end() == 0, seed.err.read_text()
    assert not daemons_using(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["join", "peers"])
def test_a_signal_while_starting(shell: Shell, tmp_path: Path, command: str, number: signal.Signals) -> None:
    """The seed takes the connection and says nothing: the command waits for it when the signal comes."""
    signed = SignedManifest.sign(small_manifest(), Identity.generate())
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}/p2p/{Identity.generate().peer_id}"
        invite = str(Invite(signed.run, signed.operator, (address,)))
        more = ("--cache-dir", tmp_path) if command == "join" else ()
        started = shell(command, invite, *LISTEN, *more)
        silent.settimeout(PATIENCE)
        peer, _ = silent.accept()
        with peer:
            assert started.process.pid is not None
            (daemon,) = psutil.Process(started.process.pid).children()
            began = monotonic()
            started.signal(number)
            code = started.end()
    assert code == (0 if command == "join" else 130), started.err.read_text()
    assert monotonic() - began < 8, "it should not wait for the seed's time limit"
    assert "Traceback" not in started.err.read_text()
    assert not daemon.is_running() or daemon.status() == psutil.STATUS_ZOMBIE


def test_a_second_seed_is_enough(shell: Shell, tmp_path: Path) -> None:
    signed = SignedManifest.sign(small_manifest(), Identity.generate())
    signed.write(tmp_path / "run.toml")
    with serving(Seed(signed, tmp_path / "first.key", LOOPBACK)) as first:
        words = ("--manifest", tmp_path / "run.toml", "--identity", tmp_path / "second.key", "--with", first)
        second = shell("bootstrap", *words, *LISTEN)
        invite = until(lambda: second.out.exists() and second.out.read_text().strip(), "the second invite")
        assert set(Invite.parse(first).seeds) < set(Invite.parse(invite).seeds)
    asked = shell("peers", invite, *LISTEN)
    assert asked.end() == 0, asked.err.read_text()
    assert "Nobody serves this run yet" in asked.out.read_text()


def test_a_network_daemon_that_dies(shell: Shell, tmp_path: Path) -> None:
    with hosted(small_manifest(), tmp_path / "elsewhere") as invite:
        node = shell("join", invite, "--stage", "1", "--cache-dir", tmp_path / "node", *LISTEN)
        node.logs("serving")
        (daemon,) = daemons_using(tmp_path / "node")
        daemon.kill()
        assert node.end() == 1
    assert node.err.read_text().splitlines()[-1].startswith("sentinel-node: the network daemon p2pd ended")
    assert "Traceback" not in node.err.read_text()


@pytest.mark.timeout(300)
def test_the_demo_writes_its_result_and_leaves_nothing_running(tmp_path: Path) -> None:
    result, kept = tmp_path / "result.json", tmp_path / "kept"
    words = ["--stages", "2", "--replicas", "1", "--rounds", "3", "--json", str(result), "--keep", str(kept)]
    words += ["--verifiers", "0", "--malicious", "0"]
    command = [sys.executable, "-m", "cli.main", "demo", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "nats a token" in done.stdout
    found = json.loads(result.read_text())
    assert found["rounds"] == 3
    assert min(found["final_loss"], found["initial_loss"], found["tokens_per_second"]) > 0
    assert {"lost_microbatches", "rerouted_microbatches"} <= found.keys()
    assert found["attackers"] == found["bans"] == []
    assert found["verification"] == {"sampled_fraction": 0, "bytes_fraction": 0, "cpu_fraction": 0}
    assert [peer["stage"] for peer in found["peers"]] == [0, 1]
    for peer in found["peers"]:
        assert peer.keys() == {"peer", "stage", "microbatches", "weights_version", "state_digest"}
        assert peer["weights_version"] == 3
    assert not daemons_using(tmp_path)

"""The mesh experiment: routing, court, retries, and whole small runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.mesh import Mesh, MeshRun, run_mesh
from benchmarks.mesh_config import MeshConfig
from benchmarks.mesh_court import MeshCourt
from benchmarks.mesh_crew import Crew
from benchmarks.mesh_report import summarise
from benchmarks.mesh_stage import MeshOptimizer, MeshStage
from cli.main import app
from node.trainer import StageTrainer
from protocol.errors import UserError
from protocol.votes import Verdict
from verifier.detector import Court, Detector
from verifier.ladder import Standing
from verifier.registry import make_detector
from verifier.streams import Direction, Hops, Judgement, Mask

TINY = MeshConfig(
    replicas=4,
    stages=4,
    rounds=24,
    warmup=12,
    width=16,
    context=8,
    microbatch=1,
    fraction=0.25,
    detector="none",
)
KEYS = {
    "workers", "attackers", "precision", "recall", "f1", "false_bans", "honest_workers", "rounds_to_ban_median",
    "flagged_fraction_honest", "val_loss", "bans", "seconds_per_round", "verify_seconds_per_round",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def play(**changes: object) -> MeshRun:
    return run_mesh(replace(TINY, **changes))  # type: ignore[arg-type]


def loss_of(run: MeshRun) -> float:
    return run.losses[-1][1]


def test_a_run_is_a_function_of_its_configuration() -> None:
    short = {"rounds": 6, "warmup": 3}
    assert loss_of(play(attack="random", **short)) == loss_of(play(attack="random", **short))
    assert loss_of(play(seed=1, **short)) != loss_of(play(**short))


def test_it_learns() -> None:
    run = play(rounds=40, evaluate_every=5)
    assert loss_of(run) < run.losses[0][1] - 0.3


@pytest.mark.parametrize("direction", [pytest.param("activation", marks=pytest.mark.slow), "gradient"])
def test_defended_it_ends_as_if_nobody_had_attacked(direction: str) -> None:
    changes = {"rounds": 95, "warmup": 70, "attack": "flip", "attack_direction": direction}
    free, bare = play(rounds=95), play(**changes)
    run = play(detector="sentinel", **changes)
    assert summarise(run)["f1"] == 1.0
    assert abs(loss_of(run) - loss_of(free)) < min(0.02, abs(loss_of(bare) - loss_of(free)))


def test_with_everything_recomputed_each_attacker_is_banned_in_its_first_round() -> None:
    config = {"rounds": 8, "warmup": 4, "attack": "noise:0.1", "attack_direction": "both"}
    summary = summarise(play(detector="duplicate", **config))
    assert summary["f1"] == 1.0
    assert summary["rounds_to_ban_median"] == 1
    assert summary["recompute_fraction"] > 0.9


@pytest.mark.parametrize("attack", ["nan", "withhold:1", "scale:1e30"])
def test_what_cannot_be_used_does_not_break_the_run(attack: str) -> None:
    run = play(attack=attack, attack_direction="both", rounds=6, warmup=3)
    assert np.isfinite(loss_of(run))


def test_a_stage_learns_exactly_as_a_nodes_trainer_does() -> None:
    manifest = TINY.manifest()
    stage, trainer = MeshStage(manifest, 1, 0), StageTrainer(manifest, 1, torch.device("cpu"))
    optimizer = MeshOptimizer(manifest, [stage])
    for round in range(4):
        x, gradient = torch.randn(2, 4, 1, 8, 16)
        stage.begin_round()
        stage.forward(x)
        mine = stage.backward(gradient, torch.ones(4, dtype=torch.bool))
        optimizer.step(round)
        taken = trainer.forward(x.flatten(0, 1))
        theirs = trainer.backward(taken, gradient.flatten(0, 1), accumulate=True)
        trainer.step(trainer.take_gradient()[0] / 4)
        assert mine is not None and theirs is not None
        assert torch.allclose(mine.flatten(0, 1), theirs, rtol=1e-4, atol=1e-6)
    for weight, other in zip(stage.module.parameters(), trainer.module.parameters(), strict=True):
        assert torch.allclose(weight, other, rtol=1e-4, atol=1e-6)


def test_old_weights_are_those_of_so_many_rounds_ago() -> None:
    mesh = Mesh(replace(TINY, attack="stale:2", warmup=100), make_detector("none"))
    stage, outputs = mesh.stages[1], []
    x = torch.randn(1, 1, 8, 16)
    for round in range(4):
        mesh.play(round)
        stage.begin_round()
        stage.forward(x)
        outputs.append(stage.redo_activation(0))
        stage._older.pop()
    stage.begin_round()
    assert torch.equal(stage.redo_activation(0, 2), outputs[-3])
    assert not torch.equal(outputs[-1], outputs[-3])


class Spy(Detector):
    """Judges nothing, and remembers what it was shown: (stage, hops). It refuses one hop of `refusing`, once."""

    def __init__(self, suspect: str = "", odd: int = -1, refusing: int = -1) -> None:
        self.suspect, self.odd, self.refusing = suspect, odd, refusing
        self.shown: list[tuple[int, int]] = []

    def judge(self, hops: Hops, court: Court) -> Judgement:
        self.shown.append((hops.stage, len(hops)))
        refused = np.zeros(len(hops), dtype=np.bool_)
        if hops.stage == self.refusing and len(hops) > 1:
            refused[0] = True
        return Judgement(refused)

    def guard(self, hops: Hops) -> Mask:
        return np.arange(len(hops)) == (0 if hops.stage == self.odd else -1)

    def standing(self, peer: str) -> Standing:
        return Standing(Verdict.SUSPECT if peer == self.suspect else Verdict.OK)


@pytest.mark.parametrize(
    ("spy", "shown"),
    [
        (Spy(), set()),
        (Spy(suspect="2/1"), {(2, 4)}),
        (Spy(odd=1), {(1, 4)}),
        (Spy(odd=1, refusing=1), {(1, 4), (1, 1)}),
    ],
)
def test_what_is_not_sampled_is_judged_where_the_guard_a_suspect_or_a_retry_calls_for_it(
    spy: Spy, shown: set[tuple[int, int]]
) -> None:
    Mesh(replace(TINY, sampling=1e-9), spy).play(0)
    assert set(spy.shown) == shown


def test_attackers_sit_where_they_can_attack() -> None:
    inner = Crew(replace(TINY, attack="zeros"))
    assert {stage for stage, _ in inner.saboteurs} == {1, 2} and len(inner.saboteurs) == 2
    ends = replace(TINY, attack="zeros", malicious_ends=True)
    assert {stage for stage, _ in Crew(ends).saboteurs} == {0, 1, 2}
    back = replace(ends, attack_direction="gradient")
    assert {stage for stage, _ in Crew(back).saboteurs} == {1, 2, 3}
    assert len(Crew(replace(TINY, attack="zeros", collusion=0.5)).ring) == 1


@pytest.mark.parametrize("wiring", ["random", "fixed"])
def test_no_microbatch_goes_to_a_banned_worker(wiring: str) -> None:
    crew = Crew(replace(TINY, wiring=wiring))  # type: ignore[arg-type]
    crew.banned |= {(1, 0), (1, 2)}
    for _ in range(5):
        assert sorted(crew.assign(1).tolist()) == [1, 1, 3, 3]
    crew.banned |= {(1, 1), (1, 3)}
    assert crew.assign(1).tolist() == [-1] * 4


def test_a_stage_without_workers_drops_everything_and_ends() -> None:
    mesh = Mesh(TINY, make_detector("none"))
    mesh.crew.banned |= {(2, replica) for replica in range(4)}
    mesh.play(0)
    assert mesh.boundary.tally.dropped == 4


def test_the_court_convicts_by_majority_and_colluders_cannot_acquit_themselves() -> None:
    config = replace(TINY, replicas=5, attack="zeros", fraction=0.4, collusion=1.0, warmup=0)
    mesh = Mesh(config, make_detector("none"))
    mesh.play(0)
    bad, good = [], []
    for replica in range(5):
        (bad if (1, replica) in mesh.crew.ring else good).append(replica)
    honest = mesh.stages[1].redo_activation(0)
    found = [_hear(mesh.court, bad[0], torch.zeros_like(honest)) for _ in range(20)]
    assert len(bad) == 2 and {verdict for verdict, _ in found} == {True, False}
    assert sum(verdict is True for verdict, _ in found) > 8
    assert {_hear(mesh.court, good[0], honest) for _ in range(20)} == {(False, 1.0)}


def test_one_opinion_acquits_or_leaves_it_open() -> None:
    mesh = Mesh(replace(TINY, attack="zeros", warmup=0), make_detector("none"))
    mesh.play(0)
    honest = mesh.stages[1].redo_activation(0)
    for sent, verdict in ((honest, False), (torch.zeros_like(honest), None)):
        hop = Hops(1, Direction.ACTIVATION, 0, ("1/0",), (0,), None, sent[None], np.array([True]))
        assert mesh.court.doubt(hop, 0).guilty is verdict
        assert mesh.court.doubt(hop, 0).cost == 1.0


def _hear(court: MeshCourt, replica: int, sent: torch.Tensor) -> tuple[bool | None, float]:
    hops = Hops(1, Direction.ACTIVATION, 0, (f"1/{replica}",), (0,), None, sent[None], np.array([True]))
    hearing = court.hear(hops, 0)
    return hearing.guilty, hearing.cost


@pytest.mark.parametrize(
    "changes",
    [{"fraction": 0.5}, {"replicas": 1}, {"width": 20}, {"duty": 0.0}, {"sampling": 2.0}, {"stages": 2}],
)
def test_a_wrong_size_says_what_to_write(changes: dict[str, float]) -> None:
    with pytest.raises(UserError) as caught:
        replace(TINY, **changes)  # type: ignore[arg-type]
    assert caught.value.remedy


def test_the_command_writes_its_json_and_a_table(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    size = [
        "--replicas",
        "4",
        "--stages",
        "4",
        "--rounds",
        "12",
        "--warmup",
        "6",
        "--width",
        "16",
        "--context",
        "8",
        "--microbatch",
        "1",
    ]
    attack = [
        "--attack",
        "flip",
        "--attack-direction",
        "both",
        "--wiring",
        "fixed",
        "--sampling",
        "0.5",
        "--seed",
        "2",
    ]
    result = CliRunner().invoke(app, ["simulate", *size, *attack, "--json", str(file)])
    assert result.exit_code == 0, result.output
    summary = json.loads(file.read_text())
    assert set(summary) >= KEYS
    assert summary["workers"] == 16 and summary["attackers"] == 2 and summary["honest_workers"] == 14
    assert {"stage", "replica", "round", "true_attacker", "reason"} >= {
        key for ban in summary["bans"] for key in ban
    }
    assert "val loss" in result.output


@pytest.mark.parametrize(
    "flags",
    [["--attack", "nonsense"], ["--detector", "nonsense"], ["--wiring", "x"], ["--attack-direction", "up"],
     ["--data", "nonsense"], ["--json", "/proc/none/x"]],
)  # fmt: skip
def test_a_wrong_flag_is_one_clear_error(flags: list[str]) -> None:
    result = CliRunner().invoke(app, ["simulate", "--rounds", "1", *flags])
    assert isinstance(result.exception, UserError)

"""`python -m benchmarks.guards`: what the inline guards flag of honest tensors, and let pass of an attacker's, offline.

Three stages train in one process. What they send each other is dealt at random to three replicas a stage, as a swarm
would, and that many times over: every *dealing* has its own paths and its own guards. An attacker is a replica of the
inner stage; the training goes on as if it had not been there, as where guards and bans do their work. Nothing is
injected again.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.figures import console, machine
from benchmarks.live import ATTACKS
from node.data import open_corpus
from node.presets import build_manifest
from node.sabotage import AttackConfig, Sabotage
from node.trainer import StageTrainer
from protocol.errors import UserError
from protocol.identity import PeerId
from protocol.manifest import BatchSection, Manifest
from verifier.guard import Guard
from verifier.loss_guard import LossGuard
from verifier.saboteur import Orders, parse_attack
from verifier.streams import Direction

STAGES, REPLICAS, INNER = 3, 3, 1
_NOBODY = ""
_A, _G = Direction.ACTIVATION, Direction.GRADIENT

_console = console()


@dataclass(frozen=True)
class Passage:
    """One microbatch of a round: what each stage but the last sends on, each but the first sends back, its labels, and
    the loss."""

    round: int
    slot: int
    sent: Mapping[tuple[Direction, int], Tensor]
    labels: Tensor
    loss: float


@dataclass(frozen=True)
class Lie:
    """What an attacker of the inner stage sends instead, and the loss that it leads to (a gradient's to none)."""

    tensor: Tensor
    loss: float


@dataclass
class Tally:
    """Tensors of one sort, how many were flagged, and of an attacker's how many passed before that."""

    sent: int = 0
    flagged: int = 0
    passed_first: int = 0

    def note(self, is_flagged: bool) -> None:
        self.sent += 1
        self.passed_first += not is_flagged and not self.flagged
        self.flagged += is_flagged


@dataclass
class Dealing:
    """One imagined swarm. `attack` is a SPEC, or empty for none."""

    attack: str
    seed: int
    honest: dict[str, Tally] = field(default_factory=dict)
    lies: dict[Direction, Tally] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lot, places = random.Random(self.seed), np.random.default_rng(self.seed)
        self._guards = {
            (stage, direction, replica): Guard(direction, places)
            for stage in range(STAGES)
            for direction in Direction
            for replica in range(REPLICAS)
        }
        self._loss_guards = [LossGuard() for _ in range(REPLICAS)]

    def deal(self, passage: Passage, lies: Mapping[Direction, Lie | None]) -> None:
        path = [self._lot.randrange(REPLICAS) for _ in range(STAGES)]
        loss: float | None = passage.loss
        for (direction, stage), tensor in passage.sent.items():
            is_honest = stage != INNER or path[INNER] != 0 or direction not in lies
            if is_honest:
                passes = self._look(direction, stage, path, tensor, passage)
                self.honest.setdefault(direction.value, Tally()).note(not passes)
                continue
            if direction is _A:
                loss = None
            lie = lies[direction]
            if lie is None:
                continue
            # What is not finite is refused before the guard is asked.
            is_finite = bool(torch.isfinite(lie.tensor.sum()))
            passes = is_finite and self._look(direction, stage, path, lie.tensor, passage)
            if direction is _A:
                passes = passes and self._look_at_loss(path, lie.loss)
            self.lies.setdefault(direction, Tally()).note(not passes)
        if loss is not None:
            self.honest.setdefault("loss", Tally()).note(not self._look_at_loss(path, loss))

    def _look(
        self, direction: Direction, stage: int, path: Sequence[int], tensor: Tensor, passage: Passage
    ) -> bool:
        receiver = stage + 1 if direction is _A else stage - 1
        guard, labels = self._guards[receiver, direction, path[receiver]], passage.labels.flatten().tolist()
        return guard.check(tensor, _name(stage, path), labels, version=passage.round)

    def _look_at_loss(self, path: Sequence[int], loss: float) -> bool:
        return self._loss_guards[path[-1]].check(loss, _name(STAGES - 2, path))

    @property
    def flagged_fraction(self) -> float:
        """Of the honest tensors, by either guard."""
        every = self.honest.values()
        return sum(one.flagged for one in every) / self.honest[_A.value].sent / 2


def _name(stage: int, path: Sequence[int]) -> PeerId:
    return PeerId(f"stage{stage}-{path[stage]}")


def passages(manifest: Manifest, stages: Sequence[StageTrainer]) -> Iterator[Passage]:
    """Train, and say what was sent of each microbatch."""
    corpus, size = open_corpus(manifest), manifest.batch.microbatches
    first, inner, last = stages
    for round_ in range(manifest.schedule.rounds):
        for slot in range(round_ * size, (round_ + 1) * size):
            tokens = corpus.draw(slot)
            inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            begun = first.forward(inputs)
            passed = inner.forward(begun.output)
            loss, gradient = last.loss_backward(passed.output, labels, accumulate=True)
            assert gradient is not None
            returned = inner.backward(passed, gradient, accumulate=True)
            assert returned is not None
            first.backward(begun, returned, accumulate=True)
            sent = {(_A, 0): begun.output, (_A, 1): passed.output, (_G, 2): gradient, (_G, 1): returned}
            yield Passage(round_, slot, sent, labels, loss)
        for stage in stages:
            gradient, count = stage.take_gradient()
            stage.step(gradient / count)


def _lies(
    sabotage: Sabotage, passage: Passage, stages: Sequence[StageTrainer]
) -> dict[Direction, Lie | None]:
    """What the attacker sends of a microbatch instead of its outputs, once it has begun; None for nothing."""
    _, inner, last = stages
    lies: dict[Direction, Lie | None] = {}
    x = passage.sent[_A, 0]
    for direction, inputs, gradient in ((_A, x, None), (_G, passage.sent[_G, 2], passage.sent[_G, 2])):

        def redo(ago: int, gradient: Tensor | None = gradient) -> Tensor:
            return inner.redo(max(inner.version - ago, inner.oldest), x, gradient)

        output = passage.sent[direction, INNER]
        tensor = sabotage.send(direction, passage.round, passage.slot, inputs, output, redo)
        if tensor is None:
            lies[direction] = None
        elif tensor is not output:
            with torch.no_grad():
                loss = float(last.module.loss(tensor, passage.labels)) if direction is _A else passage.loss
            lies[direction] = Lie(tensor, loss)
    return lies


def measure(manifest: Manifest, attacks: Sequence[str], dealings: int, start: int) -> list[Dealing]:
    seed, device = manifest.seed, torch.device("cpu")
    stages = [StageTrainer(manifest, stage, device) for stage in range(STAGES)]
    orders, attacker = Orders(start=start), PeerId(f"stage{INNER}-0")
    sabotages = {
        spec: Sabotage(AttackConfig(parse_attack(spec), orders), INNER, attacker, seed) for spec in attacks
    }
    stages[INNER].memory = max((one.weight_memory for one in sabotages.values()), default=0)
    found = [
        Dealing(spec, 1000 * seed + number) for spec in (_NOBODY, *attacks) for number in range(dealings)
    ]
    count = manifest.schedule.rounds * manifest.batch.microbatches
    for passage in track(passages(manifest, stages), f"seed {seed}", total=count, console=_console):
        lies = {spec: _lies(one, passage, stages) for spec, one in sabotages.items()}
        for dealing in found:
            dealing.deal(passage, lies.get(dealing.attack, {}))
    return found


def summarise(found: Sequence[Dealing]) -> dict[str, Any]:
    sent: Counter[str] = Counter()
    flagged: Counter[str] = Counter()
    for dealing in found:
        for sort, tally in dealing.honest.items():
            sent[sort] += tally.sent
            flagged[sort] += tally.flagged
    clean = [one.flagged_fraction for one in found if one.attack == _NOBODY]
    return {
        "honest": {
            sort: {"sent": sent[sort], "flagged": flagged[sort], "share": flagged[sort] / sent[sort]}
            for sort in sent
        },
        "without_attacker": {
            "dealings": len(clean),
            "flagged_fraction": mean(clean),
            "worst_flagged_fraction": max(clean),
        },
        "attacks": [
            _attack(
                spec, direction, [one.lies.get(direction, Tally()) for one in found if one.attack == spec]
            )
            for spec in dict.fromkeys(one.attack for one in found if one.attack)
            for direction in Direction
        ],
    }


def _attack(spec: str, direction: Direction, tallies: Sequence[Tally]) -> dict[str, Any]:
    sent = sum(one.sent for one in tallies)
    return {
        "attack": spec,
        "direction": direction.value,
        "sent": sent,
        "share": sum(one.flagged for one in tallies) / max(1, sent),
        "passed_first": mean(one.passed_first for one in tallies),
        "never": sum(not one.flagged for one in tallies),
    }


def show(found: dict[str, Any]) -> None:
    honest = Table("of honest peers", "sent", "flagged", "share")
    for sort, one in found["honest"].items():
        honest.add_row(sort, f"{one['sent']:,}", f"{one['flagged']:,}", f"{one['share']:.3%}")
    _console.print(honest)
    clean = found["without_attacker"]
    _console.print(
        f"without an attacker {clean['flagged_fraction']:.3%} in the mean of {clean['dealings']} dealings, "
        f"{clean['worst_flagged_fraction']:.3%} in the worst"
    )
    if not found["attacks"]:
        return
    lies = Table("attack", "direction", "sent", "flagged", "passed before the first", "dealings with none")
    for one in found["attacks"]:
        lies.add_row(
            one["attack"], one["direction"], f"{one['sent']:,}", f"{one['share']:.1%}",
            f"{one['passed_first']:.1f}", str(one["never"]),
        )  # fmt: skip
    _console.print(lies)


def _manifest(seed: int, chosen: argparse.Namespace) -> Manifest:
    base = build_manifest(
        preset=chosen.preset, config=None, stages=STAGES, data=chosen.data, tokenizer="bytes", seed=seed,
        testbed=True, schedule="synchronous", rounds=chosen.rounds, min_replicas=1, wire="fp32", name="guards",
    )  # fmt: skip
    changes = {"sequences": chosen.sequences, "context": chosen.context}
    batch = BatchSection(
        **base.batch.model_dump() | {key: one for key, one in changes.items() if one is not None}
    )
    return base.model_copy(update={"batch": batch})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guards", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument(
        "--dealings", type=int, default=10, help="of each seed, without an attack and of each"
    )
    parser.add_argument("--attacks", nargs="*", default=list(ATTACKS), metavar="SPEC")
    parser.add_argument("--start", type=int, default=10, help="first round that is attacked")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--data", default="builtin:pydoc")
    parser.add_argument("--sequences", type=int, help="of a microbatch, if not the preset's")
    parser.add_argument("--context", type=int, help="tokens of a sequence, if not the preset's")
    parser.add_argument("--json", type=Path, metavar="FILE")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    try:
        dealt = [
            dealing
            for seed in chosen.seeds
            for dealing in measure(_manifest(seed, chosen), chosen.attacks, chosen.dealings, chosen.start)
        ]
    except UserError as error:
        sys.exit(str(error))
    found = summarise(dealt)
    show(found)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps({"machine": machine(), **found}, indent=2))
        print(f"written: {chosen.json}", file=sys.stderr)


if __name__ == "__main__":
    main()

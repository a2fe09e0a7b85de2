"""What each experiment runs: a list of cases, each one mesh run and its place in a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.mesh_config import MeshConfig

PAPER_ATTACKS = (
    "zeros",
    "random",
    "flip",
    "random-sign:0.5",
    "delay:100",
    "bias:1",
    "invisible-noise:0.99",
    "adaptive-ema:0.9",
    "mixed",
)
# The detector was built while looking at these; everything else in the tables was kept aside.
TUNED_ON = frozenset(
    {"zeros", "random", "flip", "random-sign:0.5", "bias:1", "bias:0.5", "bias:0.1", "noise:0.1"}
    | {"invisible-noise:0.99"}
    | {"delay:100", "adaptive-ema:0.9", "mixed"}
)
SEEDS = (0, 1, 2)
NO_ATTACK = "no attack"

# 128 workers and 200 attacked rounds, as small as a model can be that still learns.
BASE = MeshConfig(rounds=260, warmup=60, width=32, context=32)
# Where many variants are compared, a shorter pipeline does: 48 workers.
_SHORT = {"stages": 6}
_QUICK = {"replicas": 4, "stages": 4, "rounds": 40, "warmup": 20, "context": 16}


@dataclass(frozen=True)
class Case:
    """One run: `row` names what is attacked and how, and with `config.detector` and seed its place in the tables."""

    row: str
    config: MeshConfig

    @property
    def held_out(self) -> bool:
        return self.config.attack is not None and self.config.attack not in TUNED_ON


def plan(name: str, *, quick: bool) -> list[Case]:
    """The cases of an experiment, the same list every time."""
    cases = list(PLANS[name]())
    return [_shrink(case) for case in cases] if quick else cases


def by_worth(case: Case) -> tuple[int, int, bool]:
    """Sorts what tells most to the front, for tables of an experiment that was not run to its end.

    Attack-free losses, then our detector on everything once, whom it bans without an attack, more seeds, the others.
    """
    config = case.config
    detectors = ("sentinel", "none", "marginal")
    place = detectors.index(config.detector) if config.detector in detectors else len(detectors)
    if config.attack is None:
        return (0 if config.detector == "none" else 1 + (config.seed > 0)), config.seed, False
    return (3 * (config.seed > 0) if place == 0 else 3) + 1, config.seed + place, config.fraction < 0.3


def _shrink(case: Case) -> Case:
    shrunk: dict[str, Any] = dict(_QUICK)
    if case.config.fraction > 0.25:
        shrunk["fraction"] = 0.25
    if case.config.warmup == 0:
        shrunk["warmup"] = 0
    return replace(case, config=replace(case.config, **shrunk))


def _attacked(row: str, detectors: tuple[str, ...], **changes: Any) -> Iterator[Case]:
    """One attack under several detectors: the first with all seeds, the others with one."""
    for detector in detectors:
        for seed in SEEDS if detector == detectors[0] else SEEDS[:1]:
            yield Case(row, replace(BASE, detector=detector, seed=seed, **changes))


def _attack_free(detector: str, seeds: tuple[int, ...], **changes: Any) -> Iterator[Case]:
    for seed in seeds:
        yield Case(NO_ATTACK, replace(BASE, detector=detector, seed=seed, **changes))


def _paper() -> Iterator[Case]:
    yield from _attack_free("none", SEEDS)
    for fraction in (0.375, 0.25):
        for direction in ("activation", "gradient"):
            for attack in PAPER_ATTACKS:
                yield from _attacked(
                    f"{attack}, {direction}, {fraction:.1%}",
                    ("sentinel", "marginal", "none"),
                    attack=attack,
                    attack_direction=direction,
                    fraction=fraction,
                )
    yield from _attack_free("sentinel", tuple(range(20)))
    yield from _attack_free("marginal", SEEDS[:1])


BEYOND: tuple[tuple[str, dict[str, Any]], ...] = (
    ("drift:0.5", {"attack": "drift:0.5"}),
    ("mlp", {"attack": "mlp"}),
    ("stale:20", {"attack": "stale:20", "attack_direction": "both"}),
    ("partial:0.1", {"attack": "partial:0.1"}),
    ("partial:0.02", {"attack": "partial:0.02"}),
    ("adaptive-ema:0.5", {"attack": "adaptive-ema:0.5"}),
    ("scale:0.5", {"attack": "scale:0.5", "attack_direction": "gradient"}),
    ("constant:1", {"attack": "constant:1"}),
    ("replay", {"attack": "replay"}),
    ("withhold:0.5", {"attack": "withhold:0.5"}),
    ("nan", {"attack": "nan"}),
    ("flip, duty 0.1", {"attack": "flip", "attack_direction": "both", "duty": 0.1}),
    ("flip, duty 0.01", {"attack": "flip", "attack_direction": "both", "duty": 0.01}),
    ("random, 30% colluding", {"attack": "random", "collusion": 0.3}),
    ("random, 60% colluding", {"attack": "random", "collusion": 0.6}),
    ("random, malicious ends", {"attack": "random", "attack_direction": "both", "malicious_ends": True}),
    ("mixed, from round 0", {"attack": "mixed", "attack_direction": "both", "warmup": 0, "rounds": 200}),
    ("mixed, 45%", {"attack": "mixed", "fraction": 0.45, "replicas": 20, "stages": 5}),
)
STRENGTHS: tuple[tuple[str, str], ...] = tuple(
    (f"{kind}:{strength:g}", direction)
    for kind, direction in (("noise", "activation"), ("random-sign", "gradient"))
    for strength in ((0.05, 0.1, 0.2, 0.5, 1.0) if kind == "noise" else (0.01, 0.03, 0.1, 0.3))
)


def _beyond() -> Iterator[Case]:
    detectors = ("sentinel", "sentinel:no-recompute", "none")
    yield from _attack_free("none", SEEDS, **_SHORT)
    yield from _attack_free("none", SEEDS, **_SHORT, warmup=0, rounds=200)
    yield from _attack_free("none", SEEDS, replicas=20, stages=5)
    for row, changes in BEYOND:
        yield from _attacked(row, detectors, **(_SHORT | {"fraction": 0.375} | changes))
    for attack, direction in STRENGTHS:
        yield from _attacked(
            f"{attack}, {direction}",
            detectors,
            attack=attack,
            attack_direction=direction,
            fraction=0.375,
            **_SHORT,
        )


ABLATION_ATTACKS = (
    ("mixed", "activation"),
    ("mixed", "gradient"),
    ("bias:0.3", "activation"),
    ("random-sign:0.1", "gradient"),
)
ABLATIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("all of it", {"detector": "sentinel"}),
    ("no recomputation", {"detector": "sentinel:no-recompute"}),
    ("no EMA", {"detector": "sentinel:no-ema,no-recompute"}),
    ("no marginal features", {"detector": "sentinel:no-marginal,no-recompute"}),
    ("no transition features", {"detector": "sentinel:no-transition,no-recompute"}),
    ("no token features", {"detector": "sentinel:no-tokens,no-recompute"}),
    ("no centring", {"detector": "sentinel:no-centring,no-recompute"}),
    ("no bets on ranks", {"detector": "sentinel:no-ranks,no-recompute"}),
    ("counter, no martingale", {"detector": "sentinel:counter,no-recompute"}),
    ("sampling 0.2", {"detector": "sentinel", "sampling": 0.2}),
    ("sampling 0.05", {"detector": "sentinel", "sampling": 0.05}),
)


def _ablation() -> Iterator[Case]:
    for what, changes in ABLATIONS:
        for seed in SEEDS:
            changed = _SHORT | {"fraction": 0.375, "seed": seed} | changes
            yield Case(what, replace(BASE, **changed))
            for attack, direction in ABLATION_ATTACKS:
                attacked = changed | {"attack": attack, "attack_direction": direction}
                yield Case(what, replace(BASE, **attacked))


def _scale() -> Iterator[Case]:
    for replicas in (2, 4, 8, 11):
        wide = replace(BASE, replicas=replicas, width=256, context=64, rounds=40, warmup=40)
        yield Case(f"{wide.workers} workers", wide)


PLANS: dict[str, Callable[[], Iterator[Case]]] = {
    "paper": _paper,
    "beyond": _beyond,
    "ablation": _ablation,
    "scale": _scale,
}

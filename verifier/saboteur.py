"""From an attack's SPEC to a worker that carries it out: direction, start and duty cycle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from blake3 import blake3
from torch import Tensor

from protocol.errors import UserError
from verifier import attacks
from verifier.attacks import View
from verifier.loading import load_class, names_a_file
from verifier.streams import Direction


class Corrupts(Protocol):
    """What an attack must offer; `watch` and `weight_memory` of `attacks.Attack` are optional extras."""

    def corrupt(self, output: Tensor, view: View) -> Tensor: ...


AttackFactory: TypeAlias = Callable[[int], Corrupts]
"""Makes the attack for a seed."""

# SPEC name -> class and what the number after the colon sets.
_SUITE: dict[str, tuple[type[attacks.Attack], str | None]] = {
    "zeros": (attacks.Zeros, None),
    "constant": (attacks.Constant, "value"),
    "random": (attacks.Random, None),
    "scale": (attacks.Scale, "factor"),
    "flip": (attacks.Flip, None),
    "random-sign": (attacks.RandomSign, "fraction"),
    "delay": (attacks.Delay, "rounds"),
    "bias": (attacks.Bias, "deviations"),
    "invisible-noise": (attacks.InvisibleNoise, "quantile"),
    "adaptive-ema": (attacks.AdaptiveEma, "fraction"),
    "mixed": (attacks.Mixed, None),
    "noise": (attacks.Noise, "deviations"),
    "drift": (attacks.Drift, "deviations"),
    "mlp": (attacks.Mlp, None),
    "stale": (attacks.Stale, "versions"),
    "partial": (attacks.Partial, "fraction"),
    "nan": (attacks.Nan, None),
    "withhold": (attacks.Withhold, "fraction"),
    "replay": (attacks.Replay, None),
}
_FRACTIONS = {"fraction", "quantile"}
_AT_LEAST_ONE = {"rounds", "versions"}


def parse_attack(spec: str) -> AttackFactory:
    """`NAME`, `NAME:NUMBER` or `FILE.py:CLASS[:KEY=NUMBER,...]`. Raises `UserError` for anything else."""
    if names_a_file(spec):
        return _parse_own(spec)
    name, _, text = spec.partition(":")
    if name not in _SUITE:
        raise UserError(f"Unknown attack {spec}", f"Use one of {', '.join(_SUITE)}, or FILE.py:CLASS")
    kind, parameter = _SUITE[name]
    params: dict[str, float] = {}
    if text:
        if parameter is None:
            raise UserError(f"The attack {name} takes no number", f"Write {name}")
        params[parameter] = _number(spec, text)
        _check_range(spec, name, parameter, params[parameter])
    return lambda seed: kind(seed=seed, **params)


def _parse_own(spec: str) -> AttackFactory:
    file, _, rest = spec.partition(".py:")
    name, _, text = rest.partition(":")
    kind = load_class(f"{file}.py:{name}", "corrupt")
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    params = {key: _number(spec, value) for key, _, value in pairs}

    def make(seed: int) -> Corrupts:
        try:
            made: Corrupts = kind(seed=seed, **params)
        except TypeError as error:
            remedy = "Its __init__ must take (self, *, seed, **params)"
            raise UserError(f"Cannot make {name}: {error}", remedy) from None
        return made

    make(0)  # What cannot be made should fail here, and not in the midst of a run.
    return make


def _number(spec: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{text!r} in {spec} is no number", "Write, say, noise:0.5") from None
    if value != value or abs(value) == float("inf"):
        raise UserError(f"{text!r} in {spec} is not finite", "Write, say, noise:0.5")
    return value


def _check_range(spec: str, name: str, parameter: str, value: float) -> None:
    if parameter == "fraction" and name != "adaptive-ema" and not 0 <= value <= 1:
        raise UserError(f"{spec}: the {parameter} must be from 0 to 1", f"Write, say, {name}:0.5")
    if parameter == "quantile" and not 0 < value <= 1:
        raise UserError(f"{spec}: the quantile must be above 0 and at most 1", f"Write, say, {name}:0.99")
    if parameter in _AT_LEAST_ONE and value < 1:
        raise UserError(f"{spec}: must be at least 1", f"Write, say, {name}:20")


@dataclass(frozen=True)
class Orders:
    """When and where an attack is carried out. `duty` is the share of rounds in which it acts."""

    directions: frozenset[Direction] = frozenset(Direction)
    start: int = 0
    duty: float = 1.0


class Saboteur:
    """One malicious worker: sends its honest output or a corrupted one, as its orders say."""

    def __init__(self, attack: Corrupts, orders: Orders, seed: int) -> None:
        self.attack = attack
        self.orders = orders
        self.weight_memory: int = getattr(attack, "weight_memory", 0)
        self._seed = seed
        self._watch: Callable[[Tensor, View], None] | None = getattr(attack, "watch", None)
        self._states: dict[Direction, dict[str, Any]] = {direction: {} for direction in Direction}

    def state(self, direction: Direction) -> dict[str, Any]:
        """The dict to put into `View.state`: one per direction, as long as the worker lives."""
        return self._states[direction]

    def acts(self, direction: Direction, round: int) -> bool:
        """Whether it corrupts what it sends in this round. Colluders (equal seeds) act in the same rounds."""
        if direction not in self.orders.directions or round < self.orders.start:
            return False
        if self.orders.duty >= 1:
            return True
        drawn = blake3(f"duty/{self._seed}/{round}".encode()).digest(length=8)
        return int.from_bytes(drawn, "little") < self.orders.duty * 2**64

    def send(self, output: Tensor, view: View) -> Tensor:
        """What goes out in place of the honest `output` (B, T, W); any other shape means that nothing usable does."""
        if self.acts(view.direction, view.round):
            with torch.no_grad():
                return self.attack.corrupt(output, view)
        if self._watch is not None and view.direction in self.orders.directions:
            self._watch(output, view)
        return output

"""Detectors by name, with `sentinel`'s variants for ablations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from protocol.errors import UserError
from verifier.detector import Detector, LetPass
from verifier.duplicate import Duplicate
from verifier.loading import load_class, names_a_file
from verifier.marginal import Marginal, MarginalSettings
from verifier.sentinel import Sentinel, Settings
from verifier.streams import Direction

_BUILTIN: dict[str, Callable[[int], Detector]] = {
    "sentinel": lambda warmup: Sentinel(),
    "marginal": lambda warmup: Marginal(MarginalSettings(warmup=warmup)),
    "none": lambda warmup: LetPass(),
    "duplicate": lambda warmup: Duplicate(),
}
_FAMILIES = Settings().families
# What an ablation takes away from `sentinel`.
VARIANTS: dict[str, dict[str, Any]] = {
    "no-ema": {"memory": dict.fromkeys(Direction, 0.0)},
    "no-centring": {"centring": False},
    "no-ranks": {"ranks": False},
    "counter": {"counter": True},
    "no-recompute": {"recompute": 0.0},
    **{
        f"no-{family}": {"families": tuple(one for one in _FAMILIES if one != family)} for family in _FAMILIES
    },
}


def make_detector(spec: str, warmup: int = 0) -> Detector:
    """`sentinel`, `sentinel:VARIANT[,VARIANT...]` (also alpha=A), `marginal`, `none`, `duplicate` or `FILE.py:CLASS`.

    `warmup` is the number of honest rounds that the paper's detector is given; ours needs none. Raises `UserError`.
    """
    if names_a_file(spec):
        return _make_own(spec)
    name, _, text = spec.partition(":")
    if name == "sentinel" and text:
        return Sentinel(_vary(Settings(), text))
    if spec not in _BUILTIN:
        raise UserError(f"Unknown detector {spec}", f"Use one of {', '.join(_BUILTIN)}, or FILE.py:CLASS")
    return _BUILTIN[spec](warmup)


def _vary(settings: Settings, text: str) -> Settings:
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if key == "alpha" and equals:
            settings = replace(settings, alpha=_alpha(value))
        elif part in VARIANTS:
            settings = replace(settings, **VARIANTS[part])
        else:
            raise UserError(
                f"Unknown variant {part} of sentinel", f"Use {', '.join(VARIANTS)} or alpha=0.001"
            )
    return settings


def _alpha(text: str) -> float:
    try:
        alpha = float(text)
    except ValueError:
        alpha = -1.0
    if not 0 < alpha < 1:
        raise UserError(f"alpha={text} is no probability", "Write, say, alpha=0.001")
    return alpha


def _make_own(spec: str) -> Detector:
    made = load_class(spec, "judge")
    try:
        detector = made()
    except TypeError as error:
        raise UserError(f"Cannot make {spec}: {error}", "Its __init__ must take no arguments") from None
    if not isinstance(detector, Detector):
        raise UserError(f"{spec} is no Detector", "Derive it from verifier.detector.Detector")
    return detector

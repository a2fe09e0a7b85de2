"""Detectors by name."""

from __future__ import annotations

from verifier.detector import Detector, LetPass
from verifier.sentinel import Sentinel


def make_detector(spec: str) -> Detector:
    return Sentinel() if spec=="sentinel" else LetPass()

"""A testbed's attacker: an honest node but for what it sends. Runs on the compute thread, before digest and receipt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from protocol.identity import PeerId
from verifier.attacks import View
from verifier.saboteur import AttackFactory, Orders, Saboteur
from verifier.streams import Direction

Redo = Callable[[int], Tensor]
"""Versions ago -> the honest tensor on those weights."""


@dataclass(frozen=True)
class AttackConfig:
    """What `join --attack` asked for. `make` gives the attack for a seed."""

    make: AttackFactory
    orders: Orders


class Sabotage:
    """What one malicious node sends in place of its outputs. Its colluders have the same seed."""

    def __init__(self, config: AttackConfig, stage: int, peer: PeerId, seed: int) -> None:
        self._saboteur = Saboteur(config.make(seed), config.orders, seed)
        self._stage, self._peer = stage, peer
        self.weight_memory = self._saboteur.weight_memory

    def send(
        self, direction: Direction, version: int, slot: int, inputs: Tensor, output: Tensor, redo: Redo
    ) -> Tensor | None:
        """What goes out instead of `output` (B, T, W), made of `inputs` (a head's: its output); None: nothing does."""
        view = View(
            direction=direction,
            stage=self._stage,
            round=version,
            microbatch=slot,
            peer=self._peer,
            inputs=inputs,
            state=self._saboteur.state(direction),
            with_older_weights=redo,
        )
        sent = self._saboteur.send(output, view)
        return sent if sent.shape == output.shape else None

"""Which stage a joiner serves, and on what device: of the stages that fit there, the least served."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

import psutil
import torch

from node.model import parameter_bytes
from protocol.errors import UserError
from protocol.identity import PeerId
from protocol.manifest import Manifest

_STATE_COPIES = 5
"""Weights, gradient, two moments and a copy while a step runs: the stage's memory in units of its weights."""


def choose_device(name: str) -> torch.device:
    """Raises `UserError` for a device that this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{name} is no device", "Use --device auto, cpu or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(
            f"Devices of type {device.type} are not supported", "Use --device auto, cpu or cuda:N"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"This machine has no {name}", "Use --device auto")
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that a stage may take on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def check_fits(manifest: Manifest, stage: int, device: torch.device) -> None:
    """Raises `UserError` if the stage's weights, gradients and optimizer do not fit in the device's free memory."""
    need, have = _STATE_COPIES * parameter_bytes(manifest, stage), free_memory(device)
    if need > have:
        raise UserError(
            f"Stage {stage} needs {need / 2**30:.2f} GiB on {device}, and {have / 2**30:.2f} GiB are free",
            "Free memory, use another --device, or join a run with smaller stages",
        )


def fitting_stages(manifest: Manifest, device: torch.device) -> list[int]:
    """The stages that fit on the device. Raises `UserError` if none does."""
    need = [_STATE_COPIES * parameter_bytes(manifest, stage) for stage in range(manifest.stages.count)]
    have = free_memory(device)
    if min(need) > have:
        check_fits(manifest, need.index(min(need)), device)
    return [stage for stage, size in enumerate(need) if size <= have]


def least_served(served: Mapping[int, int], own: PeerId) -> int:
    """Of the stages in `served` (stage to number of replicas) one with the fewest.

    Of equally served stages each peer begins elsewhere, so that those who join together spread.
    """
    offset = blake2b(own.encode(), digest_size=4).digest()[0] % len(served)
    order = sorted(served)
    turned = order[offset:] + order[:offset]
    return min(turned, key=lambda stage: served[stage])

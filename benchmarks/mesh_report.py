"""What a mesh run says about itself: numbers for a file and for a table."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from benchmarks.mesh import MeshRun
from benchmarks.mesh_crew import peer_name


def summarise(run: MeshRun) -> dict[str, Any]:
    """The run as plain JSON values. By worker: an attacker that is banned is a true positive.

    `rounds_to_ban_median` counts from the attack's start, the round of the ban included; None if nobody was banned.
    `val_loss` is None if it is not finite. `seconds_per_round` includes verification. Processor time is what to
    compare on a machine that does other work too, with one thread: with more, they also take some to wait.
    """
    config, tally = run.config, run.tally
    attackers = {peer_name(worker) for worker in run.crew.saboteurs}
    caught = [ban for ban in tally.bans if ban.peer in attackers]
    false_bans = len(tally.bans) - len(caught)
    delays = [ban.round - config.warmup + 1 for ban in caught]
    loss = run.losses[-1][1]
    return {
        "workers": config.workers,
        "attackers": len(attackers),
        "precision": _share(len(caught), len(tally.bans)),
        "recall": _share(len(caught), len(attackers)),
        "f1": _share(2 * len(caught), len(tally.bans) + len(attackers)),
        "false_bans": false_bans,
        "honest_workers": config.workers - len(attackers),
        "rounds_to_ban_median": median(delays) if delays else None,
        "flagged_fraction_honest": tally.honest_refused / max(1, tally.honest_hops),
        "refused_fraction_corrupt": _share(tally.corrupt_refused, tally.corrupt_hops),
        "val_loss": loss if math.isfinite(loss) else None,
        "val_losses": [[round, one if math.isfinite(one) else None] for round, one in run.losses],
        "bans": [
            {
                "stage": ban.stage,
                "replica": int(ban.peer.split("/")[1]),
                "round": ban.round,
                "true_attacker": ban.peer in attackers,
                "reason": ban.reason,
            }
            for ban in tally.bans
        ],
        "seconds_per_round": run.seconds / max(1, run.rounds),
        "verify_seconds_per_round": tally.verify_seconds / max(1, run.rounds),
        "cpu_seconds_per_round": run.cpu_seconds / max(1, run.rounds),
        "verify_cpu_seconds_per_round": tally.verify_cpu_seconds / max(1, run.rounds),
        "recompute_fraction": run.recompute_fraction,
        "retried_hops": tally.retried,
        "dropped_microbatches": tally.dropped,
        "config": config.to_dict(),
    }


def _share(part: int, whole: int) -> float | None:
    """None where there is nothing to take a share of: precision without bans, recall without attackers."""
    return part / whole if whole else None

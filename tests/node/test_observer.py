"""What an observer makes of what it has heard."""

from __future__ import annotations

from pathlib import Path
from time import monotonic

from node.observer import Observer, Sighting
from node.progress import LIVE_FOR
from protocol.directory import PeerState
from protocol.identity import Identity, PeerId
from protocol.invite import Invite
from protocol.reports import Metrics

DIGEST = b"\0" * 32


def report(*shunned: PeerId) -> Metrics:
    return Metrics(
        stage=0, version=1, digest=DIGEST, state=PeerState.SERVING, microbatches=1, lost=0, rerouted=0, in_flight=0,
        tokens_per_second=1.0, sent_bytes=1, refused={}, losses=(), waiting_for=-1, shunned=shunned,
    )  # fmt: skip


def test_it_knows_who_leaves_a_peer_alone_and_forgets_who_is_not_heard_any_more(tmp_path: Path) -> None:
    one, two, silent, culprit = (Identity.generate().peer_id for _ in range(4))
    observer = Observer(Invite(DIGEST, one, ("/ip4/127.0.0.1/tcp/1",)), tmp_path / "key")
    now = monotonic()
    observer.sightings = {
        one: Sighting(report(culprit), now),
        two: Sighting(report(), now),
        silent: Sighting(report(culprit), now - LIVE_FOR),
    }
    assert observer.shunned_by(culprit) == [one]
    assert observer.shunned_by(one) == []

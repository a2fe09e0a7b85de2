"""`bans` as a person meets it: asked of a run whose seed kept its votes, exported, and checked without a network."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bootstrap.seed import Seed
from protocol import vote_file
from protocol.host import LOOPBACK
from protocol.identity import Identity
from protocol.manifest import SignedManifest, VerificationSection
from protocol.vote_set import VoteSet
from protocol.votes import Cause, Verdict
from tests.cli.conftest import LISTEN, Invoke, serving
from tests.protocol.ballots import PEERS, VERIFIERS
from tests.swarms import small_manifest

BANNED, DISPUTED = PEERS[:2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the manifest `run.toml`, and what the seed kept of the votes."""
    folder = tmp_path_factory.mktemp("run")
    policy = VerificationSection(verifiers=tuple(one.peer_id for one in VERIFIERS), quorum=2)
    signed = SignedManifest.sign(small_manifest(verification=policy), Identity.generate())
    signed.write(folder / "run.toml")
    votes, now = VoteSet(signed.electorate), time.time()
    for verifier, subject in ((VERIFIERS[0], BANNED), (VERIFIERS[1], BANNED), (VERIFIERS[2], DISPUTED)):
        text = "outputs [b]do not follow[/b] from inputs"
        votes.cast(
            verifier, subject, Verdict.BANNED, Cause.EVIDENCE, now, stage=1, evidence=b"e" * 32, text=text
        )
    vote_file.write(vote_file.archive(votes), folder / "seed.votes")
    return folder


@pytest.fixture(scope="module")
def invite(folder: Path) -> Iterator[str]:
    with serving(Seed(SignedManifest.read(folder / "run.toml"), folder / "seed.key", LOOPBACK)) as invite:
        yield invite


def test_bans_of_a_run(invoke: Invoke, invite: str, folder: Path) -> None:
    outcome = invoke("bans", invite, *LISTEN)
    assert outcome.code == 0, outcome.err
    assert BANNED in outcome.out and "2 of 3" in outcome.out
    assert "[b]do not follow[/b]" in " ".join(outcome.out.split()), "shown as it is, not as markup"
    line = next(line for line in outcome.out.splitlines() if line.startswith("not banned"))
    assert DISPUTED in line and "says banned" in line
    found = json.loads(invoke("bans", invite, "--json", *LISTEN).out)
    assert [row["peer"] for row in found["bans"]] == [BANNED]
    assert {vote["verifier"] for vote in found["bans"][0]["votes"]} == {one.peer_id for one in VERIFIERS[:2]}


def test_an_export_is_checked_without_a_network(
    invoke: Invoke, invite: str, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bans.json"
    assert invoke("bans", invite, "--export", path, *LISTEN).code == 0
    check = ("bans", "--check", path, "--manifest", folder / "run.toml")
    outcome = invoke(*check)
    assert outcome.code == 0, outcome.err
    assert "1 ban holds" in outcome.out and BANNED in outcome.out and "in force" in outcome.out
    content = json.loads(path.read_text())
    del content["bans"][0]["votes"][0]
    path.write_text(json.dumps(content))
    invoke(*check).says(f"The ban of {BANNED} does not hold", "1 of the 2 votes")
    path.write_text("{}")
    invoke(*check).says("no list of bans")
    path.unlink()
    invoke(*check).says("Cannot read", "--check")
    SignedManifest.sign(small_manifest(), Identity.generate()).write(tmp_path / "other.toml")
    assert invoke("bans", invite, "--export", path, *LISTEN).code == 0
    invoke("bans", "--check", path, "--manifest", tmp_path / "other.toml").says("another run")


def test_a_run_without_verifiers(invoke: Invoke, run_invite: str) -> None:
    outcome = invoke("bans", run_invite, *LISTEN)
    assert outcome.code == 0, outcome.err
    assert "no verifiers" in outcome.out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ((), "no invite"),
        (("--check", "a.json"), "--manifest"),
        (("an invite", "--check", "a.json", "--manifest", "run.toml"), "without a network"),
        (("--check", "a.json", "--manifest", "nowhere.toml"), "Cannot read the manifest"),
        (("an invite",), "not an invite"),
        (("an invite", "--manifest", "run.toml"), "--manifest is for --check"),
        (("an invite", "--export", "/proc/nowhere/bans.json"), "Cannot write"),
    ],
)
def test_bans_refuses(invoke: Invoke, words: tuple[str, ...], part: str) -> None:
    invoke("bans", *words).says(part)

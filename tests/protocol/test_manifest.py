"""Manifest and invite: what is written can be read, and nothing else can; the error is the user's."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from protocol.errors import UserError
from protocol.identity import Identity
from protocol.invite import Invite
from protocol.manifest import MAX_BYTES, BatchSection, Manifest, SignedManifest, VerificationSection
from protocol.votes import Electorate
from tests.protocol.strategies import IDENTITIES, messages_of, mutated
from tests.swarms import small_manifest

OPERATOR, STRANGER = IDENTITIES[:2]


def parse(text: str) -> SignedManifest:
    return SignedManifest.parse(text, "a test")


scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
)
json_values = st.recursive(
    st.one_of(st.none(), scalars),
    lambda inner: st.one_of(
        st.lists(st.one_of(inner, scalars), max_size=3),
        st.dictionaries(st.text(max_size=8), inner, max_size=3),
    ),
    max_leaves=6,
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    base = small_manifest(
        stages=draw(st.integers(1, 5)), kind=draw(st.sampled_from(["synchronous", "overlapped"]))
    )
    extra = draw(st.dictionaries(st.text(max_size=8), json_values, max_size=3))
    config = {**extra, **base.model.config}
    changes: dict[str, Any] = {
        "name": draw(st.sampled_from(["a", "Some run-1.5", "x" * 80])),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "testbed": draw(st.booleans()),
        "data": draw(st.text(min_size=1, max_size=20)),
        "wire": draw(st.sampled_from(["fp32", "bf16"])),
        "model": {"config": config, "tokenizer": draw(st.text(max_size=10))},
        "batch": {
            "context": draw(st.integers(2, 32)),
            "sequences": 2,
            "microbatches": draw(st.integers(1, 4096)),
        },
        "optimizer": {"lr": draw(st.floats(1e-9, 1.0)), "beta1": draw(st.floats(0, 0.999))},
    }
    return Manifest.model_validate({**base.model_dump(), **changes})


@given(manifests())
@settings(max_examples=60)
def test_a_manifest_survives_its_file(manifest: Manifest) -> None:
    signed = SignedManifest.sign(manifest, OPERATOR)
    back = parse(signed.to_toml())
    assert back == signed
    assert back.run == signed.run


def test_a_manifest_survives_the_disk(tmp_path: Path) -> None:
    signed = SignedManifest.sign(small_manifest(), OPERATOR)
    signed.write(tmp_path / "folder" / "run.toml")
    assert SignedManifest.read(tmp_path / "folder" / "run.toml") == signed


def test_order_layout_and_comments_of_the_file_do_not_matter() -> None:
    signed = SignedManifest.sign(small_manifest(), OPERATOR)
    body = tomllib.loads(signed.to_toml())
    assert parse("# a comment\n" + tomli_w.dumps(dict(reversed(body.items())))).run == signed.run


def test_nulls_of_a_hugging_face_config_are_left_out() -> None:
    body = small_manifest().model_dump()
    body["model"]["config"] |= {"rope_scaling": None, "quantization": {"kind": None, "of": [1, {"a": None}]}}
    signed = SignedManifest.sign(Manifest.model_validate(body), OPERATOR)
    back = parse(signed.to_toml())
    assert back == signed
    assert "rope_scaling" not in back.manifest.model.config
    body["model"]["config"]["list"] = [1, None]
    with pytest.raises(ValidationError):
        Manifest.model_validate(body)


def _leaves(body: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    return [
        place
        for key, value in body.items()
        for place in (_leaves(value, (*path, key)) if isinstance(value, dict) else [(*path, key)])
    ]


_SIGNED = tomllib.loads(SignedManifest.sign(small_manifest(), OPERATOR).to_toml())


@pytest.mark.parametrize("place", _leaves(_SIGNED), ids=".".join)
def test_every_field_is_under_the_seal(place: tuple[str, ...]) -> None:
    body = json.loads(json.dumps(_SIGNED))
    table = body
    for key in place[:-1]:
        table = table[key]
    value = table[place[-1]]
    other = {
        "kind": "overlapped", "wire": "bf16", "cut": [0, 2, 3], "operator": STRANGER.peer_id, "signature": "00" * 64,
    }  # fmt: skip
    table[place[-1]] = other.get(place[-1], not value if isinstance(value, bool) else value * 2 or 1)
    with pytest.raises(UserError):
        parse(tomli_w.dumps(body))


VERIFIERS = tuple(Identity.generate().peer_id for _ in range(3))


@pytest.mark.parametrize("field", VerificationSection.model_fields)
def test_the_verification_policy_is_under_the_seal(field: str) -> None:
    policy = VerificationSection(verifiers=VERIFIERS, quorum=3)
    signed = SignedManifest.sign(small_manifest(verification=policy), OPERATOR)
    assert parse(signed.to_toml()) == signed
    body = tomllib.loads(signed.to_toml())
    changed: Any = {"verifiers": list(VERIFIERS[::-1]), "quorum": 2, "sampling": 0.5, "alpha": 0.5}
    body["verification"][field] = changed.get(field, 2 * body["verification"][field])
    with pytest.raises(UserError, match="altered"):
        parse(tomli_w.dumps(body))


@pytest.mark.parametrize(
    ("policy", "part"),
    [
        ({"verifiers": VERIFIERS, "quorum": 1}, "must be 2 to 3"),
        ({"verifiers": VERIFIERS, "quorum": 4}, "must be 2 to 3"),
        ({"verifiers": VERIFIERS[:2], "quorum": 1}, "must be 2 to 2"),
        ({"verifiers": VERIFIERS[:1] * 2, "quorum": 2}, "one twice"),
        ({"verifiers": ["me"], "quorum": 1}, "verifiers: me"),
        ({"verifiers": VERIFIERS, "quorum": 0}, "greater than or equal to 1"),
        ({"sampling": 0.0}, "greater than 0"),
        ({"alpha": 1.0}, "less than 1"),
        ({"term": 0}, "greater than or equal to 1"),
    ],
)
def test_a_policy_that_cannot_work_is_refused(policy: dict[str, Any], part: str) -> None:
    with pytest.raises(ValidationError, match=part):
        VerificationSection.model_validate(policy)


def test_a_manifest_from_before_verification_is_still_whole() -> None:
    """What a run's operator signed then has no such section, and its run id must not change."""
    signed = SignedManifest.sign(small_manifest(), OPERATOR)
    assert "verification" not in tomllib.loads(signed.to_toml())
    assert b"verification" not in signed.manifest.canonical()
    assert parse(signed.to_toml()).electorate.is_empty


def test_the_electorate_is_the_manifests() -> None:
    policy = VerificationSection(verifiers=VERIFIERS, quorum=2, term=99)
    signed = SignedManifest.sign(small_manifest(verification=policy), OPERATOR)
    assert signed.electorate == Electorate(signed.run, frozenset(VERIFIERS), 2, 99)


def test_another_signer_makes_another_run() -> None:
    manifest = small_manifest()
    ours, theirs = SignedManifest.sign(manifest, OPERATOR), SignedManifest.sign(manifest, STRANGER)
    assert ours.run != theirs.run
    assert parse(theirs.to_toml()).operator == STRANGER.peer_id


def test_the_run_id_says_all_of_the_manifest() -> None:
    runs = {
        SignedManifest.sign(manifest, OPERATOR).run
        for manifest in (
            small_manifest(),
            small_manifest(seed=2),
            small_manifest(batch=BatchSection(context=32, sequences=2, microbatches=5)),
        )
    }
    assert len(runs) == 3


@given(st.data())
@settings(max_examples=80)
def test_a_damaged_manifest_is_the_users_error(data: st.DataObject) -> None:
    text = SignedManifest.sign(small_manifest(), OPERATOR).to_toml()
    damaged = data.draw(mutated(text.encode())).decode(errors="replace")
    try:
        assert parse(damaged).manifest == small_manifest()  # Only layout was touched.
    except UserError as error:
        assert "\n" not in str(error)


@given(st.text(max_size=300))
@settings(max_examples=80)
def test_no_text_is_a_manifest_by_chance(text: str) -> None:
    with pytest.raises(UserError):
        parse(text)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "content",
    [
        "x = " + "[" * 20_000,
        "x = " + "{a=" * 20_000,
        "seal = 1",
        "[seal]\noperator = 1",
        "seal = []",
        "[model.config]\nnum_hidden_layers = inf",
        "[model.config]\nnum_hidden_layers = 1e400",
        "[model.config]\nmax_position_embeddings = nan",
        "[model.config]\nhidden_size = 1979-05-27",
        "[model.config]\nnum_hidden_layers = [1]",
        "[model.config]\n" + ".".join("a" * 900) + " = 1",
        "format = 2",
        "surprise = 1",
        "x" * (MAX_BYTES + 1),
    ],
    ids=lambda content: content[:40],
)
def test_hostile_manifests_are_the_users_error(content: str) -> None:
    body = json.loads(json.dumps(_SIGNED))
    if content.startswith("[model.config]"):
        key = content.split("\n")[1].split(" ")[0]
        body["model"]["config"].pop(key, None)
        lines = tomli_w.dumps(body).splitlines()
        at = lines.index("[model.config]")
        content = "\n".join([*lines[: at + 1], content.split("\n")[1], *lines[at + 1 :]])
    with pytest.raises(UserError):
        parse(content)


def test_an_operator_of_a_quarter_of_a_megabyte_is_refused_at_once() -> None:
    body = json.loads(json.dumps(_SIGNED))
    body["seal"]["operator"] = "z" * 250_000
    with pytest.raises(UserError):
        parse(tomli_w.dumps(body))


# --- invites ---


@given(messages_of(Invite))
@settings(max_examples=60)
def test_an_invite_survives_being_pasted(invite: Invite) -> None:
    text = str(invite)
    assert text.isascii() and text.split() == [text]
    assert Invite.parse(text) == invite
    assert Invite.parse(f"  {text[:20]}\n   {text[20:]}\n") == invite


@given(st.data(), messages_of(Invite))
@settings(max_examples=80)
def test_a_damaged_invite_is_the_users_error(data: st.DataObject, invite: Invite) -> None:
    damaged = data.draw(mutated(str(invite).encode())).decode(errors="replace")
    try:
        assert Invite.parse(damaged) == invite  # Spaces, or a character that base64 has no use for.
    except UserError as error:
        assert "\n" not in str(error)


@given(st.text(max_size=200), st.booleans())
@settings(max_examples=80)
def test_no_text_is_an_invite_by_chance(text: str, prefixed: bool) -> None:
    with pytest.raises(UserError):
        Invite.parse("sentinel1-" + text if prefixed else text)


def test_an_invite_names_its_run_and_operator() -> None:
    signed = SignedManifest.sign(small_manifest(), Identity.generate())
    invite = Invite.parse(str(Invite(signed.run, signed.operator, ("/ip4/127.0.0.1/tcp/1",))))
    assert (invite.run, invite.operator) == (signed.run, signed.operator)

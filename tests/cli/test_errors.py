"""What a person can mend is one line that says how, exit code 2, and nothing is left running."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bootstrap.seed import Seed
from cli import files
from cli.failures import explain
from node.data import MemoryCorpus
from node.passes import StagePasses
from node.reporting import Reporter
from protocol import host
from protocol.errors import SentinelError, UserError
from protocol.host import LOOPBACK
from protocol.identity import Identity
from protocol.invite import Invite
from protocol.manifest import ModelSection, SignedManifest, StagesSection
from tests.cli.conftest import LISTEN, Invoke, hosted, no_room_for_files_over, serving
from tests.swarms import small_manifest


@pytest.fixture
def signed(tmp_path: Path) -> SignedManifest:
    """A manifest, also as run.toml in the test's folder."""
    signed = SignedManifest.sign(small_manifest(), Identity.generate())
    signed.write(tmp_path / "run.toml")
    return signed


def invite_to(signed: SignedManifest, *seeds: str) -> str:
    return str(Invite(signed.run, signed.operator, seeds))


def join(invoke: Invoke, invite: str, folder: Path, *more: str | Path):  # type: ignore[no-untyped-def]
    return invoke("join", invite, "--cache-dir", folder, "--device", "cpu", *LISTEN, *more)


# --- init ---


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--preset", "huge"], ["no preset huge", "tiny"]),
        ([], ["needs a preset or a model config"]),
        (["--preset", "tiny", "--data", "foo"], ["Unknown data spec foo", "builtin:pydoc"]),
        (["--preset", "tiny", "--stages", "9"], ["cannot be cut into 9 stages", "Use 1 to 6"]),
        (["--preset", "tiny", "--name", "a/b"], ["name cannot be 'a/b'"]),
        (["--config", "nowhere.json"], ["Cannot read the config nowhere.json", "--config"]),
        (["--preset", "tiny", "--tokenizer", "./nowhere"], ["Cannot load the tokenizer ./nowhere"]),
        (["--preset", "tiny", "--quorum", "2"], ["--quorum is of nobody", "--verifiers N"]),
        (["--preset", "tiny", "--verifiers", "3", "--quorum", "4"], ["quorum of 4", "--quorum 3 or less"]),
        (["--preset", "tiny", "--verifiers", "3", "--quorum", "1"], ["a minority", "--quorum 2 or more"]),
        (["--preset", "tiny", "--verifier", "me"], ["--verifier me is not understood", "12D3KooW"]),
        (["--preset", "tiny", *["--verifier", Identity.generate().peer_id] * 2], ["named twice"]),
    ],
)
def test_init_refuses(invoke: Invoke, tmp_path: Path, words: list[str], parts: list[str]) -> None:
    invoke("init", *words, "--out", tmp_path / "run.toml").says(*parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "is no JSON"),
        ("[1]", "no object"),
        ('{"model_type": "llama"}', "lacks `num_hidden_layers`"),
        (
            json.dumps({"model_type": "none", "num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 9}),
            "none",
        ),
    ],
)
def test_init_refuses_a_config(invoke: Invoke, tmp_path: Path, content: str, part: str) -> None:
    config = tmp_path / "config.json"
    config.write_text(content)
    invoke("init", "--config", config, "--out", tmp_path / "run.toml").says(part)


def test_init_writes_the_operator_key_for_the_owner_alone(invoke: Invoke, tmp_path: Path) -> None:
    out = tmp_path / "run.toml"
    assert invoke("init", "--preset", "tiny", "--stages", "2", "--out", out).code == 0
    key = tmp_path / "run.operator.key"
    assert key.stat().st_mode & 0o777 == 0o600
    first = SignedManifest.read(out)
    assert first.operator == Identity.load(key).peer_id
    assert first.manifest.stages.count == 2
    # The same again is the same run; another run does not take its place.
    assert invoke("init", "--preset", "tiny", "--stages", "2", "--out", out).code == 0
    invoke("init", "--preset", "tiny", "--stages", "3", "--out", out).says("manifest of another run", "--out")
    assert SignedManifest.read(out) == first
    key.chmod(0o644)
    invoke("init", "--preset", "tiny", "--stages", "2", "--out", out).says("read by others", "chmod 600")


def test_init_makes_verifiers_and_names_others(invoke: Invoke, tmp_path: Path) -> None:
    out, other = tmp_path / "run.toml", Identity.generate().peer_id
    words = ("init", "--preset", "tiny", "--out", out, "--verifiers", "2", "--verifier", other)
    outcome = invoke(*words)
    assert outcome.code == 0, outcome.err
    keys = [tmp_path / f"run.verifier{number}.key" for number in (1, 2)]
    assert all(key.stat().st_mode & 0o777 == 0o600 for key in keys)
    assert all(str(key) in outcome.out for key in keys)
    policy = SignedManifest.read(out).manifest.verification
    assert policy.verifiers == (*(Identity.load(key).peer_id for key in keys), other)
    assert policy.quorum == 2, "a majority"
    # The same again is the same run, with the same keys.
    run = SignedManifest.read(out).run
    assert invoke(*words).code == 0
    assert SignedManifest.read(out).run == run
    invoke(*words, "--quorum", "3").says("manifest of another run")


def test_init_on_a_full_disk(invoke: Invoke, tmp_path: Path) -> None:
    with no_room_for_files_over(0):
        outcome = invoke("init", "--preset", "tiny", "--out", tmp_path / "run.toml")
    outcome.says("Cannot write", "run.toml", "Free space")
    assert not list(tmp_path.iterdir())


# --- bootstrap ---


def test_bootstrap_refuses_an_altered_manifest(
    invoke: Invoke, tmp_path: Path, signed: SignedManifest
) -> None:
    path = tmp_path / "altered.toml"
    path.write_text(signed.to_toml().replace("seed = 7", "seed = 8"))
    invoke("bootstrap", "--manifest", path).says("altered after it was signed", "original")


@pytest.mark.parametrize(
    ("content", "part"), [(None, "Cannot read"), (b"x = [", "not valid"), (b"\xff", "no text")]
)
def test_bootstrap_refuses_what_is_no_manifest(
    invoke: Invoke, tmp_path: Path, content: bytes | None, part: str
) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    invoke("bootstrap", "--manifest", path).says(part, "sentinel-node init")


def test_a_second_seed_of_another_run(
    invoke: Invoke, tmp_path: Path, signed: SignedManifest, run_invite: str
) -> None:
    invoke("bootstrap", "--manifest", tmp_path / "run.toml", "--with", run_invite).says(
        "--with", "another run"
    )


@contextmanager
def taken_port(kind: socket.SocketKind) -> Iterator[int]:
    with socket.socket(socket.AF_INET, kind) as holder:
        holder.bind(("127.0.0.1", 0))
        if kind is socket.SOCK_STREAM:
            holder.listen()
        yield holder.getsockname()[1]


PORTS = pytest.mark.parametrize(
    ("kind", "form"),
    [
        (socket.SOCK_STREAM, "/ip4/127.0.0.1/tcp/{}"),
        (socket.SOCK_DGRAM, "/ip4/127.0.0.1/udp/{}/quic-v1"),
    ],
    ids=["tcp", "udp"],
)


@PORTS
def test_a_port_in_use(
    invoke: Invoke, tmp_path: Path, signed: SignedManifest, kind: socket.SocketKind, form: str
) -> None:
    seed = f"{LOOPBACK[0]}/p2p/{Identity.generate().peer_id}"
    with taken_port(kind) as port:
        address = form.format(port)
        common = ("--listen", address, "--identity", tmp_path / "a.key")
        parts = (f"Cannot listen on {address}", "in use", "--listen")
        invoke("bootstrap", "--manifest", tmp_path / "run.toml", *common).says(*parts)
        invoke("join", invite_to(signed, seed), "--cache-dir", tmp_path, *common).says(*parts)
        invoke("peers", invite_to(signed, seed), "--listen", address).says(*parts)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:80", "/ip4/127.0.0.1/tcp/99999", "/ip4/127.0.0.1/udp/0", "/dns4/localhost/tcp/0", ""],
)
def test_what_is_no_address_to_listen_on(
    invoke: Invoke, tmp_path: Path, signed: SignedManifest, address: str
) -> None:
    words = (
        "--manifest",
        tmp_path / "run.toml",
        "--identity",
        tmp_path / "a.key",
        *LISTEN,
        "--listen",
        address,
    )
    invoke("bootstrap", *words).says("no address to listen on", "/quic-v1")


@pytest.mark.parametrize(
    ("mode", "content", "part"),
    [(0o644, None, "chmod 600"), (0o600, b"junk", "not a key file"), (0o600, b"", "no Ed25519 key")],
)
def test_an_unusable_key_file(
    invoke: Invoke, tmp_path: Path, signed: SignedManifest, mode: int, content: bytes | None, part: str
) -> None:
    key = tmp_path / "a.key"
    Identity.load_or_create(key)
    if content is not None:
        key.write_bytes(content)
    key.chmod(mode)
    invoke("bootstrap", "--manifest", tmp_path / "run.toml", "--identity", key, *LISTEN).says(part)


def test_no_room_for_a_key_leaves_no_half_key(invoke: Invoke, tmp_path: Path, signed: SignedManifest) -> None:
    key = tmp_path / "a.key"
    with no_room_for_files_over(8):
        outcome = invoke("bootstrap", "--manifest", tmp_path / "run.toml", "--identity", key, *LISTEN)
    outcome.says("Cannot write the key file", "Free space")
    assert not key.exists()


@pytest.mark.parametrize(
    ("script", "parts"),
    [("echo no transport; exit 3", ["cannot start", "no transport"]), ("exec sleep 60", ["did not come up"])],
    ids=["ends", "hangs"],
)
def test_a_network_daemon_that_does_not_start(
    invoke: Invoke,
    tmp_path: Path,
    signed: SignedManifest,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    parts: list[str],
) -> None:
    monkeypatch.setattr(host, "_STARTUP_TIMEOUT", 0.5)
    monkeypatch.setattr(host._Daemon, "_make_process_args", lambda *words, **flags: ["/bin/sh", "-c", script])
    words = ("--manifest", tmp_path / "run.toml", "--identity", tmp_path / "a.key", *LISTEN)
    invoke("bootstrap", *words).says("p2pd", *parts)


# --- invites and seeds ---


@pytest.mark.parametrize("command", ["join", "peers"])
@pytest.mark.parametrize(
    ("alter", "part"),
    [
        (lambda text: text[:-5], "cut short or mistyped"),
        (lambda text: text[:30] + ("a" if text[30] != "a" else "b") + text[31:], "cut short or mistyped"),
        (lambda text: text[:30] + "é" + text[31:], "characters that no invite has"),
        (lambda text: text.replace("sentinel1", "sentinel2"), "another version"),
        (lambda text: "an invite", "not an invite"),
        (lambda text: "", "not an invite"),
    ],
    ids=["truncated", "mistyped", "foreign character", "another version", "random text", "nothing"],
)
def test_a_wrong_invite(invoke: Invoke, signed: SignedManifest, command: str, alter, part: str) -> None:  # type: ignore[no-untyped-def]
    whole = invite_to(signed, f"{LOOPBACK[0]}/p2p/{Identity.generate().peer_id}")
    invoke(command, alter(whole)).says(part)


@pytest.mark.parametrize("command", ["join", "peers"])
def test_no_seed_answers(invoke: Invoke, tmp_path: Path, signed: SignedManifest, command: str) -> None:
    with taken_port(socket.SOCK_DGRAM) as port:  # Nobody listens there on TCP.
        invite = invite_to(signed, f"/ip4/127.0.0.1/tcp/{port}/p2p/{Identity.generate().peer_id}")
        more = ("--cache-dir", tmp_path) if command == "join" else ()
        invoke(command, invite, *LISTEN, *more).says("No seed of the invite can be reached", "operator")


def test_a_seed_of_another_run(
    invoke: Invoke, tmp_path: Path, signed: SignedManifest, run_invite: str
) -> None:
    invite = invite_to(signed, *Invite.parse(run_invite).seeds)
    join(invoke, invite, tmp_path).says("does not serve the run of this invite", "newer invite")


class _Posing(SignedManifest):
    """Served by a seed that says it serves the run that the invite names."""

    @property
    def run(self) -> bytes:
        return b"\x07" * 32


def test_a_seed_that_serves_another_manifest(invoke: Invoke, tmp_path: Path, signed: SignedManifest) -> None:
    other = _Posing(manifest=signed.manifest, operator=signed.operator, signature=signed.signature)
    with serving(Seed(other, tmp_path / "seed.key", LOOPBACK)) as invite:
        join(invoke, invite, tmp_path).says("serves another manifest than the invite names", "newer invite")


def test_a_seed_that_altered_the_manifest(invoke: Invoke, tmp_path: Path, signed: SignedManifest) -> None:
    altered = signed.manifest.model_copy(update={"seed": 8})
    posing = _Posing(manifest=altered, operator=signed.operator, signature=signed.signature)
    with serving(Seed(posing, tmp_path / "seed.key", LOOPBACK)) as invite:
        join(invoke, invite, tmp_path).says("altered after it was signed")


# --- join ---


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--stage", "x"], ["--stage x", "`auto` or a number"]),
        (["--stage", "-1"], ["--stage -1", "`auto` or a number"]),
        (["--stage", "9"], ["no stage 9", "0 to 2"]),
        (["--device", "toaster"], ["toaster is no device", "--device auto"]),
        (["--device", "mps"], ["mps are not supported", "--device auto"]),
        (["--device", "cuda:99"], ["has no cuda:99", "--device auto"]),
    ],
)
def test_join_refuses(
    invoke: Invoke, tmp_path: Path, run_invite: str, words: list[str], parts: list[str]
) -> None:
    join(invoke, run_invite, tmp_path, *words).says(*parts)


def test_no_room_for_checkpoints(invoke: Invoke, tmp_path: Path, run_invite: str) -> None:
    with no_room_for_files_over(4096):
        outcome = join(invoke, run_invite, tmp_path, "--stage", "1")
    outcome.says("Cannot write to", "Free space", "--cache-dir")


def test_a_cache_folder_that_is_a_file(invoke: Invoke, tmp_path: Path, run_invite: str) -> None:
    (tmp_path / "file").touch()
    outcome = join(invoke, run_invite, tmp_path / "file", "--identity", tmp_path / "a.key", "--stage", "1")
    outcome.says("Cannot write to", "--cache-dir")


def test_too_little_memory_for_any_stage(invoke: Invoke, tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 1 << 17,
        "intermediate_size": 1 << 19,
        "num_hidden_layers": 2,
        "num_attention_heads": 1 << 10,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
    }
    manifest = small_manifest(model=ModelSection(config=config), stages=2)
    manifest = manifest.model_copy(update={"stages": StagesSection(cut=(0, 1, 2))})
    with hosted(manifest, tmp_path) as invite:
        for stage in ("auto", "1"):
            join(invoke, invite, tmp_path, "--stage", stage).says(
                "needs", "GiB on cpu", "are free", "--device"
            )


def test_text_that_is_not_there(invoke: Invoke, tmp_path: Path) -> None:
    with hosted(small_manifest(data=f"text:{tmp_path}/*.txt"), tmp_path) as invite:
        outcome = join(invoke, invite, tmp_path, "--stage", "0")
    last = outcome.err.splitlines()[-1]
    assert outcome.code == 2
    assert "matches no file" in last
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (UserError("Cannot read the data set c4: gone", "Check the network"), 2, "Check the network"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "Free space"),
        (ZeroDivisionError("division by zero"), 1, "internal error"),
    ],
    ids=["data", "disk", "bug"],
)
def test_data_that_fails_while_training(
    invoke: Invoke,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: int,
    part: str,
) -> None:
    whole = MemoryCorpus.draw

    def draw(corpus: MemoryCorpus, slot: int) -> torch.Tensor:
        if slot >= 5:
            raise error
        return whole(corpus, slot)

    monkeypatch.setattr(MemoryCorpus, "draw", draw)
    with hosted(small_manifest(stages=1), tmp_path) as invite:
        outcome = join(invoke, invite, tmp_path, "--threads", "1")
    assert outcome.code == code, outcome.err
    assert part in outcome.err.splitlines()[-1]
    assert ("Traceback" in outcome.err) == (code == 1), "a bug's traceback is wanted, another's is not"


def test_memory_that_runs_out_while_computing(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inject(passes: StagePasses, tokens: torch.Tensor, slot: int) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(StagePasses, "inject", inject)
    with hosted(small_manifest(stages=1), tmp_path) as invite:
        outcome = join(invoke, invite, tmp_path, "--threads", "1")
    assert outcome.code == 2, outcome.err
    assert outcome.err.splitlines()[-1].startswith("sentinel-node: Out of memory")
    assert "Traceback" not in outcome.err


def test_a_task_of_the_node_that_fails(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_invite: str
) -> None:
    async def fail(reporter: Reporter) -> None:
        raise SentinelError("the figures are lost")

    monkeypatch.setattr(Reporter, "report_metrics", fail)
    outcome = join(invoke, run_invite, tmp_path, "--stage", "1", "--threads", "1")
    assert outcome.code == 1, outcome.err
    assert outcome.err.splitlines()[-1] == "sentinel-node: the figures are lost"
    assert "Traceback" not in outcome.err


# --- results on disk ---


def test_the_demo_refuses_a_result_file_that_it_could_not_write(invoke: Invoke, tmp_path: Path) -> None:
    invoke("demo", "--json", tmp_path).says("Cannot write", "--json")
    with no_room_for_files_over(4096):
        outcome = invoke("demo", "--json", tmp_path / "new" / "r.json")
    outcome.says("Cannot write", "r.json", "Free space", "--json")
    assert not list((tmp_path / "new").iterdir())


def test_a_result_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    files.write_json(path, {"a": 1}, "--json")
    with no_room_for_files_over(64), pytest.raises(UserError, match="Free space"):
        files.write_json(path, {"a": list(range(100))}, "--json")
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_out_of_memory_is_said_as_such() -> None:
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
    ):
        failure = explain(error)
        assert failure.code == 2
        assert failure.line.startswith("Out of memory")


def test_join_refuses_an_attack_on_a_run_that_is_no_testbed(
    invoke: Invoke, run_invite: str, tmp_path: Path
) -> None:
    join(invoke, run_invite, tmp_path, "--attack", "zeros").says("no testbed", "--attack")


@pytest.mark.parametrize("command", ["join", "demo"])
def test_an_attack_that_nobody_knows_is_refused(invoke: Invoke, run_invite: str, command: str) -> None:
    words = [run_invite] if command == "join" else []
    invoke(command, *words, "--attack", "nonsense").says("Unknown attack nonsense", "zeros")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--quorum", "1"], ["--quorum 1", "no majority"]),
        (["--quorum", "4"], ["--quorum 4", "no majority"]),
        (["--replicas", "2", "--malicious", "2"], ["no honest volunteer"]),
    ],
    ids=str,
)
def test_the_demo_refuses_what_cannot_be_played(invoke: Invoke, words: list[str], parts: list[str]) -> None:
    invoke("demo", *words).says(*parts)


def test_verify_refuses_a_peer_that_the_manifest_does_not_name(
    invoke: Invoke, run_invite: str, tmp_path: Path
) -> None:
    invoke("verify", run_invite, "--identity", tmp_path / "my.key", *LISTEN).says(
        "does not name", "--identity"
    )


def test_peers_says_that_it_knows_no_such_peer(invoke: Invoke, run_invite: str) -> None:
    invoke("peers", run_invite, "--peer", "12D3KooWnobody", *LISTEN).says("Nobody knows a peer")

"""`sentinel-node verify`: be one of the run's verifiers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cli import logs, running
from cli.options import DEFAULT_HOME, IdentityFile, InviteText, Listen, Threads, Verbose
from protocol.invite import Invite

if TYPE_CHECKING:
    from verifier.service import Verifier


def verify(
    invite: InviteText,
    identity: IdentityFile = None,
    threads: Threads = 1,
    listen: Listen = None,
    verbose: Verbose = False,
) -> None:
    """Be a verifier of a run: sample what its nodes send each other, judge it, and publish signed votes.

    The manifest must name this peer: `init --verifiers N` writes the keys of N verifiers, one for each of these.
    Ctrl-C ends it; its votes hold until they expire.

    Examples:

        sentinel-node verify sentinel1-... --identity run.verifier1.key

        sentinel-node verify sentinel1-... --identity run.verifier1.key --listen /ip4/0.0.0.0/tcp/31338
    """
    parsed = Invite.parse(invite)
    from protocol.host import DEFAULT_LISTEN
    from verifier.service import Verifier, VerifierConfig

    logs.configure(verbose=verbose)
    running.use_threads(threads)
    key = identity or DEFAULT_HOME / "verifier.key"
    running.run_long(_serve(Verifier(VerifierConfig(parsed, key, tuple(listen or DEFAULT_LISTEN)))))


async def _serve(verifier: Verifier) -> None:
    asked = running.stop_asked()
    try:
        await running.until_asked(asked, verifier.start())
        if not asked.is_set():
            await running.until_asked(asked, verifier.wait())
    finally:
        await verifier.stop()

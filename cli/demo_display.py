"""How the demo shows a swarm: live on a terminal, a line every few rounds elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from benchmarks.demo import DemoView

_BARS = "▁▂▃▄▅▆▇█"
_LINE_EVERY = 5


def sparkline(values: list[float], width: int) -> str:
    """The last `width` values as bars between their least and their greatest."""
    shown = values[-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    span = (high - low) or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in shown)


class DemoDisplay:
    """Use as a context; `show` at every change, `summarise` at the end."""

    def __init__(self) -> None:
        self._console = Console()
        if not self._console.is_terminal:
            self._console = Console(width=120)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._printed = 0
        self._has_announced = False
        self._banned = 0

    def __enter__(self) -> DemoDisplay:
        if self._live is not None:
            self._live.start()
        else:
            self._console.print("starting a bootstrap peer and the volunteers, each a process of its own")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, view: DemoView) -> None:
        if self._live is not None:
            self._live.update(_render(view), refresh=True)
            return
        if not self._has_announced and len(view.observer.sightings) >= len(view.swarm.nodes):
            self._has_announced = True
            self._console.print(f"{len(view.swarm.nodes)} volunteers found each other through the DHT")
        for ban in view.bans[self._banned :]:
            self._banned += 1
            kind = "an attacker" if ban.peer in view.attackers else "an HONEST volunteer"
            self._console.print(
                f"round {ban.round:3d}          {ban.peer[-8:]}, {kind}, is banned", highlight=False
            )
        while self._printed + _LINE_EVERY <= len(view.losses):
            self._printed += _LINE_EVERY
            self._console.print(
                f"round {self._printed:3d} of {view.manifest.schedule.rounds}   "
                f"loss {view.losses[self._printed - 1]:.3f}   {view.tokens_per_second:,.0f} tokens/s",
                highlight=False,
            )

    def summarise(self, result: dict[str, Any]) -> None:
        table = Table("peer", "stage", "microbatches", "weights version", "state digest", box=None)
        for peer in result["peers"]:
            table.add_row(
                peer["peer"],
                str(peer["stage"]),
                str(peer["microbatches"]),
                str(peer["weights_version"]),
                peer["state_digest"][:16],
            )
        self._console.print(table)
        self._tell_bans(result)
        gap = result["unigram_entropy"] - result["final_loss"]
        side = "below" if gap > 0 else "above"
        self._console.print(
            f"{result['rounds']} rounds, {result['schedule']}: loss {result['initial_loss']:.3f} → "
            f"{result['final_loss']:.3f} nats a token, {abs(gap):.2f} {side} the text's unigram entropy "
            f"({result['unigram_entropy']:.3f}); {result['tokens_per_second']:,.0f} tokens/s; "
            f"{result['lost_microbatches']} microbatches lost, {result['rerouted_microbatches']} rerouted",
            highlight=False,
            soft_wrap=True,
        )

    def _tell_bans(self, result: dict[str, Any]) -> None:
        for ban in result["bans"]:
            kind = "attacker" if ban["true_attacker"] else "HONEST"
            self._console.print(
                f"banned: {ban['peer']} (stage {ban['stage']}, {kind}), {ban['rounds_to_ban']} rounds after the attack "
                f"began, by {len(ban['votes'])} votes: {ban['votes'][0]['text'] if ban['votes'] else ''}",
                highlight=False,
                soft_wrap=True,
            )
        missed = set(result["attackers"]) - {ban["peer"] for ban in result["bans"]}
        for peer in sorted(missed):
            self._console.print(f"not banned: attacker {peer}", highlight=False)
        cost = result["verification"]
        if cost["sampled_fraction"]:
            self._console.print(
                f"verification: {cost['sampled_fraction']:.1%} of the microbatches looked at, "
                f"{cost['bytes_fraction']:.1%} more bytes, {cost['cpu_fraction']:.1%} more CPU time",
                highlight=False,
            )


def _render(view: DemoView) -> Group:
    rounds = view.manifest.schedule.rounds
    table = Table(
        "stage", "peer", "state", "version", "microbatches", "in flight", "tokens/s", "rerouted", "lost"
    )
    for node in sorted(view.swarm.nodes, key=lambda one: (one.stage, one.name)):
        sighting = view.observer.sightings.get(node.peer)
        if sighting is None:
            table.add_row(str(node.stage), node.peer[-8:], "starting", *[""] * 6)
            continue
        metrics = sighting.metrics
        state = (
            f"waiting for stage {metrics.waiting_for}" if metrics.waiting_for >= 0 else metrics.state.value
        )
        verdict = view.observer.votes.verdicts().get(node.peer)
        if verdict is not None:
            state = (
                f"[bold red]{verdict.value}[/]" if verdict.value == "banned" else f"{state}, {verdict.value}"
            )
        if node.is_attacker:
            state += " (attacker)"
        table.add_row(
            str(metrics.stage),
            node.peer[-8:],
            state,
            str(metrics.version),
            str(metrics.microbatches),
            str(metrics.in_flight),
            f"{metrics.tokens_per_second:,.0f}",
            str(metrics.rerouted),
            str(metrics.lost),
        )
    loss = f"{view.losses[-1]:.3f}" if view.losses else "-"
    head = Text.assemble(
        f"round {len(view.losses)} of {rounds}   ",
        f"{view.tokens_per_second:,.0f} tokens/s   ",
        (f"loss {loss}", "bold"),
        f"   unigram entropy {view.entropy:.3f}",
    )
    bar = ProgressBar(total=rounds, completed=len(view.losses), width=60)
    return Group(head, bar, Text(sparkline(view.losses, 60), "cyan"), table)

"""The data path of one node: activations in from the stage before, out to the stage after; gradients back.

Each sender chooses the next hop itself and holds its output until the gradient is back. A dead or refusing hop
means another replica; a microbatch whose way back is lost is dropped and counted. Nothing waits without end.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, deque
from collections.abc import Callable, Collection, Coroutine, Mapping
from time import monotonic
from typing import Any

import structlog
from torch import Tensor

from node.compute import ComputeThread, Urgency
from node.flights import FinishedStore, Flight, Held, Outgoing, Phase
from node.passes import Forwarded, Returned, StagePasses
from node.patience import Patience
from node.progress import ROUNDS_AHEAD, StageProgress
from node.routing import Router
from node.window import Window
from protocol import receipts, wire
from protocol.codec import Payload, digest
from protocol.errors import ProtocolError, Reason
from protocol.identity import Identity, PeerId
from protocol.links import MAX_LINKS, Link, Switchboard
from protocol.manifest import Manifest
from protocol.messages import Activation, Credit, Gradient, Refusal
from protocol.receipts import Direction, MicrobatchId, Receipt, SignedReceipt
from protocol.streams import MAX_BACKLOG
from protocol.votes import Verdict

log = structlog.get_logger("pipeline")

COOL_DOWN = 1.0
_SUSPECTS_BURDEN = 4.0
"""A suspect gets a quarter of the work that it would get otherwise."""
_MAX_EARLY_ROUNDS = ROUNDS_AHEAD + 1
"""A head may be a version before us."""
_MAX_GRANT = 1024
_MAX_CREDIT = 4096
_MAX_BACKLOG = MAX_BACKLOG // 2
"""Bytes waiting for a receiver that does not read, above which it gets no more tensors."""
_RETRIABLE = frozenset({Reason.BUSY, Reason.LEAVING, Reason.NOT_READY, Reason.TOO_EARLY, Reason.OVER_CREDIT})


class Pipeline:
    """Moves microbatches through one stage. Runs on the event loop; computing is the compute thread's.

    `on_change` is called whenever something ended or room appeared.
    """

    def __init__(
        self,
        manifest: Manifest,
        stage: int,
        identity: Identity,
        switchboard: Switchboard,
        compute: ComputeThread,
        passes: StagePasses,
        progress: StageProgress,
        on_change: Callable[[], None],
        *,
        capacity: int,
        hold_bytes: int,
    ) -> None:
        self._manifest, self._stage, self._identity = manifest, stage, identity
        self._switchboard, self._compute, self._passes, self._progress = (
            switchboard,
            compute,
            passes,
            progress,
        )
        self._on_change = on_change
        self._router = Router()
        self._patience = Patience(hops=max(1, manifest.stages.count - 1 - stage))
        self.window = Window()
        """On a head: how many microbatches it should have in flight."""
        self._unused: dict[PeerId, int] = {}
        """Activations that each sender may still send."""
        self._credit: dict[PeerId, int] = {}
        """Activations that we may still send to each receiver."""
        self._cooling: dict[PeerId, float] = {}
        self._unsent: deque[Flight] = deque()
        self._early: list[Flight] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.capacity = capacity
        self.flights: dict[MicrobatchId, Flight] = {}
        self.finished = FinishedStore(hold_bytes)
        self.dropped = FinishedStore(hold_bytes // 4)
        """What was given up, kept for the same while as evidence."""
        self.flagged = asyncio.Event()
        """Set when something that came to us was flagged: it is among what was dropped."""
        self._serials = itertools.count(1)
        self.counts: Counter[str] = Counter()
        self.losses: dict[int, float] = {}
        self.is_accepting = True
        self.verdicts: Mapping[PeerId, Verdict] = {}
        """What the verifiers' quorum holds of the peers that are not in good standing."""
        self._failed = asyncio.Event()
        self._error: BaseException | None = None

    # --- links ---

    def on_link_up(self, link: Link) -> None:
        if link.stage == self._stage - 1:
            self._unused[link.peer] = 0
            self._grant()
        self._pump()

    def on_link_down(self, link: Link) -> None:
        peer = link.peer
        self._unused.pop(peer, None)
        self._credit.pop(peer, None)
        self._router.forget(peer)
        for flight in tuple(self.flights.values()):
            if flight.previous == peer:
                flight.orphaned = True
            if flight.next == peer and flight.phase is Phase.SENT:
                self._reroute(flight, Reason.UNREACHABLE)
        self._grant()
        self._pump()

    def on_announced(self, link: Link, message: Activation | Gradient, size: int) -> None:
        """Everything that can be known of a tensor before its payload of `size` bytes is here.

        The checks, in order, each REJECT: stage, credit, direction, tensor header, payload size, receipt, head.
        """
        if isinstance(message, Gradient):
            self._check_tensor(link, message, size, Direction.GRADIENT, self._stage + 1)
            return
        if link.stage != self._stage - 1:
            raise ProtocolError(Reason.WRONG_STAGE, f"activation from stage {link.stage}")
        self._check_credit(link)
        self._check_tensor(link, message, size, Direction.ACTIVATION, self._stage - 1)
        microbatch = message.receipt.receipt.microbatch
        if link.stage == 0 and microbatch.head != link.peer:
            raise ProtocolError(Reason.WRONG_PEER, f"{microbatch} of another head")

    def on_message(self, link: Link, message: wire.Message, payload: Payload) -> None:
        """Raises `ProtocolError` for what no honest peer sends; anything else that is unusable is refused here."""
        if isinstance(message, Activation):
            self._take_activation(link, message, payload)
        elif isinstance(message, Gradient):
            self._take_gradient(link, message, payload)
        elif isinstance(message, Credit):
            self._take_credit(link, message)
        elif isinstance(message, Refusal):
            self._take_refusal(link, message)

    # --- credit ---

    def _grant(self) -> None:
        """Share our capacity evenly among the senders; each gets at least one, but `capacity + MAX_LINKS` is the end.

        What a sender left behind here counts as long as it is here: to come back, or to come under another name,
        must not make room.
        """
        if not self._unused:
            return
        held = Counter(flight.previous for flight in self.flights.values())
        window = max(1, self.capacity // len(self._unused))
        total = sum(self._unused.values()) + held.total() - held[None]
        for peer in self._outside_quarantine(self._unused):
            unused = self._unused[peer]
            outstanding = unused + held[peer]
            amount = min(window - outstanding, max(self.capacity - total, 1 - outstanding))
            amount = min(amount, self.capacity + MAX_LINKS - total, _MAX_GRANT)
            link = self._switchboard.links.get(peer)
            if amount > 0 and link is not None and link.is_up:
                self._unused[peer] = unused + amount
                total += amount
                self._send(link, Credit(amount))

    def _take_credit(self, link: Link, credit: Credit) -> None:
        if link.stage != self._stage + 1:
            raise ProtocolError(Reason.WRONG_STAGE, f"credit from stage {link.stage}")
        self._credit[link.peer] = min(self._credit.get(link.peer, 0) + credit.amount, _MAX_CREDIT)
        self._pump()

    # --- activations ---

    def _take_activation(self, link: Link, message: Activation, payload: Payload) -> None:
        """The checks, in order. REJECT: credit, which another may have used up meanwhile, and digest. Then IGNORE with
        a typed refusal: replayed, leaving, too early."""
        self._check_credit(link)
        receipt = _check_digest(message, payload)
        self._unused[link.peer] -= 1
        try:
            known = self._check_new(link.peer, receipt)
            if not self.is_accepting:
                raise ProtocolError(Reason.LEAVING)
            size = self._manifest.batch.microbatches
            if receipt.microbatch.slot // size > self._passes.trainer.version + _MAX_EARLY_ROUNDS:
                raise ProtocolError(Reason.TOO_EARLY, str(receipt.microbatch))
        except ProtocolError as error:
            self._refuse(link.peer, receipt.microbatch, Direction.ACTIVATION, error)
            return
        held = Held.of(payload, message.receipt)
        if known is not None:
            self._adopt(known, link.peer, held)
            return
        self.finished.remove(receipt.microbatch)
        flight = Flight(receipt.microbatch, link.peer, monotonic(), received=held)
        self.flights[flight.id] = flight
        self._start(flight)

    def _check_credit(self, link: Link) -> None:
        if self._unused.get(link.peer, 0) < 1:
            raise ProtocolError(Reason.OVER_CREDIT)

    def _check_tensor(
        self, link: Link, message: Activation | Gradient, size: int, direction: Direction, stage: int
    ) -> None:
        passes = self._passes
        if message.receipt.receipt.direction is not direction:
            raise ProtocolError(Reason.MALFORMED, "receipt of the other direction")
        if message.tensor.codec != passes.header.codec:
            raise ProtocolError(Reason.WRONG_DTYPE, message.tensor.codec)
        if message.tensor.shape != passes.header.shape:
            raise ProtocolError(Reason.WRONG_SHAPE, str(message.tensor.shape))
        expected = passes.payload_size if direction is Direction.ACTIVATION else passes.header.size
        if size != expected:
            raise ProtocolError(Reason.MALFORMED, f"{size} bytes of payload")
        receipts.check_hop(
            message.receipt,
            run=self._switchboard.run,
            sender=link.peer,
            recipient=self._identity.peer_id,
            stage=stage,
        )

    def _check_new(self, sender: PeerId, receipt: Receipt) -> Flight | None:
        """The flight or finished microbatch that this activation continues after its sender took another's place.

        That place may be taken while the other still seems to be there: the one who passes the microbatch on notices
        its end before we do. Raises `ProtocolError` (replayed) if this sender sent the same before, or another sent
        something else.
        """
        known = self.flights.get(receipt.microbatch) or self.finished.get(receipt.microbatch)
        if known is None:
            return None
        if known.previous == sender and not known.orphaned:
            raise ProtocolError(Reason.REPLAYED, str(receipt.microbatch))
        if known.received.digest == receipt.output:
            return known
        if known.phase is not Phase.DONE:
            raise ProtocolError(Reason.REPLAYED, f"{receipt.microbatch} with another content")
        return None

    def _adopt(self, flight: Flight, sender: PeerId, held: Held) -> None:
        """The same activation over another way: our work stands, and the gradient goes to the new sender."""
        flight.previous, flight.received, flight.orphaned = sender, held, False
        self.counts["adopted"] += 1
        if flight.phase is Phase.DONE:
            self._answer(flight)
        self._grant()

    def inject(self, microbatch: MicrobatchId, tokens: Tensor) -> None:
        """On a head: start one of our own microbatches, int64 (sequences, context + 1)."""
        flight = Flight(microbatch, None, monotonic())
        self.flights[microbatch] = flight
        work = self._compute.run(Urgency.INJECT, self._passes.inject, tokens, microbatch.slot)
        self._spawn(self._take_forward(flight, work))

    def on_version(self) -> None:
        """The weights moved on: start what came early."""
        early, self._early = self._early, []
        for flight in early:
            self._start(flight)
        oldest = (self._passes.trainer.version - 4) * self._manifest.batch.microbatches
        self.losses = {slot: loss for slot, loss in self.losses.items() if slot >= oldest}

    def _start(self, flight: Flight) -> None:
        version = self._passes.trainer.version
        is_synchronous = self._manifest.schedule.kind == "synchronous"
        if is_synchronous and flight.id.slot // self._manifest.batch.microbatches > version:
            self._early.append(flight)
        else:
            self._spawn(self._take_forward(flight, self._forward(flight)))

    def _forward(self, flight: Flight) -> Coroutine[Any, Any, Forwarded | Returned]:
        """The stage's work on an activation; on the tail all of it, loss and backward pass included."""
        passes, slot = self._passes, flight.id.slot
        if self._stage < self._manifest.stages.count - 1:
            return self._compute.run(Urgency.FORWARD, passes.forward, flight.received, slot)
        covered = slot in self._progress.covered()
        return self._compute.run(
            Urgency.BACKWARD, lambda: passes.tail(flight.received, slot, covered=covered)
        )

    async def _take_forward(self, flight: Flight, work: Coroutine[Any, Any, Forwarded | Returned]) -> None:
        try:
            result = await work
        except ProtocolError as error:
            self._fail(flight, error)
            return
        if flight.phase is Phase.DONE:  # Given up meanwhile.
            return
        if isinstance(result, Returned):
            self._finish(flight, result)
            return
        flight.graph, flight.output = result.graph, result.output
        if flight.output is None:  # A testbed's attacker that sends nothing, and says so.
            self._end(flight)
            return
        flight.version, flight.state = result.graph.version, result.graph.state
        if flight.previous is None:
            flight.received = Held(digest=result.input_digest)
        flight.phase = Phase.UNSENT
        self._unsent.append(flight)
        self._pump()

    # --- the next hop ---

    def next_hops(self) -> list[PeerId]:
        """Replicas of the next stage that we have a link to."""
        return [
            peer
            for peer, link in self._switchboard.links.items()
            if link.is_up and link.stage == self._stage + 1
        ]

    def _pump(self) -> None:
        """Send what waits, as far as the next stage's credit goes."""
        now = monotonic()
        while self._unsent:
            if self._unsent[0].phase is not Phase.UNSENT:
                self._unsent.popleft()
                continue
            ready = [
                peer
                for peer in self._usable(now)
                if self._credit.get(peer, 0) > 0
                and self._cooling.get(peer, 0.0) <= now
                and self._switchboard.links[peer].backlog <= _MAX_BACKLOG
            ]
            chosen = self._choose(ready)
            if chosen is None:
                break
            self._send_on(self._unsent.popleft(), chosen)
        if not self.is_accepting:
            # Who leaves does not wait for room: what cannot go on now goes back.
            for flight in tuple(self._unsent):
                self._lose(flight, Reason.LEAVING)
        self._on_change()

    @property
    def shunned(self) -> list[PeerId]:
        """Next hops that let us wait in vain, and get nothing for now; the latest last."""
        return self._patience.shunned(monotonic())

    def _usable(self, now: float) -> Collection[PeerId]:
        """The next hops, without who is in quarantine, or lately let us wait in vain, as long as there are others."""
        hops = self._outside_quarantine(self.next_hops())
        return [peer for peer in hops if not self._patience.shuns(peer, now)] or hops

    def _choose(self, ready: Collection[PeerId]) -> PeerId | None:
        """By throughput; a suspect less often."""
        suspects = {peer: _SUSPECTS_BURDEN for peer in ready if peer in self.verdicts}
        return self._router.choose(ready, suspects)

    def _outside_quarantine(self, peers: Collection[PeerId]) -> Collection[PeerId]:
        outside = [peer for peer in peers if self.verdicts.get(peer) is not Verdict.QUARANTINED]
        return outside or peers

    def on_standing(self) -> None:
        """Somebody is suspected, or not any more: credit and routes may change."""
        self._grant()
        self._pump()

    def on_ban(self, peer: PeerId) -> None:
        """What a banned peer sent is not worked on. What it was sent goes to others when its link goes down."""
        for flight in tuple(self.flights.values()):
            if flight.previous == peer:
                self._lose(flight, Reason.BANNED)

    def _send_on(self, flight: Flight, peer: PeerId) -> None:
        output = flight.output
        assert output is not None
        receipt = self._sign(
            flight, Direction.ACTIVATION, flight.version, flight.received.digest, output, peer
        )
        self._credit[peer] -= 1
        self.counts["to_banned"] += self.verdicts.get(peer) is Verdict.BANNED
        flight.phase, flight.next, flight.sent_at = Phase.SENT, peer, monotonic()
        flight.queue_at_send = 1 + sum(1 for one in self.flights.values() if one.next == peer)
        link = self._switchboard.links[peer]
        if not self._send(link, Activation(receipt, self._passes.header), *output.parts):
            self._reroute(flight, Reason.UNREACHABLE)

    def _sign(
        self,
        flight: Flight,
        direction: Direction,
        version: int,
        got: bytes,
        sent: Outgoing,
        recipient: PeerId,
    ) -> SignedReceipt:
        receipt = Receipt(
            run=self._switchboard.run,
            microbatch=flight.id,
            direction=direction,
            stage=self._stage,
            version=version,
            input=got,
            output=sent.digest,
            sender=self._identity.peer_id,
            recipient=recipient,
        )
        return SignedReceipt.sign(receipt, self._identity)

    def _reroute(self, flight: Flight, reason: Reason) -> None:
        """We still hold the output: back to the head of the queue, for another replica."""
        log.info("rerouted", microbatch=str(flight.id), away_from=flight.next, reason=reason.value)
        self.counts["rerouted"] += 1
        flight.phase, flight.next = Phase.UNSENT, None
        self._unsent.appendleft(flight)

    # --- gradients ---

    def _take_gradient(self, link: Link, message: Gradient, payload: Payload) -> None:
        """The checks, in order. REJECT: digest. IGNORE: unsolicited."""
        receipt = _check_digest(message, payload)
        flight = self.flights.get(receipt.microbatch)
        if flight is None or flight.phase is not Phase.SENT or flight.next != link.peer:
            self._switchboard.refusals.count(
                link.peer, ProtocolError(Reason.UNSOLICITED, str(receipt.microbatch))
            )
            return
        flight.phase = Phase.BACKWARD
        flight.gradient = Held.of(payload, message.receipt)
        seconds = monotonic() - flight.sent_at
        self._patience.note(seconds)
        self._router.measure(link.peer, seconds / flight.queue_at_send)
        self._spawn(self._compute_backward(flight))

    async def _compute_backward(self, flight: Flight) -> None:
        graph, gradient, slot = flight.graph, flight.gradient, flight.id.slot
        assert graph is not None
        covered = slot in self._progress.covered()
        try:
            result = await self._compute.run(
                Urgency.BACKWARD, lambda: self._passes.backward(graph, gradient, slot, covered=covered)
            )
        except ProtocolError as error:
            self._fail(flight, error, culprit=flight.next)
            return
        except ValueError:
            if flight.phase is Phase.DONE:  # Given up while it waited for its turn, and its graph with it.
                return
            raise
        if flight.phase is not Phase.DONE:
            self._finish(flight, result)

    def _finish(self, flight: Flight, result: Returned) -> None:
        """The stage's work on this microbatch is done: answer, keep the evidence, free the rest."""
        self.counts["microbatches"] += 1
        if flight.previous is None:
            self.window.note(monotonic() - flight.began, len(self.flights))
        if result.loss is not None:
            self.losses.setdefault(flight.id.slot, result.loss)  # Of a later attempt: later weights.
        flight.answer, flight.answer_version = result.answer, result.version
        flight.state = flight.state or result.state
        self._answer(flight)
        self._end(flight)

    def _answer(self, flight: Flight) -> None:
        """Send the gradient to the previous hop, if it is still there; else it is kept for who takes its place."""
        if flight.previous is None or flight.answer is None:
            return
        # On the tail a gradient answers the activation itself.
        got = flight.gradient.digest or flight.received.digest
        link = self._switchboard.links.get(flight.previous)
        receipt = self._sign(
            flight, Direction.GRADIENT, flight.answer_version, got, flight.answer, flight.previous
        )
        if link is None or not self._send(link, Gradient(receipt, self._passes.header), *flight.answer.parts):
            flight.orphaned = True

    # --- endings ---

    def _end(self, flight: Flight) -> None:
        flight.phase = Phase.DONE
        flight.release()
        flight.serial = next(self._serials)
        self.flights.pop(flight.id, None)
        self.finished.add(flight, monotonic())
        self._grant()
        self._on_change()

    def _refuse(
        self, peer: PeerId, microbatch: MicrobatchId, direction: Direction, error: ProtocolError
    ) -> None:
        """Count, tell the sender, and give its credit back."""
        self._switchboard.refusals.count(peer, error)
        if link := self._switchboard.links.get(peer):
            self._send(link, Refusal(microbatch, direction, error.reason))
        self._grant()

    def _fail(self, flight: Flight, error: ProtocolError, culprit: PeerId | None = None) -> None:
        """A microbatch cannot be used. Labels that are none are the sender's doing: REJECT."""
        if error.reason in (Reason.FLAGGED, Reason.NOT_FINITE):
            flight.flagged = Direction.ACTIVATION if culprit is None else Direction.GRADIENT
        culprit = culprit or flight.previous
        self._lose(flight, error.reason)
        if flight.flagged is not None:
            self.flagged.set()
        if culprit is None:
            return
        if error.reason is Reason.MALFORMED:
            self._switchboard.reject(culprit, error)
        else:
            self._switchboard.refusals.count(culprit, error)

    def _lose(self, flight: Flight, reason: Reason) -> None:
        """Give a microbatch up, here and upstream."""
        if flight.phase is Phase.DONE:
            return
        log.info("lost", microbatch=str(flight.id), reason=reason.value, phase=flight.phase.name)
        self.counts["lost"] += 1
        flight.phase = Phase.DONE
        flight.release()
        flight.serial = next(self._serials)
        self.flights.pop(flight.id, None)
        self.dropped.add(flight, monotonic())
        if flight.previous is not None and (link := self._switchboard.links.get(flight.previous)):
            self._send(link, Refusal(flight.id, Direction.ACTIVATION, reason))
        self._grant()
        self._on_change()

    def _take_refusal(self, link: Link, refusal: Refusal) -> None:
        flight = self.flights.get(refusal.microbatch)
        if refusal.direction is Direction.GRADIENT or flight is None or flight.next != link.peer:
            return
        if flight.phase is not Phase.SENT:
            return
        if refusal.reason in _RETRIABLE:
            self._cooling[link.peer] = monotonic() + COOL_DOWN
            self._reroute(flight, refusal.reason)
            self._pump()
        else:
            self._lose(flight, Reason.ABANDONED)

    def check_timeouts(self) -> None:
        """Called about once a second: give up what does not come back, and forget what is old."""
        now = monotonic()
        self.finished.prune(now)
        self.dropped.prune(now)
        self._cooling = {peer: until for peer, until in self._cooling.items() if until > now}
        for flight in tuple(self.flights.values()):
            if flight.phase is Phase.SENT and now - flight.sent_at >= self._patience.limit(flight.id.attempt):
                self._give_up(flight, now)
        self._pump()

    def _give_up(self, flight: Flight, now: float) -> None:
        """What was sent on does not come back."""
        peer, waited = flight.next, now - flight.sent_at
        assert peer is not None
        log.warning("no answer", microbatch=str(flight.id), sent_to=peer, waited=round(waited, 1))
        self._switchboard.refusals.count(peer, ProtocolError(Reason.TIMED_OUT, str(flight.id)))
        # It took at least this long: it is hardly chosen again while there are others.
        self._router.measure(peer, waited)
        self._patience.lost(peer, now)
        self._lose(flight, Reason.TIMED_OUT)

    def hand_back(self) -> None:
        """On leaving: what is not finished goes back to its sender, who has it still."""
        for flight in tuple(self.flights.values()):
            self._lose(flight, Reason.LEAVING)

    async def watch(self) -> None:
        """Until cancelled. Raises what went wrong in computing: bad input is refused before, so the fault is here."""
        await self._failed.wait()
        assert self._error is not None
        raise self._error

    async def stop(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _send(self, link: Link, message: wire.Message, *payload: memoryview) -> bool:
        try:
            link.send(message, *payload)
        except ProtocolError:
            return False
        return True

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._switchboard.refusals.counts[Reason.INTERNAL] += 1
            self._error = self._error or error
            self._failed.set()


def _check_digest(message: Activation | Gradient, payload: Payload) -> Receipt:
    """The receipt of what came. Raises `ProtocolError` (wrong_digest) if it is of something else."""
    receipt = message.receipt.receipt
    if digest(*payload.leaves) != receipt.output:
        raise ProtocolError(Reason.WRONG_DIGEST)
    return receipt

"""What a last stage asks of a loss before it learns from it."""

from __future__ import annotations

from verifier.baseline import Recent
from verifier.senders import Latest, Sums
from verifier.streams import Peer


class LossGuard:
    """Of a last stage: whether the loss that an activation led to may be learned from.

    Whatever is done to an activation, harm to the model is loss: this sees what keeps the marginals as they are, such
    as flipped signs or another microbatch's activation. One microbatch's loss says little, since texts differ; so for
    each sender the standardised losses are summed up, less an allowance (`Sums`), and what it sends that is odd is
    flagged while the sum is above `limit`, in robust standard deviations. The loss falls as training goes on, in its
    beginning by more than texts differ: so what is standardised is how far a loss is from the few before it, among how
    far the latest were. That names nobody, as the corruption may be older than the sender: verifiers look at what is
    flagged. If most senders are odd all starts anew, as for `Guard`; and of one that sends alone nothing is, since
    losses may rise for a while, as when the learning rate does, and there is nobody to compare it with.
    """

    _allowance = 1.5
    """More than for normal losses: hard texts are further from the median than easy ones."""
    _finest = 0.02
    """Of the loss: less than that is no difference."""

    def __init__(self, limit: float = 6.0) -> None:
        self._usual = Recent()
        self._sums = Sums(self._allowance, limit)
        self._latest = Latest()

    def check(self, loss: float, sender: Peer, *, is_retry: bool = False) -> bool:
        """Whether a microbatch's mean loss, in nats a token and finite, may be learned from.

        `is_retry`: of a microbatch that was lost before. A hard text that comes again says nothing new of its sender.
        """
        deviation = self._usual.deviation(loss, self._finest * loss)
        is_alone = self._latest.are_all_of(sender)
        if is_retry:
            return is_alone or not self._sums.is_odd(sender, deviation)
        is_odd = self._sums.add(sender, deviation) and not is_alone
        if not is_odd:
            self._usual.learn(loss)
        if self._latest.note(sender, is_odd):
            self._usual.clear()
            self._sums.clear()
        return not is_odd

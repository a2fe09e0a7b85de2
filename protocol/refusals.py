"""What was refused, by reason: counted always, logged at a bounded rate."""

from __future__ import annotations

from collections import Counter, OrderedDict
from time import monotonic

import structlog

from protocol.errors import ProtocolError, Reason

log = structlog.get_logger("refused")

_LOG_EVERY = 5.0
_MAX_LOGGED = 1024


class Refusals:
    """Counts per reason; one log line per peer and reason in five seconds, saying how many it stands for."""

    def __init__(self) -> None:
        self.counts: Counter[Reason] = Counter()
        self._logged: OrderedDict[tuple[str, Reason], tuple[float, int]] = OrderedDict()

    def count(self, peer: str, error: ProtocolError, *, rejected: bool = False) -> None:
        """`rejected`: the sender misbehaved and its connection is closed; otherwise the message is only ignored."""
        self.counts[error.reason] += 1
        now = monotonic()
        last, unlogged = self._logged.pop((peer, error.reason), (-_LOG_EVERY, 0))
        if now - last >= _LOG_EVERY:
            log.warning(
                "rejected" if rejected else "ignored",
                peer=peer,
                reason=error.reason.value,
                detail=error.detail,
                count=unlogged + 1,
            )
            last, unlogged = now, -1
        self._logged[peer, error.reason] = (last, unlogged + 1)
        if len(self._logged) > _MAX_LOGGED:
            self._logged.popitem(last=False)

"""The two kinds of error: what a person must mend, and what a peer did wrong."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class SentinelError(Exception):
    """Base of every error this project raises on purpose."""


class UserError(SentinelError):
    """Something a person can mend: the CLI prints it as one line and exits with code 2.

    `problem` says what is wrong; `remedy` says what to do about it.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem.rstrip('.')}. {remedy}")
        self.problem = problem
        self.remedy = remedy


class BannedError(SentinelError):
    """This peer is banned from the run: the CLI prints it as one line and exits with `exit_code`."""

    exit_code: Final = 3


class Reason(StrEnum):
    """Why a message was refused. These are the counters' names in logs and metrics and go on the wire as they are."""

    MALFORMED = "malformed"
    OVERSIZED = "oversized"
    WRONG_VERSION = "wrong_version"
    FOREIGN_RUN = "foreign_run"
    WRONG_PEER = "wrong_peer"
    BAD_SIGNATURE = "bad_signature"
    WRONG_STAGE = "wrong_stage"
    WRONG_SHAPE = "wrong_shape"
    WRONG_DTYPE = "wrong_dtype"
    WRONG_DIGEST = "wrong_digest"
    NOT_FINITE = "not_finite"
    FLAGGED = "flagged"
    REPLAYED = "replayed"
    UNSOLICITED = "unsolicited"
    OVER_CREDIT = "over_credit"
    NOT_READING = "not_reading"
    SHUT_OUT = "shut_out"
    BANNED = "banned"
    EXPIRED = "expired"
    STALE = "stale"
    TOO_EARLY = "too_early"
    BUSY = "busy"
    LEAVING = "leaving"
    NOT_READY = "not_ready"
    ABANDONED = "abandoned"
    TIMED_OUT = "timed_out"
    UNREACHABLE = "unreachable"
    UNKNOWN_METHOD = "unknown_method"
    INTERNAL = "internal"


class ProtocolError(SentinelError):
    """A message that breaks the protocol. The only error that decoding bytes from the network raises."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)
        self.reason = reason
        self.detail = detail

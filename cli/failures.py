"""From an error to the one line that a person reads, and the exit code."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from protocol.errors import BannedError, SentinelError, UserError

MENDABLE = 2
FAILED = 1

# What a person can mend about files, wherever it shows.
_FILE_TROUBLE = {
    errno.ENOSPC: "Free space on that disk",
    errno.EDQUOT: "Free space on that disk, or have the quota raised",
    errno.EFBIG: "Raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "Name a folder that can be written",
    errno.EACCES: "Check the permissions",
    errno.EPERM: "Check the permissions",
    errno.EMFILE: "Raise the limit on open files (ulimit -n)",
    errno.ENFILE: "Close what keeps so many files open on this machine",
    errno.ENOMEM: "Free memory",
}


@dataclass(frozen=True)
class Failure:
    """`is_bug`: nobody foresaw it, so its traceback is wanted too."""

    line: str
    code: int
    is_bug: bool = False


def explain(error: Exception) -> Failure:
    if isinstance(error, UserError):
        return Failure(str(error), MENDABLE)
    if isinstance(error, BannedError):
        return Failure(str(error), error.exit_code)
    if isinstance(error, SentinelError):
        return Failure(str(error), FAILED)
    if _is_out_of_memory(error):
        return Failure(
            f"Out of memory: {_first_line(error)}. Free memory, use another --device, or serve a smaller stage",
            MENDABLE,
        )
    if isinstance(error, OSError) and error.errno in _FILE_TROUBLE:
        place = f": {error.filename}" if error.filename else ""
        return Failure(f"{error.strerror}{place}. {_FILE_TROUBLE[error.errno]}", MENDABLE)
    line = (
        f"internal error, please report it with what is above: {type(error).__name__}: {_first_line(error)}"
    )
    return Failure(line, FAILED, is_bug=True)


def _is_out_of_memory(error: Exception) -> bool:
    """torch raises `OutOfMemoryError` on a GPU and a plain RuntimeError of its allocator on a CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no detail"])[0][:300]

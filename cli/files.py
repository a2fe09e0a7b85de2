"""Results on disk: refused before the work if they could not be written after it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from protocol.errors import UserError

_PROBE = b"\0" * 65536


def check_writable(path: Path, flag: str) -> None:
    """A run of minutes must not end in a file that cannot be written. Raises `UserError` that names `flag`."""
    if _is_device(path):
        return
    probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "It is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(_PROBE)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(path, error, flag) from None


def write_json(path: Path, content: dict[str, Any], flag: str) -> None:
    """Replace the file in one go. Raises `UserError` that names `flag`."""
    text = json.dumps(content, indent=2) + "\n"
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if _is_device(path):
            path.write_text(text)
            return
        try:
            part.write_text(text)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(path, error, flag) from None


def _is_device(path: Path) -> bool:
    """/dev/stdout, a pipe: nothing to replace."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _cannot_write(path: Path, error: OSError, flag: str) -> UserError:
    return UserError(
        f"Cannot write {path}: {error.strerror}", f"Free space, or name another file with {flag}"
    )

"""`FILE.py:CLASS`: a class out of somebody's own file, with one clear line for everything that can be wrong."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from protocol.errors import UserError


def names_a_file(spec: str) -> bool:
    return ".py:" in spec


def load_class(spec: str, method: str) -> type[Any]:
    """The class that `FILE.py:CLASS` names; it must have `method`. Runs the file. Raises `UserError`."""
    file, _, name = spec.rpartition(":")
    module = _run(Path(file), spec)
    found = getattr(module, name, None)
    if not isinstance(found, type):
        known = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise UserError(f"{file} has no class {name}", f"It has: {', '.join(known) or 'none'}")
    if not callable(getattr(found, method, None)):
        raise UserError(
            f"{name} in {file} has no method `{method}`", "See docs/examples/ for one of 20 lines"
        )
    return found


def _run(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        raise UserError(f"There is no file {path}", f"Give FILE.py:CLASS, not {spec}")
    described = importlib.util.spec_from_file_location(f"sentinel_plugin_{path.stem}", path)
    if described is None or described.loader is None:
        raise UserError(f"{path} is no Python file", "Give FILE.py:CLASS")
    module = importlib.util.module_from_spec(described)
    try:
        described.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001 - a stranger's file may raise anything at all
        raise UserError(f"{path} does not load: {type(error).__name__}: {error}", "Mend the file") from None
    return module

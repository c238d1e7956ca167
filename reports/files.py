"""Writing derived files: whole or not at all, with errors a user can act on."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from megafold_bench.errors import UserError


def make_folder(path: Path) -> Path:
    """`path`, made with its parents if need be. Raises `UserError` where that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {path}: {error.strerror}; name another with --out"
        ) from error
    return path


def write_bytes(path: Path, content: bytes) -> Path:
    """Write `content` beside `path` and rename it into place, so that a full disk leaves the old file whole."""
    name = ""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except OSError as error:
        if name:
            Path(name).unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; free space or name another place") from error
    return path


def write_text(path: Path, content: str) -> Path:
    """`write_bytes` in UTF-8."""
    return write_bytes(path, content.encode())

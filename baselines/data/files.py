"""Reading plain or gzip files, with errors that say which file and what to do."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from megafold_bench.errors import UserError

STRUCTURE_SUFFIXES = (".cif", ".cif.gz", ".mmcif", ".mmcif.gz", ".bcif", ".bcif.gz")

_GZIP_MAGIC = b"\x1f\x8b"


def read_bytes(path: Path, what: str) -> bytes:
    """The content of `path`, decompressed when it is gzip.

    Raises `UserError` when the file is missing, is named ``.gz`` but is no gzip file, or is damaged.
    """
    if not path.is_file():
        raise UserError(f"{what} {str(path)!r} does not exist: check the path")
    raw = path.read_bytes()
    if not raw.startswith(_GZIP_MAGIC):
        if path.suffix == ".gz":
            raise UserError(f"{what} {str(path)!r} is not a gzip file: rename it without .gz or compress it")
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{what} {str(path)!r} is a damaged gzip file ({error}): download it again") from None

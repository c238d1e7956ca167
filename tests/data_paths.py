"""Where the real complexes lie, for tests that want them."""

import os
from pathlib import Path


def complexes_dir() -> Path | None:
    """The folder with 7a4d, 721p and 209d; None where this machine has none."""
    named = os.environ.get("MEGAFOLD_BENCH_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data" / "complexes"
    return folder if folder.is_dir() else None

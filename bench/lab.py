"""What laboratories share: their options, a call between the marks of a profiler, and rows of results as they come."""

# mypy: ignore-errors
import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch


def options(description: str) -> argparse.ArgumentParser:
    """--out and --profile."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--profile", type=int, metavar="N")
    return parser


def run_marked(calls: Iterable[Callable[[], object]]) -> None:
    """Run each call once more after a first time, between the marks that a profiler started with this process looks for."""
    for call in calls:
        call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


class Rows:
    """Results, printed and written to a file of `folder` line by line, so that none is lost with the ones after it."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / name
        self._path.write_text("")

    def put(self, row: dict[str, object]) -> None:
        """One more."""
        print(row, flush=True)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

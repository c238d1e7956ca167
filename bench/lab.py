"""What laboratories share: a folder for rows of results, and calls that compute the same compared with float64 and timed."""

# mypy: ignore-errors
import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from triton.testing import do_bench


class Rows:
    """Results, printed and written line by line to a file of the folder that --out names: none is lost with the ones after it."""

    def __init__(self, description: str, name: str) -> None:
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--out", type=Path, default=Path())
        folder = parser.parse_args().out
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / name
        self._path.write_text("")

    def put(self, row: dict[str, object]) -> None:
        """One more. What the device holds of the problem before is given back."""
        print(row, flush=True)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        torch.cuda.empty_cache()


def compared(
    calls: Mapping[str, tuple[Callable[[], Sequence[Tensor]], Sequence[Tensor] | None]], timed: bool
) -> dict[str, dict[str, object]]:
    """Of each call, given with its results in float64 if there are any: their relative distances, whether a repetition is equal in
    every bit, and, if `timed`, ms."""
    found = {}
    for name, (call, exact) in calls.items():
        results = call()
        own = {"same": all(map(torch.equal, results, call()))}
        if exact is not None:
            pairs = zip(results, exact, strict=True)
            own["errors"] = [((r.double() - e).norm() / e.norm()).item() for r, e in pairs]
        if timed:
            own["ms"] = do_bench(call, warmup=20, rep=100, return_mode="median")
        found[name] = own
    return found

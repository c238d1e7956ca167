"""Every operator against every implementation: which tasks, in which processes, and where the rows go."""

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megafold_bench.environment import collect, detect_accelerator
from megafold_bench.errors import UserError
from megafold_bench.outcomes import Outcome
from optimized.kernels.implementations import hindrance, implements, parse_implementations
from optimized.kernels.measure import PASSES
from optimized.kernels.names import parse_list, parse_tokens
from optimized.kernels.problems import parse_dtypes, parse_operators
from optimized.kernels.processes import Row, run_group, task

ROWS_NAME = "kernels.jsonl"
SCHEMA_VERSION = 1
DEFAULT_TOKENS = {"cuda": (384, 768), "cpu": (32,)}
DEFAULT_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Request:
    """What is asked for, checked. `asked` says whether implementations were named."""

    ops: tuple[str, ...]
    tokens: tuple[int, ...]
    dtypes: tuple[str, ...]
    passes: tuple[str, ...]
    implementations: tuple[str, ...]
    asked: bool
    device: str
    timeout_s: float = DEFAULT_TIMEOUT_S

    @staticmethod
    def parse(
        op: str | None,
        n: str | None,
        dtype: str | None,
        passes: str | None,
        impl: str | None,
        device: str | None = None,
        timeout_s: float | None = None,
    ) -> "Request":
        """From the words of the command line; UserError names what does not fit."""
        kind = device or detect_accelerator()
        if kind not in DEFAULT_TOKENS:
            raise UserError(f"--device {kind}: choose cuda or cpu")
        if timeout_s is not None and timeout_s <= 0:
            raise UserError(f"--timeout {timeout_s:g}: give seconds above 0")
        return Request(
            parse_operators(parse_list(op)),
            parse_tokens(n) or DEFAULT_TOKENS[kind],
            parse_dtypes(parse_list(dtype), ("bf16",)),
            parse_passes(parse_list(passes)),
            parse_implementations(parse_list(impl)),
            impl is not None,
            kind,
            timeout_s or DEFAULT_TIMEOUT_S,
        )


def parse_passes(names: tuple[str, ...]) -> tuple[str, ...]:
    """Passes by name, all if none is named."""
    for name in names:
        if name not in PASSES:
            raise UserError(f"--pass {name}: choose from {', '.join(PASSES)}")
    return names or PASSES


def groups(request: Request) -> list[tuple[str, list[Row]]]:
    """Name and tasks of every process: the ceilings, then one operator, dtype and implementation each."""
    found = [("ceilings", [task("ceilings", device=request.device)])]
    for op in request.ops:
        for dtype in request.dtypes:
            for name in request.implementations:
                if not (request.asked or implements(name, op)):
                    continue
                tasks = [
                    task(
                        "measurement", op=op, implementation=name, dtype=dtype, tokens=n, passes=request.passes,
                        device=request.device,
                    )
                    for n in request.tokens
                ]  # fmt: skip
                found.append((f"{op}-{dtype}-{name}", tasks))
    return found


class RowFile:
    """`kernels.jsonl` of a folder: appended to, one run after another; every row names its run."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.path = folder / ROWS_NAME
            self.path.open("a").close()
        except OSError as error:
            raise UserError(f"--out {folder}: {error.strerror}; name another folder") from error
        self.run = uuid.uuid4().hex[:12]

    def append(self, row: Row) -> Row:
        """Write a row with run and time; returns it so."""
        full = {
            "schema_version": SCHEMA_VERSION,
            "run": self.run,
            "time": datetime.now(UTC).isoformat(),
            **row,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(full) + "\n")
        return full


def run(request: Request, folder: Path) -> Iterator[Row]:
    """Measure what is asked for; rows as they come, already in the folder. Provenance is the first row."""
    rows = RowFile(folder)
    yield rows.append({"kind": "environment", "environment": collect()})
    for name, tasks in groups(request):
        for row in _rows(tasks, folder / "logs" / f"{name}.log", request.timeout_s):
            yield rows.append(row)


def _rows(tasks: list[Row], log: Path, timeout_s: float) -> Iterator[Row]:
    """The rows of one process, which is not started for what cannot run here."""
    first = tasks[0]["arguments"]
    reason = hindrance(first["implementation"], first["dtype"]) if "implementation" in first else ""
    if not reason:
        yield from run_group(tasks, log, timeout_s)
        return
    for each in tasks:
        outcome = {"outcome": Outcome.UNSUPPORTED.value, "detail": reason}
        yield {"kind": each["kind"], **each["arguments"], **outcome}


def summary(row: dict[str, Any]) -> str:
    """A row in a line, for whoever is waiting."""
    if row["kind"] != "measurement":
        return ""
    label = f"{row['op']} {row['dtype']} N={row['tokens']} {row['implementation']}"
    if row["outcome"] != "ok":
        return f"{label}: {row['outcome']}: {row['detail']}"
    times = {name: sorted(part["times_s"]) for name, part in row["passes"].items()}
    shown = [f"{name} {values[len(values) // 2] * 1e3:.3f} ms" for name, values in times.items()]
    return f"{label}: {', '.join(shown)}"

"""Run groups of tasks, each group in a fresh process, and turn a process that dies into a row."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megafold_bench.outcomes import Ending, complete

Row = dict[str, Any]
TAIL_CHARACTERS = 2000


def task(kind: str, **arguments: Any) -> Row:
    """A task for the worker: see `worker.HANDLERS` for the kinds."""
    return {"kind": kind, "arguments": arguments}


def run_group(tasks: Sequence[Row], log: Path, timeout_s: float) -> Iterator[Row]:
    """The rows of all tasks, in order. `timeout_s` is for each task; a new process goes on after one that died."""
    left = list(tasks)
    while left:
        rows, ending = _run_process(left, log, timeout_s * len(left))
        yield from rows
        left = left[len(rows) :]
        if left and ending is not None:
            verdict = complete(ending)
            yield {
                "kind": left[0]["kind"],
                **left[0]["arguments"],
                "outcome": verdict.outcome.value,
                "detail": verdict.detail,
            }
            left = left[1:]


def _run_process(tasks: Sequence[Row], log: Path, limit_s: float) -> tuple[list[Row], Ending | None]:
    """Rows of the tasks that ended, and how the process ended if it did not end by itself."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, log.open("ab") as output:
        rows = Path(folder) / "rows.jsonl"
        process = subprocess.Popen(
            [sys.executable, "-m", "optimized.kernels.worker"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=_environment(),
        )
        timed_out = False
        try:
            process.communicate(
                json.dumps({"rows": str(rows), "tasks": list(tasks)}).encode(), timeout=limit_s
            )
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:  # also on Ctrl-C: nothing of ours may go on running on the device
            _end(process)
        found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    code = process.returncode
    stopped_by_itself = bool(found) and found[-1]["outcome"] not in ("ok", "unsupported")
    if len(found) == len(tasks) or (stopped_by_itself and not timed_out):
        return found, None
    tail = log.read_text(errors="replace")[-TAIL_CHARACTERS:]
    number = -code if code < 0 else None
    return found, Ending(code, number, timed_out, log_tail=tail, limit_s=limit_s)


def _environment() -> dict[str, str]:
    """Ours, with this package importable wherever the command was started."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it started: compilers run in processes of their own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

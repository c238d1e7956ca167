"""A fresh process: takes tasks as JSON from standard input, appends a row for each to a file, one at a time.

It ends after the first task that failed otherwise than by not being supported: memory may be fragmented, or the
device's context lost. Whoever started it starts another for what is left.
"""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Handler = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
"""Turns a task's arguments into the fields of its row; the second dictionary lives as long as the process."""


def _measure(arguments: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    from optimized.kernels.measure import Task, measure

    task = Task(**{**arguments, "passes": tuple(arguments["passes"])})
    row = measure(task, state.get("errors"))
    state["errors"] = row["errors"]
    return row


def _ceilings(arguments: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    from optimized.kernels.timing import measure_ceilings

    return measure_ceilings(arguments["device"])


def _verify(arguments: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    from optimized.kernels.verify import verify

    return verify(**arguments)


def _tune(arguments: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    from optimized.kernels.tune import tune_operator

    return tune_operator(**arguments)


HANDLERS: dict[str, Handler] = {
    "measurement": _measure,
    "ceilings": _ceilings,
    "verdict": _verify,
    "tuning": _tune,
}


def main() -> None:
    """Run the tasks on standard input: a file to append to, then `{kind, arguments}` objects."""
    from baselines.peers import prepare_environment
    from megafold_bench.outcomes import Outcome, classify

    prepare_environment()
    order = json.load(sys.stdin)
    state: dict[str, Any] = {}
    for task in order["tasks"]:
        row: dict[str, Any] = {"kind": task["kind"], **task["arguments"]}
        try:
            row |= {
                "outcome": Outcome.OK.value,
                "detail": "",
                **HANDLERS[task["kind"]](task["arguments"], state),
            }
        except Exception as error:  # a failed task is a row
            traceback.print_exc()
            verdict = classify(error)
            row |= {"outcome": verdict.outcome.value, "detail": verdict.detail}
        with Path(order["rows"]).open("a") as file:
            file.write(json.dumps(row) + "\n")
        if row["outcome"] not in (Outcome.OK, Outcome.UNSUPPORTED):
            sys.exit(3)


if __name__ == "__main__":
    main()

"""What `megafold-bench verify` and `tune` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from reports.units import seconds_text


def is_failure(row: Mapping[str, Any]) -> bool:
    """Whether a verdict is against the kernels: wrong, not repeatable, or no verdict for a crash."""
    return row["outcome"] != "unsupported" and not row.get("passed", False)


def print_verdict(row: Mapping[str, Any], console: Console) -> None:
    """One verdict in a line."""
    label = f"{row['op']} {row['dtype']}"
    if row["outcome"] == "unsupported":
        text, style = (
            f"the definition runs: {row['detail'].removesuffix(': the definition would run')}",
            "yellow",
        )
    elif row["outcome"] != "ok":
        text, style = f"FAILED: {row['outcome']}: {row['detail']}", "red"
    else:
        text = (
            f"worst error {row['error_ratio']:.2f} of the definition's ({row['error_of']}), {_repeats(row)}"
        )
        text, style = (f"right: {text}", "green") if row["passed"] else (f"FAILED: {text}", "red")
    console.print(escape(f"{label:40s} {text}"), style=style, highlight=False, soft_wrap=True)


def _repeats(row: Mapping[str, Any]) -> str:
    if row["differing"]:
        return f"repeats differ in {', '.join(row['differing'])}"
    return f"{row['repeats']} repeats equal in every bit"


def print_verdicts(rows: Sequence[Mapping[str, Any]], console: Console) -> bool:
    """The sum of all verdicts; returns whether nothing failed."""
    failed = sum(is_failure(row) for row in rows)
    absent = sum(row["outcome"] == "unsupported" for row in rows)
    passed = len(rows) - failed - absent
    how = next((f" ({row['how']})" for row in rows if "how" in row), "")
    text = f"{passed} right{how}, {failed} failed, {absent} run the definition here"
    console.print(escape(text), style="red" if failed else None, highlight=False, soft_wrap=True)
    if any("error_ratio" in row for row in rows):
        note = "errors against fp64, relative to the definition's in the same dtype or to fp32 rounding if that is larger"
        console.print(note, style="dim", highlight=False, soft_wrap=True)
    return failed == 0


def print_tuned(row: Mapping[str, Any], console: Console) -> None:
    """Chosen against default for every kernel of one operator, dtype and length."""
    title = f"{row['op']} · N = {row['tokens']} · {row['dtype']}"
    if row["outcome"] != "ok":
        console.print(escape(f"{title}: {row['outcome']}: {row['detail']}"), style="red", soft_wrap=True)
        return
    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in ("kernel", "default", "pass takes", "chosen", "pass takes", "tried"):
        table.add_column(name, overflow="fold")
    for entry in row["entries"]:
        table.add_row(
            escape(entry["entry"]), _config(entry["default"]), seconds_text(entry["default_s"]),
            "the default" if entry["chosen"] == entry["default"] else _config(entry["chosen"]),
            seconds_text(entry["chosen_s"]), str(entry["candidates"]),
        )  # fmt: skip
    console.print(table)
    console.print(escape(f"kept in {row['cache']}"), style="dim", highlight=False, soft_wrap=True)


def _config(config: Mapping[str, Any]) -> str:
    constants = " ".join(f"{name}={value}" for name, value in config["constants"].items())
    cap = f" registers≤{config['max_registers']}" if config["max_registers"] else ""
    return f"{constants} warps={config['num_warps']}{cap}"

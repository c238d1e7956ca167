"""The model that is trained, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def print_model(summary: Mapping[str, Any], console: Console) -> None:
    """Print what `baselines.summary.summarise_model` returns: parameters, FLOPs, dimensions."""
    problem, step = summary["problem"], summary["step"]
    console.print(
        f"{summary['preset']}: {summary['parameters']['total']:,} parameters. FLOPs for {problem['tokens']} "
        f"tokens, {problem['atoms']} atoms, {problem['msa_rows']} alignment rows, {problem['templates']} "
        f"templates; {step['cycles']} cycles, {step['samples']} diffusion samples in chunks of "
        f"{step['chunk']}, {step['rollout_steps']} rollout steps, checkpointing "
        f"{'on' if step['checkpointing'] else 'off'}.",
        highlight=False,
    )
    console.print(_shares("parameters", summary["parameters"], summary["parameters"]["total"], "{:,.0f}", 1))
    console.print(_amounts("forward pass", summary["flops_of_forward"]))
    flops = summary["flops_of_step"]
    parts = {name: value for name, value in flops.items() if name != "model"}
    console.print(_shares("training step, TFLOP", parts, flops["total"], "{:.4g}", 1e-12))
    console.print(f"without recomputation {flops['model'] * 1e-12:.4g} TFLOP", highlight=False)
    console.print(_dimensions(summary["dimensions"]))


def _shares(title: str, values: Mapping[str, float], total: float, form: str, scale: float) -> Table:
    table = Table("part", title=title, title_justify="left")
    table.add_column(title.split(", ")[-1], justify="right")
    table.add_column("share", justify="right")
    for name, value in values.items():
        table.add_row(name.replace("_", " "), form.format(value * scale), f"{value / total:.1%}")
    return table


def _amounts(title: str, values: Mapping[str, float]) -> Table:
    table = Table("part", title=title, title_justify="left")
    table.add_column("TFLOP", justify="right")
    for name, value in values.items():
        table.add_row(name.replace("_", " "), f"{value * 1e-12:.4g}")
    return table


def _dimensions(config: Mapping[str, Any]) -> Table:
    table = Table("part", "dimensions and options", title="dimensions", title_justify="left")
    plain = {name: value for name, value in config.items() if not isinstance(value, Mapping)}
    table.add_row("network", _joined(plain))
    for name, value in config.items():
        if isinstance(value, Mapping):
            table.add_row(name.replace("_", " "), _joined(value))
    return table


def _joined(values: Mapping[str, Any]) -> str:
    shown = []
    for name, value in values.items():
        shown.append(f"{name} ({_joined(value)})" if isinstance(value, Mapping) else f"{name} {value}")
    return ", ".join(shown)

"""Activation checkpointing, applied to a model from outside.

Each unit keeps only its inputs in the forward pass and runs again in backward. The random state is kept and
restored around the second run, so dropout masks repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megafold_bench.errors import UserError

MODES = ("none", "block")


def check_mode(mode: str) -> str:
    """`mode` itself; raises `UserError` if it is not one of `MODES`."""
    if mode not in MODES:
        raise UserError(f"unknown checkpointing {mode!r}: choose from {', '.join(MODES)}")
    return mode


def checkpoint_units(units: Iterable[tuple[str, nn.Module]]) -> None:
    """Wrap the ``forward`` of each unit, in place. Parameters, names and state dict stay as they are."""
    for _, unit in units:
        unit.forward = recomputed(unit.forward, keeps_random_state=has_dropout(unit))


def recomputed(function: Callable[..., Any], keeps_random_state: bool = False) -> Callable[..., Any]:
    """`function`, run again in backward instead of keeping its intermediates; unchanged without gradient.

    `keeps_random_state` must be True if the function draws from the default random generators. It costs a
    copy of their state on the host at each call, so functions without dropout leave it off.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        return checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=keeps_random_state, **kwargs
        )

    return run


def has_dropout(module: nn.Module) -> bool:
    """Whether any submodule drops values, by PyTorch's own classes or by an attribute ``dropout`` or ``p`` > 0."""
    for part in module.modules():
        for name in ("p", "dropout", "rate"):
            rate = getattr(part, name, None)
            if isinstance(rate, float) and rate > 0:
                return True
    return False

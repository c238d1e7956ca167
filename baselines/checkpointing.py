"""Activation checkpointing, applied to a model from outside.

Each unit keeps only its inputs in the forward pass and runs again in backward. The random state is kept and
restored around the second run, so dropout masks repeat.

PyTorch has two ways to do this. Protenix and OpenFold3 take the one through hooks on everything that a graph saves
(``block``), which calls Python for each saved tensor in both runs. The ``reentrant`` one makes no graph in the first run
and calls Python once a unit: a token block of the diffusion module with its backward pass takes the host 2.4 ms that
way, 3.5 with hooks (CPU, small tensors). Its first run is one without gradient, for which PyTorch may choose other
kernels than for the second, in attention for instance: they agree as far as rounding goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import is_dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from baselines.offloading import HostStore
from megafold_bench.errors import UserError

MODES = ("none", "block", "reentrant")


def check_mode(mode: str) -> str:
    """`mode` itself; raises `UserError` if it is not one of `MODES`."""
    if mode not in MODES:
        raise UserError(f"unknown checkpointing {mode!r}: choose from {', '.join(MODES)}")
    return mode


def checkpoint_units(
    units: Iterable[tuple[str, nn.Module]], mode: str = "block", store: HostStore | None = None
) -> None:
    """Wrap the ``forward`` of each unit, in place. Parameters, names and state dict stay as they are.

    With a `store`, it keeps the units' inputs.
    """
    for _, unit in units:
        unit.forward = recomputed(unit.forward, has_dropout(unit), mode, store)


def recomputed(
    function: Callable[..., Any],
    keeps_random_state: bool = False,
    mode: str = "block",
    store: HostStore | None = None,
) -> Callable[..., Any]:
    """`function`, run again in backward instead of keeping its intermediates; unchanged without gradient or with mode
    ``none``.

    `keeps_random_state` must be True if the function draws from the default random generators. It costs a
    copy of their state on the host at each call, so functions without dropout leave it off. With mode ``reentrant``
    gradients are for `backward` alone, not for `torch.autograd.grad`; calls that it cannot serve go as ``block``.
    A `store` keeps the tensors among the arguments.
    """
    if mode == "none":
        return function

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with nullcontext() if store is None else store.saving():
            return twice(*args, **kwargs)

    def twice(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())  # what is given by name, a store would not see

        def positional(*given: Any) -> Any:
            return function(*given[: len(args)], **dict(zip(kwargs, given[len(args) :], strict=True)))

        return checkpoint(
            positional if kwargs else function,
            *values,
            use_reentrant=mode == "reentrant" and _reentrant(values),
            preserve_rng_state=keeps_random_state,
        )

    return run


def _reentrant(values: Iterable[Any]) -> bool:
    """Whether reentrant checkpointing of a function of these gives all gradients.

    It gives none if no argument needs one, not even to the function's own parameters, and sees only tensors that are
    arguments themselves.
    """
    some = False
    for value in values:
        if isinstance(value, Tensor):
            some |= value.requires_grad
        elif _needs_gradient(value):
            return False
    return some


def _needs_gradient(value: Any) -> bool:
    """Whether a tensor in nested mappings, sequences and dataclasses needs a gradient."""
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, Mapping):
        return any(map(_needs_gradient, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_needs_gradient, value))
    return is_dataclass(value) and any(map(_needs_gradient, vars(value).values()))


def has_dropout(module: nn.Module) -> bool:
    """Whether any submodule drops values, by PyTorch's own classes or by an attribute ``dropout`` or ``p`` > 0."""
    for part in module.modules():
        for name in ("p", "dropout", "rate"):
            rate = getattr(part, name, None)
            if isinstance(rate, float) and rate > 0:
                return True
    return False

"""torch.compile, applied to a model from outside, one repeated block at a time.

Blocks of one class share one compiled function: its parameters are inputs, so the 48 Pairformer blocks
compile once. Activation checkpointing goes around the compiled function, not into it. Nothing falls back to
eager: a graph break (unless it was asked for) or too many recompilations raises.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from torch import nn

from megafold_bench.variants import Support

FLOAT_ARGUMENTS = "_use_fp64_for_unbacked_floats"
MAX_VARIANTS = 64
"""Compiled versions of one block class that are legitimate: with and without gradient, each sample count,
each width, each precision. Beyond that something recompiles every step."""


def compile_units(units: Iterable[tuple[str, nn.Module]], fullgraph: bool = True) -> None:
    """Replace the ``forward`` of each unit, in place, by the compiled one of its class (static shapes).

    Without `fullgraph` a graph break compiles the code before and after it apart, where it would raise.
    """
    compiled: dict[type[nn.Module], Callable[..., Any]] = {}
    for _, unit in units:
        kind = type(unit)
        if kind not in compiled:
            compiled[kind] = torch.compile(kind.forward, fullgraph=fullgraph, dynamic=False)
        unit.forward = MethodType(compiled[kind], unit)


@contextmanager
def strict_compilation() -> Iterator[None]:
    """Within it, hitting the recompilation limit raises instead of running the block uncompiled.

    Triton kernels of others are given Python floats in fp32, as when they are launched without a compiler. Inductor
    gives them in fp64, with which trifast's do not compile.
    """
    import torch._inductor.config  # a second, which only who compiles should wait

    limits = {"recompile_limit": MAX_VARIANTS, "fail_on_recompile_limit_hit": True}
    known = hasattr(torch._inductor.config, FLOAT_ARGUMENTS)  # before PyTorch 2.11 they were fp32
    floats = {FLOAT_ARGUMENTS: False} if known else {}
    with torch._dynamo.config.patch(limits), torch._inductor.config.patch(floats):
        yield


def compiler_support(device: str) -> Support:
    """Whether Inductor can generate code for `device` here: Triton on CUDA and ROCm, a C++ compiler on CPU."""
    if device == "cuda":
        if not torch.cuda.is_available():
            return Support(False, "no CUDA or ROCm device is visible to torch")
        if find_spec("triton") is None:
            return Support(
                False, "torch.compile needs Triton on this device; install it with: pip install triton"
            )
        return Support(True)
    compiler = os.environ.get("CXX") or next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), "")
    if not compiler or shutil.which(compiler.split()[0]) is None:
        return Support(
            False, "torch.compile needs a C++ compiler on the CPU: none of $CXX, g++, clang++, c++ found"
        )
    return Support(True)

"""The variant `megafold`: the baseline with the fused operators."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch

from baselines.af3.model import AlphaFold3
from baselines.compilation import compile_units, strict_compilation
from baselines.factors import Choice, Flag
from baselines.systems import PyTorchVariant
from baselines.workload import FixedCropWorkload, build_workload
from megafold_bench.errors import UserError
from megafold_bench.variants import Scalar, Support
from optimized.ops.attention.operator import PRECISIONS
from optimized.patch import Report, apply
from optimized.recipes import DEFAULT_OPS, OPS, PRODUCTS

ALL = "all"
COMPILE = Flag(False)
GRAPHED_TOKENS = 640
"""Up to this length an H200 waits for the host, unless the denoiser is replayed from graphs."""
WAYS = Choice(PRECISIONS, tiny=PRODUCTS, small=PRODUCTS, af3=PRODUCTS)


@dataclass(frozen=True)
class MegaFoldVariant(PyTorchVariant):
    """The step of `pytorch`, its model changed by `optimized.apply` and nothing else.

    Same weights, input, random choices, losses, precision policy, checkpointing and optimiser. The option
    ``ops`` names the operators to use, separated by commas, or ``all``; by default those of `DEFAULT_OPS`. With the option
    ``compile`` the patched blocks are compiled as `inductor` compiles them; off by default. ``products`` is how
    attention, and with the operator ``linear`` linear layers, take products of float32: see `optimized.apply`. ``graphs`` is on
    by default up to `GRAPHED_TOKENS` on a CUDA device; for longer crops, where it would hold memory and gain less, it is off.
    """

    name: str = "megafold"
    summary: str = "pytorch with fused operators (optimized.apply)"

    def support(self, device: str) -> Support:
        """A GPU that torch sees, and Triton. On the CPU the operators' definitions would be measured."""
        if device != "cuda":
            return Support(
                False,
                f"the fused operators need a CUDA or ROCm device; on {device} only their definitions run",
            )
        eager = super().support(device)
        if eager.usable and find_spec("triton") is None:
            return Support(False, "the fused operators need Triton; install it with: pip install triton")
        return eager

    def resolve(self, options: Mapping[str, Scalar], seq_len: int) -> dict[str, Scalar]:
        """The factors of `pytorch`, ``ops`` in a fixed order, ``compile`` and ``products``. Raises `UserError`."""
        own = ("ops", "compile", "products")
        rest = {name: value for name, value in options.items() if name not in own}
        if rest.get("graphs") is None:
            rest["graphs"] = _waits_for_host(seq_len)
        wish = options.get("compile")
        compiled = COMPILE.default if wish is None else COMPILE.parse("compile", wish)
        products = options.get("products")
        return {
            **super().resolve(rest, seq_len),
            "ops": _canonical(options.get("ops")),
            "compile": compiled,
            "products": PRODUCTS if products is None else WAYS.parse("products", products),
        }

    def build(self, factors: Mapping[str, Scalar], seq_len: int, seed: int, device: str) -> FixedCropWorkload:
        """As `pytorch`, patched before checkpointing.

        The fact ``fused_operators`` says what was replaced and left; its ``fallbacks`` fill up during the steps.
        """
        reports: list[Report] = []

        def patch(model: AlphaFold3) -> None:
            reports.append(apply(model, _names(factors["ops"]), str(factors["products"])))
            if factors["compile"]:
                compile_units(model.checkpoint_units())

        around = strict_compilation if factors["compile"] else nullcontext
        workload = build_workload(factors, seq_len, seed, device, prepare=patch, around_step=around)
        facts = {**workload.facts, "fused_operators": reports[0].summary()}
        return replace(workload, facts=facts)


def _waits_for_host(seq_len: int) -> bool:
    """Whether graphs pay; of ROCm, where they were not measured, nothing is assumed."""
    return seq_len <= GRAPHED_TOKENS and torch.cuda.is_available() and torch.version.hip is None


def _names(ops: Scalar) -> tuple[str, ...]:
    return OPS if ops == ALL else tuple(str(ops).split(","))


def _canonical(ops: Scalar) -> str:
    """``"all"``, or the operators asked for (`DEFAULT_OPS` if none), each once, in the order of `OPS`."""
    if ops == ALL:
        return ALL
    asked = set(DEFAULT_OPS) if ops is None else {name.strip() for name in str(ops).split(",")}
    unknown = sorted(asked - set(OPS))
    if unknown:
        raise UserError(f"ops: unknown operator {unknown[0]!r}; choose from {', '.join(OPS)}, or {ALL}")
    return ALL if asked == set(OPS) else ",".join(name for name in OPS if name in asked)


MEGAFOLD = MegaFoldVariant()

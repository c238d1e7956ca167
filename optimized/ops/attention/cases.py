"""The attention kernels as cases for offline compilation."""

from typing import Any

import torch
import triton

from optimized.ops.attention import backward, folding, forward, packing
from optimized.ops.attention.launch import FOLD_BLOCK, FOLD_PLANES, MASK_KEYS, Plan, default_plan
from optimized.ops.offline import KernelCase
from optimized.ops.tuning import Config

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
FP32 = ("LSE", "LSE2", "DLSE", "DELTA", "DBIAS", "MASK", "SUM")
FLOATS = ("scale", "unit_scale")
WIDE_INTS = ("size", "s_b", "s_h", "s_q", "s_k", "keep_b")


def signature_of(kernel: Any, dtype: str, bias_dtype: str, constants: dict[str, object]) -> dict[str, str]:
    """Triton types of the run-time arguments of one of our kernels."""
    types: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name in FLOATS:
            types[name] = "fp32"
        elif name in ("BIAS", "FLIPPED", "PACKED"):
            types[name] = f"*{bias_dtype}"
        elif name == "KEEP":
            types[name] = "*u8"
        elif name == "BITS":
            types[name] = "*i16"
        elif name == "PARTS" or name in FP32:
            types[name] = "*fp32"
        elif name.isupper() and name not in forward.LENGTHS:
            types[name] = f"*{dtype}"
        else:
            types[name] = "i64" if name in WIDE_INTS else "i32"
    return types


def make_case(
    name: str,
    kernel: Any,
    config: Config,
    dtype: str = "bf16",
    head_dim: int = 32,
    bias_dtype: str = "bf16",
    precision: str = "ieee",
    **extra: object,
) -> KernelCase:
    """One kernel with one configuration, masked, 16-byte aligned pointers."""
    known = {
        "HAS_MASK": True,
        "D": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "PRECISION": precision,
        "VECTOR": 4 if bias_dtype == "fp32" else 8,
        "TILE": packing.TILE,
        "P": packing.PACK,
        "KEYS": MASK_KEYS,
        "BLOCK": FOLD_BLOCK,
        "STRAIGHT": True,
        "TURNED": True,
        "HAS_BITS": True,
        "HAS_DLSE": True,
        "CONTINUES": True,
        "SUMS": True,
        "AHEAD": 0,
        "FAST": dtype != "fp16",
        **config.constants,
        **extra,
    }
    constants = {n: v for n, v in known.items() if n in kernel.arg_names}
    signature = signature_of(kernel, dtype, bias_dtype, constants)
    aligned = tuple(n for n, t in signature.items() if t.startswith("*"))
    return KernelCase(
        name, kernel, signature, constants, config.num_warps, config.num_stages, config.max_registers, aligned
    )


def plan_cases(plan: Plan, label: str, **options: Any) -> list[KernelCase]:
    """The kernels of one plan."""
    plain = Config()
    cases = [
        make_case(f"{label}.forward", forward.forward_kernel, plan.forward, **options),
        make_case(f"{label}.grad_kv", backward.grad_kv_kernel, plan.grad_kv, **options),
        make_case(
            f"{label}.grad_q", backward.grad_q_kernel, plan.grad_q, SUMS=plan.grad_bias is None, **options
        ),
        make_case(f"{label}.prepare", packing.prepare_kernel, plain, **options),
        make_case(f"{label}.statistics", backward.statistics_kernel, plain, **options),
    ]
    if plan.grad_bias is None:
        fold = Config(FOLD_PLANES)
        cases.append(make_case(f"{label}.fold_planes", folding.fold_planes_kernel, fold, **options))
    else:
        cases.append(make_case(f"{label}.grad_bias", backward.grad_bias_kernel, plan.grad_bias, **options))
        cases.append(make_case(f"{label}.fold", folding.fold_kernel, plain, **options))
    return cases


SHIPPED = (
    *(("bf16", width, "ieee") for width in (16, 24, 32, 48, 64)),
    ("fp16", 32, "ieee"),
    ("fp32", 32, "ieee"),
    ("fp32", 48, "ieee"),
    ("fp32", 48, "tf32x3"),
)
SINGLE_HEAD_DIM = 24
"""Of the single representation, whose attention has one row."""


def cases(arch: str) -> list[KernelCase]:
    """Every kernel with its default configuration on `arch`, for the dtypes and head sizes of the AF3 family."""
    found: list[KernelCase] = []
    for short, head_dim, precision in SHIPPED:
        if precision != "ieee" and not arch.startswith("sm_"):
            continue
        plan = default_plan(getattr(torch, DTYPES[short]), head_dim, arch, precision)
        if head_dim == SINGLE_HEAD_DIM:
            plan = plan.for_rows(1)
        label = f"attention.{short}.d{head_dim}" + ("" if precision == "ieee" else f".{precision}")
        found += plan_cases(plan, label, dtype=short, head_dim=head_dim, precision=precision)
    return found

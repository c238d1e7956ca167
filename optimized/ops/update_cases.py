"""The kernels of the conditioned operators as cases for offline compilation."""

from dataclasses import replace

import torch
import triton

from optimized.ops.adaptive_layer_norm import kernels as adaptive
from optimized.ops.adaptive_layer_norm import launch as adaptive_launch
from optimized.ops.cases import DTYPES, make_case
from optimized.ops.conditioned_transition import kernels as conditioned
from optimized.ops.conditioned_transition import launch as conditioned_launch
from optimized.ops.gated_output import kernels as gated
from optimized.ops.gated_output import launch as gated_launch
from optimized.ops.launching import has_gluon
from optimized.ops.linear import kernels as linear
from optimized.ops.linear import launch as linear_launch
from optimized.ops.offline import KernelCase
from optimized.ops.outer_product_mean import kernels as outer
from optimized.ops.outer_product_mean import launch as outer_launch
from optimized.ops.pair_weighted_averaging import kernels as averaging
from optimized.ops.pair_weighted_averaging import launch as averaging_launch

WIDTHS = (128, 384, 768)


def cases(arch: str) -> list[KernelCase]:
    """The kernels of these operators that `arch` launches, for all dtypes, at the AF3 widths."""
    found: list[KernelCase] = _linear() if arch.startswith("sm_") else []
    if arch == "sm_90" and has_gluon():
        found += _ends_on_hopper()
    for short in DTYPES:
        dtype = getattr(torch, DTYPES[short])
        for c in WIDTHS:
            for name in ("norm", "norm_backward", "modulate", "modulate_backward"):
                label, fn = f"adaptive_layer_norm.{short}.{c}.{name}", getattr(adaptive, f"{name}_kernel")
                config = adaptive_launch.default(f"adaptive_layer_norm.{name}", c, dtype)
                sizes = {"C": c, "BC": triton.next_power_of_2(c), "EXTRA": True, "RECOMPUTE": True}
                found.append(make_case(label, fn, config, short, sizes))
            for name in ("swiglu", "swiglu_backward", "gate", "gate_backward"):
                label, fn = (
                    f"conditioned_transition.{short}.{c}.{name}",
                    getattr(conditioned, f"{name}_kernel"),
                )
                width = 2 * c if name.startswith("swiglu") else c
                key = f"conditioned_transition.{name}", width
                config = conditioned_launch.default(*key, dtype)
                found.append(make_case(label, fn, config, short, {"C": c, "H": 2 * c}, key))
        found += _gated(short) + _outer(short) + _averaging(short)
    return found


def _gated(short: str) -> list[KernelCase]:
    """Gated output at the widths of pair, template and MSA updates, and its elementwise kernels."""
    found = []
    dtype = getattr(torch, DTYPES[short])
    for c, h in ((64, 64), (128, 128), (64, 256)):
        sizes = {"C": c, "H": h, "BC": c, "BH": h, "KEEP": True, "RESIDUAL": True}
        kernels = [("forward", h, gated.forward_kernel), ("backward", c, gated.backward_kernel)]
        if short != "fp32":
            kernels.append(("forward_wide", h, gated.forward_kernel))
        for kernel, held, fn in kernels:
            key = f"gated_output.{kernel}", held
            config = gated_launch.default(*key, dtype)
            case = make_case(f"gated_output.{short}.{h}x{c}.{kernel}", fn, config, short, sizes, key)
            if kernel == "forward_wide":
                wide = dict.fromkeys(("residual_ptr", "keep_ptr", "out_ptr"), "*fp32")
                case = replace(case, signature={**case.signature, **wide})
            found.append(case)
    block = gated_launch.FLAT
    found.append(make_case(f"gated_output.{short}.gate", gated.gate_kernel, block, short, {"H": 128}))
    found.append(
        make_case(f"gated_output.{short}.gate_backward", gated.gate_backward_kernel, block, short, {"H": 128})
    )
    key = "gated_output.residual", 128
    flat = gated_launch.default(*key, dtype)
    sizes = {"C": 128, "KEEP": True, "RESIDUAL": True}
    found.append(make_case(f"gated_output.{short}.residual", gated.residual_kernel, flat, short, sizes, key))
    return found


def _ends_on_hopper() -> list[KernelCase]:
    """The backward kernel in Gluon, of what triangle attention keeps and of updates by themselves."""
    from optimized.ops.gated_output import hopper

    found = []
    for of_x, of_dy, keep in (("fp16", "fp32", True), ("fp16", "fp32", False), ("bf16", "bf16", True)):
        config = gated_launch.HOPPER
        sizes = {"KEEP": keep, "num_warps": config.num_warps}
        name = f"gated_output.bf16.128x128.backward_hopper.of_{of_x}.{of_dy}{'.dropout' if keep else ''}"
        case = make_case(name, hopper.backward_kernel, config, "bf16", sizes)
        own = {"x_ptr": f"*{of_x}", "dy_ptr": f"*{of_dy}", "keep_ptr": f"*{of_dy}"}
        found.append(replace(case, signature={**case.signature, **own}))
    return found


def _outer(short: str) -> list[KernelCase]:
    """Outer product mean at 32 hidden and 128 pair channels."""
    sizes = {"C": 32, "D": 32, "Z": 128, "BZ": 128, "FRESH": False}
    kernels = {"project": outer.project_kernel, "expand": outer.expand_kernel, "weight": outer.weight_kernel}
    found = []
    for name, fn in kernels.items():
        key = f"outer_product_mean.{name}", 128
        config = outer_launch.default(*key, getattr(torch, DTYPES[short]))
        found.append(make_case(f"outer_product_mean.{short}.{name}", fn, config, short, sizes, key))
    return found


def _linear() -> list[KernelCase]:
    """The linear layer in TF32 products, on NVIDIA only."""
    key = "linear.product", linear_launch.ANY
    config = linear_launch.default(*key, torch.float32)
    found = []
    for even in (True, False):
        label = f"linear.fp32.product{'' if even else '.odd'}"
        case = make_case(label, linear.product_kernel, config, "fp32", {"BIAS": True, "EVEN": even}, key)
        # Triton assumes nothing of what it was told not to specialise on.
        aligned = (
            n for n in case.aligned if n.endswith("_ptr") or n in ("x_row", "columns", *["terms"] * even)
        )
        found.append(replace(case, aligned=tuple(aligned)))
    return found


def _averaging(short: str) -> list[KernelCase]:
    """Pair-weighted averaging with 8 heads of 8 (AlphaFold 3) and of 32 (Boltz)."""
    heads = {"EXACT": short == "fp32", "H": 8, "BH": 8, "MASKED": True}
    found = [
        make_case(f"pair_weighted_averaging.{short}.{name}", fn, averaging_launch.SOFTMAX, short, heads)
        for name, fn in (
            ("softmax", averaging.softmax_kernel),
            ("softmax_backward", averaging.softmax_backward_kernel),
        )
    ]
    kernels = (
        ("average", averaging.average_kernel, False),
        ("average", averaging.average_kernel, True),
        ("weight", averaging.weight_gradient_kernel, False),
    )
    for width in (8, 32):
        for name, fn, transposed in kernels:
            key = f"pair_weighted_averaging.{name}", width
            config = averaging_launch.default(*key, getattr(torch, DTYPES[short]))
            label = f"pair_weighted_averaging.{short}.{width}.{name}{'.transposed' if transposed else ''}"
            sizes = {"H": 8, "D": width, "TRANSPOSED": transposed}
            found.append(make_case(label, fn, config, short, sizes, key))
    return found

"""The kernels of the conditioned operators as cases for offline compilation."""

import torch

from optimized.ops.adaptive_layer_norm import kernels as adaptive
from optimized.ops.adaptive_layer_norm.launch import TILE, Blocks
from optimized.ops.cases import DTYPES, make_case
from optimized.ops.conditioned_transition import kernels as conditioned
from optimized.ops.conditioned_transition.launch import BLOCK, tile
from optimized.ops.gated_output import kernels as gated
from optimized.ops.gated_output import launch as gated_launch
from optimized.ops.offline import KernelCase
from optimized.ops.outer_product_mean import kernels as outer
from optimized.ops.outer_product_mean import launch as outer_launch
from optimized.ops.pair_weighted_averaging import kernels as averaging
from optimized.ops.pair_weighted_averaging import launch as averaging_launch
from optimized.ops.tuning import Config

WIDTHS = (128, 384, 768)


def cases() -> list[KernelCase]:
    """Every kernel of adaptive layer norm and conditioned transition, for all dtypes, at the AF3 widths."""
    found: list[KernelCase] = []
    for short in DTYPES:
        for c in WIDTHS:
            rows = {
                "norm": (adaptive.norm_kernel, Blocks.of(c)),
                "norm_backward": (adaptive.norm_backward_kernel, Blocks.of(c)),
                "modulate": (adaptive.modulate_kernel, Blocks.of(c)),
                "modulate_backward": (adaptive.modulate_backward_kernel, Blocks.of(c, TILE // 2)),
            }
            for name, (kernel, blocks) in rows.items():
                sizes = {**blocks._asdict(), "EXTRA": True, "RECOMPUTE": True}
                label = f"adaptive_layer_norm.{short}.{c}.{name}"
                found.append(make_case(label, kernel, Config({}, 4), short, sizes))
            flat = {
                "swiglu": (conditioned.swiglu_kernel, tile(2 * c)),
                "swiglu_backward": (conditioned.swiglu_backward_kernel, tile(2 * c)),
                "gate": (conditioned.gate_kernel, tile(c)),
                "gate_backward": (conditioned.gate_backward_kernel, tile(c, 2 * BLOCK)),
            }
            for name, (kernel, shape) in flat.items():
                label = f"conditioned_transition.{short}.{c}.{name}"
                found.append(make_case(label, kernel, Config({}, 4), short, {**shape, "C": c, "H": 2 * c}))
        found += _gated(short) + _outer(short) + _averaging(short)
    return found


def _gated(short: str) -> list[KernelCase]:
    """Gated output at the widths of pair, template and MSA updates, and its elementwise kernels."""
    found = []
    dtype = getattr(torch, DTYPES[short])
    for c, h in ((64, 64), (128, 128), (64, 256)):
        sizes = {"C": c, "H": h, "BC": c, "BH": h, "KEEP": True, "RESIDUAL": True}
        kernels = (("forward", h, gated.forward_kernel), ("backward", c, gated.backward_kernel))
        for kernel, held, fn in kernels:
            config = gated_launch.default(f"gated_output.{kernel}", held, dtype)
            found.append(make_case(f"gated_output.{short}.{h}x{c}.{kernel}", fn, config, short, sizes))
    block = Config({"BLOCK": gated_launch.BLOCK}, 4)
    found.append(make_case(f"gated_output.{short}.gate", gated.gate_kernel, block, short, {}))
    found.append(
        make_case(f"gated_output.{short}.gate_backward", gated.gate_backward_kernel, block, short, {})
    )
    sizes = {**tile(128), "C": 128, "KEEP": True, "RESIDUAL": True}
    found.append(
        make_case(f"gated_output.{short}.residual", gated.residual_kernel, Config({}, 4), short, sizes)
    )
    return found


def _outer(short: str) -> list[KernelCase]:
    """Outer product mean at 32 hidden and 128 pair channels."""
    sizes = {"C": 32, "D": 32, "Z": 128, "BZ": 128, "FRESH": False}
    kernels = {"project": outer.project_kernel, "expand": outer.expand_kernel, "weight": outer.weight_kernel}
    found = []
    for name, fn in kernels.items():
        config = outer_launch.default(f"outer_product_mean.{name}", 128, getattr(torch, DTYPES[short]))
        found.append(make_case(f"outer_product_mean.{short}.{name}", fn, config, short, sizes))
    return found


def _averaging(short: str) -> list[KernelCase]:
    """Pair-weighted averaging with 8 heads of 8 (AlphaFold 3) and of 32 (Boltz)."""
    heads = {"EXACT": short == "fp32", "H": 8, "BH": 8, "BJ": averaging_launch.KEYS, "MASKED": True}
    found = [
        make_case(f"pair_weighted_averaging.{short}.{name}", fn, Config({}, 4), short, heads)
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
            kernel = f"pair_weighted_averaging.{name}"
            config = averaging_launch.default(kernel, width, getattr(torch, DTYPES[short]))
            label = f"pair_weighted_averaging.{short}.{width}.{name}{'.transposed' if transposed else ''}"
            sizes = {"H": 8, "D": width, "TRANSPOSED": transposed}
            found.append(make_case(label, fn, config, short, sizes))
    return found

"""The tiles that are shipped for a device are those that whole operators launch their kernels with."""

import json

import pytest
import torch
from fused_checks import parameters

from optimized.ops import launching, outer_products, tuning
from optimized.ops.layer_norm_linear import kernels as linear_kernels
from optimized.ops.layer_norm_linear import launch as linear
from optimized.ops.layer_norm_linear import layer_norm_linear
from optimized.ops.transition import kernels as transition_kernels
from optimized.ops.transition import launch as transition_launch
from optimized.ops.transition import transition
from optimized.ops.triangle_multiplication import (
    TriangleWeights,
    folded,
    folded_output,
    gradients,
    output,
    project,
    statistics,
    triangle_multiplication,
)
from optimized.ops.triangle_multiplication import launch as triangle_launch
from optimized.ops.triangle_multiplication import layout as triangle

C = 128
PASSES = ("forward", "input_gradient", "weight_gradient")
KERNELS = (
    {getattr(transition_kernels, f"{k}_kernel"): f"transition.{k}" for k in PASSES}
    | {
        getattr(linear_kernels, f"{k}_kernel"): f"layer_norm_linear.{k}"
        for k in ("forward", "weight_gradient")
    }
    | {
        project.forward_kernel: "triangle_multiplication.project",
        project.weight_gradient_kernel: "triangle_multiplication.project_weight",
        output.forward_kernel: "triangle_multiplication.output",
        output.backward_kernel: "triangle_multiplication.output_backward",
        outer_products.products_kernel: "triangle_multiplication.output_weight",
        folded.project_kernel: "triangle_multiplication.project_folded",
        gradients.input_gradient_kernel: "triangle_multiplication.input_gradient",
        folded_output.forward_kernel: "triangle_multiplication.output_folded",
        folded_output.backward_kernel: "triangle_multiplication.output_backward_folded",
        folded_output.weight_kernel: "triangle_multiplication.output_weight_folded",
    }
)
UNMEASURED = {
    linear_kernels.input_gradient_kernel: "layer_norm_linear.input_gradient",
}
"""Launched with the tiles of the source until a device's file has them."""
RAW = {name for name in KERNELS.values() if "output" in name and name.endswith("folded")}
PLAIN = {f"triangle_multiplication.{k}" for k in ("project", "output", "output_backward", "output_weight")}
"""The same in bfloat16 on Hopper, and elsewhere."""
FIXED = (
    folded.fold_weights_kernel,
    linear_kernels.fold_weights_kernel,
    statistics.z_kernel,
    statistics.normalise_kernel,
    statistics.x_kernel,
    statistics.moments_kernel,
)
"""Launched with one configuration everywhere."""


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """What the operators launch, on a machine that says it has an H200 and nothing of its own; no kernel runs."""
    seen = {}

    def record(kernel, grid, config, arguments, **sizes):
        # The interpreter passes over names that a kernel does not have; a GPU does not.
        assert {*config.constants, *sizes} == {*kernel.arg_names[len(arguments) :]}
        if kernel not in FIXED:
            seen.setdefault((KERNELS | UNMEASURED)[kernel], []).append(config)

    monkeypatch.setenv("MEGAFOLD_BENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "device_name", lambda device: "nvidia-h200")
    for module in (transition_launch, linear, triangle, triangle_launch, outer_products):
        monkeypatch.setattr(module, "launch", record)
    launching.chosen.cache_clear()
    yield seen
    launching.chosen.cache_clear()


def both_passes(fn, shapes, dtype, of=None):
    """Both passes for an input in `of`, which is `dtype` unless autocast does the products in it."""
    leaves = [t.requires_grad_() for t in (torch.randn(5, 5, C).to(of or dtype), *parameters(shapes, dtype))]
    with torch.autocast("cpu", dtype, enabled=of is not None):
        found = fn(*leaves)
    outs = list(found) if isinstance(found, (list, tuple)) else [found]
    torch.autograd.grad(outs, leaves, [torch.ones_like(y) for y in outs])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_operators_launch_the_shipped_tiles(launched, dtype):
    square = (C, C)
    both_passes(transition, [(C,), (C,), (4 * C, C), (4 * C, C), (C, 4 * C)], dtype)
    triangle_shapes = [(C,), (C,), *[square] * 4, (C,), (C,), square, square]
    for of in (None, torch.float32):
        both_passes(
            lambda z, *w: triangle_multiplication(z, TriangleWeights(*w), True, None),
            triangle_shapes,
            dtype,
            of,
        )
    both_passes(
        lambda x, *p: layer_norm_linear(x, p[0], p[1], list(p[2:])), [(C,), (C,), *[square] * 4], dtype
    )
    shipped = json.loads((tuning.SHIPPED / "nvidia-h200.json").read_text())
    unmeasured = {*UNMEASURED.values()}
    left_out = PLAIN if dtype == torch.bfloat16 else RAW
    assert set(launched) == {*KERNELS.values()} - left_out | unmeasured
    for kernel, configs in launched.items():
        if kernel in unmeasured:
            source = linear if kernel.startswith("layer_norm_linear") else triangle
            assert all(config == source.default(kernel, C, dtype) for config in configs), kernel
            continue
        entry = shipped[f"{kernel}/{str(dtype).removeprefix('torch.')}/{C}"]
        assert all(config == tuning.Config.from_json(entry) for config in configs), kernel

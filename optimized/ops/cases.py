"""The fused operators' kernels as cases for offline compilation."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import triton

from optimized.ops import outer_products, parameters
from optimized.ops.launching import has_gluon
from optimized.ops.layer_norm_linear import kernels as linear_kernels
from optimized.ops.layer_norm_linear import launch as linear
from optimized.ops.offline import KernelCase
from optimized.ops.transition import kernels as transition_kernels
from optimized.ops.transition import launch as transition
from optimized.ops.triangle_multiplication import (
    folded,
    folded_output,
    gradients,
    output,
    project,
    statistics,
)
from optimized.ops.triangle_multiplication import layout as triangle
from optimized.ops.tuning import Config

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
TRIANGLE = {
    "project": project.forward_kernel,
    "project_input": project.input_gradient_kernel,
    "project_weight": project.weight_gradient_kernel,
    "output": output.forward_kernel,
    "output_backward": output.backward_kernel,
    "output_weight": outer_products.products_kernel,
    "project_folded": folded.project_kernel,
    "input_gradient": gradients.input_gradient_kernel,
    "output_folded": folded_output.forward_kernel,
    "output_backward_folded": folded_output.backward_kernel,
    "output_weight_folded": folded_output.weight_kernel,
}
HALF_ONLY = ("project_folded", "input_gradient")
FULL_ONLY = ("project_input",)
BF16_ON_HOPPER = ("output_folded", "output_backward_folded", "output_weight_folded")
"""As `layout.folds_output` says."""


def make_case(
    name: str,
    kernel: Any,
    config: Config,
    dtype: str,
    sizes: Mapping[str, object],
    looked_up: tuple[str, int] | None = None,
) -> KernelCase:
    """One kernel with one configuration: fp32 norm parameters, lengths and strides divisible by 16.

    `looked_up`: kernel and channels in the key of its configuration, where the name does not tell them.
    """
    known = {**sizes, **config.constants}
    constants = {n: v for n, v in known.items() if n in kernel.arg_names}
    signature: dict[str, str] = {}
    for argument in (n for n in kernel.arg_names if n not in constants):
        if argument == "mask_ptr":
            signature[argument] = "*i1"
        elif (
            argument.startswith(("gamma", "beta", "lse", "dw_ptr", "stats", "rstd")) or "partial" in argument
        ):
            signature[argument] = "*fp32"
        elif argument.endswith("_ptr"):
            signature[argument] = f"*{dtype}"
        else:
            signature[argument] = "fp32" if argument == "eps" else "i32"
    aligned = tuple(n for n, t in signature.items() if t != "fp32")
    return KernelCase(
        name,
        kernel,
        signature,
        constants,
        config.num_warps,
        config.num_stages,
        config.max_registers,
        aligned,
        f"{looked_up[0]}/{DTYPES[dtype]}/{looked_up[1]}" if looked_up else "",
    )


def of_x(case: KernelCase, dtype: str) -> KernelCase:
    """The same of x, and of gradients to x, in another dtype."""
    own = {n: f"*{dtype}" for n in ("x_ptr", "dx_ptr", "more_ptr") if n in case.signature}
    return replace(case, signature={**case.signature, **own})


def hopper_cases() -> list[KernelCase]:
    """The kernels in Gluon, for whole tiles and for others."""
    from optimized.ops.layer_norm_linear import hopper as linear_hopper
    from optimized.ops.layer_norm_linear import hopper_gradient as linear_gradient
    from optimized.ops.transition import hopper as transition_hopper
    from optimized.ops.transition import hopper_gradient as transition_gradient
    from optimized.ops.transition import hopper_ring as transition_ring
    from optimized.ops.triangle_multiplication import hopper_gradient, hopper_output, hopper_project

    found: list[KernelCase] = []
    gradient = (hopper_gradient.input_gradient_kernel, triangle.GRADIENT_HOPPER)
    project = (hopper_project.project_kernel, triangle.PROJECT_HOPPER)
    bare = {"MASKED": True, "NORMAL": False, "MORE": True}
    floats = bare | {"NORMAL": True}
    for fn, config, short, form in (
        (*project, "project_hopper", {"MASKED": True, "GIVEN": False}),
        (*project, "given.project_hopper", {"MASKED": False, "GIVEN": True}),
        (hopper_output.output_kernel, triangle.OUTPUT_HOPPER, "output_hopper", {}),
        (*gradient, "input_gradient_hopper", bare),
        (*gradient, "normal.input_gradient_hopper", floats),
    ):
        for even in (False, True):
            sizes: dict[str, int] = {"EVEN": even, **form, "num_warps": config.num_warps}
            name = f"triangle_multiplication.bf16.128.{short}{'.even' if even else ''}"
            case = make_case(name, fn, config, "bf16", sizes)
            of_floats = dict.fromkeys(("dz_ptr", "more_ptr"), "*fp32") if form is floats else {}
            found.append(replace(case, signature={**case.signature, **of_floats}))
    for x in ("bf16", "fp32"):
        sizes = {"HEADS": 4, "T": 4, "num_warps": linear.HOPPER.num_warps}
        name = f"layer_norm_linear.bf16.128.forward_hopper.of_{x}"
        case = make_case(name, linear_hopper.forward_kernel, linear.HOPPER, "bf16", sizes)
        found.append(of_x(case, x))
        for heads, more in ((4, False), (0, True)):
            sizes = {"HEADS": heads, "MORE": more, "num_warps": linear.HOPPER.num_warps}
            name = f"layer_norm_linear.bf16.128.input_gradient_hopper.of_{x}{'.added' if more else ''}"
            kernel = linear_gradient.input_gradient_kernel
            found.append(of_x(make_case(name, kernel, linear.HOPPER, "bf16", sizes), x))
        for hidden, added in ((256, False), (512, False), (512, True)):
            config = transition.HOPPER
            sizes = {"CHUNKS": hidden // transition.HOPPER_UNITS, "num_warps": config.num_warps}
            sizes |= {"ADDED": added, "MORE": added}
            for short, kernel in (
                ("forward_hopper", transition_hopper.forward_kernel),
                ("input_gradient_hopper", transition_gradient.input_gradient_kernel),
            ):
                name = f"transition.bf16.128x{hidden}.{short}.of_{x}{'.added' if added else ''}"
                case = of_x(make_case(name, kernel, config, "bf16", sizes), x)
                sums = {"out_ptr": f"*{x}"} if added and short == "forward_hopper" else {}
                found.append(replace(case, signature={**case.signature, **sums}))
    sizes = {"H": 512, "num_warps": transition.ARRANGE.num_warps}
    name = "transition.bf16.128x512.arrange"
    case = make_case(name, transition_ring.arrange_kernel, transition.ARRANGE, "bf16", sizes)
    found.append(
        replace(case, signature={**case.signature, **dict.fromkeys(("a_ptr", "b_ptr", "w_ptr"), "*fp32")})
    )
    return found


def cases(arch: str) -> list[KernelCase]:
    """The kernels of the fused operators that `arch` launches with their default configurations, at the AF3 widths."""
    import torch

    found = hopper_cases() if arch == "sm_90" and has_gluon() else []
    for kernel, config in (
        (parameters.pack_kernel, parameters.PACK),
        (parameters.fold_kernel, parameters.FOLD),
    ):
        found.append(make_case(f"parameters.bf16.{kernel.__name__}", kernel, config, "bf16", {}))
    sizes = {"C": 128, "H": 128, "BLOCK": 128, "FAST": False}
    name = "parameters.bf16.fold_weights"
    found.append(make_case(name, folded.fold_weights_kernel, triangle.FOLD_WEIGHTS, "bf16", sizes))
    sizes = {"C": 128, "BC": 128, "H": 128, "MASKED": True}
    for short in ("bf16", "fp16"):
        name = f"triangle_multiplication.{short}.z_statistics"
        found.append(make_case(name, statistics.z_kernel, triangle.Z_STATISTICS, short, sizes))
    if arch == "sm_90":
        for name, fn, config in (
            ("normalise", statistics.normalise_kernel, triangle.NORMALISE),
            ("x_statistics", statistics.x_kernel, triangle.X_STATISTICS),
            ("moments", statistics.moments_kernel, triangle.MOMENTS),
        ):
            found.append(make_case(f"triangle_multiplication.bf16.{name}", fn, config, "bf16", sizes))
    name, sizes = "parameters.bf16.fold_linear_weights", {"C": 128, "BC": 128}
    found.append(make_case(name, linear_kernels.fold_weights_kernel, linear.FOLD, "bf16", sizes))
    for short, full in DTYPES.items():
        dtype = getattr(torch, full)
        for c, h in ((64, 128), (64, 256), (128, 512), (384, 1536)):
            if short == "fp32":  # products of the library
                continue
            sizes = {"C": c, "H": h, "BC": triton.next_power_of_2(c), "FAST": False}
            sizes |= {"JOINT": False, "TURNED": False, "ADDED": True, "MORE": True}  # those that hold more
            for kernel in ("forward", "input_gradient", "weight_gradient"):
                config = transition.default(f"transition.{kernel}", c, dtype)
                fn = getattr(transition_kernels, f"{kernel}_kernel")
                found.append(make_case(f"transition.{short}.{c}x{h}.{kernel}", fn, config, short, sizes))
        for c in (64, 128):
            sizes = {"C": c, "H": c, "BC": c, "BH": c, "MASKED": True, "TURNED": False, "FAST": False}
            folds = short == "bf16" and arch == "sm_90"
            sizes |= {"G": c, "N0": c, "N1": c, "EVEN": False, "KEPT": folds, "NORMAL": False, "MORE": True}
            for kernel, fn in TRIANGLE.items():
                if kernel in (HALF_ONLY if short == "fp32" else FULL_ONLY):
                    continue
                if kernel in BF16_ON_HOPPER and not folds:
                    continue
                config = triangle.default(f"triangle_multiplication.{kernel}", c, dtype)
                found.append(
                    make_case(f"triangle_multiplication.{short}.{c}.{kernel}", fn, config, short, sizes)
                )
            if folds:
                key = "triangle_multiplication.input_gradient"
                config = triangle.default(key, c, dtype)
                name = f"triangle_multiplication.{short}.{c}.normal.input_gradient"
                fn = gradients.input_gradient_kernel
                case = make_case(name, fn, config, short, {**sizes, "NORMAL": True, "MORE": False}, (key, c))
                found.append(replace(case, signature={**case.signature, "dz_ptr": "*fp32"}))
            sizes = {"C": c, "H": c, "HEADS": 4, "T": 4, "BC": c, "BS": 16, "SHORT": False, "MORE": True}
            sizes |= {"stride_column": 1}  # which a launch makes a constant
            for kernel in ("forward", "input_gradient", "weight_gradient"):
                config = linear.default(f"layer_norm_linear.{kernel}", c, dtype)
                fn = getattr(linear_kernels, f"{kernel}_kernel")
                found.append(make_case(f"layer_norm_linear.{short}.{c}.{kernel}", fn, config, short, sizes))
            del sizes["stride_column"]
            alone = {**sizes, "H": 0, "T": 0, "HEADS": 16, "MORE": False}  # the bias of token attention
            one = {**sizes, "H": 16, "T": 1, "stride_row": 1}
            if short == "fp32":
                name, config = f"layer_norm_linear.{short}.{c}.bias.forward", linear.narrow_config(c)
                found.append(make_case(name, linear_kernels.narrow_kernel, config, short, alone))
            for kernel, fn, sizes in (
                *([] if short == "fp32" else [("forward", linear_kernels.forward_kernel, alone)]),
                ("bias_gradient", linear_kernels.input_gradient_kernel, alone),
                ("weight_gradient", linear_kernels.weight_gradient_kernel, one),
            ):
                key = f"layer_norm_linear.{kernel}"
                config = linear.default(key, c, dtype)
                if kernel == "weight_gradient":
                    config = linear.narrowed(config, 16)
                found.append(
                    make_case(
                        f"layer_norm_linear.{short}.{c}.bias.{kernel}", fn, config, short, sizes, (key, c)
                    )
                )
    return found

"""Launches of triangle multiplication's kernels for Hopper: see `hopper`.

They are imported where they are launched, since Triton without Gluon cannot import them.
"""

import torch
from torch import Tensor

from optimized.ops.launcher import launch
from optimized.ops.launching import one_each
from optimized.ops.triangle_multiplication.layout import (
    GRADIENT_HOPPER,
    HOPPER_TILE,
    OUTPUT_HOPPER,
    PROJECT_HOPPER,
    Folded,
    Shape,
)
from optimized.ops.tuning import Config


def _even(z: Tensor, shape: Shape) -> bool:
    """Whether positions of the padded square are rows of z one after another."""
    return shape.tokens == shape.padded and z.is_contiguous()


def project(
    z: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    w: Folded,
    shape: Shape,
    eps: float,
    given: bool = False,
) -> Tensor:
    """As `launch.project_folded`; the statistics `[3, P, P]` of z are put into `stats`, or `given` there with the mask's effect."""
    from optimized.ops.triangle_multiplication import hopper_project

    programs, group = one_each(shape.padded**2 // HOPPER_TILE, z.device)
    ab = torch.empty((2 * shape.hidden, shape.padded, shape.padded), dtype=z.dtype, device=z.device)
    arguments = (z, z if mask is None else mask, stats, *w, ab, *shape.place(z), group, eps)
    sizes = {"EVEN": _even(z, shape), "MASKED": mask is not None, "GIVEN": given}
    launch(hopper_project.project_kernel, (programs, 1, 1), PROJECT_HOPPER, arguments, **sizes)
    return ab


def output(
    x: Tensor,
    z: Tensor,
    stats: Tensor,
    w: Folded,
    shape: Shape,
    eps: float,
    config: Config = OUTPUT_HOPPER,
) -> Tensor:
    """As `launch.output_folded`; of the statistics `[5, P, P]` those of x are put there."""
    from optimized.ops.triangle_multiplication import hopper_output

    programs, group = one_each(shape.padded**2 // HOPPER_TILE, z.device)
    y = torch.empty((shape.tokens, shape.tokens, shape.channels), dtype=x.dtype, device=x.device)
    arguments = (x, z, stats, *w, y, *shape.place(z), group, eps)
    launch(hopper_output.output_kernel, (programs, 1, 1), config, arguments, EVEN=_even(z, shape))
    return y


def input_gradient(
    z: Tensor,
    norm: tuple[Tensor, Tensor],
    w: Tensor,
    mask: Tensor | None,
    grad: Tensor,
    d_gate: Tensor,
    n: Tensor,
    shape: Shape,
    stats: Tensor,
    rstd: Tensor | None = None,
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `launch.gate_gradient` and then `launch.input_gradient` with statistics."""
    from optimized.ops.triangle_multiplication import hopper_gradient

    programs, group = one_each(shape.padded**2 // HOPPER_TILE, z.device)
    shares = torch.empty((2 * programs, 2 * shape.channels), dtype=torch.float32, device=z.device)
    square = (shape.tokens, shape.tokens, shape.channels)
    dz = torch.empty(square, dtype=z.dtype if rstd is None else torch.float32, device=z.device)
    pointers = (z if mask is None else mask, grad, d_gate, dz, n, shares, dz if more is None else more)
    arguments = (z, stats, shares if rstd is None else rstd, *norm, w, *pointers, *shape.place(z), group)
    sizes = {
        "MASKED": mask is not None,
        "EVEN": _even(z, shape),
        "NORMAL": rstd is not None,
        "MORE": more is not None,
    }
    launch(hopper_gradient.input_gradient_kernel, (programs, 1, 1), GRADIENT_HOPPER, arguments, **sizes)
    return dz, shares

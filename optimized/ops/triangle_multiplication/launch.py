"""Launches of the triangle multiplication kernels: grids, workspaces, the contraction and the passes."""

from typing import NamedTuple

import torch
from torch import Tensor

from optimized.ops.launcher import launch
from optimized.ops.launching import (
    ceil_div,
    processors,
    spread,
)
from optimized.ops.outer_products import products
from optimized.ops.parameters import fold, gradient_dtype
from optimized.ops.triangle_multiplication import (
    folded,
    folded_output,
    gradients,
    hopper_launch,
    output,
    project,
    statistics,
)
from optimized.ops.triangle_multiplication.layout import (
    MOMENTS,
    NORMALISE,
    X_STATISTICS,
    Z_STATISTICS,
    Folded,
    Shape,
    config_of,
    fold_weights,
    folds,
    folds_output,
    normalises,
    overlaps,
    pack_weights,
)
from optimized.ops.triangle_multiplication.reference import TriangleWeights
from optimized.ops.tuning import Config


def z_statistics(
    z: Tensor,
    mask: Tensor | None,
    shape: Shape,
    eps: float,
    stats: Tensor,
    moments: Tensor,
    config: Config = Z_STATISTICS,
) -> None:
    """rstd, -mean·rstd and rstd where `mask` keeps them of the rows of z, put into `stats [3, P, P]`, and their `moments
    [4, P, P]`."""
    grid = (ceil_div(shape.padded, config.constants["BLOCK"]), shape.padded, 1)
    arguments = (z, mask if mask is not None else z, stats, moments, *shape.place(z), eps)
    launch(statistics.z_kernel, grid, config, arguments, C=shape.channels, MASKED=mask is not None)


def normalise(
    z: Tensor, mask: Tensor | None, shape: Shape, eps: float, stats: Tensor, moments: Tensor
) -> tuple[Tensor, Tensor]:
    """x̂ of z `[N, N, c]` in the dtype of the moments and rstd `[P, P]`; the statistics `[3, P, P]` of x̂ and its moments
    `[4, P, P]` are put into `stats` and `moments`."""
    dtype, sizes = moments.dtype, shape.inner(stats)
    normal = torch.empty((shape.tokens, shape.tokens, shape.channels), dtype=dtype, device=z.device)
    rstd = torch.empty((shape.padded, shape.padded), dtype=torch.float32, device=z.device)
    grid = (ceil_div(shape.padded, NORMALISE.constants["BLOCK"]), shape.padded, 1)
    arguments = (z, mask if mask is not None else z, normal, stats, moments, rstd, *shape.place(z), eps)
    sizes = {"C": sizes["C"], "BC": sizes["BC"], "MASKED": mask is not None}
    launch(statistics.normalise_kernel, grid, NORMALISE, arguments, **sizes)
    return normal, rstd


def x_statistics(
    x: Tensor, shape: Shape, eps: float, stats: Tensor, moments: Tensor, config: Config = X_STATISTICS
) -> None:
    """rstd and -mean·rstd of the columns of the contraction, put into `stats [2, P, P]`, and their `moments [4, P, P]`."""
    grid = (ceil_div(shape.padded, config.constants["BLOCK"]), shape.padded, 1)
    arguments = (x, stats, moments, shape.tokens, shape.padded, eps)
    launch(statistics.x_kernel, grid, config, arguments, H=shape.hidden)


def project_folded(
    z: Tensor,
    rstd: Tensor,
    moments: Tensor,
    w: Folded,
    shape: Shape,
    config: Config | None = None,
) -> Tensor:
    """As `project_forward`, from raw rows, their rstd `[P, P]`, zero where masked, their moments `[4, P, P]` and folded
    weights."""
    config = config or config_of("project_folded", shape, w.weights)
    rows, width = config.constants["BM"], config.constants["BN"]
    columns = ceil_div(2 * shape.hidden, width)
    programs, group = spread(ceil_div(shape.padded**2, rows), config, shape.channels, w.weights, columns)
    ab = torch.empty((2 * shape.hidden, shape.padded, shape.padded), dtype=z.dtype, device=z.device)
    arguments = (z, rstd, moments, *w, ab, *shape.place(z), group)
    sizes = shape.inner(w.weights) | {"EVEN": shape.tokens % rows == 0}
    launch(folded.project_kernel, (programs, columns, 1), config, arguments, **sizes)
    return ab


def project_forward(
    z: Tensor,
    norm: tuple[Tensor, Tensor],
    w: Tensor,
    mask: Tensor | None,
    shape: Shape,
    eps: float,
    config: Config | None = None,
) -> Tensor:
    """a and b, `[2h, P, P]`, from z `[N, N, c]` (any strides over i and j) and the packed weights."""
    config = config or config_of("project", shape, w)
    programs, group = spread(ceil_div(shape.padded**2, config.constants["BM"]), config, shape.channels, w)
    ab = torch.empty((2 * shape.hidden, shape.padded, shape.padded), dtype=w.dtype, device=z.device)
    arguments = (z, *norm, w, mask if mask is not None else z, ab, *shape.place(z), group, eps)
    sizes = shape.inner(w) | {"MASKED": mask is not None}
    launch(project.forward_kernel, (programs, 2, 1), config, arguments, **sizes)
    return ab


def contract(ab: Tensor, outgoing: bool) -> Tensor:
    """Σ_k a_ik b_jk (outgoing) or Σ_k a_ki b_kj, channel by channel: `[h, P, P]`."""
    a, b = ab.chunk(2)
    return torch.bmm(a, b.transpose(1, 2)) if outgoing else torch.bmm(a.transpose(1, 2), b)


def contract_backward(dx: Tensor, ab: Tensor, outgoing: bool) -> Tensor:
    """Gradients of a and b, `[2h, P, P]`."""
    a, b = ab.chunk(2)
    grad = torch.empty_like(ab)
    da, db = grad.chunk(2)
    if outgoing:
        torch.bmm(dx, b, out=da)
        torch.bmm(dx.transpose(1, 2), a, out=db)
    else:
        torch.bmm(b, dx.transpose(1, 2), out=da)
        torch.bmm(a, dx, out=db)
    return grad


def output_forward(
    x: Tensor,
    z: Tensor,
    norms: tuple[Tensor, ...],
    w: Tensor,
    shape: Shape,
    eps: float,
    config: Config | None = None,
) -> Tensor:
    """y `[N, N, c]`. `norms` is γ, β of the output norm and of the input norm; `w` is all the packed weights."""
    config = config or config_of("output", shape, x)
    programs, group = spread(
        ceil_div(shape.tokens * shape.padded, config.constants["BM"]), config, shape.channels, w
    )
    y = torch.empty((shape.tokens, shape.tokens, shape.channels), dtype=x.dtype, device=x.device)
    arguments = (x, z, *norms, w, y, *shape.place(z), group, eps)
    launch(output.forward_kernel, (programs, 1, 1), config, arguments, **shape.blocks(w))
    return y


def output_folded(
    x: Tensor,
    z: Tensor,
    stats: Tensor,
    moments: Tensor,
    w: Folded,
    shape: Shape,
    config: Config | None = None,
) -> Tensor:
    """As `output_forward`, from raw rows, their statistics `[5, P, P]` and moments `[8, P, P]`, and folded weights."""
    config = config or config_of("output_folded", shape, x)
    rows, width = config.constants["BM"], config.constants["BN"]
    columns = ceil_div(shape.channels, width)
    programs, group = spread(
        ceil_div(shape.tokens * shape.padded, rows), config, shape.channels, w.weights, columns
    )
    y = torch.empty((shape.tokens, shape.tokens, shape.channels), dtype=x.dtype, device=x.device)
    arguments = (x, z, stats, moments, *w, y, *shape.place(z), group)
    sizes = shape.blocks(w.weights) | {"EVEN": shape.tokens % rows == 0}
    launch(folded_output.forward_kernel, (programs, columns, 1), config, arguments, **sizes)
    return y


class OutputGradients(NamedTuple):
    """What the backward pass of the output side leaves."""

    dx: Tensor
    """`[h, P, P]`, padding zero."""
    dn: Tensor
    """The gate's gradient to LN(z), in z's dtype, `[N, N, c]`."""
    shares: Tensor
    """Partial sums of the output norm's gradients `[programs, 2h]`."""
    pairs: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
    """d_linear and LN(x), d_gate and LN(z): the weight gradients are their products."""


def output_backward(
    x: Tensor,
    z: Tensor,
    norms: tuple[Tensor, ...],
    w: Tensor,
    dy: Tensor,
    shape: Shape,
    eps: float,
    config: Config | None = None,
) -> OutputGradients:
    """Gradients of the output side except those of its weights."""
    config = config or config_of("output_backward", shape, x)
    programs, group = spread(ceil_div(shape.padded**2, config.constants["BM"]), config, shape.channels, w)
    rows, c, h = shape.tokens**2, shape.channels, shape.hidden
    dx = torch.empty_like(x)
    dn = torch.empty((shape.tokens, shape.tokens, c), dtype=z.dtype, device=x.device)
    nx, nz, d_linear, d_gate = (
        torch.empty((rows, width), dtype=x.dtype, device=x.device) for width in (h, c, c, c)
    )
    shares = torch.empty((programs, 2 * h), dtype=torch.float32, device=x.device)
    outs = (dx, dn, nx, nz, d_linear, d_gate, shares)
    arguments = (x, z, *norms, w, dy, *outs, *shape.place(z), group, eps)
    launch(output.backward_kernel, (programs, 1, 1), config, arguments, **shape.blocks(w))
    return OutputGradients(dx, dn, shares, ((d_linear, nx), (d_gate, nz)))


def output_weight_gradient(
    pairs: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], shape: Shape, config: Config | None = None
) -> Tensor:
    """Partial gradients of out and g, `[splits, c·h + c·c]` in fp32."""
    return products(pairs, config or config_of("output_weight", shape, pairs[0][0]))


def output_backward_folded(
    x: Tensor,
    z: Tensor,
    stats: Tensor,
    moments: Tensor,
    w: Folded,
    dy: Tensor,
    shape: Shape,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx `[h, P, P]`, and rstd · d of output projection and gate, `[c, P, P]` each: see `folded_output`."""
    config = config or config_of("output_backward_folded", shape, x)
    rows = config.constants["BM"]
    programs, group = spread(ceil_div(shape.padded**2, rows), config, shape.channels, w.weights)
    square = (shape.channels, shape.padded, shape.padded)
    dx = torch.empty_like(x)
    d_linear, d_gate = (torch.empty(square, dtype=x.dtype, device=x.device) for _ in range(2))
    arguments = (x, z, stats, moments, *w, dy, dx, d_linear, d_gate, *shape.place(z), group)
    sizes = shape.blocks(w.weights) | {"EVEN": shape.tokens % rows == 0}
    launch(folded_output.backward_kernel, (programs, 1, 1), config, arguments, **sizes)
    return dx, d_linear, d_gate


def moments_of(stats: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """What products with the statistics `[5, P, P]` of x and z multiply, `[8, P, P]`."""
    moments = torch.empty((2 * statistics.MOMENTS, *stats.shape[1:]), dtype=dtype, device=stats.device)
    grid = (ceil_div(shape.padded**2, MOMENTS.constants["BLOCK"]), 2, 1)
    launch(statistics.moments_kernel, grid, MOMENTS, (stats, moments, shape.padded))
    return moments


def output_weight_folded(
    d_linear: Tensor,
    d_gate: Tensor,
    x: Tensor,
    z: Tensor,
    moments: Tensor,
    norms: tuple[Tensor, ...],
    w: Tensor,
    shape: Shape,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Partial gradients of out and g, `[splits, c·h + c·c]`, and of the output norm, `[splits · chunks, 2h]`, in fp32."""
    config = config or config_of("output_weight_folded", shape, x)
    rows = config.constants["BM"]
    c, h = shape.channels, shape.hidden
    chunks = ceil_div(c, config.constants["BN"])
    splits = max(1, min(processors(x.device) // chunks, ceil_div(shape.padded**2, rows)))
    partial = torch.empty((splits, c * h + c * c), dtype=torch.float32, device=x.device)
    shares = torch.empty((splits * chunks, 2 * h), dtype=torch.float32, device=x.device)
    arguments = (d_linear, d_gate, x, z, moments, *norms, w, partial, shares, *shape.place(z), splits)
    sizes = shape.blocks(w) | {"EVEN": shape.tokens % rows == 0}
    del sizes["FAST"]
    launch(folded_output.weight_kernel, (2 * chunks, splits, 1), config, arguments, **sizes)
    return partial, shares


def gate_gradient(d_gate: Tensor, w: Tensor, shape: Shape) -> Tensor:
    """rstd · dn, the gate's gradient to LN(z), `[P·P, c]` from d_gate of `output_backward_folded`; by the library."""
    c = shape.channels
    return torch.mm(d_gate.view(c, -1).t(), w[5 * c * shape.hidden :].view(c, c))


def input_gradient(
    z: Tensor,
    norm: tuple[Tensor, Tensor],
    w: Tensor,
    mask: Tensor | None,
    grad: Tensor,
    dn: Tensor,
    n: Tensor,
    shape: Shape,
    eps: float,
    config: Config | None = None,
    stats: Tensor | None = None,
    rstd: Tensor | None = None,
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `project_input_gradient`. With statistics, `dn` is that of `gate_gradient`; with rstd, z is what `normalise` made."""
    config = config or config_of("input_gradient", shape, w)
    rows = config.constants["BM"]
    programs, group = spread(ceil_div(shape.padded**2, rows), config, shape.channels, w)
    shares = torch.empty((programs, 2 * shape.channels), dtype=torch.float32, device=z.device)
    square = (shape.tokens, shape.tokens, shape.channels)
    if rstd is not None:
        dz = torch.empty(square, dtype=torch.float32, device=z.device)
    elif stats is not None and shape.tokens != shape.padded:
        dz = torch.empty(square, dtype=z.dtype, device=z.device)
    else:
        dz = dn.view(square)
    pointers = (mask if mask is not None else z, grad, dn, dz, n, shares, dz if more is None else more)
    taken = (stats if stats is not None else shares, rstd if rstd is not None else shares)
    arguments = (z, *taken, *norm, w, *pointers, *shape.place(z), group, eps)
    sizes = shape.inner(w) | {
        "MASKED": mask is not None,
        "EVEN": shape.tokens % rows == 0,
        "KEPT": stats is not None,
        "NORMAL": rstd is not None,
        "MORE": more is not None,
    }
    launch(gradients.input_gradient_kernel, (programs, 1, 1), config, arguments, **sizes)
    return dz, shares


def project_input_gradient(
    z: Tensor,
    norm: tuple[Tensor, Tensor],
    w: Tensor,
    mask: Tensor | None,
    grad: Tensor,
    dn: Tensor,
    n: Tensor,
    shape: Shape,
    eps: float,
    config: Config | None = None,
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dz, written over `dn`, and shares of the input norm's gradients; LN(z) / 2, masked, goes to `n` `[P·P, c]`.

    `more`: another gradient of z `[N, N, c]`, contiguous, which is added to dz.
    """
    config = config or config_of("project_input", shape, w)
    programs, group = spread(ceil_div(shape.padded**2, config.constants["BM"]), config, shape.channels, w)
    shares = torch.empty((programs, 2 * shape.channels), dtype=torch.float32, device=z.device)
    pointers = (mask if mask is not None else z, grad, dn, dn, n, shares, dn if more is None else more)
    arguments = (z, *norm, w, *pointers, *shape.place(z), group, eps)
    sizes = shape.inner(w) | {"MASKED": mask is not None, "MORE": more is not None}
    launch(project.input_gradient_kernel, (programs, 1, 1), config, arguments, **sizes)
    return dn, shares


def project_weight_gradient(
    n: Tensor, grad: Tensor, w: Tensor, shape: Shape, config: Config | None = None
) -> Tensor:
    """Partial gradients of the four input projections, `[splits, 4h·c]` in fp32, from n = LN(z) / 2."""
    config = config or config_of("project_weight", shape, w)
    area = shape.padded**2
    chunks = ceil_div(2 * shape.hidden, config.constants["BN"])
    steps = ceil_div(area, config.constants["BM"])
    splits = max(1, min(2 * processors(n.device) // chunks, steps))
    size = 4 * shape.hidden * shape.channels
    partial = torch.empty((splits, size), dtype=torch.float32, device=n.device)
    turned = {} if "TURNED" in config.constants else {"TURNED": False}
    arguments = (n, grad, w, partial, area, splits)
    sizes = shape.inner(w) | turned
    launch(project.weight_gradient_kernel, (chunks, splits, 1), config, arguments, **sizes)
    return partial


def packed_weights(w: TriangleWeights, z: Tensor, dtype: torch.dtype) -> tuple[Folded | None, Tensor]:
    """The folded weights, where they can be used, and the packed ones."""
    folded_too = folds(z, dtype) or normalises(z, w.a_p.shape[0], dtype)
    return fold_weights(w, dtype) if folded_too else (None, pack_weights(w, dtype))


def project_in(
    z: Tensor,
    norm: tuple[Tensor, Tensor],
    weights: tuple[Folded | None, Tensor],
    mask: Tensor | None,
    shape: Shape,
    eps: float,
) -> Tensor:
    """a and b, `[2h, P, P]`, by the kernel that `packed_weights` chose, where nobody has statistics of z."""
    of_folded, packed = weights
    if of_folded is None:
        return project_forward(z, norm, packed, mask, shape, eps)
    stats = torch.empty((3, shape.padded, shape.padded), dtype=torch.float32, device=z.device)
    moments = empty_moments(z, shape, of_folded, 1)
    z_statistics(z, mask, shape, eps, stats, moments)
    return project_folded(z, stats[2], moments, of_folded, shape)


def empty_moments(z: Tensor, shape: Shape, w: Folded, tensors: int) -> Tensor:
    """Room for the moments of z, or of x and then z, `[4 · tensors, P, P]`."""
    square = (tensors * statistics.MOMENTS, shape.padded, shape.padded)
    return torch.empty(square, dtype=w.weights.dtype, device=z.device)


def forward(
    z: Tensor, w: TriangleWeights, mask: Tensor | None, outgoing: bool, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y `[N, N, c]`; the contraction `[h, P, P]` and statistics, which are kept for the backward pass."""
    shape = Shape.of(z, w.a_p.shape[0])
    norm_in = (w.norm_in_weight, w.norm_in_bias)
    weights = packed_weights(w, z, dtype)
    keep = folds_output(z, shape.hidden, dtype)
    stats = torch.empty(shape.statistics(keep), dtype=torch.float32, device=z.device)
    if keep and weights[0] is not None:
        return *_forward_raw(z, weights[0], mask, outgoing, eps, shape, stats), stats
    x = contract(project_in(z, norm_in, weights, mask, shape, eps), outgoing)
    norms = (w.norm_out_weight, w.norm_out_bias, *norm_in)
    return output_forward(x, z, norms, weights[1], shape, eps), x, stats


def _forward_raw(
    z: Tensor, w: Folded, mask: Tensor | None, outgoing: bool, eps: float, shape: Shape, stats: Tensor
) -> tuple[Tensor, Tensor]:
    """y and the contraction by the kernels that take raw rows and folded weights; the statistics are put into `stats [5, P, P]`."""
    raw, early = z.dtype == w.weights.dtype, overlaps(z, shape.hidden, w.weights.dtype)
    if raw and early:
        x = contract(hopper_launch.project(z, mask, stats[2:], w, shape, eps), outgoing)
        return hopper_launch.output(x, z, stats, w, shape, eps), x
    moments = empty_moments(z, shape, w, 2)
    of_x, of_z = moments.chunk(2)
    if raw:
        z_statistics(z, mask, shape, eps, stats[2:], of_z)
    else:
        z, _ = normalise(z, mask, shape, eps, stats[2:], of_z)
    if early:
        x = contract(hopper_launch.project(z, None, stats[2:], w, shape, eps, given=True), outgoing)
        return hopper_launch.output(x, z, stats, w, shape, eps), x
    x = contract(project_folded(z, stats[4], of_z, w, shape), outgoing)
    x_statistics(x, shape, eps, stats[:2], of_x)
    return output_folded(x, z, stats, moments, w, shape), x


def backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    z: Tensor,
    w: TriangleWeights,
    mask: Tensor | None,
    outgoing: bool,
    eps: float,
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dz, and the parameter gradients one after another in one vector; a and b are recomputed.

    `more`: another gradient of z `[N, N, c]`, contiguous, which is added to dz.
    Order of the vector: norm_in γ, β; norm_out γ, β; a_p, b_p, a_g, b_g; out, g.
    """
    shape = Shape.of(z, w.a_p.shape[0])
    norm_in = (w.norm_in_weight, w.norm_in_bias)
    norms = (w.norm_out_weight, w.norm_out_bias, *norm_in)
    weights = packed_weights(w, z, x.dtype)
    of_folded, packed = weights
    kept = stats.numel() > 0
    rstd, early = None, False
    if kept and of_folded is not None:
        if z.dtype != x.dtype:
            again = torch.empty_like(stats[2:]), empty_moments(z, shape, of_folded, 1)
            z, rstd = normalise(z, None, shape, eps, *again)
        moments = moments_of(stats, shape, x.dtype)
        dx, d_linear, d_gate = output_backward_folded(x, z, stats, moments, of_folded, dy, shape)
        d_ends, shares_out = output_weight_folded(d_linear, d_gate, x, z, moments, norms, packed, shape)
        early = overlaps(z, shape.hidden, x.dtype)
        of_gate = d_gate if early else gate_gradient(d_gate, packed, shape)
        del d_linear, d_gate
        if early:
            ab = hopper_launch.project(z, None, stats[2:], of_folded, shape, eps, given=True)
        else:
            ab = project_folded(z, stats[4], moments[statistics.MOMENTS :], of_folded, shape)
        del moments
    else:
        dx, of_gate, shares_out, pairs = output_backward(x, z, norms, packed, dy, shape, eps)
        d_ends = output_weight_gradient(pairs, shape)
        del pairs
        ab = project_in(z, norm_in, weights, mask, shape, eps)
    grad = contract_backward(dx, ab, outgoing)
    del dx
    # a and b are spent: their memory takes LN(z) where it is large enough.
    size = shape.padded**2 * shape.channels
    n = ab.view(-1)[:size] if shape.channels <= 2 * shape.hidden else ab.new_empty(size)
    if early:
        dz, shares_in = hopper_launch.input_gradient(
            z, norm_in, packed, mask, grad, of_gate, n, shape, stats, rstd, more
        )
    elif x.dtype.itemsize == 2:
        inner = (z, norm_in, packed, mask, grad, of_gate, n, shape, eps)
        # Beside a float32 tile the kernel has no registers for another.
        beside = None if rstd is not None else more
        dz, shares_in = input_gradient(*inner, stats=stats if kept else None, rstd=rstd, more=beside)
        if more is not None and beside is None:
            dz += more
    else:
        dz, shares_in = project_input_gradient(
            z, norm_in, packed, mask, grad, of_gate, n, shape, eps, more=more
        )
    del of_gate  # the weights' gradients need room
    d_project = project_weight_gradient(n, grad, packed, shape)
    return dz, fold([shares_in, shares_out], [d_project, d_ends], gradient_dtype(w))

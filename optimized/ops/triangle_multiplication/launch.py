"""Launches of the triangle multiplication kernels: tile shapes, grids, workspaces and the contraction."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from optimized.ops.launching import chosen, in_dtype, packed, processors, tile
from optimized.ops.triangle_multiplication import output, project
from optimized.ops.triangle_multiplication.reference import TriangleWeights
from optimized.ops.tuning import Config

ALIGNMENT = 16

HALF = {
    "project": tile(64, 64, 4, 2),
    "project_input": tile(128, 32, 8, 2),
    "project_weight": tile(128, 64, 8, 1),
    "output": tile(64, 32, 4, 2),
    "output_input": tile(64, 32, 4, 2),
    "output_weight": tile(128, 32, 8, 1),
}
# Weight gradients have c or h rows: more than four warps would share 64 of them.
HALF_NARROW = HALF | {"project_weight": tile(64, 32, 4, 2), "output_weight": tile(64, 32, 4, 1)}
FULL = dict.fromkeys(HALF, tile(32, 16, 8, 1))


def default(kernel: str, channels: int, dtype: torch.dtype) -> Config:
    """The tile shape of `triangle_multiplication.<kernel>` where no tuning file has one."""
    table = FULL if dtype == torch.float32 else HALF_NARROW if channels <= 64 else HALF
    return table[kernel.partition(".")[2]]


def _config(kernel: str, shape: "Shape", x: Tensor) -> Config:
    return chosen(f"triangle_multiplication.{kernel}", shape.channels, x.dtype, x.device, default)


@dataclass(frozen=True)
class Shape:
    """Sizes of one call: N tokens, P = N rounded up, c and h channels."""

    tokens: int
    padded: int
    channels: int
    hidden: int

    @staticmethod
    def of(z: Tensor, hidden: int) -> "Shape":
        """The sizes for a pair tensor `[N, N, c]`."""
        tokens = z.shape[0]
        return Shape(tokens, -(-tokens // ALIGNMENT) * ALIGNMENT, z.shape[2], hidden)

    @property
    def blocks(self) -> dict[str, int]:
        """Compile-time sizes of the kernels."""
        c, h = self.channels, self.hidden
        return {"C": c, "H": h, "BC": triton.next_power_of_2(c), "BH": triton.next_power_of_2(h)}


def project_forward(
    z: Tensor,
    norm: tuple[Tensor, Tensor],
    w: Tensor,
    mask: Tensor | None,
    shape: Shape,
    eps: float,
    config: Config | None = None,
) -> Tensor:
    """a and b, `[2h, P, P]`, from z `[N, N, c]` (any strides over i and j) and the packed weights `[4h, c]`."""
    config = config or _config("project", shape, w)
    blocks = shape.blocks
    del blocks["BH"]
    ab = torch.empty((2 * shape.hidden, shape.padded, shape.padded), dtype=w.dtype, device=z.device)
    project.forward_kernel[(triton.cdiv(shape.padded**2, config.constants["BM"]),)](
        z,
        *norm,
        w,
        mask if mask is not None else z,
        ab,
        shape.tokens,
        shape.padded,
        z.stride(0),
        z.stride(1),
        eps,
        MASKED=mask is not None,
        **config.launch(),
        **blocks,
    )
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
    w: list[Tensor],
    shape: Shape,
    eps: float,
    config: Config | None = None,
) -> Tensor:
    """y `[N, N, c]`; `norms` is γ, β of the output norm and of the input norm; `w` is out and g."""
    config = config or _config("output", shape, x)
    y = torch.empty((shape.tokens, shape.tokens, shape.channels), dtype=x.dtype, device=x.device)
    output.forward_kernel[(triton.cdiv(shape.tokens * shape.padded, config.constants["BM"]),)](
        x,
        z,
        *norms,
        *w,
        y,
        shape.tokens,
        shape.padded,
        z.stride(0),
        z.stride(1),
        eps,
        **config.launch(),
        **shape.blocks,
    )
    return y


def output_input_gradient(
    x: Tensor,
    z: Tensor,
    norms: tuple[Tensor, ...],
    w: list[Tensor],
    dy: Tensor,
    shape: Shape,
    eps: float,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx `[h, P, P]`, the gate's gradient to LN(z) in z's dtype `[N, N, c]`, shares of the output norm's gradients."""
    config = config or _config("output_input", shape, x)
    programs = triton.cdiv(shape.padded**2, config.constants["BM"])
    dx = torch.empty_like(x)
    dn = torch.empty((shape.tokens, shape.tokens, shape.channels), dtype=z.dtype, device=x.device)
    shares = torch.empty((programs, 2 * shape.hidden), dtype=torch.float32, device=x.device)
    output.input_gradient_kernel[(programs,)](
        x,
        z,
        *norms,
        *w,
        dy,
        dx,
        dn,
        shares,
        shape.tokens,
        shape.padded,
        z.stride(0),
        z.stride(1),
        eps,
        **config.launch(),
        **shape.blocks,
    )
    return dx, dn, shares


def output_weight_gradient(
    x: Tensor,
    z: Tensor,
    norms: tuple[Tensor, ...],
    w: list[Tensor],
    dy: Tensor,
    shape: Shape,
    eps: float,
    config: Config | None = None,
) -> Tensor:
    """Partial gradients of out and g, `[splits, c·h + c·c]` in fp32."""
    config = config or _config("output_weight", shape, x)
    c, h = shape.channels, shape.hidden
    chunks = triton.cdiv(c, config.constants["BN"])
    steps = triton.cdiv(shape.tokens * shape.padded, config.constants["BM"])
    splits = max(1, min(processors(x.device) // chunks, steps))
    partial = torch.empty((splits, c * (h + c)), dtype=torch.float32, device=x.device)
    output.weight_gradient_kernel[(chunks, splits)](
        x,
        z,
        *norms,
        *w,
        dy,
        partial,
        shape.tokens,
        shape.padded,
        z.stride(0),
        z.stride(1),
        eps,
        splits,
        **config.launch(),
        **shape.blocks,
    )
    return partial


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
) -> tuple[Tensor, Tensor]:
    """dz, written over `dn`, and shares of the input norm's gradients; LN(z), masked, goes to `n` `[P·P, c]`."""
    config = config or _config("project_input", shape, w)
    blocks = shape.blocks
    del blocks["BH"]
    programs = triton.cdiv(shape.padded**2, config.constants["BM"])
    shares = torch.empty((programs, 2 * shape.channels), dtype=torch.float32, device=z.device)
    project.input_gradient_kernel[(programs,)](
        z,
        *norm,
        w,
        mask if mask is not None else z,
        grad,
        dn,
        dn,
        n,
        shares,
        shape.tokens,
        shape.padded,
        z.stride(0),
        z.stride(1),
        eps,
        MASKED=mask is not None,
        **config.launch(),
        **blocks,
    )
    return dn, shares


def project_weight_gradient(
    n: Tensor, grad: Tensor, w: Tensor, shape: Shape, config: Config | None = None
) -> Tensor:
    """Partial gradients of the packed weights, `[splits, 4h·c]` in fp32."""
    config = config or _config("project_weight", shape, w)
    blocks = shape.blocks
    del blocks["BH"]
    chunks = triton.cdiv(2 * shape.hidden, config.constants["BN"])
    splits = max(1, min(processors(n.device) // chunks, triton.cdiv(shape.padded**2, config.constants["BM"])))
    partial = torch.empty((splits, w.numel()), dtype=torch.float32, device=n.device)
    project.weight_gradient_kernel[(chunks, splits)](
        n,
        grad,
        w,
        partial,
        shape.padded**2,
        splits,
        **config.launch(),
        **blocks,
    )
    return partial


def forward(
    z: Tensor, w: TriangleWeights, mask: Tensor | None, outgoing: bool, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """y `[N, N, c]` and the contraction `[h, P, P]`, which is kept for the backward pass."""
    shape = Shape.of(z, w.a_p.shape[0])
    norm_in = (w.norm_in_weight, w.norm_in_bias)
    ab = project_forward(z, norm_in, packed([w.a_p, w.b_p, w.a_g, w.b_g], dtype), mask, shape, eps)
    x = contract(ab, outgoing)
    del ab
    norms = (w.norm_out_weight, w.norm_out_bias, *norm_in)
    return output_forward(x, z, norms, in_dtype([w.out, w.g], dtype), shape, eps), x


def backward(
    dy: Tensor, x: Tensor, z: Tensor, w: TriangleWeights, mask: Tensor | None, outgoing: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """dz, and the parameter gradients one after another in one fp32 vector; a and b are recomputed.

    Order of the vector: norm_in γ, β; a_p, b_p, a_g, b_g; norm_out γ, β; out, g.
    """
    shape = Shape.of(z, w.a_p.shape[0])
    c, h = shape.channels, shape.hidden
    sizes = [2 * c, 4 * h * c, 2 * h, c * h + c * c]
    flat = torch.empty(sum(sizes), dtype=torch.float32, device=z.device)
    d_norm_in, d_project, d_norm_out, d_ends = flat.split(sizes)
    norm_in = (w.norm_in_weight, w.norm_in_bias)
    norms = (w.norm_out_weight, w.norm_out_bias, *norm_in)
    ends = in_dtype([w.out, w.g], x.dtype)
    torch.sum(output_weight_gradient(x, z, norms, ends, dy, shape, eps), 0, out=d_ends)
    dx, dn, shares = output_input_gradient(x, z, norms, ends, dy, shape, eps)
    torch.sum(shares, 0, out=d_norm_out)
    ps = packed([w.a_p, w.b_p, w.a_g, w.b_g], x.dtype)
    ab = project_forward(z, norm_in, ps, mask, shape, eps)
    grad = contract_backward(dx, ab, outgoing)
    del dx
    # a and b are spent: their memory takes LN(z) where it is large enough.
    n = ab.view(-1)[: shape.padded**2 * c] if c <= 2 * h else ab.new_empty(shape.padded**2 * c)
    dz, shares = project_input_gradient(z, norm_in, ps, mask, grad, dn, n, shape, eps)
    torch.sum(shares, 0, out=d_norm_in)
    torch.sum(project_weight_gradient(n, grad, ps, shape), 0, out=d_project)
    return dz, flat

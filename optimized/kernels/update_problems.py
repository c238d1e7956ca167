"""Whole updates and the operators of the MSA and of the diffusion transformer as problems, at AF3's widths."""

from collections.abc import Sequence

import torch
from torch import Tensor

from optimized.kernels.problem import Cost, Operator, Problem, Source, Tensors
from optimized.ops.adaptive_layer_norm.reference import adaptive_layer_norm_reference
from optimized.ops.conditioned_transition.reference import (
    ConditionedWeights,
    conditioned_transition_reference,
)
from optimized.ops.gated_output.reference import gated_output_reference
from optimized.ops.linear.reference import linear_reference
from optimized.ops.outer_product_mean.reference import OuterWeights, outer_product_mean_reference
from optimized.ops.pair_weighted_averaging.reference import weighted_average_reference
from optimized.ops.triangle_attention.reference import (
    Orientation,
    TriangleAttentionWeights,
    triangle_attention_reference,
)

MSA_ROWS = 1024
SAMPLES = 48
DROPPED = 2.0
"""Dropout factor of what is kept, at p = 1/2: a number that every dtype holds."""
ADAPTIVE = ("norm_weight", "scale", "scale_bias", "shift")


def picked(t: Tensors, names: Sequence[str]) -> tuple[Tensor, ...]:
    """The tensors of these names, in order."""
    return tuple(t[name] for name in names)


def present(m: Tensor, mask: Tensor | None) -> Tensor:
    """The mask of an MSA: everything where there is none."""
    return torch.ones(m.shape[:2], dtype=torch.bool, device=m.device) if mask is None else mask


def dropout(x: Tensor, keep: object) -> Tensor:
    """Factors in the dtype of x from the booleans that a problem's settings hold."""
    assert isinstance(keep, Tensor)
    return keep.to(x.dtype) * DROPPED


def triangle_attention(channels: int = 128, heads: int = 4, width: int = 32) -> Operator:
    """From z to the update, over rows; the projections are counted as written and read once."""
    op = "triangle_attention_update"

    def definition(t: Tensors, mask: Tensor | None) -> list[Tensor]:
        weights = TriangleAttentionWeights(*picked(t, TriangleAttentionWeights._fields))
        return [triangle_attention_reference(t["z"], weights, heads, Orientation(False, False), mask)]

    def make(source: Source, n: int, small: bool) -> Problem:
        c = 32 if small else channels
        hidden = heads * (8 if small else width)
        maps = [source.weight(hidden, c) for _ in range(4)]
        matrices = (*maps, source.weight(heads, c), source.weight(c, hidden))
        weights = TriangleAttentionWeights(*source.norm(c), *matrices)
        tensors = {"z": source.normal(n, n, c), **weights._asdict()}
        return Problem(op, tensors, source.mask(n, n), [source.normal(n, n, c)], definition, {"heads": heads})

    hidden = heads * width
    maps = 4 * hidden + heads

    # Projections out; q, k, v and bias in, o out; o and gate in, the update out.
    def forward(n: int, size: int) -> Cost:
        pairs, scores = n * n, heads * n**3
        flops = 2 * pairs * channels * (maps + hidden) + 4 * scores * width
        return Cost(flops, pairs * size * (2 * channels + 10 * hidden + 2 * heads), scores + pairs * hidden)

    # The projections again, then two gradients of every product.
    def backward(n: int, size: int) -> Cost:
        pairs, scores = n * n, heads * n**3
        flops = 2 * pairs * channels * (3 * maps + 2 * hidden) + 10 * scores * width
        return Cost(flops, pairs * size * (4 * channels + 20 * hidden + 4 * heads), scores + pairs * hidden)

    return Operator(
        op, f"the whole update of {channels} channels, {heads} heads of {width}", make, forward, backward
    )


def gated_output(channels: int = 128) -> Operator:
    """The end of a pair update, with row-shared dropout and residual."""

    def make(source: Source, n: int, small: bool) -> Problem:
        c = 32 if small else channels
        keep = source.mask(1, n, c)

        def definition(t: Tensors, mask: Tensor | None) -> list[Tensor]:
            factors = dropout(t["x"], keep)
            return [gated_output_reference(t["x"], t["gate"], t["weight"], t["residual"], factors)]

        rows = [source.normal(n, n, c) for _ in range(3)]
        tensors = {"x": rows[0], "gate": rows[1], "weight": source.weight(c, c), "residual": rows[2]}
        grads = [source.normal(n, n, c)]
        return Problem("gated_output", tensors, None, grads, definition, {"keep": keep})

    def forward(n: int, size: int) -> Cost:
        values = n * n * channels
        return Cost(2 * values * channels, 4 * values * size, values)

    def backward(n: int, size: int) -> Cost:
        values = n * n * channels
        return Cost(4 * values * channels, 5 * values * size, values)

    summary = f"gate, projection, dropout and residual, {channels} channels on N² rows"
    return Operator("gated_output", summary, make, forward, backward)


def outer_product_mean(rows: int = MSA_ROWS, c_m: int = 64, hidden: int = 32, c_z: int = 128) -> Operator:
    """From the MSA to the update of the pair."""

    def definition(t: Tensors, mask: Tensor | None) -> list[Tensor]:
        weights = OuterWeights(*picked(t, OuterWeights._fields))
        return [outer_product_mean_reference(t["m"], present(t["m"], mask), weights)]

    def make(source: Source, n: int, small: bool) -> Problem:
        s, c, h, out = (5, 32, 16, 32) if small else (rows, c_m, hidden, c_z)
        maps = (source.weight(h, c), source.weight(h, c), source.weight(out, h * h))
        weights = OuterWeights(*source.norm(c), *maps, source.normal(out))
        tensors = {"m": source.normal(s, n, c), **weights._asdict()}
        return Problem(
            "outer_product_mean", tensors, source.mask(s, n), [source.normal(n, n, out)], definition
        )

    def products(n: int) -> tuple[float, float]:
        """FLOPs of the outer products, and of the projections around them."""
        return 2 * rows * n * n * hidden**2, 4 * rows * n * c_m * hidden + 2 * n * n * hidden**2 * c_z

    def forward(n: int, size: int) -> Cost:
        return Cost(sum(products(n)), size * (rows * n * (c_m + 4 * hidden) + n * n * c_z))

    # The outer products are computed again: nobody keeps them.
    def backward(n: int, size: int) -> Cost:
        outer, around = products(n)
        return Cost(3 * outer + 2 * around, size * (rows * n * (2 * c_m + 6 * hidden) + n * n * c_z))

    summary = f"{rows} rows of {c_m} channels, {hidden} × {hidden} outer products, to {c_z} channels"
    return Operator("outer_product_mean", summary, make, forward, backward)


def pair_weighted_averaging(rows: int = MSA_ROWS, heads: int = 8, width: int = 8) -> Operator:
    """The averages alone, between their projections."""

    def definition(t: Tensors, mask: Tensor | None) -> list[Tensor]:
        return [weighted_average_reference(t["v"], t["logits"], mask)]

    def make(source: Source, n: int, small: bool) -> Problem:
        s, h = (5, 2) if small else (rows, heads)
        tensors = {"v": source.normal(s, n, h, width), "logits": source.normal(h, n, n)}
        grads = [source.normal(s, n, h, width)]
        return Problem("pair_weighted_averaging", tensors, source.mask(n), grads, definition)

    def forward(n: int, size: int) -> Cost:
        values, weights = rows * n * heads * width, heads * n * n
        return Cost(2 * values * n, size * (2 * values + weights), weights)

    def backward(n: int, size: int) -> Cost:
        values, weights = rows * n * heads * width, heads * n * n
        return Cost(4 * values * n, size * (3 * values + 2 * weights), weights)

    summary = f"{rows} rows, {heads} heads of {width}, weights from the pair"
    return Operator("pair_weighted_averaging", summary, make, forward, backward)


def adaptive_layer_norm(c_a: int = 768, c_s: int = 384) -> Operator:
    """Of the token transformer, every sample with a conditioning of its own."""

    def definition(t: Tensors, mask: Tensor | None) -> list[Tensor]:
        norm_weight, scale, scale_bias, shift = picked(t, ADAPTIVE)
        return [adaptive_layer_norm_reference(t["a"], t["s"], norm_weight, scale, scale_bias, shift)]

    def make(source: Source, n: int, small: bool) -> Problem:
        return Problem("adaptive_layer_norm", *_conditioned(source, n, small, c_a, c_s), definition)

    def forward(n: int, size: int) -> Cost:
        rows = SAMPLES * n
        return Cost(4 * rows * c_s * c_a, rows * size * (2 * c_a + c_s), rows * c_a)

    # The two projections again, then two gradients of each.
    def backward(n: int, size: int) -> Cost:
        rows = SAMPLES * n
        return Cost(12 * rows * c_s * c_a, rows * size * (3 * c_a + 2 * c_s), rows * c_a)

    summary = f"{SAMPLES} samples of {c_a} channels, conditioning of {c_s}"
    return Operator("adaptive_layer_norm", summary, make, forward, backward)


def conditioned_transition(c_a: int = 768, c_s: int = 384, factor: int = 2) -> Operator:
    """Of the token transformer, its adaptive layer norm included."""
    rest = ("a", "b", "out", "gate", "gate_bias")

    def definition(t: Tensors, mask: Tensor | None) -> list[Tensor]:
        weights = ConditionedWeights(*picked(t, ADAPTIVE), *(t[f"w_{name}"] for name in rest))
        return [conditioned_transition_reference(t["a"], t["s"], weights)]

    def make(source: Source, n: int, small: bool) -> Problem:
        tensors, mask, grads = _conditioned(source, n, small, c_a, c_s)
        (c, s), h = tensors["scale"].shape, factor * tensors["scale"].shape[0]
        maps = (source.weight(h, c), source.weight(h, c), source.weight(c, h), source.weight(c, s))
        parameters = (*maps, source.normal(c))
        tensors |= {f"w_{name}": value for name, value in zip(rest, parameters, strict=True)}
        return Problem("conditioned_transition", tensors, mask, grads, definition)

    hidden = factor * c_a

    def forward(n: int, size: int) -> Cost:
        rows = SAMPLES * n
        flops = 6 * rows * c_s * c_a + 6 * rows * c_a * hidden
        return Cost(flops, rows * size * (2 * c_a + c_s), rows * (2 * c_a + hidden))

    # The projections of s and the hidden layer again, then two gradients of every product.
    def backward(n: int, size: int) -> Cost:
        rows = SAMPLES * n
        flops = 18 * rows * c_s * c_a + 16 * rows * c_a * hidden
        return Cost(flops, rows * size * (3 * c_a + 2 * c_s), rows * (2 * c_a + hidden))

    summary = f"{SAMPLES} samples of {c_a} channels, {factor} × hidden, conditioning of {c_s}"
    return Operator("conditioned_transition", summary, make, forward, backward)


def linear(c_in: int = 768, c_out: int = 768) -> Operator:
    """A projection of the token transformer; an operator for float32 alone."""

    def definition(t: Tensors, mask: Tensor | None) -> list[Tensor]:
        return [linear_reference(t["x"], t["weight"], t["bias"])]

    def make(source: Source, n: int, small: bool) -> Problem:
        samples, c, h = (2, 64, 96) if small else (SAMPLES, c_in, c_out)
        tensors = {"x": source.normal(samples, n, c), "weight": source.weight(h, c), "bias": source.normal(h)}
        return Problem("linear", tensors, None, [source.normal(samples, n, h)], definition)

    def forward(n: int, size: int) -> Cost:
        rows = SAMPLES * n
        return Cost(2 * rows * c_in * c_out, size * (rows * (c_in + c_out) + c_in * c_out))

    def backward(n: int, size: int) -> Cost:
        rows = SAMPLES * n
        return Cost(4 * rows * c_in * c_out, size * (rows * (2 * c_in + c_out) + 2 * c_in * c_out))

    summary = f"{SAMPLES} samples, {c_in} channels to {c_out}, float32 as three TF32 products"
    return Operator("linear", summary, make, forward, backward)


def _conditioned(
    source: Source, n: int, small: bool, c_a: int, c_s: int
) -> tuple[dict[str, Tensor], None, list[Tensor]]:
    """Activations, conditioning and the parameters of their adaptive layer norm; no mask; the gradient of the result."""
    samples, c, s = (2, 32, 16) if small else (SAMPLES, c_a, c_s)
    parameters = (source.norm(s)[0], source.weight(c, s), source.normal(c), source.weight(c, s))
    tensors = {"a": source.normal(samples, n, c), "s": source.normal(samples, n, s)}
    tensors |= dict(zip(ADAPTIVE, parameters, strict=True))
    return tensors, None, [source.normal(samples, n, c)]

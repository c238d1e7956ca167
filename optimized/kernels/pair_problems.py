"""The operators of a Pairformer block as problems, at AF3's widths."""

from torch import Tensor

from optimized.kernels.problem import Cost, Operator, Problem, Source, Tensors
from optimized.ops.attention import reference as attention_reference
from optimized.ops.layer_norm_linear.reference import layer_norm_linear_reference
from optimized.ops.transition.reference import transition_reference
from optimized.ops.triangle_multiplication.reference import TriangleWeights, triangle_multiplication_reference


def attention_definition(t: Tensors, mask: Tensor | None) -> list[Tensor]:
    """Attention of projections `[rows, tokens, heads, d]` with a bias `[heads, tokens, tokens]`; out in their layout."""
    q, k, v = (t[name].transpose(1, 2)[None] for name in ("q", "k", "v"))
    keep = None if mask is None else mask[None]
    out = attention_reference.attention(q, k, v, t["bias"][None, None], keep)
    return [out.squeeze(0).transpose(1, 2)]


def attention(op: str, rows: int | None, heads: int, width: int) -> Operator:
    """Attention over `rows` rows (None: as many as tokens) with one bias for all of them."""

    def make(source: Source, n: int, small: bool) -> Problem:
        r, h = (min(rows or n, 3) if small else rows or n), (2 if small else heads)
        tensors = {name: source.normal(r, n, h, width) for name in ("q", "k", "v")}
        tensors["bias"] = source.normal(h, n, n)
        return Problem(op, tensors, source.mask(r, n), [source.normal(r, n, h, width)], attention_definition)

    def forward(n: int, size: int) -> Cost:
        r = rows or n
        scores, values = r * heads * n * n, r * n * heads * width
        return Cost(4 * scores * width, size * (4 * values + heads * n * n) + r * n, scores)

    def backward(n: int, size: int) -> Cost:
        r = rows or n
        scores, values = r * heads * n * n, r * n * heads * width
        statistics = 4 * r * heads * n
        return Cost(10 * scores * width, size * (8 * values + 2 * heads * n * n) + statistics + r * n, scores)

    where = "N rows" if rows is None else f"{rows} rows"
    return Operator(op, f"{where}, {heads} heads of {width}, bias and key mask", make, forward, backward)


def triangle_multiplication(outgoing: bool, channels: int = 128) -> Operator:
    """One triangle multiplication, whole."""
    direction = "outgoing" if outgoing else "incoming"
    op = f"triangle_multiplication_{direction}"

    def definition(t: Tensors, mask: Tensor | None) -> list[Tensor]:
        weights = TriangleWeights(*(t[name] for name in TriangleWeights._fields))
        return [triangle_multiplication_reference(t["z"], weights, outgoing, mask)]

    def make(source: Source, n: int, small: bool) -> Problem:
        c = 32 if small else channels
        norms = [*source.norm(c), *source.norm(c)]
        matrices = [source.weight(c, c) for _ in range(6)]
        weights = TriangleWeights._make([*norms[:2], *matrices[:4], *norms[2:], *matrices[4:]])
        tensors = {"z": source.normal(n, n, c), **weights._asdict()}
        settings = {"outgoing": outgoing}
        return Problem(op, tensors, source.mask(n, n), [source.normal(n, n, c)], definition, settings)

    # Forward in three phases: z in, a and b out; a and b in, their product out; it and z in, the update out.
    def forward(n: int, size: int) -> Cost:
        pairs = n * n * channels
        return Cost(12 * pairs * channels + 2 * pairs * n, 9 * pairs * size, 3 * pairs)

    # Backward: both gradients of every product, and a and b once more, which nobody keeps.
    def backward(n: int, size: int) -> Cost:
        pairs = n * n * channels
        return Cost(
            24 * pairs * channels + 8 * pairs * channels + 4 * pairs * n, 18 * pairs * size, 3 * pairs
        )

    summary = f"the whole {direction} update of a pair representation of {channels} channels"
    return Operator(op, summary, make, forward, backward)


def transition(channels: int = 128, factor: int = 4) -> Operator:
    """The transition of a pair representation."""
    names = ("norm_weight", "norm_bias", "w_a", "w_b", "w_out")

    def definition(t: Tensors, mask: Tensor | None) -> list[Tensor]:
        gamma, beta, w_a, w_b, w_out = (t[name] for name in names)
        return [transition_reference(t["x"], gamma, beta, w_a, w_b, w_out)]

    def make(source: Source, n: int, small: bool) -> Problem:
        c = 32 if small else channels
        h = c * factor
        gamma, beta = source.norm(c)
        parameters = (gamma, beta, source.weight(h, c), source.weight(h, c), source.weight(c, h))
        tensors = {"x": source.normal(n, n, c), **dict(zip(names, parameters, strict=True))}
        return Problem("transition", tensors, None, [source.normal(n, n, c)], definition)

    # Backward: two gradients for each of three products, and the hidden layer's two inputs recomputed.
    def forward(n: int, size: int) -> Cost:
        hidden = n * n * channels * factor
        return Cost(6 * hidden * channels, 2 * n * n * channels * size, hidden)

    def backward(n: int, size: int) -> Cost:
        hidden = n * n * channels * factor
        return Cost(16 * hidden * channels, 3 * n * n * channels * size, hidden)

    summary = f"LayerNorm, SwiGLU and projection, {channels} × {factor} channels on N² rows"
    return Operator("transition", summary, make, forward, backward)


def layer_norm_linear(channels: int = 128, maps: int = 4, heads: int = 4) -> Operator:
    """The projections of a triangle attention."""

    def definition(t: Tensors, mask: Tensor | None) -> list[Tensor]:
        weights = [t[f"w_{i}"] for i in range(maps)]
        return layer_norm_linear_reference(t["x"], t["norm_weight"], t["norm_bias"], weights, t["w_head"])

    def make(source: Source, n: int, small: bool) -> Problem:
        c = 32 if small else channels
        gamma, beta = source.norm(c)
        tensors = {"x": source.normal(n, n, c), "norm_weight": gamma, "norm_bias": beta}
        tensors |= {f"w_{i}": source.weight(c, c) for i in range(maps)}
        tensors["w_head"] = source.weight(heads, c)
        grads = [*(source.normal(n, n, c) for _ in range(maps)), source.normal(heads, n, n)]
        return Problem("layer_norm_linear", tensors, None, grads, definition, {"maps": maps})

    width = maps * channels + heads

    def forward(n: int, size: int) -> Cost:
        return Cost(2 * n * n * channels * width, n * n * (channels + width) * size)

    def backward(n: int, size: int) -> Cost:
        return Cost(4 * n * n * channels * width, n * n * (2 * channels + width) * size)

    summary = f"LayerNorm, {maps} maps {channels} → {channels} and a bias of {heads} heads on N² rows"
    return Operator("layer_norm_linear", summary, make, forward, backward)

"""The drop-in modules against the baseline's, with the same parameters: results and every gradient."""

import pytest
import torch
from torch import Tensor

from baselines.af3 import attention_pair_bias, diffusion, msa, pairformer, primitives, triangle
from baselines.af3.config import AF3Config, DiffusionConfig, PairConfig
from optimized import modules
from tests.optimized.drop_in import assert_same, definitions_on_the_cpu, randn, randomise, run  # noqa: F401

N, C, HEADS, WIDTH = 11, 16, 2, 8
KEEP = torch.arange(N) < N - 3
MASKS = pytest.mark.parametrize("mask", [None, KEEP], ids=["unmasked", "masked"])


def compare(baseline, fused, inputs, call, dtype=torch.float64, tolerance=1e-10) -> None:
    randomise(baseline.to(dtype))
    fused.to(dtype).load_state_dict(baseline.state_dict(), strict=True)
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in baseline.named_parameters()]
    inputs = [x.to(dtype) for x in inputs]
    assert_same(run(fused, inputs, call), run(baseline, inputs, call), tolerance)


def valid(update: Tensor, mask: Tensor | None) -> Tensor:
    """The update of tokens that exist; what the others get means nothing."""
    return update if mask is None else update[mask][:, mask]


@MASKS
@pytest.mark.parametrize("outgoing", [True, False])
def test_triangle_multiplication(outgoing, mask):
    compare(
        triangle.TriangleMultiplication(C, 24, outgoing=outgoing),
        modules.TriangleMultiplication(C, 24, outgoing=outgoing),
        [randn(N, N, C)],
        lambda m, z: m(z, mask),
    )


@MASKS
@pytest.mark.parametrize("attention", ["sdpa", "softmax"])
@pytest.mark.parametrize(
    ("starting", "orientation"), [(True, "ik"), (False, "ik"), (False, "ki")], ids=["start", "end", "end-ki"]
)
@pytest.mark.parametrize("turned", [False, True], ids=["plain", "transposed-view"])
def test_triangle_attention(starting, orientation, attention, mask, turned):
    def build(kind: type) -> torch.nn.Module:
        return kind(C, HEADS, WIDTH, starting=starting, bias_orientation=orientation, attention=attention)

    def call(m: torch.nn.Module, z: Tensor) -> Tensor:
        return valid(m(z.transpose(0, 1) if turned else z, mask), mask)

    compare(build(triangle.TriangleAttention), build(modules.TriangleAttention), [randn(N, N, C)], call)


@pytest.mark.parametrize("shape", [(N, N), (5, N), (N,)], ids=["pair", "msa", "single"])
def test_transition(shape):
    compare(primitives.Transition(C, 4), modules.Transition(C, 4), [randn(*shape, C)], lambda m, x: m(x))


@MASKS
def test_single_attention(mask):
    bias = randn(HEADS, N, N, seed=3)
    compare(
        attention_pair_bias.AttentionPairBias(C, HEADS),
        modules.AttentionPairBias(C, HEADS),
        [randn(N, C), bias],
        lambda m, a, b: m(a, b, mask=mask),
    )


def test_biases_of_token_attention():
    compare(
        attention_pair_bias.PairBias(C, HEADS, offset=True),
        modules.PairBias(C, HEADS, offset=True),
        [randn(N, N, C)],
        lambda m, z: m(z),
    )


def test_token_attention_of_several_samples():
    """The bias is shared by the samples, here with the strides of a projection of several blocks."""
    inputs = [randn(3, N, C), randn(3, N, 12, seed=2), randn(N, N, 2 * HEADS, seed=3)]
    compare(
        attention_pair_bias.AttentionPairBias(C, HEADS, c_s=12),
        modules.AttentionPairBias(C, HEADS, c_s=12),
        inputs,
        lambda m, a, s, b: m(a, b.movedim(-1, 0)[HEADS:], s),
    )


def test_token_transformer_with_shared_pair_biases():
    config = AF3Config(
        c_z=C,
        c_s=12,
        diffusion=DiffusionConfig(c_token=32, blocks=4, heads=HEADS, super_block=2, transition_n=2),
    )
    inputs = [randn(3, N, 32), randn(3, N, 12, seed=2), randn(N, N, C, seed=3)]
    compare(diffusion.TokenTransformer(config), modules.TokenTransformer(config), inputs, lambda m, *x: m(*x))


def test_conditioned_attention_needs_its_conditioning():
    with pytest.raises(ValueError, match="conditioning"):
        modules.AttentionPairBias(C, HEADS, c_s=12)(randn(N, C), randn(HEADS, N, N))


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
def test_bf16_autocast(residual):
    """Under autocast the update is bf16, as the baseline's, whatever the dtype of z."""
    z = randn(N, N, C).to(residual)
    for kind, arguments in (
        ("TriangleMultiplication", {"c_hidden": 16, "outgoing": True}),
        ("TriangleAttention", {"heads": HEADS, "width": WIDTH, "starting": False}),
    ):
        baseline = getattr(triangle, kind)(C, **arguments)
        fused = getattr(modules, kind)(C, **arguments)

        def call(m: torch.nn.Module, z: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                update = m(z)
            assert update.dtype == torch.bfloat16
            return update.float()

        randomise(baseline)
        fused.load_state_dict(baseline.state_dict())
        assert_same(run(fused, [z], call), run(baseline, [z], call), 5e-2)


def test_a_row_without_keys_is_zero():
    """The baseline averages masked keys there; the operator says zero and passes no gradient to keys."""
    fused = modules.TriangleAttention(C, HEADS, WIDTH, starting=True)
    randomise(fused)
    z = randn(N, N, C).requires_grad_()
    update = fused(z, torch.zeros(N, dtype=torch.bool))
    assert update.abs().max() == 0
    update.sum().backward()
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("orientation", ["ik", "ki"])
@pytest.mark.parametrize("training", [True, False])
def test_pair_block(orientation, training):
    config = PairConfig(
        triangle_hidden=8,
        attention_heads=HEADS,
        attention_width=WIDTH,
        dropout=0.4,
        ending_node_bias=orientation,
    )

    def call(m: torch.nn.Module, z: Tensor) -> Tensor:
        torch.manual_seed(0)
        return m.train(training)(z, KEEP)[KEEP][:, KEEP]

    built = [kind.PairBlock(C, config, "sdpa") for kind in (pairformer, modules)]
    compare(*built, [randn(N, N, C)], call)


ROWS = torch.rand(5, N, generator=torch.Generator().manual_seed(4)) > 0.3


def test_outer_product_mean():
    sizes = (12, 8, C, 1e-3)
    built = [kind.OuterProductMean(*sizes) for kind in (msa, modules)]
    compare(*built, [randn(5, N, 12)], lambda m, x: m(x, ROWS))


def test_pair_weighted_averaging():
    sizes = (12, C, HEADS, WIDTH)
    built = [kind.PairWeightedAveraging(*sizes) for kind in (msa, modules)]
    compare(*built, [randn(5, N, 12), randn(N, N, C, seed=2)], lambda m, x, z: m(x, z, ROWS))


@pytest.mark.parametrize("own", [(3, N), (N,), (1, N)], ids=["each", "shared", "broadcast"])
@pytest.mark.parametrize("kind", ["AdaptiveLayerNorm", "ConditionedTransition"])
def test_conditioned_updates(kind, own):
    sizes = (C, 12) if kind == "AdaptiveLayerNorm" else (C, 12, 2)
    compare(
        getattr(primitives, kind)(*sizes),
        getattr(modules, kind)(*sizes),
        [randn(3, N, C), randn(*own, 12, seed=2)],
        lambda m, a, s: m(a, s),
    )


def test_fallbacks_are_counted():
    fused = modules.Transition(C, 4)
    fused(randn(N, C))
    fused(randn(N, C))
    ((reason, times),) = fused.fallbacks.counts.items()
    assert times == 2
    assert reason == "transition: Triton kernels need a CUDA or ROCm device, the input is on cpu"

"""A Pairformer block and a token attention of the baseline on the kernels, through `optimized.apply`."""

import copy

import pytest
import torch

from baselines.af3.attention_pair_bias import AttentionPairBias
from baselines.af3.config import PairConfig, PairformerConfig
from baselines.af3.pairformer import PairformerBlock
from baselines.checkpointing import checkpoint_units
from optimized.patch import apply
from optimized.recipes import OPS
from tests.optimized.drop_in import assert_same, randn, randomise, run

N, C_S, C_Z = 6, 32, 16


@pytest.mark.parametrize(("orientation", "keep"), [("ik", N), ("ki", N - 1)])
def test_block(orientation, keep):
    pair = PairConfig(16, attention_heads=2, attention_width=8, dropout=0.0, ending_node_bias=orientation)
    baseline = PairformerBlock(C_S, C_Z, PairformerConfig(single_heads=4, pair=pair), "sdpa")
    randomise(baseline)
    patched = copy.deepcopy(baseline)
    report = apply(patched)
    mask = None if keep == N else torch.arange(N) < keep
    inputs = [randn(N, C_S), randn(N, N, C_Z, seed=2)]

    def call(m, s, z):
        s, z = m(s, z, mask)
        return s[:keep], z[:keep, :keep]

    assert_same(run(patched, inputs, call), run(baseline, inputs, call), 5e-5)
    assert not report.fallbacks.counts


def test_token_attention():
    """Three samples with one bias, cut from a projection for several blocks."""
    baseline = randomise(AttentionPairBias(C_S, 4, c_s=12))
    patched = copy.deepcopy(baseline)
    report = apply(patched)
    inputs = [randn(3, N, C_S), randn(3, N, 12, seed=2), randn(N, N, 8, seed=3)]

    def call(m, a, s, bias):
        return m(a, bias.movedim(-1, 0)[4:], s)

    assert_same(run(patched, inputs, call), run(baseline, inputs, call), 5e-5)
    assert not report.fallbacks.counts


def test_every_operator_under_checkpointing_with_dropout():
    """Recomputed tensors may be fetched once only, and the dropout masks must come back."""
    pair = PairConfig(16, attention_heads=2, attention_width=8, dropout=0.25)
    baseline = PairformerBlock(C_S, C_Z, PairformerConfig(single_heads=4, pair=pair), "sdpa")
    randomise(baseline)
    patched = copy.deepcopy(baseline)
    report = apply(patched, OPS)
    checkpoint_units([("block", patched)])

    def call(m, s, z):
        torch.manual_seed(0)  # the dropout masks
        return m(s, z)

    inputs = [randn(N, C_S), randn(N, N, C_Z, seed=2)]
    assert_same(run(patched, inputs, call), run(baseline, inputs, call), 5e-5)
    assert not report.fallbacks.counts

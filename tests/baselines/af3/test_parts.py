"""Parts against their plain definitions."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from baselines.af3.atom_attention import key_windows, query_windows, window_layout
from baselines.af3.attention import biased_attention
from baselines.af3.attention_pair_bias import AttentionPairBias
from baselines.af3.config import AtomConfig, PairConfig, RelativePositionConfig, preset
from baselines.af3.diffusion import TokenTransformer
from baselines.af3.embedders import bond_matrix, relative_position
from baselines.af3.model import perturb_zero_parameters
from baselines.af3.msa import MSAModule, MSARows, OuterProductMean, sample_rows
from baselines.af3.pairformer import PairBlock
from baselines.af3.primitives import (
    AdaptiveLayerNorm,
    ConditionedTransition,
    LayerNorm,
    Linear,
    SharedDropout,
    Transition,
    one_hot,
)
from baselines.af3.sampling import SamplingConfig, noise_schedule, random_rotations
from baselines.af3.templates import distogram, unit_vectors
from baselines.af3.triangle import TriangleAttention, TriangleMultiplication
from megafold_bench.errors import UserError

N, C = 6, 8


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perturbed(module):
    perturb_zero_parameters(module, std=0.5)
    return module.double().eval()


# windows


def layout_of(atoms, real, edge_windows="shifted"):
    features = {
        "atom_mask": torch.arange(atoms) < real,
        "atom_to_token": torch.zeros(atoms, dtype=torch.int64),
    }
    return window_layout(features, AtomConfig(edge_windows=edge_windows))


@pytest.mark.parametrize("real", [160, 150, 130])
def test_windows_against_a_loop(real):
    x = torch.arange(160.0 * 2).view(160, 2)
    for edges in ("shifted", "masked"):
        layout = layout_of(160, real, edges)
        queries, keys = query_windows(x, layout), key_windows(x, layout)
        for w in range(5):
            assert torch.equal(queries[w], x[32 * w : 32 * w + 32])
            first = 32 * w + 16 - 64
            if edges == "shifted":
                first = 0 if first < 0 else min(first, real - 128)
            for k in range(128):
                atom = first + k
                assert bool(layout.key_mask[w, k]) == (0 <= atom < real)
                if 0 <= atom < real:
                    assert torch.equal(keys[w, k], x[atom])


def test_few_atoms_all_attend_to_all():
    layout = layout_of(96, 70)
    assert layout.key_mask.sum(-1).tolist() == [70, 70, 70]
    assert layout.key_atom[:, :70].tolist() == [list(range(70))] * 3


def test_window_gradient_counts_every_window_an_atom_is_in():
    x = torch.zeros(160, 1, requires_grad=True)
    layout = layout_of(160, 160)
    key_windows(x, layout).sum().backward()
    assert x.grad.flatten().tolist() == torch.bincount(layout.key_atom.flatten(), minlength=160).tolist()
    assert x.grad.sum() == 5 * 128


# features


def test_relative_position_against_its_definition(make_features):
    features = make_features(tokens=9)
    config = RelativePositionConfig(r_max=2, s_max=1)
    got = relative_position(features, config, torch.float32)
    f = {
        name: features[name].tolist()
        for name in ("asym_id", "entity_id", "sym_id", "residue_index", "token_index")
    }

    def hot(index, classes):
        return [1.0 if k == index else 0.0 for k in range(classes)]

    def clip(d, limit):
        return min(max(d + limit, 0), 2 * limit)

    for i, j in itertools.product(range(9), repeat=2):
        chain = f["asym_id"][i] == f["asym_id"][j]
        residue = chain and f["residue_index"][i] == f["residue_index"][j]
        entity = f["entity_id"][i] == f["entity_id"][j]
        a = clip(f["residue_index"][i] - f["residue_index"][j], 2) if chain else 5
        b = clip(f["token_index"][i] - f["token_index"][j], 2) if residue else 5
        c = clip(f["sym_id"][i] - f["sym_id"][j], 1) if entity else 3
        assert got[i, j].tolist() == hot(a, 6) + hot(b, 6) + [float(entity)] + hot(c, 4)
    assert RelativePositionConfig().features == 139


def test_bond_matrix_is_symmetric(features):
    bonds = bond_matrix(features, torch.float32)
    expected = torch.zeros(12, 12)
    for i, j in features["token_bonds"].tolist():
        expected[i, j] = expected[j, i] = 1.0
    assert expected.any() and torch.equal(bonds, expected)


def test_one_hot_is_zero_out_of_range():
    assert one_hot(torch.tensor([1, 3], dtype=torch.uint8), 3, torch.float32).tolist() == [
        [0, 1, 0],
        [0, 0, 0],
    ]


def test_template_distogram_bins():
    edges = torch.linspace(3.25, 50.75, 39)
    distances = torch.tensor([1.0, 3.3, 4.6, 50.0, 51.0, 400.0])
    bins = distogram(torch.stack((distances, distances * 0, distances * 0), -1), torch.float32)
    for i, j in itertools.product(range(6), repeat=2):
        d = float((distances[i] - distances[j]).abs())
        expected = int((edges < d).sum()) - 1
        assert bins[i, j].sum() == (expected >= 0)
        assert expected < 0 or bins[i, j, expected] == 1


def test_unit_vectors_are_invariant_and_in_the_frame():
    n, ca, c = random(3, N, 3)
    vectors = unit_vectors(n, ca, c)
    rotation = random_rotations(1, torch.device("cpu"))[0].double()
    moved = unit_vectors(*(v @ rotation.T + 3.0 for v in (n, ca, c)))
    torch.testing.assert_close(vectors, moved, rtol=1e-5, atol=1e-5)
    towards_c = unit_vectors(n[:1].repeat(2, 1), torch.stack((ca[0], c[0])), c[:1].repeat(2, 1))[0, 1]
    torch.testing.assert_close(towards_c, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))


# primitives


def test_layer_norm_keeps_the_input_dtype_with_float32_statistics():
    norm = LayerNorm(64)
    x = 100.0 + torch.randn(32, 64)
    with torch.autocast("cpu", torch.bfloat16):
        half = norm(x.bfloat16())
        assert half.dtype == torch.bfloat16 and norm(x).dtype == torch.float32
    expected = F.layer_norm(x.bfloat16().float(), (64,))
    torch.testing.assert_close(half.float(), expected, rtol=1e-2, atol=1e-2)


def test_precise_linear_ignores_autocast():
    linear = Linear(3, 4, precise=True)
    x = 100.0 * torch.randn(5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear(x)
        rounded = F.linear(x, linear.weight)
    assert rounded.dtype == torch.bfloat16 and not torch.equal(rounded.float(), inside)
    torch.testing.assert_close(inside, linear(x), rtol=0, atol=0)


def test_initialisation():
    torch.manual_seed(0)
    for init, variance in (("lecun", 1.0), ("relu", 2.0)):
        weight = Linear(256, 512, init=init).weight
        assert weight.std().item() == pytest.approx((variance / 256) ** 0.5, rel=0.02)
        assert weight.abs().max() <= 2.0 * (variance / 256) ** 0.5 / 0.8796 * 1.001
    assert not Linear(8, 8, init="zero").weight.any()
    gate = Linear(8, 8, bias=True, init="adaptive_gate")
    assert not gate.weight.any() and (gate.bias == -2.0).all()
    assert not Linear(8, 8, bias=True).bias.any()


def test_a_fresh_pair_block_is_the_identity():
    z = torch.randn(N, N, C)
    block = PairBlock(C, PairConfig(C, 2, 4), "sdpa").eval()
    assert torch.equal(block(z), z)
    perturb_zero_parameters(block)
    assert not torch.equal(block(z), z)


def test_shared_dropout_shares():
    x = torch.ones(5, 6, 400)
    for shared in (-3, -2):
        torch.manual_seed(0)
        out = SharedDropout(0.25, shared)(x)
        assert torch.equal(out, out.narrow(shared, 0, 1).expand_as(out))
        assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
        assert out.mean().item() == pytest.approx(1.0, abs=0.04)
    assert SharedDropout(0.25, -3).eval()(x) is x


def test_transition_formula():
    layer, x = perturbed(Transition(C, 2)), random(5, C)
    y = F.layer_norm(x, (C,), layer.layer_norm.weight, layer.layer_norm.bias)
    hidden = F.silu(y @ layer.linear_a.weight.T) * (y @ layer.linear_b.weight.T)
    torch.testing.assert_close(layer(x), hidden @ layer.linear_out.weight.T)


def test_adaptive_layer_norm_formula():
    layer, a, s = perturbed(AdaptiveLayerNorm(C, 5)), random(4, C), random(4, 5, seed=1)
    t = F.layer_norm(s, (5,), layer.layer_norm_s.weight)
    scale = torch.sigmoid(t @ layer.linear_scale.weight.T + layer.linear_scale.bias)
    torch.testing.assert_close(layer(a, s), scale * F.layer_norm(a, (C,)) + t @ layer.linear_shift.weight.T)


def test_conditioned_transition_broadcasts_the_conditioning_over_samples():
    layer, a, s = perturbed(ConditionedTransition(C, 5, 2)), random(3, 4, C), random(4, 5, seed=1)
    torch.testing.assert_close(layer(a, s), torch.stack([layer(x, s) for x in a]))


# attention


@pytest.mark.parametrize("implementation", ["sdpa", "softmax"])
def test_biased_attention_formula(implementation):
    q, k, v = random(3, 2, 5, 4), random(3, 2, 7, 4, seed=1), random(3, 2, 7, 4, seed=2)
    bias = random(2, 5, 7, seed=3)
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) / 2.0 + bias
    expected = torch.einsum("bhqk,bhkd->bhqd", logits.softmax(-1), v)
    torch.testing.assert_close(biased_attention(q, k, v, bias, implementation), expected)


@pytest.mark.parametrize("starting", [True, False])
@pytest.mark.parametrize("orientation", ["ik", "ki"])
def test_triangle_attention_against_loops(starting, orientation):
    layer = perturbed(
        TriangleAttention(C, 2, 3, starting=starting, bias_orientation=orientation, attention="softmax")
    )
    z = random(N, N, C)
    x = F.layer_norm(z, (C,), layer.layer_norm.weight, layer.layer_norm.bias)
    q, k, v, b = (m(x) for m in (layer.linear_q, layer.linear_k, layer.linear_v, layer.linear_bias))
    gathered = torch.zeros(N, N, 6, dtype=torch.float64)
    for i, j, h in itertools.product(range(N), range(N), range(2)):
        c = slice(3 * h, 3 * h + 3)
        if starting:  # edge ij attends to edges ik, biased by jk
            logits = [q[i, j, c] @ k[i, t, c] / 3**0.5 + b[j, t, h] for t in range(N)]
            values = v[i, :, c]
        else:  # edge ij attends to edges kj, biased by ik or ki
            bias = b[i, :, h] if orientation == "ik" else b[:, i, h]
            logits = [q[i, j, c] @ k[t, j, c] / 3**0.5 + bias[t] for t in range(N)]
            values = v[:, j, c]
        gathered[i, j, c] = torch.stack(logits).softmax(0) @ values
    expected = layer.linear_o(gathered * torch.sigmoid(layer.linear_g(x)))
    torch.testing.assert_close(layer(z), expected)


@pytest.mark.parametrize("outgoing", [True, False])
def test_triangle_multiplication_against_loops(outgoing):
    layer, z = perturbed(TriangleMultiplication(C, 4, outgoing=outgoing)), random(N, N, C)
    x = layer.layer_norm_in(z)
    a = torch.sigmoid(layer.linear_a_g(x)) * layer.linear_a_p(x)
    b = torch.sigmoid(layer.linear_b_g(x)) * layer.linear_b_p(x)
    product = torch.zeros(N, N, 4, dtype=torch.float64)
    for i, j, k in itertools.product(range(N), repeat=3):
        product[i, j] += a[i, k] * b[j, k] if outgoing else a[k, i] * b[k, j]
    expected = layer.linear_z(layer.layer_norm_out(product)) * torch.sigmoid(layer.linear_g(x))
    torch.testing.assert_close(layer(z), expected)


@pytest.mark.parametrize("make", [
    lambda: TriangleAttention(C, 2, 4, starting=True),
    lambda: TriangleAttention(C, 2, 4, starting=False),
    lambda: TriangleMultiplication(C, C, outgoing=True),
    lambda: TriangleMultiplication(C, C, outgoing=False),
    lambda: PairBlock(C, PairConfig(C, 2, 4), "sdpa"),
])  # fmt: skip
def test_a_masked_crop_equals_the_smaller_crop(make):
    layer, z = perturbed(make()), random(N, N, C)
    mask = torch.arange(N) < N - 2
    torch.testing.assert_close(layer(z, mask)[: N - 2, : N - 2], layer(z[: N - 2, : N - 2]))


def test_single_attention_mask_and_samples():
    layer = perturbed(AttentionPairBias(C, 2, c_s=5))
    a, s, bias = random(3, N, C), random(3, N, 5, seed=1), random(2, N, N, seed=2)
    together = layer(a, bias, s)
    torch.testing.assert_close(together, torch.stack([layer(x, bias, y) for x, y in zip(a, s, strict=True)]))
    mask = torch.arange(N) < N - 1
    small = layer(a[:, :-1], bias[:, :-1, :-1], s[:, :-1])
    torch.testing.assert_close(layer(a, bias, s, mask)[:, :-1], small)


def test_conditioned_attention_wants_its_conditioning():
    with pytest.raises(ValueError, match="conditioning"):
        AttentionPairBias(C, 2, c_s=5)(torch.zeros(N, C), torch.zeros(2, N, N))


def test_super_blocks_give_each_block_its_own_bias():
    config = preset("tiny")
    model = perturbed(TokenTransformer(config))
    a, s, z = random(2, N, 32), random(2, N, 32, seed=1), random(N, N, 16, seed=2)
    weight = model.pair_biases[0].weight
    x, y = a, F.layer_norm(z, (16,), model.layer_norm_pair.weight)
    for index, block in enumerate(model.blocks):
        x = block(x, s, torch.einsum("hc,ijc->hij", weight[4 * index : 4 * index + 4], y))
    torch.testing.assert_close(model(a, s, z), x)
    odd = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, super_block=4))
    with pytest.raises(ValueError, match="groups of 4"):
        TokenTransformer(odd)


# alignment


def test_outer_product_mean_against_loops():
    layer, m = perturbed(OuterProductMean(C, 3, 5, eps=1e-3)), random(4, N, C)
    mask = random(4, N, seed=1) > -0.5
    mask[:, 0] = False
    x = layer.layer_norm(m)
    a, b = layer.linear_a(x), layer.linear_b(x)
    for i, j in itertools.product(range(N), repeat=2):
        outer, count = torch.zeros(3, 3, dtype=torch.float64), 0
        for row in range(4):
            if mask[row, i] and mask[row, j]:
                outer += torch.outer(a[row, i], b[row, j])
                count += 1
        expected = (layer.linear_out(outer.flatten())) / (1e-3 + count)
        torch.testing.assert_close(layer(m, mask)[i, j], expected)


def test_row_sampling(make_features):
    features = make_features(rows=40)
    features["msa_mask"][20:] = False
    features["msa"] = torch.arange(40, dtype=torch.uint8)[:, None].expand(40, 12)

    def rows(n, seed):
        return sample_rows(features, n, torch.Generator().manual_seed(seed))

    assert rows(40, 0).msa.shape == rows(99, 0).msa.shape == (40, 12)
    chosen = rows(8, 0)
    names = chosen.msa[:, 0].tolist()
    assert len(set(names)) == 8 and max(names) < 20
    assert names == rows(8, 0).msa[:, 0].tolist() != rows(8, 1).msa[:, 0].tolist()
    assert set(range(20)) < set(rows(30, 0).msa[:, 0].tolist())
    counts = torch.zeros(20)
    for seed in range(300):
        counts[rows(5, seed).msa[:, 0].long()] += 1
    assert counts.min() > 40 and counts.max() < 115  # 75 expected; five standard deviations


def test_absent_columns_take_no_part_in_averages(features):
    config = preset("tiny")
    module = perturbed(MSAModule(config.c_s_inputs, config.c_z, config.msa, "sdpa"))
    averaging = module.blocks[0].averaging
    m, z = random(5, 12, 16), random(12, 12, 16, seed=1)
    mask = features["msa_mask"].clone()
    mask[:, 3] = False
    other = m.clone()
    other[:, 3] += 1.0
    keep = torch.arange(12) != 3
    torch.testing.assert_close(averaging(m, z, mask)[:, keep], averaging(other, z, mask)[:, keep])


def test_deletions_are_embedded(features):
    config = preset("tiny")
    module = perturbed(MSAModule(config.c_s_inputs, config.c_z, config.msa, "sdpa"))
    s_inputs = random(12, config.c_s_inputs)
    rows = MSARows(features["msa"], features["msa_deletions"], features["msa_mask"])
    weight = module.linear_m.weight
    value = torch.atan(rows.deletions.double() / 3.0) * 2.0 / torch.pi
    expected = weight[:, rows.msa.long()].movedim(0, -1) + (rows.deletions > 0)[..., None] * weight[:, 32]
    expected = expected + value[..., None] * weight[:, 33] + module.linear_s(s_inputs)
    torch.testing.assert_close(module.embed(rows, s_inputs), expected)


def test_block_order_is_an_option(features):
    config = preset("tiny")
    rows = MSARows(features["msa"], features["msa_deletions"], features["msa_mask"])
    outputs = []
    for order in ("outer_first", "averaging_first"):
        torch.manual_seed(0)
        msa = dataclasses.replace(config.msa, order=order)
        module = perturbed(MSAModule(config.c_s_inputs, config.c_z, msa, "sdpa"))
        outputs.append(module(rows, random(12, config.c_s_inputs), random(12, 12, 16)))
    assert not torch.allclose(*outputs)


# sampling and presets


def test_noise_schedule():
    levels = noise_schedule(SamplingConfig(steps=20))
    assert len(levels) == 21 and levels == sorted(levels, reverse=True)
    assert levels[0] == pytest.approx(16 * 160.0) and levels[-1] == pytest.approx(16 * 4e-4)
    with pytest.raises(ValueError, match="0 sampling steps"):
        noise_schedule(SamplingConfig(steps=0))


def test_random_rotations_are_proper():
    r = random_rotations(50, torch.device("cpu"))
    torch.testing.assert_close(r @ r.transpose(1, 2), torch.eye(3).expand(50, 3, 3), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(r), torch.ones(50))


def test_presets():
    assert preset("af3").c_s_inputs == 447
    assert [preset(name).name for name in ("tiny", "small", "af3")] == ["tiny", "small", "af3"]
    with pytest.raises(UserError, match="large"):
        preset("large")

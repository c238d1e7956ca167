"""Conformance: our modules with the weights of Protenix, OpenFold3 and Boltz give their results.

Each case builds the peer's module with random weights, renames them into ours (strictly: no parameter
may be left over on either side) and compares outputs and input gradients in float32.

Not comparable, because the function differs: Boltz's conditioned transition (an extra product), its
outer product mean with a bias (added after the division there), Protenix's atom attention (its key
norm is applied to already normalised queries).
"""

import importlib
import os
import re

import pytest
import torch

from baselines.af3.atom_attention import AtomBlock, window_layout
from baselines.af3.attention import key_mask_bias
from baselines.af3.attention_pair_bias import AttentionPairBias, PairBias
from baselines.af3.config import AtomConfig, DiffusionConfig, MSAConfig, PairConfig, PairformerConfig
from baselines.af3.diffusion import TokenBlock
from baselines.af3.msa import MSABlock, OuterProductMean, PairWeightedAveraging
from baselines.af3.pairformer import PairformerBlock
from baselines.af3.primitives import Transition
from baselines.af3.triangle import TriangleAttention, TriangleMultiplication

pytestmark = pytest.mark.peers

N, S = 11, 5
C_Z, C_S, C_M, HEADS, WIDTH = 16, 32, 16, 2, 8


def peer(module, name):
    """The class `name` of a peer's module; skips when the peer is not installed."""
    os.environ.setdefault("LAYERNORM_TYPE", "torch")  # Protenix: not the CUDA extension
    package = module.partition(".")[0]
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        pytest.skip(f"{package} is not importable here: {error}")


RENAMES = [
    # triangle attention
    (r"mha\.", ""),
    (r"(tri_att_\w+\.|^)linear(_z)?\.weight$", r"\1linear_bias.weight"),
    # transitions
    (r"layernorm1|(?<=transition_[sz]\.)norm|^norm(?=\.)", "layer_norm"),
    (r"linear_no_bias_a|swiglu\.linear_a|fc1", "linear_a"),
    (r"linear_no_bias_b|swiglu\.linear_b|fc2", "linear_b"),
    (r"linear_no_bias(?=\.)|fc3", "linear_out"),
]


def rename(state, rules):
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def split(state, pattern, first, second):
    """Cut fused weights in two halves, named by replacing `pattern`."""
    cut = {}
    for name, value in state.items():
        if re.search(pattern, name):
            halves = value.chunk(2)
            cut[re.sub(pattern, first, name)], cut[re.sub(pattern, second, name)] = halves
        else:
            cut[name] = value
    return cut


def randomise(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.5 + 0.3 * noise)
    return module.eval()


def conform(theirs, ours, state, inputs, call_theirs, call_ours):
    """Same outputs and input gradients, to float32 rounding of the largest entry."""
    ours.load_state_dict(state, strict=True)
    ours.eval()
    results = []
    for module, call in ((theirs, call_theirs), (ours, call_ours)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = call(module, *leaves)
        out = [
            v.reshape(v.shape[-3:] if v.ndim > 3 else v.shape)
            for v in (out if isinstance(out, tuple) else (out,))
        ]
        generator = torch.Generator().manual_seed(1)
        scalar = sum((v.squeeze() * torch.randn(v.squeeze().shape, generator=generator)).sum() for v in out)
        scalar.backward()
        results.append([v.detach().squeeze() for v in out] + [x.grad for x in leaves])
    for their, our in zip(*results, strict=True):
        assert their.abs().max() > 0
        assert (our - their).abs().max() <= 2e-5 * their.abs().max()


def inputs(*shapes):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def ones(*shape):
    return torch.ones(*shape)


PROTENIX, OPENFOLD, BOLTZ = "protenix.model.", "openfold3.core.model.", "boltz.model."

# Boltz's names; its fused triangle projections hold a, then b.
BOLTZ_TRIANGLE = [
    (r"norm_in", "layer_norm_in"),
    (r"norm_out", "layer_norm_out"),
    (r"p_out", "linear_z"),
    (r"g_out", "linear_g"),
]


def boltz_triangle(state):
    state = split(state, r"p_in", "linear_a_p", "linear_b_p")
    return rename(split(state, r"g_in", "linear_a_g", "linear_b_g"), BOLTZ_TRIANGLE)


@pytest.mark.parametrize("outgoing", [True, False])
@pytest.mark.parametrize("name", ["protenix", "openfold3", "boltz"])
def test_triangle_multiplication(name, outgoing):
    if name == "boltz":
        direction = "Outgoing" if outgoing else "Incoming"
        theirs = peer(BOLTZ + "layers.triangular_mult", f"TriangleMultiplication{direction}")(C_Z)
    else:
        path = {"protenix": PROTENIX + "triangular.triangular",
                "openfold3": OPENFOLD + "layers.triangular_multiplicative_update"}[name]  # fmt: skip
        theirs = peer(path, "TriangleMultiplicativeUpdate")(C_Z, C_Z, _outgoing=outgoing)
    randomise(theirs)
    state = boltz_triangle(theirs.state_dict()) if name == "boltz" else theirs.state_dict()
    ours = TriangleMultiplication(C_Z, C_Z, outgoing=outgoing)
    keep = torch.arange(N) < N - 2
    pair = (keep[:, None] & keep[None, :]).float()
    conform(
        theirs, ours, state, inputs((N, N, C_Z)),
        lambda m, z: m(z[None], mask=pair[None]) if name != "protenix" else m(z, mask=pair),
        lambda m, z: m(z, keep),
    )  # fmt: skip


def peer_triangle_attention(name, starting):
    path = {"protenix": PROTENIX + "triangular.triangular", "openfold3": OPENFOLD + "layers.triangular_attention",
            "boltz": BOLTZ + "layers.triangular_attention.attention"}[name]  # fmt: skip
    return randomise(peer(path, "TriangleAttention")(C_Z, WIDTH, HEADS, starting=starting))


@pytest.mark.parametrize("starting", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "softmax"])
@pytest.mark.parametrize("name", ["protenix", "openfold3", "boltz"])
def test_triangle_attention(name, attention, starting):
    theirs = peer_triangle_attention(name, starting)
    ours = TriangleAttention(C_Z, HEADS, WIDTH, starting=starting, bias_orientation="ki", attention=attention)
    keep = torch.arange(N) < N - 2
    pair = (keep[:, None] & keep[None, :]).float()

    def call(m, z):
        out = m(z, mask=pair) if name == "protenix" else m(z[None], mask=pair[None])
        return out.view(N, N, C_Z)[:-2, :-2]  # masked rows are undefined

    conform(
        theirs, ours, rename(theirs.state_dict(), RENAMES), inputs((N, N, C_Z)),
        call, lambda m, z: m(z, keep)[:-2, :-2],
    )  # fmt: skip


def test_ending_node_with_the_released_orientation():
    """OpenFold3 0.5 transposes z outside and asks for the transposed bias."""
    theirs = peer_triangle_attention("openfold3", True)
    ours = TriangleAttention(C_Z, HEADS, WIDTH, starting=False, bias_orientation="ik")
    conform(
        theirs, ours, rename(theirs.state_dict(), RENAMES), inputs((N, N, C_Z)),
        lambda m, z: m(z.transpose(0, 1)[None], transpose_bias=True)[0].transpose(0, 1),
        lambda m, z: m(z),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["protenix", "openfold3", "boltz"])
def test_transition(name):
    if name == "protenix":
        theirs = peer(PROTENIX + "modules.primitives", "Transition")(C_Z, 4)
    elif name == "openfold3":
        theirs = peer(OPENFOLD + "layers.transition", "SwiGLUTransition")(C_Z, 4)
    else:
        theirs = peer(BOLTZ + "layers.transition", "Transition")(C_Z, 4 * C_Z)
    randomise(theirs)
    state = rename(theirs.state_dict(), RENAMES)
    conform(theirs, Transition(C_Z, 4), state, inputs((N, N, C_Z)), lambda m, z: m(z), lambda m, z: m(z))


@pytest.mark.parametrize("name", ["protenix", "openfold3", "boltz"])
def test_outer_product_mean(name):
    mask = torch.rand(S, N, generator=torch.Generator().manual_seed(3)) > 0.3
    mask[:, 0] = True
    mask[0] = True  # every pair is seen once, where Boltz's count and ours agree
    if name == "boltz":
        theirs = randomise(peer(BOLTZ + "layers.outer_product_mean", "OuterProductMean")(C_M, 4, C_Z))
        torch.nn.init.zeros_(theirs.proj_o.bias)
    else:
        path = {
            "protenix": PROTENIX + "triangular.layers",
            "openfold3": OPENFOLD + "layers.outer_product_mean",
        }
        theirs = randomise(peer(path[name], "OuterProductMean")(C_M, C_Z, 4))
    rules = [(r"linear_1|proj_a", "linear_a"), (r"linear_2|proj_b", "linear_b"), (r"proj_o", "linear_out"),
             (r"^norm", "layer_norm")]  # fmt: skip
    ours = OuterProductMean(C_M, 4, C_Z, eps=0.0 if name == "boltz" else 1e-3)
    conform(
        theirs, ours, rename(theirs.state_dict(), rules), inputs((S, N, C_M)),
        lambda m, x: m(x[None], mask=mask[None].float()), lambda m, x: m(x, mask),
    )  # fmt: skip


PROTENIX_AVERAGING = [(r"layernorm_", "layer_norm_"), (r"no_bias_mv", "v"), (r"no_bias_mg", "g"),
                      (r"no_bias_z", "z"), (r"no_bias_out", "o")]  # fmt: skip
BOLTZ_AVERAGING = [(r"^norm_", "layer_norm_"), (r"proj_m", "linear_v"), (r"proj_", "linear_")]


@pytest.mark.parametrize("name", ["protenix", "openfold3", "boltz"])
def test_pair_weighted_averaging(name):
    if name == "protenix":
        theirs = peer(PROTENIX + "modules.pairformer", "MSAPairWeightedAveraging")(C_M, WIDTH, C_Z, HEADS)
    elif name == "openfold3":
        theirs = peer(OPENFOLD + "layers.msa", "MSAPairWeightedAveraging")(C_M, WIDTH, C_Z, HEADS)
    else:
        theirs = peer(BOLTZ + "layers.pair_averaging", "PairWeightedAveraging")(C_M, C_Z, WIDTH, HEADS)
    randomise(theirs)
    calls = {
        "protenix": lambda m, x, z: m(x, z),
        "openfold3": lambda m, x, z: m(x[None], z[None], mask=ones(1, N, N)),
        "boltz": lambda m, x, z: m(x[None], z[None], ones(1, N, N), False),
    }
    rules = {"protenix": PROTENIX_AVERAGING, "openfold3": [], "boltz": BOLTZ_AVERAGING}[name]
    conform(
        theirs, PairWeightedAveraging(C_M, C_Z, HEADS, WIDTH), rename(theirs.state_dict(), rules),
        inputs((S, N, C_M), (N, N, C_Z)), calls[name],
        lambda m, x, z: m(x, z, torch.ones(S, N, dtype=torch.bool)),
    )  # fmt: skip


class SingleAttention(torch.nn.Module):
    """Our single attention with its pair bias, as peers bundle them."""

    def __init__(self, *, norm=True):
        super().__init__()
        self.pair_bias = PairBias(C_Z, 4, offset=True)
        self.attention_pair_bias = AttentionPairBias(C_S, 4)
        if not norm:
            self.attention_pair_bias.layer_norm = torch.nn.Identity()

    def forward(self, s, z):
        return self.attention_pair_bias(s, self.pair_bias(z))


PAIR_BIAS = [
    (r"^(layer_?norm_z|proj_z\.0)\.", "pair_bias.layer_norm."),
    (r"^(linear(_nobias)?_z|proj_z\.1)\.", "pair_bias.linear."),
    (r"^(?!pair_bias)", "attention_pair_bias."),
    (r"layer_?norm_a", "layer_norm"),
    (r"attention_pair_bias\.attention\.|attention_pair_bias\.mha\.", "attention_pair_bias."),
    (r"proj_", "linear_"),
]


@pytest.mark.parametrize("name", ["protenix", "openfold3", "boltz"])
def test_single_attention_with_pair_bias(name):
    if name == "protenix":
        theirs = peer(PROTENIX + "modules.transformer", "AttentionPairBias")(
            has_s=False, create_offset_ln_z=True, n_heads=4, c_a=C_S, c_z=C_Z
        )
    elif name == "openfold3":
        theirs = peer(OPENFOLD + "layers.attention_pair_bias", "AttentionPairBias")(
            C_S, C_S, C_S, C_S, C_Z, C_S // 4, 4
        )
    else:
        theirs = peer(BOLTZ + "layers.attentionv2", "AttentionPairBias")(C_S, C_Z, 4)
    randomise(theirs)
    calls = {
        "protenix": lambda m, s, z: m(s, None, z),
        "openfold3": lambda m, s, z: m(s[None], z[None]),
        "boltz": lambda m, s, z: m(s[None], z[None], ones(1, N), s[None]),
    }
    conform(
        theirs, SingleAttention(norm=name != "boltz"), rename(theirs.state_dict(), PAIR_BIAS),
        inputs((N, C_S), (N, N, C_Z)), calls[name], lambda m, s, z: m(s, z),
    )  # fmt: skip


PAIRFORMER = [
    (r"pair_stack\.", ""),
    (r"transition_s", "single_transition"),
    (r"transition_z", "pair_transition"),
    (r"^pre_norm_s", "attention_pair_bias.layer_norm"),
    (r"^(attention_pair_bias|attn_pair_bias|attention)\.(layer_?norm_z|proj_z\.0)", "pair_bias.layer_norm"),
    (r"^(attention_pair_bias|attn_pair_bias|attention)\.(linear(_nobias)?_z|proj_z\.1)", "pair_bias.linear"),
    (r"^(attention_pair_bias|attn_pair_bias|attention)\.(attention\.|mha\.)?", "attention_pair_bias."),
    (r"proj_(?=[qkvgo]\.)", "linear_"),
    (r"layer_?norm_a", "layer_norm"),
    (r"mha\.", ""),
    (r"(tri_att_\w+)\.linear(_z)?\.", r"\1.linear_bias."),
    (r"(transition)\.(layernorm1|norm)", r"\1.layer_norm"),
    *RENAMES[3:],
    (r"^(tri_|pair_transition)", r"pair.\1"),
]


@pytest.mark.parametrize("name", ["protenix", "openfold3", "boltz"])
def test_pairformer_block(name):
    orientation = "ik" if name == "openfold3" else "ki"
    pair = PairConfig(C_Z, HEADS, WIDTH, ending_node_bias=orientation)
    config = PairformerConfig(single_heads=4, pair=pair)
    if name == "protenix":
        theirs = peer(PROTENIX + "modules.pairformer", "PairformerBlock")(
            4, C_Z, C_S, C_Z, WIDTH, HEADS, dropout=0.25
        )
    elif name == "openfold3":
        theirs = peer(OPENFOLD + "latent.pairformer", "PairFormerBlock")(
            C_S, C_Z, C_S // 4, 4, C_Z, WIDTH, HEADS, "swiglu", 4, 0.25, False, 1e9
        )
    else:
        theirs = peer(BOLTZ + "layers.pairformer", "PairformerLayer")(
            C_S, C_Z, 4, pairwise_head_width=WIDTH, pairwise_num_heads=HEADS, v2=True
        )
    randomise(theirs)
    state = theirs.state_dict()
    if name == "boltz":
        triangle = {k: v for k, v in state.items() if k.startswith("tri_mul")}
        state = {k: v for k, v in state.items() if k not in triangle} | boltz_triangle(triangle)
    calls = {
        "protenix": lambda m, s, z: m(s, z, ones(N, N)),
        "openfold3": lambda m, s, z: m(s[None], z[None], ones(1, N), ones(1, N, N)),
        "boltz": lambda m, s, z: m(s[None], z[None], ones(1, N), ones(1, N, N)),
    }
    conform(
        theirs, PairformerBlock(C_S, C_Z, config, "sdpa"), rename(state, PAIRFORMER),
        inputs((N, C_S), (N, N, C_Z)), calls[name], lambda m, s, z: m(s, z),
    )  # fmt: skip


class DiffusionBlock(torch.nn.Module):
    """Our token block with its own pair bias, as peers bundle them."""

    def __init__(self, *, norm):
        super().__init__()
        self.pair_bias = PairBias(C_Z, 4, offset=False)
        if not norm:
            self.pair_bias.layer_norm = torch.nn.Identity()
        self.block = TokenBlock(C_S, C_S, DiffusionConfig(heads=4), "sdpa")

    def forward(self, a, s, z):
        return self.block(a, s, self.pair_bias(z))


DIFFUSION = [
    (r"^attention_pair_bias\.layernorm_z", "pair_bias.layer_norm"),
    (r"^attention_pair_bias\.linear(_nobias)?_z", "pair_bias.linear"),
    (r"^attention_pair_bias\.(linear_a_last|linear_ada_out)", "block.attention.linear_s"),
    (r"^attention_pair_bias\.layer_?norm_a\.", "block.attention.ada_ln."),
    (r"^attention_pair_bias\.layer_norm_a_([qk])\.", r"block.attention.ada_ln_\1."),
    (r"^attention_pair_bias\.(attention|mha)\.", "block.attention."),
    (r"^conditioned_transition(_block)?\.(adaln|layer_norm)\.", "block.transition.ada_ln."),
    (r"^conditioned_transition(_block)?\.", "block.transition."),
    (r"layernorm_s", "layer_norm_s"),
    (r"(ada_ln\w*)\.linear_nobias_s", r"\1.linear_shift"),
    (r"(ada_ln\w*)\.linear_g", r"\1.linear_scale"),
    (r"transition\.linear_g", "transition.linear_s"),
    (r"linear_nobias_a1|swiglu\.linear_a", "linear_a"),
    (r"linear_nobias_a2|swiglu\.linear_b", "linear_b"),
    (r"linear_nobias_b", "linear_out"),
]


def diffusion_state(name, state):
    # Both call one AdaLN projection linear_s: Protenix the scale, OpenFold3 the shift.
    which = "scale" if name == "protenix" else "shift"
    return rename(state, [*DIFFUSION, (r"(ada_ln\w*)\.linear_s\.", rf"\1.linear_{which}.")])


@pytest.mark.parametrize("name", ["protenix", "openfold3"])
def test_diffusion_transformer_block(name):
    if name == "protenix":
        theirs = peer(PROTENIX + "modules.transformer", "DiffusionTransformerBlock")(C_S, C_S, C_Z, 4)
    else:
        theirs = peer(OPENFOLD + "layers.diffusion_transformer", "DiffusionTransformerBlock")(
            C_S, C_S, C_Z, C_S // 4, 4, 2, None, None
        )
    randomise(theirs)
    calls = {
        "protenix": lambda m, a, s, z: m(a, s, z.expand(2, N, N, C_Z))[0],
        "openfold3": lambda m, a, s, z: m(a, s, z[None], mask=ones(2, N)),
    }
    conform(
        theirs, DiffusionBlock(norm=name == "protenix"), diffusion_state(name, theirs.state_dict()),
        inputs((2, N, C_S), (2, N, C_S), (N, N, C_Z)), calls[name], lambda m, a, s, z: m(a, s, z),
    )  # fmt: skip


class OurAtomBlock(torch.nn.Module):
    """Our atom block with its own projection of the atom pair representation."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.pair_bias = torch.nn.ModuleDict(
            {"linear": torch.nn.Linear(config.c_pair, config.heads, bias=False)}
        )
        self.block = AtomBlock(config, "sdpa")

    def forward(self, a, c, pair):
        atoms = a.shape[0]
        features = {"atom_mask": torch.ones(atoms, dtype=torch.bool), "atom_to_token": torch.zeros(atoms)}
        layout = window_layout(features, self.config)
        bias = self.pair_bias["linear"](pair).permute(0, 3, 1, 2)
        bias = bias + key_mask_bias(layout.key_mask, bias.dtype)[:, None, None]
        return self.block(a[None], c, bias, layout)[0]


def test_atom_transformer_block():
    """OpenFold3's, the one peer with the released layout's separate norms of queries and keys."""
    config = AtomConfig(c_atom=16, c_pair=8, heads=2)
    theirs = peer(OPENFOLD + "layers.diffusion_transformer", "DiffusionTransformerBlock")(
        16, 16, 8, 8, 2, 2, 32, 128
    )
    randomise(theirs)
    atoms = 192
    conform(
        theirs, OurAtomBlock(config), diffusion_state("openfold3", theirs.state_dict()),
        inputs((atoms, 16), (atoms, 16), (atoms // 32, 32, 128, 8)),
        lambda m, a, c, p: m(a[None], c[None], p[None], mask=ones(1, atoms))[0],
        lambda m, a, c, p: m(a, c, p),
    )  # fmt: skip


def test_msa_block():
    """Protenix's whole MSA block, its MSA update included."""
    theirs = peer(PROTENIX + "modules.pairformer", "MSABlock")
    theirs = theirs(c_m=C_M, c_z=C_Z, c_hidden=4, is_last_block=False, msa_dropout=0.0, pair_dropout=0.0)
    randomise(theirs).train()  # its evaluation path works in place and has no gradient
    pair = PairConfig(triangle_hidden=128, ending_node_bias="ki")
    averaging = theirs.msa_stack.msa_pair_weighted_averaging
    config = MSAConfig(
        c_m=C_M, outer_hidden=4, averaging_heads=averaging.n_heads, averaging_width=averaging.c, pair=pair
    )
    rules = [
        (r"outer_product_mean_msa\.", "outer_product_mean."),
        (r"linear_1", "linear_a"),
        (r"linear_2", "linear_b"),
        (r"msa_stack\.msa_pair_weighted_averaging\.", "averaging."),
        (r"msa_stack\.transition_m\.", "msa_transition."),
        *[(rf"^(averaging.*){pattern}", rf"\1{replacement}") for pattern, replacement in PROTENIX_AVERAGING],
        (r"^pair_stack\.", "pair."),
        (r"mha\.", ""),
        (r"(tri_att_\w+)\.linear\.", r"\1.linear_bias."),
        (r"(transition)\.layernorm1", r"\1.layer_norm"),
        *RENAMES[3:],
    ]
    conform(
        theirs, MSABlock(C_Z, config, "sdpa"), rename(theirs.state_dict(), rules),
        inputs((S, N, C_M), (N, N, C_Z)), lambda m, x, z: m(x, z, ones(N, N)),
        lambda m, x, z: m(x, z, torch.ones(S, N, dtype=torch.bool)),
    )  # fmt: skip

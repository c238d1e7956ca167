"""`optimized.apply` on Boltz 2.2, Protenix 2.0 and OpenFold3 0.5: their stacks, before and after.

Two blocks with perturbed weights, two padding tokens, dropout on with equal seeds. Outputs of the tokens that
exist, gradients of the inputs and of every parameter must agree in float32.
"""

import copy
import importlib
import os

import pytest
import torch
from torch import Tensor, nn

from baselines.checkpointing import checkpoint_units
from baselines.offloading import HostStore
from optimized import modules
from optimized.patch import apply
from optimized.recipes import OPS
from tests.optimized.drop_in import assert_same, definitions_on_the_cpu, randn, randomise, run  # noqa: F401

pytestmark = pytest.mark.peers

N, C_Z, C_S, HEADS, WIDTH = 11, 16, 32, 2, 8
KEEP = torch.arange(N) < N - 2
TOKENS, PAIRS = KEEP.float(), (KEEP[:, None] & KEEP[None, :]).float()
PAIRFORMER = [randn(N, C_S), randn(N, N, C_Z, seed=2)]
PAIRFORMER_OPS = ("triangle_multiplication", "triangle_attention", "transition", "attention_pair_bias")
TOLERANCE = 5e-5


def peer(module: str, name: str) -> type:
    """The class `name` of a peer's module; skips when the peer is not installed."""
    os.environ.setdefault("LAYERNORM_TYPE", "torch")  # Protenix: not the CUDA extension
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        pytest.skip(f"{module.partition('.')[0]} is not importable here: {error}")


def boltz_pairformer() -> nn.Module:
    return peer("boltz.model.layers.pairformer", "PairformerModule")(
        C_S, C_Z, 2, num_heads=4, pairwise_head_width=WIDTH, pairwise_num_heads=HEADS, v2=True
    )


def protenix_pairformer() -> nn.Module:
    return peer("protenix.model.modules.pairformer", "PairformerStack")(
        n_blocks=2, n_heads=4, c_z=C_Z, c_s=C_S, blocks_per_ckpt=None
    )


def openfold3_pairformer() -> nn.Module:
    return peer("openfold3.core.model.latent.pairformer", "PairFormerStack")(
        c_s=C_S, c_z=C_Z, c_hidden_pair_bias=C_S // 4, no_heads_pair_bias=4, c_hidden_mul=C_Z,
        c_hidden_pair_att=WIDTH, no_heads_pair=HEADS, no_blocks=2, transition_type="swiglu", transition_n=4,
        pair_dropout=0.25, fuse_projection_weights=False, blocks_per_ckpt=None, inf=1e9,
    )  # fmt: skip


def batched(m: nn.Module, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    s, z = m(s[None], z[None], TOKENS[None], PAIRS[None])
    return s[0], z[0]


def two_structures(m: nn.Module, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """A batch of two; the second has all its tokens."""
    ones = torch.ones(N)
    masks = torch.stack((TOKENS, ones)), torch.stack((PAIRS, torch.ones(N, N)))
    s, z = m(torch.stack((s, s.flip(0))), torch.stack((z, z.flip(0))), *masks)
    return s[0] + s[1], z[0] + z[1]


def unbatched(m: nn.Module, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Protenix has no mask of tokens in its Pairformer: all exist."""
    return m(s, z, torch.ones(N, N))


PAIRFORMERS = {
    "boltz": (boltz_pairformer, batched),
    "boltz-batch": (boltz_pairformer, two_structures),
    "protenix": (protenix_pairformer, unbatched),
    "openfold3": (openfold3_pairformer, batched),
    "openfold3-batch": (openfold3_pairformer, two_structures),
}


def seeded(call):
    """`call`, its results cut to the tokens that exist, with fixed dropout masks."""

    def run_it(m: nn.Module, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        s, z = call(m, s, z)
        return s[KEEP], z[KEEP][:, KEEP]

    return run_it


def check(theirs: nn.Module, inputs: list[Tensor], call, ops=None, tolerance: float = TOLERANCE):
    """Same results before and after; returns the report."""
    randomise(theirs)
    expected = run(theirs, inputs, call)
    patched = copy.deepcopy(theirs)
    report = apply(patched, ops)
    assert [n for n, _ in patched.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert_same(run(patched, inputs, call), expected, tolerance)
    elsewhere = {
        "layer_norm_linear",
        "gated_output",
    }  # parts of other modules too: triangle attention ends so
    used = {key.partition(":")[0] for key in report.fallbacks.counts}
    assert used - elsewhere == report.counts().keys() - elsewhere, "an operator was not called"
    # Triangle updates that were replaced add themselves to the residual.
    taken_over = {"gated_output"} if "triangle_multiplication" in report.counts() else set()
    assert used >= report.counts().keys() - taken_over
    return report


@pytest.mark.parametrize("name", PAIRFORMERS)
def test_pairformer(name):
    build, call = PAIRFORMERS[name]
    report = check(build(), PAIRFORMER, seeded(call))
    layers = {"gated_output": 2} if name.startswith("boltz") else {}
    assert report.counts() == {
        "triangle_multiplication": 4,
        "triangle_attention": 4,
        "transition": 4,
        "attention_pair_bias": 2,
        **layers,
    }
    assert not report.left


@pytest.mark.parametrize("op", PAIRFORMER_OPS)
@pytest.mark.parametrize("name", ["boltz", "protenix", "openfold3"])
def test_each_operator_alone(name, op):
    build, call = PAIRFORMERS[name]
    report = check(build(), PAIRFORMER, seeded(call), [op])
    assert report.counts().keys() == {op}


@pytest.mark.parametrize("name", ["boltz", "protenix", "openfold3"])
def test_evaluation(name):
    """In evaluation the libraries take other paths: chunks, buffers written in place."""
    build, call = PAIRFORMERS[name]
    theirs = randomise(build()).eval()
    patched = copy.deepcopy(theirs)
    apply(patched, OPS)
    with torch.no_grad():
        for a, b in zip(seeded(call)(theirs, *PAIRFORMER), seeded(call)(patched, *PAIRFORMER), strict=True):
            assert (a - b).abs().max() <= TOLERANCE * a.abs().max()


def test_protenix_in_place():
    """Where Protenix lets a block work in place, the update is added to the caller's tensor."""
    theirs = randomise(protenix_pairformer()).eval()
    patched = copy.deepcopy(theirs)
    apply(patched, OPS)
    results = []
    with torch.no_grad():
        for module in (theirs, patched):
            s, z = (x.clone() for x in PAIRFORMER)
            results.append(module(s, z, torch.ones(N, N), inplace_safe=True))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= TOLERANCE * a.abs().max()


@pytest.mark.parametrize("name", ["boltz", "openfold3"])
def test_bf16_autocast_with_checkpointing(name):
    """The recipe these libraries train with: as near to float32 as their own.

    The definitions round a float32 residual before they normalise it, hence the margin.
    """
    build, call = PAIRFORMERS[name]
    theirs = randomise(build())

    def recipe(m: nn.Module, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        def inner(s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                s, z = seeded(call)(m, s, z)
            return s.float(), z.float()

        return torch.utils.checkpoint.checkpoint(inner, s, z, use_reentrant=False)

    expected = run(theirs, PAIRFORMER, recipe)
    exact = run(theirs, PAIRFORMER, seeded(call))
    patched = copy.deepcopy(theirs)
    apply(patched, OPS)
    found = run(patched, PAIRFORMER, recipe)
    for key in ("output 0", "output 1", "input 0", "input 1"):
        distance, allowed = ((x[key] - exact[key]).norm() / exact[key].norm() for x in (found, expected))
        assert distance <= 1.6 * allowed, f"{key}: {distance:.1e} from float32, theirs {allowed:.1e}"


def test_protenix_token_transformer():
    """Samples that share z, or bring their own; with their fused bias projection too."""
    theirs = peer("protenix.model.modules.transformer", "DiffusionTransformer")(
        c_a=C_S, c_s=C_S, c_z=C_Z, n_blocks=2, n_heads=4
    )
    inputs = [randn(3, N, C_S), randn(3, N, C_S, seed=2), randn(N, N, C_Z, seed=3)]
    for shape in ((1, N, N, C_Z), (3, N, N, C_Z)):
        report = check(theirs, inputs, lambda m, a, s, z, shape=shape: m(a, s, z.expand(shape)))
    assert report.counts() == {"attention_pair_bias": 2}
    fused = [*inputs[:2], randn(1, C_Z, N, N, seed=3)]
    check(theirs, fused, lambda m, a, s, z: m(a, s, z, enable_efficient_fusion=True))


def test_protenix_atom_windows_stay_theirs():
    theirs = peer("protenix.model.modules.transformer", "AtomTransformer")(
        c_atom=C_S, c_atompair=8, n_blocks=1, n_heads=4
    )
    with_tokens = nn.ModuleList([theirs, protenix_pairformer()])
    reasons = apply(with_tokens, OPS).reasons()
    assert "AttentionPairBias: windowed attention, for which there is no fused operator" in reasons


def test_openfold3_token_transformer():
    theirs = peer("openfold3.core.model.layers.diffusion_transformer", "DiffusionTransformer")(
        c_a=C_S, c_s=C_S, c_z=C_Z, c_hidden=C_S // 4, no_heads=4, no_blocks=2, n_transition=2,
        n_query=None, n_key=None, inf=1e9,
    )  # fmt: skip
    inputs = [randn(3, N, C_S), randn(3, N, C_S, seed=2), randn(N, N, C_Z, seed=3)]

    def call(m: nn.Module, a: Tensor, s: Tensor, z: Tensor) -> Tensor:
        return m(a[None], s[None], z[None, None], mask=TOKENS[None, None])[0][:, KEEP]

    assert check(theirs, inputs, call).counts() == {"attention_pair_bias": 2}


def test_boltz_layers_without_single_track():
    theirs = peer("boltz.model.layers.pairformer", "PairformerNoSeqModule")(
        C_Z, 2, pairwise_head_width=WIDTH, pairwise_num_heads=HEADS
    )

    def call(m: nn.Module, z: Tensor) -> Tensor:
        torch.manual_seed(0)
        return m(z[None], PAIRS[None])[0][KEEP][:, KEEP]

    assert check(theirs, PAIRFORMER[1:], call).counts()["gated_output"] == 2


@pytest.mark.parametrize(("part", "axes"), [("tri_att_start", 2), ("attention", 1)])
def test_boltz_hooks_on_attention_see_its_update(part, axes):
    """Not z with its update, nor z besides, which the layer takes from the module where nobody looks."""
    theirs = randomise(boltz_pairformer()).eval()
    patched = copy.deepcopy(theirs)
    apply(patched)
    seen: list[Tensor] = []
    for m in (theirs, patched):
        getattr(m.layers[0], part).register_forward_hook(
            lambda _m, _i, output: seen.append(output[0][KEEP][:, KEEP] if axes == 2 else output[0][KEEP])
        )
        with torch.no_grad():
            seeded(batched)(m, *PAIRFORMER)
    assert (seen[0] - seen[1]).abs().max() <= TOLERANCE * seen[0].abs().max()


def test_a_boltz_layer_of_other_parts_stays_as_it_is():
    theirs = boltz_pairformer()
    theirs.layers[0].extra = nn.Identity()
    report = apply(theirs)
    assert [(m.name, m.reason) for m in report.left] == [
        ("layers.0", "a layer of other parts than Boltz 2.2's: extra")
    ]


def test_boltz_token_transformers():
    """Boltz-2's, with one projection of z for all layers, and Boltz-1's, which caches its own."""
    samples, blocks, heads = 3, 2, 4
    second = peer("boltz.model.modules.transformersv2", "DiffusionTransformer")(blocks, heads, C_S, C_S)
    tokens = [randn(samples, N, C_S), randn(samples, N, C_S, seed=2)]
    mask = TOKENS.expand(samples, N)

    def call(m: nn.Module, a: Tensor, s: Tensor, bias: Tensor) -> Tensor:
        return m(a, s, bias[None], mask=mask, multiplicity=samples)[:, KEEP]

    report = check(second, [*tokens, randn(N, N, blocks * heads, seed=3)], call)
    assert report.counts() == {"attention_pair_bias": 2}
    first = peer("boltz.model.layers.attention", "AttentionPairBias")(C_S, C_Z, heads)

    def cached(m: nn.Module, a: Tensor, z: Tensor) -> Tensor:
        cache: dict[str, Tensor] = {}
        once = m(a, z[None], mask, multiplicity=samples, model_cache=cache)
        return (once + m(a, z[None] * 0, mask, multiplicity=samples, model_cache=cache))[:, KEEP]

    check(first, [tokens[0], randn(N, N, C_Z, seed=3)], cached)


def test_msa_modules_are_recognised():
    theirs = peer("protenix.model.modules.pairformer", "MSABlock")(
        c_m=C_Z, c_z=C_Z, c_hidden=4, is_last_block=False
    )
    report = apply(theirs, OPS)
    assert report.counts() == {"triangle_multiplication": 2, "triangle_attention": 2, "transition": 2}
    assert report.reasons().keys() == {
        "OuterProductMean: no fused operator for outer product mean",
        "MSAPairWeightedAveraging: no fused operator for pair-weighted averaging",
    }


def test_the_libraries_and_ours_together():
    """One model may hold modules of several origins."""
    both = nn.ModuleList([protenix_pairformer(), modules.Transition(C_Z, 4)])
    report = apply(both, OPS)
    assert {r.kind.partition(".")[0] for r in report.replaced} == {"protenix"}
    assert report.reasons() == {"Transition: already replaced": 1}


@pytest.mark.parametrize("name", ["boltz", "protenix", "openfold3"])
def test_layers_keep_their_inputs_on_the_host(name):
    """Checkpointed from outside with a store, patched layers of a peer give the gradients of layers that are not checkpointed."""
    build, call = PAIRFORMERS[name]
    plain = randomise(build()).train()
    apply(plain)
    moved = copy.deepcopy(plain)
    store = HostStore(torch.device("cpu"), least_bytes=N * N * C_Z * 4)
    layers = next(m for m in moved.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    checkpoint_units(layers.named_children(), store=store)
    found, expected = (run(stack, PAIRFORMER, seeded(call)) for stack in (moved, plain))
    assert_same(found, expected, 1e-6)
    assert store.facts == {"host_bytes": 2 * N * N * C_Z * 4, "left_on_device_bytes": 0}

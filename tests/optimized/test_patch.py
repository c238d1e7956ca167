"""`optimized.apply` on the baseline: what it replaces, what it leaves valid, and with what it can be combined."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import optimized
from baselines.af3.config import DiffusionConfig, MSAConfig, PairConfig, PairformerConfig, preset
from baselines.af3.diffusion import TokenBlock
from baselines.af3.model import AlphaFold3
from baselines.af3.msa import MSABlock
from baselines.af3.pairformer import PairBlock, PairformerBlock
from baselines.af3.primitives import Transition
from baselines.checkpointing import checkpoint_units
from baselines.compilation import compile_units
from megafold_bench.errors import UserError
from optimized import modules
from optimized.ops.support import Supported
from optimized.patch import apply
from optimized.recipes import OPS
from tests.optimized.drop_in import assert_same, definitions_on_the_cpu, randn, randomise, run  # noqa: F401

N, C_Z, C_S = 9, 16, 32
PAIR = PairConfig(triangle_hidden=16, attention_heads=2, attention_width=8, dropout=0.25)
INPUTS = [randn(N, C_S), randn(N, N, C_Z, seed=2)]
BLOCK_OPS = (
    "triangle_multiplication", "triangle_attention", "transition", "attention_pair_bias", "layer_norm_linear",
    "gated_output",
)  # fmt: skip
"""The operators of a Pairformer block."""
TOKEN_OPS = ("attention_pair_bias", "adaptive_layer_norm", "conditioned_transition")
"""Those of a block of the token transformer."""


def block(**pair) -> PairformerBlock:
    config = PairformerConfig(single_heads=4, pair=PairConfig(**{**vars(PAIR), **pair}))
    made = PairformerBlock(C_S, C_Z, config, "sdpa")
    randomise(made)
    return made


def call(m: nn.Module, s: torch.Tensor, z: torch.Tensor):
    torch.manual_seed(0)  # the dropout masks
    return m(s, z)


def test_package_exports_apply():
    assert optimized.apply is apply
    with pytest.raises(AttributeError, match="nothing"):
        _ = optimized.nothing


def test_whole_model():
    with torch.device("meta"):
        model = AlphaFold3(preset("af3"))
    names = [n for n, _ in model.named_parameters()]
    report = apply(model, OPS, "ieee")
    blocks = 48 + 4 + 2 + 4  # pairformer, MSA, template, confidence
    assert report.counts() == {
        "triangle_multiplication": 2 * blocks,
        "triangle_attention": 2 * blocks,
        "transition": blocks + 48 + 4 + 3 + 4,  # single tracks, MSA rows, diffusion conditioning
        "attention_pair_bias": 48 + 4 + 24 + 1,  # and how the token transformer makes its biases
        "layer_norm_linear": 48 + 4,  # the biases of token attention in the trunk
        "adaptive_layer_norm": 24 + 9 * 2,  # another in every conditioned transition is part of that
        "conditioned_transition": 24 + 9,
        "gated_output": blocks + 4,  # pair blocks and MSA blocks
        "outer_product_mean": 4,
        "pair_weighted_averaging": 3,
    }
    assert [n for n, _ in model.named_parameters()] == names
    assert report.reasons() == {
        "AtomAttention: no fused operator for windowed attention": 9,
    }
    assert "triangle_attention: 116 replaced" in str(report)


@pytest.mark.parametrize("op", BLOCK_OPS)
def test_each_operator_alone(op):
    expected = run(block(), INPUTS, call)
    patched = block()
    report = apply(patched, [op])
    assert report.counts().keys() == {op}
    assert all(r.reason.endswith("was not asked for") for r in report.left)
    assert_same(run(patched, INPUTS, call), expected, 2e-5)
    assert op in {key.partition(":")[0] for key in report.fallbacks.counts}


MSA_OPS = ("outer_product_mean", "pair_weighted_averaging", "gated_output")
"""Those that only a block of the MSA module has, and how its updates end."""


@pytest.mark.parametrize("ops", [*((op,) for op in MSA_OPS), MSA_OPS], ids=lambda ops: "+".join(ops))
@pytest.mark.parametrize("order", ["outer_first", "averaging_first"])
def test_msa_block(ops, order):
    config = MSAConfig(
        c_m=24, outer_hidden=8, averaging_heads=2, averaging_width=8, dropout=0.3, order=order, pair=PAIR
    )
    expected = randomise(MSABlock(C_Z, config, "sdpa"))
    patched = copy.deepcopy(expected)
    report = apply(patched, ops)
    assert report.counts().keys() == set(ops)
    mask = torch.arange(4 * N).view(4, N) % 5 != 1
    mask[:, 3] = False  # a token that no row has

    def run_block(m: nn.Module, msa: torch.Tensor, z: torch.Tensor):
        torch.manual_seed(0)
        return m(msa, z, mask)

    inputs = [randn(4, N, 24), randn(N, N, C_Z, seed=2)]
    assert_same(run(patched, inputs, run_block), run(expected, inputs, run_block), 2e-5)
    assert {key.partition(":")[0] for key in report.fallbacks.counts} >= set(ops)


@pytest.mark.parametrize("op", TOKEN_OPS)
def test_each_operator_of_a_token_block_alone(op):
    expected = TokenBlock(C_S, C_Z, DiffusionConfig(heads=4), "sdpa")
    randomise(expected)
    patched = copy.deepcopy(expected)
    report = apply(patched, [op])
    assert report.counts().keys() == {op}
    inputs = [randn(3, N, C_S), randn(3, N, C_Z, seed=2), randn(4, N, N, seed=3)]
    assert_same(run(patched, inputs, lambda m, *x: m(*x)), run(expected, inputs, lambda m, *x: m(*x)), 2e-5)
    assert op in {key.partition(":")[0] for key in report.fallbacks.counts}


def test_linear_layers_in_three_tf32_products():
    """Only those that no other operator stands for, and none without products of that kind."""
    expected = TokenBlock(64, 64, DiffusionConfig(heads=4), "sdpa")
    randomise(expected)
    patched = copy.deepcopy(expected)
    with pytest.raises(UserError, match="products"):
        apply(patched, ["linear"], "bf16x9")
    assert not apply(patched, ["linear"], "ieee").replaced
    report = apply(patched, ["linear", "conditioned_transition"], "tf32x3")
    replaced = {r.name for r in report.replaced if r.op == "linear"}
    assert {"attention.linear_q", "attention.linear_o", "attention.ada_ln.linear_shift"} <= replaced
    assert not any(name.startswith("transition.") for name in replaced)
    inputs = [randn(3, N, 64), randn(3, N, 64, seed=2), randn(4, N, N, seed=3)]
    assert_same(run(patched, inputs, lambda m, *x: m(*x)), run(expected, inputs, lambda m, *x: m(*x)), 2e-5)
    assert "linear" in {key.partition(":")[0] for key in report.fallbacks.counts}
    with torch.autocast("cpu", torch.bfloat16):
        before = dict(report.fallbacks.counts)
        patched.attention.linear_q(inputs[0])
    assert report.fallbacks.counts == before  # nothing to fall back from in another dtype


def test_dropout_and_residuals_are_the_blocks_own():
    expected, again = run(block(), INPUTS, call), block()
    apply(again, OPS)
    assert again.training
    assert_same(run(again, INPUTS, call), expected, 2e-5)


@pytest.mark.parametrize("ops", [("gated_output",), ("gated_output", "triangle_attention")])
@pytest.mark.parametrize("hooked", [False, True])
def test_updates_go_into_the_residual_with_the_same_dropout(ops, hooked):
    """With and without the attention operator whose end is fused; a hook sees the update either way."""
    seen: dict[bool, torch.Tensor] = {}

    def once(patch: bool) -> dict[str, torch.Tensor]:
        made = block()
        if patch:
            apply(made, ops)
        if hooked:
            made.pair.tri_att_end.register_forward_hook(lambda m, x, y: seen.__setitem__(patch, y.detach()))
        return run(made, INPUTS, call)

    assert_same(once(True), once(False), 2e-5)
    if hooked:
        torch.testing.assert_close(seen[True], seen[False], rtol=1e-4, atol=1e-5)


def test_parameters_state_and_optimiser_stay():
    patched = block()
    optimiser = torch.optim.Adam(patched.parameters())
    parameters, state = dict(patched.named_parameters()), copy.deepcopy(patched.state_dict())
    report = apply(patched, OPS)
    assert all(p is parameters[n] for n, p in patched.named_parameters())
    assert patched.state_dict().keys() == state.keys()
    assert isinstance(patched.single_transition, Transition)
    before = patched.pair.tri_att_end.linear_q.weight.detach().clone()
    run(patched, INPUTS, call)
    optimiser.step()
    assert not torch.equal(patched.pair.tri_att_end.linear_q.weight, before)
    fresh = block()
    fresh.load_state_dict(patched.state_dict(), strict=True)
    assert_same(run(fresh, INPUTS, call), run(patched, INPUTS, call), 2e-5)
    report.undo()
    assert type(patched.single_transition) is Transition
    assert all("fallbacks" not in vars(m) for m in patched.modules())
    assert_same(run(patched, INPUTS, call), run(fresh, INPUTS, call), 0.0)


def test_applying_in_two_parts():
    patched = block()
    apply(patched, ["transition"])
    second = apply(patched, OPS)
    assert second.counts().keys() == set(BLOCK_OPS) - {"transition"}
    assert "Transition: already replaced" in second.reasons()


def test_copies():
    patched = block()
    apply(patched, OPS)
    for other in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        assert isinstance(other.pair.tri_mul_in, modules.TriangleMultiplication)
        assert_same(run(other, INPUTS, call), run(patched, INPUTS, call), 0.0)
    stream = io.BytesIO()
    torch.save(patched.state_dict(), stream)
    stream.seek(0)
    block().load_state_dict(torch.load(stream, weights_only=True), strict=True)


@pytest.mark.parametrize("first", [True, False], ids=["patched-first", "checkpointed-first"])
def test_with_checkpointing(first):
    expected, patched = run(block(), INPUTS, call), block()
    if first:
        apply(patched, OPS)
    checkpoint_units([("block", patched)])
    if not first:
        apply(patched, OPS)
    assert_same(run(patched, INPUTS, call), expected, 2e-5)


@pytest.mark.parametrize("first", [True, False], ids=["patched-first", "compiled-first"])
def test_with_compilation(first, monkeypatch):
    """Whole blocks compile without a graph break; the reason for the definition is noted while tracing."""
    torch._dynamo.reset()
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, backend="aot_eager", **options))
    expected, patched = run(block(dropout=0.0), INPUTS, call), block(dropout=0.0)
    if first:
        report = apply(patched, OPS)
    compile_units([("block", patched)])
    if not first:
        run(patched, INPUTS, call)
        report = apply(patched, OPS)
    assert_same(run(patched, INPUTS, call), expected, 2e-5)
    assert {key.partition(":")[0] for key in report.fallbacks.counts} >= set(BLOCK_OPS)


def test_what_does_not_fit_is_left():
    odd = block(attention_width=12)
    report = apply(odd, OPS)
    assert "triangle_attention" not in report.counts()
    assert "TriangleAttention: head size 12 is not one of 8, 16, 24, 32, 48, 64" in report.reasons()
    wide = Transition(768, 2)
    assert apply(wide, OPS).reasons() == {"Transition: 768 channels; the kernels hold at most 512": 1}


def test_replaced_forwards_are_left():
    class Louder(Transition):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    assert apply(Louder(C_Z, 4)).reasons() == {"Transition: Louder has a forward of its own": 1}
    wrapped = Transition(C_Z, 4)
    wrapped.forward = wrapped.forward
    (reason,) = apply(wrapped, ["transition"]).reasons()
    assert "on the instance" in reason


def test_subclasses_without_a_forward_are_replaced():
    class Named(Transition):
        """As wrappers that add behaviour by subclassing do."""

        note = "kept"

    named, plain = Named(C_Z, 4), Transition(C_Z, 4)
    randomise(named)
    plain.load_state_dict(named.state_dict())
    assert apply(named, OPS).counts() == {"transition": 1}
    assert isinstance(named, Named) and isinstance(named, modules.Transition) and named.note == "kept"
    inputs = [randn(N, C_Z)]
    assert_same(run(named, inputs, lambda m, x: m(x)), run(plain, inputs, lambda m, x: m(x)), 2e-5)


def test_products_reach_the_attention(monkeypatch):
    seen = set()

    def attention(q, k, v, bias, mask=None, scale=None, precision="ieee"):
        seen.add(precision)
        return torch.zeros_like(q)

    monkeypatch.setattr("optimized.forwards.attention_op.attention", attention)
    patched = block()
    report = apply(patched, products="tf32x3")
    call(patched, *INPUTS)
    assert seen == {"tf32x3"}
    report.undo()
    assert not any("products" in vars(part) for part in patched.modules())


def test_errors_of_the_user():
    with pytest.raises(UserError, match="unknown operator 'softmax': choose from triangle_multiplication"):
        apply(block(), ["softmax"])
    with pytest.raises(UserError, match="unknown kind of products 'bf16': choose from ieee, tf32x3, tf32"):
        apply(block(), products="bf16")
    with pytest.raises(UserError, match="Linear has no module"):
        apply(nn.Linear(2, 2))


def test_pair_block_of_the_template_embedder():
    """Width 64 and a hidden width of its own."""
    config = PairConfig(
        triangle_hidden=64, attention_heads=4, attention_width=16, transition_n=2, dropout=0.0
    )
    expected = randomise(PairBlock(64, config, "sdpa"))
    patched = copy.deepcopy(expected)
    assert apply(patched, OPS).counts() == {
        "triangle_multiplication": 2,
        "triangle_attention": 2,
        "transition": 1,
        "gated_output": 1,
    }
    inputs = [randn(5, 5, 64)]
    assert_same(run(patched, inputs, lambda m, z: m(z)), run(expected, inputs, lambda m, z: m(z)), 2e-5)


def kept_bytes(module: nn.Module, n: int) -> int:
    """Bytes a bf16 step keeps for its backward pass, parameters apart; nothing is computed."""
    kept: dict[int, torch.UntypedStorage] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        if isinstance(x, FakeTensor):
            kept[id(x.untyped_storage())] = x.untyped_storage()
        return x

    with FakeTensorMode(allow_non_fake_inputs=True):
        s = torch.empty(n, C_S, requires_grad=True)
        z = torch.empty(n, n, C_Z, dtype=torch.bfloat16, requires_grad=True)
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda x: x),
            torch.autocast("cpu", torch.bfloat16),
        ):
            out = module(s, z)
        assert [(o.shape, o.dtype) for o in out] == [(s.shape, s.dtype), (z.shape, z.dtype)]
        sum(o.float().sum() for o in out).backward()
        assert z.grad is not None and z.grad.shape == z.shape
    return sum(storage.nbytes() for storage in kept.values())


def test_shapes_and_memory_without_computing(monkeypatch):
    """With the kernels' fake implementations, as memory prediction runs them."""
    pretend_kernels(monkeypatch)
    patched = block(dropout=0.0)
    report = apply(patched, OPS)
    assert kept_bytes(patched, 64) < 0.4 * kept_bytes(block(dropout=0.0), 64)
    assert not report.fallbacks.counts


def operators_in_the_graph(module: nn.Module, *inputs: torch.Tensor) -> list[str]:
    """The operators `torch.compile` sees in a module, in order; a graph break is an error."""
    torch._dynamo.reset()
    nodes: list[str] = []

    def record(graph: torch.fx.GraphModule, _: list[torch.Tensor]):
        nodes.extend(str(n.target) for n in graph.graph.nodes if "megafold_bench" in str(n.target))
        return lambda *tensors: [
            n.meta["example_value"] for n in graph.graph.find_nodes(op="output")[0].args[0]
        ]

    compiled = torch.compile(type(module).forward, backend=record, fullgraph=True, dynamic=False)
    compiled(module, *inputs)
    return [n.removeprefix("megafold_bench.").removesuffix(".default") for n in nodes]


def test_a_patched_block_is_one_graph_of_operators(monkeypatch):
    """As `torch.compile` sees it where the kernels apply: no graph break, and every operator as a node."""
    pretend_kernels(monkeypatch)
    patched = block(dropout=0.0)
    apply(patched, OPS)
    assert operators_in_the_graph(patched, *INPUTS, torch.arange(N) < N - 2) == [
        *["triangle_multiplication"] * 2,
        *["triangle_attention"] * 2,
        "transition",
        "layer_norm_linear",
        "pair_attention",
        "gated_output",
        "transition",
    ]


def test_token_and_msa_blocks_are_one_graph_of_operators(monkeypatch):
    pretend_kernels(monkeypatch)
    token = TokenBlock(C_S, C_Z, DiffusionConfig(heads=4), "sdpa")
    apply(token, OPS)
    inputs = [randn(3, N, C_S), randn(3, N, C_Z), randn(4, N, N)]
    assert operators_in_the_graph(token, *inputs) == [
        "adaptive_layer_norm", "pair_attention", "conditioned_output", "conditioned_transition",
    ]  # fmt: skip
    config = MSAConfig(
        c_m=24, outer_hidden=8, averaging_heads=2, averaging_width=8, pair=replace(PAIR, dropout=0.0)
    )
    msa = MSABlock(C_Z, config, "sdpa")
    apply(msa, ["outer_product_mean", "pair_weighted_averaging", "gated_output", "transition"])
    rows = torch.ones(4, N, dtype=torch.bool)
    assert operators_in_the_graph(msa, randn(4, N, 24), randn(N, N, C_Z), rows) == [
        *["layer_norm_linear", "projected_outer"],
        *["layer_norm_linear"] * 2,
        *["weighted_average", "gated_output", "transition"],
        *["add_update"] * 4,
        "transition",
    ]


def pretend_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the operators choose their kernels, which nothing here runs."""
    for op in (
        "attention.operator",
        "transition.op",
        "triangle_multiplication.op",
        "triangle_attention.op",
        "layer_norm_linear.op",
        "gated_output.op",
        "gated_output.conditioned",
        "adaptive_layer_norm.op",
        "conditioned_transition.op",
        "outer_product_mean.op",
        "pair_weighted_averaging.op",
    ):
        monkeypatch.setattr(f"optimized.ops.{op}.triton_support", lambda *tensors: Supported(True))

"""`megafold` against `pytorch`: the same loss and the same gradient in every parameter."""

import json

import pytest
import torch

from baselines.af3.model import perturb_zero_parameters
from baselines.systems import PYTORCH, PyTorchVariant
from baselines.workload import FixedCropWorkload
from megafold_bench.errors import UserError
from megafold_bench.variants import Variant
from optimized.recipes import DEFAULT_OPS, OPS, Fused
from optimized.variant import GRAPHED_TOKENS, MEGAFOLD
from tests.optimized.drop_in import definitions_on_the_cpu  # noqa: F401

TINY = {"preset": "tiny", "precision": "fp32", "stage": "all"}
TOKENS = 16


def build(variant: PyTorchVariant, **options) -> FixedCropWorkload:
    factors = variant.resolve({**TINY, **options}, TOKENS)
    workload = variant.build(factors, TOKENS, 0, "cpu")
    perturb_zero_parameters(workload.session.model, std=0.1)
    return workload


def losses_and_gradients(workload: FixedCropWorkload) -> tuple[dict, dict]:
    losses = workload.session.backward(workload.features, 0)
    return losses, {n: p.grad for n, p in workload.session.model.named_parameters()}


@pytest.fixture(scope="module")
def reference() -> tuple[dict, dict]:
    return losses_and_gradients(build(PYTORCH))


@pytest.mark.parametrize("checkpointing", ["none", "block", "reentrant"])
def test_loss_and_every_gradient(reference, checkpointing):
    losses, gradients = reference
    found_losses, found = losses_and_gradients(build(MEGAFOLD, checkpointing=checkpointing, ops="all"))
    assert found_losses.keys() == losses.keys()
    for name, value in losses.items():
        assert torch.allclose(found_losses[name], value, rtol=1e-5, atol=1e-6), name
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        if gradient is None:
            assert found[name] is None, name
        elif name.endswith((".pair_bias.layer_norm.bias", "averaging.layer_norm_z.bias")):
            # Shifts all logits of a row, which has no effect.
            assert max(gradient.norm(), found[name].norm()) < 1e-6, name
        else:
            assert gradient.norm() > 0, name
            assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_trains_on():
    workload = build(MEGAFOLD)
    first = workload.session.backward(workload.features, 0)
    for _ in range(5):
        workload.step(workload.load())
    assert workload.session.backward(workload.features, 0)["loss"] < first["loss"]


def test_facts_tell_what_was_replaced_and_what_fell_back():
    workload = build(MEGAFOLD, ops="transition,triangle_attention")
    before = dict(workload.facts)
    assert before["fused_operators"]["replaced"].keys() == {"transition", "triangle_attention"}
    assert not before["fused_operators"]["fallbacks"]
    workload.step(workload.load())
    fallbacks = before["fused_operators"]["fallbacks"]
    assert {key.partition(":")[0] for key in fallbacks} == {"transition", "triangle_attention"}
    json.dumps(before)


def test_contract_and_options():
    assert isinstance(MEGAFOLD, Variant)
    assert "definitions" in MEGAFOLD.support("cpu").reason
    if not torch.cuda.is_available():
        assert "no CUDA" in MEGAFOLD.support("cuda").reason
    assert MEGAFOLD.resolve(TINY, TOKENS)["ops"] == ",".join(op for op in OPS if op in DEFAULT_OPS)
    assert MEGAFOLD.resolve({**TINY, "ops": "all"}, TOKENS)["ops"] == "all"
    assert MEGAFOLD.resolve({**TINY, "ops": ",".join(reversed(OPS))}, TOKENS)["ops"] == "all"
    chosen = MEGAFOLD.resolve({**TINY, "ops": "transition, triangle_attention"}, TOKENS)
    assert chosen["ops"] == "triangle_attention,transition"
    assert chosen["compile"] is False
    own = ("ops", "compile", "products", "graphs")
    assert {k: v for k, v in chosen.items() if k not in own} == PYTORCH.resolve(TINY, TOKENS)
    assert MEGAFOLD.resolve({**TINY, "compile": "true"}, TOKENS)["compile"] is True
    assert chosen["products"] == "tf32x3"
    with pytest.raises(UserError, match="products='bf16' is unknown: choose from ieee, tf32x3, tf32"):
        MEGAFOLD.resolve({**TINY, "products": "bf16"}, TOKENS)
    with pytest.raises(UserError, match="unknown operator 'softmax'"):
        MEGAFOLD.resolve({**TINY, "ops": "softmax"}, TOKENS)


def test_graphs_where_a_cuda_device_waits_for_the_host(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    graphs = lambda tokens, **options: MEGAFOLD.resolve({**TINY, **options}, tokens).get("graphs", False)  # noqa: E731
    assert graphs(GRAPHED_TOKENS) and not graphs(GRAPHED_TOKENS + 1)
    assert graphs(GRAPHED_TOKENS + 1, graphs="true") and not graphs(GRAPHED_TOKENS, graphs="false")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not graphs(GRAPHED_TOKENS)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not graphs(GRAPHED_TOKENS)


def test_compiled_blocks_are_patched_blocks():
    """What compiles is tested with the blocks themselves; here, that both happen to every block."""
    model = build(MEGAFOLD, compile=True).session.model
    for name, unit in model.checkpoint_units():
        assert "forward" in vars(unit), name
    assert isinstance(model.pairformer.blocks[0].pair.tri_att_end, Fused)

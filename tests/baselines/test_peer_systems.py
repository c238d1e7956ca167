"""The peer variants against `pytorch`: same loss, same gradient in every parameter, whole model, CPU."""

import dataclasses
import json
import sys
import tomllib
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch

from baselines import systems, workload
from baselines.af3.config import AF3Config, PairConfig, preset
from baselines.af3.model import perturb_zero_parameters
from baselines.systems import CUEQUIVARIANCE, FLEX, PYTORCH, TRIFAST, PeerVariant, PyTorchVariant
from baselines.workload import FixedCropWorkload
from megafold_bench.errors import UserError
from megafold_bench.outcomes import UnsupportedError
from megafold_bench.variants import Variant
from tests.baselines.peer_fixtures import INSTALL, PEERS

VARIANTS: dict[str, PeerVariant] = {v.name: v for v in (FLEX, CUEQUIVARIANCE, TRIFAST)}
TINY = MappingProxyType(
    {"preset": "tiny", "precision": "fp32", "stage": "all", "cycles": 1, "rollout_steps": 1, "templates": 1}
)
TOKENS = 16


def wide(name: str) -> AF3Config:
    """The tiny preset, wide enough for every operator: 16 channels per head, 32 hidden ones."""
    tiny = preset(name)
    pair = PairConfig(triangle_hidden=32, attention_heads=2, attention_width=16)
    former = dataclasses.replace(tiny.pairformer, blocks=1, single_heads=2, pair=pair)
    calm = dataclasses.replace(former, pair=dataclasses.replace(pair, dropout=0.0))
    return dataclasses.replace(
        tiny,
        c_z=32,
        template=dataclasses.replace(tiny.template, c=32, pair=pair),
        msa=dataclasses.replace(tiny.msa, blocks=1, pair=pair),
        pairformer=former,
        diffusion=dataclasses.replace(tiny.diffusion, heads=2),
        confidence=dataclasses.replace(tiny.confidence, pairformer=calm),
    )


@pytest.fixture
def wide_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baselines.workload.preset", wide)


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything of torch.compile but the code generator, which takes minutes on a CPU."""
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile_(f, **{"backend": "aot_eager", **kw}))


def build(variant: PyTorchVariant, **options: Any) -> FixedCropWorkload:
    workload = variant.build(variant.resolve({**TINY, **options}, TOKENS), TOKENS, 0, "cpu")
    perturb_zero_parameters(workload.session.model, std=0.1)
    return workload


def losses_and_gradients(workload: FixedCropWorkload) -> tuple[dict, dict]:
    with workload.around_step():
        losses = workload.session.backward(workload.features, 0)
    return losses, {n: p.grad for n, p in workload.session.model.named_parameters()}


def assert_same(found: tuple[dict, dict], expected: tuple[dict, dict]) -> None:
    assert found[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        assert torch.allclose(found[0][name], value, rtol=1e-4, atol=1e-5), name
    assert found[1].keys() == expected[1].keys()
    largest = max(g.norm() for g in expected[1].values() if g is not None)
    for name, gradient in expected[1].items():
        if gradient is None:
            assert found[1][name] is None, name
        else:
            difference = (found[1][name] - gradient).norm()
            assert difference <= 1e-3 * gradient.norm() + 1e-6 * largest, name


@cache
def expected(widened: bool) -> tuple[dict, dict]:
    """What `pytorch` finds; `widened` as the test's configuration is."""
    assert preset("tiny").c_z == 16 and (workload.preset is wide) == widened
    return losses_and_gradients(build(PYTORCH))


EXPECTED = {
    "flex": {"triangle_attention": 8, "attention_pair_bias": 4},
    "trifast": {"triangle_attention": 8},
    "cuequivariance": {"triangle_attention": 8, "triangle_multiplication": 8},
}


@pytest.mark.usefixtures("wide_model", "traced_only")
@pytest.mark.parametrize(("name", "install"), PEERS)
def test_loss_and_every_gradient(name, install, monkeypatch):
    """Without `compile`: of flex, the operator alone is compiled then."""
    install(monkeypatch)
    session = build(VARIANTS[name], compile=False, checkpointing="none")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert_same(losses_and_gradients(session), expected(widened=True))
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > before) == (name == "flex")
    operators = session.facts["peer_operators"]
    assert operators["replaced"] == EXPECTED[name]
    assert not operators["fallbacks"]
    json.dumps(dict(session.facts))


@pytest.mark.usefixtures("wide_model", "traced_only")
@pytest.mark.parametrize(("name", "install"), INSTALL.items())
def test_blocks_compile_whole_around_the_operators(name, install, monkeypatch):
    install(monkeypatch)
    session = build(VARIANTS[name], checkpointing="block")
    for unit_name, unit in session.session.model.checkpoint_units():
        assert "forward" in vars(unit), unit_name
    assert_same(losses_and_gradients(session), expected(widened=True))
    assert not session.facts["peer_operators"]["fallbacks"]


@pytest.mark.usefixtures("wide_model", "traced_only")
def test_cuequivariance_between_graphs(monkeypatch):
    INSTALL["cuequivariance"](monkeypatch)
    session = build(CUEQUIVARIANCE, checkpointing="block", graph_breaks=True)
    assert_same(losses_and_gradients(session), expected(widened=True))
    assert not session.facts["peer_operators"]["fallbacks"]


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("name", VARIANTS)
def test_what_an_operator_does_not_take_is_in_the_record(name, monkeypatch):
    """The tiny preset has heads of 8 channels and 16 or 8 hidden ones."""
    INSTALL[name](monkeypatch)
    session = build(VARIANTS[name], compile=False)
    assert_same(losses_and_gradients(session), expected(widened=False))
    reasons = {
        "flex": {
            "triangle_attention: heads have at least 16 channels, not 8",
            "attention_pair_bias: heads have at least 16 channels, not 8",
        },
        "trifast": {"triangle_attention: head sizes are powers of two from 16, not 8"},
        "cuequivariance": {
            "triangle_multiplication: channels are multiples of 32, not 16",
            "triangle_multiplication: channels are multiples of 32, not 8",
        },
    }
    assert set(session.facts["peer_operators"]["fallbacks"]) == reasons[name]


def test_contract_and_options():
    for variant in VARIANTS.values():
        assert isinstance(variant, Variant)
        factors = variant.resolve(TINY, TOKENS)
        own = dict(variant.flags)
        assert factors["compile"] is True
        assert {k: v for k, v in factors.items() if k not in own} == PYTORCH.resolve(TINY, TOKENS)
        assert variant.resolve({**TINY, "compile": "false"}, TOKENS)["compile"] is False
        with pytest.raises(UserError, match="compile='maybe'"):
            variant.resolve({**TINY, "compile": "maybe"}, TOKENS)
    assert CUEQUIVARIANCE.resolve(TINY, TOKENS)["graph_breaks"] is False
    with pytest.raises(UserError, match="unknown option 'graph_breaks'"):
        FLEX.resolve({**TINY, "graph_breaks": True}, TOKENS)


def test_support_says_why(monkeypatch):
    for name, variant in VARIANTS.items():
        assert variant.support("cpu").reason == f"{name} trains on a GPU only, not on cpu"
        if not torch.cuda.is_available():
            assert "no CUDA" in variant.support("cuda").reason
    installed = {"triton"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda="12.8", hip=None))
    monkeypatch.setattr(systems, "find_spec", lambda name: name if name in installed else None)
    assert FLEX.support("cuda").usable
    assert TRIFAST.support("cuda").reason == "not installed: trifast; install with: pip install trifast"
    both = "cuequivariance-torch cuequivariance-ops-torch-cu12"
    assert CUEQUIVARIANCE.support("cuda").reason.endswith(f"pip install {both}")
    installed |= {"trifast", "cuequivariance_torch"}
    assert TRIFAST.support("cuda").usable
    assert CUEQUIVARIANCE.support("cuda").reason == (
        "not installed: cuequivariance-ops-torch-cu12; install with: pip install cuequivariance-ops-torch-cu12"
    )
    installed.add("cuequivariance_ops_torch")
    assert CUEQUIVARIANCE.support("cuda").usable
    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda=None, hip="6.4"))
    assert "NVIDIA GPUs only" in CUEQUIVARIANCE.support("cuda").reason
    assert TRIFAST.support("cuda").usable


def test_a_package_that_does_not_load_is_unsupported(monkeypatch):
    monkeypatch.setitem(sys.modules, "trifast", None)
    with pytest.raises(UnsupportedError, match="not installed"):
        build(TRIFAST)
    INSTALL["cuequivariance"](monkeypatch)
    monkeypatch.setitem(sys.modules, "cuequivariance_ops_torch", None)
    with pytest.raises(UnsupportedError, match="not installed"):
        build(CUEQUIVARIANCE)


def test_registered():
    """The entry points of this checkout, installed or not, name these variants."""
    project = tomllib.loads((Path(systems.__file__).parents[1] / "pyproject.toml").read_text())
    points = project["project"]["entry-points"]["megafold_bench.variants"]
    for name, variant in VARIANTS.items():
        assert EntryPoint(name, points[name], "megafold_bench.variants").load() is variant

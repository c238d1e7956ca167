"""The peer variants on a GPU: losses and every gradient of one step agree with `pytorch`, compiled and not.

In float32 to rounding. In bf16 both are compared with float32: a peer may not be much further from it than the
baseline's own operators.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.af3.config import AF3Config
from baselines.af3.model import perturb_zero_parameters
from baselines.systems import CUEQUIVARIANCE, FLEX, PYTORCH, TRIFAST, PyTorchVariant
from baselines.workload import FixedCropWorkload
from tests.baselines.test_peer_systems import EXPECTED, wide
from tests.optimized.drop_in import SHIFTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device is visible to torch"),
]
VARIANTS = {variant.name: variant for variant in (FLEX, CUEQUIVARIANCE, TRIFAST)}
OPTIONS = {"preset": "tiny", "stage": "all", "cycles": 1, "rollout_steps": 1, "templates": 1}
TOKENS = 64
MEDIAN_MARGIN = 1.2
"""How much further from float32 than the baseline's the median gradient may be."""


def calm(name: str) -> AF3Config:
    """Widths that every operator takes, and no dropout: compiled code draws other masks."""
    config = wide(name)
    still = {
        part: dataclasses.replace(
            getattr(config, part), pair=dataclasses.replace(getattr(config, part).pair, dropout=0.0)
        )
        for part in ("template", "msa", "pairformer")
    }
    return dataclasses.replace(config, **{**still, "msa": dataclasses.replace(still["msa"], dropout=0.0)})


@pytest.fixture(autouse=True)
def _wide_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baselines.workload.preset", calm)


def step(variant: PyTorchVariant, precision: str, **options: Any) -> tuple[dict, dict, FixedCropWorkload]:
    """Losses and gradients of one step, blocks checkpointed."""
    torch._dynamo.reset()
    wanted = {**OPTIONS, "checkpointing": "block", "precision": precision, **options}
    workload = variant.build(variant.resolve(wanted, TOKENS), TOKENS, 0, "cuda")
    model = workload.session.model
    perturb_zero_parameters(model, std=0.1)
    with workload.around_step():
        losses = workload.session.backward(workload.features, 0)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    return losses, gradients, workload


def usable(name: str) -> PyTorchVariant:
    """The variant; the test is skipped with its own reason where it cannot run."""
    support = VARIANTS[name].support("cuda")
    if not support.usable:
        pytest.skip(support.reason)
    return VARIANTS[name]


COMPILED = pytest.mark.parametrize("compiled", [False, True])


@COMPILED
@pytest.mark.parametrize("name", VARIANTS)
def test_step_in_float32(name, compiled):
    losses, gradients, _ = step(PYTORCH, "fp32")
    found_losses, found, workload = step(usable(name), "fp32", compile=compiled)
    for loss, value in losses.items():
        assert torch.allclose(found_losses[loss], value, rtol=1e-3, atol=1e-4), loss
    assert found.keys() == gradients.keys()
    largest = max(g.norm() for g in gradients.values())
    for parameter, value in gradients.items():
        assert (found[parameter] - value).norm() <= 5e-3 * value.norm() + 1e-6 * largest, parameter
    operators = workload.facts["peer_operators"]
    assert operators["replaced"] == EXPECTED[name]
    assert not operators["fallbacks"]


@COMPILED
@pytest.mark.parametrize("name", VARIANTS)
def test_step_in_bf16(name, compiled):
    """The median over all gradients, because small ones scatter; and the losses."""
    variant = usable(name)
    losses, exact, _ = step(PYTORCH, "fp32")
    theirs_losses, theirs, _ = step(PYTORCH, "bf16-diffusion")
    found_losses, found, workload = step(variant, "bf16-diffusion", compile=compiled)
    assert found.keys() == theirs.keys() == exact.keys()

    def distance(gradients: dict[str, Tensor]) -> Tensor:
        errors = [(gradients[n] - g).norm() / g.norm() for n, g in exact.items() if not SHIFTS.search(n)]
        return torch.stack(errors).median()

    assert distance(found) <= MEDIAN_MARGIN * distance(theirs)
    for loss, value in losses.items():
        allowed = 2 * (theirs_losses[loss] - value).abs() + 2e-2 * value.abs() + 1e-4
        assert (found_losses[loss] - value).abs() <= allowed, loss
    assert not workload.facts["peer_operators"]["fallbacks"]


def test_cuequivariance_between_graphs():
    variant = usable("cuequivariance")
    losses, _, _ = step(PYTORCH, "fp32")
    found, _, workload = step(variant, "fp32", graph_breaks=True)
    for loss, value in losses.items():
        assert torch.allclose(found[loss], value, rtol=1e-3, atol=1e-4), loss
    assert not workload.facts["peer_operators"]["fallbacks"]


def test_a_step_of_training():
    """The optimiser steps too, and what was compiled for the first step serves the second."""
    variant = usable("flex")
    workload = variant.build(variant.resolve({**OPTIONS, "precision": "bf16"}, TOKENS), TOKENS, 0, "cuda")
    batch = workload.load()
    workload.step(batch)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.isfinite(workload.step(batch)["loss"])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs

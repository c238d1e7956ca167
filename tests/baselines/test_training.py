"""The whole step on the tiny model: exactness, coverage, and that it learns."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from baselines.af3.config import preset
from baselines.af3.model import AlphaFold3
from baselines.losses.labels import own_labels
from baselines.losses.weights import STAGES
from baselines.optim import OptimizerConfig
from baselines.precision import POLICIES
from baselines.randomness import derived_seed
from baselines.replay import Repeated
from baselines.training import TrainingConfig, TrainingSession, noise_samples
from tests.baselines.samples import make_features

CPU = torch.device("cpu")
CONFIG = TrainingConfig(
    diffusion_samples=3,
    diffusion_chunk=2,
    rollout_steps=2,
    msa_rows=4,
    precision=POLICIES["fp32"],
    checkpointing="none",
    weights=STAGES["all"],
)
PARTS = {"distogram", "mse", "bond", "smooth_lddt", "diffusion", "plddt", "pde", "resolved", "pae", "loss"}


def make_session(
    config: TrainingConfig = CONFIG,
    perturb: float = 0.02,
    seed: int = 1,
    device: torch.device = CPU,
    attention: str = "sdpa",
) -> TrainingSession:
    torch.manual_seed(0)
    model = AlphaFold3(replace(preset("tiny"), attention=attention))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * perturb)
    return TrainingSession(model, config, device, seed)


def gradients(session: TrainingSession) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in session.model.named_parameters()}


ROUNDING = 1e-9
"""What is left of gradients that are zero: of a bias, say, that shifts all logits of a row."""


def assert_same_gradients(a: TrainingSession, b: TrainingSession, tolerance: float) -> None:
    for (name, g), h in zip(gradients(a).items(), gradients(b).values(), strict=True):
        if max(g.abs().max(), h.abs().max()) < ROUNDING:
            continue
        scale = g.abs().max().clamp(min=1e-6)
        assert (g - h).abs().max() <= tolerance * scale, name


def test_every_parameter_learns():
    session = make_session()
    losses = session.backward(make_features(), 0)
    assert set(losses) == PARTS
    assert all(torch.isfinite(value) and value.ndim == 0 for value in losses.values())
    assert not any(value.requires_grad for value in losses.values())
    without = [name for name, g in gradients(session).items() if g is None or not g.any()]
    assert without == []


@pytest.mark.parametrize(("mode", "attention"), [("block", "sdpa"), ("reentrant", "softmax")])
def test_checkpointing_changes_nothing(mode, attention):
    """Of its own attention PyTorch takes another kernel without gradient, as reentrant checkpointing runs first. That also
    adds the gradients of what several blocks read in another order."""
    plain, wrapped = (
        make_session(replace(CONFIG, checkpointing=which), attention=attention) for which in ("none", mode)
    )
    features = make_features()
    a, b = plain.backward(features, 0), wrapped.backward(features, 0)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert_same_gradients(plain, wrapped, 1e-6 if mode == "block" else 1e-5)


@pytest.mark.parametrize("checkpointing", ["none", "block", "reentrant"])
def test_chunks_share_no_accumulators(checkpointing, monkeypatch):
    """Where gradients arrive is made anew in every chunk: a CUDA graph cannot record what exists before it.

    Here the conditioning keeps the trunk's outputs, as checkpointing in PyTorch 2.11 does with its inputs.
    """
    met: list[bool] = []
    session = make_session(replace(CONFIG, checkpointing=checkpointing))
    condition, kept = session._condition, []

    def keeping(features, s_inputs, s, z):
        kept.extend((s_inputs * 1, s * 1, z * 1))
        return condition(features, s_inputs, s, z)

    monkeypatch.setattr(session, "_condition", keeping)
    called = Repeated.__call__

    def call(self, *inputs):
        result = called(self, *inputs)
        if self._plain is not None and self._plain.requires_grad:
            met.append(any(node.metadata.get("met") for node in accumulators(self._plain)))
            for node in accumulators(self._plain):
                node.metadata["met"] = True
        return result

    monkeypatch.setattr(Repeated, "__call__", call)
    session.backward(make_features(), 0)
    assert met == [False, False] and kept


def accumulators(x: torch.Tensor) -> list:
    """The nodes at which the gradients of `x` arrive."""
    seen, left = set(), [x.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
    return [node for node in seen if node.name() == "torch::autograd::AccumulateGrad"]


def test_chunk_size_changes_nothing():
    features = make_features()
    chunked, whole = make_session(), make_session(replace(CONFIG, diffusion_chunk=3))
    a, b = chunked.backward(features, 0), whole.backward(features, 0)
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=2e-5), name
    assert_same_gradients(chunked, whole, 1e-3)


def test_gradient_is_the_slope_of_the_loss():
    """The pieces of backward add up: the slope along a trunk parameter's gradient, by finite differences."""
    session = make_session(replace(CONFIG, cycles=1))
    session.backward(make_features(), 0)
    trunk = [
        p for n, p in session.model.named_parameters() if not n.startswith(("diffusion", "confidence_head"))
    ]
    parameter = max(trunk, key=lambda p: p.grad.norm().item())
    slope = parameter.grad.norm().item()
    direction = parameter.grad / slope
    step = 1e-2
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(direction, alpha=sign * step)
        values.append(session.backward(make_features(), 0)["loss"].item())
        with torch.no_grad():
            parameter.sub_(direction, alpha=sign * step)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=0.1)


@pytest.mark.parametrize("name", ["bf16", "bf16-diffusion"])
def test_bf16_is_close(name: str):
    features = make_features()
    exact, rounded = make_session(), make_session(replace(CONFIG, precision=POLICIES[name]))
    a, b = exact.backward(features, 0), rounded.backward(features, 0)
    assert not torch.equal(a["distogram"], b["distogram"])
    for part in ("distogram", "smooth_lddt", "plddt", "pae"):
        assert torch.allclose(a[part], b[part], rtol=0.05), part
    without = [n for n, g in gradients(rounded).items() if g is None or not g.any()]
    assert without == []
    assert all(p.grad.dtype == torch.float32 for p in rounded.model.parameters())


def test_last_stage_trains_the_confidence_head_only():
    session = make_session(replace(CONFIG, weights=STAGES["finetune3"]))
    losses = session.backward(make_features(), 0)
    assert "mse" not in losses
    trained = {name.split(".")[0] for name, g in gradients(session).items() if g is not None and g.any()}
    assert trained == {"confidence_head"}


def test_more_cycles_use_the_previous_ones():
    features = make_features()
    once, thrice = make_session(replace(CONFIG, cycles=1)), make_session(replace(CONFIG, cycles=3))
    a, b = once.backward(features, 0), thrice.backward(features, 0)
    assert not torch.equal(a["distogram"], b["distogram"])


def test_steps_and_seeds_differ():
    features = make_features()
    session = make_session()
    first, second = session.backward(features, 0), session.backward(features, 1)
    again, other = make_session().backward(features, 0), make_session(seed=2).backward(features, 0)
    assert torch.equal(first["loss"], again["loss"])
    assert not torch.equal(first["mse"], second["mse"])
    assert not torch.equal(first["mse"], other["mse"])


def test_the_callers_random_state_is_left_alone():
    session = make_session()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    session.backward(make_features(), 0)
    assert torch.equal(torch.rand(3), expected)


def test_training_noise():
    labels = own_labels(make_features())
    samples = noise_samples(labels, 4000, torch.Generator().manual_seed(derived_seed(0, 0, "diffusion")))
    log_t = (samples.t_hat / 16).log()
    assert log_t.mean().item() == pytest.approx(-1.2, abs=0.1)
    assert log_t.std().item() == pytest.approx(1.5, abs=0.1)
    scaled = (samples.x_noisy - samples.x_true) / samples.t_hat[:, None, None]
    assert scaled.std().item() == pytest.approx(1.0, abs=0.01)
    assert samples[1:3].t_hat.shape == (2,)


def test_a_fixed_batch_is_learned():
    config = replace(
        CONFIG, diffusion_samples=4, weights=STAGES["initial"], optimizer=OptimizerConfig(warmup_steps=5)
    )
    session, features = make_session(config, perturb=0.0), make_features()
    losses = torch.stack([session.step(features, i)["distogram"] for i in range(20)])
    assert torch.isfinite(losses).all()
    assert losses[-3:].mean() < losses[:3].mean() - 0.3


TWO_STEPS = """
import torch
from tests.baselines.test_training import make_session
from tests.baselines.samples import make_features
session, features = make_session(), make_features()
for index in range(2):
    for name, value in sorted(session.step(features, index).items()):
        print(name, value.item().hex())
"""


def test_two_processes_agree_bit_for_bit():
    root = Path(__file__).resolve().parents[2]
    outputs = [
        subprocess.run(
            [sys.executable, "-c", TWO_STEPS], cwd=root, check=True, capture_output=True, text=True
        ).stdout
        for _ in range(2)
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].count("loss ") == 2

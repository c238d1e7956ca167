"""Steps whose denoiser is replayed from CUDA graphs: the same losses and gradients, bit by bit, as without graphs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.af3.model import perturb_zero_parameters
from baselines.replay import Recorder, Repeated
from baselines.systems import INDUCTOR, PYTORCH, PyTorchVariant
from optimized.variant import MEGAFOLD

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device is visible to torch"),
]
TOKENS = 64
OPTIONS = {
    "preset": "tiny", "stage": "all", "cycles": 1, "rollout_steps": 4, "templates": 1, "checkpointing": "block",
    "diffusion_samples": 9, "diffusion_chunk": 2,
}  # fmt: skip
"""Five chunks, of which the last has another shape than the recorded one."""


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def two_steps(variant: PyTorchVariant, **options: Any) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Losses of two optimiser steps, and the gradients of the second."""
    workload = variant.build(variant.resolve({**OPTIONS, **options}, TOKENS), TOKENS, 0, "cuda")
    perturb_zero_parameters(workload.session.model, std=0.1)
    losses = [workload.step(workload.features) for _ in range(2)]
    return losses, {n: p.grad for n, p in workload.session.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-diffusion"])
@pytest.mark.parametrize("variant", [PYTORCH, MEGAFOLD], ids=lambda v: v.name)
def test_step(variant, precision):
    assert_same(two_steps(variant, precision=precision), two_steps(variant, precision=precision, graphs=True))


def test_compiled_step():
    torch._dynamo.reset()
    plain = two_steps(INDUCTOR, precision="bf16")
    assert_same(plain, two_steps(INDUCTOR, precision="bf16", graphs=True))


def assert_same(plain: tuple[list, dict], replayed: tuple[list, dict]) -> None:
    for a, b in zip(plain[0], replayed[0], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a), (a, b)
    assert plain[1].keys() == replayed[1].keys()
    different = [name for name, g in plain[1].items() if not torch.equal(g, replayed[1][name])]
    assert different == []


def quadratic(weight: Tensor) -> Any:
    return lambda x: (x * weight).square().sum(-1)


def test_gradients_accumulate_over_replays():
    weight = torch.randn(5, device="cuda", requires_grad=True)
    repeated = Repeated(quadratic(weight), Recorder(torch.device("cuda")))
    inputs = torch.randn(6, 3, 5, device="cuda")
    for x in inputs:
        y = repeated(x)
        y.sin().sum().backward()
        repeated.backward(y.grad)
    found, weight.grad = weight.grad, None
    quadratic(weight)(inputs).sin().sum().backward()
    torch.testing.assert_close(found, weight.grad)


def test_without_memory_it_runs_as_usual():
    """The second call asks for more than the device has while it records, in either pass."""
    for in_backward in (False, True):
        weight = torch.ones(5, device="cuda", requires_grad=True)

        def function(x: Tensor, weight: Tensor = weight, in_backward: bool = in_backward) -> Tensor:
            y = (x * weight).square()
            if in_backward:
                y.register_hook(lambda g: g + _greedy())
            else:
                y = y + _greedy()
            return y

        repeated = Repeated(function, Recorder(torch.device("cuda")))
        for _ in range(3):
            y = repeated(torch.ones(5, device="cuda"))
            y.sum().backward()
            repeated.backward(y.grad)
        assert torch.equal(weight.grad, torch.full((5,), 6.0, device="cuda"))


def _greedy() -> Tensor:
    """Zero; while a graph is recorded, out of memory."""
    if torch.cuda.is_current_stream_capturing():
        torch.empty(1 << 42, device="cuda", dtype=torch.uint8)
    return torch.zeros((), device="cuda")


def test_what_cannot_be_recorded_is_said():
    repeated = Repeated(lambda x: x * float(x.sum()), Recorder(torch.device("cuda")))
    x = torch.ones(3, device="cuda")
    with torch.no_grad():
        repeated(x)
        with pytest.raises(RuntimeError, match="captur"):
            repeated(x)

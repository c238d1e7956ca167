"""What the drop-in tests share: weights that do something, and comparison of two ways to compute."""

import re
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def definitions_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators' definitions, also where other tests have switched Triton's interpreter on."""
    monkeypatch.setattr("optimized.ops.support.interpreting", lambda: False)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter away from its initial zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            matrix = parameter.ndim > 1
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if matrix else 0.8 + 0.3 * noise)
    return module


def randn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(
    module: nn.Module, inputs: Sequence[Tensor], call: Callable[..., Tensor | tuple[Tensor, ...]]
) -> dict[str, Tensor]:
    """Outputs, input gradients and parameter gradients of a random weighting of the outputs, by name."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = call(module, *leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    scalar = sum((o * randn(*o.shape, seed=5 + i).to(o)).sum() for i, o in enumerate(outputs))
    module.zero_grad()
    scalar.backward()
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    results |= {f"input {i}": x.grad for i, x in enumerate(leaves)}
    return results | {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


SHIFTS = re.compile(r"(^|\.)(pair_bias\.layer_norm|layer_?norm_z|proj_z\.0)\.bias$")
"""Offsets that shift all logits of a row alike: their gradient is zero but for rounding."""


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal to `tolerance` of the largest entry, tensor by tensor, none of them zero throughout."""
    assert found.keys() == expected.keys()
    scale = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        if SHIFTS.search(name):
            assert max(value.abs().max(), found[name].abs().max()) <= max(tolerance, 1e-6) * scale, name
            continue
        size = value.abs().max()
        assert size > 0, f"{name} is zero: the comparison says nothing"
        difference = (found[name] - value).abs().max() / size
        assert difference <= tolerance, f"{name}: {difference:.2e} of the largest entry"

"""A variant that uses torch: matrix products on n² values, memory growing with the square of the length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megafold_bench.errors import UserError
from megafold_bench.variants import Scalar, Support

BYTES_PER_PAIR = 4096


class TorchWorkload:
    """One parameter of n × n values, held a thousand times over while a step runs."""

    def __init__(self, seq_len: int, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        self._device = device
        self._seq_len = seq_len
        self._weight = torch.rand(512, 512, device=device, requires_grad=True)
        self._optimiser = torch.optim.Adam([self._weight], lr=1e-3)

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"parameters": self._weight.numel()}

    def load(self) -> torch.Tensor:
        return torch.ones(256, 512)

    def transfer(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.to(self._device, non_blocking=True)

    def step(self, batch: torch.Tensor) -> Mapping[str, torch.Tensor]:
        pair = torch.zeros(self._seq_len**2 * BYTES_PER_PAIR, dtype=torch.uint8, device=self._device)
        for _ in range(20):
            loss = (batch @ self._weight).square().mean()
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()
        return {"loss": loss.detach() + pair[0]}


class FakeTorch:
    name = "fake-torch"
    summary = "matrix products in torch"

    def support(self, device: str) -> Support:
        usable = device == "cpu" or torch.cuda.is_available()
        return Support(usable, "" if usable else "torch sees no GPU")

    def resolve(self, options: Mapping[str, Scalar], seq_len: int) -> dict[str, Scalar]:
        if set(options) - {"preset"}:
            raise UserError(f"unknown option {min(set(options) - {'preset'})!r}: choose preset")
        return dict(options)

    def build(self, factors: Mapping[str, Scalar], seq_len: int, seed: int, device: str) -> TorchWorkload:
        return TorchWorkload(seq_len, seed, device)


FAKE_TORCH = FakeTorch()

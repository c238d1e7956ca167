"""Optimiser of AF3 training: Adam, its learning-rate schedule, and the running mean of the weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

EMA_DECAY = 0.999
"""Of the running mean of the weights, where it is switched on."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam as the AF3 supplement gives it (5.4)."""

    lr: float = 1.8e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    warmup_steps: int = 1000
    decay_factor: float = 0.95
    decay_every_steps: int = 50_000
    clip_norm: float = 10.0
    ema_decay: float | None = None


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Rate of step `step`, counted from 0: linear warm-up, then ×0.95 after every 50 k steps."""
    warmup = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    return config.lr * warmup * config.decay_factor ** (step // config.decay_every_steps)


class Optimizer:
    """Stock, unfused Adam with gradient clipping and an optional exponential moving average of the weights."""

    def __init__(self, parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> None:
        self.config = config
        self.parameters = [p for p in parameters if p.requires_grad]
        self.adam = torch.optim.Adam(self.parameters, lr=config.lr, betas=config.betas, eps=config.eps)
        self.average: list[Tensor] | None = None
        if config.ema_decay is not None:
            self.average = [p.detach().clone() for p in self.parameters]

    def zero_grad(self) -> None:
        """Free all gradients."""
        self.adam.zero_grad(set_to_none=True)

    def step(self, index: int) -> Tensor:
        """Clip, update, average. Returns the gradient norm before clipping, on the device, not waited for."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        for group in self.adam.param_groups:
            group["lr"] = learning_rate(self.config, index)
        self.adam.step()
        if self.average is not None and self.config.ema_decay is not None:
            weights = [p.detach() for p in self.parameters]
            torch._foreach_lerp_(self.average, weights, 1.0 - self.config.ema_decay)
        return norm

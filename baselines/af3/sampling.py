"""Sampling structures with the denoiser (Alg 18) and random rigid motions (Alg 19)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""Denoised positions [D, A, 3] from noisy positions [D, A, 3] and noise levels [D], all in Å."""


@dataclass(frozen=True)
class SamplingConfig:
    """Noise schedule and step sizes (Alg 18). The training mini-rollout takes 20 steps of the same."""

    steps: int = 200
    sigma_data: float = 16.0
    s_max: float = 160.0
    s_min: float = 4e-4
    p: float = 7.0
    gamma_0: float = 0.8
    gamma_min: float = 1.0
    noise_scale: float = 1.003
    step_scale: float = 1.5
    translation: float = 1.0
    """Standard deviation of the random translation of Alg 19, in Å."""


def noise_schedule(config: SamplingConfig) -> list[float]:
    """The steps + 1 noise levels in Å, falling from σ_data·s_max to σ_data·s_min."""
    if config.steps < 1:
        raise ValueError(f"{config.steps} sampling steps")
    high, low = config.s_max ** (1 / config.p), config.s_min ** (1 / config.p)
    return [
        config.sigma_data * (high + index / config.steps * (low - high)) ** config.p
        for index in range(config.steps + 1)
    ]


def random_rotations(n: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """`n` rotation matrices [n, 3, 3], uniform over rotations: Gram-Schmidt on two normal vectors."""
    first, second = torch.randn(2, n, 3, device=device, generator=generator)
    x = F.normalize(first, dim=-1)
    y = F.normalize(second - (second * x).sum(-1, keepdim=True) * x, dim=-1)
    return torch.stack((x, y, torch.linalg.cross(x, y)), dim=-2)


def centre_random_augmentation(
    x: Tensor, mask: Tensor, translation: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Centre each structure, then rotate and translate it at random (Alg 19).

    x [D, A, 3] in Å; mask [A] or [D, A] bool: the atoms that define the centre. Masked atoms come out
    as zero. `translation` is a standard deviation in Å.
    """
    weight = mask.unsqueeze(-1).to(x.dtype).expand(x.shape[0], -1, -1)
    centre = (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1.0)
    rotation = random_rotations(x.shape[0], x.device, generator).to(x.dtype)
    shift = torch.randn(x.shape[0], 1, 3, device=x.device, generator=generator).to(x.dtype)
    return ((x - centre) @ rotation.transpose(1, 2) + translation * shift) * weight


def sample(
    denoise: Denoiser,
    atom_mask: Tensor,
    config: SamplingConfig,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`samples` structures [samples, A, 3] in Å, float32 (Alg 18).

    atom_mask [A] bool. `generator` lives on the mask's device; noise levels are host numbers, so nothing
    waits for the device. Gradients are the caller's choice (wrap in `torch.no_grad` for a rollout).
    """
    device = atom_mask.device
    levels = noise_schedule(config)
    shape = (samples, atom_mask.shape[0], 3)
    x = levels[0] * torch.randn(shape, device=device, generator=generator)
    for previous, level in itertools.pairwise(levels):
        x = centre_random_augmentation(x, atom_mask, config.translation, generator)
        gamma = config.gamma_0 if level > config.gamma_min else 0.0
        t_hat = previous * (1.0 + gamma)
        spread = config.noise_scale * math.sqrt(t_hat**2 - previous**2)
        x_noisy = x + spread * torch.randn(shape, device=device, generator=generator)
        denoised = denoise(x_noisy, torch.full((samples,), t_hat, device=device))
        x = x_noisy + config.step_scale * (level - t_hat) * (x_noisy - denoised) / t_hat
    return x * atom_mask.unsqueeze(-1)

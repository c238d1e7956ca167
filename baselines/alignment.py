"""Rigid motions of point clouds: weighted superposition (AF3 Algorithm 28) and random augmentation (19)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RigidMotion:
    """x ↦ (x − ``source``) · ``rotation``ᵀ + ``target``; [*, 3, 3] and twice [*, 1, 3]."""

    rotation: Tensor
    source: Tensor
    target: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Move x [*, A, 3]; the result has the dtype of the motion."""
        return (x.to(self.rotation.dtype) - self.source) @ self.rotation.transpose(-1, -2) + self.target


@torch.no_grad()
def superpose(moving: Tensor, fixed: Tensor, weights: Tensor) -> RigidMotion:
    """The proper rigid motion minimising Σ w |motion(moving) − fixed|², by Kabsch's method.

    `moving`, `fixed` [*, A, 3] and `weights` [*, A] ≥ 0 broadcast against each other. Sums and the
    3×3 singular value decomposition are in float64. Never a reflection; the identity rotation if all
    weights are 0. On CUDA the decomposition makes the host wait for the device once.
    """
    moving, fixed, weights = moving.double(), fixed.double(), weights.double()[..., None]
    total = weights.sum(-2, keepdim=True).clamp(min=1e-12)
    source = (weights * moving).sum(-2, keepdim=True) / total
    target = (weights * fixed).sum(-2, keepdim=True) / total
    covariance = ((fixed - target) * weights).transpose(-1, -2) @ (moving - source) / total
    # A diverged prediction must give a NaN loss, not an exception inside the decomposition.
    covariance = torch.nan_to_num(covariance, nan=0.0, posinf=0.0, neginf=0.0)
    u, _, vh = torch.linalg.svd(covariance)
    handedness = torch.sign(_det3(u) * _det3(vh))
    u = torch.cat([u[..., :2], u[..., 2:] * handedness[..., None, None]], dim=-1)
    return RigidMotion(u @ vh, source, target)


@torch.no_grad()
def weighted_rigid_align(moving: Tensor, fixed: Tensor, weights: Tensor) -> Tensor:
    """`moving` laid onto `fixed` (Algorithm 28, whose last line must add the centroid of `fixed`).

    Shapes as in `superpose`; the result has the dtype of `moving` and no gradient.
    """
    return superpose(moving, fixed, weights).apply(moving).to(moving.dtype)


def random_rotations(count: int, generator: torch.Generator) -> Tensor:
    """`count` uniformly distributed rotations, [count, 3, 3] float32 on the generator's device."""
    q = torch.randn(count, 4, generator=generator, device=generator.device, dtype=torch.float64)
    w, x, y, z = (q / q.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], -1),
        torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], -1),
        torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1),
    ]
    return torch.stack(rows, -2).float()


def center_random_augmentation(
    x: Tensor, mask: Tensor, copies: int, generator: torch.Generator, translation_std: float = 1.0
) -> Tensor:
    """`copies` randomly moved copies of x [A, 3] (Algorithm 19), [copies, A, 3] float32.

    Each copy has the centroid of the atoms in `mask` [A] at the origin, then its own rotation and its
    own translation, normal with `translation_std` Å. Atoms outside the mask start at the centroid.
    """
    count = mask.sum().clamp(min=1)
    centroid = torch.where(mask[:, None], x, 0.0).sum(0) / count
    centered = torch.where(mask[:, None], x - centroid, 0.0)
    rotations = random_rotations(copies, generator)
    shift = torch.randn(copies, 1, 3, generator=generator, device=generator.device) * translation_std
    return centered @ rotations.transpose(-1, -2) + shift


def _det3(m: Tensor) -> Tensor:
    """Determinant of 3×3 matrices as a triple product: no factorisation, so no wait for the device."""
    return (torch.linalg.cross(m[..., 0, :], m[..., 1, :]) * m[..., 2, :]).sum(-1)

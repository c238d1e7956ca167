import math

import pytest
import torch

from baselines.alignment import (
    center_random_augmentation,
    random_rotations,
    superpose,
    weighted_rigid_align,
)


def cloud(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotations(count: int, seed: int = 7) -> torch.Tensor:
    return random_rotations(count, torch.Generator().manual_seed(seed)).double()


def test_random_rotations_are_proper_and_spread():
    r = rotations(4000)
    eye = torch.eye(3, dtype=torch.float64)
    assert torch.allclose(r @ r.transpose(-1, -2), eye.expand_as(r), atol=1e-6)
    assert torch.allclose(torch.linalg.det(r), torch.ones(4000, dtype=torch.float64), atol=1e-6)
    assert r.mean(0).abs().max() < 0.05
    # the angle of a uniform rotation has density (1 − cos θ)/π, mean π/2 + 2/π
    angle = torch.arccos(((r.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2).clamp(-1, 1))
    assert angle.mean().item() == pytest.approx(math.pi / 2 + 2 / math.pi, abs=0.04)


def test_superposition_undoes_a_rigid_motion():
    x = cloud(0, 3, 20)
    y = x @ rotations(3).transpose(-1, -2) + cloud(1, 3, 1) * 10
    weights = torch.rand(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(weighted_rigid_align(x, y, weights), y, atol=1e-6)


def test_superposition_never_reflects():
    x = cloud(0, 1, 12)
    mirrored = x * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    motion = superpose(x, mirrored, torch.ones(1, 12))
    assert torch.linalg.det(motion.rotation).item() == pytest.approx(1.0, abs=1e-9)
    assert (motion.apply(x) - mirrored).norm() > 1.0


def test_superposition_is_the_weighted_optimum():
    x, y = cloud(3, 15), cloud(4, 15)
    weights = torch.rand(15, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    motion = superpose(x, y, weights)

    def cost(rotation: torch.Tensor) -> torch.Tensor:
        moved = (x - motion.source) @ rotation.transpose(-1, -2) + motion.target
        return (weights[:, None] * (moved - y).square()).sum((-1, -2))

    best = cost(motion.rotation)
    for angle in (1e-3, 0.1, 1.0, 3.0):
        for axis in torch.eye(3, dtype=torch.float64):
            skew = torch.linalg.cross(torch.eye(3, dtype=torch.float64), axis.expand(3, 3))
            turned = torch.matrix_exp(angle * skew) @ motion.rotation
            assert cost(turned) > best


def test_degenerate_clouds_stay_finite():
    line = torch.zeros(1, 5, 3)
    line[0, :, 0] = torch.arange(5.0)
    assert torch.isfinite(weighted_rigid_align(line, line.flip(-1), torch.ones(1, 5))).all()
    assert torch.isfinite(weighted_rigid_align(line, line, torch.zeros(1, 5))).all()
    assert torch.isfinite(weighted_rigid_align(line, line * torch.nan, torch.ones(1, 5))).logical_not().all()


def test_augmentation_centres_turns_and_shifts():
    x = cloud(0, 30).float() * 5 + 100
    mask = torch.arange(30) < 25
    out = center_random_augmentation(x, mask, 64, torch.Generator().manual_seed(0))
    assert out.shape == (64, 30, 3)
    assert torch.allclose(
        torch.cdist(out[:, mask], out[:, mask]), torch.cdist(x[mask], x[mask]).expand(64, -1, -1), atol=2e-2
    )
    shifts = out[:, mask].mean(1)
    assert shifts.std().item() == pytest.approx(1.0, abs=0.2)
    assert torch.allclose(out[:, 29], shifts, atol=1e-4)

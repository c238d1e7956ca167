"""Distogram loss: cross-entropy over binned distances between representative atoms (AF3 SI 4.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.losses.labels import Features, Labels, masked_mean

NUM_BINS = 64
FIRST_BREAK, LAST_BREAK = 2.3125, 21.6875
"""Å; the 63 inner bin edges are evenly spaced between them, the outer bins are open."""


def distogram_loss(logits: Tensor, features: Features, labels: Labels) -> Tensor:
    """Mean cross-entropy over token pairs whose representative atoms are resolved (diagonal included).

    `logits` [N, N, 64] of any float dtype; computed in float32. Scalar.
    """
    atoms = features["representative_atom"]
    positions, mask = labels.positions[atoms], labels.mask[atoms]
    edges = torch.linspace(FIRST_BREAK, LAST_BREAK, NUM_BINS - 1, device=logits.device)
    target = torch.bucketize(pair_distances(positions), edges)
    return masked_mean(pair_cross_entropy(logits, target), mask[:, None] & mask[None, :])


def pair_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy over the last axis of `logits` [..., bins] at integer `target` [...], in ≥ float32."""
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    loss = F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none")
    return loss.view(target.shape)


def pair_distances(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Distances |x_i − y_j| (y = x by default), [*, I, J]; differentiable, with gradient 0 at distance 0."""
    other = x if y is None else y
    squared = (x[..., :, None, :] - other[..., None, :, :]).square().sum(-1)
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)

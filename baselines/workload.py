"""The training workload of a variant: its factors, and the session built from them on one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from baselines.losses.labels import Features
from baselines.training import TrainingSession


@dataclass
class FixedCropWorkload:
    """Trains on one crop that stays on the device, so that no data loading is in the step."""

    session: TrainingSession
    features: Features
    facts: Mapping[str, Any]
    around_step: Callable[[], Any]
    steps_done: int = 0

    def load(self) -> Features:
        """The crop, already on the device."""
        return self.features

    def transfer(self, batch: Features) -> Features:
        """`batch` itself."""
        return batch

    def step(self, batch: Features) -> dict[str, torch.Tensor]:
        """One optimiser step; detached scalars on the device, ``"loss"`` the total."""
        with self.around_step():
            losses = self.session.step(batch, self.steps_done)
        self.steps_done += 1
        return losses

"""Random streams of a training step, each a function of (seed, step, purpose) and of nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived_seed(seed: int, step: int, purpose: str) -> int:
    """A 63-bit seed, the same in every process and on every platform."""
    digest = hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def stream(seed: int, step: int, purpose: str, device: torch.device) -> torch.Generator:
    """A fresh generator on `device` for one purpose of one step."""
    return torch.Generator(device).manual_seed(derived_seed(seed, step, purpose))


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Deterministic operators on the CPU, where several threads otherwise add up gathered gradients in any
    order; on other devices nothing changes, because determinism there costs time that trainers do not pay.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])

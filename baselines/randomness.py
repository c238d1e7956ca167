"""Random streams of a training step, each a function of (seed, step, purpose) and of nothing else."""

from __future__ import annotations

import hashlib

import torch


def derived_seed(seed: int, step: int, purpose: str) -> int:
    """A 63-bit seed, the same in every process and on every platform."""
    digest = hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def stream(seed: int, step: int, purpose: str, device: torch.device) -> torch.Generator:
    """A fresh generator on `device` for one purpose of one step."""
    return torch.Generator(device).manual_seed(derived_seed(seed, step, purpose))

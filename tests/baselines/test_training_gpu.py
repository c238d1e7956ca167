"""The step on a GPU: how often the host waits for the device."""

import warnings

import pytest
import torch

from baselines.alignment import random_rotations
from baselines.losses.labels import own_labels
from baselines.permutation import permute_labels
from tests.baselines.samples import make_features

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device is visible to torch"),
]


def count_waits(function) -> int:
    """Synchronising calls PyTorch itself reports while `function` runs."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def on_gpu(features: dict) -> dict:
    return {name: value.cuda() for name, value in features.items()}


PERMUTATION_WAITS = 6
"""Chain table, chain costs, and two decompositions of two waits each."""


def test_permutation_waits_twice_and_for_its_decompositions():
    features = on_gpu(make_features())
    x = own_labels(features).positions @ random_rotations(1, torch.Generator("cuda"))[0].T
    permute_labels(x, features)
    assert count_waits(lambda: permute_labels(x, features)) <= PERMUTATION_WAITS


def test_a_step_waits_for_little_else():
    from tests.baselines.test_training import CONFIG, make_session

    features = on_gpu(make_features())
    session = make_session(CONFIG, device=torch.device("cuda"))
    session.step(features, 0)
    chunks = -(-CONFIG.diffusion_samples // CONFIG.diffusion_chunk)
    assert count_waits(lambda: session.step(features, 1)) <= PERMUTATION_WAITS + 2 * chunks

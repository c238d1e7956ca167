"""The variants end to end at tiny size: facts, learning on synthetic and real crops, compiled against eager."""

from typing import Any

import pytest
import torch

from baselines.compilation import compiler_support
from baselines.systems import INDUCTOR, PYTORCH
from megafold_bench.variants import Variant, Workload
from tests.data_paths import complexes_dir

TINY = {"preset": "tiny", "precision": "fp32"}


def run(workload: Workload, steps: int) -> list[dict[str, Any]]:
    return [dict(workload.step(workload.transfer(workload.load()))) for _ in range(steps)]


def build(variant: Variant, seq_len: int, **options: Any) -> Workload:
    return variant.build(variant.resolve({**TINY, **options}, seq_len), seq_len, 0, "cpu")


def test_contract():
    assert isinstance(PYTORCH, Variant)
    assert isinstance(INDUCTOR, Variant)
    assert PYTORCH.support("cpu").usable
    if not torch.cuda.is_available():
        assert "no CUDA" in PYTORCH.support("cuda").reason


def test_facts():
    workload = build(PYTORCH, 48, stage="all")
    facts = workload.facts
    assert facts["n_tokens"] == 48
    assert 5 * 48 < facts["n_atoms"] <= facts["n_atoms_padded"]
    assert facts["msa_depth"] == 16
    assert facts["msa_rows_available"] == 32
    assert facts["losses"] == ["distogram", "mse", "bond", "smooth_lddt", "plddt", "pde", "resolved", "pae"]
    again = build(PYTORCH, 48).facts
    assert again["crop_hash"] == facts["crop_hash"]
    assert "bond" not in again["losses"]


def test_load_and_transfer_do_nothing():
    workload = build(PYTORCH, 16)
    batch = workload.load()
    assert workload.transfer(batch) is batch
    assert workload.load() is batch


def falling(workload: Workload, monkeypatch_steps: int = 20) -> None:
    """The distogram has no noise of its own, so its loss shows learning within 20 steps."""
    workload.session.optimizer.config = workload.session.optimizer.config.__class__(warmup_steps=5)
    losses = run(workload, monkeypatch_steps)
    assert all(torch.isfinite(value) for step in losses for value in step.values())
    distogram = torch.stack([step["distogram"] for step in losses])
    assert distogram[-3:].mean() < distogram[:3].mean() - 0.3
    assert torch.stack([s["loss"] for s in losses[-5:]]).mean() < torch.stack([s["loss"] for s in losses[:5]]).mean()


def test_synthetic_crop_is_learned():
    falling(build(PYTORCH, 32, diffusion_samples=4))


@pytest.mark.parametrize("name", ["7a4d", "721p", "209d"])
def test_real_crop_is_learned(name: str):
    folder = complexes_dir()
    if folder is None:
        pytest.skip("no real complexes: set MEGAFOLD_BENCH_DATA")
    workload = build(PYTORCH, 48, input=str(folder / name), diffusion_samples=4)
    assert workload.facts["n_chains"] >= 1
    falling(workload)


@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_compiled_is_eager(checkpointing: str):
    support = compiler_support("cpu")
    if not support.usable:
        pytest.skip(support.reason)
    torch._dynamo.reset()
    expected = run(build(PYTORCH, 16, checkpointing=checkpointing), 1)
    found = run(build(INDUCTOR, 16, checkpointing=checkpointing), 1)
    for name, value in expected[0].items():
        assert torch.allclose(found[0][name], value, rtol=2e-3), name

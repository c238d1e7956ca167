"""The variants end to end at tiny size: facts, learning on synthetic and real crops, compiled against eager."""

from typing import Any

import pytest
import torch

from baselines.compilation import compiler_support
from baselines.systems import INDUCTOR, PYTORCH, PyTorchVariant
from baselines.workload import FixedCropWorkload
from megafold_bench.variants import Variant
from tests.data_paths import complexes_dir

TINY = {"preset": "tiny", "precision": "fp32"}


def run(workload: FixedCropWorkload, steps: int) -> list[dict[str, Any]]:
    return [dict(workload.step(workload.transfer(workload.load()))) for _ in range(steps)]


def build(variant: PyTorchVariant, seq_len: int, **options: Any) -> FixedCropWorkload:
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


def falls(workload: FixedCropWorkload) -> None:
    """20 steps on one batch, each with its own noise; the loss with the noise of step 0, before and after."""
    first = workload.session.backward(workload.features, 0)
    losses = run(workload, 20)
    assert all(torch.isfinite(value) for step in losses for value in step.values())
    last = workload.session.backward(workload.features, 0)
    for name in ("loss", "distogram", "plddt", "pde"):
        assert last[name] < first[name], name
    assert last["distogram"] < first["distogram"] - 0.2


def test_synthetic_crop_is_learned():
    falls(build(PYTORCH, 32, diffusion_samples=4))


@pytest.mark.parametrize("name", ["7a4d", "721p", "209d"])
def test_real_crop_is_learned(name: str):
    folder = complexes_dir()
    if folder is None:
        pytest.skip("no real complexes: set MEGAFOLD_BENCH_DATA")
    workload = build(PYTORCH, 48, input=str(folder / name), diffusion_samples=4)
    assert workload.facts["n_chains"] >= 1
    falls(workload)


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

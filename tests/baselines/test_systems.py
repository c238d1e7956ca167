"""The variants end to end at tiny size: facts, learning on synthetic and real crops, compiled against eager."""

from typing import Any

import pytest
import torch

from baselines.af3.model import AlphaFold3
from baselines.compilation import compile_units, compiler_support, strict_compilation
from baselines.systems import INDUCTOR, PYTORCH, PyTorchVariant
from baselines.workload import FixedCropWorkload, build_workload
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
    assert 0 < facts["model_flops_per_step"] <= facts["step_flops"]
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
    assert last["distogram"] < first["distogram"] - 0.05


def test_synthetic_crop_is_learned():
    falls(build(PYTORCH, 32, diffusion_samples=4))


@pytest.mark.parametrize("name", ["7a4d", "721p", "209d"])
def test_real_crop_is_learned(name: str):
    folder = complexes_dir()
    if folder is None:
        pytest.skip("no real complexes: set MEGAFOLD_BENCH_DATA")
    workload = build(PYTORCH, 32, input=str(folder / name), diffusion_samples=4)
    assert workload.facts["n_chains"] >= 1
    falls(workload)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=2e-3), name


def test_every_block_compiles_whole(monkeypatch: pytest.MonkeyPatch):
    """All blocks traced without a graph break; the code generator is left out, it takes minutes on a CPU."""
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **kw: compile_(function, backend="aot_eager", **kw)
    )
    options = {"checkpointing": "block", "cycles": 1, "rollout_steps": 1}
    expected = run(build(PYTORCH, 16, **options), 1)
    assert_same(run(build(INDUCTOR, 16, **options), 1)[0], expected[0])


def test_generated_code_is_eager():
    """Inductor's code for the Pairformer within a checkpointed step."""
    support = compiler_support("cpu")
    if not support.usable:
        pytest.skip(support.reason)
    torch._dynamo.reset()
    options = {**TINY, "checkpointing": "block", "cycles": 1, "rollout_steps": 1}
    factors = PYTORCH.resolve(options, 16)
    expected = run(PYTORCH.build(factors, 16, 0, "cpu"), 1)

    def prepare(model: AlphaFold3) -> None:
        units = model.checkpoint_units()
        compile_units((name, unit) for name, unit in units if name.startswith("pairformer"))

    found = run(build_workload(factors, 16, 0, "cpu", prepare, strict_compilation), 1)
    assert_same(found[0], expected[0])

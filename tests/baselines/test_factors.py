import pytest
import torch

from baselines.factors import resolve_factors
from megafold_bench.errors import UserError


def test_defaults_of_the_af3_preset(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_factors({}, 384) == {
        "preset": "af3",
        "input": None,
        "msa": None,
        "template": None,
        "cycles": 2,
        "diffusion_samples": 48,
        "diffusion_chunk": 4,
        "rollout_steps": 20,
        "msa_rows": 1024,
        "templates": 4,
        "precision": "bf16",
        "checkpointing": "block",
        "stage": "initial",
        "attention": "sdpa",
        "crop": "spatial",
        "warmup_steps": 1000,
        "ema": True,
    }


def test_a_laptop_gets_tiny_and_fp32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_factors({}, 32)["preset"] == "tiny"
    assert resolve_factors({"preset": "af3"}, 32)["precision"] == "fp32"
    assert resolve_factors({"preset": "af3", "precision": "bf16"}, 32)["precision"] == "bf16"


def test_resolving_twice_changes_nothing():
    once = resolve_factors({"preset": "small", "diffusion_samples": "2", "ema": "on"}, 64)
    assert once["diffusion_chunk"] == once["diffusion_samples"] == 2
    assert once["ema"] is True
    assert resolve_factors(once, 64) == once


@pytest.mark.parametrize(
    ("options", "seq_len", "message"),
    [
        ({"preset": "huge"}, 64, "'huge'"),
        ({"colour": "red"}, 64, "'colour'"),
        ({"cycles": 0}, 64, "cycles=0"),
        ({"cycles": "two"}, 64, "cycles='two'"),
        ({"cycles": True}, 64, "cycles=True"),
        ({"cycles": 1.5}, 64, "cycles=1.5"),
        ({"templates": -1}, 64, "templates=-1"),
        ({"precision": "fp8"}, 64, "'fp8'"),
        ({"stage": "second"}, 64, "'second'"),
        ({"ema": "maybe"}, 64, "'maybe'"),
        ({}, 0, "length 0"),
        ({}, 7, "length 7"),
        ({"msa": "A=x.a3m"}, 64, "needs a structure"),
        ({"input": "missing.cif"}, 64, "missing.cif"),
    ],
)
def test_bad_options_are_named(options: dict, seq_len: int, message: str):
    with pytest.raises(UserError, match=message) as error:
        resolve_factors(options, seq_len)
    assert "\n" not in str(error.value)

"""FLOP counts: exact on what can be counted by hand, and against published-size estimates."""

import dataclasses

import pytest

from baselines.af3.config import AF3Config, preset
from baselines.af3.flops import (
    ProblemSize,
    StepFactors,
    _count_parts,
    forward_flops,
    meta_features,
    parameters_by_part,
    training_flops,
)
from baselines.data.schema import check_features

TERA = 1e12


@pytest.fixture(scope="module")
def af3_384():
    """The published configuration at the initial crop."""
    return forward_flops(preset("af3"), ProblemSize(tokens=384, atoms=3456, msa_rows=1024, templates=4))


def test_deep_stacks_continue_in_a_straight_line():
    tiny, size = preset("tiny"), ProblemSize(tokens=24, atoms=192, msa_rows=8, templates=2)
    deep = dataclasses.replace(
        tiny,
        msa=dataclasses.replace(tiny.msa, blocks=3),
        pairformer=dataclasses.replace(tiny.pairformer, blocks=4),
        diffusion=dataclasses.replace(tiny.diffusion, blocks=3 * tiny.diffusion.super_block),
    )
    assert forward_flops(deep, size) == _count_parts(deep, size)


def test_meta_features_satisfy_the_schema():
    sizes = check_features(meta_features(ProblemSize(16, 64, 8, 2)))
    assert (sizes["N"], sizes["A"], sizes["S"], sizes["T"]) == (16, 64, 8, 2)


def test_parameters_by_part_add_up():
    parts = parameters_by_part(AF3Config())
    assert parts["total"] == 368_384_538 == sum(parts.values()) - parts["total"]


def test_distogram_is_exact():
    config, n = preset("tiny"), 10
    flops = forward_flops(config, ProblemSize(n, 64, 3, 1))
    assert flops["distogram"] == 2 * n * n * config.c_z * 64
    linears = n * n * config.c_z**2 + n * config.c_s * (config.c_s_inputs + config.c_s)
    assert flops["recycling"] == 2 * linears


def test_templates_scale_linearly():
    config = preset("tiny")
    one, three, five = (forward_flops(config, ProblemSize(8, 64, 3, t))["template"] for t in (1, 3, 5))
    assert five - three == three - one > 0


def test_forward_estimates(af3_384):
    """Estimates from shapes (TFLOP at 384 tokens, 9 atoms a token, 1024 rows, 4 templates)."""
    tera = {name: value / TERA for name, value in af3_384.items()}
    assert tera["pairformer"] == pytest.approx(12.21, rel=0.05)
    assert tera["msa"] == pytest.approx(2.68, rel=0.05)
    assert tera["template"] == pytest.approx(0.64, rel=0.1)
    assert tera["diffusion_sample"] == pytest.approx(0.163 + 0.014, rel=0.05)
    # On top of the 24 biases (0.0145): what atom blocks do once for all samples, and the atom pairs.
    assert tera["diffusion_call"] + tera["diffusion_sample"] == pytest.approx(0.163 + 0.014 + 0.014, rel=0.05)
    assert tera["pair_conditioning"] == pytest.approx(0.068, rel=0.1)
    assert tera["confidence"] == pytest.approx(4.1 / 4, rel=0.05)


def test_training_step_estimates(af3_384):
    parts = training_flops(af3_384, StepFactors())
    tera = {name: value / TERA for name, value in parts.items()}
    assert tera["trunk"] == pytest.approx(85.4, rel=0.05)
    assert tera["diffusion"] == pytest.approx(34.4, rel=0.1)
    assert tera["confidence"] == pytest.approx(4.1, rel=0.05)
    # The estimate repeats the pair conditioning (0.068) in each of the 20 rollout steps.
    assert tera["rollout"] + 19 * af3_384["pair_conditioning"] / TERA == pytest.approx(5.2, rel=0.1)
    assert tera["total"] == pytest.approx(129, rel=0.05)
    assert tera["total"] == pytest.approx(
        sum(tera[k] for k in ("trunk", "diffusion", "rollout", "confidence"))
    )


def test_training_step_factors(af3_384):
    base = StepFactors(cycles=1, samples=8, chunk=4, rollout_steps=0, checkpointing=False)
    plain = training_flops(af3_384, base)
    assert plain["total"] == plain["model"]
    more = training_flops(af3_384, dataclasses.replace(base, cycles=3, checkpointing=True))
    cycle = sum(af3_384[name] for name in ("recycling", "template", "msa", "pairformer"))
    assert more["trunk"] - plain["trunk"] == pytest.approx(3 * cycle)
    assert more["model"] - plain["model"] == pytest.approx(2 * cycle)
    chunked = training_flops(af3_384, dataclasses.replace(base, chunk=2))
    assert chunked["diffusion"] - plain["diffusion"] == pytest.approx(2 * 3 * af3_384["diffusion_call"])

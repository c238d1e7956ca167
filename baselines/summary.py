"""What a variant of the AF3 workload trains: dimensions, parameters by part, FLOPs of a step by part."""

from __future__ import annotations

import dataclasses
from typing import Any

from baselines.af3.config import preset
from baselines.af3.flops import ProblemSize, StepFactors, forward_flops, parameters_by_part, training_flops
from baselines.data.schema import ATOM_WINDOW
from baselines.factors import resolve_factors

ATOMS_PER_TOKEN = 8
"""Heavy atoms per token of proteins; the synthetic complex has about as many."""


def summarise_model(preset_name: str, tokens: int) -> dict[str, Any]:
    """The preset as `baselines.factors` trains it by default, on a crop of `tokens` tokens.

    FLOPs are of matrix products, two per multiply-add, with 8 atoms per token. ``flops_of_step`` counts
    the recomputation of checkpointed blocks; its ``model`` entry does not.
    """
    config, factors = preset(preset_name), resolve_factors({"preset": preset_name}, tokens)

    def whole(name: str) -> int:
        return int(factors[name] or 0)

    atoms = -(-tokens * ATOMS_PER_TOKEN // ATOM_WINDOW) * ATOM_WINDOW
    size = ProblemSize(tokens, atoms, whole("msa_rows"), whole("templates"))
    step = StepFactors(
        cycles=whole("cycles"),
        samples=whole("diffusion_samples"),
        chunk=whole("diffusion_chunk"),
        rollout_steps=whole("rollout_steps"),
        checkpointing=factors["checkpointing"] != "none",
    )
    forward = forward_flops(config, size)
    return {
        "preset": preset_name,
        "dimensions": dataclasses.asdict(config),
        "problem": dataclasses.asdict(size),
        "step": dataclasses.asdict(step),
        "parameters": parameters_by_part(config),
        "flops_of_forward": forward,
        "flops_of_step": training_flops(forward, step),
    }

"""Parameters and floating-point operations of the network, counted by running it on the meta device.

Forward counts come from the real modules under PyTorch's FLOP counter: matrix products only, two
operations per multiply-add. A training step is composed from them with the usual rule that a backward
pass costs two forwards and recomputation under checkpointing one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from baselines.af3.config import AF3Config
from baselines.af3.model import AlphaFold3
from baselines.af3.msa import sample_rows
from baselines.data.schema import FEATURES

_BACKWARD = 2


@dataclass(frozen=True)
class ProblemSize:
    """The dimensions of a crop that cost depends on."""

    tokens: int
    atoms: int
    msa_rows: int
    templates: int


@dataclass(frozen=True)
class StepFactors:
    """How a training step runs the network's parts."""

    cycles: float = 2.5
    """Trunk cycles, of which the last has a gradient; the mean of 1 to 4 by default."""
    samples: int = 48
    """Diffusion samples trained at once."""
    chunk: int = 48
    """Samples per call of the diffusion module."""
    rollout_steps: int = 20
    """Denoising steps of the mini-rollout, one sample, without gradient."""
    checkpointing: bool = True
    """Recompute the trunk, the diffusion module and the confidence head in the backward pass."""


def meta_features(size: ProblemSize) -> dict[str, Tensor]:
    """A sample in the feature schema without values, on the meta device."""
    dims = {
        "N": size.tokens,
        "A": size.atoms,
        "S": size.msa_rows,
        "T": size.templates,
        "E": 1,
        "K": 1,
        "P": 1,
    }
    return {
        name: torch.empty(
            [dims[dim] if isinstance(dim, str) else dim for dim in feature.dims],
            dtype=feature.dtype,
            device="meta",
        )
        for name, feature in FEATURES.items()
    }


def _meta_model(config: AF3Config) -> AlphaFold3:
    # Explicit attention: the counter would not see inside a fused kernel on every PyTorch version.
    with torch.device("meta"):
        return AlphaFold3(dataclasses.replace(config, attention="softmax"))


def parameters_by_part(config: AF3Config) -> dict[str, int]:
    """Number of parameters of each top-level part, and ``total``."""
    parts = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in _meta_model(config).named_children()
    }
    return {**parts, "total": sum(parts.values())}


def _count(run: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        run()
    return counter.get_total_flops()


def forward_flops(config: AF3Config, size: ProblemSize) -> dict[str, int]:
    """FLOPs of one forward pass of each part.

    ``template``, ``msa`` and ``pairformer`` make a cycle, with ``recycling`` and ``initial_pair``.
    ``diffusion_call`` is what a call of the diffusion module costs whatever its number of samples (pair
    biases, atom pair representation); ``diffusion_sample`` comes on top for each sample;
    ``pair_conditioning`` is computed once per structure.

    The three deep stacks are counted one and two blocks deep and continued in a straight line, which is
    exact because their blocks cost the same, and takes a second instead of ten.
    """
    group = config.diffusion.super_block
    depth = {
        "msa": config.msa.blocks,
        "pairformer": config.pairformer.blocks,
        "diffusion_call": config.diffusion.blocks // group,
        "diffusion_sample": config.diffusion.blocks // group,
    }
    one, two = (_count_parts(_shallow(config, blocks), size) for blocks in (1, 2))
    return {name: one[name] + (depth.get(name, 1) - 1) * (two[name] - one[name]) for name in one}


def _shallow(config: AF3Config, blocks: int) -> AF3Config:
    """`config` with MSA module and Pairformer `blocks` deep, and as many groups of token blocks."""
    diffusion = config.diffusion
    return dataclasses.replace(
        config,
        msa=dataclasses.replace(config.msa, blocks=blocks),
        pairformer=dataclasses.replace(config.pairformer, blocks=blocks),
        diffusion=dataclasses.replace(diffusion, blocks=blocks * diffusion.super_block),
    )


def _count_parts(config: AF3Config, size: ProblemSize) -> dict[str, int]:
    model, features = _meta_model(config), meta_features(size)

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    s_inputs = meta(size.tokens, config.c_s_inputs)
    s, z = meta(size.tokens, config.c_s), meta(size.tokens, size.tokens, config.c_z)
    rows = sample_rows(features, size.msa_rows)
    conditioning = model.diffusion.condition(features, s_inputs, s, z)

    def diffusion(samples: int) -> int:
        x, t = meta(samples, size.atoms, 3), meta(samples)
        return _count(lambda: model.diffusion(x, t, features, s_inputs, s, z, conditioning))

    one, two = diffusion(1), diffusion(2)
    return {
        "input_embedder": _count(lambda: model.input_embedder(features)),
        "initial_pair": _count(lambda: model.initial_pair(features, s_inputs)),
        "recycling": _count(lambda: (model.recycler.pair(z, z), model.recycler.single(s_inputs, s))),
        "template": _count(lambda: model.template_embedder(features, z)),
        "msa": _count(lambda: model.msa_module(rows, s_inputs, z)),
        "pairformer": _count(lambda: model.pairformer(s, z)),
        "pair_conditioning": _count(lambda: model.diffusion.condition(features, s_inputs, s, z)),
        "diffusion_call": 2 * one - two,
        "diffusion_sample": two - one,
        "distogram": _count(lambda: model.distogram_head(z)),
        "confidence": _count(lambda: model.confidence_head(features, s_inputs, s, z, meta(size.atoms, 3))),
    }


def training_flops(forward: dict[str, int], factors: StepFactors) -> dict[str, float]:
    """FLOPs of one training step by part, and ``total``, from `forward_flops`.

    ``model`` is the same step without recomputation: the useful work, for utilisation.
    """

    def step(recompute: int) -> dict[str, float]:
        trained = 1 + _BACKWARD
        cycle = sum(forward[name] for name in ("recycling", "template", "msa", "pairformer"))
        calls = -(-factors.samples // factors.chunk)
        diffusion = calls * forward["diffusion_call"] + factors.samples * forward["diffusion_sample"]
        denoise = forward["diffusion_call"] + forward["diffusion_sample"]
        once = forward["input_embedder"] + forward["initial_pair"] + forward["distogram"]
        return {
            "trunk": cycle * (factors.cycles - 1 + trained + recompute) + once * trained,
            "diffusion": diffusion * (trained + recompute) + forward["pair_conditioning"] * trained,
            "rollout": factors.rollout_steps * denoise + forward["pair_conditioning"],
            "confidence": forward["confidence"] * (trained + recompute),
        }

    parts = step(1 if factors.checkpointing else 0)
    return {**parts, "total": sum(parts.values()), "model": sum(step(0).values())}

"""AlphaFold 3 (Alg 1), in pieces that a training step puts together.

Parts take one unbatched sample in the feature schema. The model does not know how it is run:
checkpointing, compilation, autocast and patching are applied from outside.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from baselines.af3.confidence import ConfidenceHead
from baselines.af3.config import AF3Config
from baselines.af3.diffusion import DiffusionModule
from baselines.af3.distogram import DistogramHead
from baselines.af3.embedders import InputEmbedder, PairInitialiser, Recycler
from baselines.af3.msa import MSAModule, MSARows
from baselines.af3.pairformer import Pairformer
from baselines.af3.templates import TemplateEmbedder

Features = Mapping[str, Tensor]

_UNIT_STACKS = (
    "input_embedder.atom_encoder.transformer.blocks",
    "template_embedder.blocks",
    "msa_module.blocks",
    "pairformer.blocks",
    "diffusion.atom_encoder.transformer.blocks",
    "diffusion.transformer.blocks",
    "diffusion.atom_decoder.transformer.blocks",
    "confidence_head.pairformer.blocks",
)


class AlphaFold3(nn.Module):
    """The network. Parameters are float32, initialised from torch's default generator."""

    def __init__(self, config: AF3Config) -> None:
        super().__init__()
        self.config = config
        self.input_embedder = InputEmbedder(config)
        self.pair_initialiser = PairInitialiser(config)
        self.recycler = Recycler(config)
        self.template_embedder = TemplateEmbedder(config.c_z, config.template, config.attention)
        self.msa_module = MSAModule(config.c_s_inputs, config.c_z, config.msa, config.attention)
        self.pairformer = Pairformer(config.c_s, config.c_z, config.pairformer, config.attention)
        self.diffusion = DiffusionModule(config)
        self.confidence_head = ConfidenceHead(config)
        self.distogram_head = DistogramHead(config.c_z, config.distogram_bins)

    def initial_pair(self, features: Features, s_inputs: Tensor) -> Tensor:
        """z_init [N, N, c_z] from s_inputs [N, c_s_inputs]; the same in every cycle."""
        return self.pair_initialiser(features, s_inputs)

    def trunk(
        self,
        features: Features,
        s_inputs: Tensor,
        msa: MSARows,
        previous: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        z_init: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One recycling cycle: (s [N, c_s], z [N, N, c_z]).

        `previous` is the last cycle's (s, z), None in the first; `mask` [N] tokens to keep, None for all;
        `z_init` the result of `initial_pair` where the caller keeps it between cycles.
        """
        s_previous, z_previous = (None, None) if previous is None else previous
        if z_init is None:
            z_init = self.initial_pair(features, s_inputs)
        z = self.recycler.pair(z_init, z_previous)
        z = z + self.template_embedder(features, z, mask)
        z = self.msa_module(msa, s_inputs, z, mask)
        s = self.recycler.single(s_inputs, s_previous)
        return self.pairformer(s, z, mask)

    def checkpoint_units(self) -> list[tuple[str, nn.Module]]:
        """The repeated blocks, with their names: what trainers checkpoint and compile one by one."""
        return [
            (f"{stack}.{index}", block)
            for stack in _UNIT_STACKS
            for index, block in enumerate(self.get_submodule(stack).children())
        ]

    def parameters_without_effect(self) -> list[str]:
        """Names of the parameters the released network owns but whose output nothing reads.

        They never receive a gradient; data-parallel wrappers that insist on one have to leave them out.
        """
        prefixes = ["input_embedder.atom_encoder.unused_pair.", "diffusion.atom_encoder.unused_pair."]
        if self.config.msa.order == "outer_first":
            last = f"msa_module.blocks.{self.config.msa.blocks - 1}."
            prefixes += [last + "averaging.", last + "msa_transition."]
        return [name for name, _ in self.named_parameters() if name.startswith(tuple(prefixes))]


def perturb_zero_parameters(module: nn.Module, std: float = 0.02, seed: int = 0) -> None:
    """Add noise to every parameter that is all zero, in place.

    A freshly initialised model starts with most residual branches at exactly zero, which hides errors
    and gradients; tests call this first.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(std * noise.to(parameter.device, parameter.dtype))

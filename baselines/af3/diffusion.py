"""The diffusion module: conditioning (Alg 21, 22), token transformer (Alg 23), denoiser (Alg 20)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from baselines.af3.atom_attention import AtomAttentionDecoder, AtomAttentionEncoder
from baselines.af3.attention_pair_bias import AttentionPairBias, PairBias
from baselines.af3.config import AF3Config, Attention, DiffusionConfig
from baselines.af3.embedders import relative_position
from baselines.af3.primitives import (
    ConditionedTransition,
    LayerNorm,
    Linear,
    Transition,
    to_module_dtype,
)

Features = Mapping[str, Tensor]

_FOURIER_SEED = 20


class DiffusionConditioning(NamedTuple):
    """The part of the conditioning that does not depend on noise, computed once per structure."""

    pair: Tensor
    """[N, N, c_z]."""


class FourierEmbedding(nn.Module):
    """Random Fourier features of the noise level, fixed for the life of the model (Alg 22)."""

    weight: Tensor
    bias: Tensor

    def __init__(self, c: int) -> None:
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(_FOURIER_SEED)
        device = torch.get_default_device()
        weight, bias = torch.randn(2, c, generator=generator, device="cpu").to(device)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, t: Tensor) -> Tensor:
        """[D, c] from t [D]."""
        return torch.cos(2.0 * math.pi * (t.unsqueeze(-1) * self.weight + self.bias))


class PairConditioning(nn.Module):
    """Trunk pair representation and relative positions to the pair conditioning (Alg 21, lines 1-5)."""

    def __init__(self, config: AF3Config) -> None:
        super().__init__()
        self.relative_position = config.relative_position
        width = config.c_z + config.relative_position.features
        self.layer_norm = LayerNorm(width, offset=False)
        self.linear = Linear(width, config.c_z)
        self.transitions = nn.ModuleList(
            Transition(config.c_z, 2) for _ in range(config.diffusion.conditioning_transitions)
        )

    def forward(self, features: Features, z: Tensor) -> Tensor:
        """[N, N, c_z] from z [N, N, c_z]."""
        z = to_module_dtype(z, self.linear.weight)
        relative = relative_position(features, self.relative_position, z.dtype)
        z = self.linear(self.layer_norm(torch.cat((z, relative), dim=-1)))
        for transition in self.transitions:
            z = z + transition(z)
        return z


class SingleConditioning(nn.Module):
    """Trunk single representation, inputs and noise level to the single conditioning (Alg 21)."""

    def __init__(self, config: AF3Config) -> None:
        super().__init__()
        diffusion, width = config.diffusion, config.c_s + config.c_s_inputs
        self.sigma_data = diffusion.sigma_data
        self.layer_norm = LayerNorm(width, offset=False)
        self.linear = Linear(width, config.c_s)
        self.fourier = FourierEmbedding(diffusion.c_fourier)
        self.layer_norm_noise = LayerNorm(diffusion.c_fourier, offset=False)
        self.linear_noise = Linear(diffusion.c_fourier, config.c_s)
        self.transitions = nn.ModuleList(
            Transition(config.c_s, 2) for _ in range(diffusion.conditioning_transitions)
        )

    def forward(self, t_hat: Tensor, s_inputs: Tensor, s: Tensor) -> Tensor:
        """[D, N, c_s] from noise levels t_hat [D] in Å, s_inputs [N, c_s_inputs] and s [N, c_s]."""
        joined = to_module_dtype(torch.cat((s, s_inputs.to(s.dtype)), dim=-1), self.linear.weight)
        noise = self.fourier(0.25 * torch.log(t_hat / self.sigma_data))
        noise = to_module_dtype(noise, self.linear_noise.weight)
        single = self.linear(self.layer_norm(joined))
        single = single + self.linear_noise(self.layer_norm_noise(noise)).unsqueeze(1)
        for transition in self.transitions:
            single = single + transition(single)
        return single


class TokenBlock(nn.Module):
    """One block of the token transformer: attention with pair bias, conditioned transition (Alg 23)."""

    def __init__(self, c_a: int, c_s: int, config: DiffusionConfig, attention: Attention) -> None:
        super().__init__()
        self.attention = AttentionPairBias(c_a, config.heads, c_s=c_s, attention=attention)
        self.transition = ConditionedTransition(c_a, c_s, config.transition_n)

    def forward(self, a: Tensor, s: Tensor, bias: Tensor) -> Tensor:
        """The new a [D, N, c_token]; s [D, N, c_s]; bias [heads, N, N] shared by the samples."""
        a = a + self.attention(a, bias, s)
        return a + self.transition(a, s)


class TokenTransformer(nn.Module):
    """The 24 token blocks and the pair biases they share or own (Alg 23).

    With a shared pair LayerNorm, the biases of `super_block` blocks come from one projection. Biases are
    computed in every call, as in the released network.
    """

    def __init__(self, config: AF3Config) -> None:
        super().__init__()
        diffusion = config.diffusion
        self.heads = diffusion.heads
        self.super_block = diffusion.super_block
        self.layer_norm_pair: LayerNorm | None = None
        if diffusion.pair_norm == "shared":
            if diffusion.blocks % diffusion.super_block:
                raise ValueError(f"{diffusion.blocks} blocks are not in groups of {diffusion.super_block}")
            self.layer_norm_pair = LayerNorm(config.c_z, offset=False)
            self.pair_biases = nn.ModuleList(
                Linear(config.c_z, diffusion.super_block * diffusion.heads)
                for _ in range(diffusion.blocks // diffusion.super_block)
            )
        else:
            self.pair_biases = nn.ModuleList(
                PairBias(config.c_z, diffusion.heads, offset=False) for _ in range(diffusion.blocks)
            )
        self.blocks = nn.ModuleList(
            TokenBlock(diffusion.c_token, config.c_s, diffusion, config.attention)
            for _ in range(diffusion.blocks)
        )

    def _shared(self, layer_norm: LayerNorm, a: Tensor, s: Tensor, z: Tensor) -> Tensor:
        z = layer_norm(z)
        for group, linear in enumerate(self.pair_biases):
            biases = linear(z).movedim(-1, 0).unflatten(0, (self.super_block, self.heads))
            for index, bias in enumerate(biases.unbind(0)):
                a = self.blocks[group * self.super_block + index](a, s, bias)
        return a

    def forward(self, a: Tensor, s: Tensor, z: Tensor) -> Tensor:
        """The new a [D, N, c_token]; s [D, N, c_s]; z [N, N, c_z] shared by the samples."""
        if self.layer_norm_pair is not None:
            return self._shared(self.layer_norm_pair, a, s, z)
        for block, pair_bias in zip(self.blocks, self.pair_biases, strict=True):
            a = block(a, s, pair_bias(z))
        return a


class DiffusionModule(nn.Module):
    """The denoiser (Alg 20)."""

    def __init__(self, config: AF3Config) -> None:
        super().__init__()
        c_token = config.diffusion.c_token
        self.sigma_data = config.diffusion.sigma_data
        self.pair_conditioning = PairConditioning(config)
        self.single_conditioning = SingleConditioning(config)
        self.atom_encoder = AtomAttentionEncoder(
            config.atom, c_token, c_s=config.c_s, c_z=config.c_z, attention=config.attention
        )
        self.layer_norm_s = LayerNorm(config.c_s, offset=False)
        self.linear_s = Linear(config.c_s, c_token, init="zero")
        self.transformer = TokenTransformer(config)
        self.layer_norm_out = LayerNorm(c_token, offset=False)
        self.atom_decoder = AtomAttentionDecoder(config.atom, c_token, config.attention)

    def condition(self, features: Features, s_inputs: Tensor, s: Tensor, z: Tensor) -> DiffusionConditioning:
        """The noise-independent conditioning of one structure (the pair half of Alg 21).

        Of the arguments only `features` and z [N, N, c_z] matter to it; s_inputs and s are accepted so
        that an implementation which also hoists their share can take this one's place.
        """
        del s_inputs, s
        return DiffusionConditioning(self.pair_conditioning(features, z))

    def forward(
        self,
        x_noisy: Tensor,
        t_hat: Tensor,
        features: Features,
        s_inputs: Tensor,
        s: Tensor,
        z: Tensor,
        conditioning: DiffusionConditioning,
    ) -> Tensor:
        """Denoised positions [D, A, 3] in Å, float32 or wider; zero on padding atoms.

        x_noisy [D, A, 3] in Å at noise levels t_hat [D] in Å; s_inputs [N, c_s_inputs], s [N, c_s] and
        z [N, N, c_z] of the trunk, z only through `conditioning`.
        """
        del z
        mask = features["atom_mask"].unsqueeze(-1)
        t = t_hat[:, None, None]
        variance = t.square() + self.sigma_data**2
        single = self.single_conditioning(t_hat, s_inputs, s)
        trunk_single = to_module_dtype(s, self.linear_s.weight)
        encoding = self.atom_encoder(
            features, x_noisy * mask / variance.sqrt(), trunk_single, conditioning.pair
        )
        tokens = encoding.tokens + self.linear_s(self.layer_norm_s(single))
        tokens = self.layer_norm_out(self.transformer(tokens, single, conditioning.pair))
        update = self.atom_decoder(tokens, encoding)
        skip = self.sigma_data**2 / variance
        return (skip * x_noisy + (t * self.sigma_data / variance.sqrt()) * update) * mask

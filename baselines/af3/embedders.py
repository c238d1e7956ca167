"""Input single representation (Alg 2), relative positions (Alg 3), pair initialisation, recycling."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from baselines.af3.atom_attention import AtomAttentionEncoder
from baselines.af3.config import AF3Config, RelativePositionConfig
from baselines.af3.primitives import LayerNorm, Linear, compute_dtype, one_hot
from baselines.data.schema import NUM_RESTYPES

Features = Mapping[str, Tensor]


def relative_position(features: Features, config: RelativePositionConfig, dtype: torch.dtype) -> Tensor:
    """Relative position encoding [N, N, features] of token pairs, one-hot (Alg 3).

    Residue offset within a chain, token offset within a residue, same entity, and offset between copies
    of an entity (encoded between chains of the same entity, as in the released code), each clipped, with
    a class of its own for "not applicable".
    """

    def pairs(name: str) -> tuple[Tensor, Tensor]:
        value = features[name]
        return value[:, None], value[None, :]

    def offset(name: str, limit: int, applies: Tensor) -> Tensor:
        i, j = pairs(name)
        index = (i - j + limit).clamp(0, 2 * limit).masked_fill(~applies, 2 * limit + 1)
        return one_hot(index, 2 * limit + 2, dtype)

    def same(name: str) -> Tensor:
        i, j = pairs(name)
        return i == j

    same_chain, same_entity = same("asym_id"), same("entity_id")
    same_residue = same_chain & same("residue_index")
    return torch.cat(
        (
            offset("residue_index", config.r_max, same_chain),
            offset("token_index", config.r_max, same_residue),
            same_entity.unsqueeze(-1).to(dtype),
            offset("sym_id", config.s_max, same_entity),
        ),
        dim=-1,
    )


def bond_matrix(features: Features, dtype: torch.dtype) -> Tensor:
    """[N, N], 1 where a bond joins token i and token j, either way round."""
    n = features["restype"].shape[0]
    i, j = features["token_bonds"].unbind(-1)
    flat = torch.zeros(n * n, dtype=dtype, device=i.device)
    return flat.index_fill(0, torch.cat((i * n + j, j * n + i)), 1.0).view(n, n)


class InputEmbedder(nn.Module):
    """Per-token input features, the atoms' among them (Alg 2)."""

    def __init__(self, config: AF3Config) -> None:
        super().__init__()
        self.atom_encoder = AtomAttentionEncoder(
            config.atom, config.c_s, c_s=None, c_z=None, attention=config.attention
        )

    def forward(self, features: Features) -> Tensor:
        """s_inputs [N, c_s_inputs]: residue type, profile, deletion mean, aggregated atoms."""
        atoms = self.atom_encoder(features).tokens
        dtype = atoms.dtype
        return torch.cat(
            (
                one_hot(features["restype"], NUM_RESTYPES, dtype),
                features["profile"].to(dtype),
                features["deletion_mean"].unsqueeze(-1).to(dtype),
                atoms,
            ),
            dim=-1,
        )


class PairInitialiser(nn.Module):
    """The pair representation before recycling (Alg 1, lines 2 to 5)."""

    def __init__(self, config: AF3Config) -> None:
        super().__init__()
        self.relative_position = config.relative_position
        c_in, c_z = config.c_s_inputs, config.c_z
        self.linear_z_i = Linear(c_in, c_z)
        self.linear_z_j = Linear(c_in, c_z)
        self.linear_relative_position = Linear(config.relative_position.features, c_z)
        self.linear_bonds = Linear(1, c_z)

    def forward(self, features: Features, s_inputs: Tensor) -> Tensor:
        """z_init [N, N, c_z] from s_inputs [N, c_s_inputs]."""
        dtype = compute_dtype(self.linear_z_i.weight)
        z = self.linear_z_i(s_inputs)[:, None] + self.linear_z_j(s_inputs)[None, :]
        relative = relative_position(features, self.relative_position, dtype)
        z = z + self.linear_relative_position(relative)
        return z + self.linear_bonds(bond_matrix(features, dtype).unsqueeze(-1))


class Recycler(nn.Module):
    """Adds the previous cycle's representations (Alg 1, lines 8 and 11).

    The first cycle sees zeros, of which LayerNorm makes its offset.
    """

    def __init__(self, config: AF3Config) -> None:
        super().__init__()
        self.layer_norm_z = LayerNorm(config.c_z)
        self.linear_z = Linear(config.c_z, config.c_z, init="zero")
        self.linear_s_init = Linear(config.c_s_inputs, config.c_s)
        self.layer_norm_s = LayerNorm(config.c_s)
        self.linear_s = Linear(config.c_s, config.c_s, init="zero")

    def pair(self, z_init: Tensor, previous: Tensor | None) -> Tensor:
        """z_init [N, N, c_z] plus the embedded previous z."""
        if previous is None:
            previous = z_init.new_zeros(1, 1, z_init.shape[-1])
        return z_init + self.linear_z(self.layer_norm_z(previous))

    def single(self, s_inputs: Tensor, previous: Tensor | None) -> Tensor:
        """s [N, c_s] from s_inputs [N, c_s_inputs] and the previous s."""
        s = self.linear_s_init(s_inputs)
        if previous is None:
            previous = s.new_zeros(1, s.shape[-1])
        return s + self.linear_s(self.layer_norm_s(previous))

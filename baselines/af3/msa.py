"""The MSA module (Alg 8): outer product mean (Alg 9), pair-weighted averaging (Alg 10), row sampling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from baselines.af3.attention import key_mask_bias
from baselines.af3.config import Attention, MSAConfig
from baselines.af3.pairformer import PairBlock
from baselines.af3.primitives import (
    LayerNorm,
    Linear,
    SharedDropout,
    Transition,
    compute_dtype,
    one_hot,
    without_autocast,
)
from baselines.data.schema import NUM_MSA_CLASSES


class MSARows(NamedTuple):
    """Alignment rows of one cycle, as in the feature schema."""

    msa: Tensor
    """[S, N] uint8, residue type."""
    deletions: Tensor
    """[S, N] uint8, residues deleted before the column."""
    mask: Tensor
    """[S, N] bool, True = keep."""


def sample_rows(features: Mapping[str, Tensor], n: int, generator: torch.Generator | None = None) -> MSARows:
    """At most `n` alignment rows, chosen uniformly without replacement as AlphaFold 3 does per cycle.

    Rows in which no token is present come last, so they are taken only when there are too few others.
    The query has no special place. `generator` lives on the features' device; nothing waits for it.
    """
    mask = features["msa_mask"]
    if n >= mask.shape[0]:
        return MSARows(features["msa"], features["msa_deletions"], mask)
    rank = torch.rand(mask.shape[0], device=mask.device, generator=generator)
    rows = torch.argsort(rank + (~mask.any(dim=1)).to(rank.dtype))[:n]
    return MSARows(features["msa"][rows], features["msa_deletions"][rows], mask[rows])


class OuterProductMean(nn.Module):
    """Pair update from the mean over rows of the outer product of two projections (Alg 9)."""

    def __init__(self, c_m: int, c_hidden: int, c_z: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.layer_norm = LayerNorm(c_m)
        self.linear_a = Linear(c_m, c_hidden)
        self.linear_b = Linear(c_m, c_hidden)
        self.linear_out = Linear(c_hidden * c_hidden, c_z, bias=True, init="zero")

    def forward(self, m: Tensor, mask: Tensor) -> Tensor:
        """[N, N, c_z] from m [S, N, c_m] and mask [S, N] bool."""
        m = self.layer_norm(m)
        present = mask.unsqueeze(-1)
        a, b = self.linear_a(m) * present, self.linear_b(m) * present
        outer = torch.einsum("sic,sjd->ijcd", a, b).flatten(-2)
        # Counts of rows are integers up to the depth of the alignment: bfloat16 would round them.
        with without_autocast(m):
            rows = mask.to(torch.promote_types(a.dtype, torch.float32))
            scale = 1.0 / (self.eps + rows.transpose(0, 1) @ rows)
        z = self.linear_out(outer)
        return z * scale.unsqueeze(-1).to(z.dtype)


class PairWeightedAveraging(nn.Module):
    """MSA update: each row averaged over tokens with weights from the pair representation (Alg 10)."""

    def __init__(self, c_m: int, c_z: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.layer_norm_m = LayerNorm(c_m)
        self.layer_norm_z = LayerNorm(c_z)
        self.linear_z = Linear(c_z, heads)
        self.linear_v = Linear(c_m, heads * width)
        self.linear_g = Linear(c_m, heads * width, init="zero")
        self.linear_o = Linear(heads * width, c_m, init="zero")

    def forward(self, m: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        """The update of m [S, N, c_m] given z [N, N, c_z], without the residual.

        `mask` [S, N]: a token absent from every row takes no part in the averages.
        """
        m = self.layer_norm_m(m)
        logits = self.linear_z(self.layer_norm_z(z)).movedim(-1, 0)
        logits = logits + key_mask_bias(mask.any(dim=0), logits.dtype)
        v = self.linear_v(m).unflatten(-1, (self.heads, -1))
        weights = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(
            v.dtype
        )
        average = torch.einsum("hij,sjhc->sihc", weights, v).flatten(-2)
        return self.linear_o(average * torch.sigmoid(self.linear_g(m)))


class MSABlock(nn.Module):
    """One block of the MSA module."""

    def __init__(
        self, c_z: int, config: MSAConfig, attention: Attention, *, updates_msa: bool = True
    ) -> None:
        super().__init__()
        self.order = config.order
        self.outer_product_mean = OuterProductMean(config.c_m, config.outer_hidden, c_z, config.outer_eps)
        self.averaging: PairWeightedAveraging | None = None
        self.msa_transition: Transition | None = None
        if updates_msa:
            self.averaging = PairWeightedAveraging(
                config.c_m, c_z, config.averaging_heads, config.averaging_width
            )
            self.msa_transition = Transition(config.c_m, config.transition_n)
        self.msa_dropout = SharedDropout(config.dropout, shared=-3)
        self.pair = PairBlock(c_z, config.pair, attention)

    def _update_msa(self, m: Tensor, z: Tensor, msa_mask: Tensor) -> Tensor:
        if self.averaging is None or self.msa_transition is None:
            return m
        m = m + self.msa_dropout(self.averaging(m, z, msa_mask))
        return m + self.msa_transition(m)

    def forward(
        self, m: Tensor, z: Tensor, msa_mask: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The new m [S, N, c_m] and z [N, N, c_z]. msa_mask [S, N], mask [N]: True = keep."""
        if self.order == "averaging_first":
            m = self._update_msa(m, z, msa_mask)
            z = z + self.outer_product_mean(m, msa_mask)
        else:
            z = z + self.outer_product_mean(m, msa_mask)
            m = self._update_msa(m, z, msa_mask)
        return m, self.pair(z, mask)


class MSAModule(nn.Module):
    """Embed alignment rows and let them update the pair representation (Alg 8)."""

    def __init__(self, c_s_inputs: int, c_z: int, config: MSAConfig, attention: Attention) -> None:
        super().__init__()
        self.linear_m = Linear(NUM_MSA_CLASSES + 2, config.c_m)
        self.linear_s = Linear(c_s_inputs, config.c_m)
        last = config.blocks - 1
        keep_last = config.last_block_updates_msa or config.order == "averaging_first"
        self.blocks = nn.ModuleList(
            MSABlock(c_z, config, attention, updates_msa=index < last or keep_last)
            for index in range(config.blocks)
        )

    def embed(self, rows: MSARows, s_inputs: Tensor) -> Tensor:
        """m [S, N, c_m] from the rows and s_inputs [N, c_s_inputs]."""
        dtype = compute_dtype(self.linear_m.weight)
        deletions = rows.deletions.to(self.linear_m.weight.dtype)
        extra = torch.stack((deletions.clamp(max=1.0), torch.atan(deletions / 3.0) * (2.0 / math.pi)), dim=-1)
        onehot = one_hot(rows.msa, NUM_MSA_CLASSES, dtype)
        return self.linear_m(torch.cat((onehot, extra.to(dtype)), dim=-1)) + self.linear_s(s_inputs)

    def forward(self, rows: MSARows, s_inputs: Tensor, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """The new z [N, N, c_z]. `mask` [N]: tokens to keep."""
        m = self.embed(rows, s_inputs)
        for block in self.blocks:
            m, z = block(m, z, rows.mask, mask)
        return z

"""Template embedder (Alg 16): backbone geometry of aligned templates to a pair update."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.af3.config import Attention, TemplateConfig
from baselines.af3.pairformer import PairBlock
from baselines.af3.primitives import LayerNorm, Linear, compute_dtype, one_hot
from baselines.data.schema import NUM_RESTYPES

FIRST_BIN, LAST_BIN, BINS = 3.25, 50.75, 39
"""Lower edges of the first and last distance bin, in Å, and their number; the last bin is open."""

_N, _CA, _C, _CB = range(4)


def distogram(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """One-hot distance bins [N, N, BINS] of positions [N, 3] in Å; all zero below the first edge."""
    lower = torch.linspace(FIRST_BIN, LAST_BIN, BINS, device=positions.device).square()
    upper = torch.cat((lower[1:], lower.new_full((1,), 1e8)))
    squared = (positions[:, None] - positions[None, :]).square().sum(-1, keepdim=True)
    return ((squared > lower) & (squared < upper)).to(dtype)


def unit_vectors(n: Tensor, ca: Tensor, c: Tensor) -> Tensor:
    """[N, N, 3]: the direction of CA j seen from the backbone frame of i.

    The frame has its x axis along CA→C and N in the upper half of the xy plane. Undefined frames (atoms
    that coincide) give finite values for the caller to mask.
    """
    x = F.normalize(c - ca, dim=-1, eps=1e-6)
    to_n = n - ca
    y = F.normalize(to_n - (to_n * x).sum(-1, keepdim=True) * x, dim=-1, eps=1e-6)
    axes = torch.stack((x, y, torch.linalg.cross(x, y)), dim=-2)
    local = torch.einsum("iab,ijb->ija", axes, ca[None, :] - ca[:, None])
    return F.normalize(local, dim=-1, eps=1e-6)


class TemplateEmbedder(nn.Module):
    """Embeds each template with the query pair representation, averages, projects (Alg 16)."""

    def __init__(self, c_z: int, config: TemplateConfig, attention: Attention) -> None:
        super().__init__()
        c = config.c
        self.layer_norm_z = LayerNorm(c_z)
        self.linear_z = Linear(c_z, c, init="relu")
        self.linear_distogram = Linear(BINS, c, init="relu")
        self.linear_beta_mask = Linear(1, c, init="relu")
        self.linear_restype_i = Linear(NUM_RESTYPES, c, init="relu")
        self.linear_restype_j = Linear(NUM_RESTYPES, c, init="relu")
        self.linear_unit_vector = Linear(3, c, init="relu")
        self.linear_frame_mask = Linear(1, c, init="relu")
        self.blocks = nn.ModuleList(PairBlock(c, config.pair, attention) for _ in range(config.blocks))
        self.layer_norm_out = LayerNorm(c)
        self.linear_out = Linear(c, c_z, init="relu")

    def embed(self, restype: Tensor, positions: Tensor, mask: Tensor, same_chain: Tensor) -> Tensor:
        """One template's pair features [N, N, c].

        restype [N], positions [N, 4, 3] in Å, mask [N, 4]; same_chain [N, N]: templates say nothing about
        pairs of different chains.
        """
        dtype = compute_dtype(self.linear_z.weight)
        positions = positions.masked_fill(~mask.unsqueeze(-1), 0.0)
        beta, frame = mask[:, _CB], mask[:, : _C + 1].all(-1)
        beta_pair = (beta[:, None] & beta[None, :] & same_chain).unsqueeze(-1).to(dtype)
        frame_pair = (frame[:, None] & frame[None, :] & same_chain).unsqueeze(-1).to(dtype)
        vectors = unit_vectors(positions[:, _N], positions[:, _CA], positions[:, _C]).to(dtype)
        types = one_hot(restype, NUM_RESTYPES, dtype)
        v = self.linear_distogram(distogram(positions[:, _CB], dtype) * beta_pair)
        v = v + self.linear_beta_mask(beta_pair) + self.linear_frame_mask(frame_pair)
        v = v + self.linear_unit_vector(vectors * frame_pair)
        return v + self.linear_restype_i(types)[:, None] + self.linear_restype_j(types)[None, :]

    def forward(self, features: Mapping[str, Tensor], z: Tensor, mask: Tensor | None = None) -> Tensor:
        """The update of z [N, N, c_z], without the residual; zero without templates.

        `mask` [N]: tokens to keep.
        """
        templates = features["template_restype"].shape[0]
        if templates == 0:
            return torch.zeros_like(z)
        chain = features["asym_id"]
        same_chain = chain[:, None] == chain[None, :]
        query = self.linear_z(self.layer_norm_z(z))
        total = torch.zeros_like(query)
        for index in range(templates):
            v = query + self.embed(
                features["template_restype"][index],
                features["template_positions"][index],
                features["template_mask"][index],
                same_chain,
            )
            for block in self.blocks:
                v = block(v, mask)
            total = total + self.layer_norm_out(v)
        return self.linear_out(F.relu(total / templates))

"""Confidence head (Alg 31)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from baselines.af3.config import AF3Config
from baselines.af3.pairformer import Pairformer
from baselines.af3.primitives import LayerNorm, Linear, compute_dtype, to_module_dtype
from baselines.af3.templates import BINS, distogram
from baselines.data.schema import MAX_ATOMS_PER_TOKEN

RESOLVED_CLASSES = 2


class Confidence(NamedTuple):
    """Logits of the four confidences."""

    plddt: Tensor
    """[A, 50], expected local distance test of each atom."""
    pae: Tensor
    """[N, N, 64], error of token j in the frame of token i."""
    pde: Tensor
    """[N, N, 64], error of the distance ij; symmetric."""
    resolved: Tensor
    """[A, 2], whether the atom is resolved in the experiment."""


class ConfidenceHead(nn.Module):
    """Predicts how far off a predicted structure is.

    Gradients flow to whatever the caller passes in; to train the head alone, as AlphaFold 3 does, pass
    detached representations and positions.
    """

    def __init__(self, config: AF3Config) -> None:
        super().__init__()
        head, c_s, c_z = config.confidence, config.c_s, config.c_z
        self.linear_s_i = Linear(config.c_s_inputs, c_z)
        self.linear_s_j = Linear(config.c_s_inputs, c_z)
        self.linear_distogram = Linear(BINS, c_z)
        self.pairformer = Pairformer(c_s, c_z, head.pairformer, config.attention)
        self.layer_norm_pae = LayerNorm(c_z)
        self.linear_pae = Linear(c_z, head.pae_bins, init="zero")
        self.layer_norm_pde = LayerNorm(c_z)
        self.linear_pde = Linear(c_z, head.pde_bins, init="zero")
        self.layer_norm_plddt = LayerNorm(c_s)
        self.linear_plddt = Linear(c_s, MAX_ATOMS_PER_TOKEN * head.plddt_bins, init="zero")
        self.layer_norm_resolved = LayerNorm(c_s)
        self.linear_resolved = Linear(c_s, MAX_ATOMS_PER_TOKEN * RESOLVED_CLASSES, init="zero")

    @staticmethod
    def _per_atom(features: Mapping[str, Tensor], logits: Tensor) -> Tensor:
        """Each atom's row [A, bins] out of its token's logits [N, 24·bins]."""
        slots = logits.unflatten(-1, (MAX_ATOMS_PER_TOKEN, -1))
        return slots[features["atom_to_token"], features["atom_within_token"].long()]

    def forward(
        self,
        features: Mapping[str, Tensor],
        s_inputs: Tensor,
        s: Tensor,
        z: Tensor,
        x_pred: Tensor,
        mask: Tensor | None = None,
    ) -> Confidence:
        """Confidence logits of one predicted structure.

        s_inputs [N, c_s_inputs]; s [N, c_s]; z [N, N, c_z]; x_pred [A, 3] in Å; mask [N] tokens to keep.
        """
        weight = self.linear_s_i.weight
        s_inputs, s, z = (to_module_dtype(value, weight) for value in (s_inputs, s, z))
        distances = distogram(x_pred[features["representative_atom"]], compute_dtype(weight))
        z = z + self.linear_s_i(s_inputs)[:, None] + self.linear_s_j(s_inputs)[None, :]
        z = z + self.linear_distogram(distances)
        s, z = self.pairformer(s, z, mask)
        half = self.linear_pde(self.layer_norm_pde(z))
        return Confidence(
            plddt=self._per_atom(features, self.linear_plddt(self.layer_norm_plddt(s))),
            pae=self.linear_pae(self.layer_norm_pae(z)),
            pde=half + half.transpose(0, 1),
            resolved=self._per_atom(features, self.linear_resolved(self.layer_norm_resolved(s))),
        )

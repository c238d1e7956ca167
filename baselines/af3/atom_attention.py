"""Sequence-local atom attention (Alg 7) and the atom encoder (Alg 5) and decoder (Alg 6) built on it.

Atoms are one flat list of A, a multiple of the query window. Window w holds the queries 32w … 32w+31
and attends to the 128 atoms centred on them (at the ends see `AtomConfig.edge_windows`). Projections are made per atom, before windows are cut, so
overlapping windows share them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.af3.attention import biased_attention, key_mask_bias
from baselines.af3.config import AtomConfig, Attention
from baselines.af3.primitives import (
    AdaptiveLayerNorm,
    ConditionedTransition,
    LayerNorm,
    Linear,
    compute_dtype,
    one_hot,
)

Features = Mapping[str, Tensor]

ELEMENTS, NAME_CHARACTERS, NAME_LENGTH = 128, 64, 4


class WindowLayout(NamedTuple):
    """Which atoms each window's queries and keys are."""

    atom_to_token: Tensor
    """[A] int64."""
    atom_mask: Tensor
    """[A] bool."""
    key_atom: Tensor
    """[W, keys] int64: the atom of each key."""
    key_mask: Tensor
    """[W, keys] bool: the key exists and is not padding."""


def window_layout(features: Features, config: AtomConfig) -> WindowLayout:
    """The layout of the atoms of `features`, whose padding comes last.

    Computed on the device: where the last real atom is never reaches the host.
    """
    mask = features["atom_mask"]
    atoms, device = mask.shape[0], mask.device
    windows = torch.arange(atoms // config.queries, device=device)
    start = windows * config.queries - (config.keys - config.queries) // 2
    if config.edge_windows == "shifted":
        start = torch.minimum(start, mask.sum() - config.keys).clamp(min=0)
    key = start.unsqueeze(-1) + torch.arange(config.keys, device=device)
    inside = (key >= 0) & (key < atoms)
    key = key.clamp(0, atoms - 1)
    key_mask = inside & mask.index_select(0, key.flatten()).view(key.shape)
    return WindowLayout(features["atom_to_token"], mask, key, key_mask)


def query_windows(x: Tensor, layout: WindowLayout) -> Tensor:
    """[..., A, c] to [..., W, queries, c], a view."""
    return x.unflatten(-2, (layout.key_atom.shape[0], -1))


def key_windows(x: Tensor, layout: WindowLayout) -> Tensor:
    """[..., A, c] to [..., W, keys, c]; keys that `layout.key_mask` drops hold some atom's values."""
    return x.index_select(-2, layout.key_atom.flatten()).unflatten(-2, layout.key_atom.shape)


class AtomAttention(nn.Module):
    """Windowed attention with pair bias, adaptive LayerNorm and adaptive output gate (Alg 24 on atoms).

    Queries and keys are normalised by separate adaptive LayerNorms, as in the released network.
    """

    def __init__(self, config: AtomConfig, attention: Attention) -> None:
        super().__init__()
        c = config.c_atom
        self.config = config
        self.attention = attention
        self.ada_ln_q = AdaptiveLayerNorm(c, c)
        self.ada_ln_k = AdaptiveLayerNorm(c, c)
        self.linear_q = Linear(c, c, bias=True)
        self.linear_k = Linear(c, c)
        self.linear_v = Linear(c, c)
        self.linear_g = Linear(c, c, init="zero")
        self.linear_o = Linear(c, c)
        self.linear_s = Linear(c, c, bias=True, init="adaptive_gate")

    def _fold(self, windows: Tensor) -> Tensor:
        """[D, W, L, heads·d] to [D, W·heads, L, d], so that a bias [W·heads, …] serves all D samples."""
        split = windows.unflatten(-1, (self.config.heads, -1))
        return split.transpose(-3, -2).flatten(1, 2)

    def forward(self, a: Tensor, c: Tensor, bias: Tensor, layout: WindowLayout) -> Tensor:
        """The update of a [D, A, c_atom], without the residual.

        c [A, c_atom] conditions every sample; bias [W, heads, queries, keys], mask included.
        """
        from_atoms = self.ada_ln_k(a, c)
        a = self.ada_ln_q(a, c)
        q = self._fold(query_windows(self.linear_q(a), layout))
        k = self._fold(key_windows(self.linear_k(from_atoms), layout))
        v = self._fold(key_windows(self.linear_v(from_atoms), layout))
        x = biased_attention(q, k, v, bias.flatten(0, 1), self.attention)
        x = x.unflatten(1, (-1, self.config.heads)).transpose(2, 3).flatten(-2).flatten(1, 2)
        x = self.linear_o(x * torch.sigmoid(self.linear_g(a)))
        return x * torch.sigmoid(self.linear_s(c))


class AtomBlock(nn.Module):
    """One diffusion-transformer block on atoms: attention and conditioned transition (Alg 23)."""

    def __init__(self, config: AtomConfig, attention: Attention) -> None:
        super().__init__()
        self.attention = AtomAttention(config, attention)
        self.transition = ConditionedTransition(config.c_atom, config.c_atom, config.transition_n)

    def forward(self, a: Tensor, c: Tensor, bias: Tensor, layout: WindowLayout) -> Tensor:
        """The new a [D, A, c_atom]; arguments as for `AtomAttention`."""
        a = a + self.attention(a, c, bias, layout)
        return a + self.transition(a, c)


class AtomTransformer(nn.Module):
    """A stack of atom blocks whose pair biases come from one LayerNorm and one projection (Alg 7)."""

    def __init__(self, config: AtomConfig, attention: Attention) -> None:
        super().__init__()
        self.config = config
        self.layer_norm_pair = LayerNorm(config.c_pair, offset=False)
        self.linear_pair = Linear(config.c_pair, config.blocks * config.heads)
        self.blocks = nn.ModuleList(AtomBlock(config, attention) for _ in range(config.blocks))

    def forward(self, a: Tensor, c: Tensor, pair: Tensor, layout: WindowLayout) -> Tensor:
        """The new a [D, A, c_atom]; c [A, c_atom]; pair [W, queries, keys, c_pair]."""
        logits = self.linear_pair(self.layer_norm_pair(pair))
        logits = logits.unflatten(-1, (self.config.blocks, self.config.heads)).permute(3, 0, 4, 1, 2)
        biases = logits + key_mask_bias(layout.key_mask, logits.dtype)[:, None, None, :]
        for block, bias in zip(self.blocks, biases.unbind(0), strict=True):
            a = block(a, c, bias, layout)
        return a


class ReferencePairEmbedding(nn.Module):
    """Atom pair embedding of the reference conformer and of two single conditionings (Alg 5, lines 2-6).

    `valid_flag` is absent from the copy that the released network owns but never uses.
    """

    def __init__(self, config: AtomConfig, *, valid_flag: bool = True) -> None:
        super().__init__()
        self.linear_row = Linear(config.c_atom, config.c_pair)
        self.linear_column = Linear(config.c_atom, config.c_pair)
        self.linear_offset = Linear(3, config.c_pair, precise=True)
        self.linear_distance = Linear(1, config.c_pair)
        self.linear_valid = Linear(1, config.c_pair) if valid_flag else None

    def forward(self, features: Features, c: Tensor, layout: WindowLayout) -> Tensor:
        """[W, queries, keys, c_pair] from the conditioning c [A, c_atom]."""
        dtype = compute_dtype(self.linear_row.weight)
        positions = features["ref_pos"].to(self.linear_offset.weight.dtype)
        space = features["ref_space_uid"].unsqueeze(-1)
        offset = query_windows(positions, layout)[:, :, None] - key_windows(positions, layout)[:, None]
        valid = query_windows(space, layout)[:, :, None] == key_windows(space, layout)[:, None]
        valid = (valid & layout.key_mask[:, None, :, None]).to(dtype)
        closeness = 1.0 / (1.0 + offset.square().sum(-1, keepdim=True))
        reference = self.linear_offset(offset).to(dtype) + self.linear_distance(closeness.to(dtype))
        pair = reference * valid
        if self.linear_valid is not None:
            pair = pair + self.linear_valid(valid)
        active = F.relu(c)
        row = query_windows(self.linear_row(active), layout)[:, :, None]
        column = key_windows(self.linear_column(active), layout)[:, None]
        return pair + row + column


class AtomEncoding(NamedTuple):
    """What the encoder hands to the tokens and to the decoder."""

    tokens: Tensor
    """[N, c_token] or [D, N, c_token]: mean over each token's atoms."""
    atoms: Tensor
    """[D, A, c_atom], the decoder's skip connection (D = 1 without coordinates)."""
    conditioning: Tensor
    """[A, c_atom]."""
    pair: Tensor
    """[W, queries, keys, c_pair]."""
    layout: WindowLayout


class AtomAttentionEncoder(nn.Module):
    """Atom features, and noisy positions if there are any, to tokens (Alg 5).

    `c_s` and `c_z` are the widths of the trunk's conditioning, or None for the input embedder, which
    sees neither trunk nor coordinates.
    """

    def __init__(
        self, config: AtomConfig, c_token: int, *, c_s: int | None, c_z: int | None, attention: Attention
    ) -> None:
        super().__init__()
        c_atom, c_pair = config.c_atom, config.c_pair
        self.config = config
        self.linear_ref_pos = Linear(3, c_atom, precise=True)
        self.linear_ref_mask = Linear(1, c_atom)
        self.linear_ref_element = Linear(ELEMENTS, c_atom)
        self.linear_ref_charge = Linear(1, c_atom)
        self.linear_ref_name = Linear(NAME_LENGTH * NAME_CHARACTERS, c_atom)
        self.reference_pair = ReferencePairEmbedding(config)
        self.unused_pair = (
            ReferencePairEmbedding(config, valid_flag=False) if config.unused_pair_embedding else None
        )
        self.pair_mlp = nn.Sequential(
            nn.ReLU(),
            Linear(c_pair, c_pair, init="relu"),
            nn.ReLU(),
            Linear(c_pair, c_pair, init="relu"),
            nn.ReLU(),
            Linear(c_pair, c_pair, init="zero"),
        )
        self.conditioned = c_s is not None and c_z is not None
        if c_s is not None and c_z is not None:
            self.layer_norm_s = LayerNorm(c_s, offset=False)
            self.linear_s = Linear(c_s, c_atom, init="zero")
            self.layer_norm_z = LayerNorm(c_z, offset=False)
            self.linear_z = Linear(c_z, c_pair, init="zero")
            self.linear_positions = Linear(3, c_atom, precise=True)
        self.transformer = AtomTransformer(config, attention)
        self.linear_tokens = Linear(c_atom, c_token)

    def _embed_atoms(self, features: Features) -> Tensor:
        """The reference conformer, element, charge and name of every atom: [A, c_atom]."""
        dtype = compute_dtype(self.linear_ref_mask.weight)
        mask = features["atom_mask"].unsqueeze(-1).to(dtype)
        name = one_hot(features["ref_atom_name"], NAME_CHARACTERS, dtype).flatten(-2)
        charge = torch.asinh(features["ref_charge"]).unsqueeze(-1).to(dtype)
        c = self.linear_ref_pos(features["ref_pos"])
        c = c + self.linear_ref_mask(mask) + self.linear_ref_charge(charge)
        c = c + self.linear_ref_element(one_hot(features["ref_element"], ELEMENTS, dtype))
        return (c + self.linear_ref_name(name)) * mask

    def _token_pair_to_atoms(self, z: Tensor, layout: WindowLayout) -> Tensor:
        """Trunk conditioning of atom pairs: [W, queries, keys, c_pair] gathered from z [N, N, c_z]."""
        projected = self.linear_z(self.layer_norm_z(z))
        tokens = layout.atom_to_token.unsqueeze(-1)
        rows = query_windows(tokens, layout)
        columns = key_windows(tokens, layout).transpose(-1, -2)
        index = rows * z.shape[0] + columns
        gathered = projected.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)
        return gathered * layout.key_mask[:, None, :, None]

    def _to_tokens(self, atoms: Tensor, layout: WindowLayout, n_tokens: int) -> Tensor:
        """Mean over each token's atoms of the projected atoms: [D, N, c_token]."""
        x = F.relu(self.linear_tokens(atoms))
        mask = layout.atom_mask.to(torch.promote_types(x.dtype, torch.float32)).unsqueeze(-1)
        total = mask.new_zeros(x.shape[0], n_tokens, x.shape[-1])
        total = total.index_add(1, layout.atom_to_token, x * mask)
        count = mask.new_zeros(n_tokens, 1).index_add(0, layout.atom_to_token, mask)
        return (total / count.clamp(min=1.0)).to(x.dtype)

    def forward(
        self,
        features: Features,
        positions: Tensor | None = None,
        s: Tensor | None = None,
        z: Tensor | None = None,
    ) -> AtomEncoding:
        """Encode the atoms.

        For diffusion: positions [D, A, 3], scaled to unit variance; s [N, c_s] of the trunk; z [N, N, c_z]
        of the diffusion conditioning. For the input embedder none of the three.
        """
        layout = window_layout(features, self.config)
        c = self._embed_atoms(features)
        if self.conditioned:
            if positions is None or s is None or z is None:
                raise ValueError("a conditioned atom encoder needs positions, s and z")
            c = c + self.linear_s(self.layer_norm_s(s)).index_select(0, layout.atom_to_token)
        pair = self.reference_pair(features, c, layout)
        atoms = c.unsqueeze(0)
        if self.conditioned and positions is not None and z is not None:
            pair = pair + self._token_pair_to_atoms(z, layout)
            atoms = atoms + self.linear_positions(positions)
        pair = pair + self.pair_mlp(pair)
        atoms = self.transformer(atoms, c, pair, layout) * layout.atom_mask.unsqueeze(-1)
        tokens = self._to_tokens(atoms, layout, features["restype"].shape[0])
        return AtomEncoding(tokens if self.conditioned else tokens.squeeze(0), atoms, c, pair, layout)


class AtomAttentionDecoder(nn.Module):
    """Token activations back to atoms, and the position update (Alg 6)."""

    def __init__(self, config: AtomConfig, c_token: int, attention: Attention) -> None:
        super().__init__()
        self.linear_tokens = Linear(c_token, config.c_atom)
        self.transformer = AtomTransformer(config, attention)
        self.layer_norm = LayerNorm(config.c_atom, offset=False)
        self.linear_positions = Linear(config.c_atom, 3, init="zero", precise=True)

    def forward(self, tokens: Tensor, encoding: AtomEncoding) -> Tensor:
        """The update of positions [D, A, 3], in units of their standard deviation."""
        layout = encoding.layout
        mask = layout.atom_mask.unsqueeze(-1)
        from_tokens = self.linear_tokens(tokens).index_select(1, layout.atom_to_token)
        atoms = (from_tokens + encoding.atoms) * mask
        atoms = self.transformer(atoms, encoding.conditioning, encoding.pair, layout) * mask
        return self.linear_positions(self.layer_norm(atoms))

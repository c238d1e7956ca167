"""Dimensions and options of the network, and the three presets.

Defaults are the released AlphaFold 3, `AF3Config()` its exact parameter layout. Where published
implementations differ, the option's default is what the released AlphaFold 3 code does; the docstring says
who does otherwise. The presets compute the same function without the parameters that nothing reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from baselines.data.schema import NUM_RESTYPES
from megafold_bench.errors import UserError

Attention = Literal["sdpa", "softmax"]
BiasOrientation = Literal["ik", "ki"]


@dataclass(frozen=True)
class AtomConfig:
    """Atom attention encoder and decoder (Alg 5, 6, 7)."""

    c_atom: int = 128
    c_pair: int = 16
    blocks: int = 3
    heads: int = 4
    queries: int = 32
    """Atoms of a query window; the number of atoms must be a multiple of it."""
    keys: int = 128
    """Atoms a query window attends to, centred on the window."""
    edge_windows: Literal["shifted", "masked"] = "shifted"
    """Key windows that reach past the first or last atom are shifted inwards (released AlphaFold 3,
    OpenFold3 0.5) or masked there (the supplement, Protenix)."""
    transition_n: int = 2
    unused_pair_embedding: bool = True
    """The released network owns, in each encoder, a second set of atom pair embeddings whose result it
    never uses. They are kept so that parameter counts agree; they get no gradient."""


@dataclass(frozen=True)
class RelativePositionConfig:
    """Relative position encoding (Alg 3)."""

    r_max: int = 32
    s_max: int = 2

    @property
    def features(self) -> int:
        """Width of the encoding: residue offset, token offset, same entity, chain offset."""
        return 2 * (2 * self.r_max + 2) + 1 + (2 * self.s_max + 2)


@dataclass(frozen=True)
class PairConfig:
    """The pair operations shared by the Pairformer, the MSA module and the templates (Alg 12 to 15)."""

    triangle_hidden: int = 128
    attention_heads: int = 4
    attention_width: int = 32
    """Channels per head of triangle attention."""
    transition_n: int = 4
    dropout: float = 0.25
    ending_node_bias: BiasOrientation = "ik"
    """Which pair biases query i and key k of the ending node. ``"ik"``: released AlphaFold 3 and
    OpenFold3 0.5; ``"ki"``: the supplement's Alg 15, Protenix and Boltz."""


@dataclass(frozen=True)
class TemplateConfig:
    """Template embedder (Alg 16)."""

    c: int = 64
    blocks: int = 2
    pair: PairConfig = field(
        default_factory=lambda: PairConfig(triangle_hidden=64, attention_width=16, transition_n=2)
    )


@dataclass(frozen=True)
class MSAConfig:
    """MSA module (Alg 8, 9, 10)."""

    c_m: int = 64
    blocks: int = 4
    outer_hidden: int = 32
    outer_eps: float = 1e-3
    averaging_heads: int = 8
    averaging_width: int = 8
    """Channels per head of pair-weighted averaging; Boltz has 32."""
    transition_n: int = 4
    dropout: float = 0.15
    order: Literal["outer_first", "averaging_first"] = "outer_first"
    """Boltz updates the MSA first and takes the outer product mean after it."""
    last_block_updates_msa: bool = True
    """The released network keeps the last block's MSA update, which nothing reads: 62,976 parameters
    without a gradient. Protenix and OpenFold3 leave it out."""
    pair: PairConfig = field(default_factory=PairConfig)


@dataclass(frozen=True)
class PairformerConfig:
    """A Pairformer stack (Alg 17)."""

    blocks: int = 48
    single_heads: int = 16
    single_transition_n: int = 4
    pair: PairConfig = field(default_factory=PairConfig)


@dataclass(frozen=True)
class DiffusionConfig:
    """Diffusion module (Alg 20 to 26)."""

    c_token: int = 768
    blocks: int = 24
    heads: int = 16
    transition_n: int = 2
    c_fourier: int = 256
    conditioning_transitions: int = 2
    sigma_data: float = 16.0
    """Standard deviation of atom positions, in Å."""
    super_block: int = 4
    """Blocks whose pair biases are projected together."""
    pair_norm: Literal["shared", "per_block"] = "shared"
    """One LayerNorm of the pair conditioning for all blocks (released AlphaFold 3, OpenFold3), or one
    LayerNorm and projection per block (Protenix)."""


@dataclass(frozen=True)
class ConfidenceConfig:
    """Confidence head (Alg 31). Protenix and the released code have no dropout here."""

    pairformer: PairformerConfig = field(
        default_factory=lambda: PairformerConfig(blocks=4, pair=PairConfig(dropout=0.0))
    )
    plddt_bins: int = 50
    pae_bins: int = 64
    pde_bins: int = 64


@dataclass(frozen=True)
class AF3Config:
    """The whole network."""

    name: str = "af3"
    c_s: int = 384
    c_z: int = 128
    attention: Attention = "sdpa"
    """``"sdpa"``: `scaled_dot_product_attention`; ``"softmax"``: explicit logits and float32 softmax."""
    atom: AtomConfig = field(default_factory=AtomConfig)
    relative_position: RelativePositionConfig = field(default_factory=RelativePositionConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    msa: MSAConfig = field(default_factory=MSAConfig)
    pairformer: PairformerConfig = field(default_factory=PairformerConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    confidence: ConfidenceConfig = field(default_factory=ConfidenceConfig)
    distogram_bins: int = 64

    @property
    def c_s_inputs(self) -> int:
        """Width of the input single representation: residue type, profile, deletion mean, atoms."""
        return 2 * NUM_RESTYPES + 1 + self.c_s


def _tiny() -> AF3Config:
    pair = PairConfig(triangle_hidden=16, attention_heads=2, attention_width=8)
    return AF3Config(
        name="tiny",
        c_s=32,
        c_z=16,
        atom=AtomConfig(c_atom=16, c_pair=8, blocks=1, heads=2),
        template=TemplateConfig(
            c=8,
            blocks=1,
            pair=PairConfig(triangle_hidden=8, attention_heads=2, attention_width=8, transition_n=2),
        ),
        msa=MSAConfig(c_m=16, blocks=2, outer_hidden=8, averaging_heads=2, averaging_width=8, pair=pair),
        pairformer=PairformerConfig(blocks=2, single_heads=4, pair=pair),
        diffusion=DiffusionConfig(c_token=32, blocks=2, heads=4, c_fourier=16, super_block=2),
        confidence=ConfidenceConfig(
            pairformer=PairformerConfig(
                blocks=1,
                single_heads=4,
                pair=PairConfig(triangle_hidden=16, attention_heads=2, attention_width=8, dropout=0.0),
            )
        ),
    )


def _small() -> AF3Config:
    return AF3Config(
        name="small",
        msa=MSAConfig(blocks=2),
        pairformer=PairformerConfig(blocks=8),
        diffusion=DiffusionConfig(blocks=8),
        confidence=ConfidenceConfig(pairformer=PairformerConfig(blocks=2, pair=PairConfig(dropout=0.0))),
    )


_PRESETS = {"tiny": _tiny, "small": _small, "af3": AF3Config}


def preset(name: str) -> AF3Config:
    """The preset called `name`: ``tiny`` (laptop tests), ``small`` (full widths, few blocks) or ``af3``.

    As Protenix and OpenFold3, and unlike the released layout, presets own no parameter that cannot get a
    gradient (71,296 fewer in ``af3``). Raises `UserError` for another name.
    """
    if name not in _PRESETS:
        raise UserError(f"unknown model preset {name!r}: choose from {', '.join(_PRESETS)}")
    config = _PRESETS[name]()
    return replace(
        config,
        atom=replace(config.atom, unused_pair_embedding=False),
        msa=replace(config.msa, last_block_updates_msa=False),
    )

"""From the factors of a point to its crop: files or the synthetic complex, then one sample of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from baselines.data.complexes import Complex
from baselines.data.plan import MIN_TOKENS
from baselines.data.sampling import SampleConfig, sample_features
from baselines.data.sources import InputSpec, folder_spec, load_complex
from baselines.data.synthetic import synthetic_complex
from baselines.losses.labels import Features
from megafold_bench.errors import UserError
from megafold_bench.variants import Scalar

CROP_WEIGHTS = {
    "contiguous": (1.0, 0.0, 0.0),
    "spatial": (0.0, 1.0, 0.0),
    "interface": (0.0, 0.0, 1.0),
    "mixed": (0.2, 0.4, 0.4),
}
"""Probabilities of contiguous, spatial and interface crops; ``mixed`` is the training mixture."""


def open_complex(factors: Mapping[str, Scalar], seq_len: int, seed: int) -> Complex:
    """The complex the factors name; without ``input``, a synthetic one of exactly `seq_len` tokens.

    ``input`` is a structure file or a folder; ``msa`` and ``template`` are ``CHAIN=FILE`` separated by
    semicolons. The synthetic alignment has twice ``msa_rows`` rows, so that cycles draw from it.
    Raises `UserError` for files that are missing or do not fit.
    """
    named = factors.get("input")
    if named is None:
        return synthetic_complex(
            seq_len,
            seed,
            msa_depth=2 * int(factors["msa_rows"] or 1),
            templates=int(factors["templates"] or 0),
        )
    return _load(str(named), str(factors.get("msa") or ""), str(factors.get("template") or ""))


def check_input(factors: Mapping[str, Scalar], seq_len: int) -> None:
    """Raise `UserError` if a crop of `seq_len` tokens cannot be had, before any process is started."""
    if factors.get("input") is None:
        for name in ("msa", "template"):
            if factors.get(name):
                raise UserError(
                    f"{name} {factors[name]!r} needs a structure to belong to: name it with input"
                )
        if seq_len < MIN_TOKENS:
            raise UserError(
                f"sequence length {seq_len} is too short for the synthetic complex: give at least {MIN_TOKENS}"
            )
        return
    available = open_complex(factors, seq_len, 0).n_tokens
    if seq_len > available:
        raise UserError(
            f"sequence length {seq_len} exceeds the {available} tokens of {factors['input']}: give at most {available}"
        )


def make_crop(complex_: Complex, factors: Mapping[str, Scalar], seq_len: int, seed: int) -> Features:
    """Sample 0 of epoch 0, on the CPU."""
    config = SampleConfig(
        n_tokens=seq_len,
        crop_weights=CROP_WEIGHTS[str(factors["crop"])],
        templates=int(factors["templates"] or 0),
    )
    return sample_features(complex_, config, seed, epoch=0, sample=0)


@lru_cache(maxsize=1)
def _load(path: str, msa: str, template: str) -> Complex:
    source = Path(path)
    spec = folder_spec(source) if source.is_dir() else InputSpec(source)
    templates: dict[str, tuple[Path, ...]] = dict(spec.templates)
    for chain, file in _pairs(template, "template"):
        templates[chain] = (*templates.get(chain, ()), file)
    return load_complex(
        InputSpec(spec.structure, {**spec.msa, **dict(_pairs(msa, "msa"))}, templates, spec.shared_templates)
    )


def _pairs(text: str, name: str) -> list[tuple[str, Path]]:
    """``A=x.a3m;B=y.a3m`` as pairs."""
    pairs = []
    for item in filter(None, text.split(";")):
        chain, equals, file = item.partition("=")
        if not (chain and equals and file):
            raise UserError(f"{name} {item!r} is not CHAIN=FILE: write for example A=chain_a.a3m")
        pairs.append((chain, Path(file)))
    return pairs

"""The options of the PyTorch variants: names, defaults by preset, and what values are possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from baselines.checkpointing import MODES
from baselines.inputs import CROP_WEIGHTS, check_input
from baselines.losses.weights import STAGES
from baselines.precision import POLICIES
from megafold_bench.errors import UserError
from megafold_bench.variants import Scalar

FILES = ("input", "msa", "template")
PRESETS = ("tiny", "small", "af3")
ATTENTION = ("sdpa", "softmax")


@dataclass(frozen=True)
class Whole:
    """A whole number of at least `minimum`, with a default for each preset."""

    minimum: int
    tiny: int
    small: int
    af3: int

    def parse(self, name: str, value: Scalar) -> int:
        """`value` as a number; text from a command line is read. Raises `UserError`."""
        try:
            number = int(value) if isinstance(value, str) else value
        except ValueError:
            number = None
        if isinstance(number, bool) or not isinstance(number, int) or number < self.minimum:
            raise UserError(f"{name}={value!r} is impossible: give a whole number of at least {self.minimum}")
        return number


@dataclass(frozen=True)
class Choice:
    """One of a few words, with a default for each preset."""

    words: tuple[str, ...]
    tiny: str
    small: str
    af3: str

    def parse(self, name: str, value: Scalar) -> str:
        """`value` itself if it is one of the words. Raises `UserError`."""
        if value not in self.words:
            raise UserError(f"{name}={value!r} is unknown: choose from {', '.join(self.words)}")
        return str(value)


@dataclass(frozen=True)
class Flag:
    """On or off, with one default."""

    default: bool

    def parse(self, name: str, value: Scalar) -> bool:
        """`value` as a truth value; the words true and false are read. Raises `UserError`."""
        words = {"true": True, "false": False, "on": True, "off": False, "1": True, "0": False}
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        if not isinstance(value, bool):
            raise UserError(f"{name}={value!r} is unknown: give true or false")
        return value


OPTIONS: dict[str, Whole | Choice | Flag] = {
    "cycles": Whole(1, tiny=2, small=2, af3=2),
    "diffusion_samples": Whole(1, tiny=2, small=16, af3=48),
    "diffusion_chunk": Whole(1, tiny=4, small=4, af3=4),
    "rollout_steps": Whole(1, tiny=2, small=20, af3=20),
    "msa_rows": Whole(1, tiny=16, small=1024, af3=1024),
    "templates": Whole(0, tiny=4, small=4, af3=4),
    "precision": Choice(tuple(POLICIES), tiny="fp32", small="bf16", af3="bf16"),
    "checkpointing": Choice(MODES, tiny="none", small="block", af3="block"),
    "stage": Choice(tuple(STAGES), tiny="initial", small="initial", af3="initial"),
    "attention": Choice(ATTENTION, tiny="sdpa", small="sdpa", af3="sdpa"),
    "crop": Choice(tuple(CROP_WEIGHTS), tiny="spatial", small="spatial", af3="spatial"),
    "warmup_steps": Whole(1, tiny=5, small=1000, af3=1000),
    "ema": Flag(True),
    "graphs": Flag(False),
    "offload": Flag(False),
}
LATER = ("graphs", "offload")
"""Factors only where they are on: records from before there were such flags mean the same without them."""


def resolve_factors(options: Mapping[str, Scalar], seq_len: int) -> dict[str, Scalar]:
    """Every factor of the workload, defaults filled in.

    ``preset`` is ``af3`` where torch sees a GPU, else ``tiny``; without a GPU ``precision`` is ``fp32``.
    ``input`` is None for the synthetic complex. The diffusion chunk is at most the number of samples. ``graphs`` and
    ``offload`` are factors only where they are on.
    Raises `UserError` for an unknown option, an impossible value, files that are missing or do not fit, or
    a length that the input cannot give; to tell, it reads the files.
    """
    known = ("preset", *FILES, *OPTIONS)
    for name in options:
        if name not in known:
            raise UserError(f"unknown option {name!r}: choose from {', '.join(known)}")
    if seq_len < 1:
        raise UserError(f"sequence length {seq_len} is impossible: give at least 1 token")
    on_gpu = torch.cuda.is_available()
    preset = options.get("preset") or ("af3" if on_gpu else "tiny")
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}: choose from {', '.join(PRESETS)}")
    factors: dict[str, Scalar] = {"preset": preset, **{name: options.get(name) for name in FILES}}
    for name, option in OPTIONS.items():
        value = options.get(name)
        if value is None:
            value = option.default if isinstance(option, Flag) else getattr(option, str(preset))
            if name == "precision" and not on_gpu:
                value = "fp32"
        factors[name] = option.parse(name, value)
    if factors["offload"] and factors["checkpointing"] == "none":
        raise UserError(
            "offload=true moves what checkpointed blocks keep: give checkpointing=block or reentrant, not none"
        )
    for name in LATER:
        if not factors[name]:
            del factors[name]
    factors["diffusion_chunk"] = min(_whole(factors, "diffusion_chunk"), _whole(factors, "diffusion_samples"))
    check_input(factors, seq_len)
    return factors


def _whole(factors: Mapping[str, Scalar], name: str) -> int:
    value = factors[name]
    assert isinstance(value, int)
    return value

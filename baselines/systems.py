"""The variants made of stock PyTorch: eager, and compiled block by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from baselines.compilation import compile_units, compiler_support, strict_compilation
from baselines.factors import resolve_factors
from baselines.workload import FixedCropWorkload, build_workload
from megafold_bench.variants import Scalar, Support


@dataclass(frozen=True)
class PyTorchVariant:
    """AF3 training in eager PyTorch, as a competent user of today's open trainers runs it.

    Kept from those trainers: stock operators only; separate SwiGLU and gate projections; normalisation and
    projection of the pair bias in each of the 24 token blocks, again for each chunk of 4 samples and each
    rollout step; attention in float32 in the diffusion module; dense smooth LDDT, one sample at a time; a
    20-step rollout every step; block-level activation checkpointing; unfused Adam; float32 gradients;
    a singular value decomposition for each chunk, which makes the host wait for the device.

    Not kept, because a competent user turns them off: emptying the allocator's cache each step, NaN checks
    and printed losses that wait for the device, cloning loops for the weight average (one
    multi-tensor call instead), one-hot and N×N features made on the host, N²×atoms² bond masks, pair
    conditioning recomputed for each chunk, the trunk's activations held while the diffusion module trains,
    alignment rows padded to a fixed depth.
    """

    name: str = "pytorch"
    summary: str = "AF3 in eager PyTorch: bf16 trunk, fp32 diffusion, block checkpointing, unfused Adam"

    def support(self, device: str) -> Support:
        """Usable on the CPU, and on a GPU that torch sees."""
        if device == "cuda" and not torch.cuda.is_available():
            return Support(False, "no CUDA or ROCm device is visible to torch")
        return Support(True)

    def resolve(self, options: Mapping[str, Scalar], seq_len: int) -> dict[str, Scalar]:
        """Every factor, defaults filled in; see `baselines.factors.resolve_factors`."""
        return resolve_factors(options, seq_len)

    def build(self, factors: Mapping[str, Scalar], seq_len: int, seed: int, device: str) -> FixedCropWorkload:
        """The model with fresh weights and one crop of `seq_len` tokens, on `device`."""
        return build_workload(factors, seq_len, seed, device)


@dataclass(frozen=True)
class InductorVariant(PyTorchVariant):
    """The same step with each repeated block compiled by ``torch.compile`` (Inductor), static shapes.

    Blocks of one class share one compiled function, checkpointing stays outside it, and nothing falls back
    to eager: a graph break or a recompilation every step raises. The compiled parts are those of
    ``AlphaFold3.checkpoint_units``; embeddings, heads, losses and Adam stay eager.
    """

    name: str = "inductor"
    summary: str = "the same, each block compiled by torch.compile (Inductor)"

    def support(self, device: str) -> Support:
        """As eager, and a compiler: Triton on a GPU, C++ on the CPU."""
        eager = super().support(device)
        return compiler_support(device) if eager.usable else eager

    def build(self, factors: Mapping[str, Scalar], seq_len: int, seed: int, device: str) -> FixedCropWorkload:
        """As eager, with compiled blocks; they compile during the first steps."""
        return build_workload(
            factors,
            seq_len,
            seed,
            device,
            prepare=lambda model: compile_units(model.checkpoint_units()),
            around_step=strict_compilation,
        )


PYTORCH = PyTorchVariant()
INDUCTOR = InductorVariant()

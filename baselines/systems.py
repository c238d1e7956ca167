"""The variants people run today: stock PyTorch, eager and compiled block by block, and with the operators of others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch

from baselines import peers
from baselines.af3.model import AlphaFold3
from baselines.compilation import compile_units, compiler_support, strict_compilation
from baselines.factors import Flag, resolve_factors
from baselines.peer_operators import OperatorReport, use_cuequivariance, use_flex, use_trifast
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


@dataclass(frozen=True)
class PeerVariant(PyTorchVariant, ABC):
    """The step of `pytorch` with named operators of another package, and nothing else changed.

    Same weights, input, random choices, losses, precision policy, checkpointing and optimiser. With the option
    ``compile``, on by default, the blocks around the operators are compiled as `inductor` compiles them. A call
    that an operator does not take runs the model's own attention or multiplication and is counted in the fact
    ``peer_operators``.
    """

    flags: tuple[tuple[str, Flag], ...] = (("compile", Flag(True)),)
    """The options on top of those of `pytorch`."""

    @abstractmethod
    def use(self, model: AlphaFold3, factors: Mapping[str, Scalar]) -> OperatorReport:
        """Put the operators into `model`."""

    def support(self, device: str) -> Support:
        """A GPU that torch sees and Triton, which all of them are written in or compiled by."""
        if device != "cuda":
            return Support(False, f"{self.name} trains on a GPU only, not on {device}")
        return compiler_support(device)

    def resolve(self, options: Mapping[str, Scalar], seq_len: int) -> dict[str, Scalar]:
        """The factors of `pytorch` and the variant's own flags. Raises `UserError`."""
        own = dict(self.flags)
        rest = {name: value for name, value in options.items() if name not in own}
        factors = super().resolve(rest, seq_len)
        for name, flag in own.items():
            wish = options.get(name)
            factors[name] = flag.default if wish is None else flag.parse(name, wish)
        return factors

    def build(self, factors: Mapping[str, Scalar], seq_len: int, seed: int, device: str) -> FixedCropWorkload:
        """As `pytorch`, with the operators in place before compilation and checkpointing.

        The fact ``peer_operators`` says what was replaced and by which version; its ``fallbacks`` fill up during
        the steps. Raises `UnsupportedError` if the package cannot be loaded.
        """
        reports: list[OperatorReport] = []

        def prepare(model: AlphaFold3) -> None:
            reports.append(self.use(model, factors))
            if factors["compile"]:
                compile_units(model.checkpoint_units(), fullgraph=not factors.get("graph_breaks"))

        workload = build_workload(
            factors, seq_len, seed, device, prepare=prepare, around_step=strict_compilation
        )
        return replace(workload, facts={**workload.facts, "peer_operators": reports[0].summary()})


@dataclass(frozen=True)
class FlexVariant(PeerVariant):
    """FlexAttention in triangle attention and in attention with pair bias, of the trunk and of diffusion.

    It is code generated by Inductor, so without ``compile`` the operator alone is compiled. Its bias gradient is
    summed by atomics: steps are not bitwise repeatable.
    """

    name: str = "flex"
    summary: str = "inductor with FlexAttention in triangle attention and attention with pair bias"

    def use(self, model: AlphaFold3, factors: Mapping[str, Scalar]) -> OperatorReport:
        """Put FlexAttention into `model`."""
        return use_flex(model, model.config.attention, compiled=not factors["compile"])


@dataclass(frozen=True)
class TrifastVariant(PeerVariant):
    """trifast in triangle attention."""

    name: str = "trifast"
    summary: str = "inductor with trifast in triangle attention"

    def support(self, device: str) -> Support:
        """As every peer, and the package."""
        return _packages(super().support(device), {"trifast": "trifast"})

    def use(self, model: AlphaFold3, factors: Mapping[str, Scalar]) -> OperatorReport:
        """Put trifast into `model`."""
        return use_trifast(model, model.config.attention)


@dataclass(frozen=True)
class CuEquivarianceVariant(PeerVariant):
    """NVIDIA cuEquivariance in triangle attention and triangle multiplication.

    With the option ``graph_breaks``, off by default, its calls are kept out of the compiled code, as Boltz runs
    them: each is a graph break, and what lies between is compiled.
    """

    name: str = "cuequivariance"
    summary: str = "inductor with cuEquivariance in triangle attention and triangle multiplication"
    flags: tuple[tuple[str, Flag], ...] = (("compile", Flag(True)), ("graph_breaks", Flag(False)))

    def support(self, device: str) -> Support:
        """As every peer, an NVIDIA GPU, the front end and its kernels, which are a package of their own."""
        found = super().support(device)
        if found.usable and torch.version.hip is not None:
            return Support(False, "cuEquivariance runs on NVIDIA GPUs only")
        kernels = f"cuequivariance-ops-torch-cu{(torch.version.cuda or '13').partition('.')[0]}"
        return _packages(
            found, {"cuequivariance_torch": "cuequivariance-torch", "cuequivariance_ops_torch": kernels}
        )

    def use(self, model: AlphaFold3, factors: Mapping[str, Scalar]) -> OperatorReport:
        """Put cuEquivariance into `model`."""
        opaque = bool(factors["compile"] and factors["graph_breaks"])
        report = use_cuequivariance(model, model.config.attention, opaque)
        if factors["compile"]:
            peers.prepare_cuequivariance_compilation()
        return report


def _packages(found: Support, modules: Mapping[str, str]) -> Support:
    """`found`, or that one of the `modules` is not installed and how to install the distribution it is in."""
    if not found.usable:
        return found
    missing = [package for module, package in modules.items() if find_spec(module) is None]
    if missing:
        names = " ".join(missing)
        return Support(False, f"not installed: {', '.join(missing)}; install with: pip install {names}")
    return found


PYTORCH = PyTorchVariant()
INDUCTOR = InductorVariant()
FLEX = FlexVariant()
TRIFAST = TrifastVariant()
CUEQUIVARIANCE = CuEquivarianceVariant()

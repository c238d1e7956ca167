"""Compile kernels for GPUs that are not here and read what the compilers say about them.

Triton carries the NVIDIA and AMD back ends in one wheel, so registers, on-chip memory, spills and the matrix
instructions of every kernel and shipped configuration can be checked on any Linux machine, in CI too.
"""

import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimized.ops.overwritten import overwritten

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx90a", "gfx942", "gfx950")
SHARED_LIMIT_BYTES = {
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx90a": 64 << 10,
    "gfx942": 64 << 10,
    "gfx950": 160 << 10,
}
"""Shared memory (LDS) that one program can have: where it needs more it compiles, but cannot be launched."""

NEGLIGIBLE_SPILL_BYTES = 16
"""Up to four registers a thread. Calls of subroutines (a division in fp32) save as much, and a ptxas that aims at an
occupancy spills one or two: it is reported, and no fault."""

_MATRIX = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma_\w+|v_smfmac_\w+)")


@dataclass(frozen=True)
class KernelCase:
    """One kernel with one configuration: everything needed to compile it without tensors.

    `signature` maps run-time arguments to Triton types (`*bf16`, `i32`, `fp32`); `constants` holds the
    compile-time ones; `aligned` names the arguments (pointers, strides) that are divisible by 16, which the compiler is
    told as at a launch: of those that the kernel does not specialise on, never. `entry` is the
    beginning of the key under which `tuning.lookup` finds another configuration for it; empty where none is looked up.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int = 0
    aligned: tuple[str, ...] = ()
    entry: str = ""


@dataclass(frozen=True)
class CompileReport:
    """What the back end produced. Registers per thread; shared memory (LDS) in bytes; spills in bytes per thread;
    buffers that are overwritten under a product (see `overwritten`).

    On AMD, scalar registers spill into lanes of vector registers: they are counted apart, since no memory is touched.
    """

    name: str
    arch: str
    ok: bool
    error: str = ""
    registers: int = 0
    shared_bytes: int = 0
    spill_bytes: int = 0
    scalar_spills: int = 0
    matrix_instructions: dict[str, int] = field(default_factory=dict)
    compile_s: float = 0.0
    overwritten: tuple[str, ...] = ()

    @property
    def problem(self) -> str:
        """Why this configuration should not be shipped for this architecture; empty where nothing speaks against it."""
        limit = SHARED_LIMIT_BYTES.get(self.arch)
        if not self.ok:
            return self.error or "does not compile"
        if self.overwritten:
            return f"products in flight read what is overwritten: {', '.join(self.overwritten)}"
        if limit is not None and self.shared_bytes > limit:
            return f"needs {self.shared_bytes} bytes of shared memory, {self.arch} has {limit}"
        return (
            f"spills {self.spill_bytes} bytes a thread" if self.spill_bytes > NEGLIGIBLE_SPILL_BYTES else ""
        )


def target_of(arch: str) -> Any:
    """Triton's GPUTarget for `sm_NN` or `gfx...`; ValueError for anything else."""
    from triton.backends.compiler import GPUTarget

    if re.fullmatch(r"sm_\d+", arch):
        return GPUTarget("cuda", int(arch[3:]), 32)
    if re.fullmatch(r"gfx9\w+", arch):
        return GPUTarget("hip", arch, 64)
    raise ValueError(f"unknown architecture {arch!r}; use one of {', '.join(ARCHITECTURES)}")


def _source(case: KernelCase) -> Any:
    from triton.compiler import ASTSource

    kind = ASTSource
    if type(case.kernel).__name__ == "GluonJITFunction":
        from triton.experimental.gluon._runtime import GluonASTSource

        kind = GluonASTSource
    names = case.kernel.arg_names
    signature = {n: case.signature.get(n, "constexpr") for n in names}
    constants = {(names.index(n),): v for n, v in case.constants.items()}
    unknown = {parameter.name for parameter in case.kernel.params if parameter.do_not_specialize}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in case.aligned if n not in unknown}
    return kind(case.kernel, signature, constants, attributes)


def compile_case(case: KernelCase, arch: str) -> CompileReport:
    """Compile one case for one architecture; a compiler failure is reported, not raised."""
    import triton

    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    if case.max_registers and arch.startswith("sm_"):
        options["maxnreg"] = case.max_registers
    began = time.perf_counter()
    try:
        compiled = triton.compile(_source(case), target=target_of(arch), options=options)
    except Exception as error:  # any back-end failure is the finding this tool exists to report
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return CompileReport(case.name, arch, False, text[:500], compile_s=time.perf_counter() - began)
    asm = compiled.asm
    text = asm["ptx"] if "ptx" in asm else asm["amdgcn"]
    matrix = dict(Counter(m.split(".")[0] if "." in m else m for m in _MATRIX.findall(text)))
    shared, scalar = int(compiled.metadata.shared), 0
    if "cubin" in asm:
        registers, spill = _cubin_usage(asm["cubin"])
    else:
        registers = _amd_value(text, "vgpr_count")
        # The scratch memory of a thread; spilled vector registers that found room elsewhere are not in it.
        spill = _amd_value(text, "private_segment_fixed_size")
        scalar = _amd_value(text, "sgpr_spill_count")
        shared = max(shared, _amd_value(text, "group_segment_fixed_size"))
    elapsed = time.perf_counter() - began
    late = tuple(overwritten(asm.get("ttgir", "")))
    return CompileReport(case.name, arch, True, "", registers, shared, spill, scalar, matrix, elapsed, late)


def _amd_value(text: str, name: str) -> int:
    found = re.findall(rf"^\s*\.{name}:\s*(\d+)", text, re.MULTILINE)
    return max((int(v) for v in found), default=0)


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of local memory (spills and stack) from the resource table of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        out = subprocess.run([str(tool), "-res-usage", f.name], capture_output=True, text=True, check=True)
    usage = out.stdout + out.stderr
    registers = max((int(v) for v in re.findall(r"REG:(\d+)", usage)), default=0)
    stack = max((int(v) for v in re.findall(r"STACK:(\d+)", usage)), default=0)
    local = max((int(v) for v in re.findall(r"LOCAL:(\d+)", usage)), default=0)
    return registers, stack + local

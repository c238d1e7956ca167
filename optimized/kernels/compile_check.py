"""Compile every kernel for GPUs that are not here, in several processes.

A compiler that fails is a row of the result; one that crashes takes its process with it, and is a row too.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from typing import Any

from megafold_bench.errors import UserError
from optimized.kernels.names import FAMILIES, parse_list
from optimized.ops.offline import ARCHITECTURES, CompileReport, KernelCase, compile_case

Task = tuple[str, str]
"""Architecture and name of a case."""


@dataclass(frozen=True)
class Accepted:
    """A known spill: patterns of architecture and case, the most bytes a thread, and why it stays."""

    arch: str
    case: str
    most_bytes: int
    reason: str


_FASTEST = "the fastest of the tiles timed on an H200, smaller ones included (by Triton 3.6; what 3.7 makes of them was not measured)"
_FP32 = "fp32 sums its products apart since its tiles were chosen; no others timed yet"
_WIDE = "the single representation's transition holds 512-wide tiles whole: no tile found by `fit` avoids it"
_WAITING = "addresses; registers hold three sums of 64 x 128: a third fewer instructions than the tile without a spill"
_CARRIED = (
    "what is kept from tile to tile is spilled beside the loop over channels, not in it; smaller tiles read the weights "
    "or normalise twice as often (not timed)"
)
_RESIDENT = "addresses, beside sums of 64 x 128 and what two warp groups have on its way"
_FLOAT = "a float32 dz is brought into the order of memory beside what is carried (1.3 times the time of 16 bits, with 1.2 times the bytes)"
_ENDING = (
    "another gradient is added to dx at the end, beside all of it: in the epilogue of a tile, and less traffic than the "
    "addition by itself (not timed)"
)
_OLDER = "by Triton 3.6; 3.7 has none, nor have two stages, which were not timed beside three"
ACCEPTED = (
    Accepted("sm_90", "attention.fp32.d48.tf32x3.grad_*", 88, _FASTEST),
    Accepted("sm_90", "transition.*16.384x1536.weight_gradient", 128, _WIDE),
    Accepted("sm_90", "transition.*16.128x512.weight_gradient*", 32, _WAITING),
    Accepted("sm_90", "triangle_multiplication.*16.128.output_backward", 416, _FASTEST),
    Accepted("sm_90", "triangle_multiplication.*16.128.output_backward (*", 416, _FASTEST),
    Accepted("sm_90", "triangle_multiplication.bf16.128.input_gradient_hopper*", 24, _RESIDENT),
    Accepted("sm_90", "triangle_multiplication.bf16.128.normal.input_gradient_hopper*", 96, _FLOAT),
    Accepted("sm_90", "triangle_multiplication.*16.128.*input_gradient*", 264, _CARRIED),
    Accepted("sm_90", "triangle_multiplication.bf16.128.normal.input_gradient*", 712, _FLOAT),
    Accepted("sm_90", "layer_norm_linear.*16.128.input_gradient*", 64, _ENDING),
    Accepted("sm_90", "triangle_multiplication.fp32.128.project_weight", 24, _FP32),
    Accepted("sm_90", "outer_product_mean.*16.weight", 72, _OLDER),
)
"""Spills that are shipped knowingly. One that grows, and any other, fails the check."""


def parse_architectures(text: str) -> tuple[str, ...]:
    """`gfx90a,sm_90` as names; UserError for one that is not known. Empty, or `all`: all."""
    names = parse_list(text) or ("all",)
    if "all" in names:
        return ARCHITECTURES
    for name in names:
        if name not in ARCHITECTURES:
            raise UserError(f"--arch {name}: choose from {', '.join(ARCHITECTURES)}, all")
    return names


@cache
def _cases(arch: str) -> dict[str, KernelCase]:
    from optimized.ops.catalogue import catalogue

    return {case.name: case for case in catalogue(arch)}


def tasks_for(arches: Sequence[str], ops: Sequence[str], dtypes: Sequence[str] = ()) -> list[Task]:
    """What is to be compiled: the catalogue of every architecture, of some operators and dtypes only where named."""
    try:
        tasks = [(arch, name) for arch in arches for name in _cases(arch)]
    except ValueError as error:  # a tuning file is older than the kernels
        raise UserError(f"{error}; fit or tune again: see optimized/kernels/fit.py") from error
    known = sorted({family(name) for _, name in tasks})
    wanted = {FAMILIES.get(op, op) for op in ops}
    for op in ops:
        if FAMILIES.get(op, op) not in known:
            raise UserError(f"--op {op}: choose from {', '.join([*FAMILIES, *known])}")
    return [
        (arch, name)
        for arch, name in tasks
        if (not wanted or family(name) in wanted) and (not dtypes or dtype_of(name) in dtypes)
    ]


def family(case: str) -> str:
    """The family of kernels that a case belongs to."""
    return case.partition(".")[0]


def dtype_of(case: str) -> str:
    """The dtype in the name of a case: bf16, fp16 or fp32."""
    return case.split(".")[1]


def _compile(task: Task) -> CompileReport:
    arch, name = task
    return compile_case(_cases(arch)[name], arch)


def compile_pool(jobs: int) -> ProcessPoolExecutor:
    """Fresh processes: a compiler and its threads must not be forked."""
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))


def _alone(task: Task) -> CompileReport:
    """Compile in a process of its own, whose death is an answer."""
    with compile_pool(1) as pool:
        try:
            return pool.submit(_compile, task).result()
        except BrokenProcessPool:
            return CompileReport(task[1], task[0], False, "the compiler crashed")


def compile_tasks(tasks: Sequence[Task], jobs: int) -> Iterator[CompileReport]:
    """A report for every task, as they finish."""
    suspects: list[Task] = []
    with compile_pool(jobs) as pool:
        futures: dict[Future[CompileReport], Task] = {pool.submit(_compile, task): task for task in tasks}
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenProcessPool:  # all that were still to do end so; only one of them is to blame
                suspects.append(futures[future])
    for task in suspects:
        yield _alone(task)


def accepted(report: CompileReport) -> str:
    """Why this report's spill is known and accepted; empty where it is not, or is larger than when it was accepted."""
    if not report.problem.startswith("spills"):
        return ""
    return next(
        (
            known.reason
            for known in ACCEPTED
            if fnmatch(report.arch, known.arch)
            and fnmatch(report.name, known.case)
            and report.spill_bytes <= known.most_bytes
        ),
        "",
    )


def check(
    arches: Sequence[str],
    ops: Sequence[str] = (),
    jobs: int | None = None,
    dtypes: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """A row for every kernel and configuration, by architecture and in the order of the catalogue.

    `ops` and `dtypes` (bf16, fp16, fp32) leave only some of them; empty: all. `jobs`: processes, as many as cores for None.

    Keys: arch, case, ok, problem (empty: none), accepted (why the problem is tolerated; empty: it is not), registers,
    shared_bytes, spill_bytes, scalar_spills, matrix_instructions (count by name), compile_s. Raises UserError where
    kernels cannot be compiled: no Triton, or Triton as an interpreter.
    """
    refuse_interpreter()
    tasks = tasks_for(arches, ops, dtypes)
    found: dict[Task, CompileReport] = {}
    for report in compile_tasks(tasks, jobs or default_jobs()):
        found[report.arch, report.name] = report
        progress(len(found), len(tasks))
    return [_row(found[task]) for task in tasks]


def _row(report: CompileReport) -> dict[str, Any]:
    row = {"arch": report.arch, "case": report.name, "ok": report.ok, "problem": report.problem}
    row["accepted"] = accepted(report) if report.problem else ""
    numbers = (
        "registers",
        "shared_bytes",
        "spill_bytes",
        "scalar_spills",
        "matrix_instructions",
        "compile_s",
    )
    return row | {name: getattr(report, name) for name in numbers}


def default_jobs() -> int:
    """Processes at a time: the cores this process may use."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def refuse_interpreter() -> None:
    """Raise UserError unless Triton is installed and compiles."""
    try:
        from triton import knobs
    except ImportError:
        raise UserError("triton is not installed: it compiles the kernels; pip install triton") from None
    if knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")

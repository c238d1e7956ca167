"""`doctor`: what will and will not work on this machine, and what to do about it.

Each check is a small function that returns one `Check`. Those of the GPU, torch and the vendors'
libraries are in `megafold_bench.checks`; here are the host's, and the verdict over all.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Literal

from megafold_bench import host
from megafold_bench.checks import (
    GIB,
    Check,
    check_amdsmi,
    check_gpu,
    check_nvml,
    check_torch,
    check_torch_matches_driver,
    check_torch_runs,
    check_visible,
)
from megafold_bench.devices import selector_for
from megafold_bench.devices.base import Unavailable, attempt
from megafold_bench.devices.torch_facts import torch_build

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def check_triton() -> Check:
    """Triton, and what it needs to build its launchers: a C compiler and Python's headers."""
    version = host.first_version("triton", "pytorch-triton-rocm", "triton-rocm")
    if isinstance(version, Unavailable):
        return Check(
            "Triton",
            "warn",
            version.reason,
            "the inductor and fused variants will not run on a GPU: pip install triton",
        )
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if not compiler:
        return Check("Triton", "fail", f"{version}, but no C compiler", "install gcc or clang, or set CC")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return Check(
            "Triton",
            "warn",
            f"{version}, but Python.h is missing",
            f"install the headers of Python {platform.python_version()} (python3-dev)",
        )
    return Check("Triton", "ok", f"{version}, C compiler {compiler}")


def check_compiler() -> Check:
    """The C++ compiler that torch.compile needs on the CPU."""
    wanted = os.environ.get("CXX")
    found = (
        shutil.which(wanted)
        if wanted
        else shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    )
    if found:
        return Check("C++ compiler", "ok", found)
    what = f"CXX={wanted!r} is not a program" if wanted else "none"
    return Check(
        "C++ compiler",
        "warn",
        what,
        "the inductor variant will not run on a CPU: install g++ or clang++, or set CXX",
    )


def check_allocator() -> Check:
    """Settings of torch's caching allocator: they move the memory boundary, so they must be meant."""
    found = {name: os.environ[name] for name in ALLOCATOR_VARIABLES if os.environ.get(name)}
    build = torch_build()
    if not found:
        on_nvidia = not isinstance(build, Unavailable) and build.vendor == "nvidia"
        return Check(
            "allocator",
            "ok",
            "defaults",
            "for boundaries set PYTORCH_ALLOC_CONF=expandable_segments:True" if on_nvidia else "",
        )
    shown = ", ".join(f"{name}={value}" for name, value in found.items())
    if len(set(found.values())) > 1:
        return Check("allocator", "warn", f"settings disagree: {shown}", "keep PYTORCH_ALLOC_CONF only")
    if not isinstance(build, Unavailable) and build.vendor == "amd" and "expandable_segments:True" in shown:
        return Check(
            "allocator", "warn", shown, "expandable segments need ROCm 7.0 and can hang: use with a timeout"
        )
    return Check("allocator", "ok", shown)


def _space(name: str, folder: Path, least: int, good: int, remedy: str) -> Check:
    usage = attempt(name, shutil.disk_usage, folder)
    if isinstance(usage, Unavailable):
        return Check(name, "warn", usage.reason, remedy)
    status: Literal["ok", "warn", "fail"] = (
        "fail" if usage.free < least else "warn" if usage.free < good else "ok"
    )
    return Check(
        name, status, f"{usage.free / GIB:.1f} GiB free in {folder}", "" if status == "ok" else remedy
    )


def check_disk() -> Check:
    """Room for records, traces and compiled kernels where the runs are written."""
    return _space(
        "disk", Path.cwd(), GIB // 4, 5 * GIB, "traces need gigabytes: free some space or use --out elsewhere"
    )


def check_shm() -> Check:
    """Shared memory for data loader workers; containers often have 64 MiB."""
    return _space(
        "shared memory",
        Path("/dev/shm"),
        32 * 1024**2,
        GIB,
        "start the container with --shm-size 8g or --ipc host",
    )


def check_memory() -> Check:
    """Host memory, and the cgroup's limit where it is tighter."""
    total, limit = host.ram_bytes(), host.cgroup_memory_limit_bytes()
    if isinstance(total, Unavailable):
        return Check("host memory", "warn", total.reason)
    tight = min(total, limit) if isinstance(limit, int) else total
    detail = f"{total / GIB:.1f} GiB" + (
        f", this cgroup may use {tight / GIB:.1f} GiB" if tight < total else ""
    )
    if tight < 8 * GIB:
        return Check(
            "host memory",
            "warn",
            detail,
            "the af3 preset's parameters and optimiser need more: use small or tiny",
        )
    return Check("host memory", "ok", detail)


def check_caches() -> Check:
    """Where compiled kernels are kept: must be writable, and best kept between runs."""
    folders = {
        "Triton": Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"),
        "Inductor": Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()),
    }
    blocked = []
    for name, folder in folders.items():
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        if not os.access(nearest, os.W_OK):
            blocked.append(f"{name}: {folder}")
    if blocked:
        return Check(
            "caches",
            "fail",
            f"not writable: {'; '.join(blocked)}",
            "set TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR",
        )
    return Check("caches", "ok", "; ".join(f"{name} in {folder}" for name, folder in folders.items()))


def check_python() -> Check:
    """Python's version."""
    good = sys.version_info >= (3, 11)
    return Check(
        "Python",
        "ok" if good else "fail",
        platform.python_version(),
        "" if good else "use Python 3.11 or newer",
    )


def verdict(checks: list[Check]) -> Check:
    """What all of it comes to: what will run here, and what will not."""
    bad = {check.name for check in checks if check.status != "ok"}
    failed = [check.name for check in checks if check.status == "fail"]
    selector = selector_for("cuda", 0)
    gpu = not isinstance(selector, Unavailable) and not bad & {"torch and driver", "torch runs"}
    works: list[str] = []
    lacks: list[str] = []
    (works if not {"torch", "torch runs"} & set(failed) else lacks).append("eager sweeps on the CPU")
    (works if gpu else lacks).append("sweeps on the GPU")
    compiled = "Triton" not in failed and "Triton" not in bad if gpu else "C++ compiler" not in bad
    (works if compiled else lacks).append("compiled variants")
    if gpu:
        library = "NVML" if str(selector).startswith("nvidia") else "AMD SMI"
        (works if library not in bad else lacks).append("power and energy")
    detail = f"works: {', '.join(works) or 'nothing'}" + (f"; does not: {', '.join(lacks)}" if lacks else "")
    return Check(
        "verdict",
        "fail" if failed else "warn" if bad else "ok",
        detail,
        f"mend: {', '.join(failed)}" if failed else "",
    )


def doctor(probe: bool = True) -> list[Check]:
    """Every check, then the verdict. `probe` False leaves out the one that starts torch (seconds)."""
    checks = [check_python(), check_gpu(), check_visible(), check_torch(), check_torch_matches_driver()]
    checks += [check_torch_runs()] if probe else []
    checks += [check_triton(), check_compiler(), check_nvml(), check_amdsmi(), check_allocator()]
    checks += [check_disk(), check_shm(), check_memory(), check_caches()]
    return [*checks, verdict(checks)]

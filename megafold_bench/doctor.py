"""`doctor`: what will and will not work on this machine, and what to do about it.

Each check is a small function that returns one `Check`. Only `check_torch_runs` starts torch, in a
process of its own, because what a broken installation does on import cannot be read from files.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megafold_bench import host
from megafold_bench.devices import amd, list_devices, nvidia, open_selector, selector_for
from megafold_bench.devices.base import Unavailable, attempt
from megafold_bench.devices.torch_build import TorchBuild, torch_build

GIB = 1024**3
MINIMUM_TORCH = (2, 11)
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


@dataclass(frozen=True)
class Check:
    """One finding. `remedy` is empty where nothing needs doing."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    remedy: str = ""


def check_gpu() -> Check:
    """Every GPU that a vendor's library shows."""
    selectors = list_devices()
    if isinstance(selectors, Unavailable):
        return Check(
            "GPU",
            "warn",
            f"none: {selectors.reason}",
            "only CPU sweeps will run; install the GPU's driver if there is one",
        )
    names = []
    for selector in selectors:
        device = open_selector(selector)
        identity = device.identity
        device.close()
        size = (
            "" if isinstance(identity.total_bytes, Unavailable) else f" {identity.total_bytes / GIB:.1f} GiB"
        )
        names.append(f"{selector if isinstance(identity.name, Unavailable) else identity.name}{size}")
    if not names:
        return Check(
            "GPU", "warn", "the driver is loaded but shows no GPU", "check the container's device settings"
        )
    return Check("GPU", "ok", "; ".join(names))


def check_visible() -> Check:
    """Which physical GPU torch's first device is."""
    build = torch_build()
    if isinstance(build, Unavailable) or build.vendor is None:
        return Check("visible devices", "ok", "not asked: torch has no GPU support")
    selector = selector_for("cuda", 0)
    if not isinstance(selector, Unavailable):
        return Check("visible devices", "ok", f"cuda:0 is {selector}")
    hiding = [
        name for name in os.environ if name.endswith("_VISIBLE_DEVICES") and name != "NVIDIA_VISIBLE_DEVICES"
    ]
    settings = ", ".join(f"{name}={os.environ[name]!r}" for name in sorted(hiding))
    return Check(
        "visible devices",
        "warn",
        selector.reason,
        f"check {settings}" if settings else "install or load the GPU driver",
    )


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``2.11.0+cu130`` gives (2, 11, 0)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = "".join(character for character in part if character.isdigit())
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def check_torch() -> Check:
    """Whether torch is there and new enough, and what it was built for."""
    build = torch_build()
    if isinstance(build, Unavailable):
        return Check("torch", "fail", build.reason, "install torch 2.11 or newer")
    target = {"nvidia": f"CUDA {build.cuda}", "amd": f"ROCm (HIP {build.hip})"}.get(
        build.vendor or "", "CPU only"
    )
    detail = f"{build.version}, built for {target}"
    if _numbers(build.version)[:2] < MINIMUM_TORCH:
        return Check("torch", "fail", detail, "install torch 2.11 or newer")
    return Check("torch", "ok", detail)


def check_torch_matches_driver() -> Check:
    """Whether torch's build suits the GPU's vendor and the driver's CUDA version."""
    name = "torch and driver"
    build, selectors = torch_build(), list_devices()
    if isinstance(build, Unavailable):
        return Check(name, "fail", build.reason, "install torch 2.11 or newer")
    vendors = (
        set()
        if isinstance(selectors, Unavailable)
        else {s.split(":")[0].replace("sysfs", "amd") for s in selectors}
    )
    if build.vendor is None:
        if not vendors:
            return Check(name, "ok", "CPU build on a machine without a GPU")
        return Check(
            name,
            "warn",
            f"torch is a CPU build, but there is a GPU ({', '.join(sorted(vendors))})",
            "install torch for this GPU: https://pytorch.org/get-started",
        )
    if not vendors:
        return Check(
            name,
            "warn",
            f"torch is built for {build.vendor}, but no driver answers",
            "only CPU sweeps will run; load the driver for GPU sweeps",
        )
    if build.vendor not in vendors:
        return Check(
            name,
            "fail",
            f"torch is built for {build.vendor}, the GPU is {', '.join(sorted(vendors))}",
            "install torch for this GPU: https://pytorch.org/get-started",
        )
    return (
        _check_cuda_version(name, build) if build.vendor == "nvidia" else Check(name, "ok", "both are AMD's")
    )


def _check_cuda_version(name: str, build: TorchBuild) -> Check:
    nvml = nvidia.load_nvml()
    if isinstance(nvml, Unavailable):
        return Check(name, "warn", nvml.reason, "cannot compare versions")
    raw = attempt("driver's CUDA version", lambda: int(nvml.nvmlSystemGetCudaDriverVersion()))
    driver = attempt("driver", nvml.nvmlSystemGetDriverVersion)
    nvml.nvmlShutdown()
    if isinstance(raw, Unavailable):
        return Check(name, "warn", raw.reason, "cannot compare versions")
    supported = (raw // 1000, raw % 1000 // 10)
    shown = f"driver {driver} supports CUDA {supported[0]}.{supported[1]}, torch wants {build.cuda}"
    # Within one major version any driver serves any toolkit; an older major does not.
    if _numbers(build.cuda or "")[:1] > supported[:1]:
        return Check(
            name, "fail", shown, f"update the driver, or install a torch built for CUDA {supported[0]}"
        )
    return Check(name, "ok", shown)


_PROBE = """
import json, sys
out = {}
import torch
out["torch"] = torch.__version__
out["cuda"] = torch.cuda.is_available()
if out["cuda"]:
    x = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    out["sum"] = float((x @ x).float().sum())
    out["arch"] = torch.cuda.get_arch_list()
    out["name"] = torch.cuda.get_device_name(0)
json.dump(out, sys.stdout)
"""


def check_torch_runs(timeout_s: float = 180.0) -> Check:
    """Import torch in a fresh process and, where it sees a GPU, multiply two small matrices there."""
    name = "torch runs"
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return Check(
            name,
            "fail",
            f"importing torch took over {timeout_s:.0f} s",
            "check the disk torch is on and the GPU's state",
        )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        remedy = "reinstall torch for this machine"
        if "KeyError" in lines[-1] and ("libamd_smi" in lines[-1] or "ROCM_PATH" in lines[-1]):
            remedy = "the PyPI package amdsmi breaks torch without its library: pip uninstall amdsmi"
        return Check(name, "fail", lines[-1], remedy)
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if not facts["cuda"]:
        build = torch_build()
        wanted = not isinstance(build, Unavailable) and build.vendor is not None
        return Check(
            name, "warn" if wanted else "ok", "on the CPU only", "torch sees no GPU" if wanted else ""
        )
    if facts["sum"] != 64.0**3:
        return Check(
            name,
            "fail",
            f"a product of ones on {facts['name']} is wrong: {facts['sum']}",
            "the GPU or its driver is faulty",
        )
    return Check(name, "ok", f"on {facts['name']}; kernels for {', '.join(facts['arch'])}")


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


def check_nvml() -> Check:
    """The NVIDIA binding, and whether an old package shadows it."""
    installed = host.package_version("nvidia-ml-py")
    nvml = nvidia.load_nvml()
    if not isinstance(nvml, Unavailable):
        nvml.nvmlShutdown()
        return Check(
            "NVML", "ok", f"nvidia-ml-py {installed if isinstance(installed, str) else 'unknown version'}"
        )
    if "shadows" in nvml.reason:
        return Check(
            "NVML",
            "fail",
            nvml.reason,
            "pip uninstall -y pynvml && pip install --force-reinstall nvidia-ml-py",
        )
    build = torch_build()
    needed = not isinstance(build, Unavailable) and build.vendor == "nvidia"
    return Check(
        "NVML",
        "warn" if needed else "ok",
        nvml.reason if needed else f"not needed here ({nvml.reason})",
        "power, energy and device-used memory will be unavailable" if needed else "",
    )


def check_amdsmi() -> Check:
    """AMD's binding. The PyPI package has no library inside and can stop torch from importing."""
    smi = amd.load_amdsmi()
    if not isinstance(smi, Unavailable):
        return Check("AMD SMI", "ok", f"from {Path(getattr(smi, '__file__', None) or 'memory').parent}")
    installed = host.package_version("amdsmi")
    build = torch_build()
    on_amd = not isinstance(build, Unavailable) and build.vendor == "amd"
    if not isinstance(installed, Unavailable):
        return Check(
            "AMD SMI",
            "fail" if on_amd else "warn",
            f"the package amdsmi {installed} is installed but cannot work: {smi.reason}",
            "pip uninstall amdsmi; on an AMD machine use the module that ROCm ships",
        )
    if on_amd:
        return Check(
            "AMD SMI",
            "warn",
            smi.reason,
            "install ROCm's amd-smi; until then power and energy come from sysfs, if at all",
        )
    return Check("AMD SMI", "ok", "not needed here")


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

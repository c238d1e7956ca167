"""Checks of the GPU, its driver, torch and the vendors' libraries; `megafold_bench.doctor` runs them.

Only `check_torch_runs` starts torch, in a process of its own, because what a broken installation does
on import cannot be read from files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megafold_bench import host
from megafold_bench.devices import amd, list_devices, nvidia, open_selector, selector_for
from megafold_bench.devices.base import Unavailable, attempt
from megafold_bench.devices.torch_facts import TorchBuild, torch_build

GIB = 1024**3
MINIMUM_TORCH = (2, 11)


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

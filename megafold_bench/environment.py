"""Provenance: what a number was measured on and with. No torch import; a fraction of a second.

`doctor` and `Check` are here for callers; they live in `megafold_bench.doctor`.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any, Literal

from megafold_bench import host
from megafold_bench.devices import list_devices, nvidia, open_selector, selector_for
from megafold_bench.devices.amd import DEFAULT_ROCM
from megafold_bench.devices.base import Reading, Unavailable, attempt
from megafold_bench.devices.sysfs import read_text
from megafold_bench.devices.torch_build import initialised_cuda, torch_build
from megafold_bench.doctor import Check, doctor

__all__ = ["Check", "collect", "detect_accelerator", "doctor"]

# Any of these says that a GPU driver is loaded: NVIDIA, NVIDIA under WSL, AMD.
DRIVER_NODES = (Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))


def _gpus() -> Reading[list[dict[str, Any]]]:
    """Identity and settings of every physical GPU, whatever the environment hides."""
    selectors = list_devices()
    if isinstance(selectors, Unavailable):
        return selectors
    found = []
    for selector in selectors:
        device = open_selector(selector)
        try:
            # Not dataclasses.asdict: that would turn each Unavailable into a dictionary.
            found.append({"selector": selector, **vars(device.identity), **vars(device.settings)})
        finally:
            device.close()
    return found


def driver_cuda_version() -> Reading[str]:
    """The newest CUDA version that the NVIDIA driver supports, as ``13.0``."""
    nvml = nvidia.load_nvml()
    if isinstance(nvml, Unavailable):
        return nvml
    try:
        raw = attempt("driver's CUDA version", lambda: int(nvml.nvmlSystemGetCudaDriverVersion()))
    finally:
        nvml.nvmlShutdown()
    return raw if isinstance(raw, Unavailable) else f"{raw // 1000}.{raw % 1000 // 10}"


def _software() -> dict[str, Any]:
    build = torch_build()
    rocm = Path(os.environ.get("ROCM_PATH") or DEFAULT_ROCM)
    return {
        "torch": build
        if isinstance(build, Unavailable)
        else {"version": build.version, "git": build.git, "cuda": build.cuda, "hip": build.hip},
        "triton": host.first_version("triton", "pytorch-triton-rocm", "triton-rocm"),
        "cuda_driver": driver_cuda_version(),
        "rocm": read_text(rocm / ".info" / "version"),
        "nccl": host.first_version("nvidia-nccl-cu13", "nvidia-nccl-cu12"),
        "cudnn": host.first_version("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"),
        "nvidia_ml_py": host.package_version("nvidia-ml-py"),
        "amdsmi": host.package_version("amdsmi"),
        "numpy": host.package_version("numpy"),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def _plain(value: Any, path: str, missing: dict[str, str]) -> Any:
    """`value` fit for JSON: each Unavailable becomes None and its reason goes to `missing` under its path."""
    if isinstance(value, Unavailable):
        missing[path] = value.reason
        return None
    if isinstance(value, dict):
        return {
            key: _plain(part, f"{path}.{key}" if path else str(key), missing) for key, part in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(part, f"{path}.{i}", missing) for i, part in enumerate(value)]
    return value


def collect() -> dict[str, Any]:
    """The provenance of a measurement, JSON-serialisable.

    Keys: ``gpus`` (a list: selector, vendor, name, uuid, pci_id, total_bytes, arch, driver, source,
    partition, ecc, power_limit_w), ``software``, ``source`` (version, commit, dirty, diff_sha256),
    ``cpu``, ``host``, ``variables``, ``argv``, and ``unavailable``: for each null its dotted path and
    the reason.
    """
    missing: dict[str, str] = {}
    facts = {
        "gpus": _gpus(),
        "software": _software(),
        "source": host.own_source(),
        "cpu": host.cpu_facts(),
        "host": {
            "name_hash": host.hashed_host_name(),
            "system": platform.system(),
            "kernel": platform.release(),
            "ram_bytes": host.ram_bytes(),
            "cgroup_memory_limit_bytes": host.cgroup_memory_limit_bytes(),
            "container": host.container(),
        },
        "variables": host.recorded_variables(os.environ),
        "argv": list(sys.argv),
    }
    plain: dict[str, Any] = _plain(facts, "", missing)
    plain["unavailable"] = missing
    return plain


def detect_accelerator() -> Literal["cuda", "cpu"]:
    """``"cuda"`` where torch's build and a visible GPU of its vendor meet, else ``"cpu"``.

    Torch is imported only in one case: a driver is loaded for a GPU build of torch, but the vendor's
    library cannot say what is visible (a container without NVML, say).
    """
    cuda = initialised_cuda()
    if cuda is not None:
        return "cuda" if cuda.device_count() > 0 else "cpu"
    build = torch_build()
    if isinstance(build, Unavailable) or build.vendor is None:
        return "cpu"
    if not isinstance(selector_for("cuda", 0), Unavailable):
        return "cuda"
    if not any(node.exists() for node in DRIVER_NODES):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"

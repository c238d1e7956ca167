"""Which physical device is ``cuda:i``: the rules of CUDA_, HIP_ and ROCR_VISIBLE_DEVICES.

Pure functions over a list of candidates in the runtime's own order, so that they can be tested
anywhere. Both runtimes read a list from left to right and stop, without an error, at the first entry
that names no device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megafold_bench.devices.base import Reading, Unavailable


@dataclass(frozen=True)
class Candidate:
    """A physical device before any environment variable is applied.

    `key` is what the vendor's library opens it by; `slices` are its MIG instances, in order, and
    `slice_of` the GPU instance and compute instance numbers of a MIG instance.
    """

    key: str
    uuid: str
    name: str = ""
    slices: tuple[Candidate, ...] = field(default=())
    slice_of: tuple[str, int, int] | None = None


def _as_seen(device: Candidate) -> Candidate:
    """CUDA shows one MIG instance, the first, where it was given a GPU in MIG mode."""
    return device.slices[0] if device.slices else device


def _by_uuid(devices: Sequence[Candidate], entry: str) -> Candidate | None:
    """The one device whose UUID starts with `entry` (an abbreviation is allowed if it is unique)."""
    wanted = entry.lower()
    if wanted.startswith("mig"):
        slices = [part for device in devices for part in device.slices]
        for part in slices:
            if part.slice_of is not None:
                parent, gpu_instance, compute_instance = part.slice_of
                if wanted == f"mig-{parent}/{gpu_instance}/{compute_instance}".lower():
                    return part
        matches = [part for part in slices if part.uuid.lower().startswith(wanted)]
    else:
        matches = [device for device in devices if device.uuid.lower().startswith(wanted)]
    return matches[0] if len(matches) == 1 else None


def apply_visible(devices: Sequence[Candidate], value: str | None) -> list[Candidate]:
    """`devices` as a program sees them under one ``*_VISIBLE_DEVICES`` value.

    None (unset) keeps all. Entries are integers or UUIDs (``GPU-…``, ``MIG-…``, abbreviations); the
    list ends at the first entry that names no device, and a device named twice leaves none at all.
    """
    if value is None:
        return list(devices)
    seen: list[Candidate] = []
    for raw in value.split(","):
        entry = raw.strip()
        if entry.lower().startswith(("gpu-", "mig-")):
            device = _by_uuid(devices, entry)
        elif entry.isdigit() and int(entry) < len(devices):
            device = devices[int(entry)]
        else:
            device = None
        if device is None:
            break
        if device in seen:
            return []
        seen.append(device)
    return seen


def visible_nvidia(devices: Sequence[Candidate], environ: Mapping[str, str]) -> Reading[list[Candidate]]:
    """NVIDIA devices in CUDA's order. `devices` come in PCI order, as NVML lists them.

    CUDA's default order is fastest first. For equal GPUs that is PCI order; for a mix only CUDA
    knows, so the answer is unavailable unless the entries are UUIDs.
    """
    value = environ.get("CUDA_VISIBLE_DEVICES")
    by_uuid = value is not None and value.strip().lower().startswith(("gpu-", "mig-"))
    mixed = len({device.name for device in devices}) > 1
    if mixed and not by_uuid and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        return Unavailable("different GPUs in this machine: set CUDA_DEVICE_ORDER=PCI_BUS_ID")
    return [_as_seen(device) for device in apply_visible(devices, value)]


def visible_amd(devices: Sequence[Candidate], environ: Mapping[str, str]) -> Reading[list[Candidate]]:
    """AMD devices in HIP's order. `devices` come in KFD node order.

    ROCR_VISIBLE_DEVICES filters first; HIP_VISIBLE_DEVICES (or CUDA_VISIBLE_DEVICES where it is
    unset or empty) then counts within what is left.
    """
    left = apply_visible(devices, environ.get("ROCR_VISIBLE_DEVICES"))
    inner = environ.get("HIP_VISIBLE_DEVICES") or environ.get("CUDA_VISIBLE_DEVICES")
    return apply_visible(left, inner or None)

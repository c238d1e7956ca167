"""Devices behind one interface: `open_device`, `open_selector`, `list_devices`.

A *selector* is a device's name that survives a change of process: ``nvidia:GPU-…`` or
``nvidia:MIG-…`` (UUID), ``amd:0000:c1:00.0`` (PCI address), ``sysfs:0000:c1:00.0``, ``cpu``. ``cuda:0``
is accepted too and means torch's device 0 under this process's environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from megafold_bench.devices import amd, nvidia, sysfs
from megafold_bench.devices.base import (
    Device,
    DeviceProcess,
    Identity,
    LinkTraffic,
    Memory,
    Reading,
    Settings,
    Unavailable,
    UnavailableDevice,
    attempt,
    value_or_none,
)
from megafold_bench.devices.cpu import CpuDevice
from megafold_bench.devices.torch_build import initialised_cuda, torch_build
from megafold_bench.devices.visible import Candidate, visible_amd, visible_nvidia

__all__ = [
    "CpuDevice",
    "Device",
    "DeviceProcess",
    "Identity",
    "LinkTraffic",
    "Memory",
    "Reading",
    "Settings",
    "Unavailable",
    "UnavailableDevice",
    "list_devices",
    "open_device",
    "open_selector",
    "selector_for",
    "value_or_none",
]


def _nvidia_candidates() -> Reading[list[Candidate]]:
    nvml = nvidia.load_nvml()
    if isinstance(nvml, Unavailable):
        return nvml
    try:
        return attempt("NVML", lambda: nvidia.candidates(nvml))
    finally:
        nvml.nvmlShutdown()


def _amd_candidates() -> Reading[tuple[str, list[Candidate]]]:
    """AMD GPUs in HIP's order, by AMD SMI or else by sysfs, and which of the two it was."""
    smi = amd.load_amdsmi()
    found = smi if isinstance(smi, Unavailable) else attempt("AMD SMI", lambda: amd.candidates(smi))
    if not isinstance(found, Unavailable) and found:
        return "amd", found
    folders = sysfs.amd_folders()
    if not folders:
        return found if isinstance(found, Unavailable) else Unavailable("AMD SMI shows no GPU")
    rows = []
    for folder in folders:
        uuid = sysfs.SysfsDevice(folder).identity.uuid
        rows.append(Candidate(folder.name, f"BDF-{folder.name}" if isinstance(uuid, Unavailable) else uuid))
    return "sysfs", rows


def _vendor() -> Reading[str]:
    """Whose GPUs ``cuda`` means here: what torch was built for, or, without torch, what answers."""
    build = torch_build()
    if not isinstance(build, Unavailable):
        return build.vendor or Unavailable(f"torch {build.version} is built for CPU only")
    return "amd" if isinstance(_nvidia_candidates(), Unavailable) and sysfs.amd_folders() else "nvidia"


def _nvidia_selector(index: int, environ: Mapping[str, str], cuda: Any) -> Reading[str]:
    if cuda is not None:
        uuid = attempt("uuid", lambda: str(cuda.get_device_properties(index).uuid))
        if not isinstance(uuid, Unavailable):
            devices = _nvidia_candidates()
            known = [] if isinstance(devices, Unavailable) else devices
            slices = {part.uuid for device in known for part in device.slices}
            for prefix in ("GPU-", "MIG-"):
                full = uuid if uuid.startswith(prefix) else f"{prefix}{uuid}"
                if full in slices or any(device.uuid == full for device in known):
                    return f"nvidia:{full}"
    devices = _nvidia_candidates()
    if isinstance(devices, Unavailable):
        return devices
    seen = visible_nvidia(devices, environ)
    if isinstance(seen, Unavailable):
        return seen
    if index >= len(seen):
        return Unavailable(f"no device cuda:{index}: {len(seen)} visible of {len(devices)}")
    return f"nvidia:{seen[index].key}"


def _amd_selector(index: int, environ: Mapping[str, str], cuda: Any) -> Reading[str]:
    found = _amd_candidates()
    if isinstance(found, Unavailable):
        return found
    library, devices = found
    if cuda is not None:
        place = attempt("PCI address", lambda: _torch_bdf(cuda.get_device_properties(index)))
        matches = (
            [] if isinstance(place, Unavailable) else [d for d in devices if d.key.lower().startswith(place)]
        )
        if len(matches) == 1:
            return f"{library}:{matches[0].key}"
    seen = visible_amd(devices, environ)
    if isinstance(seen, Unavailable):
        return seen
    if index >= len(seen):
        return Unavailable(f"no device cuda:{index}: {len(seen)} visible of {len(devices)}")
    return f"{library}:{seen[index].key}"


def _torch_bdf(properties: Any) -> str:
    """``domain:bus:device`` as PCI writes it; torch gives no function number."""
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}"


def selector_for(kind: str, index: int = 0) -> Reading[str]:
    """The selector of torch's device ``kind:index`` under this process's environment.

    Where torch has already initialised its GPUs, torch itself is asked; it is never imported for this.
    """
    if kind == "cpu":
        return "cpu"
    if kind != "cuda":
        raise ValueError(f"unknown kind of device {kind!r}: choose cuda or cpu")
    vendor = _vendor()
    if isinstance(vendor, Unavailable):
        return vendor
    cuda = initialised_cuda()
    by_vendor = _amd_selector if vendor == "amd" else _nvidia_selector
    return by_vendor(index, os.environ, cuda)


def open_selector(selector: str) -> Device:
    """The device of a selector; one that cannot be opened gives `Unavailable` for every reading.

    Raises ValueError for a selector of no known form.
    """
    kind, _, rest = selector.partition(":")
    if kind == "cpu":
        return CpuDevice()
    if kind == "cuda" and (rest.isdigit() or not rest):
        resolved = selector_for("cuda", int(rest or 0))
        return (
            UnavailableDevice("unknown", resolved.reason)
            if isinstance(resolved, Unavailable)
            else open_selector(resolved)
        )
    if not rest or kind not in ("nvidia", "amd", "sysfs"):
        raise ValueError(f"unknown device selector {selector!r}")
    opened: Reading[Device]
    if kind == "nvidia":
        opened = nvidia.open_uuid(rest)
    elif kind == "amd":
        opened = amd.open_bdf(rest)
    else:
        folders = {folder.name: folder for folder in sysfs.amd_folders()}
        opened = sysfs.SysfsDevice(folders[rest]) if rest in folders else Unavailable(f"no AMD GPU at {rest}")
    return UnavailableDevice(kind, opened.reason) if isinstance(opened, Unavailable) else opened


def open_device(kind: Literal["cuda", "cpu"], index: int = 0) -> Device:
    """Torch's device ``kind:index``, found by UUID or PCI address, never by a bare index.

    Does not raise for a missing device: every reading of what it returns then says why.
    """
    selector = selector_for(kind, index)
    return (
        UnavailableDevice("unknown", selector.reason)
        if isinstance(selector, Unavailable)
        else open_selector(selector)
    )


def list_devices() -> Reading[tuple[str, ...]]:
    """Selectors of every physical GPU here, of either vendor, whatever the environment hides.

    Unavailable, with both reasons, where neither vendor's library answers.
    """
    green, red = _nvidia_candidates(), _amd_candidates()
    if isinstance(green, Unavailable) and isinstance(red, Unavailable):
        return Unavailable(f"{green.reason}; {red.reason}")
    found = [] if isinstance(green, Unavailable) else [f"nvidia:{device.key}" for device in green]
    if not isinstance(red, Unavailable):
        found += [f"{red[0]}:{device.key}" for device in red[1]]
    return tuple(found)

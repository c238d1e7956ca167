"""Facts about the host, its packages and this repository, read without importing anything heavy."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from megafold_bench.devices.base import Reading, Unavailable, attempt
from megafold_bench.devices.cpu import cpu_model, host_memory
from megafold_bench.devices.sysfs import read_text

RECORDED_VARIABLES = frozenset(
    {
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
        "PYTORCH_HIP_ALLOC_CONF",
        "PYTORCH_NO_CUDA_MEMORY_CACHING",
        "ROCR_VISIBLE_DEVICES",
        "LD_PRELOAD",
        "LAYERNORM_TYPE",
    }
)
RECORDED_PREFIXES = (
    "CUDA_", "HIP_", "HSA_", "NCCL_", "RCCL_", "TRITON_", "TORCH_", "TORCHINDUCTOR_", "CUBLAS_",
    "CUDNN_", "NVIDIA_", "OMP_", "MKL_", "KMP_", "MALLOC_", "MEGAFOLD_",
)  # fmt: skip
_PRIVATE = ("TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "_KEY")
UNLIMITED_BYTES = 1 << 60  # cgroup v1 writes "no limit" as a number just under 2^63


def package_version(name: str) -> Reading[str]:
    """Version of an installed distribution, from its metadata."""
    try:
        return version(name)
    except PackageNotFoundError:
        return Unavailable(f"{name} is not installed")


def first_version(*names: str) -> Reading[str]:
    """Version of the first of `names` that is installed."""
    for name in names:
        found = package_version(name)
        if not isinstance(found, Unavailable):
            return found
    return Unavailable(f"none of {', '.join(names)} is installed")


def recorded_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that can change a measurement; names that suggest a secret are left out."""
    return {
        name: environ[name]
        for name in sorted(environ)
        if (name in RECORDED_VARIABLES or name.startswith(RECORDED_PREFIXES))
        and not any(word in name for word in _PRIVATE)
    }


def hashed_host_name() -> str:
    """Twelve hexadecimal digits that tell two machines apart without naming either."""
    return hashlib.sha256(f"megafold-bench:{socket.gethostname()}".encode()).hexdigest()[:12]


def _git(folder: Path, *arguments: str) -> Reading[bytes]:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            timeout=10,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Unavailable(f"git: {error}")
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        return Unavailable(f"git: {lines[0] if lines else f'exit code {done.returncode}'}")
    return done.stdout


def own_source() -> dict[str, Any]:
    """Version, commit, whether the tree differs from it, and a hash of the difference.

    A package installed from a repository address keeps its commit in its metadata; an ordinary wheel
    has none. Files that git does not track count as a difference but are not in the hash.
    """
    from megafold_bench import __version__

    folder = Path(__file__).resolve().parent
    tracked = _git(folder, "ls-files", "--error-unmatch", "__init__.py")
    if isinstance(tracked, Unavailable):
        return {
            "version": __version__,
            "commit": _installed_commit(tracked),
            "dirty": tracked,
            "diff_sha256": tracked,
        }
    commit = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain")
    difference = _git(folder, "diff", "HEAD", "--no-ext-diff")
    dirty = status if isinstance(status, Unavailable) else bool(status.strip())
    digest: Reading[str] | None = None
    if isinstance(difference, Unavailable):
        digest = difference
    elif difference:
        digest = hashlib.sha256(difference).hexdigest()
    return {
        "version": __version__,
        "commit": commit if isinstance(commit, Unavailable) else commit.decode().strip(),
        "dirty": dirty,
        "diff_sha256": digest,
    }


def _installed_commit(no_repository: Unavailable) -> Reading[str]:
    """The commit pip noted when it installed this package from a repository."""

    def read() -> str:
        content = distribution("megafold-bench").read_text("direct_url.json")
        return str(json.loads(content or "{}")["vcs_info"]["commit_id"])

    found = attempt("commit", read)
    return (
        Unavailable(f"no repository ({no_repository.reason}) and none noted by pip")
        if isinstance(found, Unavailable)
        else found
    )


def container() -> str | None:
    """The kind of container this process is in, or None."""
    marks = {"docker": Path("/.dockerenv"), "podman": Path("/run/.containerenv")}
    for variable in ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER"):
        if variable in os.environ:
            return "apptainer"
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    return next((name for name, path in marks.items() if path.exists()), None)


def cgroup_memory_limit_bytes(
    root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")
) -> Reading[int | None]:
    """The tightest memory limit on this process's cgroup and those above it; None for no limit."""
    lines = read_text(proc / "self/cgroup")
    if isinstance(lines, Unavailable):
        return lines
    limits: list[int] = []
    seen = False
    for line in lines.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        # Inside a container the path may be the host's, which is not mounted: the root is then ours.
        relative = Path(path.lstrip("/"))
        for part in (relative, *relative.parents):
            raw = read_text(base / part / name)
            if not isinstance(raw, Unavailable):
                seen = True
                limits += [int(raw)] if raw.isdigit() and int(raw) < UNLIMITED_BYTES else []
    if not seen:
        return Unavailable("no cgroup memory controller is mounted")
    return min(limits) if limits else None


def cpu_facts(sys: Path = Path("/sys")) -> dict[str, Any]:
    """Model, cores in all, cores this process may use, governor, NUMA nodes."""
    affinity: Reading[int] = Unavailable("this system has no CPU affinity")
    if hasattr(os, "sched_getaffinity"):
        affinity = len(os.sched_getaffinity(0))
    nodes = len(list((sys / "devices/system/node").glob("node[0-9]*")))
    return {
        "model": cpu_model(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "affinity_cores": affinity,
        "governor": read_text(sys / "devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "numa_nodes": nodes or Unavailable("no NUMA nodes in /sys"),
    }


def ram_bytes() -> Reading[int]:
    """The host's memory, bytes (not this container's share of it)."""
    memory = host_memory()
    return memory if isinstance(memory, Unavailable) else memory.total_bytes

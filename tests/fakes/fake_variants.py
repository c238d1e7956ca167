"""Variants that end in every way a trial can, in milliseconds and without torch.

They are registered as any other package's would be: by the entry points of the distribution
`fake_variants-1.0.dist-info` beside this file, once this folder is on the path.

`ending` says what happens, and, after an ``@``, from which length on: ``oom_device@128``. The environment's
``FAKE_SLOWDOWN=1.05`` makes every step take 5 % longer.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megafold_bench.errors import UserError
from megafold_bench.variants import Scalar, Support

DEFAULTS: dict[str, Scalar] = {"preset": "tiny", "ending": "ok", "step_ms": 1.0, "bad_step": 2, "touch": None}


class OutOfMemoryError(RuntimeError):
    """Named as PyTorch's."""


class AcceleratorError(RuntimeError):
    """Named as PyTorch's."""


class DistBackendError(RuntimeError):
    """Named as PyTorch's."""


class OutOfResources(Exception):
    """Named as Triton's."""


OOM_TEXT = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which "
    "1.50 GiB is free. Process 1 has 138.30 GiB memory in use. Of the allocated memory 130.25 GiB is "
    "allocated by PyTorch, and 6.50 GiB is reserved by PyTorch but unallocated."
)

EXCEPTIONS: dict[str, Exception] = {
    "oom_device": OutOfMemoryError(OOM_TEXT),
    "oom_cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "oom_accelerator": AcceleratorError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
    ),
    "oom_nccl": DistBackendError(
        "NCCL error: unhandled cuda error\nLast error:\nFailed to CUDA calloc async 608 bytes"
    ),
    "oom_host_torch": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"
    ),
    "kernel_resource": OutOfResources(
        "out of resource: shared memory, Required: 300000, Hardware limit: 232448."
    ),
    "index_overflow": RuntimeError("CUDA error: invalid configuration argument"),
    "launch_fail": AcceleratorError("CUDA error: an illegal memory access was encountered"),
    "error": KeyError("pair"),
}


def host_memory_error() -> None:
    """A real MemoryError: the address space is limited, then asked for."""
    limit = 512 << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    bytearray(limit)


def cgroup_kill(counter: Path) -> None:
    """What the kernel's out-of-memory killer does: one more kill in the cgroup, and SIGKILL."""
    counter.write_text(counter.read_text().replace("oom_kill 4", "oom_kill 5"))
    os.kill(os.getpid(), signal.SIGKILL)


def provoke(ending: str, touch: Path) -> None:
    """End the process, or the step, as asked."""
    if ending in EXCEPTIONS:
        raise EXCEPTIONS[ending]
    if ending == "oom_host":
        host_memory_error()
    elif ending == "abort":
        ctypes.CDLL(None).abort()
    elif ending == "segv":
        ctypes.string_at(0)
    elif ending == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif ending == "kill_at_record":
        os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)  # the first file that a worker syncs
    elif ending == "exit":
        sys.exit(3)
    elif ending == "vanish":
        os._exit(0)
    elif ending == "bad_alloc":
        print("terminate called after throwing an instance of 'std::bad_alloc'", file=sys.stderr, flush=True)
        ctypes.CDLL(None).abort()
    elif ending == "cgroup_kill":
        cgroup_kill(touch)
    elif ending == "hang":
        time.sleep(3600)
    elif ending == "hang_family":
        hang_with_family()


def hang_with_family() -> None:
    """Hang, deaf to SIGTERM, with one child in the group and one that left it for its own session."""
    sleep = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3600)"
    subprocess.Popen([sys.executable, "-S", "-c", sleep])
    subprocess.Popen([sys.executable, "-S", "-c", sleep], start_new_session=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(3600)


class FakeWorkload:
    """Sleeps; the loss falls."""

    def __init__(self, factors: Mapping[str, Scalar], seq_len: int, seed: int) -> None:
        self._seq_len = seq_len
        self._seed = seed
        self._step_s = float(factors["step_ms"] or 0) / 1e3
        self._bad_step = int(factors["bad_step"] or 0)
        self._touch = Path(str(factors["touch"]))
        self._index = 0
        ending, _, from_len = str(factors["ending"]).partition("@")
        self._ending = ending if seq_len >= int(from_len or 0) else "ok"

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"n_atoms": self._seq_len * 8, "parameters": 1000}

    def load(self) -> int:
        return self._index

    def transfer(self, batch: int) -> int:
        return batch

    def step(self, batch: int) -> Mapping[str, float]:
        time.sleep(self._step_s)
        if batch == self._bad_step:
            provoke(self._ending, self._touch)
        self._index += 1
        bad = self._ending == "nan" and batch == self._bad_step
        return {"loss": float("nan") if bad else 1.0 / (1 + batch) + self._seed}


class FakeVariant:
    """See the module."""

    def __init__(self, name: str, factor: float) -> None:
        self.name = name
        self.summary = f"sleeps, {factor:g} times as long"
        self._factor = factor

    def support(self, device: str) -> Support:
        return Support(device == "cpu", "" if device == "cpu" else "the fake runs on the CPU only")

    def resolve(self, options: Mapping[str, Scalar], seq_len: int) -> dict[str, Scalar]:
        for name in options:
            if name not in DEFAULTS:
                raise UserError(f"unknown option {name!r}: choose from {', '.join(DEFAULTS)}")
        if options.get("preset", "tiny") not in ("tiny", "af3"):
            raise UserError(f"unknown preset {options['preset']!r}: choose tiny or af3")
        return {**DEFAULTS, **options}

    def build(self, factors: Mapping[str, Scalar], seq_len: int, seed: int, device: str) -> FakeWorkload:
        if factors["ending"] == "user_error":
            raise UserError("the complex has 12 tokens, 64 were asked for: lower --seq-lens")
        if factors["ending"] == "slow_build":
            time.sleep(3600)
        if factors["touch"] and factors["ending"] != "cgroup_kill":
            # One line for each time the trial was really run.
            with Path(str(factors["touch"])).open("a") as file:
                file.write(f"{self.name} {seq_len}\n")
        # Not a factor of the point: what a commit that made things slower would look like.
        slowdown = float(os.environ.get("FAKE_SLOWDOWN", "1"))
        scaled = {**factors, "step_ms": float(factors["step_ms"] or 0) * self._factor * slowdown}
        return FakeWorkload(scaled, seq_len, seed)


FAKE = FakeVariant("fake", 1.0)
SLOW = FakeVariant("fake-slow", 2.0)

"""Launch configurations: the kernel's own default, one shipped with the package, or one measured on this device.

Shipped files are named after a device (measured there) or an architecture (found by compiling, where the default
spills registers: `optimized/kernels/fit.py`). A configuration is looked up by operator, device and a short key of
what matters for speed (dtype, head size, length bucket ...), never by exact length. Nothing is timed unless `tune`
is called: the first use of an operator costs one compilation and is safe inside a CUDA graph capture once warmed up.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch

SHIPPED = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel: compile-time constants by name, warps per program, pipeline stages.

    `max_registers` caps registers per thread on NVIDIA, to keep more programs on a multiprocessor; 0 = no cap.
    """

    constants: dict[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int = 0

    def launch(self) -> dict[str, int]:
        """Keyword arguments for the kernel launch."""
        cap = {"maxnreg": self.max_registers} if self.max_registers and torch.version.hip is None else {}
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages, **cap}

    def to_json(self) -> dict[str, object]:
        """The form stored in tuning files."""
        return {
            "constants": self.constants,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "max_registers": self.max_registers,
        }

    @staticmethod
    def from_json(data: dict[str, object]) -> "Config":
        """Read the form written by `to_json`; raises KeyError or TypeError when it is not one."""
        constants = data["constants"]
        warps, stages = data["num_warps"], data["num_stages"]
        if not (isinstance(constants, dict) and isinstance(warps, int) and isinstance(stages, int)):
            raise TypeError(f"not a launch configuration: {data!r}")
        cap = data.get("max_registers", 0)
        if not isinstance(cap, int):
            raise TypeError(f"not a launch configuration: {data!r}")
        return Config({str(k): int(v) for k, v in constants.items()}, warps, stages, cap)


def user_cache_dir() -> Path:
    """Where measured configurations are kept: MEGAFOLD_BENCH_CACHE, else the user's cache directory."""
    explicit = os.environ.get("MEGAFOLD_BENCH_CACHE")
    if explicit:
        return Path(explicit) / "tuning"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "megafold-bench" / "tuning"


@cache
def device_name(device: torch.device) -> str:
    """File-name form of the device's name, e.g. `nvidia-h200`; `cpu` for the interpreter."""
    if device.type != "cuda":
        return device.type
    return "-".join(torch.cuda.get_device_name(device).lower().split()).replace("/", "-")


@cache
def architecture(device: torch.device) -> str:
    """`sm_90`, `gfx942` and so on; `cpu` under the interpreter."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def _load(path: Path) -> dict[str, Config]:
    if not path.is_file():
        return {}
    entries = json.loads(path.read_text())
    return {key: Config.from_json(value) for key, value in entries.items()}


def read_configs(path: Path) -> dict[str, Config]:
    """The configurations of one tuning file by entry (`op/key/…`); empty where there is no such file."""
    return dict(_load(path))


@dataclass(eq=False)
class Trials:
    """Configurations that `lookup` gives out while something is tried, and what it would have given, by entry."""

    configs: Mapping[str, Config]
    seen: dict[str, Config] = field(default_factory=dict)


_trials: list[Trials] = []  # for all threads: autograd looks configurations up in threads of its own
_forget: list[Callable[[], None]] = []


def forget_with(clear: Callable[[], None]) -> None:
    """Register what empties a cache of configurations: called when they change."""
    _forget.append(clear)


def forget() -> None:
    """Look every configuration up anew from here on."""
    for clear in (_load.cache_clear, *_forget):
        clear()


@contextmanager
def trying(configs: Mapping[str, Config]) -> Iterator[Trials]:
    """Launch with these configurations, by entry, whatever is measured or shipped, and note what is looked up."""
    trials = Trials(configs)
    _trials.append(trials)
    forget()
    try:
        yield trials
    finally:
        _trials.remove(trials)
        forget()


def lookup(op: str, key: Iterable[object], device: torch.device, default: Config) -> Config:
    """The configuration for `op` under `key`: measured here, shipped for this device or architecture, or `default`."""
    entry = "/".join([op, *map(str, key)])
    found = _stored(entry, device) or default
    if not _trials:
        return found
    _trials[-1].seen[entry] = found
    return _trials[-1].configs.get(entry, found)


def _stored(entry: str, device: torch.device) -> Config | None:
    name = device_name(device)
    if name == "cpu":
        return None
    files = (
        user_cache_dir() / f"{name}.json",
        SHIPPED / f"{name}.json",
        SHIPPED / f"{architecture(device)}.json",
    )
    found = (_load(file).get(entry) for file in files)
    return next((config for config in found if config is not None), None)


def record(op: str, key: Iterable[object], device: torch.device, config: Config) -> Path:
    """Store a measured configuration in the user's cache (atomic replacement) and return the file."""
    path = user_cache_dir() / f"{device_name(device)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_configs(path, {**read_configs(path), "/".join([op, *map(str, key)]): config})
    return path


def write_configs(path: Path, entries: Mapping[str, Config]) -> None:
    """Write a tuning file, whole or not at all."""
    plain = {entry: config.to_json() for entry, config in entries.items()}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as out:
        json.dump(plain, out, indent=1, sort_keys=True)
        out.write("\n")
    Path(out.name).chmod(0o644)
    Path(out.name).replace(path)
    forget()


def tune(
    op: str,
    key: Iterable[object],
    device: torch.device,
    candidates: Iterable[Config],
    run: Callable[[Config], object],
    measure: Callable[[Callable[[], object]], float] | None = None,
) -> tuple[Config, dict[str, float]]:
    """Time `run(config)` for every candidate, record the fastest and return it with all times in seconds.

    A candidate that does not compile or needs more shared memory than the device has is left out of the times.
    Raises RuntimeError when none runs. `measure` returns seconds for a callable (default: median of do_bench).
    """
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    timer = measure or (lambda f: do_bench(f, warmup=10, rep=50, return_mode="median") * 1e-3)
    times: dict[str, float] = {}
    best: tuple[float, Config] | None = None
    for config in candidates:
        try:
            elapsed = timer(partial(run, config))
        except (CompilationError, OutOfResources, PTXASError):
            continue
        times[json.dumps(config.to_json(), sort_keys=True)] = elapsed
        if best is None or elapsed < best[0]:
            best = (elapsed, config)
    if best is None:
        raise RuntimeError(f"no launch configuration of {op} runs on {device_name(device)}")
    record(op, key, device, best[1])
    return best[1], times

"""Every kernel with every configuration this package would launch on an architecture."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from optimized.ops import cases as fused
from optimized.ops import update_cases
from optimized.ops.attention import cases as attention
from optimized.ops.offline import KernelCase
from optimized.ops.tuning import SHIPPED, Config, read_configs

TUNED_ON = {"nvidia-h200": "sm_90"}
"""Architecture of the devices that shipped tuning files are named after."""


def _as_launched(case: KernelCase, arch: str) -> KernelCase:
    """A fused operator's case with the sigmoid that `launching.fast_sigmoid` picks."""
    if "FAST" not in case.constants:
        return case
    fast = ".bf16." in case.name and arch.startswith("sm_")
    return replace(case, constants={**case.constants, "FAST": fast})


SOURCES: tuple[Callable[[str], list[KernelCase]], ...] = (
    attention.cases,
    lambda arch: [_as_launched(case, arch) for case in fused.cases(arch)],
    lambda arch: [_as_launched(case, arch) for case in update_cases.cases(arch)],
)
"""What gives the cases of an architecture with the default configurations of the source."""

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_FUSED = re.compile(r"(?P<family>\w+)\.(?P<dtype>bf16|fp16|fp32)\.(?P<width>\d+)(x\d+)?\.(?P<kernel>\w+)")
_ATTENTION = re.compile(
    r"(?P<family>attention)\.(?P<dtype>bf16|fp16|fp32)\.d(?P<width>\d+)\.(?P<kernel>forward|grad_\w+)"
)


def default_cases(arch: str) -> list[KernelCase]:
    """Every kernel with the default configuration of its source, and the key under which others are looked up."""
    return [_with_entry(case) for source in SOURCES for case in source(arch)]


def _with_entry(case: KernelCase) -> KernelCase:
    """A case whose name tells what its configuration is looked up by gets that key, unless it names one.

    `family.dtype.channels[xhidden].kernel` as `launching.chosen` has it; of attention, whose key ends with the length
    bucket, the part before it.
    """
    fused, attention_kernel = _FUSED.fullmatch(case.name), _ATTENTION.fullmatch(case.name)
    parts = fused or attention_kernel
    if case.entry or parts is None:
        return case
    key = f"{parts['family']}.{parts['kernel']}/{DTYPES[parts['dtype']]}/{parts['width']}"
    return replace(case, entry=key + ("/" if attention_kernel else ""))


def tuned_for(arch: str) -> dict[str, dict[str, Config]]:
    """Shipped configurations, by entry, of each device of `arch`. KeyError for a file of an unknown device."""
    files = [file for file in sorted(SHIPPED.glob("*.json")) if not file.stem.startswith(("sm_", "gfx"))]
    return {file.stem: read_configs(file) for file in files if TUNED_ON[file.stem] == arch}


def fitted_for(arch: str) -> dict[str, Config]:
    """Shipped configurations, by entry, that replace defaults on `arch`."""
    return read_configs(SHIPPED / f"{arch}.json")


def matches(case: KernelCase, entry: str) -> bool:
    """Whether a tuning entry is one for this case."""
    if case.entry.endswith("/"):
        return entry.startswith(case.entry)
    return bool(case.entry) and entry == case.entry


FORMS = ("JOINT", "TURNED")
"""Constants that choose another form of a kernel, and that a configuration names only where it does."""


def configured(case: KernelCase, config: Config, name: str | None = None) -> KernelCase:
    """The case with another configuration."""
    plain = {form: False for form in FORMS if form in case.constants}
    return replace(
        case,
        name=name or case.name,
        constants={**case.constants, **plain, **config.constants},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        max_registers=config.max_registers,
    )


def launched(
    cases: Iterable[KernelCase], fitted: Mapping[str, Config], tuned: Mapping[str, Mapping[str, Config]]
) -> list[KernelCase]:
    """The cases as launched: with `fitted` in place of the default, and again with every tuned configuration.

    Raises ValueError for an entry that no case stands for: its configuration would go unchecked.
    """
    found: list[KernelCase] = []
    left = {("", entry) for entry in fitted} | {
        (d, entry) for d, entries in tuned.items() for entry in entries
    }
    for case in cases:
        replaced = [entry for entry in fitted if matches(case, entry)]
        found.append(configured(case, fitted[replaced[0]]) if replaced else case)
        left -= {("", entry) for entry in replaced}
        for device, entries in tuned.items():
            for entry in (e for e in entries if matches(case, e)):
                key = entry[len(case.entry) :]
                found.append(
                    configured(case, entries[entry], f"{case.name} ({' '.join([device, key]).strip()})")
                )
                left.discard((device, entry))
    if left:
        raise ValueError(
            f"no kernel is launched with these configurations: {', '.join(e for _, e in sorted(left))}"
        )
    return found


def _compiled(case: KernelCase) -> tuple[object, ...]:
    """What the compiler sees of a case."""
    parts = (sorted(case.signature.items()), sorted(case.constants.items()), sorted(case.aligned))
    kernel = case.kernel.fn
    name = f"{kernel.__module__}.{kernel.__name__}"
    return (name, str(parts), case.num_warps, case.num_stages, case.max_registers)


def catalogue(arch: str) -> list[KernelCase]:
    """What is launched on `arch`, tuned and untuned; of two cases that compile alike, the first."""
    unique: dict[tuple[object, ...], KernelCase] = {}
    for case in launched(default_cases(arch), fitted_for(arch), tuned_for(arch)):
        unique.setdefault(_compiled(case), case)
    return list(unique.values())

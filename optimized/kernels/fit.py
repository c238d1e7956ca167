"""Find tiles that fit an architecture nobody here has: the largest that compile without spilling registers.

    python -m optimized.kernels.fit --arch sm_80,gfx90a [--case 'transition.*.384x*'] [--jobs 2]

Nothing is timed. What is found replaces only defaults that spill or do not compile there, and a configuration
measured on a device of that architecture replaces what is found. Writes `optimized/ops/tuned/<architecture>.json`,
without entries of kernels that exist no more: run it after a kernel has changed.
"""

import argparse
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import product
from math import prod

from optimized.kernels.compile_check import (
    compile_pool,
    default_jobs,
    parse_architectures,
    refuse_interpreter,
)
from optimized.ops.catalogue import configured, default_cases
from optimized.ops.offline import CompileReport, KernelCase, compile_case
from optimized.ops.tuning import SHIPPED, Config, read_configs, write_configs

TILES = ("BM", "BN", "BQ", "BK")
SMALLEST_TILE = 16
MOST_TRIALS = 24
BUCKETS = ("short", "medium", "long")


def candidates(case: KernelCase) -> Iterator[Config]:
    """Tiles no larger than the case's, the largest first, then larger ones; 8 or 4 warps, one or two STAGES."""
    names = [name for name in TILES if name in case.constants]
    start = [int(str(case.constants[name])) for name in names]
    rest = {name: int(str(case.constants[name])) for name in ("ROWS", "STAGES") if name in case.constants}
    stages = list(dict.fromkeys([rest["STAGES"], 1, 2])) if "STAGES" in rest else [0]
    tiles = sorted(
        (tile for tile in product(*map(_sides, start)) if prod(tile) <= 2 * prod(start)),
        key=lambda tile: (prod(tile) > prod(start), abs(prod(tile) - prod(start)), max(tile)),
    )
    for tile, warps, stage in product(tiles, (case.num_warps, 12 - case.num_warps), stages):
        constants = {**rest, **dict(zip(names, tile, strict=True))}
        if "STAGES" in rest:
            constants["STAGES"] = stage
        if warps in (4, 8) and not any(64 <= side < 16 * warps for side in tile):  # see `launching.checked`
            yield Config(constants, warps, case.num_stages)


def _sides(size: int) -> list[int]:
    """The size halved down to the smallest tile, and doubled."""
    found = [size]
    while found[-1] // 2 >= SMALLEST_TILE:
        found.append(found[-1] // 2)
    return [*found, 2 * size]


def fit_case(arch: str, name: str) -> tuple[Config | None, CompileReport]:
    """None and a report where the default does; else the first candidate that fits, or the one that spills least."""
    case = next(case for case in default_cases(arch) if case.name == name)
    report = compile_case(case, arch)
    if not report.problem or not case.entry:
        return None, report
    best: tuple[Config | None, CompileReport] = None, report
    for number, config in enumerate(candidates(case)):
        if number == MOST_TRIALS:
            break
        tried = compile_case(configured(case, config), arch)
        if not tried.problem:
            return config, tried
        spills_less = tried.spill_bytes < best[1].spill_bytes or not best[1].ok
        if tried.problem.startswith("spills") and spills_less:
            best = config, tried
    return best


def entries_of(case: KernelCase) -> list[str]:
    """The keys under which a configuration of this case is looked up."""
    return [case.entry + bucket for bucket in BUCKETS] if case.entry.endswith("/") else [case.entry]


def fit(arch: str, pattern: str, jobs: int) -> Iterator[CompileReport]:
    """Fit the cases of `arch` whose names match, write its tuning file, and report what changed or could not be mended."""
    every = default_cases(arch)
    cases = [case for case in every if fnmatch(case.name, pattern)]
    others = {entry for case in every for entry in entries_of(case)} - {
        e for c in cases for e in entries_of(c)
    }
    file = SHIPPED / f"{arch}.json"
    kept = {entry: config for entry, config in read_configs(file).items() if entry in others}
    with compile_pool(jobs) as pool:
        results = [pool.submit(fit_case, arch, case.name) for case in cases]
        for case, result in zip(cases, results, strict=True):
            config, report = result.result()
            if config is not None:
                kept |= dict.fromkeys(entries_of(case), config)
            if config is not None or report.problem:
                yield report
    if kept:
        write_configs(file, kept)
    else:
        file.unlink(missing_ok=True)


def main() -> None:
    """Fit the architectures named on the command line."""
    parser = argparse.ArgumentParser(description="Find tiles that compile without spilling.")
    parser.add_argument("--arch", required=True, help="architectures, separated by commas")
    parser.add_argument("--case", default="*", help="a pattern for the names of the cases")
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="processes at a time")
    asked = parser.parse_args()
    refuse_interpreter()
    for arch in parse_architectures(asked.arch):
        for report in fit(arch, asked.case, asked.jobs):
            print(
                f"{arch} {report.name}: {report.problem or 'fits'}, {report.registers} registers", flush=True
            )


if __name__ == "__main__":
    main()

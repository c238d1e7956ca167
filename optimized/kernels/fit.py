"""Find tiles that fit an architecture nobody here has: the largest that compile without spilling registers.

    python -m optimized.kernels.fit --arch sm_80,gfx90a [--case 'transition.*.384x*'] [--jobs 2]

Nothing is timed. What is found replaces only defaults that spill or do not compile there, and a configuration
measured on a device of that architecture replaces what is found. What was found before and still fits stays. Writes
`optimized/ops/tuned/<architecture>.json`, without entries of kernels that exist no more: run it after a kernel has
changed.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from itertools import product
from math import prod

from optimized.kernels.compile_check import (
    compile_pool,
    default_jobs,
    parse_architectures,
    refuse_interpreter,
)
from optimized.ops.catalogue import FORMS, configured, default_cases
from optimized.ops.launching import checked
from optimized.ops.offline import CompileReport, KernelCase, compile_case
from optimized.ops.tuning import SHIPPED, Config, read_configs, write_configs

TILES = ("BM", "BN", "BQ", "BK")
SMALLEST_TILE = 16
MOST_TRIALS = 24
BUCKETS = ("short", "medium", "long")


def candidates(case: KernelCase) -> Iterator[Config]:
    """Tiles no larger than the case's, the largest first, then larger ones; 4 or 8 warps; its STAGES or one."""
    names = [name for name in TILES if name in case.constants]
    start = [int(str(case.constants[name])) for name in names]
    # A launch makes BN no wider than the hidden channels.
    most = {"BN": int(str(case.constants["H"]))} if "H" in case.constants else {}
    sides = [_sides(side, most.get(name, 2 * side)) for name, side in zip(names, start, strict=True)]
    others = ("ROWS", "STAGES", "AHEAD")
    rest = {name: int(str(case.constants[name])) for name in others if name in case.constants}
    rest |= {form: 1 for form in FORMS if case.constants.get(form)}
    stages = list(dict.fromkeys([rest["STAGES"], 1])) if "STAGES" in rest else [0]
    tiles = sorted(
        (tile for tile in product(*sides) if prod(tile) <= 2 * prod(start)),
        key=lambda tile: (prod(tile) > prod(start), -prod(tile), max(tile)),
    )
    for tile, warps, stage in product(tiles, (case.num_warps, 12 - case.num_warps), stages):
        constants = {**rest, **dict(zip(names, tile, strict=True))}
        if "STAGES" in rest:
            constants["STAGES"] = stage
        config = Config(constants, warps, case.num_stages)
        if warps in (4, 8) and _launchable(config, case.entry.partition("/")[0]):
            yield config


def _launchable(config: Config, kernel: str) -> bool:
    """Whether the operator would launch it; attention, whose tiles come from here alone, has the same limit."""
    if "BM" not in config.constants:
        sides = [config.constants[name] for name in TILES if name in config.constants]
        return not any(64 <= side < 16 * config.num_warps for side in sides)
    try:
        return checked(config, kernel) is config
    except ValueError:
        return False


def _sides(size: int, most: int) -> list[int]:
    """The size halved down to the smallest tile, and doubled, for a tile of another shape, where that is not too wide."""
    found = [size]
    while found[-1] // 2 >= SMALLEST_TILE:
        found.append(found[-1] // 2)
    return [*found, 2 * size] if 2 * size <= most else found


def fit_entry(
    arch: str, names: Sequence[str], shipped: Config | None = None
) -> tuple[Config | None, CompileReport]:
    """One configuration for the cases `names`, which are looked up under one key, and the report of the worst case.

    None where the default does; else `shipped` or the first candidate that fits, or what spills least.
    """
    cases = [case for case in default_cases(arch) if case.name in names]
    report = _worst(cases, None, arch)
    if not report.problem or not cases[0].entry:
        return None, report
    best: tuple[Config | None, CompileReport] = None, report
    trials = 0
    for config in (*([shipped] if shipped else []), *candidates(cases[0])):
        if configured(cases[0], config) == cases[0]:
            continue
        tried = _worst(cases, config, arch)
        if not tried.problem:
            return config, tried
        spills_less = tried.spill_bytes < best[1].spill_bytes or not best[1].problem.startswith("spills")
        if tried.problem.startswith("spills") and spills_less:
            best = config, tried
        trials += 1
        if trials == MOST_TRIALS:
            break
    return best


def _worst(cases: Sequence[KernelCase], config: Config | None, arch: str) -> CompileReport:
    """Of these cases with `config` (None: as they are), the one that spills most, or the first that cannot run at all."""
    reports = []
    for case in cases:
        reports.append(compile_case(configured(case, config) if config else case, arch))
        if reports[-1].problem and not reports[-1].problem.startswith("spills"):
            return reports[-1]
    return max(reports, key=lambda report: report.spill_bytes)


def entries_of(case: KernelCase) -> list[str]:
    """The keys under which a configuration of this case is looked up."""
    return [case.entry + bucket for bucket in BUCKETS] if case.entry.endswith("/") else [case.entry]


def _first(shipped: Mapping[str, Config], case: KernelCase) -> Config | None:
    """What is shipped for a case, if anything."""
    return next((shipped[entry] for entry in entries_of(case) if entry in shipped), None)


def fit(arch: str, pattern: str, jobs: int) -> Iterator[CompileReport]:
    """Fit the cases of `arch` whose names match, write its tuning file, and report what changed or could not be mended."""
    every = default_cases(arch)
    groups: dict[str, list[KernelCase]] = {}
    for case in every:
        groups.setdefault(case.entry or case.name, []).append(case)
    asked = [group for group in groups.values() if any(fnmatch(case.name, pattern) for case in group)]
    known = {entry for case in every for entry in entries_of(case)}
    fitted = {entry for group in asked for entry in entries_of(group[0])}
    file = SHIPPED / f"{arch}.json"
    shipped = read_configs(file)
    kept = {entry: config for entry, config in shipped.items() if entry in known - fitted}
    with compile_pool(jobs) as pool:
        results = [
            pool.submit(fit_entry, arch, [case.name for case in group], _first(shipped, group[0]))
            for group in asked
        ]
        for group, result in zip(asked, results, strict=True):
            config, report = result.result()
            if config is not None:
                kept |= dict.fromkeys(entries_of(group[0]), config)
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

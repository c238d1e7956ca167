"""The command line: parses, calls, prints. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import shlex
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from megafold_bench.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from megafold_bench.boundary import BoundarySpec
    from megafold_bench.points import Phase, Trial
    from megafold_bench.records import Record
    from megafold_bench.seeds import Seed as BoundarySeed
    from megafold_bench.sweep import SweepSpec

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

app = typer.Typer(
    help="Measure AlphaFold3-class training: time, memory and where it runs out, per variant and length.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RunArgument = Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")]
Variants = Annotated[str | None, typer.Option(help="Names, separated by commas: see `variants`.")]
SeqLens = Annotated[str | None, typer.Option(help='Tokens: "64:256:64" (first:last:step) or "384,512".')]
Preset = Annotated[str | None, typer.Option(help="Model dimensions: tiny, small or af3.")]
Input = Annotated[Path | None, typer.Option("--input", help="A structure (mmCIF) or a folder with one.")]
Msa = Annotated[list[str] | None, typer.Option(help="CHAIN=FILE.a3m; repeat for each chain.")]
Template = Annotated[list[str] | None, typer.Option(help="CHAIN=FILE.cif; repeat for each.")]
Timeout = Annotated[float | None, typer.Option(help="Wall limit of a trial in seconds.")]
Out = Annotated[Path | None, typer.Option(help="The run folder; runs/<kind>-<time> if not given.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="With --resume: run crashed, hung and timed-out trials again.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the trials and run none.")]
Cycles = Annotated[int | None, typer.Option(help="Recycling cycles.")]
DiffusionSamples = Annotated[int | None, typer.Option(help="Noised copies per step.")]
MsaRows = Annotated[int | None, typer.Option(help="Alignment rows per cycle.")]
Precision = Annotated[str | None, typer.Option(help="Precision policy of the variant.")]
Seed = Annotated[int | None, typer.Option(help="Seed of weights, crop and noise.")]
Gpus = Annotated[int, typer.Option(help="GPUs per trial: 1, so far.")]
Snapshot = Annotated[
    bool, typer.Option("--snapshot", help="Keep a summary of what held the memory where it runs out.")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda (also ROCm).")]
Ops = Annotated[str | None, typer.Option("--op", help="Operators, separated by commas; all if not given.")]
Tokens = Annotated[str | None, typer.Option("--n", help="Tokens: 384,768.")]
Dtypes = Annotated[str | None, typer.Option("--dtype", help="bf16, fp16, fp32, separated by commas.")]
Settings = Annotated[
    list[str] | None, typer.Option("--option", help="KEY=VALUE, passed to the variant; repeat for each.")
]
Published = Annotated[bool, typer.Option("--published", help="Lay the paper's numbers over.")]
Svg = Annotated[bool, typer.Option("--svg", help="Figures as SVG, text as paths.")]
Pdf = Annotated[bool, typer.Option("--pdf", help="Figures as PDF with embedded fonts.")]
Width = Annotated[str, typer.Option(help="Of a figure: column (3.35 in) or page (6.9 in).")]


def _parse_scalar(text: str) -> str | int | float | bool | None:
    words: dict[str, bool | None] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _pairs(values: list[str] | None, flag: str, form: str) -> list[tuple[str, str]]:
    pairs = []
    for value in values or []:
        name, separator, rest = value.partition("=")
        if not (separator and name and rest):
            raise UserError(f"{flag} {value}: write {form}")
        pairs.append((name, rest))
    return pairs


def _existing(path: Path, flag: str) -> str:
    if not path.exists():
        raise UserError(f"{flag} {path}: there is no such file; check the path")
    return str(path)  # as typed: a record should not tell where a home folder is


def _files(values: list[str] | None, flag: str, form: str) -> str | None:
    named = [f"{chain}={_existing(Path(path), flag)}" for chain, path in _pairs(values, flag, form)]
    return ";".join(named) or None


def _options(
    preset: str | None,
    input_: Path | None,
    msa: list[str] | None,
    template: list[str] | None,
    settings: list[str] | None,
    **others: int | str | None,
) -> dict[str, Any]:
    """What goes to the variant: named flags, then ``--option``."""
    named: dict[str, Any] = {
        "preset": preset,
        "input": _existing(input_, "--input") if input_ else None,
        "msa": _files(msa, "--msa", "CHAIN=FILE.a3m"),
        "template": _files(template, "--template", "CHAIN=FILE.cif"),
        **others,
    }
    options = {name: value for name, value in named.items() if value is not None}
    for name, value in _pairs(settings, "--option", "KEY=VALUE"):
        options[name.replace("-", "_")] = _parse_scalar(value)
    return options


def _default_out(kind: str) -> Path:
    return Path("runs") / f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"


def _base_spec(device: str | None) -> SweepSpec:
    """The sweep that is run when nothing is asked for."""
    from megafold_bench import defaults
    from megafold_bench.environment import detect_accelerator
    from megafold_bench.measure.memory import allocator_setting
    from megafold_bench.sweep import SweepSpec

    kind = device or detect_accelerator()
    return SweepSpec(
        variants=defaults.VARIANTS.get(kind, ()),
        seq_lens=defaults.SEQ_LENS.get(kind, ()),
        device=kind,
        options={"preset": defaults.PRESET.get(kind)},
        alloc_conf=allocator_setting() or defaults.alloc_conf(kind),
    )


def _sweep_spec(out: Path | None, resume: bool, asked: dict[str, Any], options: dict[str, Any]) -> SweepSpec:
    """Defaults, or what a run to be resumed asked for, with what the command line names on top."""
    from dataclasses import replace

    from megafold_bench.sweep import SweepSpec, parse_seq_lens

    if resume and out is None:
        raise UserError("--resume needs the run folder: name it with --out")
    given = {name: value for name, value in asked.items() if value is not None}
    if "variants" in given:
        given["variants"] = tuple(name.strip() for name in given["variants"].split(",") if name.strip())
    if "seq_lens" in given:
        given["seq_lens"] = parse_seq_lens(given["seq_lens"])
    if resume and out is not None and out.exists():
        base = SweepSpec.from_dict(_recorded_spec(out, "sweep"))
    else:
        base = _base_spec(given.get("device"))
    return replace(base, **given, options={**base.options, **options})


def _recorded_spec(run: Path, kind: str) -> Mapping[str, Any]:
    """What a run that is to be resumed was asked for. Raises `UserError` for a run of another kind."""
    from megafold_bench.records import read_manifest

    manifest = read_manifest(run)
    if manifest["kind"] != kind:
        other = manifest["kind"]
        raise UserError(f"{run} holds a {other} run, not a {kind}: resume it with megafold-bench {other}")
    return manifest["spec"]


def _one_gpu(gpus: int) -> None:
    """Raise `UserError` for a number of GPUs that cannot be measured yet."""
    if gpus != 1:
        raise UserError(
            f"--gpus {gpus}: trials on several GPUs are not there yet; give --gpus 1 or leave it out"
        )


def _refuse_unknown(names: tuple[str, ...]) -> None:
    from megafold_bench import variants

    for name in names:
        variants.get(name)


def _is_retriable(record: Record) -> bool:
    from megafold_bench.outcomes import Outcome

    retriable = (Outcome.CRASH, Outcome.HANG, Outcome.TIMEOUT, Outcome.ERROR, Outcome.SKIPPED_DOMINATED)
    return Outcome(record["outcome"]["status"]) in retriable


@contextmanager
def _resumable(path: Path, command: str) -> Iterator[None]:
    """Turn an interruption into a hint how to go on. The trial in progress has been ended by then."""
    from megafold_bench.runs import resume_command

    def terminate(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, terminate) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        typer.echo(f"stopped; continue with: {resume_command(path, ('megafold-bench', command))}", err=True)
        code = EXIT_INTERRUPTED if isinstance(stop, KeyboardInterrupt) else stop.code
        raise typer.Exit(code if isinstance(code, int) else EXIT_TERMINATED) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@app.command()
def sweep(
    variants: Variants = None,
    preset: Preset = None,
    seq_lens: SeqLens = None,
    input_: Input = None,
    msa: Msa = None,
    template: Template = None,
    steps: Annotated[int | None, typer.Option(help="Measured steps per trial.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps before them, the first included.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Fresh processes per point.")] = None,
    timeout: Timeout = None,
    out: Out = None,
    resume: Resume = False,
    retry_failed: RetryFailed = False,
    only: Annotated[
        str | None, typer.Option(help="time or memory: take those trials now, and leave the others.")
    ] = None,
    dry_run: DryRun = False,
    gpus: Gpus = 1,
    no_sampler: Annotated[
        bool, typer.Option("--no-sampler", help="Watch no device: no power, energy or clocks.")
    ] = False,
    snapshot: Snapshot = False,
    find_boundary: Annotated[
        bool, typer.Option("--find-boundary", help="Then search the longest length that trains.")
    ] = False,
    cycles: Cycles = None,
    diffusion_samples: DiffusionSamples = None,
    msa_rows: MsaRows = None,
    precision: Precision = None,
    seed: Seed = None,
    device: Device = None,
    settings: Settings = None,
) -> None:
    """Train a few steps per variant and length, each trial in a fresh process, and record them."""
    from megafold_bench.sweep import plan

    _one_gpu(gpus)
    phase = _phase(only)
    asked = {
        "variants": variants,
        "seq_lens": seq_lens,
        "steps": steps,
        "warmup": warmup,
        "repeats": repeats,
        "timeout_s": timeout,
        "seed": seed,
        "device": device,
        "sampler": False if no_sampler else None,
    }
    options = _options(
        preset,
        input_,
        msa,
        template,
        settings,
        cycles=cycles,
        diffusion_samples=diffusion_samples,
        msa_rows=msa_rows,
        precision=precision,
    )
    spec = _sweep_spec(out, resume, asked, options)
    _refuse_unknown(spec.variants)
    trials = [trial for trial in plan(spec) if phase in (None, trial.point.phase)]
    if dry_run:
        for number, trial in enumerate(trials, start=1):
            typer.echo(f"{number:4d}  {trial}  {trial.trial_id}")
        return
    path = out or _default_out("sweep")
    _run_sweep(spec, trials, path, resume, retry_failed, snapshot)
    if find_boundary:
        from megafold_bench.boundary import BoundarySpec
        from megafold_bench.records import read_manifest

        beside = path.with_name(path.name + "-boundary")
        again = resume and beside.exists()
        found = BoundarySpec.from_dict(read_manifest(beside)["spec"]) if again else None
        _run_boundary(
            found or BoundarySpec(spec, seeds=_seeds([path], spec, required=False)), beside, again, snapshot
        )
    _print_run(path)


def _phase(name: str | None) -> Phase | None:
    from megafold_bench.points import Phase

    if name is not None and name not in list(Phase):
        raise UserError(f"--only {name}: choose from {', '.join(Phase)}, or leave it out for both")
    return None if name is None else Phase(name)


def _run_sweep(
    spec: SweepSpec, trials: Sequence[Trial], path: Path, resume: bool, retry_failed: bool, snapshot: bool
) -> None:
    from megafold_bench.environment import collect
    from megafold_bench.launchers import LocalLauncher
    from megafold_bench.progress import LiveListener, PlainListener, can_redraw
    from megafold_bench.runs import RunFolder
    from megafold_bench.sweep import SAMPLE_INTERVAL_S, Runner, run_plan

    console = _console()
    with ExitStack() as stack:
        folder = stack.enter_context(
            RunFolder.open(path, kind="sweep", spec=spec.as_dict(), environment=collect, resume=resume)
        )
        stack.enter_context(_resumable(path, "sweep"))
        live = can_redraw(console)
        listener = (
            stack.enter_context(LiveListener(console, trials, folder.records))
            if live
            else PlainListener(console)
        )
        runner = Runner(
            folder,
            LocalLauncher(tick_s=1.0 if live else None),
            listener,
            spec.timeout_s,
            SAMPLE_INTERVAL_S if spec.sampler else None,
            _is_retriable if retry_failed else lambda record: False,
            snapshot,
        )
        left = [trial for trial in trials if runner.recorded(trial) is None]
        if not left:
            typer.echo(f"all {len(trials)} trials of {path} are recorded already")
        run_plan(trials, runner)


def _print_run(path: Path) -> None:
    from reports.figures import plot_run
    from reports.tables import print_table

    print_table(path, _console())
    figures = plot_run(path)
    typer.echo(f"records: {path / 'results.jsonl'}")
    if figures:
        names = ", ".join(dict.fromkeys(figure.stem for figure in figures))
        typer.echo(f"figures: {figures[0].parent} ({names})")


def _require_run(path: Path) -> None:
    """Raise `UserError` unless `path` is a run folder that this version can read."""
    from megafold_bench.records import read_manifest

    read_manifest(path)


def _console() -> Console:
    from rich.console import Console

    return Console()


@app.command()
def boundary(
    context: typer.Context,
    variants: Variants = None,
    preset: Preset = None,
    granularity: Annotated[int, typer.Option(help="The grid: lengths are multiples of this.")] = 32,
    memory_limit: Annotated[
        str | None, typer.Option(help="Capacities of smaller cards to emulate: 40GiB,64GiB,80GiB.")
    ] = None,
    start: Annotated[int | None, typer.Option(help="First length to try.")] = None,
    longest: Annotated[int, typer.Option(help="No length above this is tried.")] = 8192,
    confirm: Annotated[int, typer.Option(help="Trials at each end of the boundary.")] = 2,
    probe_steps: Annotated[int, typer.Option(help="Optimiser steps of a probe; the peak needs two.")] = 2,
    probes_above: Annotated[int, typer.Option(help="Lengths tried above the shortest failure.")] = 2,
    seed_from: Annotated[
        list[Path] | None,
        typer.Option(help="Begin where this run's memory records point; repeat for each.", metavar="RUN"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say how many trials to expect and run none.")
    ] = False,
    snapshot: Snapshot = False,
    gpus: Gpus = 1,
    input_: Input = None,
    msa: Msa = None,
    template: Template = None,
    timeout: Timeout = None,
    out: Out = None,
    resume: Resume = False,
    cycles: Cycles = None,
    diffusion_samples: DiffusionSamples = None,
    msa_rows: MsaRows = None,
    precision: Precision = None,
    seed: Seed = None,
    device: Device = None,
    settings: Settings = None,
) -> None:
    """Find the longest sequence that trains and the shortest that does not, per variant."""
    from megafold_bench.boundary import BoundarySpec, parse_sizes
    from megafold_bench.records import RESULTS_NAME, read_results

    _one_gpu(gpus)
    if resume and out is not None:
        _refuse_others(context, ("out", "resume", "dry_run", "snapshot", "gpus"))
        spec = BoundarySpec.from_dict(_recorded_spec(out, "boundary"))
        if dry_run:
            _print_forecast(spec, read_results(out / RESULTS_NAME))
        else:
            _run_boundary(spec, out, True, snapshot)
        return
    asked = {"variants": variants, "timeout_s": timeout, "seed": seed, "device": device}
    options = _options(
        preset,
        input_,
        msa,
        template,
        settings,
        cycles=cycles,
        diffusion_samples=diffusion_samples,
        msa_rows=msa_rows,
        precision=precision,
    )
    base = _sweep_spec(out, resume, asked, options)
    _refuse_unknown(base.variants)
    limits = parse_sizes(memory_limit) if memory_limit else (None,)
    spec = BoundarySpec(
        base, granularity, limits, start, longest, confirm, probe_steps, probes_above, _seeds(seed_from, base)
    )
    if dry_run:
        _print_forecast(spec)
        return
    _run_boundary(spec, out or _default_out("boundary"), resume, snapshot)


def _refuse_others(context: typer.Context, known: tuple[str, ...]) -> None:
    """Raise `UserError` for an option beside those `known` that stands on the command line."""
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name not in known and source is not None and source.name == "COMMANDLINE":
            raise UserError(
                f"{parameter.opts[0]}: a resumed search takes what it was begun with; leave it out, or search anew "
                "with another --out"
            )


def _seeds(runs: list[Path] | None, base: SweepSpec, required: bool = True) -> tuple[BoundarySeed, ...]:
    """Seeds of run folders. Raises `UserError` for one that should say something of these variants and does not."""
    from megafold_bench.records import RESULTS_NAME, read_results
    from megafold_bench.seeds import seeds_from

    found: list[BoundarySeed] = []
    for run in runs or ():
        _require_run(run)
        here = seeds_from(read_results(run / RESULTS_NAME), base)
        if required and not here:
            raise UserError(
                f"--seed-from {run}: it holds no trial of {', '.join(base.variants)} with these options that "
                "fitted or ran out of memory; leave it out, or give the options of that run"
            )
        found += [seed for seed in here if seed not in found]
    return tuple(found)


def _print_forecast(spec: BoundarySpec, records: Sequence[Record] = ()) -> None:
    from megafold_bench.forecast import forecast

    forecasts = [
        forecast(spec, variant, capacity, records)
        for capacity in spec.capacities
        for variant in spec.base.variants
    ]
    for expected in forecasts:
        typer.echo(expected.text())
    typer.echo(f"about {sum(expected.trials for expected in forecasts)} trials in all")


def _run_boundary(spec: BoundarySpec, path: Path, resume: bool, snapshot: bool) -> None:
    from megafold_bench.boundary import find_boundaries
    from megafold_bench.bracket import describe
    from megafold_bench.environment import collect
    from megafold_bench.launchers import LocalLauncher
    from megafold_bench.progress import PlainListener
    from megafold_bench.runs import RunFolder
    from megafold_bench.sweep import SAMPLE_INTERVAL_S, Runner

    with (
        RunFolder.open(
            path, kind="boundary", spec=spec.as_dict(), environment=collect, resume=resume
        ) as folder,
        _resumable(path, "boundary"),
    ):
        interval = SAMPLE_INTERVAL_S if spec.base.sampler else None
        listener, limit = PlainListener(_console()), spec.base.timeout_s
        runner = Runner(folder, LocalLauncher(), listener, limit, interval, snapshot=snapshot)
        found = find_boundaries(spec, runner)
    for result in found:
        typer.echo(describe(result))
    typer.echo(f"records: {path / 'results.jsonl'}")


@app.command()
def variants() -> None:
    """What is registered, what can be used on this machine, and why the rest cannot."""
    from rich.table import Table

    from megafold_bench import variants as registry
    from megafold_bench.environment import detect_accelerator

    device = detect_accelerator()
    table = Table("variant", f"usable on {device}", "what it is")
    for name in registry.names():
        variant = registry.get(name)
        support = variant.support(device)
        table.add_row(name, "yes" if support.usable else f"no: {support.reason}", variant.summary)
    _console().print(table)


@app.command()
def show(run: RunArgument) -> None:
    """The table of a finished or running sweep, or of a folder of `kernels`."""
    from reports.kernel_rows import ROWS_NAME
    from reports.kernel_table import print_kernels
    from reports.tables import print_table

    if (run / ROWS_NAME).is_file():
        print_kernels(run, _console())
        return
    _require_run(run)
    print_table(run, _console())


@app.command()
def plot(
    run: RunArgument,
    published: Published = False,
    svg: Svg = False,
    pdf: Pdf = False,
    width: Width = "column",
) -> None:
    """Figures (SVG, PDF, PNG, or those asked for) and, beside each, the CSV it was drawn from."""
    width_in = _width_in(width)
    _require_run(run)
    from reports.figures import plot_run
    from reports.figures.save import FORMATS

    for path in plot_run(run, published, _formats(svg, pdf) or FORMATS, width_in):
        typer.echo(str(path))


def _formats(svg: bool, pdf: bool) -> tuple[str, ...]:
    return tuple(name for name, asked in (("svg", svg), ("pdf", pdf)) if asked)


def _width_in(width: str) -> float:
    from reports.figures.style import WIDTHS_IN

    if width not in WIDTHS_IN:
        raise UserError(f"--width {width}: choose from {', '.join(WIDTHS_IN)}")
    return WIDTHS_IN[width]


@app.command()
def export(
    run: RunArgument,
    format_: Annotated[str, typer.Option("--format", help="csv, json or parquet.")] = "csv",
    out: Annotated[Path | None, typer.Option(help="The file to write.")] = None,
) -> None:
    """All records in one flat file; csv and parquet get one of points and one of samples beside it."""
    if format_ not in ("csv", "json", "parquet"):
        raise UserError(f"--format {format_}: choose csv, json or parquet")
    _require_run(run)
    from reports.export import export_run

    typer.echo(str(export_run(run, format_, out)))


@app.command()
def model(
    preset: Annotated[str, typer.Option(help="tiny, small or af3.")] = "af3",
    tokens: Annotated[int, typer.Option(help="Tokens of the step whose FLOPs are counted.")] = 384,
    json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What is trained: dimensions, parameters by part, FLOPs of a step by part."""
    import json

    from baselines.summary import summarise_model

    if tokens < 1:
        raise UserError(f"--tokens {tokens}: give at least 1")
    summary = summarise_model(preset, tokens)
    if json_:
        typer.echo(json.dumps(summary, indent=2))
        return
    from reports.model import print_model

    print_model(summary, _console())


@app.command()
def doctor(
    sampler_cost: Annotated[
        bool, typer.Option("--sampler-cost", help="Measure instead what the device sampler costs a step.")
    ] = False,
    variant: Annotated[str, typer.Option(help="With --sampler-cost: what to train.")] = "pytorch",
    preset: Preset = None,
    tokens: Annotated[int | None, typer.Option(help="With --sampler-cost: the length.")] = None,
    pairs: Annotated[int, typer.Option(help="With --sampler-cost: steps with and without.")] = 10,
    dose: Annotated[
        int | None,
        typer.Option(help="With --sampler-cost: how many times as often to sample; the cost is divided."),
    ] = None,
    warmup: Annotated[int, typer.Option(help="With --sampler-cost: steps before them.")] = 2,
    out: Annotated[Path | None, typer.Option(help="With --sampler-cost: a JSON file to write.")] = None,
    device: Device = None,
    settings: Settings = None,
) -> None:
    """GPU, driver, torch, Triton, vendor libraries, allocator, disk: what will and will not work."""
    if sampler_cost:
        options = _options(preset, None, None, None, settings)
        asked = {"variants": variant, "device": device, "warmup": warmup}
        _sampler_cost(_sweep_spec(None, False, asked, options), tokens, pairs, dose, out)
        return
    from megafold_bench.doctor import doctor as examine

    checks = examine()
    for check in checks:
        typer.echo(f"{check.status:8s} {check.name:24s} {check.detail}")
        if check.remedy:
            typer.echo(f"{'':33s} → {check.remedy}")


def _sampler_cost(
    spec: SweepSpec, tokens: int | None, pairs: int, dose: int | None, out: Path | None
) -> None:
    import json
    import tempfile

    from megafold_bench import defaults
    from megafold_bench.environment import collect
    from megafold_bench.points import Phase
    from megafold_bench.sampler_cost import DOSE, measure
    from megafold_bench.sweep import make_point

    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    length = tokens or defaults.SAMPLER_COST_TOKENS[spec.device]
    point = make_point(spec, spec.variants[0], length, Phase.TIME)
    typer.echo(
        f"{point.variant} at {length} tokens on {spec.device}: {point.warmup} steps, then {pairs} pairs"
    )

    def on_pair(index: int, with_s: float, without_s: float) -> None:
        typer.echo(f"[{index + 1}/{pairs}] with {with_s:.4g} s, without {without_s:.4g} s")

    with tempfile.TemporaryDirectory() as folder:
        effect = measure(point, pairs, Path(folder), dose=DOSE if dose is None else dose, on_pair=on_pair)
    typer.echo(effect.text())
    if out is not None:
        found = {**effect.as_dict(), "factors": point.factors, "environment": collect()}
        out.write_text(json.dumps(found, indent=2) + "\n")
        typer.echo(str(out))


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="The reference.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="What is compared with it.")],
    by: Annotated[str, typer.Option(help="What differs: run, variant or gpu.")] = "run",
    out: Annotated[Path | None, typer.Option(help="Folder for the figure and the CSV.")] = None,
    fail_above: Annotated[str | None, typer.Option(help="Exit with 1 if slower by more, as 5%.")] = None,
) -> None:
    """The same points of two runs side by side: ratios with intervals."""
    threshold = _fraction(fail_above) if fail_above is not None else None
    for run in (run_a, run_b):
        _require_run(run)
    from reports.compare import compare as compare_runs
    from reports.compare_table import print_comparison

    comparison = compare_runs(run_a, run_b, by=by, fail_above=threshold)
    print_comparison(comparison, _console())
    if out is not None:
        from reports.figures.comparison import comparison_drawing
        from reports.figures.save import save

        for path in save(comparison_drawing(comparison), out):
            typer.echo(str(path))
    if comparison.failed:
        raise typer.Exit(1)


def _fraction(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UserError(f"--fail-above {text}: write a percentage such as 5%")
    return value


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders.")],
    html: Annotated[Path, typer.Option(help="The file to write.")] = Path("report.html"),
    published: Published = False,
    svg: Svg = False,
    pdf: Pdf = False,
    width: Width = "column",
) -> None:
    """One self-contained HTML file: summary, boundary, time, memory, environment, how to reproduce.

    With --pdf or --svg the figures are written beside it as well, as a paper takes them.
    """
    width_in = _width_in(width)
    for run in runs:
        _require_run(run)
    from reports.html import figures_folder, write_report

    formats = _formats(svg, pdf)
    write_report(runs, html, published, formats, width_in)
    typer.echo(str(html))
    if formats:
        typer.echo(f"figures: {figures_folder(html)}")


@app.command()
def kernels(
    op: Ops = None,
    n: Tokens = None,
    dtype: Dtypes = None,
    pass_: Annotated[str | None, typer.Option("--pass", help="fwd, bwd, fwdbwd; all if not given.")] = None,
    impl: Annotated[
        str | None,
        typer.Option(help="definition, compile, sdpa, flex, cuequivariance, trifast, ds4sci, megafold."),
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Wall limit of a measurement in seconds.")] = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="The folder; runs/kernels-<time> if not given.")] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Only compile, for GPUs that need not be here.")
    ] = False,
    arch: Annotated[
        str | None,
        typer.Option(help="With --offline: gfx90a,gfx942,gfx950,sm_80,sm_90,sm_100; all if not given."),
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="With --offline: processes at a time.")] = None,
) -> None:
    """Every operator against every implementation usable here: time, memory, error, distance to the roofline."""
    if offline:
        measured = {"--n": n, "--pass": pass_, "--impl": impl, "--timeout": timeout, "--device": device}
        if given := [name for name, value in measured.items() if value is not None]:
            raise UserError(f"{given[0]} belongs to measurements: --offline only compiles; leave it out")
        _kernels_offline(op, dtype, arch, jobs, out)
        return
    if arch is not None or jobs is not None:
        raise UserError("--arch and --jobs belong to --offline: add it, or leave them out")
    from optimized.kernels.bench import Request, run, summary
    from reports.figures.kernels import save_kernels_figure
    from reports.kernel_rows import kernel_frame, read_rows
    from reports.kernel_table import print_kernels, save_kernels_csv

    request = Request.parse(op, n, dtype, pass_, impl, device, timeout)
    folder = out or _default_out("kernels")
    console = _console()
    for row in run(request, folder):
        if line := summary(row):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    print_kernels(folder, console)
    typer.echo(str(save_kernels_csv(folder)))
    if kernel_frame(read_rows(folder))["median_s"].notna().any():
        for path in save_kernels_figure(folder):
            typer.echo(str(path))


@app.command()
def verify(op: Ops = None, dtype: Dtypes = None, device: Device = None) -> None:
    """Are the kernels right on this machine? Errors against fp64 and repeats, a verdict per operator and dtype."""
    from optimized.kernels.verify import Plan, run
    from reports.verdicts import print_verdict, print_verdicts

    console = _console()
    rows = []
    for row in run(Plan.parse(op, dtype, device)):
        print_verdict(row, console)
        rows.append(row)
    if not print_verdicts(rows, console):
        raise typer.Exit(1)


@app.command()
def tune(
    op: Ops = None,
    n: Tokens = None,
    dtype: Dtypes = None,
    budget: Annotated[float, typer.Option(help="Seconds for each operator, length and dtype.")] = 300.0,
) -> None:
    """Find the fastest launch configurations on this GPU and keep them on disk, where the operators look them up."""
    from optimized.kernels.tune import Plan, run
    from reports.verdicts import print_tuned

    console = _console()
    for row in run(Plan.parse(op, n, dtype, budget)):
        print_tuned(row, console)


def _kernels_offline(
    op: str | None, dtype: str | None, arch: str | None, jobs: int | None, out: Path | None
) -> None:
    from optimized.kernels.compile_check import check, parse_architectures
    from optimized.kernels.names import parse_list
    from optimized.kernels.problems import parse_dtypes
    from reports.compile_table import print_compile_table, save_compile_csv

    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs}: give at least 1")
    console = _console()
    with console.status("compiling") as status:
        rows = check(
            parse_architectures(arch or ""),
            parse_list(op),
            jobs,
            parse_dtypes(parse_list(dtype), ()),
            lambda done, total: status.update(f"compiled {done} of {total}"),
        )
    print_compile_table(rows, console)
    if out is not None:
        typer.echo(str(save_compile_csv(rows, out)))
    if any(row["problem"] and not row["accepted"] for row in rows):
        raise typer.Exit(1)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    sys.stderr.write(f"warning: {message}\n")


def main() -> NoReturn:
    """Run the command line: user errors end with one line and code 2, an interruption with 130."""
    warnings.showwarning = _warn
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(EXIT_USER_ERROR)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("stopped", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        # Typer's own usage errors; its copy of click is private, so they are known by what they can do.
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        given = shlex.join(sys.argv[1:])
        typer.echo(f"error: {describe()} (in: {given}; see --help)".replace("\n", " "), err=True)
        sys.exit(EXIT_USER_ERROR)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()

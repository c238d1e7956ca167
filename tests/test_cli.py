from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

import cli

ROOT = Path(cli.__file__).resolve().parent
FAKES = ROOT / "tests" / "fakes"
SMALL = ["--variants", "fake", "--device", "cpu", "--steps", "3", "--warmup", "1", "--repeats", "1"]


@pytest.fixture
def environment() -> dict[str, str]:
    inherited = [part for part in [os.environ.get("PYTHONPATH")] if part]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(FAKES), str(ROOT), *inherited])}


@pytest.fixture
def call(monkeypatch, capsys, environment):
    """Runs the command line in this process; returns exit code, stdout, stderr."""
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])

    def call_(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["megafold-bench", *map(str, arguments)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call_


def run(environment, *arguments: object, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import cli; cli.main()", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, **options)


def test_help_is_quick_and_loads_nothing_heavy(environment):
    code = (
        "import sys, cli\n"
        "sys.argv = ['megafold-bench', '--help']\n"
        "try: cli.main()\n"
        "finally: print('loaded', sorted({'torch', 'numpy', 'pandas', 'matplotlib', 'triton', 'click'} & set(sys.modules)))"
    )
    times = []
    for _ in range(3):
        began = time.perf_counter()
        ended = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        times.append(time.perf_counter() - began)
    assert "loaded []" in ended.stdout
    commands = "sweep boundary variants show plot export model doctor compare report kernels verify tune"
    for command in commands.split(" "):
        assert command in ended.stdout
    assert min(times) < 0.5


BAD = [
    (["--seq-lens", "0"], "--seq-lens 0"),
    (["--seq-lens", "10:1"], "--seq-lens 10:1"),
    (["--seq-lens", "x"], "--seq-lens x"),
    (["--variants", "nope"], "unknown variant 'nope': choose from "),
    (["--variants", ","], "--variants"),
    (["--preset", "huge"], "unknown preset 'huge': choose"),
    (["--steps", "0"], "--steps 0"),
    (["--warmup", "0"], "--warmup 0"),
    (["--repeats", "0"], "--repeats 0"),
    (["--timeout", "-1"], "--timeout -1"),
    (["--steps", "many"], "many"),
    (["--speed", "9"], "--speed"),
    (["--device", "tpu"], "--device tpu"),
    (["--gpus", "4"], "--gpus 4"),
    (["--input", "/no/such.cif"], "--input /no/such.cif"),
    (["--msa", "A"], "--msa A"),
    (["--msa", "A=/no/such.a3m"], "/no/such.a3m"),
    (["--option", "speling=1"], "unknown option 'speling'"),
    (["--option", "novalue"], "--option novalue"),
    (["--out", "/proc/megafold/run"], "/proc/megafold/run"),
    (["--resume"], "--out"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_bad_input_is_one_line_and_exit_code_two(call, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = call("sweep", *SMALL, "--seq-lens", "16", *arguments)
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1 and err.startswith("error: ")
    assert words in err
    assert list(tmp_path.iterdir()) == []


def test_out_that_is_no_run_is_refused_untouched(call, tmp_path):
    (tmp_path / "thesis.tex").touch()
    code, _, err = call("sweep", *SMALL, "--seq-lens", "16", "--out", tmp_path)
    assert code == 2 and "is not a run folder" in err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("command", ["show", "plot", "export", "report"])
def test_commands_on_a_folder_that_is_no_run(call, tmp_path, command):
    code, _, err = call(command, tmp_path / "none")
    assert code == 2 and "does not exist" in err and len(err.splitlines()) == 1


def test_show_prints_measured_kernels(call):
    code, out, _ = call("show", ROOT / "reports" / "reference" / "kernels-h200")
    assert code == 0 and "NVIDIA H200" in out
    assert "triangle_attention · N = 2048 · bf16" in out and "cuequivariance" in out


def test_compare_checks_its_threshold(call, tmp_path):
    code, _, err = call("compare", tmp_path, tmp_path, "--fail-above", "lots")
    assert code == 2 and "--fail-above lots" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--memory-limit", "40"], "--memory-limit 40"),
        (["--memory-limit", "40GiB"], "needs a GPU"),
        (["--granularity", "0"], "--granularity 0"),
        (["--gpus", "8"], "--gpus 8: trials on several GPUs are not there yet"),
        (["--gpus", "0"], "--gpus 0"),
        (["--gpus", "2", "--resume"], "--gpus 2"),
    ],
)
def test_bad_boundary_input(call, tmp_path, arguments, words):
    code, _, err = call(
        "boundary", "--variants", "fake", "--device", "cpu", "--out", tmp_path / "run", *arguments
    )
    assert code == 2 and words in err and not (tmp_path / "run").exists()


def test_one_gpu_is_accepted_as_it_is_written(call):
    arguments = [
        "--variants",
        "fake,fake-slow",
        "--gpus",
        "1",
        "--granularity",
        "32",
        "--device",
        "cpu",
        "--dry-run",
    ]
    code, out, _ = call("boundary", *arguments)
    assert code == 0 and out.startswith("fake: ") and "trials in all" in out


def test_dry_run_prints_the_plan_and_touches_nothing(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call("sweep", *SMALL, "--seq-lens", "16,32", "--dry-run")
    assert code == 0
    assert [line.split()[2] for line in out.splitlines()] == ["N=16", "N=16", "N=32", "N=32"]
    assert list(tmp_path.iterdir()) == []


def test_options_reach_the_variant(call, tmp_path):
    code, out, _ = call("sweep", *SMALL, "--seq-lens", "16", "--option", "step-ms=2.5", "--dry-run")
    _, plain, _ = call("sweep", *SMALL, "--seq-lens", "16", "--dry-run")
    assert code == 0 and out != plain


OOM_AT_100 = ["--option", "ending=oom_device@100", "--option", "bad_step=1"]


def test_boundary_prints_what_it_found(call, tmp_path):
    arguments = ["boundary", "--variants", "fake", "--device", "cpu", "--longest", "256", "--start", "64"]
    out_dir = tmp_path / "run"
    code, out, _ = call(*arguments, *OOM_AT_100, "--confirm", "1", "--out", out_dir)
    assert code == 0
    assert "fake: max_ok 96, min_fail 128, granularity 32" in out
    lines = (out_dir / "results.jsonl").read_text().splitlines()
    code, again, _ = call("boundary", "--out", out_dir, "--resume")
    assert code == 0 and out.splitlines()[-2] in again
    assert (out_dir / "results.jsonl").read_text().splitlines() == lines


def test_what_is_left_of_a_boundary_search_is_told(call, tmp_path):
    arguments = ["boundary", "--variants", "fake", "--device", "cpu", "--longest", "256", "--start", "64"]
    out_dir = tmp_path / "run"
    assert call(*arguments, *OOM_AT_100, "--confirm", "1", "--out", out_dir)[0] == 0
    results = out_dir / "results.jsonl"
    lines = results.read_text().splitlines(keepends=True)
    again = ("boundary", "--out", out_dir, "--resume")
    code, out, _ = call(*again, "--dry-run")
    assert code == 0 and f"fake: over, {len(lines)} trials recorded\nabout 0 trials in all" in out
    results.write_text("".join(lines[:-1]))
    code, out, _ = call(*again, "--dry-run")
    assert code == 0 and "next length" in out and f"more after the {len(lines) - 1} recorded" in out
    assert results.read_text() == "".join(lines[:-1])


def test_a_resumed_search_takes_no_other_options_and_no_other_kind_of_run(call, tmp_path):
    assert call("boundary", *SMALL[:4], "--longest", "64", "--out", tmp_path / "search")[0] == 0
    assert call("sweep", *SMALL, "--seq-lens", "16", "--out", tmp_path / "sweep")[0] == 0
    code, _, err = call("boundary", "--out", tmp_path / "search", "--resume", "--granularity", "64")
    assert code == 2 and "error: --granularity: a resumed search takes what it was begun with" in err
    code, _, err = call("sweep", "--out", tmp_path / "search", "--resume")
    assert code == 2 and "holds a boundary run, not a sweep: resume it with megafold-bench boundary" in err
    code, _, err = call("boundary", "--out", tmp_path / "sweep", "--resume")
    assert code == 2 and "holds a sweep run, not a boundary" in err


def test_boundary_begins_where_an_earlier_run_points(call, tmp_path):
    arguments = ["boundary", "--variants", "fake", "--device", "cpu", "--longest", "512", *OOM_AT_100]
    assert call(*arguments, "--start", "64", "--out", tmp_path / "first")[0] == 0
    seeded = [*arguments, "--confirm", "1", "--probes-above", "0", "--seed-from", tmp_path / "first"]
    code, out, _ = call(*seeded, "--dry-run")
    assert code == 0 and "first length" in out and "trials in all" in out
    code, out, _ = call(*seeded, "--out", tmp_path / "second")
    assert code == 0 and "max_ok 96, min_fail 128, granularity 32, 4 trials" in out
    empty = [*seeded, "--option", "step_ms=2", "--dry-run"]
    code, _, err = call(*empty)
    assert code == 2 and "--seed-from" in err and "with these options" in err


def test_sweep_then_searches_the_boundary(call, tmp_path):
    arguments = [*SMALL, "--seq-lens", "64,96", *OOM_AT_100, "--find-boundary", "--out", tmp_path / "run"]
    code, out, _ = call("sweep", *arguments)
    assert code == 0 and "fake: max_ok 96, min_fail 128" in out
    lines = (tmp_path / "run-boundary/results.jsonl").read_text().splitlines()
    code, again, _ = call("sweep", *arguments, "--resume")
    assert code == 0 and "fake: max_ok 96, min_fail 128" in again
    assert (tmp_path / "run-boundary/results.jsonl").read_text().splitlines() == lines


def test_doctor_measures_the_sampler(call, tmp_path):
    arguments = ["--sampler-cost", "--variant", "fake", "--device", "cpu", "--pairs", "6", "--warmup", "1"]
    code, out, _ = call("doctor", *arguments, "--out", tmp_path / "cost.json")
    assert code == 0 and "sampling every 50 ms changes a step by" in out
    found = json.loads((tmp_path / "cost.json").read_text())
    assert len(found["with_s"]) == len(found["without_s"]) == 6
    assert found["factors"]["seq_len_tokens"] == 64 and "software" in found["environment"]
    assert 1 <= found["dose"] <= 5
    code, _, err = call("doctor", *arguments, "--dose", "60")
    assert code == 2 and "--dose 60: must be from 1 to 50" in err


def test_sweep_without_the_sampler(call, tmp_path):
    code, _, _ = call("sweep", *SMALL, "--seq-lens", "16", "--no-sampler", "--out", tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run/results.jsonl").read_text().splitlines()]
    assert code == 0 and {r["unavailable"]["telemetry"] for r in records} == {"sampling was switched off"}
    assert call("sweep", *SMALL, "--seq-lens", "16", "--out", tmp_path / "run", "--resume")[0] == 0


def test_one_phase_now_and_the_other_later(call, tmp_path):
    arguments = [*SMALL, "--seq-lens", "16,32", "--out", tmp_path / "run"]
    code, out, _ = call("sweep", *arguments, "--only", "memory")
    assert code == 0 and "[2/2] fake N=32 memory #1: ok" in out

    def phases():
        lines = (tmp_path / "run/results.jsonl").read_text().splitlines()
        return [json.loads(line)["factors"]["phase"] for line in lines]

    assert phases() == ["memory"] * 2
    assert call("sweep", "--resume", "--out", tmp_path / "run")[0] == 0
    assert phases() == ["memory"] * 2 + ["time"] * 2
    code, _, err = call("sweep", *arguments, "--only", "speed")
    assert code == 2 and "--only speed: choose from time, memory" in err


def test_figures_for_a_paper(call, tmp_path):
    run = ROOT / "reports/reference/h200-7a4d"
    code, out, _ = call("report", run, "--html", tmp_path / "r.html", "--pdf", "--width", "page")
    assert code == 0 and "r-figures" in out
    assert (tmp_path / "r-figures/h200-7a4d-time.pdf").read_bytes().startswith(b"%PDF")
    code, _, err = call("plot", run, "--svg", "--width", "wide")
    assert code == 2 and "--width wide: choose from column, page" in err


def test_variants_lists_what_is_registered(call):
    code, out, _ = call("variants")
    assert code == 0 and "fake-slow" in out and "sleeps" in out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_says_how_to_resume(environment, tmp_path, number, code):
    out = tmp_path / "run"
    arguments = ["sweep", *SMALL, "--seq-lens", "16", "--option", "ending=hang", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", "import cli; cli.main()", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("logs/*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"megafold-bench sweep --out {out} --resume" in err
    assert "Traceback" not in err


def test_sweep_end_to_end(environment, tmp_path):
    out = tmp_path / "run"
    ended = run(environment, "sweep", *SMALL, "--seq-lens", "16:32:16", "--out", out)
    assert ended.returncode == 0, ended.stderr
    assert "[1/4] fake N=16 time #1: ok" in ended.stdout
    assert "results.jsonl" in ended.stdout and "figures" in ended.stdout
    assert len((out / "results.jsonl").read_text().splitlines()) == 4
    assert json.loads((out / "manifest.json").read_text())["environment"]["source"]["version"]

    again = run(environment, "sweep", "--out", out, "--resume")
    assert again.returncode == 0, again.stderr
    assert "all 4 trials" in again.stdout
    without = run(environment, "sweep", *SMALL, "--seq-lens", "16:32:16", "--out", out)
    assert without.returncode == 2 and "--resume" in without.stderr
    other = run(environment, "sweep", "--seq-lens", "64", "--out", out, "--resume")
    assert other.returncode == 2 and "seq_lens" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["kernels", "--op", "softmax"], "--op softmax: choose from triangle_attention"),
        (["kernels", "--n", "0"], "--n 0"),
        (["kernels", "--dtype", "int8"], "--dtype int8"),
        (["kernels", "--pass", "sideways"], "--pass sideways"),
        (["kernels", "--impl", "mine"], "--impl mine"),
        (["kernels", "--timeout", "0"], "--timeout 0"),
        (["kernels", "--arch", "sm_90"], "belong to --offline"),
        (["kernels", "--out", "/proc/megafold/kernels"], "--out /proc/megafold/kernels"),
        (["kernels", "--offline", "--arch", "sm_12"], "--arch sm_12: choose from sm_80"),
        (["kernels", "--offline", "--jobs", "0"], "--jobs 0"),
        (["kernels", "--offline", "--dtype", "fp8"], "--dtype fp8: choose from"),
        (["kernels", "--offline", "--n", "384"], "--n belongs to measurements"),
        (["verify", "--op", "softmax"], "--op softmax"),
        (["verify", "--device", "tpu"], "--device tpu"),
        (["tune", "--budget", "0"], "--budget 0"),
    ],
)
def test_bad_input_to_the_kernel_commands(call, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1 and words in err
    assert list(tmp_path.iterdir()) == []


def test_kernels_measures_draws_and_lists(call, tmp_path):
    out = tmp_path / "k"
    arguments = [
        "--device",
        "cpu",
        "--op",
        "transition",
        "--n",
        "6,8",
        "--pass",
        "fwd",
        "--impl",
        "definition",
    ]
    code, text, _ = call("kernels", *arguments, "--out", out)
    assert code == 0
    assert "transition · N = 8 · bf16" in text and "kernels.png" in text
    assert {path.name for path in out.iterdir()} >= {"kernels.jsonl", "kernels.csv", "kernels.png", "logs"}


def test_kernels_compile_for_a_gpu_that_is_not_here(environment, tmp_path):
    inherited = {name: value for name, value in environment.items() if name != "TRITON_INTERPRET"}
    asked = ["kernels", "--offline", "--arch", "sm_90,gfx942", "--op", "layer_norm_linear", "--dtype", "bf16"]
    ended = run(inherited, *asked, "--out", tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "wgmma" in ended.stdout and "mfma" in ended.stdout and ", 0 failed" in ended.stdout
    lines = (tmp_path / "kernels_offline.csv").read_text().splitlines()
    assert len(lines) > 12 and all(".bf16." in line for line in lines[1:])

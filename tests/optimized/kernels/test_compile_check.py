import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megafold_bench.errors import UserError
from optimized.kernels import compile_check, fit
from optimized.kernels.compile_check import Accepted, accepted, parse_architectures, tasks_for
from optimized.ops import catalogue as catalogue_module
from optimized.ops.catalogue import catalogue, configured, default_cases, launched
from optimized.ops.layer_norm_linear import launch as layer_norm_linear
from optimized.ops.offline import ARCHITECTURES, CompileReport, compile_case
from optimized.ops.triangle_multiplication import layout as triangle_multiplication
from optimized.ops.tuning import SHIPPED, Config, architecture, lookup, read_configs
from reports.compile_table import print_compile_table, save_compile_csv

SMALL = Config({"BM": 16, "BN": 16, "STAGES": 1}, 4)
ENTRY = "transition.forward/bfloat16/128"


def case_named(name, arch="sm_90"):
    return next(case for case in default_cases(arch) if case.name == name)


def test_every_architecture_has_every_kernel_once():
    for arch in ARCHITECTURES:
        names = [case.name for case in catalogue(arch)]
        assert len(names) == len(set(names))
        for family in ("attention", "transition", "triangle_multiplication", "layer_norm_linear"):
            assert any(name.startswith(family + ".") for name in names)


def test_every_module_of_cases_is_in_the_catalogue():
    files = list(Path(catalogue_module.__file__).parent.rglob("*cases.py"))
    text = Path(catalogue_module.__file__).read_text()
    assert files
    for file in files:
        package = "optimized.ops" if file.parent.name == "ops" else f"optimized.ops.{file.parent.name}"
        assert f"from {package} import {file.stem}" in text, f"{package}.{file.stem}"


def test_narrow_channels_compile():
    """A product on a GPU has sides of 16 at least, which the interpreter does not mind."""
    case = case_named("triangle_multiplication.bf16.64.project")
    sizes = triangle_multiplication.Shape(16, 16, 8, 8).inner(torch.empty(1)) | {"FAST": False}
    assert compile_case(replace(case, constants={**case.constants, **sizes}), "sm_90").shared_bytes >= 0
    case = case_named("layer_norm_linear.bf16.64.forward")
    sizes = layer_norm_linear.Widths(8, 2, 4).blocks(8)
    assert compile_case(replace(case, constants={**case.constants, **sizes}), "sm_90").shared_bytes >= 0


def test_keys_of_the_fused_operators_come_from_their_names():
    assert case_named("transition.fp16.64x256.input_gradient").entry == "transition.input_gradient/float16/64"
    assert case_named("attention.bf16.d32.fold_planes").entry == ""


def test_what_is_not_launched_is_not_compiled():
    names = {case.name for case in default_cases("sm_90")}
    assert "transition.bf16.384x1536.forward" in names
    assert not any(name.startswith("transition.fp32.") for name in names)  # products of the library
    assert "linear.fp32.product" in names
    assert not any(case.name.startswith("linear.") for case in default_cases("gfx90a"))


def test_kernels_in_gluon_are_compiled_for_hopper_alone():
    def in_gluon(arch):
        return {case.name for case in default_cases(arch) if type(case.kernel).__name__ == "GluonJITFunction"}

    assert in_gluon("sm_90") and not any(in_gluon(arch) for arch in ARCHITECTURES if arch != "sm_90")


def test_keys_are_those_of_the_launch():
    assert case_named("gated_output.bf16.256x64.forward").entry == "gated_output.forward/bfloat16/256"
    assert case_named("gated_output.bf16.256x64.backward").entry == "gated_output.backward/bfloat16/64"
    assert case_named("outer_product_mean.fp32.weight").entry == "outer_product_mean.weight/float32/128"
    swiglu = "conditioned_transition.swiglu/float16/256"
    assert case_named("conditioned_transition.fp16.128.swiglu").entry == swiglu
    for form in ("average", "average.transposed"):
        case = case_named(f"pair_weighted_averaging.bf16.8.{form}")
        assert case.entry == "pair_weighted_averaging.average/bfloat16/8"


def test_every_case_names_its_dtype():
    for case in default_cases("gfx942"):
        assert compile_check.dtype_of(case.name) in ("bf16", "fp16", "fp32"), case.name


def test_a_form_that_a_configuration_does_not_name_is_off():
    case = case_named("triangle_multiplication.bf16.128.project_weight")
    assert case.constants["TURNED"] == 1
    assert configured(case, SMALL).constants["TURNED"] is False
    assert all(config.constants["TURNED"] == 1 for config in fit.candidates(case))


def test_every_argument_of_every_kernel_has_a_type_or_a_value():
    for case in catalogue("gfx90a"):
        assert set(case.signature) | set(case.constants) == set(case.kernel.arg_names), case.name
        assert not set(case.signature) & set(case.constants), case.name


def test_a_tuned_configuration_is_checked_beside_the_default_and_a_fitted_one_instead():
    case = case_named("transition.bf16.128x512.forward")
    tuned = launched([case], {}, {"nvidia-h200": {ENTRY: SMALL}})
    assert [c.name for c in tuned] == [case.name, case.name + " (nvidia-h200)"]
    assert tuned[0] == case and tuned[1].constants["BM"] == 16 and tuned[1].constants["H"] == 512
    (fitted,) = launched([case], {ENTRY: SMALL}, {})
    assert fitted.name == case.name and fitted.constants["BN"] == 16


def test_attention_entries_match_every_length_bucket():
    case = case_named("attention.bf16.d32.forward")
    tile = Config({"ROWS": 1, "BQ": 16, "BK": 16, "STAGES": 1}, 4)
    tuned = launched([case], {}, {"d": {"attention.forward/bfloat16/32/long": tile}})
    assert tuned[1].name == case.name + " (d long)" and tuned[1].constants["BQ"] == 16


def test_an_entry_that_no_case_stands_for_is_refused():
    with pytest.raises(ValueError, match=r"transition\.forward/bfloat16/7$"):
        launched(default_cases("sm_90"), {"transition.forward/bfloat16/7": SMALL}, {})


def test_shipped_files_belong_to_known_devices_and_architectures():
    for file in SHIPPED.glob("*.json"):
        assert file.stem in ARCHITECTURES or file.stem in catalogue_module.TUNED_ON, file.stem


def test_a_fitted_configuration_is_looked_up_by_architecture(monkeypatch, tmp_path):
    monkeypatch.setenv("MEGAFOLD_BENCH_CACHE", str(tmp_path))
    monkeypatch.setattr("optimized.ops.tuning.device_name", lambda device: "some-card")
    monkeypatch.setattr("optimized.ops.tuning.architecture", lambda device: "gfx90a")
    entry, config = next(iter(read_configs(SHIPPED / "gfx90a.json").items()))
    op, *key = entry.split("/")
    assert lookup(op, key, None, SMALL) == config
    assert lookup(op, [*key, "none"], None, SMALL) == SMALL


def test_architecture_of_a_cpu():
    assert architecture(torch.device("cpu")) == "cpu"


def test_candidates_stay_launchable_and_start_with_the_largest_tile():
    case = case_named("transition.bf16.128x512.forward")
    found = list(fit.candidates(case))
    areas = [c.constants["BM"] * c.constants["BN"] for c in found]
    start = case.constants["BM"] * case.constants["BN"]
    assert areas[0] == start and max(areas) == areas[-1] == 2 * start and min(areas) == 16 * 16
    assert all(not 64 <= c.constants["BM"] < 16 * c.num_warps for c in found)
    attention = list(fit.candidates(case_named("attention.bf16.d64.forward", "sm_80")))
    assert {c.num_warps for c in attention} == {4, 8}
    assert all(not 64 <= c.constants[side] < 16 * c.num_warps for c in attention for side in ("BQ", "BK"))


class Spills:
    """Compiles in no time: bytes a thread spills, by name of the case and elements of the tile."""

    def __init__(self, rule):
        self.rule, self.tried = rule, []

    def __call__(self, case, arch):
        self.tried.append((case.name, case.constants["BM"] * case.constants["BN"], case.num_warps))
        return CompileReport(case.name, arch, True, "", 255, 0, self.rule(*self.tried[-1]))


SHARING = ("transition.bf16.64x128.input_gradient", "transition.bf16.64x256.input_gradient")


def test_cases_looked_up_under_one_key_are_fitted_together(monkeypatch):
    wider_spills = Spills(lambda name, area, warps: 100 if "256" in name and area > 512 else 0)
    monkeypatch.setattr(fit, "compile_case", wider_spills)
    config, report = fit.fit_entry("sm_80", SHARING)
    assert config.constants["BM"] * config.constants["BN"] == 512 and report.problem == ""
    assert {name for name, area, _ in wider_spills.tried if area == 512} == set(SHARING)


def test_a_default_that_fits_stays_and_so_does_what_was_fitted_before(monkeypatch):
    monkeypatch.setattr(fit, "compile_case", Spills(lambda *case: 0))
    assert fit.fit_entry("sm_80", SHARING, SMALL)[0] is None
    monkeypatch.setattr(fit, "compile_case", Spills(lambda name, area, warps: 100 if area > 512 else 0))
    assert fit.fit_entry("sm_80", SHARING, SMALL)[0] == SMALL


def test_where_nothing_fits_the_least_spill_is_shipped(monkeypatch):
    monkeypatch.setattr(fit, "compile_case", Spills(lambda name, area, warps: 17 + area // 16))
    config, report = fit.fit_entry("sm_80", SHARING[:1])
    assert report.problem and config.constants["BM"] * config.constants["BN"] < 2048


def test_what_counts_as_a_problem():
    fine = CompileReport("k", "sm_80", True, "", 255, 1000, 8)
    assert fine.problem == ""
    assert "spills 24 bytes" in replace(fine, spill_bytes=24).problem
    assert "needs 200000 bytes" in replace(fine, shared_bytes=200_000).problem
    assert replace(fine, arch="sm_90", shared_bytes=200_000).problem == ""
    assert replace(fine, ok=False, error="PTXASError").problem == "PTXASError"
    assert "overwritten: %d" in replace(fine, overwritten=("%d",)).problem


def test_a_known_spill_is_accepted_until_it_grows(monkeypatch):
    monkeypatch.setattr(compile_check, "ACCEPTED", (Accepted("sm_*", "k.*", 64, "known"),))
    report = CompileReport("k.a", "sm_80", True, "", 255, 0, 64)
    assert accepted(report) == "known"
    assert accepted(replace(report, spill_bytes=68)) == ""
    assert accepted(replace(report, arch="gfx90a")) == ""
    assert accepted(replace(report, ok=False)) == ""
    assert accepted(replace(report, overwritten=("%d",))) == ""
    assert accepted(replace(report, shared_bytes=200_000)) == ""


def test_operators_and_architectures_are_checked():
    assert parse_architectures("sm_80,gfx90a,sm_80") == ("sm_80", "gfx90a")
    assert parse_architectures("") == parse_architectures("sm_80,all") == ARCHITECTURES
    with pytest.raises(UserError, match="--arch sm_12"):
        parse_architectures("sm_12")
    assert {name.partition(".")[0] for _, name in tasks_for(["sm_80"], ["triangle_attention"])} == {
        "attention"
    }
    with pytest.raises(UserError, match="--op softmax"):
        tasks_for(["sm_80"], ["softmax"])
    dtypes = {name.split(".")[1] for _, name in tasks_for(["sm_80"], ["layer_norm_linear"], ["bf16", "fp32"])}
    assert dtypes == {"bf16", "fp32"}


def test_a_tuning_file_older_than_the_kernels_is_said_to_be(monkeypatch):
    monkeypatch.setattr(catalogue_module, "fitted_for", lambda arch: {"transition.gone/bfloat16/128": SMALL})
    compile_check._cases.cache_clear()
    with pytest.raises(UserError, match=r"transition\.gone/bfloat16/128; fit or tune again"):
        tasks_for(["sm_80"], [])


def test_compiling_is_refused_under_the_interpreter():
    with pytest.raises(UserError, match="TRITON_INTERPRET"):
        compile_check.check(["sm_80"])


class Crashes:
    def __call__(self, task):
        import os

        if task[1] == "bad":
            os._exit(11)
        return CompileReport(task[1], task[0], True)


def test_a_compiler_that_crashes_is_a_row(monkeypatch):
    monkeypatch.setattr(compile_check, "_compile", Crashes())
    tasks = [("sm_80", name) for name in ("a", "bad", "b", "c")]
    reports = {report.name: report for report in compile_check.compile_tasks(tasks, 2)}
    assert reports["bad"].problem == "the compiler crashed"
    assert all(reports[name].ok for name in "abc")


def test_table_and_csv(tmp_path):
    rows = [
        compile_check._row(CompileReport("k.fine", "sm_80", True, "", 99, 2048, 0, 0, {"mma": 4}, 0.5)),
        compile_check._row(CompileReport("k.spills", "gfx90a", True, "", 256, 2048, 96, 3, {}, 0.5)),
        compile_check._row(CompileReport("k.broken", "gfx90a", False, "PassManager failed")),
    ]
    console = Console(width=120, record=True, file=io.StringIO())
    print_compile_table(rows, console)
    text = console.export_text()
    assert "mma×4" in text and "96 B 3 scalar" in text and "does not compile" in text
    assert "FAILED: gfx90a k.broken: PassManager failed" in text and "2 failed" in text
    assert "k.spills,True,spills 96 bytes a thread" in save_compile_csv(rows, tmp_path).read_text()

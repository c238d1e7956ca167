import io
import json

import pandas as pd
import pytest
from rich.console import Console

from megafold_bench.errors import UserError
from megafold_bench.statistics import Interval
from reports.compare import compare, p_value
from reports.figures.canvas import overlapping_texts
from reports.figures.comparison import comparison_drawing

TWO = {"variants": ("pytorch", "megafold"), "lengths": (256, 384, 512)}


def printed(comparison, width=140):
    out = io.StringIO()
    comparison.print(Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_two_runs_of_one_commit_show_no_change(make, seed):
    a = make("nvidia", **TWO)
    b = make("nvidia", name="again", seed=seed, **TWO)
    comparison = compare(a, b, fail_above=0.03)
    assert len(comparison.pairs) == 6
    assert comparison.changes == () and not comparison.failed
    assert {o.change for o in comparison.overall} == {"same"}
    assert comparison.differences == ()
    assert "No change of step time at 6 points" in printed(comparison)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_five_per_cent_slower_is_found_with_the_right_sign(make, seed):
    a = make("nvidia", **TWO)
    b = make("nvidia", name="slow", seed=seed, slowdown=1.05, **TWO)
    comparison = compare(a, b, fail_above=0.03)
    assert comparison.failed
    assert len(comparison.changes) >= 5
    assert {pair.time_change for pair in comparison.changes} == {"more"}
    assert all(o.ratio.lo > 1.03 and o.ratio.estimate == pytest.approx(1.05, abs=0.01) for o in comparison.overall)
    assert "slower by" in printed(comparison)
    back = compare(b, a, fail_above=0.03)
    assert {pair.time_change for pair in back.changes} == {"less"} and not back.failed


def test_without_a_limit_nothing_fails(make):
    a, b = make("nvidia", **TWO), make("nvidia", name="slow", slowdown=1.5, **TWO)
    assert not compare(a, b).failed


def test_a_limit_above_the_slowdown_passes(make):
    a, b = make("nvidia", **TWO), make("nvidia", name="slow", seed=3, slowdown=1.05, **TWO)
    assert not compare(a, b, fail_above=0.10).failed


def test_variants_of_one_run(make):
    run = make("nvidia", **TWO)
    comparison = compare(run, run, by="variant")
    assert [pair.b.variant for pair in comparison.pairs] == ["megafold"] * 3
    assert all(pair.time.estimate == pytest.approx(0.45, abs=0.01) for pair in comparison.pairs)
    assert all(pair.memory_change == "less" for pair in comparison.pairs)
    assert ("variant", "pytorch", "megafold") in comparison.differences


def test_gpus(make):
    comparison = compare(make("nvidia", **TWO), make("amd", lengths=(256, 384)), by="gpu")
    assert len(comparison.pairs) == 4
    told = {what: (a, b) for what, a, b in comparison.differences}
    assert told["device"] == ("NVIDIA H200", "AMD Instinct MI250X")
    assert "pytorch at 512: only in nvidia" in comparison.unmatched


def test_different_presets_are_not_compared(make):
    a, b = make("nvidia", **TWO), make("nvidia", name="small", preset="small", **TWO)
    with pytest.raises(UserError, match="preset af3 against small"):
        compare(a, b)


def test_a_factor_only_one_variant_has_does_not_keep_them_apart(make):
    run = make("nvidia", **TWO)
    records = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    for record in records:
        if record["factors"]["variant"] == "megafold":
            record["factors"]["workload"]["ops"] = "all"
    (run / "results.jsonl").write_text("\n".join(map(json.dumps, records)))
    comparison = compare(run, run, by="variant")
    assert len(comparison.pairs) == 3
    assert ("ops", "–", "all") in comparison.differences


def test_a_point_that_no_longer_runs_fails_the_comparison(make):
    a = make("nvidia", **TWO)
    b = make("nvidia", name="broken", seed=5, fails={"megafold": (512, "oom_device"), "pytorch": (4096, "ok")}, **TWO)
    comparison = compare(a, b, fail_above=0.05)
    assert comparison.failures == ("megafold 512: ok became oom_device",)
    pair = next(p for p in comparison.boundaries if p.name == "megafold")
    assert (pair.a.max_ok, pair.b.max_ok, pair.b.min_fail) == (512, 384, 512)
    assert pair.ratio == 384 / 512
    assert "now oom_device" in printed(comparison)


def test_more_memory_fails_the_comparison(make):
    a = make("nvidia", **TWO)
    b = make("nvidia", name="fat", seed=5, bytes_at_512=70 * 2**30, **TWO)
    assert any("memory larger" in reason for reason in compare(a, b, fail_above=0.05).failures)


def test_one_noisy_point_among_many_is_not_called(make):
    a = make("nvidia", repeats=1, steps=5, noise=0.2, **TWO)
    b = make("nvidia", name="noisy", seed=4, repeats=1, steps=5, noise=0.2, **TWO)
    assert compare(a, b).changes == ()


def test_p_value_follows_the_interval():
    assert p_value(Interval(1.05, 1.04, 1.06)) < 1e-6
    assert 0.04 < p_value(Interval(1.05, 1.0, 1.1025)) < 0.06
    assert p_value(Interval(1.0, 1.0, 1.0)) == 1.0


def test_files(make, tmp_path):
    run = make("nvidia", **TWO)
    comparison = compare(run, run, by="variant")
    paths = comparison.write(tmp_path / "out")
    assert [path.name for path in paths] == ["compare.svg", "compare.pdf", "compare.png", "compare.csv"]
    read = pd.read_csv(paths[-1])
    assert list(read["time_ratio"]) == [pair.time.estimate for pair in comparison.pairs]


@pytest.mark.parametrize(("kind", "by"), [("nvidia", "variant"), ("nvidia", "run"), ("many", "variant")])
def test_the_figure_has_no_overlaps(make, kind, by):
    run = make(kind, repeats=2, steps=6)
    assert overlapping_texts(comparison_drawing(compare(run, run, by=by)).figure) == []


def test_narrow_output_fits(make):
    run = make("nvidia", **TWO)
    rows = [r for r in printed(compare(run, run, by="variant"), 72).splitlines() if r.startswith("megafold ")]
    assert rows and all(len(row) <= 72 for row in rows[:3])


def test_bad_arguments(make):
    run = make("point")
    with pytest.raises(UserError, match="--by colour"):
        compare(run, run, by="colour")
    with pytest.raises(UserError, match="no variant other than pytorch"):
        compare(run, run, by="variant")

import io
import json

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from megafold_bench.errors import UserError
from megafold_bench.statistics import Interval, holm, is_change, ratio_of_medians
from reports.compare import compare
from reports.compare_table import print_comparison
from reports.figures.canvas import overlapping_texts
from reports.figures.comparison import comparison_drawing
from reports.figures.save import save
from reports.significance import Sizes, p_value, student_p

TWO = {"variants": ("pytorch", "megafold"), "lengths": (256, 384, 512)}


def printed(comparison, width=140):
    out = io.StringIO()
    print_comparison(comparison, Console(file=out, width=width))
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
    assert all(
        o.ratio.lo > 1.03 and o.ratio.estimate == pytest.approx(1.05, abs=0.01) for o in comparison.overall
    )
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
    b = make(
        "nvidia",
        name="broken",
        seed=5,
        fails={"megafold": (512, "oom_device"), "pytorch": (4096, "ok")},
        **TWO,
    )
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


def families(count, noise, between, slowdown=1.0):
    """Calls in `count` comparisons of six points, three processes of twenty steps a side."""
    rng = np.random.default_rng(11)

    def side(scale):
        return [scale * rng.normal(1, between) * rng.normal(1, noise, 20) for _ in range(3)]

    for _ in range(count):
        ratios = [ratio_of_medians(side(1.0), side(slowdown), resamples=300) for _ in range(6)]
        adjusted = holm([p_value(ratio, Sizes(3, 3)) for ratio in ratios])
        yield [is_change(ratio) and p < 0.05 for ratio, p in zip(ratios, adjusted, strict=True)]


def test_noisy_equal_runs_raise_no_alarms():
    assert sum(any(called) for called in families(12, noise=0.05, between=0.03)) <= 1


def test_the_correction_leaves_the_power_to_find_five_per_cent():
    assert sum(map(sum, families(4, noise=0.01, between=0.003, slowdown=1.05))) >= 23


def test_one_process_is_said_to_be_within_run(make):
    a = make("point")
    b = make("point", name="slow", seed=3, slowdown=1.3)
    comparison = compare(a, b)
    assert comparison.pairs[0].time.within_run
    text = printed(comparison)
    assert "slower (within-run)" in text and "miss run-to-run variation" in text


@pytest.mark.parametrize(
    ("t", "freedom"), [(12.7062, 1), (4.30265, 2), (3.18245, 3), (2.77645, 4), (2.30600, 8), (1.98397, 100)]
)
def test_student_table(t, freedom):
    assert student_p(t, freedom) == pytest.approx(0.05, abs=1e-5)


def test_p_value_follows_the_interval():
    few, many = Sizes(3, 3), Sizes(60, 60)
    ratio = Interval(1.05, 1.04, 1.06)
    assert p_value(ratio, many) < 1e-6 < p_value(ratio, few) < 0.005
    assert p_value(Interval(1.0, 1.0, 1.0), few) == 1.0
    assert p_value(Interval(1.2, 1.2, 1.2), Sizes(1, 1)) == 1.0


def test_files(make, tmp_path):
    run = make("nvidia", **TWO)
    comparison = compare(run, run, by="variant")
    paths = save(comparison_drawing(comparison), tmp_path / "out")
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

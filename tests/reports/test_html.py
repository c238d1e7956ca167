import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from megafold_bench.errors import UserError
from reports.cells import cells
from reports.frame import load_run
from reports.html import figures_folder, write_report
from reports.html_parts import Markup, tag, text
from reports.units import seconds_text

QUICK = {"repeats": 2, "steps": 6}
VOID = {"meta", "link"}
EVIL = "<script>alert('x')</script>"


class Checker(HTMLParser):
    """Tags balanced, ids unique, links to ids that exist."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.ids, self.targets, self.text = [], set(), [], [], []

    def handle_starttag(self, name, attributes):
        self.tags.add(name)
        values = dict(attributes)
        if "id" in values:
            self.ids.append(values["id"])
        for key in ("href", "xlink:href"):
            if values.get(key):
                self.targets.append(values[key])
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.handle_starttag(name, attributes)
        if name not in VOID:
            self.open.pop()

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.text.append(data)


def checked(path):
    checker = Checker()
    source = path.read_text()
    checker.feed(source)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    for target in checker.targets:
        assert target == "data:," or (target.startswith("#") and target[1:] in checker.ids), target
    for reference in re.findall(r"url\(#([^)]+)\)", source):
        assert reference in checker.ids
    return checker, source


@pytest.mark.parametrize("kinds", [("nvidia",), ("cpu",), ("failed",), ("point",), ("single", "amd")])
def test_one_file_that_asks_for_nothing(make, tmp_path, kinds):
    path = write_report([make(kind, **QUICK) for kind in kinds], tmp_path / "out" / "report.html")
    checker, source = checked(path)
    assert not {"script", "iframe", "img", "object"} & checker.tags
    outside = set(re.findall(r"https?://[^\s\"'<>)]+", source)) - {"http://www.w3.org/2000/svg"}
    assert outside == set()
    assert "@import" not in source and "prefers-color-scheme:dark" in source
    for section in (
        "summary",
        "boundary",
        "time",
        "memory",
        "energy",
        "comparison",
        "quality",
        "environment",
        "how-to-reproduce",
    ):
        assert section in checker.ids


def test_figures_beside_the_report(make, tmp_path):
    runs = [make("single", **QUICK), make("amd", **QUICK)]
    path = write_report(runs, tmp_path / "report.html", formats=("svg", "pdf"))
    names = {file.name for file in figures_folder(path).iterdir()}
    for run in ("single", "amd"):
        for figure in ("time", "memory", "throughput", "distribution"):
            assert {f"{run}-{figure}.{kind}" for kind in ("svg", "pdf", "csv")} <= names
    assert {f"single-amd-by-gpu-compare.{kind}" for kind in ("svg", "pdf", "csv")} <= names
    assert not any(name.endswith(".png") for name in names)


def test_it_holds_the_numbers(make, tmp_path):
    run = make("single", **QUICK)
    checker, _ = checked(write_report([run], tmp_path / "report.html"))
    words = " ".join(checker.text)
    for cell in cells(load_run(run).records):
        if cell.time:
            assert seconds_text(cell.time.median) in words
    assert "768 fits, 1024 does not" in words
    assert "git checkout 0123456789abcdef" in words
    assert "FIXTURE, not measured" in words


def test_text_from_outside_is_escaped(make, tmp_path):
    run = make("failed", host=EVIL, log_tail=f"\x1b[31mTraceback\x1b[0m {EVIL} & \x00 end", **QUICK)
    checker, source = checked(write_report([run], tmp_path / "report.html"))
    assert "<script" not in source
    assert source.count("&lt;script&gt;") >= 2
    assert "\x1b" not in source and "\x00" not in source
    assert "script" not in checker.tags


def test_an_evil_variant_name_stays_text(make, tmp_path):
    run = make("cpu", variants=("pytorch", '"><script>x</script>'), lengths=(32, 64), **QUICK)
    _, source = checked(write_report([run], tmp_path / "report.html"))
    assert "<script" not in source


def test_figures_follow_the_page(make, tmp_path):
    _, source = checked(write_report([make("nvidia", **QUICK)], tmp_path / "report.html"))
    svgs = re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL)
    assert len(svgs) == 5
    for svg in svgs:
        assert "var(--c" in svg and 'role="img"' in svg and "<title>" in svg
        assert re.findall(r": #[0-9a-f]{6}", svg) == []
    light, dark = re.findall(r"--c0060a8:(#[0-9a-f]{6})", source)
    assert light == "#0060a8" and sum(int(dark[i : i + 2], 16) for i in (1, 3, 5)) > 300


def test_runs_without_anything_in_common_say_so(make, tmp_path):
    path = write_report(
        [make("single", **QUICK), make("failed", lengths=(8192,), **QUICK)], tmp_path / "report.html"
    )
    assert "share no point to compare" in path.read_text()


def test_a_torn_run_warns(make, tmp_path):
    run = make("cpu", **QUICK)
    path = run / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-300])
    assert "is torn" in write_report([run], tmp_path / "report.html").read_text()


def test_missing_energy_says_why(make, tmp_path):
    run = make("cpu", lengths=(32,), **QUICK)
    reason = "energy counter: fewer than two samples"
    energy = json.dumps({"energy": {"energy_j": None, "method": "none", "valid": False, "reason": reason}})
    path = run / "results.jsonl"
    path.write_text(path.read_text().replace('"telemetry": null', f'"telemetry": {energy}'))
    assert f"No energy was measured: {reason}." in write_report([run], tmp_path / "report.html").read_text()


def test_user_errors(make, tmp_path):
    with pytest.raises(UserError, match="no run named"):
        write_report([], tmp_path / "r.html")
    run = make("point")
    (run / "results.jsonl").write_text("")
    with pytest.raises(UserError, match="no record yet"):
        write_report([run], tmp_path / "r.html")


def test_markup_is_not_escaped_twice():
    assert (
        tag("p", tag("b", "a & b"), " < c", class_='x"') == '<p class="x&quot;"><b>a &amp; b</b> &lt; c</p>'
    )
    assert isinstance(text("x"), Markup)


def test_it_opens_in_a_browser(make, tmp_path):
    browser = next(
        (
            found
            for name in ("chromium", "chromium-browser", "google-chrome")
            if (found := shutil.which(name))
        ),
        None,
    )
    if browser is None:
        pytest.skip("no chromium on this machine")
    page = write_report([make("single", **QUICK)], tmp_path / "report.html")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
             f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--window-size=1000,2000"]  # fmt: skip
    done = subprocess.run(
        [browser, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    assert "How to reproduce" in done.stdout
    assert "CONSOLE" not in done.stderr

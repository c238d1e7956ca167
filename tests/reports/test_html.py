import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib import image

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


def test_what_held_the_memory_is_shown(make, tmp_path):
    run = make("failed", **QUICK)
    records = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    failed = [
        r for r in records if r["outcome"]["status"] == "oom_device" and r["factors"]["phase"] == "memory"
    ]
    failed[0]["outcome"]["snapshot"] = "snapshots/a.json"
    failed[1]["factors"]["seq_len_tokens"] = 9999
    failed[1]["outcome"]["snapshot"] = "snapshots/gone.json"
    (run / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "snapshots").mkdir()
    stack = {"bytes": 5 << 30, "blocks": 7, "stack": [f"a.py:1 {EVIL}"]}
    kept = {"wanted_bytes": 2 << 30, "allocated_bytes": 6 << 30, "free_bytes": 1 << 30, "largest_free_bytes": 1 << 20,
            "holders": [stack], "other_holders_bytes": 1 << 30}  # fmt: skip
    (run / "snapshots/a.json").write_text(json.dumps(kept))
    checker, source = checked(write_report([run], tmp_path / "report.html"))
    words = " ".join(checker.text)
    assert "2.0 GiB were asked for; 6.0 GiB were held by tensors" in words and "5.0 GiB" in words
    assert "snapshots/gone.json cannot be read" in words and "<script" not in source


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


ASKING = ("src", "srcset", "href", "xlink:href", "action", "formaction", "data", "poster", "background")


class Requests(HTMLParser):
    """Everything in a page that could make a browser ask for something, or run something."""

    def __init__(self, source):
        super().__init__()
        self.found, self.in_style = [], False
        self.feed(source)

    def handle_starttag(self, name, attributes):
        self.in_style = name == "style"
        if name in ("script", "iframe", "object", "embed", "base", "form"):
            self.found.append(f"<{name}>")
        for key, value in attributes:
            if key in ASKING and not (value == "data:," or value.startswith("#")):
                self.found.append(f"{key}={value}")
            if key.startswith("on"):
                self.found.append(key)
            if key == "http-equiv" and value.lower() == "refresh":
                self.found.append("refresh")
            self._style(value or "")

    def handle_endtag(self, name):
        self.in_style = False

    def handle_data(self, data):
        if self.in_style:
            self._style(data)

    def _style(self, css):
        self.found += [f"url({target})" for target in re.findall(r"url\(\s*([^)#][^)]*)\)", css)]
        self.found += re.findall(r"@import[^;]*", css)


def test_a_report_of_real_runs_asks_for_nothing(tmp_path):
    """Their error messages hold web addresses: as text."""
    page = write_report(REFERENCE, tmp_path / "report.html", published=True)
    assert "https://docs.pytorch" in page.read_text()
    assert Requests(page.read_text()).found == []
    checked(page)


@pytest.mark.parametrize(
    "piece",
    [
        '<img src="https://example.org/x.png">', "<script>1</script>", '<p onclick="x()">', '<a href="http://x/">x</a>',
        "<style>@import 'x.css';</style>", "<style>p{background:url(//x/y)}</style>", '<p style="background:url(x)">',
        '<meta http-equiv="refresh" content="1">',
    ],
)  # fmt: skip
def test_the_check_finds_what_it_is_for(piece):
    assert Requests(f"<html><body>{piece}</body></html>").found


REFERENCE = [
    Path(__file__).resolve().parents[2] / "reports" / "reference" / name
    for name in ("h200-7a4d", "h200-lengths", "h200-long")
]
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)
SCHEMES = {"dark": (0, (0x17, 0x17, 0x1B)), "light": (1, (0xFF, 0xFF, 0xFF))}
"""Blink's number of the preferred colour scheme, and the page's paper in it."""


def browse(page, folder, scheme, width=1000):
    """Open a page in a headless browser; gives its document, its console and a screenshot."""
    folder.mkdir(exist_ok=True)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
             "--disable-component-update", f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr",
             f"--blink-settings=preferredColorScheme={SCHEMES[scheme][0]}", f"--window-size={width},2000"]  # fmt: skip
    picture = folder / "page.png"
    shot = subprocess.run(
        [CHROMIUM, *flags, f"--screenshot={picture}", page.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    dump = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    console = [line for line in (shot.stderr + dump.stderr).splitlines() if "CONSOLE" in line]
    return dump.stdout, console, picture


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_opens_in_a_browser(tmp_path, scheme):
    """The page's policy forbids every request: one that was tried would stand in the console."""
    page = write_report(REFERENCE, tmp_path / "report.html", published=True)
    document, console, picture = browse(page, tmp_path / "browser", scheme)
    assert console == []
    assert "How to reproduce" in document
    pixels = image.imread(picture)
    assert tuple(round(255 * float(part)) for part in pixels[2, 2][:3]) == SCHEMES[scheme][1]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_browser_would_tell_of_a_request(make, tmp_path):
    page = write_report([make("point", **QUICK)], tmp_path / "report.html")
    page.write_text(page.read_text().replace("</main>", '<img src="https://example.org/x.png"></main>'))
    _, console, _ = browse(page, tmp_path / "browser", "light")
    assert any("example.org" in line for line in console)

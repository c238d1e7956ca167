"""Pieces of an HTML page. Every text is escaped here, unless it is already `Markup`."""

from __future__ import annotations

import colorsys
import re
from collections.abc import Iterable, Sequence
from html import escape

from reports.figures.canvas import slug
from reports.figures.save import Drawing, render
from reports.figures.style import FAINT, GRID, INK, LEADER, PAPER, PUBLISHED, SERIES_COLOURS

_DARK = {
    INK: "#e6e6ea",
    FAINT: "#a0a0aa",
    GRID: "#3a3a42",
    PAPER: "#17171b",
    PUBLISHED: "#9a9aa4",
    LEADER: "#4c4c56",
}
_DARK_LIGHTNESS = 0.66
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Markup(str):
    """Text that is HTML already."""


def text(value: object) -> Markup:
    """`value` escaped, terminal colours and control characters removed; `Markup` is left as it is."""
    if isinstance(value, Markup):
        return value
    return Markup(escape(_CONTROL.sub("", _ANSI.sub("", str(value))), quote=True))


def tag(name: str, *content: object, **attributes: str) -> Markup:
    """One element; an attribute's trailing underscore is dropped (``class_``)."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value, quote=True)}"'
        for key, value in attributes.items()
    )
    return Markup(f"<{name}{given}>{''.join(text(part) for part in content)}</{name}>")


def join(parts: Iterable[object]) -> Markup:
    """Pieces one after the other."""
    return Markup("\n".join(text(part) for part in parts))


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], words: int = 1) -> Markup:
    """A table whose first `words` columns are words and whose other columns are numbers, right-aligned."""
    head = tag(
        "tr", *(tag("th", h, scope="col", class_="w" if i < words else "n") for i, h in enumerate(headings))
    )
    body = [
        tag("tr", *(tag("td", cell, class_="w" if i < words else "n") for i, cell in enumerate(row)))
        for row in rows
    ]
    # Focusable, so that a wide table can be scrolled from the keyboard.
    kind = "prose" if words == len(headings) else "numbers"
    content = tag("table", *([tag("thead", head)] if any(headings) else []), tag("tbody", *body), class_=kind)
    return tag("div", content, class_="scroll", tabindex="0")


def _dark(colour: str) -> str:
    """A series colour for a dark page: the same hue, light enough to read."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    lighter = colorsys.hls_to_rgb(hue, max(lightness, _DARK_LIGHTNESS), min(saturation, 0.8))
    return "#" + "".join(f"{round(255 * part):02x}" for part in lighter)


def _variable(colour: str) -> str:
    return f"--c{colour[1:]}"


def colour_variables(dark: bool) -> str:
    """CSS declarations of every colour that figures use, for a light or a dark page."""
    pairs = [(c, _DARK[c] if dark else c) for c in _DARK] + [
        (c, _dark(c) if dark else c) for c in SERIES_COLOURS
    ]
    return "".join(f"{_variable(colour)}:{value};" for colour, value in dict(pairs).items())


def inline_svg(drawing: Drawing, prefix: str) -> Markup:
    """A figure as inline SVG: colours follow the page, ids are its own, nothing outside is named."""
    source = render(drawing, "svg").decode()
    source = re.sub(r"<metadata>.*?</metadata>", "", source[source.index("<svg") :], flags=re.DOTALL)
    source = re.sub(r"<title>.*?</title>\s*", "", source, flags=re.DOTALL)
    for colour in (*_DARK, *SERIES_COLOURS):
        source = source.replace(f": {colour}", f": var({_variable(colour)})")
    source = re.sub(r'\bid="', f'id="{prefix}-', source)
    source = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", source)
    opening, rest = source.split(">", 1)
    opening = re.sub(r' (width|height|version|xmlns:xlink)="[^"]*"', "", opening).replace("xlink:", "")
    label = tag("title", drawing.title) + tag("desc", drawing.caption)
    return Markup(
        f'{opening} role="img" aria-label="{escape(drawing.title)}">{label}{rest.replace("xlink:href", "href")}'
    )


def figure(drawing: Drawing, prefix: str) -> Markup:
    """A figure with its title."""
    return tag("figure", inline_svg(drawing, slug(f"{prefix}-{drawing.name}")))


STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1b1f;--faint:#5d5d66;--line:#dcdce2;--soft:#f5f5f8;--bad:#a8123a;
--good:#0a6b3d;--warn:#8a5a00;@LIGHT@}
@media (prefers-color-scheme:dark){:root{--paper:#17171b;--ink:#e6e6ea;--faint:#a0a0aa;--line:#3a3a42;--soft:#212127;
--bad:#ff8fa8;--good:#6fd6a0;--warn:#f0bd60;@DARK@}}
*{box-sizing:border-box}
body{margin:0;overflow-wrap:anywhere;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main,header,nav{max-width:68rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2rem}h1{font-size:1.6rem;margin:0 0 .25rem}
h2{font-size:1.2rem;margin:2.4rem 0 .6rem;padding-top:.6rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.4rem 0 .4rem}p{margin:.4rem 0;max-width:46rem}.faint{color:var(--faint);font-size:.9rem}
nav ul{list-style:none;padding:0;margin:1rem 0;display:flex;flex-wrap:wrap;gap:.25rem 1rem}a{color:inherit}
.banner{border:1px solid var(--warn);color:var(--warn);border-radius:4px;padding:.5rem .8rem;margin:1rem 0}
.scroll{overflow-x:auto;margin:.6rem 0}table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.22rem .8rem .22rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th{font-weight:600;white-space:nowrap}.n{text-align:right}.numbers td{white-space:nowrap}.prose td{overflow-wrap:anywhere}.prose td:first-child{white-space:nowrap}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1.2rem}
figure{margin:0;max-width:34rem}figure svg{width:100%;height:auto;display:block}
pre{background:var(--soft);padding:.7rem .9rem;overflow-x:auto;font-size:.82rem;white-space:pre-wrap;overflow-wrap:anywhere}
.bad{color:var(--bad)}.good{color:var(--good)}.warn{color:var(--warn)}summary{cursor:pointer}
@media print{nav{display:none}h2{break-after:avoid}figure,tr{break-inside:avoid}}
"""


def page(title: str, body: Markup) -> str:
    """The whole document. Its policy forbids scripts and every request."""
    style = STYLE.replace("@LIGHT@", colour_variables(False)).replace("@DARK@", colour_variables(True))
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{text(title)}</title>\n<style>{style}</style>\n</head>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
    )

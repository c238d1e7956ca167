"""SI values as text: the only place where bytes become GiB and seconds become milliseconds."""

from __future__ import annotations

import math

GIB = 1 << 30
MIB = 1 << 20
DASH = "–"


def bytes_text(value: float | None) -> str:
    """``"13.9 GiB"``, ``"512 MiB"``, or a dash for None."""
    if value is None:
        return DASH
    if abs(value) >= GIB:
        return f"{value / GIB:.1f} GiB" if value < 1000 * GIB else f"{value / GIB:,.0f} GiB"
    return f"{value / MIB:.0f} MiB" if abs(value) >= 10 * MIB else f"{value / MIB:.2f} MiB"


def significant(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits, without an exponent: ``"7.21"``, ``"412"``, ``"0.0123"``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def seconds_text(value: float | None) -> str:
    """``"7.21 s"``, ``"412 ms"``, ``"85.0 µs"``, or a dash for None."""
    if value is None:
        return DASH
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if abs(value) >= scale or value == 0:
            return f"{significant(value / scale)} {unit}"
    return f"{significant(value / 1e-6)} µs"


def duration_text(value: float | None) -> str:
    """A wall time for people: ``"2 h 05 min"``, ``"3 min 20 s"``, ``"12 s"``."""
    if value is None:
        return DASH
    whole = round(value)
    hours, minutes, seconds = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def percent_text(fraction: float) -> str:
    """A signed change: ``"+5.1 %"``."""
    return f"{100 * fraction:+.1f} %"


def time_unit(largest_s: float) -> tuple[str, float]:
    """Unit of an axis whose largest value is `largest_s`, and how many of it make a second."""
    if largest_s >= 0.5:
        return "s", 1.0
    return ("ms", 1e3) if largest_s >= 5e-4 else ("µs", 1e6)


def bytes_unit(largest_bytes: float) -> tuple[str, float]:
    """Unit of an axis whose largest value is `largest_bytes`, and how many bytes it has."""
    return ("GiB", float(GIB)) if largest_bytes >= GIB else ("MiB", float(MIB))

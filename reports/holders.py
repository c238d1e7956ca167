"""What held the device's memory as it ran out, where the run kept it (`sweep --snapshot`)."""

from __future__ import annotations

import json
from pathlib import Path

from megafold_bench.records import Record
from reports.html_parts import Markup, join, table, tag
from reports.units import bytes_text

SHOWN = 10


def holders(run_dir: Path, record: Record) -> Markup:
    """The largest holders of a record that ran out of memory; nothing where no snapshot was kept or can be read."""
    name = record["outcome"].get("snapshot")
    try:
        kept = json.loads((run_dir / name).read_text()) if name else {}
    except (OSError, ValueError) as error:
        return tag("p", f"The memory snapshot {name} cannot be read: {error}", class_="warn")
    if not kept:
        return Markup("")
    told = (
        f"{bytes_text(kept['wanted_bytes'])} were asked for; {bytes_text(kept['allocated_bytes'])} were held by tensors, "
        f"{bytes_text(kept['free_bytes'])} reserved but free (largest block {bytes_text(kept['largest_free_bytes'])}). "
        "Held by, innermost line first:"
    )
    rows = [
        (" ← ".join(row["stack"]), bytes_text(row["bytes"]), row["blocks"]) for row in kept["holders"][:SHOWN]
    ]
    rest = sum(row["bytes"] for row in kept["holders"][SHOWN:]) + kept["other_holders_bytes"]
    rows += [("all others", bytes_text(rest), "")] if rest else []
    return join([tag("p", told), table(("allocated by", "bytes", "blocks"), rows)])

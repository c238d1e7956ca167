"""What a sweep does when it is told nothing: something useful on any machine."""

from __future__ import annotations

from megafold_bench.devices import selector_for
from megafold_bench.devices.base import Unavailable

EXPANDABLE_SEGMENTS = "expandable_segments:True"

SEQ_LENS = {"cuda": (128, 256, 384, 512, 640, 768), "cpu": (32, 64, 96)}
"""The paper's lengths on a GPU; about two minutes in all on a CPU."""

PRESET = {"cuda": "af3", "cpu": "tiny"}
VARIANTS = {"cuda": ("pytorch", "inductor"), "cpu": ("pytorch",)}
"""On a CPU, compiling takes minutes for every length: ask for ``inductor`` by name."""

SAMPLER_COST_TOKENS = {"cuda": 512, "cpu": 64}
"""Long enough for steps that repeat to within half a per cent, short enough for ten pairs in three minutes."""


def alloc_conf(device: str) -> str | None:
    """The allocator's configuration to measure with, where the environment does not name one.

    Expandable segments keep fragmentation out of the boundary. On ROCm they are not the default: they
    need version 7 and can hang there.
    """
    if device != "cuda":
        return None
    selector = selector_for("cuda")
    on_nvidia = not isinstance(selector, Unavailable) and selector.startswith("nvidia:")
    return EXPANDABLE_SEGMENTS if on_nvidia else None

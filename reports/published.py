"""The numbers that the MegaFold paper published, as series of their own tier, never mixed with ours.

Step times are wall clock per step averaged over 100 iterations, with random recycling and the rollout on
each tenth step inside the average; memory is peak allocated per device. The setting (an older PyTorch,
another implementation of the model) is not that of a run here: the series are for orientation.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "La, Gupta, Morehead, Cheng, Zhang: MegaFold, ISC 2026"
GB = 10**9
"""The paper writes GB; we take it as 10⁹ bytes."""


@dataclass(frozen=True)
class PublishedSeries:
    """One system on one device. `step_time_s` and `allocated_peak_bytes` map tokens to values; `oom_at`
    is the first published length that ran out of memory, None where none did."""

    system: str
    device: str
    step_time_s: dict[int, float]
    allocated_peak_bytes: dict[int, float]
    oom_at: int | None
    tier: str = "published"
    source: str = SOURCE

    @property
    def label(self) -> str:
        """As it stands in a figure."""
        return f"{self.system} (published)"


@dataclass(frozen=True)
class PublishedReach:
    """Longest trainable length by GPU count, MI250."""

    system: str
    device: str
    longest: dict[int, int]
    tier: str = "published"
    source: str = SOURCE


def _gb(values: dict[int, float]) -> dict[int, float]:
    return {length: value * GB for length, value in values.items()}


SERIES = (
    PublishedSeries(
        "PyTorch", "H200", {128: 6.65, 256: 8.14, 384: 10.47, 512: 14.74}, _gb({384: 60.82, 512: 95.45}), 640
    ),
    PublishedSeries(
        "Inductor", "H200", {128: 6.56, 256: 8.13, 384: 10.84, 512: 14.95}, _gb({384: 60.67, 512: 95.42}), 640
    ),
    PublishedSeries(
        "DS-Evo", "H200", {128: 6.17, 256: 7.57, 384: 9.73, 512: 13.45, 640: 19.54},
        _gb({384: 56.58, 512: 87.44, 640: 123.55}), 768,
    ),
    PublishedSeries(
        "MegaFold", "H200", {128: 3.72, 256: 4.53, 384: 7.30, 512: 8.50, 640: 13.26, 768: 17.80},
        _gb({384: 51.59, 512: 77.65, 640: 108.87, 768: 138.70}), None,
    ),
    PublishedSeries("PyTorch", "MI250", {128: 10.99, 256: 14.35, 384: 22.29}, {}, 448),
    PublishedSeries("Inductor", "MI250", {128: 9.85, 256: 13.67, 384: 23.98}, {}, 448),
    PublishedSeries("MegaFold", "MI250", {128: 6.70, 256: 9.74, 384: 13.73, 448: 15.65}, {}, None),
)  # fmt: skip
REACH = (
    PublishedReach("PyTorch", "MI250", {4: 410, 8: 410, 16: 410, 32: 410}),
    PublishedReach("Inductor", "MI250", {4: 415, 8: 415, 16: 415, 32: 415}),
    PublishedReach("MegaFold", "MI250", {4: 830, 8: 1140, 16: 1230, 32: 1380}),
)


def for_vendor(vendor: str, device: str = "") -> tuple[PublishedSeries, ...]:
    """The series of the vendor's GPU in the paper: MI250 for AMD, H200 for anything else."""
    amd = vendor == "amd" or "AMD" in device or "Instinct" in device
    return tuple(series for series in SERIES if series.device == ("MI250" if amd else "H200"))

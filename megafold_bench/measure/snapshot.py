"""What held the device's memory when it ran out: a summary, taken at the moment of the failed allocation.

PyTorch calls an observer before it raises, while every tensor is still there; by the time that the exception
arrives, the unwinding has let go of most. The summary is a few kilobytes of JSON: the largest holders by
the line of code that allocated them, the largest block sizes, and what is reserved but free. PyTorch's own
snapshot is not kept: it is large, and its form is a pickle.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megafold_bench.devices.base import Unavailable

SCHEMA = 1
LARGEST = 20
"""Holders and sizes that are listed; the rest is summed up."""

FRAMES = 6
ACTIVE = "active_allocated"
WAITING = ("active_awaiting_free", "active_pending_free")
_LIBRARIES = ("/torch/", "/triton/", "/contextlib.py", "<frozen", "<string>")
_ROOT = str(Path(__file__).resolve().parents[2]) + "/"

Frame = Mapping[str, Any]


def short_path(name: str) -> str:
    """A source file without the folders above its package, which tell of the machine and not of the code."""
    for marker in ("/site-packages/", "/dist-packages/"):
        if marker in name:
            return name.rsplit(marker, 1)[1]
    return name[len(_ROOT) :] if name.startswith(_ROOT) else name.rsplit("/", 1)[-1]


def _line(frame: Frame) -> str:
    return f"{short_path(str(frame['filename']))}:{frame['line']} {frame['name']}"


def stack(frames: Sequence[Frame]) -> tuple[str, ...]:
    """The innermost frames outside PyTorch, Triton and the interpreter; ``("unknown",)`` where there are none."""
    ours = [f for f in frames if not any(part in str(f["filename"]) for part in _LIBRARIES)]
    return tuple(_line(frame) for frame in ours[:FRAMES]) or ("unknown",)


def _largest(groups: Mapping[Any, list[int]]) -> tuple[list[tuple[Any, int, int]], int]:
    """(key, bytes, blocks) of the largest groups, and the bytes of all others."""
    rows = sorted(
        ((key, sum(sizes), len(sizes)) for key, sizes in groups.items()), key=lambda r: (-r[1], str(r[0]))
    )
    return rows[:LARGEST], sum(size for _, size, _ in rows[LARGEST:])


def summarise_segments(segments: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The summary of the ``segments`` of PyTorch's snapshot. All sizes in bytes.

    ``holders`` are live blocks by the line that allocated them, ``sizes`` live blocks by their size.
    """
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sizes: dict[int, list[int]] = defaultdict(list)
    reserved = waiting = 0
    free: list[int] = []
    count = 0
    for segment in segments:
        count += 1
        reserved += int(segment["total_size"])
        for block in segment["blocks"]:
            size = int(block["size"])
            if block["state"] == ACTIVE:
                holders[stack(block.get("frames") or ())].append(size)
                sizes[size].append(size)
            elif block["state"] in WAITING:
                waiting += size
            else:
                free.append(size)
    by_holder, other_holders = _largest(holders)
    by_size, other_sizes = _largest(sizes)
    return {
        "segments": count,
        "reserved_bytes": reserved,
        "allocated_bytes": sum(map(sum, sizes.values())),
        "waiting_bytes": waiting,
        "free_bytes": sum(free),
        "largest_free_bytes": max(free, default=0),
        "holders": [{"bytes": total, "blocks": n, "stack": list(key)} for key, total, n in by_holder],
        "other_holders_bytes": other_holders,
        "sizes": [{"block_bytes": key, "blocks": n, "bytes": total} for key, total, n in by_size],
        "other_sizes_bytes": other_sizes,
    }


class OomWatch:
    """Takes the summary of the last failed allocation. `start` before the first allocation that matters.

    `cuda` is ``torch.cuda``, `attach` the function that registers an observer with the allocator.
    """

    def __init__(self, cuda: Any, attach: Any) -> None:
        self._cuda = cuda
        self._attach = attach
        self.summary: dict[str, Any] | None = None
        self._reason = "no allocation failed"

    def start(self) -> None:
        """Keep the Python stacks of live blocks, and ask to be called when an allocation fails."""
        self._cuda.memory._record_memory_history(enabled="state", context="state", stacks="python")
        self._attach(self._failed)

    def _failed(self, device: int, wanted: int, device_total: int, device_free: int) -> None:
        try:
            segments = [
                s for s in self._cuda.memory._snapshot()["segments"] if s.get("device", device) == device
            ]
            self.summary = {
                "schema": SCHEMA,
                "wanted_bytes": int(wanted),
                "device_total_bytes": int(device_total),
                "device_free_bytes": int(device_free),
                **summarise_segments(segments),
            }
        except Exception as error:  # an observer that raises would replace the error that it is called for
            self._reason = f"the snapshot failed: {type(error).__name__}: {error}"

    def write(self, path: Path) -> str | Unavailable:
        """Write the summary, if there is one, to `path`; its name beside the run's other files, or why not."""
        if self.summary is None:
            return Unavailable(self._reason)
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(self.summary, indent=1) + "\n")
        except OSError as error:
            return Unavailable(f"{path.name}: {error.strerror}")
        return f"{path.parent.name}/{path.name}"


def watch_for(device: str) -> OomWatch | Unavailable:
    """A watch on the allocator of `device`, or why there is none."""
    if device != "cuda":
        return Unavailable("memory snapshots are taken on GPUs only")
    import torch

    attach = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)
    if attach is None:
        return Unavailable(f"torch {torch.__version__} has no observer of failed allocations")
    return OomWatch(torch.cuda, attach)

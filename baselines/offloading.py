"""What checkpointed units keep, in host memory until backward needs it.

Each unit keeps its inputs (`baselines.checkpointing`); in a stack of some sixty pair blocks they are most of what a step
holds. Here they are copied to pinned host memory while the unit runs, and back while the unit after it is recomputed, on a
stream of its own. Values are the same in every bit. A copy to the host may take as long as its unit; one that takes longer
holds the device up, and nothing more is held on it than one unit's inputs on their way out and one's on their way in, however
far the host runs ahead.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from megafold_bench.devices.base import Unavailable
from megafold_bench.devices.cpu import host_memory
from megafold_bench.host import cgroup_memory_limit_bytes
from megafold_bench.outcomes import UnsupportedError

LEAST_BYTES = 4 << 20
"""Smaller tensors stay where they are: pair masks, single representations."""
SHARE = 0.8
"""Of the host's available memory that may be pinned."""


class _Kept:
    """A tensor of the device whose values are on their way to host memory, there, or on their way back."""

    def __init__(self, tensor: Tensor, buffer: Tensor, buffers: Buffers, group: int) -> None:
        self.host = buffer.view(tensor.dtype).view(tensor.shape)
        self.device, self.group = tensor.device, group
        self.here: Tensor | None = tensor
        self.event: torch.cuda.Event | None = None
        """Of the copy in progress, or the last one: out, then in."""
        weakref.finalize(self, buffers.give, buffer)  # the next copy into it comes after any out of it


class Buffers:
    """Host memory, pinned for `side` if there is such a stream, in pieces of the sizes that were asked for.

    They are given out again and again; for lack of room, free ones make way for those of another size. PyTorch's allocator of
    pinned memory would round each up to a power of two.
    """

    def __init__(self, room: int, side: torch.cuda.Stream | None) -> None:
        self._room, self._side = room, side
        self._free: dict[int, list[Tensor]] = {}
        self._pinned: dict[int, Tensor] = {}
        self._lock = threading.RLock()  # what the garbage collector finds in `take` is given back there
        self.total = 0

    def take(self, nbytes: int) -> Tensor | None:
        """Bytes in host memory; None if it has no more room. Raises `UnsupportedError` if the system does not pin them."""
        with self._lock:
            if self._free.get(nbytes):
                return self._free[nbytes].pop()
            if self.total + nbytes > self._room:
                self._drop_free(nbytes)
            if self.total + nbytes > self._room:
                return None
            buffer = (
                torch.empty(nbytes, dtype=torch.uint8, device="cpu")
                if self._side is None
                else self._pin(nbytes)
            )
            self.total += nbytes
            return buffer

    def _pin(self, nbytes: int) -> Tensor:
        # Whole pages of its own: what shares a page with something pinned cannot be pinned.
        memory = mmap.mmap(-1, nbytes)
        with suppress(
            AttributeError, OSError
        ):  # large pages take less time to make and to pin, where there are any
            memory.madvise(mmap.MADV_HUGEPAGE)
        buffer = torch.frombuffer(memory, dtype=torch.uint8)
        runtime: Any = torch.cuda.cudart()
        status = runtime.cudaHostRegister(buffer.data_ptr(), nbytes, 0)
        if status != runtime.cudaError.success:
            raise UnsupportedError(
                f"offload=true: the system pinned {self.total} bytes of host memory and no {nbytes} more "
                f"({runtime.cudaGetErrorString(status)}): leave it out"
            )
        self._pinned[buffer.data_ptr()] = buffer
        return buffer

    def _drop_free(self, nbytes: int) -> None:
        """Free buffers, until there is room for `nbytes`."""
        free = [buffer for pieces in self._free.values() for buffer in pieces]
        if free and self._side is not None:
            self._side.synchronize()  # it may still read them
        while free and self.total + nbytes > self._room:
            buffer = free.pop()
            self._free[buffer.numel()] = [b for b in self._free[buffer.numel()] if b is not buffer]
            self._unpin(buffer)
            self.total -= buffer.numel()

    def _unpin(self, buffer: Tensor) -> None:
        if self._pinned.pop(buffer.data_ptr(), None) is not None:
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())

    def give(self, buffer: Tensor) -> None:
        """Take back what `take` gave."""
        with self._lock:
            self._free.setdefault(buffer.numel(), []).append(buffer)

    def close(self) -> None:
        """Unpin everything, when copies have ended; nothing is given out any more."""
        with self._lock:
            if self._side is not None:
                self._side.synchronize()
            for buffer in list(self._pinned.values()):
                self._unpin(buffer)
            self._free.clear()
            self._room = 0


class HostStore:
    """Keeps large tensors that a graph saves in host memory; one for a device, used by one thread at a time in either pass.

    `facts` says how many bytes of host memory that took, and how many at most stayed on the device in one step because the host
    had no room. Tensors that are not contiguous stay too, and everything while CUDA graphs are recorded.
    """

    def __init__(self, device: torch.device, least_bytes: int = LEAST_BYTES, room: int | None = None) -> None:
        if device.type == "cuda" and device.index is None:  # as tensors name it
            device = torch.device("cuda", torch.cuda.current_device())
        self._least, self._device = least_bytes, device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers = Buffers(host_room() if room is None else room, self._side)
        # Graphs hold the store: when it goes, none is left to read what it kept. At the process's end the driver is faster.
        self._closing = weakref.finalize(self, self.buffers.close)
        self._closing.atexit = False
        self.facts: dict[str, Any] = {"host_bytes": 0, "left_on_device_bytes": 0}
        self._group = self._left = 0
        self._here: list[_Kept] = []
        """Those with memory on the device: of the unit that ran last, or of the one that backward is at and the next."""
        self._groups: dict[int, list[weakref.ref[_Kept]]] = {}

    @contextmanager
    def saving(self) -> Iterator[None]:
        """What graphs save in here goes to the host: once for each unit, in the order in which they run."""
        self._hold_only([])
        self._group += 1
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def begin_step(self) -> None:
        """Count anew what stays on the device."""
        self._left = 0

    def close(self) -> None:
        """Give the host memory back; nothing that was saved can be read any more."""
        self._hold_only([])
        self._closing()

    def _hold_only(self, those: list[_Kept]) -> None:
        """Give the others' memory on the device back to the current stream, after copies out of it and into it."""
        for kept in self._here:
            if kept not in those:
                self._await(kept)
                kept.here = None
        self._here = those

    def _await(self, kept: _Kept) -> None:
        if kept.event is not None:
            torch.cuda.current_stream(self._device).wait_event(kept.event)

    def _copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """`source` to `target` when the device has come to here, without holding it up."""
        if self._side is None:
            target.copy_(source)
            return None
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)
            return self._side.record_event()

    def _pack(self, tensor: Tensor) -> Tensor | _Kept:
        if tensor.device != self._device or tensor.nbytes < self._least or not tensor.is_contiguous():
            return tensor
        if self._side is not None and torch.cuda.is_current_stream_capturing():
            return tensor
        buffer = self.buffers.take(tensor.nbytes)
        if buffer is None:
            self._left += tensor.nbytes
            self.facts["left_on_device_bytes"] = max(self.facts["left_on_device_bytes"], self._left)
            return tensor
        self.facts["host_bytes"] = self.buffers.total
        kept = _Kept(tensor, buffer, self.buffers, self._group)
        kept.event = self._copy(kept.host, tensor)
        self._here.append(kept)
        self._groups.setdefault(self._group, []).append(weakref.ref(kept))
        return kept

    def _unpack(self, kept: Tensor | _Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self._fetch(kept)
        following = self._before(kept.group)
        for other in following:
            self._fetch(other)
        here = kept.here
        assert here is not None
        beside = [other for other in self._here if other.group == kept.group and other is not kept]
        self._await(kept)
        kept.here = None
        self._hold_only(beside + following)
        return here

    def _fetch(self, kept: _Kept) -> None:
        """Begin the copy to the device, if its values are neither there nor under way."""
        if kept.here is not None:
            return
        # Memory of the current stream, which gets it back too: the other may not write before what is queued has ended.
        kept.here = torch.empty(kept.host.shape, dtype=kept.host.dtype, device=kept.device)
        kept.event = self._copy(kept.here, kept.host)

    def _before(self, group: int) -> list[_Kept]:
        """What the latest unit before `group` kept, and still needs; units after it are forgotten."""
        for later in [g for g in self._groups if g > group]:
            del self._groups[later]
        for earlier in sorted((g for g in self._groups if g < group), reverse=True):
            found = [kept for kept in (ref() for ref in self._groups[earlier]) if kept is not None]
            if found:
                return found
            del self._groups[earlier]
        return []


def host_store(device: torch.device) -> HostStore:
    """A store for a GPU. Raises `UnsupportedError` for another device."""
    if device.type != "cuda":
        raise UnsupportedError(f"offload=true needs a CUDA or ROCm device, not {device.type}: leave it out")
    return HostStore(device)


def host_room() -> int:
    """Bytes of host memory that may be pinned: `SHARE` of what is available, within the container's limit.

    Raises `UnsupportedError` where the system does not say.
    """
    memory, limit = host_memory(), cgroup_memory_limit_bytes()
    if isinstance(memory, Unavailable):
        raise UnsupportedError(f"offload=true needs to know the host's memory: {memory.reason}")
    available = memory.free_bytes
    if isinstance(limit, int):
        available = min(available, limit)
    return int(SHARE * available)

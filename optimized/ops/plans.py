"""Passes of operators, worked out once for a kind of inputs and then repeated at little host cost.

A pass, forward or backward, is plain Python: sizes, grids and configurations are worked out, workspaces allocated,
tensors viewed, kernels and a few products of the library called. None of it depends on the values in the tensors, and
at 400 tokens it takes longer than the GPU's work. So the second call for inputs of one kind is watched, and what it did
is written down as a plan: allocate, launch with these numbers and those addresses, call the library on these
views. Later calls for such inputs follow the plan. The pass stays the only description of what is done.

A plan holds sizes and compiled kernels, no tensors. Every plan is forgotten when launch configurations change.
"""

import threading
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

from optimized.ops.support import interpreting
from optimized.ops.tuning import forget_with

P = ParamSpec("P")
R = TypeVar("R")
Step = Callable[[list[Any], list[int], int], None]
"""Part of a plan: given the tensors so far (None where spent), their addresses and the stream, go on."""

PLAIN = (Tensor, torch.nn.Parameter)

MOST = 1024
"""Kinds of inputs that are remembered over all passes; then the oldest is forgotten."""

_aten = torch.ops.aten
_ALLOCATIONS = (
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
)


class _UnplannableError(Exception):
    """A pass did what a plan cannot repeat."""


class Place(NamedTuple):
    """A tensor as a view of the `slot`-th tensor of a plan, which lies `offset` bytes before it."""

    slot: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    whole: bool
    """Whether it is that tensor itself."""

    def tensor(self, tensors: list[Any]) -> Tensor:
        """The tensor, in a call with these tensors."""
        base: Tensor = tensors[self.slot]
        if self.whole:
            return base
        first = base.storage_offset() * base.element_size() + self.offset
        if self.dtype == base.dtype:
            return base.as_strided(self.shape, self.stride, first // base.element_size())
        view = torch.empty(0, dtype=self.dtype, device=base.device)
        return view.set_(base.untyped_storage(), first // self.dtype.itemsize, self.shape, self.stride)


class Plan:
    """What a pass does with inputs of one kind."""

    def __init__(self, steps: list[Step], result: Any) -> None:
        self._steps, self._result = steps, result

    def follow(self, inputs: Sequence[Any], addresses: list[int], stream: int) -> Any:
        """The results of the pass for `inputs`, which lie at `addresses` (0 for what is no tensor)."""
        tensors = list(inputs)
        for step in self._steps:
            step(tensors, addresses, stream)
        return _filled(self._result, tensors)


def _filled(template: Any, tensors: list[Any]) -> Any:
    """`template` with tensors in place of places."""
    kind = template.__class__
    if kind is Place:
        return template.tensor(tensors)
    if kind is list or kind is tuple:
        return kind([_filled(part, tensors) for part in template])
    return template


def _leaves(value: Any) -> list[Any]:
    """What is in nested lists and tuples, in order."""
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]


class Recorder(TorchDispatchMode):
    """Writes down what a pass does while it does it; `unplannable` says why no plan can be made of it, if none can."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.unplannable = ""
        # Tensors of their own: a pass may get one tensor twice here, and two in another call of its kind.
        self.inputs = [a.detach() if isinstance(a, Tensor) else a for a in inputs]
        self._slots = len(self.inputs)
        self._steps: list[tuple[Step, set[int]]] = []  # and the slots that a step reads
        self._known: dict[int, tuple[ref[Tensor], Place, int]] = {}  # by id; with the address of the slot
        for slot, a in enumerate(self.inputs):
            if isinstance(a, Tensor):
                self._know(a, slot, a.data_ptr(), whole=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Do what is asked, and note it."""
        named = kwargs or {}
        result = func(*args, **named)
        self._noting(lambda: self._note(func, args, named, result))
        return result

    def launched(self, step: Callable[[tuple], Step], arguments: tuple) -> None:
        """Note a launch that was made; `step` makes one of the plan from its arguments with places for tensors."""
        used: set[int] = set()
        self._noting(lambda: self._steps.append((step(self._template(arguments, used)), used)))

    def plan(self, result: Any) -> Plan | None:
        """The plan, given what the pass returned; None where there can be none."""
        kept: set[int] = set()
        template = self._noting(lambda: self._template(result, kept))
        if any(slot < len(self.inputs) for slot in kept):
            self.unplannable = "a result lies in an input"
        if self.unplannable:
            return None
        steps: list[Step] = []
        last = {slot: number for number, (_, used) in enumerate(self._steps) for slot in used}
        for number, (step, used) in enumerate(self._steps):
            steps.append(step)
            spent = [s for s in used if last[s] == number and s >= len(self.inputs) and s not in kept]
            if spent:
                steps.append(_release(spent))
        return Plan(steps, template)

    def _noting(self, note: Callable[[], Any]) -> Any:
        """Call `note`, unless it is too late for a plan; what cannot be planned must not stop the pass itself."""
        if self.unplannable:
            return None
        try:
            return note()
        except _UnplannableError as error:
            self.unplannable = str(error)
            return None

    def _note(self, func: Any, args: tuple, named: dict[str, Any], result: Any) -> None:
        given = [t for t in _leaves([args, list(named.values())]) if isinstance(t, Tensor)]
        fresh = []
        for index, t in enumerate(_leaves(result)):
            if not isinstance(t, Tensor):
                if given:  # or it is one of the settings' (of dtypes, say), and no value out of a tensor
                    raise _UnplannableError(f"{func} has a result that is no tensor")
                continue
            if any(t is g for g in given):
                continue
            base = next((g for g in given if g.untyped_storage()._cdata == t.untyped_storage()._cdata), None)
            if base is None:
                self._know(t, self._slots, t.data_ptr(), whole=True)
                self._slots += 1
                fresh.append(index)
            else:
                place, start = self._found(base)
                self._know(t, place.slot, start, whole=False)
        if func in _ALLOCATIONS:
            self._steps.append((_allocation(result), set()))
        elif fresh or func._schema.is_mutable:  # others are views
            used: set[int] = set()
            names = {name: self._template(value, used) for name, value in named.items()}
            self._steps.append((_library_call(func, self._template(args, used), names, fresh), used))

    def _know(self, t: Tensor, slot: int, start: int, whole: bool) -> None:
        offset = t.data_ptr() - start if t.numel() else 0
        place = Place(slot, offset, t.shape, t.stride(), t.dtype, whole)
        self._known[id(t)] = ref(t), place, start

    def _found(self, t: Tensor) -> tuple[Place, int]:
        """Where a tensor lies, and the address of its slot."""
        known = self._known.get(id(t))
        if known is None or known[0]() is not t:
            raise _UnplannableError("a tensor is neither an input nor made here")
        return known[1], known[2]

    def _template(self, value: Any, used: set[int]) -> Any:
        """`value` with places for tensors, whose slots are added to `used`."""
        if isinstance(value, Tensor):
            place, _ = self._found(value)
            used.add(place.slot)
            return place
        if type(value) in (list, tuple):
            return type(value)([self._template(part, used) for part in value])
        if isinstance(value, list | tuple | dict) and not isinstance(value, torch.Size):
            raise _UnplannableError(f"tensors may lie in a {type(value).__name__}")
        return value


def _allocation(t: Tensor) -> Step:
    size, stride, dtype, device = t.shape, t.stride(), t.dtype, t.device
    allocate = torch.empty_strided

    def step(tensors: list[Any], addresses: list[int], stream: int) -> None:
        t = allocate(size, stride, dtype=dtype, device=device)
        tensors.append(t)
        addresses.append(t.data_ptr())

    return step


def _release(spent: list[int]) -> Step:
    """Drop tensors after their last use, so that later allocations can have their memory."""

    def step(tensors: list[Any], addresses: list[int], stream: int) -> None:
        for slot in spent:
            tensors[slot] = None

    return step


def _library_call(func: Any, arguments: tuple, names: dict[str, Any], fresh: list[int]) -> Step:
    """A call of the library; of its results, those numbered `fresh` are new tensors."""

    def step(tensors: list[Any], addresses: list[int], stream: int) -> None:
        named = {name: _filled(value, tensors) for name, value in names.items()} if names else names
        result = func(*_filled(arguments, tensors), **named)
        if fresh:
            made = _leaves(result)
            for index in fresh:
                tensors.append(made[index])
                addresses.append(made[index].data_ptr())

    return step


def compiled_launch(run: Callable[..., Any], before: tuple, after: tuple, arguments: tuple) -> Step:
    """A launch of a compiled kernel, `run(*before, *arguments, *after)`, with addresses for tensors.

    The fourth of `before` is the stream.
    """
    whole = [*before, *arguments, *after]
    places = [(n, p.slot, p.offset) for n, p in enumerate(whole) if isinstance(p, Place)]
    for n, _, _ in places:
        whole[n] = 0

    def step(tensors: list[Any], addresses: list[int], stream: int) -> None:
        filled = whole.copy()
        filled[3] = stream
        for n, slot, offset in places:
            filled[n] = addresses[slot] + offset
        run(*filled)

    return step


def interpreted_launch(run: Callable[..., Any], arguments: tuple) -> Step:
    """A launch of an interpreted kernel, `run(*arguments)`."""

    def step(tensors: list[Any], addresses: list[int], stream: int) -> None:
        run(*_filled(arguments, tensors))

    return step


class _Watch(threading.local):
    """What notes the launches of this thread, if anything does."""

    recorder: Recorder | None = None


watch = _Watch()


def watched() -> bool:
    """Whether dispatch modes (FLOP counters, selective checkpointing) or functorch transforms see what operators do."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active())


def hooked() -> bool:
    """Whether Triton is to tell somebody of launches (profilers)."""
    hook = knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))


def current_stream(device: int) -> int:
    """The handle of a device's current stream."""
    return torch._C._cuda_getCurrentRawStream(device)


# A plan, or in words why there is none.
_plans: dict[tuple, Plan | str] = {}
_MET = "inputs of this kind were met once"
_changing = threading.Lock()
forget_with(_plans.clear)


def _remember(key: tuple, plan: Plan | str) -> None:
    with _changing:
        if key not in _plans and len(_plans) >= MOST:
            del _plans[next(iter(_plans))]
        _plans[key] = plan


def record(run: Callable[..., Any], inputs: Sequence[Any]) -> tuple[Any, Plan | str]:
    """What `run(*inputs)` returns, and the plan, or in words why there is none."""
    recorder = Recorder(inputs)
    watch.recorder = recorder
    try:
        with recorder:
            result = run(*recorder.inputs)
    finally:
        watch.recorder = None
    return result, recorder.plan(result) or recorder.unplannable


def planned(run: Callable[P, R]) -> Callable[P, R]:
    """`run`, a pass of an operator, following plans: its arguments are tensors and hashable settings, by position.

    What it does may depend on the settings, on shapes, strides, dtypes, device and alignment of the tensors, on
    autocast and on launch configurations; never on values, nor on anything else that can change. Unusual calls
    (launch hooks, dispatch modes, functorch, the interpreter, other kinds of tensors) are made as written.
    """

    @wraps(run)
    def follow(*inputs: Any) -> Any:
        if watch.recorder or interpreting() or hooked() or watched():
            return run(*inputs)  # type: ignore[call-arg]
        device = -1
        key: list[Any] = [run, torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")]
        addresses: list[int] = []
        for a in inputs:
            if a.__class__ in PLAIN:
                address, device = a.data_ptr(), a.get_device()
                addresses.append(address)
                key += (a.shape, a.stride(), a.dtype, device, address & 15)
            elif isinstance(a, Tensor):
                return run(*inputs)  # type: ignore[call-arg]
            else:
                addresses.append(0)
                key.append(a)
        kind = tuple(key)
        plan = _plans.get(kind)
        if plan.__class__ is Plan:
            return plan.follow(inputs, addresses, current_stream(device))
        if plan == _MET:
            result, made = record(run, inputs)
            _remember(kind, made)
            return result
        result = run(*inputs)  # type: ignore[call-arg]
        if plan is None:
            _remember(kind, _MET)
        return result

    return cast("Callable[P, R]", follow)

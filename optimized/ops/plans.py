"""Passes of operators, worked out once for a kind of inputs and then repeated at little host cost.

A pass, forward or backward, is plain Python: sizes, grids and configurations are worked out, workspaces allocated,
tensors viewed, kernels and a few products of the library called. None of it depends on the values in the tensors, and
at 400 tokens it takes longer than the GPU's work. So the second call for inputs of one kind is watched, and what it did
is written down as a plan, a straight function: allocate, launch with these numbers and those addresses, call the library on
these views. Later calls for such inputs follow the plan. The pass stays the only description of what is done.

A plan holds sizes and compiled kernels, no tensors. Every plan is forgotten when launch configurations change.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

from optimized.ops.support import interpreting
from optimized.ops.tuning import forget_with

P = ParamSpec("P")
R = TypeVar("R")

PLAIN = (Tensor, torch.nn.Parameter)

MOST = 1024
"""Kinds of inputs that are remembered over all passes; then the oldest is forgotten."""

POOLED_BYTES = 2 << 20
"""Workspaces of up to this size that only kernels see are parts of one allocation, which lives as long as the pass."""

ALIGNMENT = 512
"""Of the parts of an allocation, in bytes: that of allocations of their own."""

STREAM = object()
"""Stands for the current stream among the arguments of a launch that is noted."""

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


@dataclass(frozen=True)
class Plan:
    """What a pass does with inputs of one kind."""

    source: str
    """As Python: tensors are t0, t1, …, the inputs first, and a0, a1, … their addresses."""
    follow: Callable[..., Any]
    """The results of the pass, given the handle of the current stream and the inputs."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: the number of the plan's tensor that it is, or is a view of, and that one's address."""

    slot: int
    address: int
    whole: bool


@dataclass(frozen=True)
class _Step:
    """A statement of a plan, the tensors that it needs and those that it makes, by number."""

    text: str
    needs: set[int] = field(default_factory=set)
    makes: list[int] = field(default_factory=list)


def _view(base: Tensor, dtype: torch.dtype, shape: tuple, stride: tuple, offset: int) -> Tensor:
    """A view in another dtype, `offset` bytes into `base`."""
    first = base.storage_offset() * base.element_size() + offset
    return torch.empty(0, dtype=dtype, device=base.device).set_(
        base.untyped_storage(), first // dtype.itemsize, shape, stride
    )


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
        self._dtypes: list[torch.dtype | None] = []  # of the plan's tensors; None for inputs that are none
        self._steps: list[_Step] = []
        self._addressed: set[int] = set()
        self._passed: set[int] = set()  # as tensors, not by address
        self._spaces: dict[int, int] = {}  # bytes of allocations
        self._known: dict[int, tuple[ref[Tensor], _Place]] = {}  # by id
        self._names: dict[str, Any] = {"empty": torch.empty_strided, "view": _view, "leaves": _leaves}
        for a in self.inputs:
            self._add(a)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Do what is asked, and note it."""
        named = kwargs or {}
        result = func(*args, **named)
        self._noting(lambda: self._note(func, args, named, result))
        return result

    def launched(self, run: Callable[..., Any], arguments: Sequence[Any], addresses: bool) -> None:
        """Note a launch, `run(*arguments)`, which takes `addresses` for tensors or the tensors themselves."""
        self._noting(lambda: self._launched(run, arguments, addresses))

    def plan(self, result: Any) -> Plan | None:
        """The plan, given what the pass returned; None where there can be none."""
        kept: set[int] = set()
        returned = self._noting(lambda: self._text(result, kept))
        if any(slot < len(self.inputs) for slot in kept):
            self.unplannable = "a result lies in an input"
        if self.unplannable:
            return None
        last = {slot: step for step in self._steps for slot in (*step.makes, *step.needs)}
        pool = self._pool()
        lines = self._addresses(range(len(self.inputs)))
        if pool:
            size = max(offset + self._spaces[slot] for slot, offset in pool.items())
            lines += [f"pool = empty(({size},), (1,), dtype={self._name(torch.uint8)}, device=t0.device)"]
            lines += ["base = pool.data_ptr()"]
        for step in self._steps:
            if pool.keys() & step.makes:
                lines += [f"a{slot} = base + {pool[slot]}" for slot in step.makes]
                continue
            lines += [step.text, *self._addresses(step.makes)]
            candidates = sorted(step.needs.union(step.makes).difference(kept, pool))
            # Spent: what is allocated from here on can have their memory.
            lines += [f"del t{s}" for s in candidates if last[s] is step and s >= len(self.inputs)]
        parameters = ", ".join(["stream", *(f"t{slot}" for slot in range(len(self.inputs)))])
        source = "\n    ".join([f"def follow({parameters}):", *lines, f"return {returned}"])
        space = dict(self._names)
        exec(compile(source, "<plan>", "exec"), space)
        return Plan(source, space["follow"])

    def _pool(self) -> dict[int, int]:
        """Offsets in one allocation of the workspaces that are parts of it, by number."""
        offsets, end = {}, 0
        for slot, size in self._spaces.items():
            if slot in self._addressed and slot not in self._passed and size <= POOLED_BYTES:
                offsets[slot] = end
                end += -(-size // ALIGNMENT) * ALIGNMENT
        return offsets

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
        fresh: dict[int, int] = {}  # numbers of new tensors by their index among the results
        for index, t in enumerate(_leaves(result)):
            if not isinstance(t, Tensor):
                if given:  # else it follows from settings (dtypes, say), not from values
                    raise _UnplannableError(f"{func} has a result that is no tensor")
                continue
            if any(t is g for g in given):
                continue
            base = next((g for g in given if g.untyped_storage()._cdata == t.untyped_storage()._cdata), None)
            if base is None:
                if t.storage_offset():
                    raise _UnplannableError(f"a result of {func} does not begin its storage")
                fresh[index] = self._add(t)
            else:
                place = self._found(base)
                self._known[id(t)] = ref(t), _Place(place.slot, place.address, whole=False)
        if func in _ALLOCATIONS:
            dtype, device = self._name(result.dtype), self._name(result.device)
            size = f"{tuple(result.shape)}, {result.stride()}"
            text = f"t{fresh[0]} = empty({size}, dtype={dtype}, device={device})"
            self._steps.append(_Step(text, makes=[fresh[0]]))
            self._spaces[fresh[0]] = result.untyped_storage().nbytes()
        elif fresh or func._schema.is_mutable:  # others are views
            needs: set[int] = set()
            values = [self._text(value, needs) for value in args]
            values += [f"{name}={self._text(value, needs)}" for name, value in named.items()]
            text = f"{self._name(func)}({', '.join(values)})"
            if isinstance(result, Tensor):
                text = "".join(f"t{slot} = " for slot in fresh.values()) + text
            elif fresh:
                text = f"made = leaves({text}); " + "; ".join(f"t{s} = made[{n}]" for n, s in fresh.items())
                text += "; del made"
            self._steps.append(_Step(text, needs, list(fresh.values())))

    def _launched(self, run: Callable[..., Any], arguments: Sequence[Any], addresses: bool) -> None:
        needs: set[int] = set()
        write = self._address if addresses else self._text
        values = [(write if isinstance(a, Tensor) else self._text)(a, needs) for a in arguments]
        self._steps.append(_Step(f"{self._name(run)}({', '.join(values)})", needs))

    def _add(self, value: Any) -> int:
        """Number another tensor of the plan (or an input that is none)."""
        slot = len(self._dtypes)
        self._dtypes.append(value.dtype if isinstance(value, Tensor) else None)
        if isinstance(value, Tensor):
            self._known[id(value)] = ref(value), _Place(slot, value.data_ptr(), whole=True)
        return slot

    def _found(self, t: Tensor) -> _Place:
        known = self._known.get(id(t))
        if known is None or known[0]() is not t:
            raise _UnplannableError("a tensor is neither an input nor made here")
        return known[1]

    def _name(self, value: Any) -> str:
        """A name for a constant of the plan."""
        for name, known in self._names.items():
            if known is value or (isinstance(value, torch.device) and known == value):
                return name
        name = f"c{len(self._names)}"
        self._names[name] = value
        return name

    def _addresses(self, slots: Iterable[int]) -> list[str]:
        """Statements that take the addresses of those of these tensors whose addresses are needed."""
        return [f"a{slot} = t{slot}.data_ptr()" for slot in slots if slot in self._addressed]

    def _address(self, t: Tensor, needs: set[int]) -> str:
        """The address of a tensor, as Python."""
        place = self._found(t)
        needs.add(place.slot)
        self._addressed.add(place.slot)
        offset = t.data_ptr() - place.address if t.numel() else 0
        return f"a{place.slot} + {offset}" if offset else f"a{place.slot}"

    def _text(self, value: Any, needs: set[int]) -> str:
        """A value as Python; the tensors that are in it are added to `needs`."""
        if isinstance(value, Tensor):
            return self._tensor(value, needs)
        if value is STREAM:
            return "stream"
        if value is None or type(value) in (int, bool, str):
            return repr(value)
        if type(value) in (list, tuple, torch.Size):
            parts = "".join(f"{self._text(part, needs)}, " for part in value)
            return f"[{parts}]" if type(value) is list else f"({parts})"
        if isinstance(value, list | tuple | dict):
            raise _UnplannableError(f"tensors may lie in a {type(value).__name__}")
        return self._name(value)

    def _tensor(self, t: Tensor, needs: set[int]) -> str:
        place = self._found(t)
        needs.add(place.slot)
        self._passed.add(place.slot)
        name, dtype = f"t{place.slot}", self._dtypes[place.slot]
        if place.whole:
            return name
        offset = t.data_ptr() - place.address if t.numel() else 0
        shape, stride = tuple(t.shape), t.stride()
        if dtype != t.dtype:
            return f"view({name}, {self._name(t.dtype)}, {shape}, {stride}, {offset})"
        first = f"{offset // t.element_size()}"
        if place.slot < len(self.inputs):  # others begin their storage
            first += f" + {name}.storage_offset()"
        return f"{name}.as_strided({shape}, {stride}, {first})"


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


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCPU
)
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
    """`run`, a pass of an operator, following plans: its arguments are tensors and hashable settings, by position, the
    first of them a tensor on whose device all others lie.

    What it does may depend on the settings, on shapes, strides, dtypes, device and alignment of the tensors, on
    autocast and on launch configurations; never on values, nor on anything else that can change. Unusual calls
    (launch hooks, dispatch modes, functorch, the interpreter, other kinds of tensors) are made as written.
    """

    @wraps(run)
    def follow(*inputs: Any) -> Any:
        device = inputs[0].get_device()
        casting = torch.is_autocast_enabled(inputs[0].device.type)
        if watch.recorder or hooked() or watched() or (device < 0 and interpreting()):
            return run(*inputs)  # type: ignore[call-arg]
        kind: list[Any] = [run, device, casting and torch.get_autocast_dtype(inputs[0].device.type)]
        note = kind.append
        for a in inputs:
            if a.__class__ in PLAIN:
                note(a.shape)
                note(a.stride())
                note(a.dtype)
                note(a.data_ptr() & 15)
            else:
                note(a)
        key = tuple(kind)
        plan = _plans.get(key)
        if plan.__class__ is Plan:
            # What was noted lies below autocast: its casts are statements of the plan, and what it was kept from, too.
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST) if casting else nullcontext():
                return plan.follow(current_stream(device), *inputs)
        if any(isinstance(a, Tensor) and a.__class__ not in PLAIN for a in inputs):
            return run(*inputs)  # type: ignore[call-arg]
        if plan == _MET:
            result, made = record(run, inputs)
            _remember(key, made)
            return result
        if plan is None:
            _remember(key, _MET)
        return run(*inputs)  # type: ignore[call-arg]

    return cast("Callable[P, R]", follow)

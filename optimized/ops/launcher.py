"""Launches at little host cost, and when an operator may leave the dispatcher out.

Triton binds, specialises and looks up a kernel anew at every launch, some 20 µs for 20 arguments, and a
`torch.library` operator costs as much again on each pass. At 400 tokens that is longer than the GPU's work. What a
pass does between its launches costs as much: `plans.py`.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes

from optimized.ops.plans import (
    PLAIN,
    STREAM,
    current_stream,
    hooked,
    watch,
    watched,
)
from optimized.ops.support import interpreting
from optimized.ops.tuning import Config

MOST = 4096
"""Kinds of launches that are remembered."""

# Compiled kernels by what Triton specialises on, and more. The value holds the objects whose ids are in the key.
_compiled: dict[tuple, tuple[Any, tuple, Any, Config]] = {}


def direct(tensors: Iterable[Tensor]) -> bool:
    """Whether a call can go straight to the kernels: ordinary tensors, nothing that watches the dispatcher.

    False while compiling, for tensor subclasses (fake tensors among them), under dispatch modes (FLOP counters,
    selective checkpointing) and in functorch transforms: there the registered operator is called.
    """
    if torch.compiler.is_compiling() or watched():
        return False
    return all(type(t) in PLAIN for t in tensors)


def undispatched(
    forward: Callable[..., Any], keep: Callable[..., None], differentiate: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """A registered operator's passes as an autograd function that leaves the dispatcher out, once differentiable.

    `keep(ctx, inputs, output)` and `differentiate(ctx, *grads)` are those of the registration; the latter finds its
    backward pass with `same_way`. Only the first of several results is differentiable.
    """

    def run(ctx: Any, *inputs: Any) -> Any:
        output = forward(*inputs)
        keep(ctx, inputs, output)
        ctx.direct = True
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(*output[1:])
        return output

    passes = {"forward": staticmethod(run), "backward": staticmethod(once_differentiable(differentiate))}
    return type("Direct", (torch.autograd.Function,), passes)


def same_way(ctx: Any, plain: Callable[..., Any], registered: Callable[..., Any]) -> Callable[..., Any]:
    """The backward pass for a context: plain after a direct forward pass, registered after a registered one."""
    return plain if getattr(ctx, "direct", False) else registered


def launch(
    kernel: Any, grid: tuple[int, int, int], config: Config, arguments: tuple, **sizes: int | bool | str
) -> None:
    """Run `kernel` on a grid; `arguments` are its run-time parameters in order, `sizes` its other constants.

    The first call for a kind of arguments goes through Triton and keeps what it compiled; later ones hand their
    arguments to the compiled kernel. Launch hooks (profilers) and the interpreter get Triton's own launch.
    """
    recorder = watch.recorder
    if interpreting():
        from optimized.ops.interpreter import mend_interpreter

        mend_interpreter()
        run = partial(kernel[grid], **config.launch(), **sizes)
        if recorder:
            recorder.launched(run, arguments, addresses=False)
        with (
            _disable_current_modes() if recorder else nullcontext()
        ):  # its own operations are no part of a pass
            run(*arguments)
        return
    device = arguments[0].device.index
    # A finer key than Triton's: integers by value, which is quicker than asking what Triton would make of each.
    key = (
        id(kernel), id(config), device, *sizes.values(),
        *[a if a.__class__ is int else (a.dtype, a.data_ptr() & 15) if a.__class__ in PLAIN else a.__class__ for a in arguments],
    )  # fmt: skip
    known = _compiled.get(key)
    if known is None or hooked():
        compiled = kernel[grid](*arguments, **config.launch(), **sizes)
        if hasattr(compiled, "packed_metadata"):
            named = {**config.launch(), **sizes}
            constants = tuple(named[n] for n in kernel.arg_names[len(arguments) :])
            if len(_compiled) >= MOST:  # lengths are in the keys
                _compiled.clear()
            _compiled[key] = known = (compiled, constants, kernel, config)
    else:
        compiled, constants, _, _ = known
        compiled.run(*_before(compiled, grid, current_stream(device)), *arguments, *constants)
    if recorder and known:
        before = _before(known[0], grid, STREAM)
        recorder.launched(known[0].run, (*before, *arguments, *known[1]), addresses=True)
    elif recorder:
        recorder.unplannable = "Triton gave no compiled kernel"


def _before(compiled: Any, grid: tuple[int, int, int], stream: object) -> tuple:
    """What the launcher of a compiled kernel takes before the kernel's own arguments."""
    return (*grid, stream, compiled.function, compiled.packed_metadata, None, None, None)

"""CUDA graphs for work that a step repeats on the same shapes: the host launches it twice, the device runs it often.

A step of AF3 denoises in 20 rollout steps and 12 chunks of training samples, with some hundred thousand launches.
Here the first repetition runs as usual, which also compiles and loads whatever is lazy; the second is recorded; it and
all later ones are replayed on new inputs. Recordings live for one step, so that features, shapes and gradients may be
other tensors in the next one. The kernels and their order are those of a step without graphs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from megafold_bench.outcomes import UnsupportedError


class Recorder:
    """Records launches on one device; a recording takes the memory that the ones before it no longer need."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise UnsupportedError(
                f"graphs=true needs a CUDA or ROCm device, not {device.type}: leave it out"
            )
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._latest: torch.cuda.CUDAGraph | None = (
            None  # memory is kept as long as one graph has a share in it
        )

    def record(self, work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any] | None:
        """The launches of `work`, which do not happen yet, and what it returns; None if memory does not suffice.

        `work` may neither wait for the device nor leave another trace than its launches.
        """
        # torch.cuda.graph would first give the allocator's cache back, which takes longer than recording.
        graph = torch.cuda.CUDAGraph()
        fits = True
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = work()
            except torch.OutOfMemoryError:  # while it records, the allocator cannot give its cache back
                fits = False
            except BaseException:
                with suppress(RuntimeError):  # what went wrong first says more
                    graph.capture_end()
                with suppress(RuntimeError):
                    _end_of_capture()
                raise
            graph.capture_end()
        if not fits:
            torch.cuda.empty_cache()
            return None
        self._latest = graph
        return graph, result


def _end_of_capture() -> None:
    """Tell the random number generators, which a capture that broke off leaves waiting and unusable, that it is over."""
    empty = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the graph is empty
        empty.capture_begin(capture_error_mode="thread_local")
        empty.capture_end()


class Repeated:
    """A function of tensors that is called again and again; with a recorder, replayed from its second call on.

    Calls return a leaf, which the next call may overwrite. With gradients on, `backward` follows each call and adds
    to the ``grad`` of whatever the function reads but its arguments. Arguments of another shape than the recorded ones,
    and everything after a recording that found no memory, run as usual.
    """

    def __init__(self, function: Callable[..., Tensor], recorder: Recorder | None) -> None:
        self._function, self._recorder = function, recorder
        self._plain: Tensor | None = None
        self._called = False
        self._recording: _Recording | None = None
        self._replayed = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's value, without its history."""
        if self._called and self._recorder is not None and self._recording is None:
            self._recording = _Recording.of(self._function, self._recorder, inputs)
            if self._recording is None:
                self._recorder = None
        self._called = True
        self._replayed = self._recording is not None and self._recording.takes(inputs)
        if self._recording is not None and self._replayed:
            output = self._recording.forward(inputs)
        else:
            output = self._plain = self._function(*inputs)
        return output.detach().requires_grad_(torch.is_grad_enabled())

    def backward(self, gradient: Tensor) -> None:
        """Continue backward through the latest call from the gradient of its value."""
        if self._recording is not None and self._replayed:
            if self._recording.backward(gradient):
                return
            self._plain = self._function(*self._recording.inputs)
            self._recording = self._recorder = None
        assert self._plain is not None
        torch.autograd.backward(self._plain, gradient)
        self._plain = None


class _Recording:
    """A function's launches, and those of its backward pass once there was one."""

    def __init__(
        self, recorder: Recorder, inputs: Sequence[Tensor], graph: torch.cuda.CUDAGraph, output: Tensor
    ) -> None:
        self._recorder = recorder
        self.inputs = inputs
        self._forward = graph
        self._output = output
        self._gradient: Tensor | None = None
        self._backward: torch.cuda.CUDAGraph | None = None

    @classmethod
    def of(
        cls, function: Callable[..., Tensor], recorder: Recorder, inputs: Sequence[Tensor]
    ) -> _Recording | None:
        """The recording of `function` for inputs like these, which are not computed yet; None without memory."""
        kept = [x.clone() for x in inputs]
        recorded = recorder.record(lambda: function(*kept))
        return None if recorded is None else cls(recorder, kept, *recorded)

    def takes(self, inputs: Sequence[Tensor]) -> bool:
        """Whether it was made for inputs of these shapes."""
        return [x.shape for x in inputs] == [x.shape for x in self.inputs]

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The function's value, always the same tensor."""
        for kept, given in zip(self.inputs, inputs, strict=True):
            # Past autograd, which would refuse to record a backward pass that reads what was overwritten.
            kept.data.copy_(given)
        self._forward.replay()
        return self._output

    def backward(self, gradient: Tensor) -> bool:
        """Replay the backward pass. False if it had to be recorded and there was no memory: nothing was done then."""
        if self._gradient is None:
            self._gradient = gradient.clone()
            output = self._output
            self._output = output.detach()
            recorded = self._recorder.record(lambda: torch.autograd.backward(output, self._gradient))
            if recorded is None:
                return False
            self._backward = recorded[0]
        else:
            self._gradient.copy_(gradient)
        assert self._backward is not None
        self._backward.replay()
        return True

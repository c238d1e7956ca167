"""Other people's packages on the CPU: stand-ins everywhere, the real ones where they can be brought to run."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch._higher_order_ops.flex_attention import flex_attention_backward
from torch.nn.attention import flex_attention

from tests.fakes import peer_packages

MonkeyPatch = pytest.MonkeyPatch


def flex_on_the_cpu(monkeypatch: MonkeyPatch) -> None:
    """PyTorch's own unfused FlexAttention, whose backward pass works on the CPU although it is refused there."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda q, k, v: None)
    operator, key = flex_attention_backward, torch._C.DispatchKey.CompositeExplicitAutograd
    unfused = operator.py_kernels[key]

    def with_bias_gradient(*args: Any) -> Any:
        """It asks the bias it is given whether it wants a gradient; one that compiled code has kept says no."""
        *rest, captured, masks = args
        wanting = tuple(
            x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in captured
        )
        return unfused(*rest, wanting, masks)

    monkeypatch.setitem(operator.py_kernels, key, with_bias_gradient)
    operator._dispatch_cache.clear()


def fake_trifast(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trifast", peer_packages.trifast())


def fake_cuequivariance(monkeypatch: MonkeyPatch) -> None:
    _no_thresholds(monkeypatch)
    for name in ("cuequivariance_torch", "cuequivariance_ops_torch"):
        monkeypatch.setitem(sys.modules, name, peer_packages.cuequivariance_ops())


def real_trifast(monkeypatch: MonkeyPatch) -> None:
    """trifast's kernels in Triton's interpreter, with one tile size each: there is nothing to tune on."""
    with _a_gpu_by_name():
        package = pytest.importorskip("trifast", reason="needs the packages of tests/peers/requirements.txt")
        kernels = sys.modules["trifast.triton"]
    assert package
    for name in ("_fwd", "_bwd_q", "_bwd_kv", "_bwd_b"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernel, "configs", kernel.configs[:1])
    _bounds_that_numpy_converts(monkeypatch)


def real_cuequivariance(monkeypatch: MonkeyPatch) -> None:
    """cuEquivariance's front end, as installed, on stand-ins of its kernels, which need an NVIDIA GPU."""
    _no_thresholds(monkeypatch)
    ops: ModuleType = peer_packages.cuequivariance_ops()
    monkeypatch.setitem(sys.modules, "cuequivariance_ops_torch", ops)
    pytest.importorskip("cuequivariance_torch", reason="needs the packages of tests/peers/requirements.txt")


def _bounds_that_numpy_converts(monkeypatch: MonkeyPatch) -> None:
    """The interpreter of Triton 3.6 keeps a loop's run-time bound as an array of one, which NumPy 2.4 refuses as index."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def _no_thresholds(monkeypatch: MonkeyPatch) -> None:
    """The variant sets them for its process; here, for one test."""
    for name in ("CUEQ_TRIATTN_FALLBACK_THRESHOLD", "CUEQ_TRIMUL_FALLBACK_THRESHOLD"):
        monkeypatch.setenv(name, "0")


@contextmanager
def _a_gpu_by_name() -> Iterator[None]:
    """trifast asks for the GPU's name when it is imported, and makes a folder for tuning files: not the user's here."""
    if torch.cuda.is_available():
        yield
        return
    with (
        TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, XDG_CONFIG_HOME=folder),
        mock.patch.object(torch.cuda, "get_device_capability", lambda: (0, 0)),
        mock.patch.object(torch.cuda, "get_device_name", lambda: "none"),
    ):
        yield


INSTALL: dict[str, Callable[[MonkeyPatch], None]] = {
    "flex": flex_on_the_cpu,
    "trifast": fake_trifast,
    "cuequivariance": fake_cuequivariance,
}
REAL: dict[str, Callable[[MonkeyPatch], None]] = {
    "trifast": real_trifast,
    "cuequivariance": real_cuequivariance,
}
PEERS = [
    *(pytest.param(name, install, id=name) for name, install in INSTALL.items()),
    *(
        pytest.param(name, install, id=f"{name}-package", marks=pytest.mark.peers)
        for name, install in REAL.items()
    ),
]
"""Name and installer; the real packages are tests of their own."""

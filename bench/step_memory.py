"""What a training step of `megafold` holds at its peaks, by line of code: predicted on a CPU, nothing is computed.

python bench/step_memory.py --seq-len 768 [--ops all] [--offload]      (half a minute)

The `af3` model runs on fake tensors, part after part as `baselines.training` runs them: trunk, conditioning, confidence
head, one diffusion chunk, and their backward passes. Counted is what PyTorch would allocate, what operators need inside
included, without the optimiser's two moments and the allocator's rounding; losses and rollout are left out. (Two blocks
of Boltz-2's Pairformer at 768 tokens: predicted 5897 MiB at `f95949d`, measured 5919.)
"""

import argparse
import importlib
import os
import pkgutil
import sys
import traceback
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from baselines import offloading, training
from baselines.af3.config import preset
from baselines.af3.diffusion import DiffusionConditioning
from baselines.af3.model import AlphaFold3
from baselines.inputs import make_crop, open_complex
from baselines.offloading import HostStore
from baselines.training import TrainingSession
from baselines.workload import training_config
from optimized.patch import apply
from optimized.recipes import OPS
from optimized.variant import MEGAFOLD

GIB = 2**30
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("baselines", "optimized")
TOLD = 8 << 20
"""Storages from this size on are told apart by where they were made."""


class Live(TorchDispatchMode):
    """The bytes of all living storages, their peak since `restart`, and what it was made of."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[int, tuple[int, str]] = {}
        self._in_host_memory: set[int] = set()
        self.now = self.peak = self._shown = 0
        self.parts: Counter[str] = Counter()

    def restart(self) -> None:
        """Look for a new peak."""
        self.peak = self._shown = self.now

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._held or key in self._in_host_memory or not size:
            return
        frames = traceback.extract_stack() if size >= TOLD else ()
        if any(f.name == "take" and f.filename == offloading.__file__ for f in frames):
            self._in_host_memory.add(key)
            weakref.finalize(storage, self._in_host_memory.discard, key)
            return
        own = [f for f in frames if any(f.filename.startswith(str(ROOT / name)) for name in PACKAGES)]
        place = " < ".join(f"{Path(f.filename).relative_to(ROOT)}:{f.lineno}" for f in reversed(own[-3:]))
        self._held[key] = size, place or "small"
        self.now += size
        weakref.finalize(storage, self._forget, key)
        if self.now > self.peak:
            self.peak = self.now
            if self.now > 1.01 * self._shown:
                self._shown = self.now
                self.parts = Counter()
                for held, where in self._held.values():
                    self.parts[where] += held

    def _forget(self, key: int) -> None:
        self.now -= self._held.pop(key, (0, ""))[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and note what it made."""
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._note(value)
        return out


def inside_operators() -> None:
    """Operators make the tensors that they make on an H200: passes run as written, kernels and long sums do nothing."""
    import triton.runtime.interpreter as interpreter

    import optimized.ops
    from optimized.ops.attention import launch

    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    kernel: Any = interpreter.InterpretedFunction
    kernel.__getitem__ = lambda self, grid: nothing
    stand_ins: dict[str, Any] = {
        "direct": lambda tensors: True,
        "launch": nothing,
        "processors": lambda device: 132,
        "weight_product": lambda dy, x: torch.empty(dy.shape[1], x.shape[1]),
    }
    for found in pkgutil.walk_packages(optimized.ops.__path__, "optimized.ops."):
        module = importlib.import_module(found.name)
        for name, stand_in in stand_ins.items():
            if callable(getattr(module, name, None)):
                setattr(module, name, stand_in)
    launch.aligned = lambda x: x
    launch.plan_for = lambda q, precision: launch.default_plan(q.dtype, q.shape[-1], "sm_90", precision)


def materialise(model: nn.Module) -> None:
    """Fake parameters and buffers in place of meta ones."""
    for part in model.modules():
        for values in (part._parameters, part._buffers):
            for name, value in list(values.items()):
                if value is not None:
                    made = torch.empty(value.shape, dtype=value.dtype)
                    values[name] = nn.Parameter(made) if isinstance(value, nn.Parameter) else made


def backward(outputs: list[Tensor]) -> None:
    """As if every output had a gradient."""
    torch.autograd.backward(outputs, [torch.empty_like(t) for t in outputs])


def main() -> None:
    """Play one step and print what every phase holds at its peak."""
    os.environ["TRITON_INTERPRET"] = "1"  # the operators choose their kernels, which nothing here runs
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq-len", type=int, default=768)
    parser.add_argument("--ops", default=None, help="as the option of the variant; its default if not given")
    parser.add_argument("--offload", action="store_true", help="as the option of the same name")
    parser.add_argument("--rows", type=int, default=16)
    args = parser.parse_args()
    inside_operators()
    factors = MEGAFOLD.resolve(
        {"preset": "af3", "precision": "bf16", "ops": args.ops, "cycles": 1, "offload": args.offload},
        args.seq_len,
    )
    crop = make_crop(open_complex(factors, args.seq_len, 0), factors, args.seq_len, 0)
    with torch.device("meta"):
        model = AlphaFold3(replace(preset("af3"), attention="sdpa"))
    device, live = torch.device("cpu"), Live()

    def told(phase: str) -> None:
        print(f"{phase}: {live.peak / GIB:.2f} GiB at the peak, {live.now / GIB:.2f} after it")
        for place, size in live.parts.most_common(args.rows):
            print(f"  {size / GIB:7.2f}  {place}")
        live.restart()

    with FakeTensorMode(allow_non_fake_inputs=True) as fake, live:
        materialise(model)
        apply(model, OPS if factors["ops"] == "all" else str(factors["ops"]).split(","))
        model.to = lambda device: model  # type: ignore[method-assign]  # it is where it should be
        training.host_store = lambda device: HostStore(device, least_bytes=TOLD, room=1 << 50)
        session = TrainingSession(model, training_config(factors), device, 0)
        policy = session.config.precision
        features = {name: torch.empty_like(fake.from_tensor(value)) for name, value in crop.items()}
        trunk = session._trunk(features, 0, True)
        told("trunk, forward")
        leaves = trunk.leaves()
        conditioning = session._conditioning(features, leaves, True)
        told("conditioning, forward")
        x, still = torch.empty(len(features["atom_mask"]), 3), leaves.detached()
        with policy.confidence(device):
            logits = model.confidence_head(features, still.s_inputs, still.s, still.z, x)
        told("confidence head, forward")
        backward(list(logits))
        del logits
        told("confidence head, backward")
        shared = DiffusionConditioning(*(t.detach().requires_grad_() for t in conditioning))
        chunk = session.config.diffusion_chunk
        with policy.diffusion(device):
            denoised = model.diffusion(
                torch.empty(chunk, *x.shape), torch.ones(chunk), features,
                leaves.s_inputs, leaves.s, leaves.z, shared,
            )  # fmt: skip
        told("a diffusion chunk, forward")
        backward([denoised])
        del denoised
        told("a diffusion chunk, backward")
        torch.autograd.backward(list(conditioning), [t.grad for t in shared])
        del conditioning, shared
        told("conditioning, backward")
        backward([trunk.s, trunk.z])
        told("trunk, backward")


if __name__ == "__main__":
    main()

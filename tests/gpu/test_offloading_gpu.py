"""What checkpointed units keep, in pinned host memory: the gradients of a step without, and less memory, however the host runs ahead."""

import pytest
import torch
from torch import Tensor, nn

from baselines import training
from baselines.checkpointing import checkpoint_units
from baselines.offloading import HostStore
from baselines.systems import PYTORCH
from optimized.variant import MEGAFOLD
from tests.gpu.test_replay_gpu import FLOORS, WHOLE_FLOORS, assert_as_repeatable, second

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device is visible to torch"),
]
CUDA = torch.device("cuda")
BLOCKS, SIDE = 12, 2048
BYTES = SIDE * SIDE * 4


class Block(nn.Module):
    """Products that take longer than the copies, or not."""

    def __init__(self, products: int) -> None:
        super().__init__()
        self.products = products
        self.weight = nn.Parameter(torch.randn(SIDE, SIDE) / SIDE**0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        for _ in range(self.products):
            y = torch.tanh(y @ self.weight)
        return x + y


def run(products: int, store: HostStore | None, mode: str) -> tuple[list[Tensor], int]:
    """Gradients of two steps, of the second with other values, and the rise of memory over the second."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Block(products) for _ in range(BLOCKS))).to(CUDA)
    checkpoint_units(((str(i), b) for i, b in enumerate(blocks)), mode, store)
    for seed in range(2):
        torch.manual_seed(seed)
        blocks.zero_grad()
        x = torch.randn(SIDE, SIDE, device=CUDA, requires_grad=True)
        for p in blocks.parameters():
            p.grad = torch.zeros_like(p)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda._sleep(200_000_000)  # the host is far ahead of the device
        blocks(x).square().sum().backward()
        torch.cuda.synchronize()
        rise = torch.cuda.max_memory_allocated() - before
    return [x.grad, *(p.grad for p in blocks.parameters())], rise


@pytest.mark.parametrize("mode", ["block", "reentrant"])
@pytest.mark.parametrize("products", [0, 1, 40])
def test_same_gradients_in_less_memory(products, mode):
    plain, much = run(products, None, mode)
    store = HostStore(CUDA)
    found, less = run(products, store, mode)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert store.facts == {"host_bytes": BLOCKS * BYTES, "left_on_device_bytes": 0}
    # The first input is ours; the last unit's is still there when backward begins, and the one before it on its way.
    assert less <= much - (BLOCKS - 4) * BYTES
    store.close()


@pytest.mark.parametrize("checkpointing", ["block", "reentrant"])
@pytest.mark.parametrize("variant", [PYTORCH, MEGAFOLD], ids=lambda v: v.name)
def test_step(variant, checkpointing, monkeypatch):
    """As near to a step without as its own repetition."""
    made = []

    def store(device: torch.device) -> HostStore:
        made.append(HostStore(device, least_bytes=1024))
        return made[-1]

    monkeypatch.setattr(training, "host_store", store)
    settings = {"precision": "bf16", "checkpointing": checkpointing}
    plain, again = (second(variant, **settings) for _ in range(2))
    moved = second(variant, **settings, offload=True)
    assert_as_repeatable(plain, again, moved, FLOORS["bf16"], WHOLE_FLOORS["bf16"])
    (one,) = made
    assert one.facts["host_bytes"] > 0 and one.facts["left_on_device_bytes"] == 0


def test_with_graphs(monkeypatch):
    """The denoiser's recordings take nothing from the store."""
    monkeypatch.setattr(training, "host_store", lambda device: HostStore(device, least_bytes=1024))
    plain, again = (second(MEGAFOLD, precision="bf16", graphs=True) for _ in range(2))
    moved = second(MEGAFOLD, precision="bf16", graphs=True, offload=True)
    assert_as_repeatable(plain, again, moved, FLOORS["bf16"], WHOLE_FLOORS["bf16"])

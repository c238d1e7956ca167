"""What checkpointed units keep, in host memory: the same gradients, less held, buffers used again, and what stays."""

import copy
import gc
import mmap
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from baselines import offloading, training
from baselines.checkpointing import checkpoint_units
from baselines.offloading import Buffers, HostStore, host_room, host_store
from baselines.systems import PYTORCH
from megafold_bench.devices.base import Memory, Unavailable
from megafold_bench.errors import UserError
from megafold_bench.outcomes import UnsupportedError

CPU = torch.device("cpu")
ROWS = 64
BYTES = ROWS * 8 * 4


class Block(nn.Module):
    """Two results from two inputs, as a block of the MSA stack, and a mask that is small."""

    def __init__(self) -> None:
        super().__init__()
        self.m, self.z, self.dropout = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.2)

    def forward(self, m: Tensor, z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        m = m + self.dropout(torch.tanh(self.m(m) + z)) * mask
        return m, z + torch.sin(self.z(m))


class Stack(nn.Module):
    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.seen: list[weakref.ref] = []

    def forward(self, m: Tensor, z: Tensor) -> Tensor:
        mask = torch.ones(8)
        for block in self.blocks:
            self.seen.append(weakref.ref(z.untyped_storage()))
            m, z = block(m, z, mask)
        return (m * z).sum()


def stack_with(store: HostStore | None, mode: str = "block") -> Stack:
    torch.manual_seed(0)
    stack = Stack()
    checkpoint_units(((str(i), b) for i, b in enumerate(stack.blocks)), mode, store)
    return stack


def gradients(stack: Stack, seed: int = 1) -> list[Tensor]:
    torch.manual_seed(seed)
    m, z = (torch.randn(ROWS, 8, requires_grad=True) for _ in range(2))
    stack.zero_grad()
    stack(m, z).backward()
    return [m.grad, z.grad, *(p.grad.clone() for p in stack.parameters())]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("mode", ["block", "reentrant"])
def test_same_gradients_and_buffers_used_again(mode):
    store = HostStore(CPU, least_bytes=BYTES)
    stack, plain = stack_with(store, mode), stack_with(None, mode)
    for seed in range(3):
        assert_same(gradients(stack, seed), gradients(plain, seed))
        gc.collect()
        # m and z of four blocks.
        assert store.facts == {"host_bytes": 8 * BYTES, "left_on_device_bytes": 0}
    assert sum(map(len, store.buffers._free.values())) == 8


def test_what_a_block_kept_is_gone_when_the_next_but_one_begins():
    """One unit's inputs at a time are on their way."""
    alive = []
    stack = stack_with(HostStore(CPU, least_bytes=BYTES))
    for block in stack.blocks:
        block.register_forward_pre_hook(
            lambda *_: (
                alive.append([r() is not None for r in stack.seen]) if torch.is_grad_enabled() else None
            )
        )
    torch.manual_seed(1)
    loss = stack(torch.randn(ROWS, 8), torch.randn(ROWS, 8).requires_grad_())
    assert [held[1:-2] for held in alive] == [[], [], [], [False]]
    assert [r() is not None for r in stack.seen[1:]] == [False, False, True]
    loss.backward()
    kept = [r() is not None for r in stack.seen[1:]]
    assert not any(kept)


@pytest.mark.parametrize("mode", ["block", "reentrant"])
def test_arguments_by_name(mode):
    store = HostStore(CPU, least_bytes=BYTES)
    torch.manual_seed(0)
    block = Block()
    plain = copy.deepcopy(block)
    checkpoint_units([("block", block)], mode, store)
    m, z = (torch.randn(ROWS, 8, requires_grad=True) for _ in range(2))
    for each in (block, plain):
        torch.manual_seed(2)
        m.grad = z.grad = None
        sum(t.sum() for t in each(mask=torch.ones(8), z=z, m=m)).backward()
        each.found = [m.grad, z.grad, *(p.grad for p in each.parameters())]
    assert_same(block.found, plain.found)
    assert store.facts["host_bytes"] == 2 * BYTES


def test_small_and_strided_tensors_stay():
    store = HostStore(CPU, least_bytes=BYTES + 1)
    assert_same(gradients(stack_with(store)), gradients(stack_with(None)))
    assert store.facts["host_bytes"] == 0
    x = torch.randn(16, 16).t().requires_grad_()
    store = HostStore(CPU, least_bytes=1)
    with store.saving():
        y = x.clone().sin()
    with store.saving():
        z = x.sin()
    assert store.facts["host_bytes"] == 0  # a clone keeps the strides
    (y + z).sum().backward()
    assert torch.equal(x.grad, 2 * x.cos())


@pytest.mark.parametrize("tensors", [0, 3])
def test_without_room_what_is_left_stays_on_the_device(tensors):
    store = HostStore(CPU, least_bytes=BYTES, room=tensors * BYTES + 1)
    stack, plain = stack_with(store), stack_with(None)
    for seed in range(2):
        store.begin_step()
        assert_same(gradients(stack, seed), gradients(plain, seed))
        assert store.facts == {
            "host_bytes": tensors * BYTES, "left_on_device_bytes": (8 - tensors) * BYTES,
        }  # fmt: skip


def test_a_graph_that_is_dropped_gives_its_buffers_back():
    store = HostStore(CPU, least_bytes=BYTES)
    stack = stack_with(store)
    for _ in range(2):
        stack(*(torch.randn(ROWS, 8) for _ in range(2)))
        gc.collect()
    assert_same(gradients(stack), gradients(stack_with(None)))
    gc.collect()
    # The last unit's are held until the next begins.
    assert store.facts["host_bytes"] <= 10 * BYTES


def test_buffers_of_another_size_make_way():
    buffers = Buffers(1000, None)
    small = [buffers.take(300) for _ in range(3)]
    assert buffers.take(300) is None and buffers.take(101) is None
    for buffer in small[:2]:
        buffers.give(buffer)
    assert buffers.take(500) is not None and buffers.total == 800
    buffers.give(small[2])
    assert buffers.take(300) is small[2]
    buffers.close()
    assert buffers.take(1) is None


class Runtime:
    """Pins what it is told to, up to a number of calls."""

    class cudaError:
        success = 0

    def __init__(self, most: int) -> None:
        self.most, self.pinned = most, set()

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if len(self.pinned) == self.most:
            return 2
        self.pinned.add(address)
        return 0

    def cudaHostUnregister(self, address: int) -> None:
        self.pinned.remove(address)

    def cudaGetErrorString(self, status: int) -> str:
        return "out of memory"


def test_pinned_buffers_are_whole_pages_and_are_unpinned(monkeypatch):
    runtime = Runtime(most=2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    side = SimpleNamespace(synchronize=lambda: None)
    buffers = Buffers(1 << 30, side)
    first, second = buffers.take(5000), buffers.take(3)
    first.fill_(7)
    assert first.numel() == 5000 and runtime.pinned == {first.data_ptr(), second.data_ptr()}
    assert all(address % mmap.PAGESIZE == 0 for address in runtime.pinned)
    with pytest.raises(UnsupportedError, match=r"pinned 5003 bytes .* no 9 more \(out of memory\)"):
        buffers.take(9)
    buffers.give(first)
    buffers.close()
    assert runtime.pinned == set()


def test_backward_twice():
    store = HostStore(CPU, least_bytes=1)
    x = torch.randn(5, 5, requires_grad=True)
    with store.saving():
        a = x.exp().sin()
    with store.saving():
        b = a.exp().cos()
    (first,) = torch.autograd.grad(b.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(b.sum(), x)
    expected = torch.autograd.grad(x.exp().sin().exp().cos().sum(), x)[0]
    assert torch.equal(first, expected) and torch.equal(second, expected)
    store.close()
    assert store.buffers.take(4) is None


def test_a_step_of_training(monkeypatch):
    """Trunk and confidence head keep their inputs on the host; losses and gradients are those of a step without."""
    options = {"preset": "tiny", "checkpointing": "block", "stage": "all"}
    plain = PYTORCH.build(PYTORCH.resolve(options, 24), 24, 0, "cpu")
    monkeypatch.setattr(training, "host_store", lambda device: HostStore(device, least_bytes=4096))
    moved = PYTORCH.build(PYTORCH.resolve({**options, "offload": True}, 24), 24, 0, "cpu")
    for index in range(2):
        expected = copy.copy(plain.session.backward(plain.features, index))
        losses = moved.session.backward(moved.features, index)
        assert losses == expected
    pairs = zip(plain.session.model.named_parameters(), moved.session.model.parameters(), strict=True)
    differ = [
        name
        for (name, p), q in pairs
        if (p.grad is None) != (q.grad is None) or (p.grad is not None and not torch.equal(p.grad, q.grad))
    ]
    assert differ == []
    assert moved.facts["offload"]["host_bytes"] > 0
    assert moved.facts["offload"]["left_on_device_bytes"] == 0
    assert "offload" not in plain.facts


def test_offload_is_a_factor_only_where_it_is_on():
    assert "offload" not in PYTORCH.resolve({"preset": "tiny"}, 16)
    factors = PYTORCH.resolve({"preset": "tiny", "checkpointing": "block", "offload": "true"}, 16)
    assert factors["offload"] is True


def test_refusals():
    with pytest.raises(UserError, match="give checkpointing=block or reentrant, not none"):
        PYTORCH.resolve({"preset": "tiny", "checkpointing": "none", "offload": True}, 16)
    with pytest.raises(UnsupportedError, match="offload=true needs a CUDA or ROCm device, not cpu"):
        host_store(CPU)


def test_room_of_the_host(monkeypatch):
    monkeypatch.setattr(offloading, "host_memory", lambda: Memory(1000, 500, 500))
    for limit, room in ((None, 400), (100, 80), (Unavailable("no cgroups"), 400)):
        monkeypatch.setattr(offloading, "cgroup_memory_limit_bytes", lambda limit=limit: limit)
        assert host_room() == room
    monkeypatch.setattr(offloading, "host_memory", lambda: Unavailable("no /proc"))
    with pytest.raises(UnsupportedError, match="no /proc"):
        host_room()

"""What kernels ask L2 for ahead of time lies inside the tensors and is all that the next tile reads."""

import pytest
import torch

from optimized.ops import rows
from optimized.ops.launching import fetching, tile
from optimized.ops.layer_norm_linear import launch as linear
from optimized.ops.transition import launch as transition
from optimized.ops.triangle_multiplication import launch as triangle
from optimized.ops.triangle_multiplication import project
from optimized.ops.tuning import Config

BF, FULL = torch.bfloat16, torch.float32
C, TOKENS, PADDED, EPS, LINE = 64, 18, 32, 1e-5, 128


@pytest.fixture
def asked(monkeypatch):
    """The addresses that kernels ask for, launched as one program for all tiles."""
    addresses = []
    for module in (rows, project):
        monkeypatch.setattr(module, "fetch_lines", lambda p: addresses.extend(p.handle.data.ravel().tolist()))
    for module in (linear, transition, triangle):
        monkeypatch.setattr(module, "grouped", lambda steps: (1, steps))
    monkeypatch.setattr(triangle, "spread", lambda steps, *_: (1, steps))
    return addresses


def ahead(rows, value):
    plain = tile(rows, 64, 4, 1)
    return Config(plain.constants | {"AHEAD": value}, plain.num_warps)


def lines(addresses, tensor):
    """Of the addresses inside a tensor: which of its lines they are in."""
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    return {(a - begin) // LINE for a in addresses if begin <= a < end}


def check(asked, launch, rows, tensors):
    """`tensors`: those that the next tile is read from, and whether a line of each is beyond the first tile."""
    before = launch(ahead(rows, 0))
    assert not asked
    after = launch(ahead(rows, 1))
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
    ranges = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t, _ in tensors]
    assert asked and all(any(low <= a < high for low, high in ranges) for a in asked)
    for tensor, beyond in tensors:
        wanted = {line for line in range(tensor.nbytes // LINE) if beyond(line)}
        assert wanted <= lines(asked, tensor)


def norm():
    return torch.ones(C), torch.zeros(C)


def past_first_rows(tensor, positions):
    """Lines of a tensor `[..., C]` beyond so many positions."""
    per_row = C * tensor.element_size() // LINE
    return tensor, lambda line: line >= positions * per_row


def past_first_columns(tensor, positions, end=PADDED**2):
    """Lines of a channel-major tensor beyond so many positions of each channel and before `end`."""
    size = tensor.element_size()
    per_row = PADDED**2 * size // LINE
    return tensor, lambda line: positions * size // LINE <= line % per_row < end * size // LINE


@pytest.mark.parametrize("dtype", [BF, FULL])
@pytest.mark.parametrize("kernel", ["output", "output_backward", "input_gradient"])
def test_triangle_multiplication(asked, kernel, dtype):
    """Tiles of 64 positions, two rows of the padded square, of which the first holds 36 pairs."""
    torch.manual_seed(1)
    z = torch.randn(TOKENS, TOKENS, C).to(dtype)
    dy, w = torch.randn(TOKENS, TOKENS, C).to(BF), torch.randn(6 * C * C).to(BF) / 8
    grad = torch.randn(2 * C, PADDED, PADDED).to(BF)
    x, dn = torch.randn(C, PADDED, PADDED).to(BF), torch.randn(TOKENS, TOKENS, C).to(dtype)
    norms, shape = (*norm(), *norm()), triangle.Shape.of(z, C)
    first = 2 * TOKENS

    def output(config):
        return [triangle.output_forward(x, z, norms, w, shape, EPS, config)]

    def output_backward(config):
        dx, dn, shares, pairs = triangle.output_backward(x, z, norms, w, dy, shape, EPS, config)
        return [dx, dn, shares, *pairs[0], *pairs[1]]

    gate = dn.clone()

    def input_gradient(config):
        dn.copy_(gate)
        n = torch.empty(PADDED**2 * C, dtype=BF)
        return [
            triangle.input_gradient(z, norm(), w, None, grad, dn, n, shape, EPS, config)[0].clone(),
            n,
        ]

    of_z = past_first_rows(z, first)
    launch, tensors = {
        "output": (output, [of_z, past_first_columns(x, 64, TOKENS * PADDED)]),
        "output_backward": (
            output_backward,
            [of_z, past_first_columns(x, 64), past_first_rows(dy, first)],
        ),
        "input_gradient": (
            input_gradient,
            [of_z, past_first_columns(grad, 64), past_first_rows(dn, first)],
        ),
    }[kernel]
    check(asked, launch, 64, tensors)


def test_transition(asked):
    x, dy, w = torch.randn(50, C).to(BF), torch.randn(50, C).to(BF), torch.randn(3 * C * 2 * C).to(BF) / 8

    def launch(config):
        return transition.input_gradient(x, norm(), w, dy, EPS, config)

    check(asked, launch, 16, [past_first_rows(x, 16), past_first_rows(dy, 16)])


def test_layer_norm_linear(asked):
    """The first of the maps' gradients: the loop's own copies are ahead with the others."""
    x, grads = torch.randn(50, C).to(BF), [torch.randn(50, C).to(BF) for _ in range(2)]
    w, widths = torch.randn(2 * C * C).to(BF) / 8, linear.Widths(C, 0, 2)

    def launch(config):
        return linear.input_gradient(x, norm(), w, widths, grads, EPS, config)

    check(asked, launch, 16, [past_first_rows(x, 16), past_first_rows(grads[0], 16)])


def test_only_where_there_is_the_instruction():
    plain = tile(64, 64, 4, 1)
    assert fetching(plain, BF, torch.device("cpu")) == {"AHEAD": False}
    assert fetching(plain, FULL, torch.device("cuda")) == {"AHEAD": False}
    assert fetching(ahead(64, 0), BF, torch.device("cuda")) == {}

"""The call conventions of other packages against our own definitions, with every gradient, in float32."""

import os

import pytest
import torch
from torch import Tensor

from baselines import peers
from baselines.af3.attention import biased_attention, key_mask_bias
from baselines.af3.triangle import TriangleMultiplication
from baselines.peer_operators import PeerTriangleUpdate, use_cuequivariance
from megafold_bench.outcomes import UnsupportedError
from tests.baselines.peer_fixtures import PEERS
from tests.optimized.drop_in import randn, randomise

ATTENTION = {
    "flex": peers.flex_attention,
    "trifast": peers.trifast_attention,
    "cuequivariance": peers.cuequivariance_attention,
}


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def with_gradients(function, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out, *torch.autograd.grad((out * randn(*out.shape, seed=9)).sum(), leaves)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "install"), PEERS)
def test_attention_is_ours(name, install, masked, monkeypatch):
    """Rows that differ in what they mask, as the kernel benchmarks have them."""
    install(monkeypatch)
    attend = ATTENTION[name]()
    n, heads, width = 7, 2, 16
    q, k, v = (randn(n, heads, n, width, seed=i) for i in range(3))
    bias = randn(n, n, heads, seed=3).permute(2, 0, 1)
    mask = None
    if masked:
        mask = randn(n, n, seed=4) > -0.7
        mask[:, 0] = True

    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        if mask is None:
            return biased_attention(q, k, v, bias, "sdpa")
        rows = [
            biased_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], bias + key_mask_bias(keep, bias.dtype), "sdpa")
            for i, keep in enumerate(mask)
        ]  # fmt: skip
        return torch.cat(rows)

    found = with_gradients(lambda *t: attend(*t, mask), q, k, v, bias)
    assert_close(found, with_gradients(ours, q, k, v, bias))


@pytest.mark.parametrize(
    ("limits", "fits", "refused"),
    [
        (peers.flex_limits, [(5, 2, 9, 16), (5, 2, 9, 24)], [(5, 2, 9, 8)]),
        (peers.trifast_limits, [(9, 2, 9, 16), (9, 2, 9, 64)], [(5, 2, 9, 16), (9, 2, 9, 8), (9, 2, 9, 24)]),
        (peers.cuequivariance_attention_limits, [(5, 2, 9, 8), (5, 2, 9, 32)], [(5, 2, 9, 48), (5, 2, 9, 6)]),
    ],
)
def test_limits(limits, fits, refused):
    for shape in fits:
        assert limits(torch.zeros(shape), torch.zeros(shape)) == ""
    for shape in refused:
        reason = limits(torch.zeros(shape), torch.zeros(shape))
        assert any(str(size) in reason for size in shape), reason


def test_limits_by_dtype():
    wide = torch.zeros(5, 2, 9, 48)
    assert peers.cuequivariance_attention_limits(wide.bfloat16(), wide.bfloat16()) == ""
    assert "float64" in peers.cuequivariance_attention_limits(wide.double(), wide.double())
    square = torch.zeros(9, 2, 9, 16, dtype=torch.float64)
    assert "float64" in peers.trifast_limits(square, square)
    assert peers.cuequivariance_triangle_limits(torch.zeros(3, 3, 64), 128) == ""
    assert "16" in peers.cuequivariance_triangle_limits(torch.zeros(3, 3, 64), 16)
    assert "40" in peers.cuequivariance_triangle_limits(torch.zeros(3, 3, 40), 32)


CUEQUIVARIANCE = [case for case in PEERS if case.values[0] == "cuequivariance"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("outgoing", [False, True])
@pytest.mark.parametrize(("name", "install"), CUEQUIVARIANCE)
def test_triangle_multiplication_is_ours(name, install, outgoing, masked, monkeypatch):
    install(monkeypatch)
    ours = randomise(TriangleMultiplication(64, 32, outgoing=outgoing))
    theirs = randomise(TriangleMultiplication(64, 32, outgoing=outgoing))
    report = use_cuequivariance(theirs, "sdpa")
    assert isinstance(theirs, PeerTriangleUpdate)
    mask = torch.tensor([True] * 4 + [False]) if masked else None
    z = randn(5, 5, 64)
    results = []
    for module in (theirs, ours):
        results.append(
            with_gradients(
                lambda z, *weights, m=module: torch.func.functional_call(
                    m, dict(zip(dict(m.named_parameters()), weights, strict=True)), (z, mask)
                ),
                z,
                *module.parameters(),
            )
        )
    assert_close(*results)
    assert not report.fallbacks.counts


def test_triangle_multiplication_in_bfloat16_rounds_the_weights_as_autocast_does(monkeypatch):
    """The stand-in insists on weights of z's dtype, which the fast kernels want."""
    CUEQUIVARIANCE[0].values[1](monkeypatch)
    module = randomise(TriangleMultiplication(32, 32, outgoing=True))
    z = randn(5, 5, 32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        expected = module(z)
        use_cuequivariance(module, "sdpa")
        found = module(z)
    assert found.dtype == expected.dtype
    assert (found - expected).float().norm() <= 1e-2 * expected.float().norm()


def test_channels_the_kernels_do_not_take_are_counted(monkeypatch):
    CUEQUIVARIANCE[0].values[1](monkeypatch)
    module = randomise(TriangleMultiplication(16, 16, outgoing=True))
    z = randn(5, 5, 16)
    expected = module(z)
    report = use_cuequivariance(module, "sdpa")
    assert torch.equal(module(z), expected)
    assert report.fallbacks.counts == {"triangle_multiplication: channels are multiples of 32, not 16": 1}


def test_what_keeps_a_package_from_loading_is_said():
    with pytest.raises(UnsupportedError, match=r"not installed: .*no_such_package"), peers.importing():
        import no_such_package  # noqa: F401
    with (
        pytest.raises(UnsupportedError, match="cannot be loaded: RuntimeError: no driver"),
        peers.importing(),
    ):
        raise RuntimeError("no driver")


def test_thresholds_of_the_user_stay(monkeypatch):
    monkeypatch.setenv("CUEQ_TRIATTN_FALLBACK_THRESHOLD", "64")
    monkeypatch.setenv("CUEQ_TRIMUL_FALLBACK_THRESHOLD", "")
    monkeypatch.delenv("CUEQ_TRIMUL_FALLBACK_THRESHOLD")
    peers.prepare_environment()
    assert os.environ["CUEQ_TRIATTN_FALLBACK_THRESHOLD"] == "64"
    assert os.environ["CUEQ_TRIMUL_FALLBACK_THRESHOLD"] == "0"

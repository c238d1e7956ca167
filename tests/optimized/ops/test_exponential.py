import torch
import triton
import triton.language as tl

from optimized.ops.exponential import exact_exp
from optimized.ops.rows import sigmoid


@triton.jit
def evaluate_kernel(x_ptr, exp_ptr, sigmoid_ptr, BLOCK: tl.constexpr):
    k = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + k)
    tl.store(exp_ptr + k, exact_exp(x))
    tl.store(sigmoid_ptr + k, sigmoid(x, False, True))


def evaluated(x):
    exponential, logistic = torch.empty_like(x), torch.empty_like(x)
    evaluate_kernel[(1,)](x, exponential, logistic, BLOCK=x.numel())
    return exponential, logistic


def test_exponential_and_sigmoid_are_right_to_the_last_bits():
    x = torch.cat([torch.linspace(-86.0, 88.0, 3072), torch.linspace(-1.0, 1.0, 1024)])
    exponential, logistic = evaluated(x)
    exact = x.double()
    assert ((exponential.double() - exact.exp()) / exact.exp()).abs().max() < 1.2 * 2**-23
    assert ((logistic.double() - exact.sigmoid()) / exact.sigmoid()).abs().max() < 2.5 * 2**-23


def test_exponential_beyond_its_range():
    infinity = float("inf")
    x = torch.tensor([-infinity, -1e30, -110.0, 0.0, 90.0, 1e30, infinity, float("nan")])
    exponential, logistic = evaluated(x)
    assert exponential[:7].tolist() == [0.0, 0.0, 0.0, 1.0, infinity, infinity, infinity]
    assert logistic[[0, 1, 3, 5, 6]].tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert exponential[7].isnan() and logistic[7].isnan()

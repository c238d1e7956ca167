"""`optimized.apply` on a GPU: the kernels inside whole blocks and the whole step, against the baseline.

In float32 the results agree to rounding. In bf16 both are compared with float32: the kernels may not be
further from it than the baseline's own operators.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

from baselines.af3.config import PairConfig, PairformerConfig
from baselines.af3.model import perturb_zero_parameters
from baselines.af3.pairformer import PairformerBlock
from baselines.af3.primitives import SharedDropout
from baselines.checkpointing import checkpoint_units
from baselines.compilation import compile_units
from baselines.systems import PYTORCH, PyTorchVariant
from baselines.workload import FixedCropWorkload
from optimized.patch import apply
from optimized.recipes import OPS
from optimized.variant import MEGAFOLD
from tests.optimized.drop_in import SHIFTS, assert_same, randn, randomise, run
from tests.optimized.test_patch_peers import boltz_pairformer, openfold3_pairformer, protenix_pairformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device is visible to torch"),
]
DEVICE = "cuda"
LENGTHS = pytest.mark.parametrize("n", [64, 77])
MARGIN, MEDIAN_MARGIN = 1.6, 1.1
"""How much further from float32 than the baseline's one tensor, and their median, may be: rounding scatters."""


def block() -> PairformerBlock:
    """Full widths, no dropout: float32 and bf16 draw different masks."""
    config = PairformerConfig(pair=PairConfig(dropout=0.0))
    made = PairformerBlock(384, 128, config, "sdpa")
    randomise(made)
    return made.to(DEVICE)


def inputs(n: int) -> list[Tensor]:
    return [randn(n, 384).to(DEVICE), randn(n, n, 128, seed=2).to(DEVICE)]


def plain(m: nn.Module, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    return m(s, z)


def in_bf16(m: nn.Module, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(DEVICE, torch.bfloat16):
        s, z = m(s, z)
    return s.float(), z.float()


Results = dict[str, Tensor]


def assert_no_further(draws: list[tuple[Results, Results, Results]], least: float = 1e-3) -> None:
    """As near to the exact results as the baseline's, tensor by tensor (or within `least` of its norm) and in the median.

    A draw is what was found, the baseline's and the exact results; of several the root mean square counts.
    """
    errors: dict[str, list[Tensor]] = {}
    for found, baseline, exact in draws:
        assert found.keys() == baseline.keys() == exact.keys()
        for name, value in exact.items():
            if not SHIFTS.search(name):
                pair = torch.stack([(x[name] - value).norm() / value.norm() for x in (found, baseline)])
                errors.setdefault(name, []).append(pair**2)
    means = {name: torch.stack(pairs).mean(0).sqrt() for name, pairs in errors.items()}
    for name, (error, allowed) in means.items():
        assert error <= max(MARGIN * allowed, least), f"{name}: {error:.2e}, baseline {allowed:.2e}"
    assert torch.stack([error / allowed for error, allowed in means.values()]).median() <= MEDIAN_MARGIN


@LENGTHS
def test_block_in_float32(n):
    baseline, patched = block(), block()
    report = apply(patched, OPS)
    assert_same(run(patched, inputs(n), plain), run(baseline, inputs(n), plain), 1e-4)
    assert not report.fallbacks.counts


@LENGTHS
@pytest.mark.parametrize("how", ["plain", "checkpointed", "compiled"])
def test_block_in_bf16(how, n):
    torch._dynamo.reset()
    baseline, patched = block(), block()
    exact = run(baseline, inputs(n), plain)
    report = apply(patched, OPS)
    if how == "checkpointed":
        checkpoint_units([("block", patched)])
    if how == "compiled":
        compile_units([("block", patched)])
    found = run(patched, inputs(n), in_bf16)
    assert_no_further([(found, run(baseline, inputs(n), in_bf16), exact)])
    assert not report.fallbacks.counts


def test_block_is_repeatable():
    patched = block()
    apply(patched, OPS)
    first = run(patched, inputs(77), in_bf16)
    for _ in range(5):
        again = run(patched, inputs(77), in_bf16)
        assert all(torch.equal(again[name], value) for name, value in first.items())


def test_block_needs_less_memory():
    """Activations kept for the backward pass, at a length where they count."""
    kept = []
    for patch in (False, True):
        made = block()
        if patch:
            apply(made, OPS)
        s, z = (x.requires_grad_() for x in inputs(384))
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = in_bf16(made, s, z)
        kept.append(torch.cuda.memory_allocated() - before)
        del out
    assert kept[1] < 0.6 * kept[0], f"kept {kept[1] / 2**20:.0f} MiB, the baseline {kept[0] / 2**20:.0f} MiB"


DRAWS = 32
"""Of the inputs: gradients of 16 channels scatter."""
PEERS = {
    "boltz": (boltz_pairformer, True),
    "protenix": (protenix_pairformer, False),
    "openfold3": (openfold3_pairformer, True),
}


def without_dropout(module: nn.Module) -> nn.Module:
    """A peer's module, none of whose dropouts drops anything."""
    for part in module.modules():
        if hasattr(part, "dropout") and isinstance(part.dropout, float):
            part.dropout = 0.0
        if hasattr(part, "p_drop"):
            part.p_drop = 0.0
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return module


@pytest.mark.peers
@pytest.mark.parametrize("name", PEERS)
def test_peer_in_bf16(name):
    """Two blocks of each library, in evaluation mode because their dropout draws by dtype."""
    build, has_batch = PEERS[name]
    theirs = without_dropout(randomise(build()).to(DEVICE))
    patched = copy.deepcopy(theirs)
    report = apply(patched, OPS)
    n = 45

    def arguments(draw: int) -> list[Tensor]:
        return [randn(n, 32, seed=2 * draw + 1).to(DEVICE), randn(n, n, 16, seed=2 * draw + 2).to(DEVICE)]

    def exact(m: nn.Module, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        pairs = torch.ones(n, n, device=DEVICE)
        if not has_batch:
            return m(s, z, pairs)
        s, z = m(s[None], z[None], torch.ones(1, n, device=DEVICE), pairs[None])
        return s[0], z[0]

    def autocast(m: nn.Module, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(DEVICE, torch.bfloat16):
            s, z = exact(m, s, z)
        return s.float(), z.float()

    draws = []
    for draw in range(DRAWS):
        drawn = arguments(draw)
        reference = run(theirs, drawn, exact)
        assert_same(run(patched, drawn, exact), reference, 1e-4)
        draws.append((run(patched, drawn, autocast), run(theirs, drawn, autocast), reference))
    assert_no_further(draws)
    assert not report.fallbacks.counts


@pytest.mark.peers
def test_graphed_callables_of_a_peer():
    """PyTorch's CUDA graphs of patched blocks of Boltz, replayed on other values: what plain calls give, in either pass."""
    n = 48
    stack = without_dropout(randomise(boltz_pairformer()).to(DEVICE))
    apply(stack)
    ones, pairs = torch.ones(1, n, device=DEVICE), torch.ones(1, n, n, device=DEVICE)

    def drawn(seed: int) -> list[Tensor]:
        return [randn(1, n, 32, seed=seed).to(DEVICE), randn(1, n, n, 16, seed=seed + 1).to(DEVICE)]

    def call(m: nn.Module, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False):
            return m(s, z, ones, pairs)

    samples = (*(x.requires_grad_() for x in drawn(1)), ones, pairs)
    with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False):
        graphed = torch.cuda.make_graphed_callables(copy.deepcopy(stack), samples)
    for seed in (3, 5):
        wanted, found = run(stack, drawn(seed), call), run(graphed, drawn(seed), call)
        assert wanted.keys() == found.keys()
        far = {
            name: ((found[name] - value).norm() / value.norm()).item()
            for name, value in wanted.items()
            if not SHIFTS.search(name) and (found[name] - value).norm() > 1e-2 * value.norm()
        }
        assert far == {}


STEP = {
    "preset": "small",
    "stage": "all",
    "diffusion_samples": 4,
    "rollout_steps": 1,
    "msa_rows": 16,
    "templates": 1,
}
TOKENS = 64


def step(variant: PyTorchVariant, precision: str) -> tuple[dict, dict, FixedCropWorkload]:
    """Losses and gradients of one step, without dropout."""
    factors = variant.resolve({**STEP, "precision": precision}, TOKENS)
    workload = variant.build(factors, TOKENS, 0, DEVICE)
    model = workload.session.model
    perturb_zero_parameters(model, std=0.02)
    for part in model.modules():
        if isinstance(part, SharedDropout):
            part.p = 0.0
    losses = workload.session.backward(workload.features, 0)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    return losses, gradients, workload


@pytest.fixture(scope="module")
def exact_step() -> tuple[dict, dict, FixedCropWorkload]:
    torch.backends.cuda.matmul.allow_tf32 = False
    return step(PYTORCH, "fp32")


def test_step_in_float32(exact_step):
    losses, gradients, _ = exact_step
    found_losses, found, workload = step(MEGAFOLD, "fp32")
    for name, value in losses.items():
        assert torch.allclose(found_losses[name], value, rtol=1e-4, atol=1e-5), name
    assert found.keys() == gradients.keys()
    largest = max(g.norm() for g in gradients.values())
    for name, value in gradients.items():
        assert (found[name] - value).norm() <= 2e-3 * value.norm() + 1e-6 * largest, name
    assert not workload.facts["fused_operators"]["fallbacks"]


def test_step_in_bf16(exact_step):
    """The median over all gradients, because small ones scatter; and the losses."""
    losses, exact, _ = exact_step
    theirs_losses, theirs, _ = step(PYTORCH, "bf16")
    found_losses, found, workload = step(MEGAFOLD, "bf16")
    assert found.keys() == theirs.keys() == exact.keys()

    def distance(gradients: dict) -> Tensor:
        errors = [(gradients[n] - g).norm() / g.norm() for n, g in exact.items() if not SHIFTS.search(n)]
        return torch.stack(errors).median()

    assert distance(found) <= MEDIAN_MARGIN * distance(theirs)
    for name, value in losses.items():
        allowed = 2 * (theirs_losses[name] - value).abs() + 2e-2 * value.abs() + 1e-4
        assert (found_losses[name] - value).abs() <= allowed, name
    assert not workload.facts["fused_operators"]["fallbacks"]

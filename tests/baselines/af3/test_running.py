"""What runs the model from outside: compilation of the repeated blocks, checkpointing, the CUDA kernels."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from baselines.af3.attention import biased_attention
from baselines.af3.msa import sample_rows

BLOCKS = [
    "input_embedder.atom_encoder.transformer.blocks.0",
    "template_embedder.blocks.0",
    "msa_module.blocks.0",
    "pairformer.blocks.0",
    "diffusion.transformer.blocks.0",
]


def captured_inputs(model, features, names):
    """Arguments each named block receives in a forward pass under autocast."""
    seen = {}
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, args))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        s_inputs = model.input_embedder(features)
        s, z = model.trunk(features, s_inputs, sample_rows(features, 4))
        conditioning = model.diffusion.condition(features, s_inputs, s, z)
        x = torch.randn(2, features["atom_mask"].shape[0], 3)
        model.diffusion(x, torch.ones(2), features, s_inputs, s, z, conditioning)
    for name in names:
        model.get_submodule(name)._forward_pre_hooks.clear()
    return seen


def test_blocks_compile_without_graph_breaks(make_model, tiny_config, features):
    model = make_model(tiny_config).eval()
    inputs = captured_inputs(model, features, BLOCKS)
    for name in BLOCKS:
        torch.compiler.reset()
        block = model.get_submodule(name)
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(compiled(*inputs[name]), block(*inputs[name]), rtol=2e-2, atol=2e-2)


def test_checkpointed_blocks_give_the_same_gradients(make_model, tiny_config, features):
    """Every unit wrapped in a checkpoint, dropout on: outputs and gradients as without."""

    def gradients(wrap):
        model = make_model(tiny_config)
        for _, unit in model.checkpoint_units() if wrap else []:
            unit.forward = lambda *args, f=unit.forward: checkpoint(f, *args, use_reentrant=False)
        torch.manual_seed(5)
        s_inputs = model.input_embedder(features)
        rows = sample_rows(features, 4, torch.Generator().manual_seed(0))
        s, z = model.trunk(features, s_inputs, rows)
        conditioning = model.diffusion.condition(features, s_inputs, s, z)
        x = torch.randn(2, features["atom_mask"].shape[0], 3)
        out = model.diffusion(x, torch.ones(2), features, s_inputs, s, z, conditioning)
        (out.square().sum() + z.square().sum()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys() and len(plain) > 200
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("n", [64, 61])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_efficient_kernel_takes_every_length(n, dtype):
    """The kernel refuses rather than falls back here, and the bias is not copied per batch entry."""
    shape = (128, 4, n, 32)
    q, k, v = (torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    bias = torch.randn(4, n, n, device="cuda", dtype=dtype, requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        fast = biased_attention(q, k, v, bias, "sdpa")
    copies = 128 * bias.numel() * bias.element_size()
    assert torch.cuda.max_memory_allocated() - before < fast.numel() * fast.element_size() + copies // 2
    (fast.float() * torch.arange(32, device="cuda")).sum().backward()
    fast_gradient, bias.grad = bias.grad, None
    slow = biased_attention(q, k, v, bias, "softmax")
    (slow.float() * torch.arange(32, device="cuda")).sum().backward()
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)
    assert (fast_gradient - bias.grad).norm() < tolerance * bias.grad.norm()

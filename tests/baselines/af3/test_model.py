"""The whole model: shapes, dtypes under autocast, gradients, masks."""

import dataclasses

import pytest
import torch

from baselines.af3.confidence import Confidence
from baselines.af3.msa import MSARows, sample_rows
from baselines.af3.sampling import SamplingConfig, centre_random_augmentation, sample

CYCLES, SAMPLES = 2, 2


def run(model, features, dtype=torch.float32):
    """Trunk with recycling, heads, denoiser: every output by name."""
    floats = {k: v.to(dtype) if v.is_floating_point() else v for k, v in features.items()}
    generator = torch.Generator().manual_seed(1)
    s_inputs = model.input_embedder(floats)
    previous = None
    for _ in range(CYCLES):
        previous = model.trunk(floats, s_inputs, sample_rows(floats, 4, generator), previous)
    s, z = previous
    x = 10.0 * torch.randn(SAMPLES, features["atom_mask"].shape[0], 3, generator=generator, dtype=dtype)
    t_hat = torch.tensor([0.5, 20.0], dtype=dtype)
    conditioning = model.diffusion.condition(floats, s_inputs, s, z)
    denoised = model.diffusion(x, t_hat, floats, s_inputs, s, z, conditioning)
    confidence = model.confidence_head(floats, s_inputs, s, z, denoised[0])
    return {
        "s_inputs": s_inputs,
        "s": s,
        "z": z,
        "denoised": denoised,
        "distogram": model.distogram_head(z),
        **confidence._asdict(),
    }


def total(outputs, seed=2):
    """A scalar with a generic gradient on every output."""
    generator = torch.Generator().manual_seed(seed)
    return sum(
        (value.float() * torch.randn(value.shape, generator=generator)).sum() for value in outputs.values()
    )


@pytest.fixture
def tiny(make_model, tiny_config):
    return make_model(tiny_config).eval()


def test_shapes(tiny, features, tiny_config):
    n, a = 12, features["atom_mask"].shape[0]
    out = run(tiny, features)
    shapes = {name: tuple(value.shape) for name, value in out.items()}
    assert shapes == {
        "s_inputs": (n, tiny_config.c_s_inputs),
        "s": (n, tiny_config.c_s),
        "z": (n, n, tiny_config.c_z),
        "denoised": (SAMPLES, a, 3),
        "distogram": (n, n, 64),
        "plddt": (a, 50),
        "pae": (n, n, 64),
        "pde": (n, n, 64),
        "resolved": (a, 2),
    }
    assert all(value.isfinite().all() for value in out.values())
    assert not out["denoised"][:, ~features["atom_mask"]].any()
    for name in ("distogram", "pde"):
        torch.testing.assert_close(out[name], out[name].transpose(0, 1))


def test_every_parameter_that_is_read_gets_a_gradient(make_model, tiny_config, features):
    model = make_model(tiny_config)
    total(run(model, features)).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_parameters_without_effect_are_exactly_those_without_gradient(
    make_model, released_tiny_config, features
):
    model = make_model(released_tiny_config)
    total(run(model, features)).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert missing and missing == model.parameters_without_effect()


def test_both_attentions_agree(make_model, tiny_config, features):
    explicit = dataclasses.replace(tiny_config, attention="softmax")
    one = run(make_model(tiny_config, torch.float64).eval(), features, torch.float64)
    two = run(make_model(explicit, torch.float64).eval(), features, torch.float64)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-9, atol=1e-9)


def test_bfloat16_autocast_keeps_the_residual_streams_in_bfloat16(make_model, tiny_config, features):
    model = make_model(tiny_config).eval()
    dtypes = {}
    for name, unit in model.checkpoint_units():
        unit.register_forward_hook(lambda _, args, out, name=name: dtypes.__setitem__(name, (args, out)))
    with torch.no_grad():
        full = run(model, features)
        dtypes.clear()
        with torch.autocast("cpu", torch.bfloat16):
            half = run(model, features)
    trunk = [name for name in dtypes if name.startswith(("template", "msa", "pairformer", "confidence"))]
    assert len(trunk) == 6
    for name in trunk:
        args, out = dtypes[name]
        out = out if isinstance(out, tuple) else (out,)
        floats = [v.dtype for v in (*args, *out) if isinstance(v, torch.Tensor) and v.is_floating_point()]
        assert set(floats) == {torch.bfloat16}, name
    assert half["denoised"].dtype == torch.float32
    for name, value in full.items():
        error = (half[name].float() - value).norm() / value.norm()
        assert error < 0.05, (name, error)


def test_float32_diffusion_after_a_bfloat16_trunk(tiny, features):
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            s_inputs = tiny.input_embedder(features)
            s, z = tiny.trunk(features, s_inputs, sample_rows(features, 4))
        assert z.dtype == torch.bfloat16
        x = torch.randn(1, features["atom_mask"].shape[0], 3)
        t = torch.ones(1)
        conditioning = tiny.diffusion.condition(features, s_inputs, s, z)
        assert conditioning.pair.dtype == torch.float32
        assert tiny.diffusion(x, t, features, s_inputs, s, z, conditioning).dtype == torch.float32
        assert tiny.distogram_head(z).dtype == torch.float32
        confidence = tiny.confidence_head(features, s_inputs, s, z, x[0])
        assert {value.dtype for value in confidence} == {torch.float32}


def test_samples_are_independent(tiny, features):
    with torch.no_grad():
        s_inputs = tiny.input_embedder(features)
        s, z = tiny.trunk(features, s_inputs, sample_rows(features, 4))
        conditioning = tiny.diffusion.condition(features, s_inputs, s, z)
        x, t = torch.randn(3, features["atom_mask"].shape[0], 3), torch.tensor([0.1, 1.0, 50.0])
        args = (features, s_inputs, s, z, conditioning)
        together = tiny.diffusion(x, t, *args)
        apart = torch.cat([tiny.diffusion(x[i : i + 1], t[i : i + 1], *args) for i in range(3)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_masked_tokens_do_not_reach_the_others(tiny, features):
    """The trunk on a crop with two masked tokens equals itself with other values there."""
    mask = torch.ones(12, dtype=torch.bool)
    mask[-2:] = False
    rows = MSARows(features["msa"], features["msa_deletions"], features["msa_mask"] & mask)
    other = dict(
        features, token_bonds=features["token_bonds"][:0], residue_index=features["residue_index"].clone()
    )
    other["residue_index"][-2:] += 7
    features = dict(features, token_bonds=features["token_bonds"][:0])
    with torch.no_grad():
        s_inputs = tiny.input_embedder(features)
        changed = s_inputs.clone()
        changed[-2:] += 1.0
        s, z = tiny.trunk(features, s_inputs, rows, mask=mask)
        s_changed, z_changed = tiny.trunk(other, changed, rows, mask=mask)
    torch.testing.assert_close(s[:-2], s_changed[:-2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(z[:-2, :-2], z_changed[:-2, :-2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(z[-2:], z_changed[-2:], atol=1e-2)


def test_padding_atoms_do_not_matter(tiny, features):
    other = dict(features)
    for name, value in (("ref_pos", 9.0), ("ref_charge", 3.0), ("ref_element", 60)):
        other[name] = features[name].clone()
        other[name][~features["atom_mask"]] = value
    with torch.no_grad():
        torch.testing.assert_close(tiny.input_embedder(features), tiny.input_embedder(other))


def test_a_window_of_padding_only_stays_finite(tiny, features):
    longer = dict(features)
    for name in ("atom_mask", "atom_to_token", "atom_within_token", "ref_pos", "ref_element"):
        longer[name] = torch.cat((features[name], features[name][-1:].expand(96, *features[name].shape[1:])))
    for name in ("ref_charge", "ref_atom_name", "ref_space_uid"):
        longer[name] = torch.cat((features[name], features[name][-1:].expand(96, *features[name].shape[1:])))
    assert not longer["atom_mask"][-96:].any()
    with torch.no_grad():
        torch.testing.assert_close(
            tiny.input_embedder(longer), tiny.input_embedder(features), rtol=1e-4, atol=1e-5
        )


def test_no_templates_no_bonds_one_row(tiny, make_features):
    features = make_features(rows=1, templates=0)
    features["token_bonds"] = features["token_bonds"][:0]
    assert all(value.isfinite().all() for value in run(tiny, features).values())


def test_rollout_runs_the_denoiser_at_each_level(tiny, features):
    seen = []

    def denoise(x, t):
        seen.append(float(t[0]))
        return torch.zeros_like(x)

    x = sample(denoise, features["atom_mask"], SamplingConfig(steps=5), samples=3)
    assert x.shape == (3, features["atom_mask"].shape[0], 3)
    assert seen[0] == pytest.approx(16 * 160 * 1.8) and seen == sorted(seen, reverse=True)
    assert len(seen) == 5 and not x[:, ~features["atom_mask"]].any()


def test_rollout_is_reproducible_and_finds_a_known_structure(features):
    """A denoiser that always answers one (centred, rotation-free) point cloud makes the sampler end on it."""
    mask = features["atom_mask"]

    def point(x, t):
        return torch.zeros_like(x)

    def rollout(steps):
        generator = torch.Generator().manual_seed(3)
        return sample(point, mask, SamplingConfig(steps=steps, translation=0.0), generator=generator)

    torch.testing.assert_close(rollout(20), rollout(20), rtol=0, atol=0)
    assert rollout(50).abs().max() < 0.1


def test_random_augmentation_is_rigid(features):
    mask = features["atom_mask"]
    x = torch.randn(2, mask.shape[0], 3, dtype=torch.float64)
    moved = centre_random_augmentation(x, mask, translation=0.0)
    before, after = (torch.cdist(v[:, mask], v[:, mask]) for v in (x, moved))
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)
    assert moved[:, mask].mean(1).abs().max() < 1e-5
    handedness = [torch.linalg.det(v[:, mask][:, :3] - v[:, mask].mean(1, keepdim=True)) for v in (x, moved)]
    torch.testing.assert_close(*handedness, rtol=1e-4, atol=1e-4)


def test_checkpoint_units_are_the_repeated_blocks(tiny, tiny_config):
    names = [name for name, _ in tiny.checkpoint_units()]
    assert len(names) == len(set(names)) == 3 * 1 + 1 + 2 + 2 + 2 + 1
    assert all(tiny.get_submodule(name) is unit for name, unit in tiny.checkpoint_units())


def test_confidence_reads_the_predicted_structure(tiny, features):
    with torch.no_grad():
        s_inputs = tiny.input_embedder(features)
        s, z = tiny.trunk(features, s_inputs, sample_rows(features, 4))
        near, far = (
            tiny.confidence_head(features, s_inputs, s, z, scale * features["ref_pos"])
            for scale in (1.0, 8.0)
        )
    assert isinstance(near, Confidence)
    assert not torch.allclose(near.pae, far.pae)

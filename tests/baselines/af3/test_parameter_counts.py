"""Parameter counts against the released network, on the meta device."""

import dataclasses

import pytest
import torch

from baselines.af3.config import AF3Config, preset
from baselines.af3.model import AlphaFold3


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def build(config):
    with torch.device("meta"):
        return AlphaFold3(config)


@pytest.fixture(scope="module")
def released():
    return build(AF3Config())


RELEASED = {
    "": 368_384_538,
    "input_embedder": 1_045_600,
    "template_embedder": 255_744,
    "msa_module.blocks": 3_033_088,
    "pairformer": 147_400_704,
    "pairformer.blocks.0": 3_070_848,
    "pairformer.blocks.0.pair.tri_mul_out": 98_816,
    "pairformer.blocks.0.pair.tri_mul_in": 98_816,
    "pairformer.blocks.0.pair.tri_att_start": 82_688,
    "pairformer.blocks.0.pair.tri_att_end": 82_688,
    "pairformer.blocks.0.pair.pair_transition": 196_864,
    "pairformer.blocks.0.single_transition": 1_770_240,
    "diffusion.transformer": 198_340_736,
    "diffusion.atom_encoder.transformer": 937_552,
    "diffusion.atom_decoder.transformer": 937_552,
    "confidence_head": 12_900_480,
    "distogram_head": 8_192,
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_layout(released, name):
    assert count(released.get_submodule(name)) == RELEASED[name]


def test_the_preset_is_the_released_network_without_parameters_nothing_reads(released):
    trained = build(preset("af3"))
    assert count(trained) == 368_384_538 - 62_976 - 2 * 4_160
    assert 368_200_000 < count(trained) < 368_500_000
    assert not trained.parameters_without_effect()
    assert count(trained.pairformer) == 147_400_704
    assert count(trained.pairformer.blocks[0]) == 3_070_848
    assert count(trained.diffusion.transformer) == 198_340_736


def test_parts_of_the_diffusion_module(released):
    diffusion = released.diffusion
    conditioning = [diffusion.pair_conditioning, diffusion.single_conditioning, diffusion.linear_s]
    assert sum(map(count, [*conditioning, diffusion.layer_norm_s])) == 2_716_362
    atoms = count(diffusion.atom_encoder) + count(diffusion.atom_decoder)
    assert atoms == 2 * 937_552 + 308_112
    assert count(diffusion) == 198_340_736 + 2_716_362 + atoms + 768


def test_nothing_is_allocated_on_the_meta_device(released):
    tensors = [*released.parameters(), *released.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {parameter.dtype for parameter in released.parameters()} == {torch.float32}


def test_options_remove_what_other_implementations_leave_out():
    full = AF3Config()
    no_update = dataclasses.replace(full, msa=dataclasses.replace(full.msa, last_block_updates_msa=False))
    assert count(build(full)) - count(build(no_update)) == 62_976
    no_copy = dataclasses.replace(full, atom=dataclasses.replace(full.atom, unused_pair_embedding=False))
    assert count(build(full)) - count(build(no_copy)) == 2 * 4_160
    per_block = dataclasses.replace(
        full, diffusion=dataclasses.replace(full.diffusion, pair_norm="per_block")
    )
    assert count(build(per_block).diffusion.transformer) == 198_343_680  # Protenix


def test_parameters_without_effect_are_counted(released):
    sizes = dict(released.named_parameters())
    assert sum(sizes[name].numel() for name in released.parameters_without_effect()) == 62_976 + 2 * 4_160

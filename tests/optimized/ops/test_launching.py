import json

import pytest
import torch

from optimized.ops.gated_output import launch as gated
from optimized.ops.launching import checked, tile
from optimized.ops.layer_norm_linear import launch as linear
from optimized.ops.outer_product_mean import launch as outer
from optimized.ops.pair_weighted_averaging import launch as averaging
from optimized.ops.transition import launch as transition
from optimized.ops.triangle_multiplication import layout as triangle
from optimized.ops.tuning import SHIPPED, Config

OPERATORS = {
    "transition": transition,
    "triangle_multiplication": triangle,
    "layer_norm_linear": linear,
    "gated_output": gated,
    "outer_product_mean": outer,
    "pair_weighted_averaging": averaging,
}


@pytest.mark.parametrize(("rows", "warps"), [(64, 8), (64, 16), (128, 16)])
def test_more_warps_than_rows_can_feed_are_refused(rows, warps):
    with pytest.raises(ValueError, match="warps"):
        checked(tile(rows, 32, warps, 1))
    with pytest.raises(ValueError, match="warps"):
        checked(Config({"BM": rows, "BN": 32, "STAGES": 2}, warps))


@pytest.mark.parametrize(("rows", "warps"), [(16, 8), (32, 8), (64, 4), (128, 8)])
def test_other_tiles_are_taken(rows, warps):
    assert checked(tile(rows, 32, warps, 1)).num_warps == warps


def test_a_kernel_that_sums_over_its_tile_is_judged_by_its_outputs():
    summing = "triangle_multiplication.output_weight"
    assert checked(tile(64, 128, 8, 1), summing).num_warps == 8
    with pytest.raises(ValueError, match="warps"):
        checked(tile(128, 64, 8, 1), summing)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("channels", [64, 128, 384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_defaults_keep_the_rule(operator, channels, dtype):
    module = OPERATORS[operator]
    for kernel in module.HALF:
        name = f"{operator}.{kernel}"
        config = checked(module.default(name, channels, dtype), name)
        if name.endswith(("weight_gradient", "project_weight")) and channels == 64:
            assert dtype == torch.float32 or config.num_warps <= 4


def test_shipped_configurations_keep_the_rule():
    files = sorted(SHIPPED.glob("*.json"))
    names = set()
    for file in files:
        for key, entry in json.loads(file.read_text()).items():
            operator, _, kernel = key.split("/")[0].partition(".")
            if operator in OPERATORS:
                assert kernel in OPERATORS[operator].HALF
                checked(Config.from_json(entry), f"{operator}.{kernel}")
                names.add(operator)
    assert "transition" in names

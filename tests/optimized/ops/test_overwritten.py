"""On the loop of a kernel that raced on an H200, in the compiler's form and abbreviated."""

from optimized.ops.overwritten import overwritten

LOOP = """
    %d_53 = ttg.local_alloc : () -> !ttg.memdesc<2x64x64xbf16, #shared, #smem, mutable>
    %v_54 = ttg.local_alloc : () -> !ttg.memdesc<3x128x64xbf16, #shared, #smem, mutable>
    %w = ttg.local_alloc %weights : (tensor<64x64xbf16, #blocked>) -> !ttg.memdesc<64x64xbf16, #shared, #smem>
    %total_143:17 = scf.for %step = %first to %last step %splits iter_args(%acc_18 = %cst) -> (tensor<64x128xf32, #mma>) : i32 {
      %d_211 = ttg.memdesc_index %d_53[%i] : !ttg.memdesc<2x64x64xbf16> -> !ttg.memdesc<64x64xbf16>
      %d_212 = ttg.local_load %d_211 token %ready : !ttg.memdesc<64x64xbf16> -> tensor<64x64xbf16, #blocked3>
      %v_213 = ttg.memdesc_index %v_54[%j] : !ttg.memdesc<3x128x64xbf16> -> !ttg.memdesc<128x64xbf16>
      %turned = ttg.memdesc_trans %v_213 {order = array<i32: 1, 0>} : !ttg.memdesc<128x64xbf16> -> !ttg.memdesc<64x128xbf16>
      %acc_219 = ttng.warp_group_dot %d_211, %turned, %acc_18 {inputPrecision = 0 : i32, isAsync = true} : tensor<64x128xf32, #mma>
      %acc_220:3 = ttng.warp_group_dot_wait %acc_219, %d_211, %turned {pendings = 1 : i32} : tensor<64x128xf32, #mma>
    }
"""


def test_a_tile_that_registers_and_a_product_in_flight_read():
    assert overwritten(LOOP) == ["%d_53"]


def test_what_only_products_read_or_what_they_are_waited_for():
    assert overwritten(LOOP.replace("ttg.local_load %d_211", "ttg.local_load %other")) == []
    assert overwritten(LOOP.replace("pendings = 1", "pendings = 0")) == []
    assert overwritten(LOOP.replace("isAsync = true", "isAsync = false")) == []


def test_what_is_written_once_cannot_be_overwritten():
    other = LOOP.replace("ttg.memdesc_index %d_53[%i]", "ttg.memdesc_trans %w {order}")
    assert overwritten(other) == []


def test_the_other_operand():
    assert overwritten(LOOP.replace("local_load %d_211", "local_load %turned")) == ["%v_54"]

"""What compiled kernels are called in profiles, and how they access memory.

Compiled in a process of its own: here, Triton interprets.
"""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from optimized.ops.names import profiled_as

SCRIPT = """
import json
from types import SimpleNamespace
import triton
from optimized.ops.catalogue import catalogue
from optimized.ops.offline import _source, target_of

cases = {case.name: case for case in catalogue("sm_90")}
def name(case):
    constants = {n: v for n, v in case.constants.items() if n in case.kernel.arg_names}
    return case.kernel.repr(SimpleNamespace(constants=constants, signature=case.signature))
def compile(case):
    return triton.compile(_source(case), target=target_of("sm_90"), options={"num_warps": case.num_warps})
compiled = compile(cases["conditioned_transition.bf16.128.swiglu"])
flat = {name: compile(cases[name]).asm["ptx"] for name in ("gated_output.bf16.gate", "gated_output.bf16.gate_backward")}
functions = {n: (name(c), f"{c.kernel.fn.__module__}.{c.kernel.fn.__name__}") for n, c in cases.items()}
print(json.dumps({"cases": functions, "compiled": compiled.metadata.name, "ptx": compiled.asm["ptx"], "flat": flat}))
"""


@pytest.fixture(scope="module")
def seen():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout)


def test_no_two_kernels_share_a_name(seen):
    owners: dict[str, set[str]] = {}
    for name, function in seen["cases"].values():
        owners.setdefault(name, set()).add(function)
    assert len(owners) > 50
    assert {name: functions for name, functions in owners.items() if len(functions) > 1} == {}


def test_names_tell_dtype_size_and_products(seen):
    assert seen["cases"]["attention.fp32.d48.tf32x3.forward"][0] == "attention_forward_fp32_d48_tf32x3"
    assert seen["cases"]["transition.bf16.128x512.forward"][0] == "transition_forward_bf16_c128"
    assert profiled_as("fold")(SimpleNamespace(constants={}, signature={"n": "i32"})) == "fold"


def test_the_compiled_kernel_has_the_name(seen):
    assert seen["compiled"] == "conditioned_transition_swiglu_bf16"
    assert f".entry {seen['compiled']}(" in seen["ptx"]


def test_elementwise_kernels_access_16_bytes_at_once(seen):
    """Though they do not specialise on the number of rows, which the masks depend on."""
    for name, ptx in seen["flat"].items():
        widths = re.findall(r"\b(?:ld|st)\.global[\w.:]*?(\.v\d)?\.b(\d+)", ptx)
        assert {int(v[2:] or 1) * int(bits) for v, bits in widths} == {128}, name

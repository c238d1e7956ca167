"""What a kernel is called in profiles: Triton would call a dozen of them ``forward_kernel``."""

from collections.abc import Callable
from typing import Any

_SIZES = {"C": "c", "D": "d"}
_PRODUCTS = ("tf32x3", "tf32")


def profiled_as(name: str) -> Callable[[Any], str]:
    """For ``triton.jit(repr=...)``: `name`, the dtype of the first tensor, channels or head size, kind of products.

    As in ``attention_forward_fp32_d48_tf32x3``.
    """

    def describe(specialisation: Any) -> str:
        constants = specialisation.constants
        pointers = (str(t) for t in specialisation.signature.values() if str(t).startswith("*"))
        dtype = next(pointers, "").lstrip("*").removeprefix("k")
        sizes = [f"{letter}{constants[key]}" for key, letter in _SIZES.items() if key in constants]
        products = [p for p in (constants.get("PRECISION"),) if p in _PRODUCTS]
        return "_".join([name, *filter(None, [dtype]), *sizes, *products])

    return describe

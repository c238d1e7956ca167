"""Names of operators as users write them."""

FAMILIES = {
    "triangle_attention": "attention",
    "attention_pair_bias": "attention",
    "triangle_multiplication_outgoing": "triangle_multiplication",
    "triangle_multiplication_incoming": "triangle_multiplication",
}
"""The family of kernels behind an operator, where it has another name."""


def parse_list(text: str | None) -> tuple[str, ...]:
    """`a,b` as ("a", "b"), without repeats; empty for None."""
    return tuple(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))

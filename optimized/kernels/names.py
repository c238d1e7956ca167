"""Names and numbers as users write them."""

from megafold_bench.errors import UserError

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


def parse_tokens(text: str | None) -> tuple[int, ...]:
    """`384,768` as numbers, the shortest first; UserError for what is none or below 2."""
    found = []
    for word in parse_list(text):
        if not word.isdigit() or int(word) < 2:
            raise UserError(f"--n {word}: give token counts from 2, separated by commas")
        found.append(int(word))
    return tuple(sorted(set(found)))

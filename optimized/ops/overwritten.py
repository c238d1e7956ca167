"""Tiles that Triton's pipeline would overwrite while a product still reads them, found in the compiler's own form.

On Hopper a product may run on while the next step of a loop begins, and then needs its operands' buffers a step longer:
the pipeline gives them one more. Not so (Triton 3.6 and 3.7) to a tile that is also read into registers: the copy of a
later tile is started while the product may not have read this one. Results are then wrong now and then.
"""

import re

_DEFINITION = re.compile(r"^\s*(%[\w-]+)(?::\d+)? = (.*)$", re.MULTILINE)
_PART = re.compile(r"ttg\.memdesc_(?:index|trans|subslice|reinterpret) (%[\w-]+)")
_PRODUCT = re.compile(r"ttng\.warp_group_dot (%[\w-]+)(?:#\d+)?, (%[\w-]+)(?:#\d+)?,.*isAsync = true")
_READ = re.compile(r"ttg\.local_load (%[\w-]+)")
_RING = re.compile(r"ttg\.local_alloc\s*:")  # without a value: filled by copies, step by step
_PENDING = re.compile(r"warp_group_dot_wait.*pendings = [1-9]")


def overwritten(ttgir: str) -> list[str]:
    """Names of buffers of a kernel in TritonGPU's form that products left in flight and registers both read."""
    if not _PENDING.search(ttgir):
        return []
    definitions = dict(_DEFINITION.findall(ttgir))

    def buffer(value: str) -> str:
        while part := _PART.match(definitions.get(value, "")):
            value = part[1]
        return value

    read = {buffer(value) for value in _READ.findall(ttgir)}
    operands = {buffer(value) for pair in _PRODUCT.findall(ttgir) for value in pair}
    return sorted(name for name in read & operands if _RING.match(definitions.get(name, "")))

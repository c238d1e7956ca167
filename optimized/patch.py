"""`apply`: fused operators in a built model, in place, with its weights and checkpoints as they were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from megafold_bench.errors import UserError
from optimized import modules
from optimized.ops.attention.operator import PRECISIONS
from optimized.patches import boltz, openfold3, protenix
from optimized.recipes import DEFAULT_OPS, OPS, PRODUCTS, Fallbacks, Fused, Recipe, fused_class

_SOURCES = (modules, boltz, protenix, openfold3)


@dataclass(frozen=True)
class Replaced:
    """One module that now runs on a fused operator."""

    name: str
    """Its name in the model."""
    kind: str
    """Its class before, qualified."""
    op: str


@dataclass(frozen=True)
class Left:
    """One module that was recognised and left as it is, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `apply` did. Printing it gives a summary."""

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]
    fallbacks: Fallbacks
    """Filled while the model runs: the calls that ran a definition instead of a kernel, and why."""
    originals: tuple[tuple[nn.Module, type[nn.Module]], ...]
    """The replaced modules and their classes before, for `undo`."""

    def counts(self) -> dict[str, int]:
        """Operator to number of modules that run on it."""
        return dict(Counter(r.op for r in self.replaced))

    def reasons(self) -> dict[str, int]:
        """``"class: reason"`` to number of modules that were left for it."""
        return dict(Counter(f"{m.kind.rpartition('.')[2]}: {m.reason}" for m in self.left))

    def summary(self) -> dict[str, Mapping[str, int]]:
        """The above for a record; ``"fallbacks"`` goes on counting while the model runs."""
        return {"replaced": self.counts(), "left": self.reasons(), "fallbacks": self.fallbacks.counts}

    def undo(self) -> None:
        """Give every replaced module its class back. Weights and whatever else happened to it stay."""
        for module, kind in self.originals:
            module.__class__ = kind
            module.__dict__.pop("fallbacks", None)
            module.__dict__.pop("fused_ops", None)
            module.__dict__.pop("products", None)

    def __str__(self) -> str:
        lines = [f"{op}: {n} replaced" for op, n in self.counts().items()] or ["nothing replaced"]
        lines += [f"left {n} × {reason}" for reason, n in self.reasons().items()]
        lines += [f"ran the definition {n} × {reason}" for reason, n in self.fallbacks.counts.items()]
        return "\n".join(lines)


def apply(model: nn.Module, ops: Iterable[str] | None = None, products: str = PRODUCTS) -> Report:
    """Make the modules of `model` that have a fused operator run on it, in place.

    Knows the baseline and the Pairformer and token transformer modules of Boltz 2, Protenix 2 and OpenFold3, by
    the names of their classes; none of them is imported. `ops` chooses among `OPS`; `DEFAULT_OPS` if not given. A replaced
    module keeps its parameters, their names, its hooks and its identity, so optimisers, checkpoints and wrappers
    stay valid; only its class changes. Call it before or after moving, checkpointing, compiling or wrapping.

    `products` says how attention with pair bias takes those of float32, the diffusion module's: ``"tf32x3"``, as three
    TF32 products each, which PyTorch's own attention does too (errors some 2⁻²¹); ``"ieee"``, in float32, the only way
    on AMD; ``"tf32"``, as one. With ``"tf32x3"`` the operator ``"linear"`` takes the baseline's linear layers the same
    way where they are in float32.

    Where a kernel does not take a call (on the CPU, for one) the operator's definition runs, and
    `Report.fallbacks` says so. Masks are 0 or 1. A row whose keys are all masked gives zero, where the libraries
    give an average over the masked keys. Options that pick another kernel or a chunk size are not needed and
    ignored. Raises `UserError` for an unknown operator or kind of product, or a model without a module it knows.
    """
    chosen = _chosen(ops)
    if products not in PRECISIONS:
        raise UserError(f"unknown kind of products {products!r}: choose from {', '.join(PRECISIONS)}")
    log = Fallbacks()
    replaced: list[Replaced] = []
    left: list[Left] = []
    originals: list[tuple[nn.Module, type[nn.Module]]] = []
    inside: set[int] = set()  # what an operator stands for and never calls
    for name, module in model.named_modules():
        found = None if id(module) in inside else _recipe(type(module))
        if isinstance(module, Fused) and module.whole:
            inside.update(_below(module))
        if found is None:
            continue
        kind, recipe = found
        if isinstance(recipe, Recipe) and not recipe.concerns(chosen, products):
            continue
        reason = recipe if isinstance(recipe, str) else _obstacle(module, kind, recipe, chosen)
        if isinstance(recipe, str) or reason:
            left.append(Left(name, _qualified(kind), reason))
            continue
        originals.append((module, type(module)))
        replaced.append(Replaced(name, _qualified(kind), recipe.op))
        module.__class__ = fused_class(recipe.mixin, type(module))
        if recipe.mixin.whole:
            inside.update(_below(module))
        module.__dict__["fallbacks"] = log
        module.__dict__["fused_ops"] = chosen
        module.__dict__["products"] = products
    if not replaced and not left:
        raise UserError(
            f"{type(model).__name__} has no module that optimized.apply knows: it takes the baseline, "
            "and models of Boltz 2.2, Protenix 2.0 and OpenFold3 0.5"
        )
    return Report(tuple(replaced), tuple(left), log, tuple(originals))


def _below(module: Any) -> set[int]:
    """The modules in it, by identity."""
    return {id(part) for part in module.modules() if part is not module}


def _chosen(ops: Iterable[str] | None) -> frozenset[str]:
    chosen = frozenset(DEFAULT_OPS if ops is None else ops)
    unknown = sorted(chosen - set(OPS))
    if unknown:
        raise UserError(f"unknown operator {unknown[0]!r}: choose from {', '.join(OPS)}")
    return chosen


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _recipe(kind: type) -> tuple[type, Recipe | str] | None:
    """The nearest class above `kind` that is known, and its recipe or the reason to leave it."""
    for base in kind.__mro__:
        if issubclass(base, Fused):
            continue
        name = _qualified(base)
        for source in _SOURCES:
            if name in source.RECIPES:
                return base, source.RECIPES[name]
            if name in source.WITHOUT_OPERATOR:
                return base, f"no fused operator for {source.WITHOUT_OPERATOR[name]}"
    return None


def _obstacle(module: Any, kind: type[nn.Module], recipe: Recipe, chosen: frozenset[str]) -> str:
    """Why this module stays as it is; empty if nothing speaks against it."""
    if isinstance(module, Fused):
        return "already replaced"
    if recipe.op not in chosen:
        return f"{recipe.op} was not asked for"
    if "forward" in vars(module):
        return "its forward was replaced on the instance (checkpointed or compiled by itself)"
    if type(module).forward is not kind.forward:
        return f"{type(module).__name__} has a forward of its own"
    return recipe.check(module)

"""Where complexes come from: files named one by one, a folder, or a seed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from baselines.data.a3m import Alignment, check_query, read_a3m
from baselines.data.assembly import restypes_of
from baselines.data.complexes import Complex, build_complex
from baselines.data.files import STRUCTURE_SUFFIXES
from baselines.data.mmcif import read_structure
from baselines.data.schema import PROTEIN
from baselines.data.structure import Chain, Structure
from baselines.data.templates import MAX_TEMPLATES, Template, read_template
from megafold_bench.errors import UserError


@dataclass(frozen=True)
class InputSpec:
    """Files of one complex. Chain names are those of the structure file (``label_asym_id``)."""

    structure: Path
    msa: Mapping[str, Path] = field(default_factory=dict)
    """Alignment (A3M) by chain; it serves every chain with the same sequence."""
    templates: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    """Template structures by chain; they serve every chain with the same sequence."""
    shared_templates: tuple[Path, ...] = ()
    """Template structures for whichever protein chains they resemble."""


def load_complex(spec: InputSpec) -> Complex:
    """Read the files of a complex and featurise it.

    Raises `UserError` for a missing or damaged file, an unknown chain, or an alignment that does not fit.
    """
    structure = read_structure(spec.structure)
    by_name = {chain.name: chain for chain in structure.chains}
    alignments = {
        name: _alignment(path, _chain(by_name, name, "alignment")) for name, path in spec.msa.items()
    }
    return build_complex(structure, alignments, _templates(spec, structure, by_name))


def _chain(by_name: Mapping[str, Chain], name: str, what: str) -> Chain:
    polymers = [chain.name for chain in by_name.values() if chain.is_polymer]
    if name not in by_name:
        raise UserError(f"unknown chain {name!r} for an {what}: choose from {', '.join(polymers)}")
    if not by_name[name].is_polymer:
        raise UserError(f"chain {name!r} is a ligand and takes no {what}: choose from {', '.join(polymers)}")
    return by_name[name]


def _alignment(path: Path, chain: Chain) -> Alignment:
    alignment = read_a3m(path, chain.kind)
    check_query(alignment, restypes_of(chain), chain.name, str(path))
    return alignment


def _templates(
    spec: InputSpec, structure: Structure, by_name: Mapping[str, Chain]
) -> list[tuple[str, Template]]:
    """At most MAX_TEMPLATES per sequence; those given for a chain come before shared ones."""
    found: list[tuple[str, Template]] = []
    counts: dict[str, int] = {}

    def add(chain: Chain, template: Template) -> None:
        if counts.setdefault(chain.sequence, 0) < MAX_TEMPLATES:
            counts[chain.sequence] += 1
            found.append((chain.name, template))

    for name, paths in spec.templates.items():
        chain = _chain(by_name, name, "template")
        for path in paths:
            template = read_template(path, chain)
            if template is None:
                raise UserError(f"template {str(path)!r} does not resemble chain {name!r}: give a homologue")
            add(chain, template)
    distinct = {chain.sequence: chain for chain in reversed(structure.chains) if chain.kind == PROTEIN}
    for path in spec.shared_templates:
        fitting = [(chain, read_template(path, chain)) for chain in reversed(distinct.values())]
        if not any(template for _, template in fitting):
            raise UserError(f"template {str(path)!r} resembles no chain of the structure: remove it")
        for chain, template in fitting:
            if template is not None:
                add(chain, template)
    return found


def folder_spec(folder: Path) -> InputSpec:
    """The files of a folder: one structure, ``msa_CHAIN.a3m[.gz]``, ``template_*.cif[.gz]``.

    ``template_CHAIN_NAME.cif`` belongs to that chain if CHAIN is one letter or number; other templates
    to the chains they resemble. Raises `UserError` when the folder or its structure is missing.
    """
    if not folder.is_dir():
        raise UserError(f"input folder {str(folder)!r} does not exist: check the path")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    coordinate = [path for path in files if path.name.endswith(STRUCTURE_SUFFIXES)]
    structures = [path for path in coordinate if not path.name.startswith("template_")]
    if len(structures) != 1:
        listed = ", ".join(path.name for path in structures) or "none"
        raise UserError(
            f"input folder {str(folder)!r} must hold exactly one structure, found {listed}: name a file"
        )
    templates: dict[str, tuple[Path, ...]] = {}
    shared: list[Path] = []
    for path in coordinate:
        if path.name.startswith("template_"):
            match = re.match(r"template_([A-Za-z0-9])[_.]", path.name)
            if match:
                templates[match[1]] = (*templates.get(match[1], ()), path)
            else:
                shared.append(path)
    alignments = {
        match[1]: path for path in files if (match := re.fullmatch(r"msa_(.+)\.a3m(?:\.gz)?", path.name))
    }
    return InputSpec(structures[0], alignments, templates, tuple(shared))


def load_folder(folder: Path) -> Complex:
    """Load the complex whose files lie in `folder` (see `folder_spec`)."""
    return load_complex(folder_spec(folder))

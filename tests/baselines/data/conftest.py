"""Real and synthetic complexes shared by the data tests."""

import importlib.util
from pathlib import Path

import pytest

from baselines.data import load_folder, synthetic_complex

_SPEC = importlib.util.spec_from_file_location("data_paths", Path(__file__).parents[2] / "data_paths.py")
data_paths = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(data_paths)


@pytest.fixture(scope="session")
def real_folder():
    folder = data_paths.complexes_dir()
    if folder is None:
        pytest.skip("no real complexes here: set MEGAFOLD_BENCH_DATA")
    return folder


@pytest.fixture(scope="session")
def real(real_folder):
    return {name: load_folder(real_folder / name) for name in ("209d", "721p", "7a4d")}


@pytest.fixture(scope="session")
def synthetic():
    return synthetic_complex(257, seed=1, msa_depth=300)

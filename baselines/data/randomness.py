"""Random numbers by counter: a draw depends on what it is for, and on nothing that ran before."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream of random numbers decides. Streams of different purposes are independent."""

    CROP = 1
    MSA = 2
    TEMPLATES = 3
    CONFORMERS = 4
    SYNTHETIC = 5


def generator(seed: int, purpose: Purpose, epoch: int = 0, sample: int = 0) -> np.random.Generator:
    """The stream of (`seed`, `purpose`, `epoch`, `sample`), whatever process or order asks for it.

    Philox 4×64: the seed and purpose are its key; epoch and sample the high half of its counter.
    """
    if min(seed, epoch, sample) < 0:
        raise ValueError(f"seed {seed}, epoch {epoch} and sample {sample} must not be negative")
    key = np.array([seed, int(purpose)], np.uint64)
    counter = np.array([0, 0, epoch, sample], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))

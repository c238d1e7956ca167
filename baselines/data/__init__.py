"""From structures, alignments and templates (or a seed) to AF3 training features.

The deterministic half makes a `Complex` (`load_complex`, `load_folder`, `synthetic_complex`), which can
be cached; the random half draws a training sample from it (`sample_features`).
"""

from baselines.data.complexes import Complex, describe
from baselines.data.sampling import SampleConfig, sample_features
from baselines.data.sources import InputSpec, folder_spec, load_complex, load_folder
from baselines.data.synthetic import synthetic_complex

__all__ = [
    "Complex",
    "InputSpec",
    "SampleConfig",
    "describe",
    "folder_spec",
    "load_complex",
    "load_folder",
    "sample_features",
    "synthetic_complex",
]

"""The training workload of a variant: its factors, and the session built from them on one device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from baselines.af3.config import Attention, preset
from baselines.af3.flops import ProblemSize, StepFactors, forward_flops, training_flops
from baselines.af3.model import AlphaFold3
from baselines.checkpointing import check_mode
from baselines.inputs import make_crop, open_complex
from baselines.losses.labels import Features
from baselines.losses.weights import stage_weights
from baselines.optim import EMA_DECAY, OptimizerConfig
from baselines.precision import precision_policy
from baselines.randomness import derived_seed
from baselines.training import TrainingConfig, TrainingSession, loss_names
from megafold_bench.variants import Scalar


@dataclass
class FixedCropWorkload:
    """Trains on one crop that stays on the device, so that no data loading is in the step."""

    session: TrainingSession
    features: Features
    facts: Mapping[str, Any]
    around_step: Callable[[], AbstractContextManager]
    steps_done: int = 0

    def load(self) -> Features:
        """The crop, already on the device."""
        return self.features

    def transfer(self, batch: Features) -> Features:
        """`batch` itself."""
        return batch

    def step(self, batch: Features) -> dict[str, torch.Tensor]:
        """One optimiser step; detached scalars on the device, ``"loss"`` the total."""
        with self.around_step():
            losses = self.session.step(batch, self.steps_done)
        self.steps_done += 1
        return losses


def build_workload(
    factors: Mapping[str, Scalar],
    seq_len: int,
    seed: int,
    device: str,
    prepare: Callable[[AlphaFold3], None] = lambda model: None,
    around_step: Callable[[], AbstractContextManager] = nullcontext,
) -> FixedCropWorkload:
    """Model, optimiser and one crop of `seq_len` tokens on `device`; every random choice follows from `seed`.

    `prepare` changes the fresh model before it is checkpointed (compilation, patching); each step runs
    within `around_step`. Turns TF32 off for the process: float32 means float32.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    where = torch.device(device)
    complex_ = open_complex(factors, seq_len, seed)
    features = make_crop(complex_, factors, seq_len, seed)
    model = make_model(factors, seed, where)
    prepare(model)
    session = TrainingSession(model, training_config(factors), where, seed)
    facts = describe(model, factors, features, complex_.content_hash)
    if session.host_store is not None:
        facts["offload"] = session.host_store.facts  # fills up during the steps
    resident = {name: value.to(where) for name, value in features.items()}
    return FixedCropWorkload(session, resident, facts, around_step)


def make_model(factors: Mapping[str, Scalar], seed: int, device: torch.device) -> AlphaFold3:
    """The preset's network with fresh float32 weights, made where it will live."""
    config = replace(preset(str(factors["preset"])), attention=cast(Attention, factors["attention"]))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), device:
        torch.manual_seed(derived_seed(seed, 0, "weights"))
        return AlphaFold3(config)


def training_config(factors: Mapping[str, Scalar]) -> TrainingConfig:
    """The step these factors mean."""

    def whole(name: str) -> int:
        return int(factors[name] or 0)

    return TrainingConfig(
        cycles=whole("cycles"),
        diffusion_samples=whole("diffusion_samples"),
        diffusion_chunk=whole("diffusion_chunk"),
        rollout_steps=whole("rollout_steps"),
        msa_rows=whole("msa_rows"),
        precision=precision_policy(str(factors["precision"])),
        checkpointing=check_mode(str(factors["checkpointing"])),
        graphs=bool(factors.get("graphs")),
        offload=bool(factors.get("offload")),
        weights=stage_weights(str(factors["stage"])),
        optimizer=OptimizerConfig(
            warmup_steps=whole("warmup_steps"), ema_decay=EMA_DECAY if factors["ema"] else None
        ),
    )


def describe(
    model: AlphaFold3, factors: Mapping[str, Scalar], features: Features, complex_hash: str
) -> dict[str, Any]:
    """What was built, for the record. `complex_hash` and ``crop_hash`` identify the input and the crop."""
    rows = features["msa"].shape[0]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "n_tokens": len(features["restype"]),
        "n_atoms": int(features["atom_mask"].sum()),
        "n_atoms_padded": len(features["atom_mask"]),
        "n_chains": len(features["asym_id"].unique()),
        "n_label_copies": features["label_positions"].shape[0],
        "n_atom_permutations": features["atom_permutations"].shape[0],
        "msa_depth": min(rows, int(factors["msa_rows"] or 0)),
        "msa_rows_available": rows,
        "n_templates": features["template_restype"].shape[0],
        "resolution_a": None if features["resolution"].isnan() else float(features["resolution"]),
        "input_hash": complex_hash,
        "crop_hash": features_hash(features),
        "losses": loss_names(training_config(factors).weights),
        **step_flops(model, training_config(factors), features),
    }


def step_flops(model: AlphaFold3, config: TrainingConfig, features: Features) -> dict[str, float]:
    """``model_flops_per_step``, the useful work, and ``step_flops``, recomputation included.

    All heads are counted, also in a stage that does not train the diffusion module.
    """
    size = ProblemSize(
        tokens=len(features["restype"]),
        atoms=len(features["atom_mask"]),
        msa_rows=min(config.msa_rows, features["msa"].shape[0]),
        templates=features["template_restype"].shape[0],
    )
    factors = StepFactors(
        cycles=config.cycles,
        samples=config.diffusion_samples,
        chunk=config.diffusion_chunk,
        rollout_steps=config.rollout_steps,
        checkpointing=config.checkpointing != "none",
    )
    flops = training_flops(forward_flops(model.config, size), factors)
    return {"model_flops_per_step": flops["model"], "step_flops": flops["total"]}


def features_hash(features: Features) -> str:
    """SHA-256 over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(features.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()

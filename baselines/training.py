"""One training step of AF3 (Algorithm 1 and SI 3.7, 4, 5) on one crop.

trunk → 20-step rollout → labels permuted to it → distogram and confidence losses → diffusion losses in
chunks → trunk backward → clip, Adam.

The trunk's outputs are leaves for everything after it. Each head runs its own backward at once and adds to
the leaves' gradients, and the trunk's backward comes last, so the activations of one diffusion chunk, of
the confidence head and of the trunk are never alive together.

Choices where the published trainers differ: labels permuted to the rollout serve every loss, diffusion
included, as in Protenix; the confidence head gets trunk outputs without gradient, as in Protenix; unresolved
atoms enter the diffusion at the centroid of the resolved ones. No loss is fetched by the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from baselines.af3.diffusion import DiffusionConditioning
from baselines.af3.model import AlphaFold3
from baselines.af3.msa import sample_rows
from baselines.af3.sampling import SamplingConfig, sample
from baselines.alignment import center_random_augmentation
from baselines.checkpointing import checkpoint_units, recomputed
from baselines.losses.confidence import confidence_losses
from baselines.losses.diffusion import (
    SIGMA_DATA,
    DiffusionTargets,
    diffusion_losses,
    diffusion_targets,
    edm_weight,
)
from baselines.losses.distogram import distogram_loss
from baselines.losses.labels import Features, Labels
from baselines.losses.weights import LossWeights
from baselines.offloading import host_store
from baselines.optim import Optimizer, OptimizerConfig
from baselines.permutation import permute_labels
from baselines.precision import POLICIES, PrecisionPolicy
from baselines.randomness import derived_seed, repeatable, stream
from baselines.replay import Recorder, Repeated

NOISE_LOG_MEAN, NOISE_LOG_STD = -1.2, 1.5
"""Training noise levels are σ_data · exp(−1.2 + 1.5·N(0, 1))."""

Losses = dict[str, Tensor]


@dataclass(frozen=True)
class TrainingConfig:
    """Everything about the step that is not the model."""

    cycles: int = 2
    diffusion_samples: int = 48
    diffusion_chunk: int = 4
    rollout_steps: int = 20
    msa_rows: int = 1024
    precision: PrecisionPolicy = POLICIES["bf16"]
    checkpointing: str = "block"
    graphs: bool = False
    """Whether the denoiser's repetitions are replayed from CUDA graphs: see `baselines.replay`."""
    offload: bool = False
    """Whether the trunk's and the confidence head's blocks keep their inputs in host memory: see `baselines.offloading`."""
    weights: LossWeights = field(default_factory=LossWeights)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True)
class TrunkOutput:
    """What the heads read: s_inputs [N, c_s_inputs], s [N, c_s], z [N, N, c_z]."""

    s_inputs: Tensor
    s: Tensor
    z: Tensor

    def leaves(self) -> TrunkOutput:
        """Detached float32 copies that collect gradients."""
        return TrunkOutput(*(t.detach().float().requires_grad_() for t in (self.s_inputs, self.s, self.z)))

    def detached(self) -> TrunkOutput:
        """The same without gradient."""
        return TrunkOutput(self.s_inputs.detach(), self.s.detach(), self.z.detach())


class TrainingSession:
    """A model, its optimiser and the streams of random numbers of one run."""

    def __init__(self, model: AlphaFold3, config: TrainingConfig, device: torch.device, seed: int) -> None:
        self.model = model.to(device).train()
        self.config, self.device, self.seed = config, device, seed
        self.optimizer = Optimizer(self.model.parameters(), config.optimizer)
        self._condition = self.model.diffusion.condition
        self._recorder = Recorder(device) if config.graphs else None
        self.host_store = host_store(device) if config.offload else None
        if config.checkpointing != "none":
            units = self.model.checkpoint_units()
            # The diffusion module's backward pass follows its forward pass at once.
            waiting = [unit for unit in units if not unit[0].startswith("diffusion.")]
            at_once = [unit for unit in units if unit[0].startswith("diffusion.")]
            checkpoint_units(waiting, config.checkpointing, self.host_store)
            checkpoint_units(at_once, config.checkpointing)
            self._condition = recomputed(self._condition, mode=config.checkpointing)

    def step(self, features: Features, index: int) -> Losses:
        """One optimiser step on features that are on the device; detached scalars, ``"loss"`` the total."""
        losses = self.backward(features, index)
        return {**losses, "grad_norm": self.optimizer.step(index)}

    def backward(self, features: Features, index: int) -> Losses:
        """Forward and backward of step `index`: leaves the gradients in the parameters."""
        self.optimizer.zero_grad()
        with torch.random.fork_rng(devices=_cuda_devices(self.device)), repeatable(self.device):
            torch.manual_seed(derived_seed(self.seed, index, "dropout"))
            return self._backward(features, index)

    def _backward(self, features: Features, index: int) -> Losses:
        weights = self.config.weights
        if self.host_store is not None:
            self.host_store.begin_step()
        trains_trunk = weights.diffusion > 0 or weights.distogram > 0
        trunk = self._trunk(features, index, trains_trunk)
        leaves = trunk.leaves()
        conditioning = self._conditioning(features, leaves, weights.diffusion > 0)
        fixed = DiffusionConditioning(*(t.detach() for t in conditioning))
        x = self._rollout(features, leaves.detached(), fixed, index)
        labels = permute_labels(x, features)
        losses = self._distogram(features, leaves, labels) | self._confidence(features, leaves, x, labels)
        if weights.diffusion > 0:
            losses |= self._diffusion(features, leaves, conditioning, labels, index)
        if trains_trunk:
            _backward_through(vars(trunk).values(), vars(leaves).values())
        return losses | {"loss": self._total(losses)}

    def _stream(self, index: int, purpose: str) -> torch.Generator:
        return stream(self.seed, index, purpose, self.device)

    def _trunk(self, features: Features, index: int, trains: bool) -> TrunkOutput:
        """Input embedding and all cycles; only the last cycle has gradient."""
        model, config = self.model, self.config
        rows = self._stream(index, "msa rows")
        with torch.set_grad_enabled(trains), config.precision.trunk(self.device):
            s_inputs = model.input_embedder(features)
        previous: tuple[Tensor, Tensor] | None = None
        for cycle in range(config.cycles):
            msa = sample_rows(features, config.msa_rows, rows)
            has_gradient = trains and cycle == config.cycles - 1
            with torch.set_grad_enabled(has_gradient), config.precision.trunk(self.device):
                previous = model.trunk(features, s_inputs, msa, previous)
        assert previous is not None
        return TrunkOutput(s_inputs, *previous)

    def _conditioning(self, features: Features, leaves: TrunkOutput, trains: bool) -> DiffusionConditioning:
        """The pair conditioning, which no noise level or coordinate enters: once for all samples."""
        with torch.set_grad_enabled(trains), self.config.precision.diffusion(self.device):
            return self._condition(features, leaves.s_inputs, leaves.s, leaves.z)

    def _rollout(
        self, features: Features, trunk: TrunkOutput, conditioning: DiffusionConditioning, index: int
    ) -> Tensor:
        """One structure by a short reverse diffusion (Algorithm 18) without gradient, [A, 3] float32."""

        def denoise(x_noisy: Tensor, t_hat: Tensor) -> Tensor:
            with self.config.precision.diffusion(self.device):
                return self.model.diffusion(
                    x_noisy, t_hat, features, trunk.s_inputs, trunk.s, trunk.z, conditioning
                )

        with torch.no_grad():
            schedule = SamplingConfig(steps=self.config.rollout_steps)
            generator = self._stream(index, "rollout")
            repeated = Repeated(denoise, self._recorder)
            return sample(repeated, features["atom_mask"], schedule, generator=generator)[0]

    def _distogram(self, features: Features, leaves: TrunkOutput, labels: Labels) -> Losses:
        weight = self.config.weights.distogram
        with torch.set_grad_enabled(weight > 0), torch.autocast(self.device.type, enabled=False):
            loss = distogram_loss(self.model.distogram_head(leaves.z), features, labels)
            if weight > 0:
                (weight * loss).backward()
        return {"distogram": loss.detach()}

    def _confidence(self, features: Features, leaves: TrunkOutput, x: Tensor, labels: Labels) -> Losses:
        """Losses of the confidence head on the rollout x [A, 3]; nothing flows back into the trunk."""
        weights, trunk = self.config.weights, leaves.detached()
        with self.config.precision.confidence(self.device):
            logits = self.model.confidence_head(features, trunk.s_inputs, trunk.s, trunk.z, x)
        losses = confidence_losses(logits, x, features, labels)
        total = losses.plddt + losses.pde + losses.resolved + weights.pae * losses.pae
        (weights.confidence * total).backward()
        return {name: value.detach() for name, value in vars(losses).items()}

    def _diffusion(
        self,
        features: Features,
        leaves: TrunkOutput,
        conditioning: DiffusionConditioning,
        labels: Labels,
        index: int,
    ) -> Losses:
        """Diffusion losses, chunk by chunk, each chunk's backward before the next one's forward."""
        config = self.config
        noised = noise_samples(labels, config.diffusion_samples, self._stream(index, "diffusion"))
        targets = diffusion_targets(features, labels, smooth_lddt=config.weights.smooth_lddt > 0)
        shared = DiffusionConditioning(*(t.detach().requires_grad_() for t in conditioning))
        trunk = leaves.leaves()  # of no other graph: a recording must not meet what other streams have begun

        def denoise(x_noisy: Tensor, t_hat: Tensor) -> Tensor:
            with config.precision.diffusion(self.device):
                return self.model.diffusion(
                    x_noisy, t_hat, features, trunk.s_inputs, trunk.s, trunk.z, shared
                )

        repeated = Repeated(denoise, self._recorder)
        sums: Losses = {}
        for start in range(0, config.diffusion_samples, config.diffusion_chunk):
            chunk = noised[start : start + config.diffusion_chunk]
            x = repeated(chunk.x_noisy, chunk.t_hat)
            parts = _diffusion_parts(x.float(), chunk, targets, config.weights)
            (parts["diffusion"] * (config.weights.diffusion / config.diffusion_samples)).backward()
            assert x.grad is not None
            repeated.backward(x.grad)
            sums = {name: sums.get(name, 0.0) + value.detach() for name, value in parts.items()}
        _backward_through(vars(leaves).values(), vars(trunk).values())
        _backward_through(conditioning, shared)
        return {name: value / config.diffusion_samples for name, value in sums.items()}

    def _total(self, losses: Mapping[str, Tensor]) -> Tensor:
        w = self.config.weights
        confidence = losses["plddt"] + losses["pde"] + losses["resolved"] + w.pae * losses["pae"]
        total = w.confidence * confidence + w.distogram * losses["distogram"]
        return total + w.diffusion * losses["diffusion"] if "diffusion" in losses else total


def loss_names(weights: LossWeights) -> list[str]:
    """Names of the losses that have a weight."""
    weighted = {
        "distogram": weights.distogram,
        "mse": weights.diffusion,
        "bond": weights.diffusion * weights.bond,
        "smooth_lddt": weights.diffusion * weights.smooth_lddt,
        "plddt": weights.confidence,
        "pde": weights.confidence,
        "resolved": weights.confidence,
        "pae": weights.confidence * weights.pae,
    }
    return [name for name, weight in weighted.items() if weight > 0]


@dataclass(frozen=True)
class NoisedSamples:
    """D training samples: moved truth and noisy input [D, A, 3], noise levels [D] in Å."""

    x_true: Tensor
    x_noisy: Tensor
    t_hat: Tensor

    def __getitem__(self, part: slice) -> NoisedSamples:
        """Some of the samples."""
        return NoisedSamples(self.x_true[part], self.x_noisy[part], self.t_hat[part])


@torch.no_grad()
def noise_samples(labels: Labels, count: int, generator: torch.Generator) -> NoisedSamples:
    """`count` copies of the truth, each with its own rotation, translation, noise level and noise.

    All are drawn at once, so that they do not depend on how they are cut into chunks.
    """
    device = labels.positions.device
    x_true = center_random_augmentation(labels.positions, labels.mask, count, generator)
    log_t = torch.randn(count, generator=generator, device=device) * NOISE_LOG_STD + NOISE_LOG_MEAN
    t_hat = SIGMA_DATA * log_t.exp()
    noise = torch.randn(x_true.shape, generator=generator, device=device)
    return NoisedSamples(x_true, x_true + noise * t_hat[:, None, None], t_hat)


def _diffusion_parts(x: Tensor, chunk: NoisedSamples, targets: DiffusionTargets, w: LossWeights) -> Losses:
    """Sums over the samples of a chunk; ``diffusion`` is the weighted one that is trained."""
    losses = diffusion_losses(x, chunk.x_true, targets)
    total = edm_weight(chunk.t_hat) * (losses.mse + w.bond * losses.bond) + w.smooth_lddt * losses.smooth_lddt
    return {"diffusion": total.sum()} | {name: value.sum() for name, value in vars(losses).items()}


def _backward_through(outputs: Iterable[Tensor], leaves: Iterable[Tensor]) -> None:
    """Continue backward from `outputs` with the gradients their `leaves` have collected."""
    pairs = [(o, leaf.grad) for o, leaf in zip(outputs, leaves, strict=True)]
    pairs = [(o, g.to(o.dtype)) for o, g in pairs if o.requires_grad and g is not None]
    torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])


def _cuda_devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []

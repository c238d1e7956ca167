"""Every loss against naive float64 loops."""

import math
from types import SimpleNamespace

import pytest
import torch

from baselines.alignment import random_rotations, weighted_rigid_align
from baselines.data.schema import DNA, LIGAND, RNA
from baselines.losses.confidence import aligned_errors, confidence_losses
from baselines.losses.diffusion import (
    diffusion_losses,
    diffusion_targets,
    edm_weight,
    ligand_polymer_bonds,
)
from baselines.losses.distogram import distogram_loss, pair_distances
from baselines.losses.labels import alignment_weights, masked_mean, own_labels
from baselines.losses.lddt import lddt_per_atom, smooth_lddt_loss, smooth_lddt_target
from tests.baselines.samples import make_features

NUCLEIC = (RNA, DNA)


@pytest.fixture
def features() -> dict:
    return make_features(dtype=torch.float64)


@pytest.fixture
def prediction(features: dict) -> torch.Tensor:
    noise = torch.randn(
        3, features["atom_mask"].shape[0], 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    )
    return own_labels(features).positions + 1.5 * noise


def kinds(features: dict) -> list[int]:
    return features["molecule_type"][features["atom_to_token"]].tolist()


def cross_entropy(logits: torch.Tensor, target: int) -> float:
    return float(torch.logsumexp(logits, -1) - logits[target])


def test_own_labels_are_each_chains_own(features: dict):
    labels = own_labels(features)
    assert not labels.mask[~features["atom_mask"]].any()
    for atom in range(len(labels.mask)):
        sym = int(features["sym_id"][features["atom_to_token"][atom]])
        if labels.mask[atom]:
            assert torch.equal(labels.positions[atom], features["label_positions"][sym, atom])
        else:
            assert labels.positions[atom].eq(0).all()


def test_masked_mean_ignores_what_is_masked():
    values = torch.tensor([1.0, float("nan"), 3.0])
    mask = torch.tensor([True, False, True])
    assert masked_mean(values, mask) == 2.0
    assert masked_mean(values, torch.zeros(3, dtype=torch.bool)) == 0.0


def test_distogram_against_loops(features: dict):
    n = features["restype"].shape[0]
    logits = torch.randn(n, n, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels, atoms = own_labels(features), features["representative_atom"].tolist()
    total, count = 0.0, 0
    for i in range(n):
        for j in range(n):
            if not (labels.mask[atoms[i]] and labels.mask[atoms[j]]):
                continue
            distance = float((labels.positions[atoms[i]] - labels.positions[atoms[j]]).norm())
            edges = [2.3125 + k * (21.6875 - 2.3125) / 62 for k in range(63)]
            total += cross_entropy(logits[i, j], sum(distance > e for e in edges))
            count += 1
    assert 0 < count < n * n
    assert distogram_loss(logits, features, labels).item() == pytest.approx(total / count, rel=1e-9)


def test_mse_against_loops(features: dict, prediction: torch.Tensor):
    labels = own_labels(features)
    targets = diffusion_targets(features, labels, smooth_lddt=False)
    truth = labels.positions.expand_as(prediction)
    losses = diffusion_losses(prediction, truth, targets)
    weight = {LIGAND: 11.0, RNA: 6.0, DNA: 6.0}
    for sample in range(3):
        w = torch.tensor([weight.get(k, 1.0) for k in kinds(features)], dtype=torch.float64)
        aligned = weighted_rigid_align(truth[sample], prediction[sample], w * labels.mask)
        terms = [
            float(w[a] * (prediction[sample, a] - aligned[a]).square().sum())
            for a in range(len(w))
            if labels.mask[a]
        ]
        assert losses.mse[sample].item() == pytest.approx(sum(terms) / len(terms) / 3, rel=1e-9)
    assert losses.smooth_lddt.eq(0).all()
    assert set(alignment_weights(features).tolist()) == {1.0, 6.0, 11.0}


def test_mse_is_blind_to_motion_not_to_mirrors(features: dict, prediction: torch.Tensor):
    targets = diffusion_targets(features, own_labels(features), smooth_lddt=True)
    truth = own_labels(features).positions.expand_as(prediction)
    before = diffusion_losses(prediction, truth, targets)
    turn = random_rotations(3, torch.Generator().manual_seed(1)).double()
    moved = prediction @ turn.transpose(-1, -2) + torch.tensor([[30.0, -20.0, 5.0]], dtype=torch.float64)
    after = diffusion_losses(moved, truth, targets)
    assert torch.allclose(before.mse, after.mse, rtol=1e-5)
    assert torch.allclose(before.bond, after.bond, rtol=1e-5)
    assert torch.allclose(before.smooth_lddt, after.smooth_lddt, rtol=1e-5)
    mirrored = diffusion_losses(prediction * torch.tensor([1.0, 1.0, -1.0]), truth, targets)
    assert (mirrored.mse > 3 * before.mse).all()
    assert torch.allclose(mirrored.smooth_lddt, before.smooth_lddt)


def test_alignment_carries_no_gradient(features: dict, prediction: torch.Tensor):
    targets = diffusion_targets(features, own_labels(features), smooth_lddt=False)
    truth = own_labels(features).positions.expand_as(prediction)
    x = prediction.clone().requires_grad_()
    diffusion_losses(x, truth, targets).mse.sum().backward()
    aligned = weighted_rigid_align(truth, prediction, targets.weights * targets.mask)
    expected = 2 * (prediction - aligned) * (targets.weights * targets.mask)[:, None] / 3 / targets.mask.sum()
    assert torch.allclose(x.grad, expected)


def test_bonds_join_the_nearest_atom_of_the_polymer(features: dict, prediction: torch.Tensor):
    labels = own_labels(features)
    pairs, mask = ligand_polymer_bonds(features, labels)
    token_bonds = features["token_bonds"].tolist()
    total, count = torch.zeros(3, dtype=torch.float64), 0
    kind = features["molecule_type"].tolist()
    for bond, (i, j) in enumerate(token_bonds):
        ligands = [t for t in (i, j) if kind[t] == LIGAND]
        if len(ligands) != 1:
            assert not mask[bond]
            continue
        ligand = int(features["center_atom"][ligands[0]])
        other = j if ligands[0] == i else i
        atoms = [a for a in range(96) if features["atom_to_token"][a] == other and labels.mask[a]]
        assert bool(mask[bond]) == (bool(labels.mask[ligand]) and bool(atoms))
        if not mask[bond]:
            continue
        distance = {a: float((labels.positions[a] - labels.positions[ligand]).norm()) for a in atoms}
        nearest = min(distance, key=distance.__getitem__)
        assert pairs[bond].tolist() == [ligand, nearest]
        total += ((prediction[:, ligand] - prediction[:, nearest]).norm(dim=-1) - distance[nearest]) ** 2
        count += 1
    assert count > 0
    targets = diffusion_targets(features, labels, smooth_lddt=False)
    losses = diffusion_losses(prediction, labels.positions.expand_as(prediction), targets)
    assert torch.allclose(losses.bond, total / count)


def test_no_bonds_no_loss(features: dict, prediction: torch.Tensor):
    features["token_bonds"] = features["token_bonds"][:0]
    labels = own_labels(features)
    targets = diffusion_targets(features, labels, smooth_lddt=False)
    losses = diffusion_losses(prediction, labels.positions.expand_as(prediction), targets)
    assert losses.bond.eq(0).all()


def test_smooth_lddt_against_loops(features: dict, prediction: torch.Tensor):
    labels, kind = own_labels(features), kinds(features)
    x = prediction[:1].clone().requires_grad_()
    loss = smooth_lddt_loss(x, smooth_lddt_target(features, labels))
    score, count = torch.zeros((), dtype=torch.float64), 0
    y = prediction[0].clone().requires_grad_()
    for a in range(96):
        for b in range(96):
            if a == b or not (labels.mask[a] and labels.mask[b]):
                continue
            true = (labels.positions[a] - labels.positions[b]).norm()
            if true < (30.0 if kind[a] in NUCLEIC else 15.0):
                error = ((y[a] - y[b]).norm() - true).abs()
                score = score + sum(torch.sigmoid(t - error) for t in (0.5, 1.0, 2.0, 4.0)) / 4
                count += 1
    oracle = 1 - score / count
    assert loss.item() == pytest.approx(oracle.item(), rel=1e-9)
    loss.sum().backward()
    oracle.backward()
    assert torch.allclose(x.grad[0], y.grad, atol=1e-12)


def test_smooth_lddt_keeps_one_sample_in_memory(features: dict, prediction: torch.Tensor):
    target = smooth_lddt_target(features, own_labels(features))
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        smooth_lddt_loss(prediction.clone().requires_grad_(), target)
    shared = target.distances.numel() + target.mask.numel()
    assert sum(saved.values()) < shared + 2 * prediction.numel()


def test_per_atom_lddt_against_loops(features: dict, prediction: torch.Tensor):
    labels, x = own_labels(features), prediction[0]
    value, mask = lddt_per_atom(x, features, labels)
    centers, kind = features["center_atom"].tolist(), features["molecule_type"].tolist()
    for a in range(96):
        scores = []
        for token, b in enumerate(centers):
            if a == b or kind[token] == LIGAND or not (labels.mask[a] and labels.mask[b]):
                continue
            true = float((labels.positions[a] - labels.positions[b]).norm())
            if true < (30.0 if kind[token] in NUCLEIC else 15.0):
                error = abs(float((x[a] - x[b]).norm()) - true)
                scores.append(sum(error < t for t in (0.5, 1, 2, 4)) / 4)
        assert bool(mask[a]) == bool(scores)
        if scores:
            assert value[a].item() == pytest.approx(sum(scores) / len(scores))
    perfect, _ = lddt_per_atom(labels.positions, features, labels)
    assert perfect[mask].eq(1).all()


def frame(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a, b, c = points
    w1, w2 = (a - b) / (a - b).norm(), (c - b) / (c - b).norm()
    e1 = (w1 + w2) / (w1 + w2).norm()
    e2 = (w2 - w1) / (w2 - w1).norm()
    return torch.stack([e1, e2, torch.linalg.cross(e1, e2)]), b


def random_logits(features: dict) -> SimpleNamespace:
    n, a = features["restype"].shape[0], features["atom_mask"].shape[0]
    g = torch.Generator().manual_seed(4)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return SimpleNamespace(plddt=make(a, 50), pae=make(n, n, 64), pde=make(n, n, 64), resolved=make(a, 2))


def test_confidence_losses_against_loops(features: dict, prediction: torch.Tensor):
    labels, x, logits = own_labels(features), prediction[0], random_logits(features)
    losses = confidence_losses(logits, x, features, labels)
    n = features["restype"].shape[0]
    rep, center, frames = (
        features[k].tolist() for k in ("representative_atom", "center_atom", "frame_atoms")
    )
    pde, pae = [], []
    for i in range(n):
        usable = bool(features["frame_mask"][i]) and bool(labels.mask[frames[i]].all())
        for j in range(n):
            if labels.mask[rep[i]] and labels.mask[rep[j]]:
                error = abs(
                    float(
                        (x[rep[i]] - x[rep[j]]).norm()
                        - (labels.positions[rep[i]] - labels.positions[rep[j]]).norm()
                    )
                )
                pde.append(cross_entropy(logits.pde[i, j], min(int(error / 0.5), 63)))
            if usable and labels.mask[center[j]]:
                (r, o), (s, p) = frame(x[frames[i]]), frame(labels.positions[frames[i]])
                error = float((r @ (x[center[j]] - o) - s @ (labels.positions[center[j]] - p)).norm())
                pae.append(cross_entropy(logits.pae[i, j], min(int(error / 0.5), 63)))
    lddt, mask = lddt_per_atom(x, features, labels)
    plddt = [cross_entropy(logits.plddt[a], min(int(lddt[a] * 50), 49)) for a in range(96) if mask[a]]
    resolved = [
        cross_entropy(logits.resolved[a], int(labels.mask[a])) for a in range(96) if features["atom_mask"][a]
    ]
    for name, terms in (("pde", pde), ("pae", pae), ("plddt", plddt), ("resolved", resolved)):
        assert terms
        assert getattr(losses, name).item() == pytest.approx(sum(terms) / len(terms), rel=1e-6), name


@pytest.mark.parametrize("resolution", [math.nan, 0.05, 4.5])
def test_confidence_needs_a_good_structure(features: dict, prediction: torch.Tensor, resolution: float):
    features["resolution"] = torch.tensor(resolution)
    losses = confidence_losses(random_logits(features), prediction[0], features, own_labels(features))
    assert losses.plddt == losses.pde == losses.resolved == losses.pae == 0


def test_aligned_error_is_zero_for_a_moved_truth(features: dict):
    labels = own_labels(features)
    turn = random_rotations(1, torch.Generator().manual_seed(1))[0].double()
    error, mask = aligned_errors(labels.positions @ turn.T + 4.0, features, labels)
    assert mask.any()
    assert error[mask].max() < 1e-5


def test_edm_weight():
    t = torch.tensor([0.5, 16.0, 100.0])
    assert torch.allclose(edm_weight(t), (t**2 + 256) / (t * 16) ** 2)


def test_pair_distance_gradient_is_finite_at_zero():
    x = torch.zeros(3, 3, requires_grad=True)
    pair_distances(x).sum().backward()
    assert x.grad.eq(0).all()

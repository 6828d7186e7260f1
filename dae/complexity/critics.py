"""Critics of two clouds, fitted on part of the rows: log-density ratios and 1-Lipschitz functions.

All rotations of the rows through the parts are fitted at once, as a stack of networks with a leading axis K: at these sizes
the cost of a step is launching operations, not arithmetic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dae.complexity.linear import clipped, sort_pairs

FOLDS = 4  # a rotation fits on two, selects on one and measures on one
SNAPSHOTS = 10  # per network, spread over its training
QUADRATIC_INPUTS = 12  # principal directions in the quadratic critic: 90 coefficients
LARGEST_LOGIT = 40.0  # in a regression: far beyond what samples support, yet correctable by a network, and finite if squared
GRADIENT_PENALTY = 10.0  # Gulrajani et al. 2017
RIDGES = (1e-1, 1e-2, 1e-3, 1e-5, 1e-8)  # strong to weak: each solution initialises the next


@dataclass(frozen=True)
class Parts:
    """P's and Q's rows in K rotations: for fitting [K, n, D], selecting [K, m, D] and measuring [K, m, D]."""

    fit: tuple[Tensor, Tensor]
    select: tuple[Tensor, Tensor]
    measure: tuple[Tensor, Tensor]

    def heldout(self) -> Tensor:
        """[K, R, D]: the selection and measuring rows, in the order of `split`."""
        return torch.cat([*self.select, *self.measure], dim=1)

    def split(self, values_R: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Split values [..., R] at `heldout`: P's and Q's for selecting, then P's and Q's for measuring."""
        return values_R.split([part.shape[1] for part in (*self.select, *self.measure)], dim=-1)


def parts_of(x_ND: Tensor, y_MD: Tensor, generator: torch.Generator) -> Parts:
    """Shuffle the rows, cut them into `FOLDS` folds, and measure on each fold once.

    Clouds of equal length are shuffled alike: if row n of one was generated from row n of the other, both are in the same part,
    and measuring rows stay independent of fitting rows.
    """
    longest = max(len(x_ND), len(y_MD))
    order = torch.randperm(longest, generator=generator)
    rotations = []
    for cloud_ND in (x_ND, y_MD):
        rows = order[order < len(cloud_ND)].to(cloud_ND.device)
        fold = len(rows) // FOLDS
        rolled_KND = torch.stack([cloud_ND[rows.roll(-k * fold)] for k in range(FOLDS)])
        rotations.append(rolled_KND.split([fold, fold, len(rows) - 2 * fold], dim=1))
    measure, select, fit = zip(*rotations, strict=True)
    return Parts(fit, select, measure)


def standardised(parts: Parts, isotropic: bool) -> tuple[Parts, Tensor]:
    """The parts less the mean and over the standard deviation of the rows to fit on, half P and half Q; and that scale [K, 1, D].

    An isotropic scale, one number per rotation [K, 1, 1], preserves distances up to this factor. Computed in float64, so that a
    cloud far from the origin keeps its digits; the result is float32.
    """
    fit_P, fit_Q = (part.double() for part in parts.fit)
    mean = (fit_P.mean(dim=1, keepdim=True) + fit_Q.mean(dim=1, keepdim=True)) / 2
    variance = ((fit_P - mean).square().mean(dim=1, keepdim=True) + (fit_Q - mean).square().mean(dim=1, keepdim=True)) / 2
    rounding = 1e-14 * (fit_P.abs().amax(dim=1, keepdim=True) + fit_Q.abs().amax(dim=1, keepdim=True))
    if isotropic:
        variance, rounding = variance.mean(dim=2, keepdim=True), rounding.amax(dim=2, keepdim=True)
    scale = variance.sqrt()
    scale = torch.where(scale > rounding, scale, 1.0)  # a constant coordinate stays constant

    def moved(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return ((pair[0] - mean) / scale).float(), ((pair[1] - mean) / scale).float()

    return Parts(moved(parts.fit), moved(parts.select), moved(parts.measure)), scale


def logistic_loss(logits_P: Tensor, logits_Q: Tensor) -> Tensor:
    """[K]: mean of log(1 + e^-l) over P's rows plus that of log(1 + e^l) over Q's; smallest at l = log p/q."""
    return F.softplus(-logits_P).mean(dim=-1) + F.softplus(logits_Q).mean(dim=-1)


def quadratic_logits(parts: Parts) -> tuple[Tensor, Tensor]:
    """Logistic regressions on all monomials of degree 1 and 2, one per ridge: at rows to fit on [C, K, N] and held out [C, K, R].

    Exact for two Gaussians. From `QUADRATIC_INPUTS` dimensions on of the leading principal directions only.
    """
    fit_KND, heldout_KRD = torch.cat(parts.fit, dim=1).double(), parts.heldout().double()
    # Whitened: differences in directions of small variance are as easy to find as others
    variances_KD, directions_KDD = torch.linalg.eigh(fit_KND.mT @ fit_KND / fit_KND.shape[1])
    variances_KD = torch.where(variances_KD > 1e-10 * variances_KD[:, -1:], variances_KD, 1.0)  # less is rounding
    directions_KDD = (directions_KDD / variances_KD[:, None].sqrt())[..., -QUADRATIC_INPUTS:]
    fit_KNF, heldout_KRF = monomials(fit_KND @ directions_KDD), monomials(heldout_KRD @ directions_KDD)
    mean, scale = fit_KNF.mean(dim=1, keepdim=True), fit_KNF.std(dim=1, keepdim=True)
    scale = torch.where(scale > 1e-6, scale, 1.0)
    fit_KNF, heldout_KRF = (F.pad((features - mean) / scale, (1, 0), value=1.0) for features in (fit_KNF, heldout_KRF))
    counts = [part.shape[1] for part in parts.fit]
    weights_N = torch.cat([torch.full((n,), 1 / n, dtype=fit_KNF.dtype, device=fit_KNF.device) for n in counts])
    labels_N = torch.arange(sum(counts), device=fit_KNF.device) < counts[0]
    coefficients_KF = fit_KNF.new_zeros(fit_KNF.shape[0], fit_KNF.shape[2])
    candidates = []
    for ridge in RIDGES:
        coefficients_KF = logistic_regression(fit_KNF, labels_N, weights_N, ridge, coefficients_KF)
        logits = [(features @ coefficients_KF[..., None])[..., 0] for features in (fit_KNF, heldout_KRF)]
        candidates.append([values.clamp(-LARGEST_LOGIT, LARGEST_LOGIT) for values in logits])
    fit_CKN, heldout_CKR = (torch.stack(logits) for logits in zip(*candidates, strict=True))
    return fit_CKN, heldout_CKR


def monomials(x_KND: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(x_KND.shape[2], x_KND.shape[2], device=x_KND.device)
    return torch.cat([x_KND, x_KND[..., rows] * x_KND[..., columns]], dim=2)


def logistic_regression(
    features_KNF: Tensor, labels_N: Tensor, weights_N: Tensor, ridge: float, start_KF: Tensor, iterations: int = 12
) -> Tensor:
    """Newton's method with the best of a few step lengths; column 0 is the constant and is not shrunk. Returns [K, F]."""
    penalty_F = torch.full_like(start_KF[0], ridge)
    penalty_F[0] = 1e-9  # keeps the Hessian regular if all logits are large
    signs_N = torch.where(labels_N, -1.0, 1.0).to(weights_N)
    lengths = torch.tensor([1.0, 0.5, 0.25, 0.0625, 0.0], dtype=start_KF.dtype, device=start_KF.device)

    def objective(coefficients_LKF: Tensor) -> Tensor:
        logits = torch.einsum("knf,lkf->lkn", features_KNF, coefficients_LKF)
        return F.softplus(signs_N * logits) @ weights_N + 0.5 * (penalty_F * coefficients_LKF.square()).sum(dim=-1)

    coefficients_KF = start_KF
    for _ in range(iterations):
        probability_KN = torch.sigmoid((features_KNF @ coefficients_KF[..., None])[..., 0])
        residual_KN = weights_N * (probability_KN - labels_N.to(weights_N))
        gradient_KF = (residual_KN[:, None] @ features_KNF)[:, 0] + penalty_F * coefficients_KF
        curvature_KN = weights_N * probability_KN * (1 - probability_KN)
        hessian_KFF = features_KNF.mT @ (curvature_KN[..., None] * features_KNF) + torch.diag(penalty_F)
        step_KF = torch.linalg.solve(hessian_KFF, gradient_KF)
        trials_LKF = coefficients_KF - lengths[:, None, None] * step_KF
        best_K = objective(trials_LKF).argmin(dim=0)
        coefficients_KF = trials_LKF[best_K, torch.arange(len(best_K), device=best_K.device)]
    return coefficients_KF


class Stack:
    """K parallel multilayer perceptrons [D, width, width, 1]: weights [K, in, out], biases [K, 1, out].

    With `radial` the input is (x cos t, |x| sin t) with a trained angle t, a 1-Lipschitz map, because piecewise linear functions
    approximate |x| slowly in many dimensions. `maxmin` sorts pairs of units and preserves gradient norms (Anil et al. 2019,
    "Sorting out Lipschitz function approximation"), so that networks with weights of norm 1 approximate every 1-Lipschitz
    function.
    """

    def __init__(
        self,
        count: int,
        inputs: int,
        width: int,
        generator: torch.Generator,
        device: torch.device,
        radial: bool = False,
        maxmin: bool = False,
    ) -> None:
        sizes = [inputs + radial, width, width, 1]
        self.maxmin = maxmin
        self.weights = [
            (torch.randn(count, a, b, generator=generator) / math.sqrt(a)).to(device).requires_grad_()
            for a, b in itertools.pairwise(sizes)
        ]
        self.biases = [torch.zeros(count, 1, b, device=device, requires_grad=True) for b in sizes[1:]]
        self.angles = [torch.full((count, 1, 1), math.pi / 4, device=device, requires_grad=True)] if radial else []

    @property
    def parameters(self) -> list[Tensor]:
        return self.weights + self.biases + self.angles

    def __call__(self, x_KND: Tensor) -> Tensor:
        """[K, N, D] -> [K, N]."""
        for angle in self.angles:
            radius_KN1 = (x_KND.square().sum(dim=2, keepdim=True) + 1e-12).sqrt()
            x_KND = torch.cat([angle.cos() * x_KND, angle.sin() * radius_KN1], dim=2)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x_KND = torch.baddbmm(bias, x_KND, weight)
            x_KND = sort_pairs(x_KND) if self.maxmin else F.silu(x_KND)
        return torch.baddbmm(self.biases[-1], x_KND, self.weights[-1])[..., 0]

    @torch.no_grad()
    def clip_norms_(self) -> None:
        """Clip the singular values of all weights at 1, exactly, which makes `maxmin` networks 1-Lipschitz."""
        for weight in self.weights:
            weight.copy_(clipped(weight, 1.0))


def gradient_norms(critic: Stack, x_KND: Tensor, create_graph: bool = False) -> Tensor:
    """[K, N]: norm of the critic's gradient at every point."""
    x_KND = x_KND.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(critic(x_KND).sum(), x_KND, create_graph=create_graph)
    return (gradient.square().sum(dim=-1) + 1e-12).sqrt()


def random_rows(part_KND: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """`size` random rows with replacement; the same numbers for all rotations, whose rows differ."""
    return part_KND[:, torch.randint(part_KND.shape[1], (size,), generator=generator).to(part_KND.device)]


def annealed(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, *schedules: torch.optim.lr_scheduler.LRScheduler) -> None:
    """One step of the optimiser, then of the schedules."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    for schedule in schedules:
        schedule.step()


def snapshots(
    network: Stack, optimizer: torch.optim.Optimizer, loss: Callable[[int], Tensor], points_KRD: Tensor, steps: int, free: int = 0
) -> Tensor:
    """Values [S, K, R] of a stack at the points after `SNAPSHOTS` of its training steps 1 ... `steps`, each on `loss(step)` [K].

    `maxmin` networks are clipped after each step except the first `free`, which have no snapshots.
    """
    schedule, found = annealed(optimizer, steps), []
    kept = {math.ceil(steps * i / SNAPSHOTS) for i in range(1, SNAPSHOTS + 1)}
    for step in range(1, steps + 1):
        descend(optimizer, loss(step).sum(), schedule)
        if step > free:
            if network.maxmin:
                network.clip_norms_()
            if step in kept:
                with torch.no_grad():
                    found.append(network(points_KRD))
    return torch.stack(found)


def ratio_candidates(parts: Parts, *, steps: int, batch_size: int, width: int, generator: torch.Generator) -> Tensor:
    """Candidates for l = log p/q at `parts.heldout()`, float64 [C, K, R], fitted by logistic loss on the fitting rows.

    The quadratic regressions; the best of them (by logistic loss on the selection rows) plus a network, at `SNAPSHOTS` of its
    steps; and the mean of the later half of these, which has less variance.
    """
    fit_CKN, heldout_CKR = quadratic_logits(parts)
    best_K = logistic_loss(*parts.split(heldout_CKR)[:2]).argmin(dim=0)
    base_KN, base_KR = (of_rotations(logits, best_K).float() for logits in (fit_CKN, heldout_CKR))
    bases = base_KN.split([part.shape[1] for part in parts.fit], dim=1)
    rows = [torch.cat([part, base[..., None]], dim=2) for part, base in zip(parts.fit, bases, strict=True)]
    heldout_KRD = parts.heldout()
    network = Stack(FOLDS, heldout_KRD.shape[2], width, generator, heldout_KRD.device)
    with torch.no_grad():  # starts at the regression, with sharp bends at many places: densities have edges
        network.weights[-1].zero_()
        network.weights[0].mul_(2)
        network.biases[0].add_(2 * torch.randn(network.biases[0].shape, generator=generator).to(network.biases[0]))

    def loss(step: int) -> Tensor:
        batch = torch.cat([random_rows(part, batch_size, generator) for part in rows], dim=1)
        return logistic_loss(*(batch[..., -1] + network(batch[..., :-1])).chunk(2, dim=1))

    optimizer = torch.optim.AdamW(network.parameters, lr=3e-3, weight_decay=1e-2)
    snapshots_CKR = (base_KR + snapshots(network, optimizer, loss, heldout_KRD, steps)).double()
    mean_1KR = snapshots_CKR[len(snapshots_CKR) // 2 :].mean(dim=0, keepdim=True)
    return torch.cat([heldout_CKR, snapshots_CKR, mean_1KR])


def of_rotations(values_CK: Tensor, choice_K: Tensor) -> Tensor:
    """[C, K, ...] -> [K, ...]: candidate choice_K[k] of each rotation k."""
    return values_CK[choice_K, torch.arange(len(choice_K), device=choice_K.device)]


def critic_loss(network: Stack, x_KBD: Tensor, y_KBD: Tensor, penalty: bool, generator: torch.Generator) -> Tensor:
    """[K]: E_Q f - E_P f, to be minimised, plus the penalty of a WGAN on gradients longer than 1.

    The penalty uses random points on the segments from row n of x to row n of y (Gulrajani et al. 2017, algorithm 1) and is
    one-sided (Petzka et al. 2018, arXiv 1709.08894): the two-sided one also penalises the short gradients of the optimal
    potential between two concentric scales, and finds a fifth of their distance.
    """
    values_P, values_Q = network(torch.cat([x_KBD, y_KBD], dim=1)).chunk(2, dim=1)
    loss_K = values_Q.mean(dim=1) - values_P.mean(dim=1)
    if penalty:
        t_KB1 = torch.rand(*x_KBD.shape[:2], 1, generator=generator).to(x_KBD)
        norms_KB = gradient_norms(network, x_KBD + t_KB1 * (y_KBD - x_KBD), create_graph=True)
        loss_K = loss_K + GRADIENT_PENALTY * F.relu(norms_KB - 1).square().mean(dim=1)
    return loss_K


def potential_candidates(
    parts: Parts, penalty: bool, *, steps: int, batch_size: int, width: int, generator: torch.Generator
) -> Tensor:
    """1-Lipschitz candidates for Kantorovich's potential at `parts.heldout()`, float64 [C, K, R].

    The projection on the difference of means, and sorting networks that maximise E_P f - E_Q f on the fitting rows, with singular
    values clipped at 1 after every step; with `penalty`, the first quarter of training has a gradient penalty instead, which
    guarantees nothing away from its sample points.
    """
    heldout_KRD = parts.heldout()
    difference_KD = (parts.fit[0].mean(dim=1) - parts.fit[1].mean(dim=1)).double()
    direction_KD = difference_KD / difference_KD.norm(dim=1, keepdim=True).clamp(min=1e-30)
    linear_1KR = (heldout_KRD.double() @ direction_KD[..., None])[None, ..., 0]
    network = Stack(FOLDS, heldout_KRD.shape[2], width, generator, heldout_KRD.device, radial=True, maxmin=True)
    free = steps // 4 if penalty else 0

    def loss(step: int) -> Tensor:
        x_KBD, y_KBD = (random_rows(part, batch_size, generator) for part in parts.fit)
        return critic_loss(network, x_KBD, y_KBD, step <= free, generator)

    optimizer = torch.optim.Adam(network.parameters, lr=2e-2, betas=(0.5, 0.9))
    return torch.cat([linear_1KR, snapshots(network, optimizer, loss, heldout_KRD, steps, free).double()])

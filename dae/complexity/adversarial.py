"""Distances that are a supremum over critics: f-divergences (Nowozin et al. 2016) and Wasserstein-1 (Arjovsky et al. 2017).

P is the law of the data x and Q that of the generated points y, in every name and formula of this file.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dae.complexity import critics
from dae.complexity.critics import Parts, Stack, logistic_loss, potential_candidates, ratio_candidates, standardised
from dae.complexity.distances import PLAIN, check_name
from dae.complexity.estimate import CRITIC_ROWS, Estimate, check_cloud, check_seeds, pooled_error
from dae.complexity.families import GeneratorFamily, check_count, check_family
from dae.precision import own_arithmetic

RATIO_PENALTY = 0.05  # on squared gradients of the generator's density-ratio critic
ROWS_TO_CHOOSE_ON = 4096  # rows to choose among trained generators
SHRINKAGE = (1.0, 0.9, 0.75, 0.5)  # of the logarithm of an overfitted density ratio


@dataclass(frozen=True)
class Divergence:
    """An f-divergence as E_P[T] - E_Q[f*(T)] at T = f'(e^l), with l an estimate of log p/q, and the loss of a generator of Q.

    `on_P` is T and `on_Q` is f*(T) as functions of l. The losses have the direction of the gradient of -E_Q[f*(T)]; where that
    vanishes for a confident critic, they are its logarithm over the batch, or Goodfellow's (2014) -log D.
    """

    on_P: Callable[[Tensor], Tensor]
    on_Q: Callable[[Tensor], Tensor]
    generator_loss: Callable[[Tensor], Tensor]
    convention: str

    def bound(self, l_P: Tensor, l_Q: Tensor) -> Tensor:
        return self.on_P(l_P).mean(dim=-1) - self.on_Q(l_Q).mean(dim=-1)


TABLE = {
    "js": Divergence(
        lambda l_P: (math.log(2) + F.logsigmoid(l_P)) / 2,
        lambda l_Q: -(math.log(2) + F.logsigmoid(-l_Q)) / 2,
        lambda l_Q: F.softplus(-l_Q).mean(),
        "1/2 KL(P|M) + 1/2 KL(Q|M), M = (P + Q)/2, natural logarithms, in [0, log 2]",
    ),
    "kl": Divergence(
        lambda l_P: l_P,
        torch.expm1,
        lambda l_Q: -torch.logsumexp(l_Q, dim=-1).mean(),
        "KL(P|Q) = int p log(p/q), natural logarithms",
    ),
    "reverse_kl": Divergence(
        lambda l_P: -torch.expm1(-l_P), lambda l_Q: l_Q, lambda l_Q: -l_Q.mean(), "KL(Q|P) = int q log(q/p), natural logarithms"
    ),
    "chi2": Divergence(
        lambda l_P: 2 * torch.expm1(l_P),
        lambda l_Q: torch.expm1(2 * l_Q),
        lambda l_Q: -torch.logsumexp(2 * l_Q, dim=-1).mean(),
        "Pearson's: int (p - q)^2 / q",
    ),
    "hellinger": Divergence(
        lambda l_P: -torch.expm1(-l_P / 2),
        lambda l_Q: torch.expm1(l_Q / 2),
        lambda l_Q: -torch.logsumexp(l_Q / 2, dim=-1).mean(),
        "squared: int (sqrt p - sqrt q)^2, in [0, 2]",
    ),
}
DIVERGENCES = tuple(TABLE)
# What critics of 1,000 rows miss, one sample
LOSS = {
    name: f"too small in many dimensions (N(0, I) against N(0, 4 I), N = 1000: by {loss} % in 8, 16 and 32)"
    for name, loss in {"wgan_gp": "9, 19 and 38", "wgan_sn": "4, 12 and 37"}.items()
}
WASSERSTEIN = tuple(LOSS)
ADVERSARIAL = DIVERGENCES + WASSERSTEIN


@own_arithmetic(gradients=True)
def adversarial_distance(
    x_ND: Tensor, y_MD: Tensor, name: str, *, seeds: Sequence[int] = (0, 1, 2), steps: int = 200, batch_size: int = 256
) -> Estimate:
    """Lower bound of a divergence or Wasserstein-1 distance from samples, measured on rows that no critic was fitted on.

        f-divergence:  D_f(P|Q) >= E_P[T] - E_Q[f*(T)] for every T; here T = f'(e^l) with l an estimate of log p/q
        Wasserstein-1: W1(P, Q) >= E_P[f] - E_Q[f] for every 1-Lipschitz f

    Rows are shuffled by the seed: critics are fitted on one half, selected on a quarter and measured on the last quarter. Four
    rotations measure every row once, and their mean is the value of that seed; so more seeds remove the randomness of splits and
    networks, but not that of the sample.

    js, kl, reverse_kl, chi2, hellinger: l is a logistic regression on monomials of degree 2, with or without a network added,
    whichever has the lower logistic loss on the selection rows. l is clamped at 1/2 log(N E_P[p/q]), and likewise below, where
    less than one point of the other cloud is expected. Negative values become 0, which T = 0 attains.
    wgan_sn: a network that is 1-Lipschitz by its weights (singular values clipped, units sorted). wgan_gp: the same network
    with the gradient penalty in the first quarter of its training, and clipped from then on, because a penalty guarantees
    nothing away from its sample points. Both may instead be the projection on the difference of means, W1 of a pure shift.

    In expectation over samples the value is a lower bound (except for the cut at 0), as every critic is fixed before it is
    measured; a single value may exceed the truth by its sampling error. `standard_error` is that of T and f*(T), or f, over the
    rows; with heavy tails (kl, chi2) it is too small, as the decisive rows may be missing.

    A critic that misses a difference makes the value too small. kl needs E_Q[p/q] and chi2 E_Q[(p/q)^2], which depend on a few
    rows if the ratio is large; if E_Q[(p/q)^2] is infinite (s1^2 >= 2 s2^2 for two Gaussians), so is the standard error of kl. No
    sample of N can certify a kl much above log N (McAllester & Stratos 2020), so disjoint supports, with infinite kl and chi2,
    have a finite value. One outlier a million times as far out as the rest halves js and hides everything from chi2.
    docs/latents.md has measured errors.

    Args:
        x_ND: rows of P, the data [N, ...], floating, at least 32; flattened.
        y_MD: rows of Q, the generated points [M, ...] of the same size per row, at least 32. If M = N both are shuffled alike, so
            that a reconstruction falls in the same part as its original.
        name: "js", "kl", "reverse_kl", "chi2", "hellinger" (invariant to units and origin), "wgan_gp" or "wgan_sn" (in the
            units of x).
        seeds: for splits and networks; the global random state is not used.
        steps: training steps of the networks.
        batch_size: rows per cloud and step.

    Returns:
        `Estimate` with bound "lower", the standard error, and counts of rows of x in a rotation.

    Raises:
        TypeError: no tensors, or not floating.
        ValueError: an unknown name, NaN or infinity, fewer than 32 rows, rows of different sizes or on two devices, no seed, or
            no steps.

    Source: Nowozin et al. 2016, arXiv 1606.00709, section 2; Gulrajani et al. 2017, arXiv 1704.00028; Miyato et al. 2018, arXiv
    1802.05957; Anil et al. 2019, arXiv 1811.05381.
    """
    check_critic(name, x=x_ND, y=y_MD)
    if x_ND.shape[1:] != y_MD.shape[1:]:
        raise ValueError(
            f"expected rows of one size, got x {list(x_ND.shape)} and y {list(y_MD.shape)}; compare points of one space"
        )
    if x_ND.device != y_MD.device:
        raise ValueError(f"expected x and y on one device, got {x_ND.device} and {y_MD.device}; move one with .to()")
    seeds = check_seeds(seeds)
    check_count("steps", steps)
    check_count("batch_size", batch_size)
    # At most 1, so that no square overflows
    unit = max(x_ND.abs().max().item(), y_MD.abs().max().item()) or 1.0
    x_ND, y_MD = (cloud.detach().flatten(1).to(torch.promote_types(cloud.dtype, torch.float32)) / unit for cloud in (x_ND, y_MD))
    options = {"steps": steps, "batch_size": batch_size}
    if name in TABLE:
        found = [divergence(x_ND, y_MD, TABLE[name], seed, options) for seed in seeds]
        convention = TABLE[name].convention
    else:
        found = [wasserstein(x_ND, y_MD, name == "wgan_gp", seed, options) for seed in seeds]
        found = [(unit * value, unit * error) for value, error in found]
        convention = "Wasserstein-1, the cost |x - y| not squared, in the units of the data, " + LOSS[name]
    fold, (values, errors) = len(x_ND) // critics.FOLDS, zip(*found, strict=True)
    facts = {"convention": convention + "; P = data, Q = generated", "counts": (len(x_ND) - 2 * fold, fold)}
    return Estimate.over(values, seeds, bound="lower", distance=name, standard_error=pooled_error(errors), **facts)


def divergence(x_ND: Tensor, y_MD: Tensor, kind: Divergence, seed: int, options: dict) -> tuple[float, float]:
    """The value and its standard error."""
    generator = torch.Generator().manual_seed(seed)
    parts, _ = standardised(critics.parts_of(x_ND, y_MD, generator), isotropic=False)
    logits_CKR = ratio_candidates(parts, width=64, generator=generator, **options)
    logits_CKR = torch.cat([shrinkage * logits_CKR for shrinkage in SHRINKAGE])
    # By logistic loss, which no single row dominates; with heavy tails the bound itself is too noisy to select by
    logits_KR = critics.of_rotations(logits_CKR, logistic_loss(*parts.split(logits_CKR)[:2]).argmin(dim=0))
    select_P, select_Q, measure_P, measure_Q = parts.split(clamped(logits_KR, parts))
    return pooled(kind.bound(select_P, select_Q), kind.on_P(measure_P), kind.on_Q(measure_Q))


def clamped(logits_KR: Tensor, parts: Parts) -> Tensor:
    """Logits [K, R] clamped where less than one point of the other cloud is expected, by the selection rows."""
    select_P, select_Q, _, _ = parts.split(logits_KR)
    rows_P, rows_Q = (sum(part[cloud].shape[1] for part in (parts.fit, parts.select, parts.measure)) for cloud in (0, 1))
    highest_K1 = (math.log(rows_Q) + log_mean_exp(select_P)) / 2
    lowest_K1 = -(math.log(rows_P) + log_mean_exp(-select_Q)) / 2
    return logits_KR.clamp(lowest_K1, highest_K1)


def pooled(selected_K: Tensor, terms_P: Tensor, terms_Q: Tensor) -> tuple[float, float]:
    """Mean over rotations of the mean of P's terms [K, n] less that of Q's [K, m], and its standard error.

    Rotations with no more than 0 on the selection rows count as 0, but the error includes them. Clouds of equal length were
    shuffled alike: their rows count as pairs, which may be dependent.
    """
    measured_K = terms_P.mean(dim=1) - terms_Q.mean(dim=1)
    apart = (terms_P - terms_Q,) if terms_P.shape == terms_Q.shape else (terms_P, terms_Q)
    variance = torch.stack([terms.var(dim=1).mean() / terms.numel() for terms in apart]).sum()
    return max(0.0, torch.where(selected_K > 0, measured_K, 0.0).mean().item()), variance.sqrt().item()


def log_mean_exp(values: Tensor) -> Tensor:
    return torch.logsumexp(values, dim=-1, keepdim=True) - math.log(values.shape[-1])


def wasserstein(x_ND: Tensor, y_MD: Tensor, penalty: bool, seed: int, options: dict) -> tuple[float, float]:
    """The value and its standard error."""
    generator = torch.Generator().manual_seed(seed)
    parts, scale_K11 = standardised(critics.parts_of(x_ND, y_MD, generator), isotropic=True)
    values_CKR = scale_K11[..., 0] * potential_candidates(parts, penalty, width=32, generator=generator, **options)
    select_P, select_Q, _, _ = (part.mean(dim=-1) for part in parts.split(values_CKR))
    selected_K, best_K = (select_P - select_Q).max(dim=0)
    _, _, measure_P, measure_Q = parts.split(critics.of_rotations(values_CKR, best_K))
    return pooled(selected_K, measure_P, measure_Q)


def check_critic(name: str, **clouds: Tensor) -> None:
    """ValueError or TypeError unless `name` is a critic's distance and each cloud has enough rows for one."""
    check_name(name)
    if name in PLAIN:
        raise ValueError(
            f"{name} needs no critic: call dae.complexity.generator_distance, or dae.complexity.make_distance({name!r}, data)"
        )
    for role, cloud in clouds.items():
        check_cloud(role, cloud)
        if len(cloud) < CRITIC_ROWS:
            raise ValueError(
                f"{role}: expected at least {CRITIC_ROWS} rows, of which a part is to fit a critic on, one to choose and one to "
                f"measure, got {len(cloud)}; add rows, or use a distance without a critic (sinkhorn, energy)"
            )


@own_arithmetic(gradients=True)
def train_adversarial(
    family: GeneratorFamily,
    latents: Tensor,
    data: Tensor,
    name: str,
    *,
    seed: int,
    steps: int = 1000,
    batch_size: int = 256,
    learning_rates: tuple[float, float] = (2e-2, 1e-2),
) -> nn.Module:
    """A generator of a family trained against a critic: inf over g of sup over T, by alternating steps.

    The critic of an f-divergence is a density ratio fitted by logistic loss with a penalty on its gradients (Mescheder et al.
    2018), and the generator minimises the divergence's own loss (`Divergence.generator_loss`); that of a Wasserstein distance
    is a network with gradient penalty or spectral norm, three steps per generator step. Learning rates decay to 0 as a cosine.
    Alternating steps may cycle, so a fresh critic on the training rows selects among the initial generator, the last one and
    the average of the weights over the second half of training.

    Args:
        family: of generators; `family.constrain_` follows each of its steps.
        latents: [N, ...], floating, finite.
        data: [M, ...], floating, finite; rows are not paired.
        name: as in `adversarial_distance`.
        seed: for weights, batches and the generator's own randomness; the global random state is not used.
        steps: of the generator.
        batch_size: rows of each kind in a step.
        learning_rates: Adam's, of generator and critic, for data of unit scale.

    Returns:
        The generator in eval mode. Measure its distance with `adversarial_distance`, which fits a fresh critic.

    Raises:
        TypeError, ValueError: as `adversarial_distance`, or the family cannot map the shapes.
        FloatingPointError: the training diverged.
    """
    check_critic(name, latents=latents, data=data)
    check_family("family", family)
    check_count("steps", steps)
    check_count("batch_size", batch_size)
    exact_ND = data.flatten(1).double()
    center_1D = exact_ND.mean(dim=0, keepdim=True)
    variance_1D = (exact_ND - center_1D).square().mean(dim=0, keepdim=True)
    scale_1D = (variance_1D.mean(dim=1, keepdim=True) if name in WASSERSTEIN else variance_1D).sqrt()
    scale_1D = torch.where(scale_1D > 0, scale_1D, 1.0)
    real = ((exact_ND - center_1D) / scale_1D).float()
    with torch.random.fork_rng(devices=[data.device] if data.is_cuda else []):
        torch.manual_seed(seed)
        start = family.start(latents, data)
        family.constrain_(start)
        module = copy.deepcopy(start).train()
        adversary = Adversary(name, real.shape[1], data.device, learning_rates[1], steps, torch.Generator().manual_seed(seed))
        randomness = torch.Generator().manual_seed(seed + 1)
        optimizer = torch.optim.Adam(module.parameters(), lr=learning_rates[0], betas=(0.5, 0.99))
        schedule = critics.annealed(optimizer, steps)
        average = torch.optim.swa_utils.AveragedModel(module, use_buffers=True)

        def draw() -> tuple[Tensor, Tensor]:
            z = critics.random_rows(latents[None], batch_size, randomness)[0]
            fake = (module(z).flatten(1) - center_1D) / scale_1D
            return critics.random_rows(real[None], batch_size, randomness), fake[None].float()

        for step in range(steps):
            for _ in range(3 if name in WASSERSTEIN else 1):
                with torch.no_grad():
                    real_1BD, fake_1BD = draw()
                adversary.step(real_1BD, fake_1BD)
            _, fake_1BD = draw()
            loss = adversary.generator_loss(fake_1BD)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"{name}: the generator's loss is {loss.item()} at step {step}; lower learning_rates")
            critics.descend(optimizer, loss, schedule, adversary.schedule)
            family.constrain_(module)
            if step >= steps // 2:
                average.update_parameters(module)
        family.constrain_(average.module)

        def distance(candidate: nn.Module) -> float:
            with torch.no_grad():
                generated = candidate(latents[:ROWS_TO_CHOOSE_ON])
            rows = data[:ROWS_TO_CHOOSE_ON]
            return adversarial_distance(rows, generated.to(data.dtype), name, seeds=(seed,), steps=100).value

        return min((candidate.eval() for candidate in (average.module, module, start)), key=distance)


class Adversary:
    """A critic in training: a density ratio for the divergences, Kantorovich's potential for the Wasserstein distances."""

    def __init__(
        self, name: str, inputs: int, device: torch.device, learning_rate: float, steps: int, generator: torch.Generator
    ) -> None:
        self.name, self.generator = name, generator
        potential = name in WASSERSTEIN
        self.network = Stack(1, inputs, 32 if potential else 64, generator, device, radial=potential, maxmin=name == "wgan_sn")
        self.optimizer = torch.optim.Adam(self.network.parameters, lr=learning_rate, betas=(0.5, 0.99))
        self.schedule = critics.annealed(self.optimizer, steps)

    def step(self, real_1BD: Tensor, fake_1BD: Tensor) -> None:
        if self.name in TABLE:
            both = torch.cat([real_1BD, fake_1BD], dim=1)
            loss = logistic_loss(*self.network(both).chunk(2, dim=1))
            loss = loss + RATIO_PENALTY * critics.gradient_norms(self.network, both, create_graph=True).square().mean(dim=1)
        else:
            loss = critics.critic_loss(self.network, real_1BD, fake_1BD, self.name == "wgan_gp", self.generator)
        critics.descend(self.optimizer, loss.sum())
        if self.name == "wgan_sn":
            self.network.clip_norms_()

    def generator_loss(self, fake_1BD: Tensor) -> Tensor:
        values_1B = self.network(fake_1BD)
        return TABLE[self.name].generator_loss(values_1B) if self.name in TABLE else -values_1B.mean()

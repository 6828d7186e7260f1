"""Predictors: numbers computed from a latent before a prior is trained on it, one function each.

The functions take tensors on the CPU: latents [N, D, h, w], code indices [N, h, w], images [N, C, H, W]. Those with a training
and a held-out set fit on the first and measure on the second. `dae.diagnostics.report_card` combines them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from dae_kernels import energy_distance, sliced_wasserstein
from torch import Tensor, nn

from dae.config import PriorConfig
from dae.models.ar_prior import ARPrior
from dae.precision import own_arithmetic

PERTURBATION = 0.1  # of a latent channel's standard deviation
CONCENTRATIONS = (1.0, 4.0, 16.0, 64.0, 256.0)  # of the n-gram's back-off
SHRINKAGES = (1e-3, 1e-2, 1e-1, 0.5, 1.0)  # of a covariance towards its diagonal
PENALTIES = (1e-6, 1e-4, 1e-2, 1e-1, 1.0)  # of ridge regression, an image and a feature of variance 1
PRIOR_STEPS, PRIOR_TOKENS, PRIOR_PASSES = 150, 1024, 8  # of the tiny Transformer: at most so many, and tokens a step
MLP_STEPS, MLP_BATCH, MLP_WIDTH = 400, 128, 64


# ---- code length of the latent ----


@own_arithmetic(gradients=False)
def ngram_bits(train_Nhw: Tensor, heldout_Mhw: Tensor, codebook_size: int) -> float:
    """Bits per held-out image under an n-gram of the left and upper neighbours; lower is better.

        p(t | l, u) = (n(l, u, t) + c (p(t | l) + p(t | u)) / 2) / (n(l, u) + c)
        p(t | l)    = (n(l, t) + c p(t)) / (n(l) + c),  p(t | u) likewise,   p(t) = (n(t) + 1) / (n + K)

    with counts n over the training images; outside the border the neighbour is an extra code. c is the best of
    `CONCENTRATIONS` for the training tokens, each coded with counts that leave it out.

    Args:
        train_Nhw, heldout_Mhw: int64 codes in 0..codebook_size - 1.

    Returns:
        -sum of log2 p over the h w tokens, averaged over the held-out images.

    Source: ours; the back-off is Witten and Bell's interpolation with a constant instead of the number of followers.
    """
    # Codes that occur, numbered anew: a context of three of 2^24 codes has no number in 64 bits.
    occurring, numbers = torch.cat([train_Nhw.flatten(), heldout_Mhw.flatten()]).unique(return_inverse=True)
    parts = numbers[: train_Nhw.numel()].view(train_Nhw.shape), numbers[train_Nhw.numel() :].view(heldout_Mhw.shape)
    train, heldout = (_context_keys(x, len(occurring)) for x in parts)

    def bits(queries: dict[str, Tensor], left_out: int, concentration: float) -> float:
        n = {name: _counts(train[name], queries[name]).double() - left_out for name in queries}
        p = (n["t"] + 1) / (train["t"].numel() - left_out + codebook_size)
        left, up = ((n[f"{k}t"] + concentration * p) / (n[k] + concentration) for k in ("l", "u"))
        return -((n["lut"] + concentration * (left + up) / 2) / (n["lu"] + concentration)).log2().sum().item()

    best = min(CONCENTRATIONS, key=lambda c: bits(train, 1, c))
    return bits(heldout, 0, best) / len(heldout_Mhw)


def _context_keys(codes_Nhw: Tensor, codebook_size: int) -> dict[str, Tensor]:
    """One integer per token, per context and per pair of both; for counting."""
    K = codebook_size
    left = torch.nn.functional.pad(codes_Nhw[:, :, :-1], (1, 0), value=K)
    up = torch.nn.functional.pad(codes_Nhw[:, :-1], (0, 0, 1, 0), value=K)
    both = left * (K + 1) + up
    keys = {"t": codes_Nhw, "l": left, "u": up, "lu": both, "lt": left * K + codes_Nhw, "ut": up * K + codes_Nhw}
    return {name: key.flatten() for name, key in (keys | {"lut": both * K + codes_Nhw}).items()}


def _counts(keys: Tensor, queries: Tensor) -> Tensor:
    """How often each query occurs among the keys."""
    values, counts = keys.unique(return_counts=True)
    place = torch.searchsorted(values, queries).clamp(max=len(values) - 1)
    return torch.where(values[place] == queries, counts[place], 0)


@own_arithmetic(gradients=True)
def tiny_transformer_bits(
    train_Nhw: Tensor, heldout_Mhw: Tensor, codebook_size: int, *, seed: int, factors: Sequence[int] | None = None
) -> float:
    """Bits per held-out image under a very small autoregressive Transformer trained for a second; lower is better.

        -sum over t of log2 p(token_t | token_<t), a mean over the held-out images, tokens in raster order

    Width 32, depth 1, no classes; `PRIOR_STEPS` steps of AdamW on about `PRIOR_TOKENS` tokens each, but at most `PRIOR_PASSES`
    passes over the training images, so that it does not memorise a small set. It ranks latents by how fast they are learned and
    does not estimate a fully trained prior.

    Args:
        train_Nhw, heldout_Mhw: int64 codes in 0..codebook_size - 1.
        seed: for weights and batches.
        factors: as of `ARPrior`; None for one head.
    """
    train_NT, heldout_MT = train_Nhw.flatten(1), heldout_Mhw.flatten(1)
    N, T = train_NT.shape
    batch_size = max(1, min(PRIOR_TOKENS // T, N // 16))
    config = PriorConfig(width=32, depth=1, num_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = ARPrior(config, vocab_size=codebook_size, sequence_length=T, num_classes=1, factors=factors)

    def loss(tokens_BT: Tensor) -> Tensor:
        return model(torch.zeros(len(tokens_BT), dtype=torch.int64), tokens_BT[:, :-1], targets_BT=tokens_BT)

    steps = min(PRIOR_STEPS, PRIOR_PASSES * N // batch_size)
    minimise(model, lambda rows_B: loss(train_NT[rows_B]), N, steps=steps, batch_size=batch_size, learning_rate=1e-2, seed=seed)
    with torch.no_grad():
        nats = sum(loss(tokens_BT).double().item() * len(tokens_BT) for tokens_BT in heldout_MT.split(256))
    return nats / len(heldout_MT) * T / math.log(2)


def minimise(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    count: int,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    validate: Callable[[], float] | None = None,
) -> None:
    """Minimise `loss(rows_B)` by AdamW, batches drawn with replacement from `count` rows; linear warm-up, then a cosine to 0.

    With `validate` the weights with its smallest value are kept, among the initial ones and those after each tenth of the steps.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    best, kept = math.inf, {}
    for step in range(steps + 1):
        if validate is not None and (step % max(1, steps // 10) == 0 or step == steps):
            with torch.no_grad():
                value = validate()
            if value < best:
                best, kept = value, {name: x.clone() for name, x in model.state_dict().items()}
        if step == steps:
            break
        warmth = min(1.0, 10 * (step + 1) / steps)
        optimizer.param_groups[0]["lr"] = learning_rate * warmth * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        with torch.enable_grad():
            loss(torch.randint(count, (batch_size,), generator=generator)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.load_state_dict(kept or model.state_dict())


@own_arithmetic(gradients=False)
def gaussian_prior_bits(
    train_mean: Tensor, train_log_variance: Tensor, heldout_mean: Tensor, heldout_log_variance: Tensor
) -> float:
    """Bits per held-out latent under the best Gaussian prior with full covariance; lower is better.

        E KL(q(z|x) || N(m, S)) / log 2,   m = E mean,   S = Cov(mean) + diag E variance   over the training images,

    the code length under bits-back coding: unlike a density, it is invariant to scaling. The covariance is shrunk
    towards its diagonal, S_a = (1 - a) S + a diag S; a is the one of `SHRINKAGES` with the shortest code for the last fifth of
    the training images, under the moments of the others.

    Args:
        train_mean, train_log_variance: of the posteriors of training images [N, D, h, w], N >= 5; heldout_...: [M, D, h, w].

    Source: ours; bits back: Hinton and van Camp 1993, "Keeping Neural Networks Simple by Minimizing the Description Length".
    """
    mean, other_mean = (x.double().flatten(1) for x in (train_mean, heldout_mean))
    variance, other_variance = (x.double().exp().flatten(1) for x in (train_log_variance, heldout_log_variance))
    cut = len(mean) - len(mean) // 5

    def bits(moments: tuple[Tensor, Tensor], mean_MP: Tensor, variance_MP: Tensor, shrinkage: float) -> float:
        centre, S = moments
        S = (1 - shrinkage) * S + shrinkage * S.diagonal().diag()
        factor = torch.linalg.cholesky(S)
        inverse = torch.cholesky_inverse(factor)
        away = mean_MP - centre
        nats = ((away @ inverse) * away).sum(1) + variance_MP @ inverse.diagonal() - S.shape[0]
        nats = nats + 2 * factor.diagonal().log().sum() - variance_MP.log().sum(1)
        return nats.mean().item() / (2 * math.log(2))

    first = _moments(mean[:cut], variance[:cut])
    best = min(SHRINKAGES, key=lambda a: bits(first, mean[cut:], variance[cut:], a))
    return bits(_moments(mean, variance), other_mean, other_variance, best)


def _moments(mean_NP: Tensor, variance_NP: Tensor) -> tuple[Tensor, Tensor]:
    return mean_NP.mean(0), torch.cov(mean_NP.T, correction=0).reshape(mean_NP.shape[1], -1) + variance_NP.mean(0).diag()


# ---- the shape of the latent's distribution ----


@own_arithmetic(gradients=False)
def spectrum(latents: Tensor) -> Tensor:
    """Eigenvalues of the covariance of the flattened latents, largest first, float64, without those below 1e-9 of the largest.

    N latents give at most N - 1. Empty if the latents are constant.
    """
    x_NP = latents.double().flatten(1)
    x_NP = x_NP - x_NP.mean(0)
    gram = (x_NP.T @ x_NP if x_NP.shape[1] <= len(x_NP) else x_NP @ x_NP.T) / len(x_NP)
    values = torch.linalg.eigvalsh(gram).flip(0)
    return values[(values > 1e-9 * values[0]) & (values > 0)]


@own_arithmetic(gradients=False)
def spectrum_slope(eigenvalues: Tensor) -> float | None:
    """Slope b of the least-squares line log l_i = a + b log i through the eigenvalues l_1 >= l_2 >= ...; lower is steeper.

    A power law l_i = i^-s has slope -s; equal eigenvalues have slope 0. Only eigenvalues above a thousandth of the largest
    count, as smaller ones reflect rounding and the finite sample. None for fewer than 3.
    """
    eigenvalues = eigenvalues[eigenvalues > 1e-3 * eigenvalues.max()] if len(eigenvalues) else eigenvalues
    if len(eigenvalues) < 3:
        return None
    x = torch.arange(1, len(eigenvalues) + 1, dtype=torch.float64).log()
    x = x - x.mean()
    return (x @ eigenvalues.log() / x.square().sum()).item()


def effective_dimension(eigenvalues: Tensor) -> float | None:
    """Participation ratio (sum l)^2 / sum l^2 of the eigenvalues: k equal ones give k; lower is simpler. None if empty."""
    return (eigenvalues.sum().square() / eigenvalues.square().sum()).item() if len(eigenvalues) else None


# ---- sensitivity to changes ----


@own_arithmetic(gradients=False)
def perturb(latents: Tensor, *, seed: int, size: float = PERTURBATION) -> Tensor:
    """z + size * s_d * noise, with s_d the standard deviation of channel d over images and positions, noise N(0, 1)."""
    deviation_D = latents.movedim(1, 0).flatten(1).std(1, correction=0)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    return latents + size * deviation_D[:, None, None] * noise


@own_arithmetic(gradients=False)
def relative_change(changed: Tensor, original: Tensor) -> float | None:
    """sqrt(E|changed - original|^2 / E|original - E original|^2); lower is smoother. None if all originals are equal.

    `perturb` by a tenth gives 0.1 for a decoder that copies independent latent values.
    """
    changed, original = changed.double(), original.double()
    scale = (original - original.mean(0)).square().sum()
    return ((changed - original).square().sum() / scale).sqrt().item() if scale > 0 else None


@own_arithmetic(gradients=False)
def equivariance_error(of_moved: Tensor, moved: Tensor) -> float | None:
    """sqrt(E|encode(T x) - T encode(x)|^2 / (V(encode(T x)) + V(T encode(x)))), V(z) = E|z - E z|^2; lower is better.

    0: the latent moves with the image. 1: as far off as latents of unrelated images. None if both are constant.

    Args:
        of_moved, moved: encode(T x) and T encode(x), [M, D, h, w].

    Source: ours; after Kouzelis et al. 2025, "EQ-VAE", which rotates and scales.
    """
    a, b = of_moved.double(), moved.double()
    scale = sum((z - z.mean(0)).square().sum() for z in (a, b))
    return ((a - b).square().sum() / scale).sqrt().item() if scale > 0 else None


def shift_images(images: Tensor, pixels: int) -> Tensor:
    """Images shifted to the right; their first column is repeated on the left."""
    return torch.cat([images[..., :1].expand(*images.shape[:-1], pixels), images[..., :-pixels]], dim=-1)


@own_arithmetic(gradients=False)
def midpoints(latents: Tensor, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Midpoints between each latent and a random other one, with the rows of both ends.

    The partner of row p(i) is row p(i + 1) of a random permutation p, so each image is used twice, never with itself.
    """
    order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(seed))
    partner = order.roll(-1)
    return (latents[order] + latents[partner]) / 2, order, partner


@own_arithmetic(gradients=False)
def energy_coefficient(x: Tensor, y: Tensor) -> float | None:
    """Energy distance relative to the distance between the sets: 0 for equal distributions, 1 for two distinct points.

        (2 E|x - y| - E|x - x'| - E|y - y'|) / (2 E|x - y|)     None if all points of both sets are equal

    of images [N, ...] and [M, ...].

    Source: Szekely and Rizzo 2013, "Energy statistics: a class of statistics based on distances" (coefficient H).
    """
    x, y = x.double().flatten(1), y.double().flatten(1)
    across = torch.cdist(x, y).mean().item()
    return energy_distance(x, y).item() / (2 * across) if across > 0 else None


# ---- simple models on the latent ----


class Ridge:
    """Ridge regression y = a + z W on standardised latents, with the penalty chosen by leave-one-out error.

        W = argmin sum_n |y_n - a - z_n W|^2 + N penalty |W|^2

    The leave-one-out error of image n is its residual over 1 - h_n, h_n its leverage, so one decomposition serves all
    `PENALTIES`. One-hot targets use the same squared error. Constant latent values have no influence. `residuals` [N, Q] are
    the leave-one-out errors.

    Args:
        latents, targets: [N, ...]; flattened.

    Source: Golub, Heath and Wahba 1979, "Generalized Cross-Validation as a Method for Choosing a Good Ridge Parameter".
    """

    def __init__(self, latents: Tensor, targets: Tensor):
        x_NP, y_NQ = latents.double().flatten(1), targets.double().flatten(1)
        N = len(x_NP)
        deviation = x_NP.std(0, correction=0)
        self.centre, self.scale = x_NP.mean(0), torch.where(deviation > 0, deviation, torch.inf)
        self.offset = y_NQ.mean(0)
        x_NP, y_NQ = (x_NP - self.centre) / self.scale, y_NQ - self.offset
        # U with x x^T = U diag(l) U^T, from the smaller of the two Gram matrices.
        narrow = x_NP.shape[1] <= N
        values, vectors = torch.linalg.eigh(x_NP.T @ x_NP if narrow else x_NP @ x_NP.T)
        kept = (values > 1e-12 * values[-1]) & (values > 0)
        values, vectors = values[kept], vectors[:, kept]
        U_NR = x_NP @ vectors / values.sqrt() if narrow else vectors
        projected_RQ, leverage_NR = U_NR.T @ y_NQ, U_NR.square()

        def left_out(penalty: float) -> Tensor:
            share_R = values / (values + N * penalty)
            residual_NQ = y_NQ - U_NR @ (share_R[:, None] * projected_RQ)
            rest_N = (1 - 1 / N - leverage_NR @ share_R).clamp(min=1e-9)
            return residual_NQ / rest_N[:, None]

        self.penalty = min(PENALTIES, key=lambda penalty: left_out(penalty).square().mean().item())
        self.residuals = left_out(self.penalty)
        self.weight = x_NP.T @ (U_NR @ (projected_RQ / (values + N * self.penalty)[:, None]))

    def __call__(self, latents: Tensor) -> Tensor:
        """[M, ...] to predictions [M, Q], float64."""
        return self.offset + (latents.double().flatten(1) - self.centre) / self.scale @ self.weight


@own_arithmetic(gradients=False)
def probe_accuracy(train: Tensor, train_labels: Tensor, heldout: Tensor, heldout_labels: Tensor) -> float:
    """Held-out accuracy of a linear probe on the latent; higher is better.

    The probe is `Ridge` from latents to one-hot classes, fitted on the training images; the largest output wins.
    """
    classes = train_labels.unique()
    scores = Ridge(train, train_labels[:, None] == classes)(heldout)
    return (classes[scores.argmax(1)] == heldout_labels).double().mean().item()


@own_arithmetic(gradients=True)
def mlp_distance(linear: Ridge, train: Tensor, heldout: Tensor, heldout_images: Tensor, *, seed: int) -> float:
    """D^G for linear maps plus one hidden layer: held-out mean squared error per pixel value; lower is better.

        g(z) = a + z W + V silu(U z + b),   U: P -> 64,   trained from g = the ridge solution, on paired latents and images

    The gain over linear maps shows how much a little nonlinearity helps. The hidden layer learns the leave-one-out residuals of
    the ridge regression; a random fifth of the images selects the checkpoint, which may be the initial one.

    Args:
        linear: fitted on the same training latents and their images.
        train, heldout: latents [N, ...] and [M, ...], N >= 5.
        heldout_images: [M, ...].
        seed: for weights, batches and the choice.
    """
    rest_NQ, N = linear.residuals.float(), len(train)
    x_NP, z_MP = (((x.double().flatten(1) - linear.centre) / linear.scale).float() for x in (train, heldout))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = nn.Sequential(nn.Linear(x_NP.shape[1], MLP_WIDTH), nn.SiLU(), nn.Linear(MLP_WIDTH, rest_NQ.shape[1]))
    for parameter in model[2].parameters():
        nn.init.zeros_(parameter)
    aside, rows = torch.randperm(N, generator=torch.Generator().manual_seed(seed)).split([N // 5, N - N // 5])

    def loss(rows_B: Tensor) -> Tensor:
        return (model(x_NP[rows_B]) - rest_NQ[rows_B]).square().mean()

    minimise(model, lambda chosen_B: loss(rows[chosen_B]), len(rows), steps=MLP_STEPS, batch_size=MLP_BATCH, learning_rate=3e-3,
        seed=seed, validate=lambda: loss(aside).item())  # fmt: skip
    with torch.no_grad():
        made = linear(heldout) + model(z_MP).double()
    return mean_squared_error(made, heldout_images)


@own_arithmetic(gradients=False)
def mean_squared_error(made: Tensor, images: Tensor) -> float:
    """Mean of the squared difference over all values; images in [-1, 1], so black against white gives 4."""
    return (made.double().flatten(1) - images.double().flatten(1)).square().mean().item()


@own_arithmetic(gradients=False)
def sliced_distance(made: Tensor, images: Tensor, *, seed: int) -> float:
    """Sliced 2-Wasserstein distance of two sets of images: root of `dae_kernels.sliced_wasserstein`, 128 directions."""
    generator = torch.Generator().manual_seed(seed)
    return sliced_wasserstein(made.double().flatten(1), images.double().flatten(1), generator=generator).item()

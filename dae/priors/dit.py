"""dit: Diffusion Transformer over a continuous latent; its loss and score, and its flow between noise and latents."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dae.config import Config, PriorConfig, SamplingConfig
from dae.distributed import as_single_process, world_size
from dae.losses import flow_matching_loss
from dae.metrics import bits_back
from dae.models import DiT
from dae.precision import ordinary, wide
from dae.priors.family import SCORE_BATCH, PriorFamily, draw_augmentations, latent_shape
from dae.quantizers import latent_statistics
from dae.seeding import seed_for

if TYPE_CHECKING:
    from dae.data.cache import EncodedDataset, EncodingCache

LIKELIHOOD_STEPS = 32  # of the ODE solver that computes the bits per image
LIKELIHOOD_IMAGES = 256  # largest number of held-out images that it is computed on


class DiffusionTransformer(PriorFamily[DiT]):
    """Diffusion Transformer with flow matching over a continuous latent."""

    name, model, discrete = "dit", DiT, False
    criterion, costly_bits = "loss", True
    head_unit = 4  # rotary positions turn pairs, in two axes
    sampling_knobs = ("cfg_scale", "num_inference_steps")
    title, tags = "Diffusion Transformer", ("flow-matching", "image-generation")
    imports, usage = "sample_latents", "autoencoder.decode(sample_latents(prior, labels, num_inference_steps=32)).sample"
    noun = "a Diffusion Transformer with flow matching"
    learned = "a Diffusion Transformer, the prior, learned to turn pure noise into such a latent, step by step"
    loss_name, best = "flow-matching loss", "lowest held-out loss"
    loss_meaning = (
        "The prior sees a latent mixed with noise and estimates the way from the one to the other; the loss is its mean "
        "squared error. Nobody can undo the mixture exactly, so the loss does not reach 0."
    )

    def build(self, settings: PriorConfig, cache: EncodingCache) -> DiT:
        """A new model with the mean and standard deviation of this autoencoder's latent."""
        prior = DiT(settings, **latent_shape(cache))
        prior.set_latent_statistics(*latent_statistics(cache.train.values_NC))
        return prior

    def loss(self, model: Callable[..., Tensor], prior: DiT, batch: dict[str, Tensor]) -> Tensor:
        """`flow_matching_loss` of each image's posterior, with class dropout."""
        mean, variance = normalised_posteriors(prior, draw_augmentations(batch["moments"]))
        return flow_matching_loss(model, mean, prior.drop_labels(batch["label"]), variance_BDhw=variance)

    @torch.no_grad()
    def score(self, prior: DiT, encoded: EncodedDataset, config: Config) -> float:
        """`flow_matching_loss`, at the same times and noise whenever it is called."""
        prior.eval()
        device, total = prior.latent_mean.device, 0.0
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), as_single_process():
            torch.manual_seed(seed_for(config.seed, "prior", "validation"))
            plain = encoded.values_NC[:, 0]
            for labels, moments in zip(encoded.labels_N.split(SCORE_BATCH), plain.split(SCORE_BATCH), strict=True):
                mean, variance = normalised_posteriors(prior, moments.to(device))
                total += flow_matching_loss(prior, mean, labels.to(device), variance_BDhw=variance).item() * len(labels)
        return total / len(encoded)

    def bits_per_image(self, prior: DiT, encoded: EncodedDataset, config: Config) -> float:
        """See `dae.metrics.bits_back`; of `LIKELIHOOD_IMAGES` images at most.

        After a short training of fewer: they cost `LIKELIHOOD_STEPS` evaluations each, together no more than the training did.
        """
        prior.eval()
        settings = config.prior
        trained = settings.max_train_steps * settings.train_batch_size * settings.gradient_accumulation_steps * world_size()
        order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(seed_for(config.seed, "prior", "bits")))
        rows, device = order[: min(LIKELIHOOD_IMAGES, max(1, trained // LIKELIHOOD_STEPS))], prior.latent_mean.device
        labels_N = encoded.labels_N[rows].to(device)
        generator = torch.Generator(device).manual_seed(seed_for(config.seed, "prior", "likelihood"))

        def log_prob(latents: Tensor) -> Tensor:
            batches = zip(latents.split(SCORE_BATCH), labels_N.split(SCORE_BATCH), strict=True)
            steps = LIKELIHOOD_STEPS
            return torch.cat([log_likelihood(prior, x, y, num_steps=steps, generator=generator) for x, y in batches])

        mean, log_variance = encoded.values_NC[rows, 0].to(device).chunk(2, dim=1)
        return bits_back(mean, log_variance, log_prob, generator)

    def sample(self, prior: DiT, labels_B: Tensor, settings: SamplingConfig, generator: torch.Generator) -> Tensor:
        options = {knob: getattr(settings, knob) for knob in self.sampling_knobs}
        return sample_latents(prior, labels_B, **options, generator=generator)


def normalised_posteriors(prior: DiT, moments_BEhw: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [B, D, h, w] of cached posteriors, in the prior's scale."""
    mean, log_variance = moments_BEhw.chunk(2, dim=1)
    return prior.normalise(mean), log_variance.exp() / prior.latent_std.square()


@torch.no_grad()  # not inference_mode: its tensors cannot be trained on
def sample_latents(
    dit: DiT,
    labels_B: Tensor,
    *,
    num_inference_steps: int,
    cfg_scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Latents [B, D, h, w] drawn from p(latent | label), in the autoencoder's own scale and the model's dtype.

    The ODE dx/dt = v(x, t, label) from noise at t = 1 to a latent at t = 0, by the midpoint rule: two evaluations a step, an
    error that falls with the square of the steps, and no evaluation at t = 0, where the velocity of a sharp latent is steepest.

        x_mid = x - (s / 2) v(x, t),    x <- x - s v(x_mid, t - s / 2),    s = 1 / num_inference_steps

    Guidance (Ho & Salimans 2022): v = null + cfg_scale * (conditional - null), so 1 is the model itself and 0 ignores the class.

    Args:
        dit: in evaluation mode.
        labels_B: int64 classes, on the model's device; `dit.null_class` samples without class.
        num_inference_steps: steps of the solver.
        generator: on the model's device; its state decides the result.

    Raises:
        ValueError: labels outside the classes, no steps, a negative guidance, guidance of a prior without class dropout, or
            latents with NaN or infinity.
    """
    check_steps("num_inference_steps", num_inference_steps)
    if not 0 <= cfg_scale < math.inf:
        raise ValueError(f"cfg_scale must be finite and not negative, got {cfg_scale}")
    dit.check_labels(labels_B)
    dit.check_guidance(cfg_scale)
    shape = (len(labels_B), dit.latent_channels, dit.latent_size, dit.latent_size)
    x = torch.randn(shape, generator=generator, device=dit.device, dtype=wide(dit.dtype))
    step = 1 / num_inference_steps
    for i in range(num_inference_steps):
        t = 1 - i * step
        middle = x - step / 2 * guided_velocity(dit, x, t, labels_B, cfg_scale)
        x = x - step * guided_velocity(dit, middle, t - step / 2, labels_B, cfg_scale)
    if not x.isfinite().all():
        raise ValueError("sample_latents got NaN or infinity; look for a diverged prior, or lower cfg_scale")
    return dit.denormalise(x).to(dit.dtype)


def guided_velocity(dit: DiT, x_BDhw: Tensor, t: float, labels_B: Tensor, cfg_scale: float) -> Tensor:
    """null + cfg_scale * (conditional - null), both in one batch; with a scale of 1 the conditional velocity alone.

    Of the dtype of x, which is that of the solver; the model computes in its own.
    """
    x = x_BDhw.to(dit.dtype)
    if cfg_scale == 1:
        return dit(x, x_BDhw.new_full((len(x),), t), labels_B).to(x_BDhw.dtype)
    labels = torch.cat([labels_B, torch.full_like(labels_B, dit.null_class)])
    velocities = dit(x.repeat(2, 1, 1, 1), x_BDhw.new_full((len(labels),), t), labels)
    conditional, null = velocities.to(x_BDhw.dtype).chunk(2)
    return null + cfg_scale * (conditional - null)


def log_likelihood(
    dit: DiT,
    latents_BDhw: Tensor,
    labels_B: Tensor,
    *,
    num_steps: int,
    num_probes: int | None = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """log p(latent | label) [B] in nats, a density in the autoencoder's own scale.

        log p(z) = log N(x(1); 0, I) + int_0^1 div v(x(t), t) dt - h w sum_D log std_D,    x(0) = (z - mean) / std

    along dx/dt = v(x, t, label), by the midpoint rule for both. The divergence is exact, one backward pass for each of the
    D h w dimensions, or Hutchinson's estimate e' (dv/dx) e with random signs e, which is unbiased for the divergence, with new
    signs at each step, so that their errors average out. What remains is the solver's error: double `num_steps` to see it.
    Guidance has no part in it: a guided velocity is not that of p(latent | label).

    Args:
        dit: in evaluation mode.
        latents_BDhw: in the autoencoder's own scale.
        labels_B: int64 classes, on the model's device; `dit.null_class` gives p(latent).
        num_steps: steps of the solver, of two evaluations each.
        num_probes: random signs a step, each a backward pass; None takes the exact divergence.
        generator: of the signs, on the model's device.

    Returns:
        [B], without gradient, at least float32. Divide by log 2 for bits.

    Raises:
        TypeError, ValueError: latents of another shape or type, another number of labels, labels outside the classes, or no
            steps or probes.

    Source: Chen et al. 2018, arXiv 1806.07366, theorem 1 (instantaneous change of variables); Grathwohl et al. 2019, arXiv
    1810.01367, section 3.1 (Hutchinson's estimate).
    """
    check_steps("num_steps", num_steps)
    if num_probes is not None:
        check_steps("num_probes", num_probes)
    dit.check_latents(latents_BDhw)
    dit.check_labels(labels_B)
    if labels_B.shape != latents_BDhw.shape[:1]:
        raise ValueError(f"expected a label for each of {len(latents_BDhw)} latents, got {list(labels_B.shape)}")
    step = 1 / num_steps
    with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode have no derivatives
        latents_BDhw, labels_B = ordinary((latents_BDhw, labels_B))
        x = dit.normalise(latents_BDhw.to(wide(latents_BDhw.dtype)))
        volume = -latents_BDhw[0, 0].numel() * dit.latent_std.log().sum() if len(x) else 0
        change = x.new_zeros(len(x))
        for i in range(num_steps):
            t = i * step
            middle = x + step / 2 * guided_velocity(dit, x, t, labels_B, 1.0)
            velocity, divergence = velocity_and_divergence(dit, middle, t + step / 2, labels_B, num_probes, generator)
            x, change = x + step * velocity, change + step * divergence
        return -0.5 * (x.square() + math.log(2 * math.pi)).sum((1, 2, 3)) + change + volume


def velocity_and_divergence(
    dit: DiT, x_BDhw: Tensor, t: float, labels_B: Tensor, num_probes: int | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """v [B, D, h, w] and sum_i dv_i / dx_i [B]: exact by unit vectors (num_probes None), or estimated by random signs."""
    with torch.enable_grad():
        x = x_BDhw.detach().requires_grad_()
        velocity = guided_velocity(dit, x, t, labels_B, 1.0)
    if num_probes is None:
        dimensions = x[0].numel() if len(x) else 0
        probes = torch.eye(dimensions, device=x.device, dtype=x.dtype).view(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
        weight = 1.0
    else:
        bits = torch.randint(2, (num_probes, *x.shape), generator=generator, device=x.device)
        probes, weight = (2 * bits - 1).to(x.dtype), 1 / num_probes
    divergence = x.new_zeros(len(x))
    for probe in probes:  # rows are independent, so one backward pass serves the whole batch
        [product] = torch.autograd.grad(velocity, x, probe, retain_graph=True)
        divergence += weight * (product * probe).sum((1, 2, 3))
    return velocity.detach(), divergence


def check_steps(name: str, count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}")

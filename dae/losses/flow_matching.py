"""Flow matching: regression of the velocity of straight paths between data and noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from dae_kernels.checks import check_floating
from torch import Tensor

from dae.distributed import draw_rows
from dae.precision import ordinary, wide


def flow_matching_loss(
    model: Callable[..., Tensor],
    latents_BDhw: Tensor,
    labels_B: Tensor,
    *,
    variance_BDhw: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean squared error of the velocity at one random time of each latent's path.

        x_t = (1 - t) x + t noise,    loss = mean |model(x_t, t, label) - (noise - x)|^2,    t ~ U[0, 1], noise ~ N(0, I)

    Its minimum is E[noise - x | x_t], whose ODE carries noise to latents. Where the encoder gives not a latent but a posterior
    x ~ N(mean, variance), what this alone adds to the target is integrated out:

        x_t = (1 - t) mean + s xi,    s^2 = t^2 + (1 - t)^2 variance,    xi ~ N(0, I)
        loss = mean |model(x_t, t, label) - E[noise - x | x_t, mean]|^2,    E[...] = (t - (1 - t) variance) / s xi - mean

    x_t is distributed as before and the minimum is the same (tower property), with less noise in the gradient: none at all in
    channels that the encoder leaves to N(0, I). Where most of a latent is the posterior's noise, small models learn little
    without this.

    t is uniform and not logit-normal, as where samples alone count (Esser et al. 2024): the ends decide the likelihood, and the
    solver's steps are equal, so all times count alike. The times of a batch are spread evenly over [0, 1] (one shift for all),
    which makes the loss vary less from batch to batch.

    Args:
        model: called as model(x_BDhw, t_B, labels_B), a `dae.models.DiT` or a wrapper of one.
        latents_BDhw: clean latents or the means of posteriors, normalised (`DiT.normalise`), of the dtype that the model takes;
            16 bits are widened for all but the model.
        labels_B: int64 classes, some of them hidden (`DiT.drop_labels`).
        variance_BDhw: of the posteriors, in the same scale squared, not negative; None for latents that are known.
        generator: on the latents' device; None draws from the global one. Drawn for the global batch (`draw_rows`).

    Returns:
        A scalar of at least float32; for known latents it does not reach 0, as noise and latent cannot both be read off x_t.

    Raises:
        TypeError: latents that are not floating.
        ValueError: not [B, D, h, w] with B >= 1, another number of labels, or variances of another shape.

    Source: Lipman et al. 2023, arXiv 2210.02747, section 4.1 (optimal transport path, sigma_min = 0); Liu et al. 2023, arXiv
    2209.03003, equation 1; evenly spread times: Kingma et al. 2021, arXiv 2107.00630, appendix I.1.
    """
    check_floating("flow_matching_loss", "latents", latents_BDhw, "it has no tokens")
    if latents_BDhw.ndim != 4 or len(latents_BDhw) == 0 or labels_B.shape != latents_BDhw.shape[:1]:
        raise ValueError(
            "expected latents [B, D, h, w] with B >= 1 and a label for each, "
            f"got latents {list(latents_BDhw.shape)} and labels {list(labels_B.shape)}"
        )
    latents_BDhw, labels_B, variance_BDhw = ordinary((latents_BDhw, labels_B, variance_BDhw))
    dtype, latents_BDhw = latents_BDhw.dtype, latents_BDhw.to(wide(latents_BDhw.dtype))
    options = {"device": latents_BDhw.device, "dtype": latents_BDhw.dtype, "generator": generator}
    if variance_BDhw is not None and variance_BDhw.shape != latents_BDhw.shape:
        raise ValueError(f"expected a variance for each of {list(latents_BDhw.shape)} latents, got {list(variance_BDhw.shape)}")
    noise = draw_rows(torch.randn, latents_BDhw.shape, **options)
    t_B = draw_rows(even_times, labels_B.shape, **options)
    t = t_B[:, None, None, None]
    scale, target = t, noise - latents_BDhw
    if variance_BDhw is not None:
        scale = (t.square() + (1 - t).square() * variance_BDhw).sqrt().clamp_min(torch.finfo(t.dtype).tiny)
        target = (t - (1 - t) * variance_BDhw) / scale * noise - latents_BDhw
    velocity = model(((1 - t) * latents_BDhw + scale * noise).to(dtype), t_B, labels_B)
    return (velocity.to(wide(velocity.dtype)) - target).square().mean()


def even_times(shape: tuple[int], **options) -> Tensor:
    """Stratified times [n]: (u + i / n) mod 1 with one u ~ U[0, 1]; each is uniform, and together they cover the interval."""
    (n,) = shape
    steps = torch.arange(n, device=options["device"], dtype=options["dtype"]) / n
    return (torch.rand(1, **options) + steps) % 1

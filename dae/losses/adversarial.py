"""GAN losses, LeCam and R1 regularisation, and the adaptive weight of VQGAN (Esser et al. 2021, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dae.distributed import sum_over_processes, world_size

GAN_LOSSES = ("hinge", "non_saturating", "least_squares")


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: str = "hinge") -> Tensor:
    """1/2 (mean a(real) + mean b(fake)), a scalar.

        hinge (Lim & Ye 2017, arXiv 1705.02894):                 a(r) = max(0, 1 - r),   b(f) = max(0, 1 + f)
        non_saturating (Goodfellow et al. 2014, section 3):      a(r) = -log sigmoid(r), b(f) = -log sigmoid(-f)
        least_squares (Mao et al. 2017, arXiv 1611.04076):       a(r) = (r - 1)^2,       b(f) = f^2

    ValueError: another `kind`.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())
    if kind == "non_saturating":
        return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())
    if kind == "least_squares":
        return 0.5 * ((real_logits - 1).square().mean() + fake_logits.square().mean())
    raise ValueError(f"expected a loss of {GAN_LOSSES}, got {kind!r}")


def generator_loss(fake_logits: Tensor, kind: str = "hinge") -> Tensor:
    """Mean of -f (hinge), -log sigmoid(f) (non_saturating) or 1/2 (f - 1)^2 (least_squares). ValueError: another `kind`."""
    if kind == "hinge":
        return -fake_logits.mean()
    if kind == "non_saturating":
        return F.softplus(-fake_logits).mean()
    if kind == "least_squares":
        return 0.5 * (fake_logits - 1).square().mean()
    raise ValueError(f"expected a loss of {GAN_LOSSES}, got {kind!r}")


def gradient_penalty(discriminate: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """R1: the mean over images of |d (sum of the image's logits) / d image|^2 (Mescheder et al. 2018, arXiv 1801.04406, eq. 9).

    Differentiable, so the discriminator needs second derivatives. Attention is computed by the one implementation that has them.
    """
    images = images.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(discriminate(images).float().sum(), images, create_graph=True)
    return gradient.square().sum() / max(1, len(images))


class LeCam(nn.Module):
    """mean (real - a_fake)^2 + mean (fake - a_real)^2, with moving averages a of the logits (Tseng et al. 2021,
    arXiv 2104.03310, equation 4).

    Of a discriminator of few images: it keeps real and generated logits from drifting apart. The averages are of the global batch
    and move at each call, after they were used; the first call sets them.
    """

    averages: Tensor  # of real and of generated logits
    started: Tensor

    def __init__(self, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("averages", torch.zeros(2))
        self.register_buffer("started", torch.zeros(()))

    def forward(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        now = torch.stack([real_logits.detach().mean(), fake_logits.detach().mean()]).to(self.averages)
        now = sum_over_processes(now) / world_size()
        averages = torch.where(self.started > 0, self.averages, now)
        loss = (real_logits - averages[1]).square().mean() + (fake_logits - averages[0]).square().mean()
        self.averages.copy_(averages.lerp(now, 1 - self.decay))
        self.started.fill_(1)
        return loss


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, sample: Tensor) -> Tensor:
    """|d reconstruction / d sample| / |d adversarial / d sample|, at most 1e4, detached, over the global batch.

    VQGAN takes the gradients at the decoder's last layer; at the decoder's output they need no second pass through the
    decoder and work under `torch.compile`. Losses may be scaled by a common factor. Gradients that overflow make it NaN, so that
    a loss scaler leaves out the step: 0, their ratio, would leave out the adversarial loss for ever.
    """
    squares = [
        torch.autograd.grad(loss, sample, retain_graph=True)[0].float().square().sum() for loss in (reconstruction, adversarial)
    ]
    squared = sum_over_processes(torch.stack(squares))
    weight = (squared[0] / squared[1].clamp(min=1e-16)).sqrt().clamp(max=1e4)
    return torch.where(squared.isfinite().all(), weight, torch.nan).detach()

"""The linear decoder that is best for a batch, in closed form: stage 1 then minimises over the encoder the infimum over decoders.

Variable projection (Golub & Pereyra 1973, "The Differentiation of Pseudo-Inverses and Nonlinear Least Squares Problems Whose
Variables Separate"): min over (encoder, W) of a loss that is quadratic in W is min over the encoder of the loss at W*(encoder).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from dae.distributed import summed_with_gradients


class ProjectionDecoder(nn.Module):
    """x = W z + b for each patch, where in training W and b are the ridge regression of the batch's images on its latents.

    Trained, `forward(latents, images)` decodes with the solution of `solve_ridge` for this batch, through which it is
    differentiated. The batch is the micro-batch of all processes: their normal equations are summed, so that W processes with
    B / W images compute what one with B does; with gradient accumulation each micro-batch has a solution of its own.

    Otherwise (evaluation, or no images given) it decodes with `weight` and `bias`, the last solution. They are parameters that no
    optimiser gets, so that the moving average of weights (`use_ema`) averages solutions as it averages the encoder's weights.

    Args:
        latent_channels, image_channels: of both sides.
        factor: a patch is factor x factor pixels.
        ridge: as of `solve_ridge`.
    """

    gradient_checkpointing = False

    def __init__(self, latent_channels: int, image_channels: int, factor: int, ridge: float):
        super().__init__()
        self.factor, self.ridge = factor, ridge
        pixels = image_channels * factor**2
        self.weight = nn.Parameter(torch.zeros(latent_channels, pixels), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(pixels), requires_grad=False)

    def forward(self, latents: Tensor, images: Tensor | None = None) -> Tensor:
        """Latents [B, D, h, w] to [B, C, H, W] of their dtype; `images` [B, C, H, W] are the targets."""
        if self.training and images is not None:
            return self._solved(latents, images)
        return self._decoded(latents, self.weight, self.bias)

    @_disable_dynamo  # a collective in the midst of compiled parts breaks their backward pass
    def _solved(self, latents: Tensor, images: Tensor) -> Tensor:
        z_BDhw = latents.double()  # all in float64, which autocast leaves alone
        x_BPhw = F.pixel_unshuffle(images.double(), self.factor)
        weight, bias = solve_ridge(z_BDhw.movedim(1, -1).flatten(0, 2), x_BPhw.movedim(1, -1).flatten(0, 2), self.ridge)
        with torch.no_grad():
            self.weight.copy_(weight)
            self.bias.copy_(bias)
        return self._decoded(z_BDhw, weight, bias).to(latents.dtype)

    def _decoded(self, latents: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.pixel_shuffle((latents.movedim(1, -1) @ weight + bias).movedim(-1, 1), self.factor)


def solve_ridge(z_ND: Tensor, x_NP: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """W [D, P] and b [P], argmin of 1/N sum_n |x_n - z_n W - b|^2 + ridge |W|^2 over the rows of all processes, a collective.

        W = (cov(z, z) + ridge)^-1 cov(z, x),   b = mean x - mean z W

    Differentiable in both (the derivative of a solution is that of its equations). With ridge > 0 it exists for any rows: of
    constant latents W = 0. Rows that are not finite give NaN and no error.

    Args:
        z_ND, x_NP: of one dtype, float64 for the digits that a small ridge needs.
    """
    count = z_ND.new_tensor([len(z_ND)])
    sums = summed_with_gradients(torch.cat([z_ND.sum(0), x_NP.sum(0), count]))
    mean_z, mean_x = (sums[:-1] / sums[-1]).split([z_ND.shape[1], x_NP.shape[1]])
    centred_ND = z_ND - mean_z
    products = summed_with_gradients(centred_ND.T @ torch.cat([centred_ND, x_NP - mean_x], dim=1)) / sums[-1]
    within_DD, across_DP = products.split([z_ND.shape[1], x_NP.shape[1]], dim=1)
    regular_DD = within_DD + ridge * torch.eye(len(within_DD), dtype=z_ND.dtype, device=z_ND.device)
    weight, _ = torch.linalg.solve_ex(regular_DD, across_DP)
    return weight, mean_x - mean_z @ weight

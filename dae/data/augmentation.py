"""Random horizontal flips and affine maps of a batch of images, on its device."""

from __future__ import annotations

import math

import torch
from dae_kernels.checks import check_floating
from torch import Tensor
from torch.nn import functional as F

from dae.distributed import draw_rows

MAX_SHIFT = 0.125  # of the side
MAX_ANGLE = math.radians(15)
MAX_SCALE = 0.15


def augment(images_BCHW: Tensor, *, random_flip: bool, random_affine: float) -> Tensor:
    """Mirror half of the images, then shift, rotate and scale each by its own random amount.

    The amounts are uniform in plus or minus `random_affine` times 12.5 % of the side, 15 degrees, 15 %; the border is
    replicated. Random numbers are drawn for the global batch (`dae.distributed.draw_rows`),
    so the result depends on the global seed of torch and not on the number of processes.

    Args:
        images_BCHW: floating point images, any device.
        random_flip: mirror each image with probability one half.
        random_affine: strength; 0 draws nothing and leaves the images unchanged.

    Returns:
        New images of the same shape and dtype; `images_BCHW` itself if there is nothing to do.

    Raises:
        TypeError: the images are not floating point.
        ValueError: not four axes, or a negative strength.
    """
    check_floating("augment", "images", images_BCHW)
    if images_BCHW.ndim != 4:
        raise ValueError(f"augment: expected images [B, C, H, W], got shape {tuple(images_BCHW.shape)}")
    if not 0 <= random_affine < math.inf:
        raise ValueError(f"random_affine: expected a strength >= 0, got {random_affine}")
    B, device = images_BCHW.shape[0], images_BCHW.device
    if random_flip:
        mirrored_B = draw_rows(torch.rand, (B,), device=device) < 0.5
        images_BCHW = torch.where(mirrored_B[:, None, None, None], images_BCHW.flip(3), images_BCHW)
    if random_affine:
        amount_B4 = random_affine * (2 * draw_rows(torch.rand, (B, 4), device=device) - 1)
        grid_BHW2 = F.affine_grid(_affine_maps(amount_B4, images_BCHW), list(images_BCHW.shape), align_corners=False)
        images_BCHW = F.grid_sample(
            images_BCHW, grid_BHW2.to(images_BCHW.dtype), mode="bilinear", padding_mode="border", align_corners=False
        )
    return images_BCHW


def _affine_maps(amount_B4: Tensor, images_BCHW: Tensor) -> Tensor:
    """[B, 2, 3] maps from output to input coordinates, which span -1 to 1: a shift of one side is a shift of 2."""
    shift_B2 = 2 * MAX_SHIFT * amount_B4[:, :2]
    angle_B = MAX_ANGLE * amount_B4[:, 2]
    scale_B = 1 + MAX_SCALE * amount_B4[:, 3]
    H, W = images_BCHW.shape[2:]
    cos_B, sin_B = torch.cos(angle_B) * scale_B, torch.sin(angle_B) * scale_B
    x_B3 = torch.stack([cos_B, -sin_B * (H / W), shift_B2[:, 0]], 1)
    y_B3 = torch.stack([sin_B * (W / H), cos_B, shift_B2[:, 1]], 1)
    return torch.stack([x_B3, y_B3], 1)

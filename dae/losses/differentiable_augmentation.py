"""Differentiable augmentation of what a discriminator sees (Zhao et al. 2020, arXiv 2006.10738)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dae.distributed import draw_rows

SHIFT, HOLE = 1 / 8, 1 / 2  # of the side: the largest shift, and the side of what is cut out


def differentiable_augmentation(images: Tensor, kinds: Sequence[str]) -> Tensor:
    """T(x), applied to real and generated images alike, so that a discriminator of few images cannot learn them by heart.

        color:        x + b, then away from each pixel's mean over the channels by a factor s, then away from the image's mean by
                      a factor c, with b in [-1/2, 1/2], s in [0, 2], c in [1/2, 3/2], for images in [-1, 1]
        translation:  by whole pixels, at most 1/8 of the side, with zeros where nothing is
        cutout:       zeros in a square of half the side, whose centre is anywhere in the image

    All amounts are uniform and of each image, drawn for the global batch (`dae.distributed.draw_rows`), at each call anew.
    Gradients pass through; the formulae are those of the paper's section 4 and appendix.

    Args:
        images: [B, C, H, W].
        kinds: names out of `AUGMENTATIONS`, applied in their order; none returns `images` itself.

    ValueError: another name.
    """
    for kind in kinds:
        if kind not in AUGMENTATIONS:
            raise ValueError(f"expected augmentations of {tuple(AUGMENTATIONS)}, got {kind!r}")
        images = AUGMENTATIONS[kind](images)
    return images


def _uniform(images: Tensor, amounts: int) -> Tensor:
    return draw_rows(torch.rand, (len(images), amounts), device=images.device, dtype=torch.float32)


def _color(x: Tensor) -> Tensor:
    brightness, saturation, contrast = _uniform(x, 3).to(x.dtype).view(-1, 3, 1, 1, 1).unbind(1)
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + 2 * saturation * (x - grey)
    centre = x.mean((1, 2, 3), keepdim=True)
    return centre + (contrast + 0.5) * (x - centre)


def _translation(x: Tensor) -> Tensor:
    draws_B2 = _uniform(x, 2)
    for axis in (0, 1):
        side = x.shape[2 + axis]
        most = int(side * SHIFT + 0.5)
        shift_B1 = ((2 * most + 1) * draws_B2[:, axis, None]).long() - most
        source_BS = torch.arange(side, device=x.device) - shift_B1
        inside_BS = (source_BS >= 0) & (source_BS < side)
        shape = (len(x), 1, side, 1) if axis == 0 else (len(x), 1, 1, side)
        index = source_BS.clamp(0, side - 1).view(shape).expand(x.shape)
        x = x.gather(2 + axis, index) * inside_BS.view(shape)
    return x


def _cutout(x: Tensor) -> Tensor:
    draws_B2, cut = _uniform(x, 2), None
    for axis in (0, 1):
        side = x.shape[2 + axis]
        hole = int(side * HOLE + 0.5)
        start_B1 = (side * draws_B2[:, axis, None]).long() - hole // 2
        place = torch.arange(side, device=x.device)
        within = (place >= start_B1) & (place < start_B1 + hole)
        within = within[:, None, :, None] if axis == 0 else within[:, None, None, :]
        cut = within if cut is None else cut & within
    return x.masked_fill(cut, 0)  # type: ignore[arg-type]


AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {"color": _color, "translation": _translation, "cutout": _cutout}

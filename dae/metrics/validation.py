"""Argument checks shared by metrics; errors say what was expected, what was found and what to do."""

from __future__ import annotations

import torch
from dae_kernels.checks import FLOAT_DTYPES
from torch import Tensor

INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def as_float(images: Tensor) -> Tensor:
    """Convert 8-bit images to [-1, 1], x / 127.5 - 1 in float32; others are returned unchanged."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def check_integers(name: str, x: object, remedy: str) -> None:
    """TypeError unless x is a dense integer tensor with values."""
    check_values(name, x, "integers in a dense tensor", remedy, INTEGER_DTYPES)


def check_values(name: str, x: object, expected: str, remedy: str, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES) -> None:
    """TypeError unless x is a dense tensor of one of these dtypes, with values: not 8-bit, sparse, nested or on meta."""
    got: object
    if not isinstance(x, Tensor):
        got = type(x).__name__
    elif x.dtype not in dtypes:
        got = x.dtype
    elif x.is_nested or x.layout != torch.strided:
        got = "a nested tensor" if x.is_nested else x.layout
    elif x.is_meta:
        got = "a tensor on meta, which has no values"
    else:
        return
    raise TypeError(f"{name}: expected {expected}, got {got}; {remedy}")


def check_images(held: bool = False, **images: Tensor) -> None:
    """Check that each argument is floating point images [N, C, H, W] or, with `held`, 8-bit ones (a quarter of the memory)."""
    dtypes = (*FLOAT_DTYPES, torch.uint8) if held else FLOAT_DTYPES
    for name, x in images.items():
        check_values(name, x, "floating point images in [-1, 1]", "for uint8, x.float() / 127.5 - 1", dtypes)
        if x.ndim != 4:
            raise ValueError(f"{name}: expected images [N, C, H, W], got shape {tuple(x.shape)}; add the missing axis")


def check_image_pairs(a: Tensor, b: Tensor) -> None:
    """Check that two batches of images can be paired."""
    check_images(a=a, b=b)
    if a.shape != b.shape:
        raise ValueError(f"expected two batches of one shape, got {tuple(a.shape)} and {tuple(b.shape)}; pair them")


def check_same_pixels(**images: Tensor) -> None:
    """Check that batches, of any length, have images of one size, so that pixels compare."""
    check_images(held=True, **images)
    (first, reference), *others = images.items()
    for name, x in others:
        if x.shape[1:] != reference.shape[1:]:
            sizes = f"{tuple(reference.shape[1:])} ({first}) and {tuple(x.shape[1:])} ({name})"
            raise ValueError(f"expected images of one size, got {sizes}")


def check_features(rows: int = 0, **features: Tensor) -> None:
    """Check that each argument is finite features [N, D] with at least `rows` rows and one common D."""
    dimension = None
    for name, x in features.items():
        check_values(name, x, "floating point features [N, D]", "convert them by x.float()")
        if x.ndim != 2:
            raise ValueError(f"{name}: expected features [N, D], got shape {tuple(x.shape)}; flatten all but the first axis")
        if len(x) < rows:
            raise ValueError(f"{name}: expected at least {rows} rows, got {len(x)}; add images")
        if dimension is not None and x.shape[1] != dimension:
            raise ValueError(f"{name}: expected {dimension} features per row, got {x.shape[1]}; use one extractor for both")
        dimension = x.shape[1]
        if not torch.isfinite(x).all():
            raise ValueError(f"{name}: expected finite features, got NaN or infinity; look for diverged weights or broken images")

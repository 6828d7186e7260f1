"""Convert tensors in [-1, 1] to pictures, and write them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from torch import Tensor

from dae.files import write_file


def to_uint8(images_BCHW: Tensor) -> np.ndarray:
    """[B, H, W, C] uint8: clip to [-1, 1], scale to 0..255, round."""
    scaled = ((images_BCHW.float().clamp(-1, 1) + 1) * 127.5).round()
    return scaled.byte().permute(0, 2, 3, 1).cpu().numpy()


def grid(images_BHWC: np.ndarray, columns: int, gap: int = 1, background: int = 128) -> np.ndarray:
    """One picture [H', W', C] with `columns` images per row and `gap` pixels between them."""
    B, H, W, C = images_BHWC.shape
    rows = -(-B // columns)
    sheet = np.full((rows * (H + gap) + gap, columns * (W + gap) + gap, C), background, np.uint8)
    for i, image in enumerate(images_BHWC):
        y, x = gap + (i // columns) * (H + gap), gap + (i % columns) * (W + gap)
        sheet[y : y + H, x : x + W] = image
    return sheet


def write_png(path: Path, image_HWC: np.ndarray) -> None:
    """Write one picture of 1 or 3 channels."""
    from PIL import Image

    Image.fromarray(image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC).save(path)


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """`np.savez` of named arrays, written atomically."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_file(path, buffer.getvalue())

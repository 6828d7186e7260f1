"""Encoded bytes to square tensors; every image mode is handled explicitly, none by a library's default."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor

_AVIF = ("AVIF",) if "avif" in features.get_supported_modules() else ()  # since Pillow 11.3
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", *_AVIF)
MAX_PIXELS = 100_000_000
LONGEST_NAME = 255  # bytes in a file name
_ORIENTATION_TAG = 0x0112
_UPRIGHT = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
_TURNS = {orientation: Image.Transpose[name] for orientation, name in enumerate(_UPRIGHT, start=2)}
# What Pillow's plugins raise for broken files.
_BROKEN = (OSError, EOFError, SyntaxError, ValueError, TypeError, IndexError, KeyError, OverflowError, struct.error, zlib.error)


def open_image(source: Any, folder: Path | None = None) -> Image.Image:
    """Read the header of an encoded image and check format and size; pixels are not decoded yet.

    Args:
        source: bytes, `{"bytes": ..., "path": ...}` as `datasets.Image(decode=False)` gives it, or a Pillow image.
        folder: base of relative paths.

    Raises:
        ValueError: not an image, a format that is not in `FORMATS`, or more than `MAX_PIXELS` pixels.
        FileNotFoundError: the row names a file that does not exist.
    """
    if isinstance(source, Image.Image):
        _check_pixels(*source.size, "the image")
        return source
    data = read_bytes(source, folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own budget is lower than the one Pillow warns about
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"more than {MAX_PIXELS} pixels: {error}") from error
    except _BROKEN as error:
        raise ValueError(f"{len(data)} bytes starting {data[:12]!r} are no image of the formats {', '.join(FORMATS)}") from error
    _check_pixels(*image.size, "the image")
    return image


def read_bytes(source: Any, folder: Path | None = None) -> bytes:
    """The encoded bytes of a row, stored in the row or read from its file."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, dict) and source.get("bytes") is not None:
        return bytes(source["bytes"])
    path = source.get("path") if isinstance(source, dict) else source
    if not isinstance(path, str):
        raise ValueError("the row holds no image" if path is None else f"no image: got {type(source).__name__}")
    if not Path(path).is_absolute() and ("://" in path or "::" in path):
        from datasets.utils.file_utils import xopen

        with xopen(path, "rb") as file:
            return file.read()
    if max(map(len, path.encode(errors="replace").split(b"/"))) > LONGEST_NAME or "\0" in path:
        raise ValueError(
            f"the row holds a text of {len(path):,} characters: expected the bytes of an image or the path of a file"
        )
    folder = folder or Path()
    file = folder / path
    if not Path(path).is_absolute() and not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"the row names the image file {path!r}, which is outside of {str(folder)!r}")
    if not file.is_file():
        raise FileNotFoundError(f"the row names the image file {str(file)!r}, which does not exist")
    return file.read_bytes()


def _check_pixels(width: int, height: int, what: str) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{what} has {width} x {height} pixels; at most {MAX_PIXELS} are decoded")


def decode_image(source: Any, channels: int, folder: Path | None = None) -> Image.Image:
    """Decode to 8 bits, mode `L` (channels = 1) or `RGB` (channels = 3), upright.

    Transparent pixels are composited over white. 16-bit grey is divided by 257 and rounded; floating point must lie in
    0..1. Animations give their first frame. EXIF orientation is applied; broken EXIF counts as upright. Arrays are
    read as [H, W], [H, W, C] or [C, H, W] with C of 1, 3 or 4.

    Raises:
        ValueError: not a decodable image; see also `open_image`.
        FileNotFoundError: the row names a file that does not exist.
    """
    if isinstance(source, (list, np.ndarray)):
        return _from_array(source).convert("L" if channels == 1 else "RGB")
    image = open_image(source, folder)
    try:
        image.load()
        return _over_white(_eight_bit(_upright(image))).convert("L" if channels == 1 else "RGB")
    except (*_BROKEN, Image.DecompressionBombError) as error:
        kind = f"{image.format or 'Pillow'} image of {image.width} x {image.height} pixels, mode {image.mode}"
        raise ValueError(f"cannot decode the {kind}: {error}") from error


def _over_white(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode in ("1", "L", "RGB") else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except _BROKEN:
        return image
    return image if turn is None else image.transpose(turn)


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        values = np.asarray(image)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError(f"floating point image with values {values.min()} to {values.max()}; expected 0 to 1")
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"integer image with values {values.min()} to {values.max()}; expected 0 to 65535")
        return Image.fromarray(np.rint(values / 257).astype(np.uint8))
    return image


def _from_array(source: Any) -> Image.Image:
    values = np.asarray(source)
    if values.ndim == 3 and values.shape[0] in (1, 3, 4) and values.shape[2] not in (1, 3, 4):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    shaped = values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (3, 4))
    if values.dtype.kind not in "uif" or values.size == 0 or not shaped:
        raise ValueError(f"no image: array of shape {values.shape} and type {values.dtype}")
    _check_pixels(values.shape[1], values.shape[0], "the array")
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > (1 if values.dtype.kind == "f" else 255):
        raise ValueError(f"array with values {values.min()} to {values.max()}; expected integers 0 to 255 or floats 0 to 1")
    scaled = values * 255 if values.dtype.kind == "f" else values
    return _over_white(Image.fromarray(np.rint(scaled).astype(np.uint8)))


def to_square(image: Image.Image, resolution: int, center_crop: bool = True) -> Image.Image:
    """Resize to `resolution` x `resolution`; an image of that size is returned unchanged.

    With `center_crop` the crop of ADM (Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", data
    loader): halve with a box filter while the short side is at least 2 x resolution, resize the short side bicubically,
    crop the centre. Without it the whole image is resized to the square, ignoring its aspect ratio.
    """
    if image.size == (resolution, resolution):
        return image
    if not center_crop:
        return image.resize((resolution, resolution), Image.Resampling.BICUBIC)
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    _check_pixels(width, height, f"the image of {image.width} x {image.height}, with its short side resized to {resolution},")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def to_tensor(image: Image.Image) -> Tensor:
    """float32 [C, H, W] in [-1, 1] from an `L` or `RGB` image: x / 127.5 - 1."""
    values = torch.from_numpy(np.array(image, dtype=np.float32))
    values = values[None] if values.ndim == 2 else values.permute(2, 0, 1).contiguous()
    return values / 127.5 - 1

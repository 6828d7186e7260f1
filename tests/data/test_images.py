"""Every image mode against values worked out by hand."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, features

from dae.data import decode_image, images, to_square, to_tensor


def png(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(seed, size):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def pixels(source, channels=3):
    return np.asarray(decode_image(source, channels)).astype(int)


def one(mode, value, size=(1, 1), **options):
    return png(Image.new(mode, size, value), **options)


@pytest.mark.parametrize(
    "data, expected",
    [
        (one("L", 77), (77, 77, 77)),
        (one("1", 1), (255, 255, 255)),
        (one("RGB", (1, 2, 3)), (1, 2, 3)),
        (one("LA", (100, 0)), (255, 255, 255)),
        (one("LA", (100, 255)), (100, 100, 100)),
        (one("RGBA", (200, 0, 50, 51)), (244, 204, 214)),  # 51 / 255 = 0.2 over white
        (one("RGB", (9, 9, 9), transparency=(9, 9, 9)), (255, 255, 255)),
        (one("L", 9, transparency=9), (255, 255, 255)),
        (one("CMYK", (255, 0, 0, 0), format="TIFF"), (0, 255, 255)),
        (one("I;16", 65535), (255, 255, 255)),
        (one("I;16", 257 * 40), (40, 40, 40)),
        (one("I;16", 300), (1, 1, 1)),  # not saturated: 300 of 65535
        (one("I", 32768, format="TIFF"), (128, 128, 128)),
        (one("F", 0.5, format="TIFF"), (128, 128, 128)),
        (one("RGB", (7, 8, 9), format="PPM"), (7, 8, 9)),
        (one("RGB", (7, 8, 9), format="BMP"), (7, 8, 9)),
    ],
)
def test_modes(data, expected):
    assert np.abs(pixels(data)[0, 0] - expected).max() <= 1


def test_big_endian_sixteen_bit_grey():
    data = b"P5 2 1 65535 " + (51400).to_bytes(2, "big") + (257).to_bytes(2, "big")
    assert pixels(data, 1).tolist() == [[200, 1]]


def test_palette_with_transparent_entry_is_laid_over_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert pixels(png(image, transparency=0)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_grey_of_colour_is_luma():
    assert pixels(one("RGB", (255, 0, 0)), 1).tolist() == [[76]]


def test_first_frame_of_an_animation():
    first, second = Image.new("RGB", (2, 2), (10, 0, 0)), Image.new("RGB", (2, 2), (0, 10, 0))
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = png(first, format=kind, save_all=True, append_images=[second], **options)
        assert np.abs(pixels(data)[0, 0] - (10, 0, 0)).max() <= 1


@pytest.mark.parametrize(
    "orientation, upright",
    [
        (1, [[1, 2]]),
        (2, [[2, 1]]),
        (3, [[2, 1]]),
        (5, [[1], [2]]),
        (6, [[1], [2]]),
        (7, [[2], [1]]),
        (8, [[2], [1]]),
        (99, [[1, 2]]),
    ],
)
def test_exif_orientation(orientation, upright):
    image = Image.fromarray(np.array([[1, 2]], dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert pixels(png(image, exif=exif), 1).tolist() == upright


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_counts_as_upright():
    data = png(Image.new("RGB", (2, 1), (5, 6, 7)), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert pixels(data).tolist() == [[[5, 6, 7]] * 2]


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"<html>no</html>",
        b"%!PS-Adobe-3.0 EPSF",
        png(picture(0, 30))[:200],
        b"\x89PNG\r\n\x1a\n",
        None,
        {"bytes": None, "path": None},
        3,
    ],
)
def test_what_is_no_image_is_refused(bad):
    with pytest.raises(ValueError):
        decode_image(bad, 3)


def test_formats_outside_the_list_are_refused():
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PCX")
    with pytest.raises(ValueError, match="PNG, JPEG"):
        decode_image(buffer.getvalue(), 3)


def test_the_pixel_budget_is_checked_before_decoding(monkeypatch):
    bomb = bytearray(png(Image.new("L", (1, 1))))
    bomb[16:24] = (20000).to_bytes(4, "big") * 2
    import zlib

    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="pixels"):
        decode_image(bytes(bomb), 1)
    bomb[16:24] = (10001).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    with pytest.raises(ValueError, match="10001 x 10001 pixels; at most 100000000"):
        decode_image(bytes(bomb), 1)


@pytest.mark.parametrize("mode, value", [("F", 2.0), ("F", float("nan")), ("I", -1), ("I", 70000)])
def test_values_without_a_known_range_are_refused(mode, value):
    with pytest.raises(ValueError, match="expected 0 to"):
        decode_image(one(mode, value, format="TIFF"), 1)


def test_arrays():
    grey = np.array([[0, 255], [7, 8]], dtype=np.uint8)
    assert pixels(grey, 1).tolist() == pixels(grey.tolist(), 1).tolist() == grey.tolist()
    colour = np.arange(3 * 5 * 6, dtype=np.uint8).reshape(3, 5, 6)
    assert (pixels(colour) == colour.transpose(1, 2, 0)).all()
    assert pixels(np.full((2, 2), 0.2), 1).tolist() == [[51, 51]] * 2
    for bad in ([[300]], [[-1]], [[2.5]], [1, 2], [["a"]], np.zeros((2, 2, 2)), []):
        with pytest.raises(ValueError, match="array"):
            decode_image(bad, 1)


def test_paths_stay_inside_the_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out.png").write_bytes(one("L", 3))
    (tmp_path / "in" / "a.png").write_bytes(one("L", 4))
    assert pixels({"bytes": None, "path": str(tmp_path / "out.png")}, 1).item() == 3
    assert np.asarray(decode_image({"bytes": None, "path": "a.png"}, 1, tmp_path / "in")).item() == 4
    with pytest.raises(ValueError, match="outside"):
        decode_image({"bytes": None, "path": "../out.png"}, 1, tmp_path / "in")
    with pytest.raises(FileNotFoundError, match=r"b\.png"):
        decode_image({"bytes": None, "path": "b.png"}, 1, tmp_path / "in")


@pytest.mark.parametrize("text", ["89504e47" * 100, "a/" * 3 + "x" * 256, "a\0b"])
def test_texts_that_are_no_paths_are_not_looked_for(text, tmp_path):
    with pytest.raises(ValueError, match=f"holds a text of {len(text)} characters: expected the bytes of an image or the path"):
        images.read_bytes({"bytes": None, "path": text}, tmp_path)


def test_the_right_size_is_left_alone():
    image = picture(1, 8)
    assert to_square(image, 8) is image and to_square(image, 8, center_crop=False) is image


def test_crop_takes_the_middle():
    values = np.tile(np.arange(10, dtype=np.uint8) * 20, (4, 1))
    cropped = np.asarray(to_square(Image.fromarray(values), 4))
    assert (cropped == values[:, 3:7]).all()
    upright = np.asarray(to_square(Image.fromarray(np.ascontiguousarray(values.T)), 4))
    assert (upright == values.T[3:7]).all()


def test_crop_halves_with_a_box_filter_first():
    values = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    means = values.reshape(4, 2, 4, 2).mean((1, 3))
    halved = np.asarray(to_square(Image.fromarray(values), 4))
    assert np.abs(halved - means).max() <= 1  # Pillow rounds after each of the two axes


def test_shapes_of_odd_images():
    for size in ((1, 1), (1, 9), (63, 60), (5, 200)):
        for center_crop in (True, False):
            assert to_square(Image.new("RGB", size), 7, center_crop).size == (7, 7)
    with pytest.raises(ValueError, match="20000 x 1,"):
        to_square(Image.new("L", (20000, 1)), 256)


def test_squeeze_keeps_the_borders():
    image = Image.fromarray(np.repeat(np.array([[0, 255]], dtype=np.uint8), 20, 1).repeat(10, 0))
    squeezed = np.asarray(to_square(image, 10, center_crop=False))
    assert squeezed[0, 0] == 0 and squeezed[0, -1] == 255


def test_tensor_spans_minus_one_to_one():
    values = np.array([[[0, 128, 255]]], dtype=np.uint8)
    tensor = to_tensor(Image.fromarray(values))
    assert tensor.shape == (3, 1, 1) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert tensor.flatten().tolist() == pytest.approx([-1, 128 / 127.5 - 1, 1], abs=1e-7)
    every = torch.arange(256).view(1, 16, 16)
    assert ((to_tensor(Image.fromarray(every[0].byte().numpy())) + 1) * 127.5).round().equal(every.float())


def test_the_allow_list_is_what_the_docs_say():
    assert tuple(name for name in images.FORMATS if name != "AVIF") == ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
    assert ("AVIF" in images.FORMATS) == ("avif" in features.get_supported_modules())

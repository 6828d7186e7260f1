"""PSNR and SSIM."""

import math

import pytest
import torch

from dae.metrics import psnr, ssim

BOTH = pytest.mark.parametrize("metric", [psnr, ssim])


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_psnr_of_a_known_error(dtype):
    a = torch.zeros(3, 2, 5, 7, dtype=dtype)
    b = a + torch.tensor([2.0, 0.5, 0.25], dtype=dtype)[:, None, None, None]
    expected = torch.tensor([20 * math.log10(2 / error) for error in (2.0, 0.5, 0.25)], dtype=torch.float64)
    # The errors are powers of two, exact in every dtype: only the logarithm rounds.
    torch.testing.assert_close(psnr(a, b), expected, rtol=1e-14, atol=1e-14)


def test_psnr_of_each_image_is_from_its_mean_error_over_pixels_and_channels():
    a, b = images(4, 3, 6, 5), images(4, 3, 6, 5, seed=1)
    expected = torch.stack([10 * torch.log10(4 / ((x.double() - y.double()) ** 2).mean()) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(psnr(a, b), expected, rtol=1e-13, atol=0)  # the order of a sum of 90 terms


def test_psnr_extremes():
    a = images(2, 1, 4, 4)
    assert psnr(a, a).tolist() == [math.inf, math.inf]
    assert psnr(a, a * math.nan).isnan().all()
    assert psnr(a[:0], a[:0]).shape == (0,)


def test_psnr_of_strided_images():
    a, b = images(2, 3, 8, 4), images(2, 3, 8, 4, seed=1)
    torch.testing.assert_close(psnr(a.mT, b.mT), psnr(a, b), rtol=1e-13, atol=0)  # the order of a sum


def ssim_by_definition(a, b, radius, sigma):
    """For one image: explicit windows over the reflected image."""
    position = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weight = torch.exp(-(position**2) / (2 * sigma**2))
    weight = torch.outer(weight, weight)
    weight = weight / weight.sum()
    size = 2 * radius + 1
    a, b = (
        torch.nn.functional.pad(x[None].double() + 1, (radius,) * 4, mode="reflect")[0].unfold(1, size, 1).unfold(2, size, 1)
        for x in (a, b)
    )
    mean = lambda x: (x * weight).sum((-2, -1))  # noqa: E731
    m_a, m_b = mean(a), mean(b)
    s_aa, s_bb, s_ab = mean(a * a) - m_a**2, mean(b * b) - m_b**2, mean(a * b) - m_a * m_b
    c1, c2 = 0.02**2, 0.06**2
    return ((2 * m_a * m_b + c1) * (2 * s_ab + c2) / ((m_a**2 + m_b**2 + c1) * (s_aa + s_bb + c2))).mean()


@pytest.mark.parametrize(
    ("side", "radius", "sigma"), [((17, 12), 5, 1.5), ((11, 11), 5, 1.5), ((8, 8), 3, 0.9), ((8, 40), 3, 0.9), ((3, 4), 1, 0.3)]
)
def test_ssim_window_as_documented(side, radius, sigma):
    a = images(3, 2, *side)
    b = (a + 0.3 * images(3, 2, *side, seed=1)).clamp(-1, 1)
    expected = torch.stack([ssim_by_definition(x, y, radius, sigma) for x, y in zip(a, b, strict=True)])
    # E[x^2] - E[x]^2 in float64 against c2 = 0.0036: 1e-16 / 4e-3 < 1e-12.
    torch.testing.assert_close(ssim(a, b), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("side", [3, 8, 11, 32])
def test_ssim_of_identical_images_is_one(side):
    a = images(2, 3, side, side)
    torch.testing.assert_close(ssim(a, a), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (ssim(a, -a) < 0).all(), "an image does not resemble its negative"


def test_ssim_of_one_image_and_of_none():
    a, b = images(1, 1, 8, 8), images(1, 1, 8, 8, seed=1)
    assert ssim(a, b).shape == (1,)
    assert ssim(a[:0], b[:0]).shape == (0,)


@BOTH
def test_errors(metric):
    a = images(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"one shape, got \(2, 1, 8, 8\) and \(1, 1, 8, 8\)"):
        metric(a, a[:1])
    with pytest.raises(ValueError, match=r"a: expected images \[N, C, H, W\], got shape \(1, 8, 8\)"):
        metric(a[0], a[0])
    with pytest.raises(TypeError, match=r"a: .* got torch\.uint8"):
        metric(a.byte(), a)
    with pytest.raises(TypeError, match=r"b: .* got list"):
        metric(a, a.tolist())


def test_ssim_refuses_images_without_a_window():
    with pytest.raises(ValueError, match="at least 3 x 3 pixels, got 2 x 9"):
        ssim(images(1, 1, 2, 9), images(1, 1, 2, 9))

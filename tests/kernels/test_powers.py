"""Sliced distances of clouds that differ by a small share of their size: no power of a difference is lost."""

import pytest
import torch
from dae_kernels import max_sliced_wasserstein, sliced_wasserstein


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 6, 8, 12])
@pytest.mark.parametrize("sliced", [sliced_wasserstein, max_sliced_wasserstein])
@pytest.mark.parametrize("points", ["equal", "unequal", "weighted"])
def test_small_differences_at_large_p(sliced, p, points):
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(3, dtype=torch.float64)[:, :2]  # exact: what is projected is not rounded
    x = torch.randint(-128, 128, (12, 3), generator=generator).double() / 128  # with the shift below, numbers of float32
    y = x + 2.0**-16
    if points == "unequal":
        x, y = x.repeat(2, 1), y.repeat(3, 1)
    options = {"p": p, "projections": directions}
    if points == "weighted":
        options["weights_x"] = torch.ones(len(x), dtype=torch.float64)
    narrow = {name: o.float() if isinstance(o, torch.Tensor) else o for name, o in options.items()}
    leaf = x.float().requires_grad_()
    distance = sliced(leaf, y.float(), **narrow)
    distance.backward()
    # A shift by s costs s: equal clouds but for it are paired point by point.
    assert distance.dtype == torch.float32 and abs(distance.item() / 2.0**-16 - 1) < 1e-5
    assert abs(leaf.grad.sum().item() + 1) < 1e-4  # moving x by one moves the distance by minus one

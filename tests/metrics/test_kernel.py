"""`kernel_distance` against torchmetrics' KID and the distance of all rows."""

from __future__ import annotations

import statistics

import pytest
import torch
from dae_kernels import mmd
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

from dae.metrics import kernel_distance


def features(N: int = 40, M: int = 30, D: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, D, generator=generator), torch.randn(M, D, generator=generator) + 0.4


def test_equals_torchmetrics_of_the_same_subsets():
    """The whole of both sets, where no draw matters; then the mean and deviation over subsets drawn as we draw them."""
    x, y = features(24, 24)
    theirs = KernelInceptionDistance(feature=torch.nn.Flatten(), subsets=3, subset_size=24)
    theirs.update(x.double(), real=True), theirs.update(y.double(), real=False)
    ours = kernel_distance(x, y, subsets=3, subset_size=24, seed=0)
    mean, _ = theirs.compute()
    # float64, 24 x 24 kernel values of up to 1e2 in another order
    assert ours.mean == pytest.approx(mean.item(), abs=24 * 24 * 1e2 * 2.0**-53) and ours.std < 1e-10
    assert ours.number_of_subsets == 3 and ours.subset_size == 24

    x, y = features()
    generator, values = torch.Generator().manual_seed(7), []
    for _ in range(5):
        rows = [t[torch.randperm(len(t), generator=generator)[:12]].double() for t in (x, y)]
        values.append(poly_mmd(*rows).item())
    ours = kernel_distance(x, y, subsets=5, subset_size=12, seed=7)
    assert ours.mean == pytest.approx(statistics.fmean(values), rel=1e-10)
    assert ours.std == pytest.approx(statistics.stdev(values), rel=1e-8)


def test_subsets_are_unbiased():
    """The mean over many subsets is near the distance of all rows: within four of its standard errors."""
    x, y = features()
    whole = mmd(x.double(), y.double(), kernel="polynomial").item()
    found = kernel_distance(x, y, subsets=200, subset_size=10, seed=1)
    assert abs(found.mean - whole) <= 4 * found.std / 200**0.5


def test_seed_and_defaults():
    x, y = features()
    before = torch.random.get_rng_state()
    found = kernel_distance(x, y, subsets=4, seed=3)
    assert found == kernel_distance(x, y, subsets=4, seed=3) != kernel_distance(x, y, subsets=4, seed=4)
    assert found.subset_size == 15  # half of the smaller set
    assert kernel_distance(x, y, subsets=1, seed=3).std == 0
    assert torch.equal(before, torch.random.get_rng_state())


def test_user_errors():
    x, y = features()
    for arguments, options, message in (
        ((x, y), {"subset_size": 31}, "subset_size: expected 2 to 30 rows .the smaller set., got 31"),
        ((x, y), {"subset_size": 1}, "got 1"),
        ((x, y[:3]), {}, "got 1, half of the smaller set"),
        ((x, y), {"subsets": 0}, "subsets: expected at least 1, got 0"),
        ((x, y[:, :4]), {}, "expected 5 features per row, got 4"),
        ((x, y / 0), {}, "finite features"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel_distance(*arguments, seed=0, **options)

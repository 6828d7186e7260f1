"""Precision and recall of hand-made clouds."""

import math

import pytest
import torch

from dae.metrics import precision_recall


def cloud(rows, D=3, seed=0):
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_identical_clouds():
    x = cloud(50)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x.flip(0)) == (1.0, 1.0)


def test_clouds_far_apart():
    assert precision_recall(cloud(50), cloud(40, seed=1) + 1e4) == (0.0, 0.0)


def test_a_generator_that_dropped_a_mode_has_precision_without_recall():
    one, other = cloud(40), cloud(60, seed=1) + 1e3
    precision, recall = precision_recall(torch.cat([one, other]), one)
    assert precision == 1.0
    assert recall == 0.4


def test_a_generator_with_a_false_mode_has_recall_without_precision():
    real, false = cloud(40), cloud(60, seed=1) + 1e3
    result = precision_recall(real, torch.cat([real, false]))
    assert result.recall == 1.0
    assert result.precision == 0.4


def test_by_hand_on_a_line_with_k_1():
    real = torch.tensor([0.0, 1, 3, 7])[:, None]  # radii 1, 1, 2, 4: covers -1..11 without the ends
    fake = torch.tensor([-1.0, -1.5, 11, 12, 4])[:, None]  # radii .5, .5, 1, 1, 5: covers -2..-.5, 10..13, -1..9
    precision, recall = precision_recall(real, fake, k=1)
    assert precision == 1 / 5  # -1 and 11 lie on a sphere, which does not belong to its ball
    assert recall == 4 / 4
    _, recall = precision_recall(real, fake[:4], k=1)
    assert recall == 0.0


def test_k_counts_neighbours_without_the_point_itself():
    real = torch.tensor([0.0, 1, 2, 4])[:, None]
    far = torch.tensor([7.9, 8.0, 8.1])[:, None]
    assert precision_recall(real, far, k=1).precision == 0.0  # the ball around 4 reaches 6
    assert precision_recall(real, far, k=2).precision == pytest.approx(0.0)  # 7
    assert precision_recall(torch.cat([real, real[:1]]), torch.cat([far, far]), k=3).precision == pytest.approx(1 / 3)  # 8


def test_duplicates_have_radius_zero():
    x = torch.zeros(5, 2)
    assert precision_recall(x, x) == (0.0, 0.0)  # an open ball of radius 0 is empty


def test_float32_features():
    real, fake = cloud(40).float(), cloud(40, seed=1).float()
    assert precision_recall(real, fake) == precision_recall(real.double(), fake.double())


def test_errors():
    x = cloud(10)
    with pytest.raises(ValueError, match="real_ND: expected at least 4 rows, got 3"):
        precision_recall(x[:3], x)
    with pytest.raises(ValueError, match="fake_MD: expected at least 6 rows, got 5"):
        precision_recall(x, x[:5], k=5)
    with pytest.raises(ValueError, match="fake_MD: expected 3 features per row, got 2"):
        precision_recall(x, x[:, :2])
    with pytest.raises(ValueError, match="NaN"):
        precision_recall(x, x * math.nan)
    with pytest.raises(ValueError, match="at least 1"):
        precision_recall(x, x, k=0)
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        precision_recall(x.long(), x)
    assert precision_recall(x[:4], x[:4]) == (1.0, 1.0)

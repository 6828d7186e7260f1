"""Members map the shapes they say, stay in their family, and a greater capacity contains a smaller where that is said."""

import math

import pytest
import torch
from torch import nn

from dae.complexity.families import ConvDecoders, DropoutNetworks, LinearMaps, LipschitzNetworks, MLPs, clip_singular_values_

FAMILIES = (
    LinearMaps(),
    LinearMaps(0.5),
    MLPs(width=6, depth=1),
    MLPs(6, 3),
    LipschitzNetworks(2.0, width=8),
    DropoutNetworks(0.5, 8),
)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_shapes_of_vectors_and_images(family):
    torch.manual_seed(0)
    for latent_shape, data_shape in (((3,), (5,)), ((1,), (2, 3, 4)), ((2, 2, 2), (1, 4, 4))):
        out = family.build(latent_shape, data_shape)(torch.randn(7, *latent_shape))
        assert out.shape == (7, *data_shape)


@pytest.mark.parametrize("family", [*FAMILIES, ConvDecoders(0.25, 8)], ids=str)
def test_at_changes_the_capacity_alone(family):
    capacity = {"LinearMaps": 3.0, "MLPs": 12, "LipschitzNetworks": 3.0, "DropoutNetworks": 0.25, "ConvDecoders": 0.75}
    other = family.at(capacity[type(family).__name__])
    assert type(other) is type(family) and other.capacity == capacity[type(family).__name__] != family.capacity
    assert other.at(family.capacity) == family
    assert family.knob and str(family) != str(other)


def test_dropout_lowers_the_capacity():
    assert DropoutNetworks(0.5).capacity < DropoutNetworks(0.1).capacity


def test_depth_as_the_knob():
    assert MLPs(width=8, depth=2, knob="depth").at(4) == MLPs(8, 4, knob="depth")
    assert MLPs(8, 2, knob="depth").capacity == 2


def test_clipping_is_the_projection():
    """No matrix of the ball is nearer than the clipped one: the residual makes an obtuse angle with every direction into it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    clipped = weight.clone()
    clip_singular_values_(clipped, 0.8)
    assert torch.linalg.matrix_norm(clipped, 2) <= 0.8 * (1 + 1e-12)  # rounding of the SVD
    for _ in range(20):
        member = torch.randn(7, 4, generator=generator, dtype=torch.float64)
        member *= 0.8 / torch.linalg.matrix_norm(member, 2)
        assert ((weight - clipped) * (member - clipped)).sum() <= 1e-12
    inside = 0.1 * weight / torch.linalg.matrix_norm(weight, 2)
    unchanged = inside.clone()
    clip_singular_values_(unchanged, 0.8)
    assert torch.equal(unchanged, inside)


@pytest.mark.parametrize("constant", [0.5, 3.0])
def test_lipschitz_networks_keep_the_constant_after_any_step(constant):
    torch.manual_seed(0)
    family = LipschitzNetworks(constant, width=16, depth=3)
    module = family.build((3,), (4,)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    family.constrain_(module)
    z = 3 * torch.randn(200, 3, dtype=torch.float64)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda row: module(row[None])[0]))(z)
    slopes = torch.linalg.matrix_norm(jacobians, 2)
    assert slopes.max() <= constant * (1 + 1e-12)  # rounding of the SVD
    assert slopes.max() > 0.1 * constant, "not bounded by being constant"
    pairs = torch.pdist(module(z)) / torch.pdist(z)
    assert pairs.max() <= constant * (1 + 1e-12)


def test_a_fresh_lipschitz_network_keeps_gradients():
    """MaxMin and orthogonal weights: no gradient vanishes on the way, in as many dimensions as the narrowest layer has."""
    torch.manual_seed(0)
    for constant in (0.5, 2.0):
        module = LipschitzNetworks(constant, width=8, depth=4).build((3,), (8,))
        jacobian = torch.func.jacrev(lambda row, module=module: module(row[None])[0])(torch.randn(3))
        slope = min(constant, 1.0)  # a steep start takes long to unfold
        torch.testing.assert_close(
            torch.linalg.svdvals(jacobian), torch.full((3,), slope), rtol=1e-5, atol=0
        )  # five float32 products


def linears(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


@torch.no_grad()
def test_a_wider_mlp_contains_a_narrower_one():
    torch.manual_seed(0)
    small, large = MLPs(4, 2).build((3,), (2,)), MLPs(9, 2).build((3,), (2,))
    for mine, theirs in zip(linears(large), linears(small), strict=True):
        mine.weight.zero_(), mine.bias.zero_()
        rows, columns = theirs.weight.shape
        mine.weight[:rows, :columns], mine.bias[:rows] = theirs.weight, theirs.bias
    z = torch.randn(50, 3)
    torch.testing.assert_close(large(z), small(z))


@torch.no_grad()
def test_a_deeper_mlp_contains_a_shallower_one():
    torch.manual_seed(0)
    small, large = MLPs(4, 1).build((3,), (2,)), MLPs(4, 2).build((3,), (2,))
    first, middle, last = linears(large)
    first.load_state_dict(linears(small)[0].state_dict())
    middle.weight.copy_(torch.eye(4)), middle.bias.zero_()
    last.load_state_dict(linears(small)[1].state_dict())
    z = torch.randn(50, 3)
    torch.testing.assert_close(large(z), small(z))


@torch.no_grad()
def test_a_greater_lipschitz_constant_contains_a_smaller():
    torch.manual_seed(0)
    small, large = LipschitzNetworks(1.5, 8), LipschitzNetworks(6.0, 8)
    inner, outer = small.build((3,), (2,)), large.build((3,), (2,))
    outer.load_state_dict(inner.state_dict())
    large.constrain_(outer)
    z = torch.randn(50, 3)
    torch.testing.assert_close(outer(z), inner(z))


def test_dropout_is_a_part_of_the_generator():
    torch.manual_seed(0)
    module = DropoutNetworks(0.5, 16).build((3,), (2,)).eval()
    z = torch.randn(20, 3)
    assert not torch.equal(module(z), module(z))
    quiet = DropoutNetworks(0.0, 16).build((3,), (2,))
    assert torch.equal(quiet(z), quiet(z))


@pytest.mark.parametrize(("h", "w", "factor"), [(2, 2, 4), (4, 2, 2), (3, 3, 1)])
def test_convolutional_decoders(h, w, factor):
    torch.manual_seed(0)
    family = ConvDecoders(0.5, base_channels=8)
    module = family.build((3, h, w), (2, h * factor, w * factor))
    assert module(torch.randn(5, 3, h, w)).shape == (5, 2, h * factor, w * factor)
    more = family.at(1.0).build((3, h, w), (2, h * factor, w * factor))
    assert sum(p.numel() for p in more.parameters()) > sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("latent_shape", "data_shape"),
    [
        ((3,), (1, 8, 8)),
        ((3, 2, 2), (8,)),
        ((3, 2, 2), (1, 6, 6)),
        ((3, 2, 2), (1, 8, 4)),
        ((3, 4, 4), (1, 2, 2)),
        ((3, 3, 3), (1, 7, 7)),
    ],
)
def test_shapes_that_convolutional_decoders_cannot_map(latent_shape, data_shape):
    with pytest.raises(ValueError, match="convolutional decoders"):
        ConvDecoders().build(latent_shape, data_shape)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LinearMaps(0.0), ValueError, "max_norm > 0"),
        (lambda: LinearMaps(math.nan), ValueError, "max_norm > 0"),
        (lambda: LinearMaps("1"), TypeError, "max_norm as a number"),
        (lambda: MLPs(width=0), ValueError, "width >= 1"),
        (lambda: MLPs(depth=1.5), TypeError, "depth as an int"),
        (lambda: MLPs(knob="height"), ValueError, "'width' or 'depth'"),
        (lambda: MLPs().at(3.5), ValueError, "whole width"),
        (lambda: LipschitzNetworks(-1.0), ValueError, "constant > 0"),
        (lambda: LipschitzNetworks(math.inf), ValueError, "finite"),
        (lambda: LipschitzNetworks(width=7), ValueError, "even width"),
        (lambda: ConvDecoders(1.5), ValueError, "width_factor in"),
        (lambda: DropoutNetworks(1.0), ValueError, "dropout in"),
        (lambda: DropoutNetworks().at(0), ValueError, "kept > 0"),
    ],
)
def test_bad_families(make, error, message):
    with pytest.raises(error, match=message):
        make()

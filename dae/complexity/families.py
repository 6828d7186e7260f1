"""Families of generators g: latent -> data with a knob for their capacity: the G in D^G(P_z, P_x) = inf over g in G of D.

A family is *nested* if larger capacities contain smaller ones: G_c in G_c' for c <= c'. Then the infimum decreases with the
capacity for every distance.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dae.complexity.linear import best_frechet, best_reconstruction, sort_pairs
from dae.config import AutoencoderConfig, DecoderConfig
from dae.models.decoders import build_decoder
from dae.precision import own_arithmetic

Shape = tuple[int, ...]
SOLVERS = {"reconstruction": best_reconstruction, "frechet": best_frechet}  # of the best linear map


class GeneratorFamily:
    """Base class of the families. `str(family)` names the family with its capacity.

    Members are built and constrained in float32 on the CPU unless requested otherwise, independent of torch's modes
    (`dae.precision.own_arithmetic`); called as modules they follow the caller's modes, such as autocast.

    Attributes:
        nested: whether `at(c)` contains `at(c')` for all c' <= c.
        learning_rate: Adam's, for data of unit scale.
        knob: what the capacity is.
    """

    nested: bool
    learning_rate: float
    knob: str
    parameter: ClassVar[str | None] = None  # the field that is the capacity

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in ("build", "constrain_", "best", "start"):
            if name in vars(cls):
                setattr(cls, name, own_arithmetic(gradients=True)(vars(cls)[name]))

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # all families here are dataclasses
            if field.type == "int":
                check_count(field.name, getattr(self, field.name))

    @property
    def capacity(self) -> float:
        """The capacity, in the unit named by `knob`; larger is more capable."""
        if self.parameter is None:
            raise NotImplementedError
        return getattr(self, self.parameter)

    def at(self, capacity: float) -> Self:
        """The same family with another capacity. ValueError: not a capacity of the family."""
        if self.parameter is None:
            raise NotImplementedError
        return dataclasses.replace(self, **{self.parameter: capacity})  # type: ignore[type-var]

    def build(self, latent_shape: Shape, data_shape: Shape) -> nn.Module:
        """A member, freshly drawn from torch's global generator: [B, *latent_shape] -> [B, *data_shape].

        ValueError: the family has no generator between these shapes.
        """
        raise NotImplementedError

    def constrain_(self, module: nn.Module) -> None:
        """Project a module made by `build` back into the family, in place, after an optimiser step."""

    def rescaled(self, ratio: float) -> Self:
        """The same generators seen in other units, with latents divided by s and data by t, where ratio = s / t."""
        return self

    def best(self, latents: Tensor, data: Tensor, distance: str) -> nn.Module | None:
        """The member with the smallest distance on these rows; None without a closed form."""
        return None

    def start(self, latents: Tensor, data: Tensor) -> nn.Module:
        """The initial member for training; by default a new one."""
        return self.build(tuple(latents.shape[1:]), tuple(data.shape[1:])).to(data)


@dataclass(frozen=True)
class LinearMaps(GeneratorFamily):
    """g(z) = W z + b with the operator norm |W| <= max_norm and any b, on flattened latents and data.

    Nested in the norm, exactly. The nearest W of the family in the Frobenius norm has its singular values clipped.
    """

    max_norm: float = math.inf

    nested, learning_rate, knob, parameter = True, 2e-2, "operator norm", "max_norm"

    def __post_init__(self) -> None:
        check_positive("max_norm", self.max_norm)

    def build(self, latent_shape: Shape, data_shape: Shape) -> nn.Module:
        module = nn.Sequential(
            nn.Flatten(), nn.Linear(math.prod(latent_shape), math.prod(data_shape)), nn.Unflatten(1, tuple(data_shape))
        )
        self.constrain_(module)
        return module

    def constrain_(self, module: nn.Module) -> None:
        (layer,) = affine_layers(module)
        clip_singular_values_(layer.weight, self.max_norm)

    def rescaled(self, ratio: float) -> Self:
        return self.at(self.max_norm * ratio)

    def best(self, latents: Tensor, data: Tensor, distance: str) -> nn.Module | None:
        if distance not in SOLVERS:
            return None
        z_NK, x_ND = latents.flatten(1).double(), data.flatten(1).double()
        weight_DK = SOLVERS[distance](z_NK, x_ND, self.max_norm)
        return self.member(latents, data, weight_DK, x_ND.mean(dim=0) - weight_DK @ z_NK.mean(dim=0))

    def start(self, latents: Tensor, data: Tensor) -> nn.Module:
        return cast(nn.Module, self.best(latents, data, "frechet"))  # optimal if both are Gaussian

    def member(self, latents: Tensor, data: Tensor, weight_DK: Tensor, bias_D: Tensor) -> nn.Module:
        """The map with this weight and bias, for the shapes of these latents and data."""
        module = self.build(tuple(latents.shape[1:]), tuple(data.shape[1:])).to(data)
        (layer,) = affine_layers(module)
        with torch.no_grad():
            layer.weight.copy_(weight_DK)
            layer.bias.copy_(bias_D)
        return module

    def __str__(self) -> str:
        return "linear maps" if math.isinf(self.max_norm) else f"linear maps, |W| <= {self.max_norm:g}"


@dataclass(frozen=True)
class MLPs(GeneratorFamily):
    """Perceptrons with `depth` hidden layers of `width` ReLU units, on flattened latents and data.

    Nested in either knob: a narrower network is a wider one with zero weights, and a shallower one is a deeper one with an
    identity after its last ReLU, where values are non-negative.

    Args:
        width, depth: at least 1.
        knob: "width" or "depth", which of them is the capacity.
    """

    width: int = 64
    depth: int = 2
    knob: str = "width"

    nested, learning_rate = True, 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.knob not in ("width", "depth"):
            raise ValueError(f"the knob of MLPs is 'width' or 'depth', got {self.knob!r}")

    @property
    def capacity(self) -> float:
        return float(getattr(self, self.knob))

    def at(self, capacity: float) -> Self:
        size = whole(self.knob, capacity)
        return dataclasses.replace(self, width=size) if self.knob == "width" else dataclasses.replace(self, depth=size)

    def build(self, latent_shape: Shape, data_shape: Shape) -> nn.Module:
        return perceptron(latent_shape, data_shape, self.width, self.depth, nn.ReLU)

    def __str__(self) -> str:
        return f"MLPs, width {self.width}, depth {self.depth}"


@dataclass(frozen=True)
class LipschitzNetworks(GeneratorFamily):
    """Networks with |g(z) - g(z')| <= constant |z - z'| for all z, z', in Euclidean norms of flattened latents and data.

    g(z) = A_n(s(A_{n-1}(... s(A_1(z))))) with n affine A_i of spectral norm <= constant^(1/n), whose singular values are clipped,
    and s = MaxMin, which preserves gradient norms, so that the bound is attainable. Nested in the constant. Training starts from
    slope min(1, constant), as functions that are steep everywhere train slowly. The infimum over these networks is an upper
    bound of that over all functions with this constant.

    Source: Anil, Lucas and Grosse 2019, "Sorting out Lipschitz function approximation", arXiv 1811.05381.

    Args:
        constant: Lipschitz constant, > 0 and finite; the capacity.
        width: even, at least 2.
        depth: hidden layers, at least 1.
    """

    constant: float = 1.0
    width: int = 64
    depth: int = 2

    nested, learning_rate, knob, parameter = True, 2e-2, "Lipschitz constant", "constant"

    def __post_init__(self) -> None:
        check_positive("constant", self.constant)
        if math.isinf(self.constant):
            raise ValueError("expected a finite Lipschitz constant, got inf; MLPs have none")
        super().__post_init__()
        if self.width % 2:
            raise ValueError(f"expected an even width, as MaxMin sorts pairs, got {self.width}")

    def build(self, latent_shape: Shape, data_shape: Shape) -> nn.Module:
        network = perceptron(latent_shape, data_shape, self.width, self.depth, MaxMin)
        for layer in affine_layers(network):
            nn.init.orthogonal_(layer.weight, gain=min(1.0, self.norm_of_a_layer))
        return network

    @property
    def norm_of_a_layer(self) -> float:
        return self.constant ** (1 / (self.depth + 1))

    def constrain_(self, module: nn.Module) -> None:
        for layer in affine_layers(module):
            clip_singular_values_(layer.weight, self.norm_of_a_layer)

    def rescaled(self, ratio: float) -> Self:
        return self.at(self.constant * ratio)

    def __str__(self) -> str:
        return f"{self.constant:g}-Lipschitz networks, width {self.width}, depth {self.depth}"


@dataclass(frozen=True)
class ConvDecoders(GeneratorFamily):
    """The convolutional decoders of `dae.models.decoders`: [D, h, w] -> [C, h 2^k, w 2^k], k = 0, 1, ...

    Not nested: GroupNorm divides by statistics of channel groups, which extra channels of weight 0 change.

    Args:
        width_factor: in (0, 1], channels relative to `base_channels` at full resolution and twice those below; the capacity.
        base_channels: channels of the widest.
        num_blocks: residual blocks per level.
    """

    width_factor: float = 0.5
    base_channels: int = 32
    num_blocks: int = 1

    nested, learning_rate, knob, parameter = False, 5e-3, "width factor", "width_factor"

    def __post_init__(self) -> None:
        check_positive("width_factor", self.width_factor)
        if self.width_factor > 1:
            raise ValueError(f"expected a width_factor in (0, 1], got {self.width_factor}; raise base_channels instead")
        super().__post_init__()

    def build(self, latent_shape: Shape, data_shape: Shape) -> nn.Module:
        got = f"got latents {list(latent_shape)} and data {list(data_shape)}"
        if len(latent_shape) != 3 or len(data_shape) != 3:
            raise ValueError(
                f"convolutional decoders map [D, h, w] to [C, H, W], {got}; reshape them, or take LinearMaps, MLPs or "
                "LipschitzNetworks, which map vectors"
            )
        if min(*latent_shape, *data_shape) < 1:
            raise ValueError(f"convolutional decoders need at least one value along every axis, {got}")
        (D, h, w), (C, H, W) = latent_shape, data_shape
        factor = H // h
        if factor < 1 or factor & (factor - 1) or (h * factor, w * factor) != (H, W):
            raise ValueError(f"convolutional decoders need H = h 2^k and W = w 2^k with one k >= 0, {got}; resize the data")
        config = AutoencoderConfig(
            base_channels=self.base_channels,
            channel_multipliers=[1] + [2] * (factor.bit_length() - 1),
            num_blocks=self.num_blocks - 1,  # a full decoder has one block more than its encoder
            latent_channels=D,
            decoder=DecoderConfig(family="narrow", width_factor=self.width_factor),
        )
        return build_decoder(config, C, H)

    def __str__(self) -> str:
        return f"convolutional decoders, width {self.width_factor:g} of {self.base_channels}, {self.num_blocks} blocks a level"


@dataclass(frozen=True)
class DropoutNetworks(GeneratorFamily):
    """MLPs whose hidden units are zeroed with probability `dropout` whenever they generate, in evaluation too.

    The capacity is the share of units kept, 1 - dropout. Not nested: rates have different noise. The noise increases the paired
    reconstruction error (E|x - g(z)|^2 is that of the mean network plus the noise's variance), but can lower a distance of
    distributions if the latent has too little randomness.

    Args:
        dropout: in [0, 1).
        width, depth: as in MLPs.
    """

    dropout: float = 0.1
    width: int = 64
    depth: int = 2

    nested, learning_rate, knob = False, 1e-2, "share of units kept"

    def __post_init__(self) -> None:
        check_number("dropout", self.dropout)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"expected a dropout in [0, 1), got {self.dropout}")
        super().__post_init__()

    @property
    def capacity(self) -> float:
        return 1 - self.dropout

    def at(self, capacity: float) -> Self:
        check_positive("share of units kept", capacity)
        if capacity > 1:
            raise ValueError(f"expected a share of units kept in (0, 1], got {capacity}")
        return dataclasses.replace(self, dropout=1 - capacity)

    def build(self, latent_shape: Shape, data_shape: Shape) -> nn.Module:
        return perceptron(latent_shape, data_shape, self.width, self.depth, lambda: NoisyReLU(self.dropout))

    def __str__(self) -> str:
        return f"dropout {self.dropout:g} MLPs, width {self.width}, depth {self.depth}"


class MaxMin(nn.Module):
    """GroupSort of pairs, see `sort_pairs`."""

    def forward(self, x_BH: Tensor) -> Tensor:
        return sort_pairs(x_BH)


class NoisyReLU(nn.Module):
    """ReLU, then dropout in training and in evaluation."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x_BH: Tensor) -> Tensor:
        return F.dropout(F.relu(x_BH), self.p, training=True)


def perceptron(latent_shape: Shape, data_shape: Shape, width: int, depth: int, activation) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    units = math.prod(latent_shape)
    for _ in range(depth):
        layers += [nn.Linear(units, width), activation()]
        units = width
    return nn.Sequential(*layers, nn.Linear(units, math.prod(data_shape)), nn.Unflatten(1, tuple(data_shape)))


def affine_layers(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


@torch.no_grad()
def clip_singular_values_(weight: Tensor, largest: float) -> None:
    """The nearest matrix in the Frobenius norm whose spectral norm is at most `largest`, in place."""
    # The Frobenius norm is a cheap bound of the spectral norm: within it there is nothing to do.
    if math.isinf(largest) or torch.linalg.matrix_norm(weight) <= largest:
        return
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    if values[0] > largest:
        weight.copy_((left * values.clamp_max(largest)) @ right)


def check_family(name: str, family: GeneratorFamily) -> None:
    """TypeError unless it is an instance of a `GeneratorFamily`."""
    if isinstance(family, type) and issubclass(family, GeneratorFamily):
        raise TypeError(f"expected {name} as a GeneratorFamily, got the class {family.__name__}; call it: {family.__name__}()")
    if not isinstance(family, GeneratorFamily):
        raise TypeError(
            f"expected {name} as a GeneratorFamily, such as LinearMaps(max_norm=1.0) or MLPs(width=64), got {family!r}; "
            "dae.complexity has LinearMaps, MLPs, LipschitzNetworks, ConvDecoders and DropoutNetworks"
        )


def check_number(name: str, number: float) -> None:
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"expected {name} as a number, got {type(number).__name__}")


def check_positive(name: str, number: float) -> None:
    check_number(name, number)
    if not number > 0:
        raise ValueError(f"expected {name} > 0, got {number}")


def check_count(name: str, number: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"expected {name} as an int, got {type(number).__name__}")
    if number < 1:
        raise ValueError(f"expected {name} >= 1, got {number}")


def whole(name: str, capacity: float) -> int:
    check_number(name, capacity)
    if capacity != math.floor(capacity) or math.isinf(capacity):
        raise ValueError(f"expected a whole {name}, got {capacity}")
    return int(capacity)

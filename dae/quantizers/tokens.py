"""What discrete bottlenecks without a table of codes share: indices in a mixed radix, and binary codes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dae.distributed import sum_over_processes, world_size
from dae.quantizers.bottleneck import Bottleneck, Encoding

LARGEST_VOCABULARY = 2**62  # an index is an int64
LARGEST_DIGIT = 2**10  # a vocabulary that is a product is predicted by digits of at most so many values, if it is larger than:
ONE_HEAD = 2**14


class TokenBottleneck(Bottleneck):
    """A bottleneck whose latent is a grid of indices."""

    discrete = True
    kept = ("indices",)
    packed = torch.int32  # dtype of `pack`

    def pack(self, encoding: Encoding) -> Tensor:
        if encoding.indices is None:
            raise ValueError(f"{type(self).__name__} packs encodings with indices, got one without")
        return encoding.indices.flatten(1).to(self.packed)


def index_dtype(codes: int, knob: str = "vocab_size") -> torch.dtype:
    """The narrowest dtype of indices in a cache, int32 or int64; ValueError if there are more codes than 2^62."""
    if codes > LARGEST_VOCABULARY:
        raise ValueError(f"{knob}: {codes:,} codes are more than the {LARGEST_VOCABULARY:,} that an index can name")
    return torch.int32 if codes <= 2**31 else torch.int64


def grouped(radix: Sequence[int]) -> tuple[int, ...]:
    """Digits for a prior of a number whose digits have these sizes: the number itself if small, else products of neighbours.

    As few as `LARGEST_DIGIT` allows, and the largest of them as small as it can be.
    """
    if math.prod(radix) <= ONE_HEAD:
        return (math.prod(radix),)

    def within(largest: int) -> list[int]:
        groups: list[int] = []
        for size in radix:
            if groups and groups[-1] * size <= largest:
                groups[-1] *= size
            else:
                groups.append(size)
        return groups

    fewest = len(within(LARGEST_DIGIT))
    return tuple(next(groups for largest in range(2, LARGEST_DIGIT + 1) if len(groups := within(largest)) == fewest))


def number_of(digits: Tensor, radix: Sequence[int]) -> Tensor:
    """Integers [...] of digits [..., D], the first digit the lowest: n = sum_d digit_d prod_(e < d) radix_e."""
    weights = [1, *itertools.accumulate(radix[:-1], lambda a, b: a * b)]
    number = digits[..., 0].clone()
    for d, weight in enumerate(weights[1:], start=1):
        number += digits[..., d] * weight
    return number


def digits_of(number: Tensor, radix: Sequence[int]) -> Tensor:
    """The inverse of `number_of`: digits [..., D]."""
    digits = []
    for base in radix:
        digits.append(number % base)
        number = number // base
    return torch.stack(digits, dim=-1)


def entropy_loss(logits_BhwD: Tensor, diversity: float) -> Tensor:
    """Of soft binary codes: mean over the latents of H(code | latent) - diversity * H(code), in nats.

    Given a latent the bits are independent, P(bit d = 1) = sigmoid(logit_d), so the first term is a sum over bits, exactly and
    without a table of the 2^D codes. The second is bounded by its sum over bits, sum_d H(mean of P(bit d = 1)), with the mean
    over the batch of all processes; the bound is reached where the bits are independent of one another (Zhao et al. 2024, arXiv
    2406.07548, section 3.2, with groups of one bit).
    """
    flat_ND = logits_BhwD.flatten(0, -2)
    given = (F.softplus(flat_ND) - flat_ND * flat_ND.sigmoid()).sum(-1)
    mean_D = global_mean_of_rows(flat_ND.sigmoid())
    return given.sum() / max(1, len(given)) - diversity * (torch.special.entr(mean_D) + torch.special.entr(1 - mean_D)).sum()


def global_mean_of_rows(x_ND: Tensor) -> Tensor:
    """Mean over the rows of all processes; its gradient is this process's share, which the processes average."""
    totals = torch.cat([x_ND.detach().sum(0), x_ND.new_full((1,), len(x_ND))])
    rows = sum_over_processes(totals)[-1].clamp(min=1)
    own = x_ND.sum(0) / rows * world_size()
    return own + (totals[:-1] / rows - own).detach()

"""Autoregressive prior over the tokens of a VQ latent: a decoder-only, class-conditional Transformer.

Rotary positions (Su et al. 2021), QK-norm (Henry et al. 2020), RMSNorm (Zhang & Sennrich 2019), SwiGLU (Shazeer 2020);
the class is the first token, as in LlamaGen (Sun et al. 2024), and a null class serves classifier-free guidance. Learned
positions are added at the input: rotary ones say how far apart two tokens are, but what an image holds depends on where.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from dae_kernels import attention, linear_cross_entropy, rotary_table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dae.config import PriorConfig
from dae.distributed import draw_rows
from dae.models.layers import NORM_EPS, ClassConditional, Dropout, TransformerBlock
from dae.models.prior import Prior
from dae.precision import WideBuffers
from dae.quantizers.tokens import digits_of, number_of

FLOAT32_INTEGERS = 2**24  # a uniform float32 draw has no more values


class KVCache:
    """Keys and values of all positions seen so far, in tensors of fixed size [depth, B, heads, length, head_dim]."""

    def __init__(self, depth: int, batch: int, heads: int, length: int, head_dim: int, *, device, dtype):
        self.keys = torch.zeros(depth, batch, heads, length, head_dim, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.position = 0  # number of positions that are filled
        self.bias: Tensor | None = None  # of the attention to what `extend` returns; None: it is causal

    @property
    def empty(self) -> bool:
        return self.position == 0

    def begin(self, count: int) -> slice | Tensor:
        """The positions of a forward pass over the next `count`."""
        return slice(self.position, self.position + count)

    def end(self, count: int) -> None:
        """All layers have been extended by them."""
        self.position += count

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, heads, L, head_dim] of the next L positions; return all keys and values up to them."""
        end = self.position + k.shape[2]
        if end > self.keys.shape[3]:
            raise ValueError(f"the KV cache holds {self.keys.shape[3]} positions, asked to hold {end}")
        self.keys[layer, :, :, self.position : end] = k
        self.values[layer, :, :, self.position : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class FixedKVCache(KVCache):
    """A filled cache that goes on by one position a call, and counts on the device: all calls are the same work for a CUDA graph.

    Attention runs over the whole length, and a bias hides what is not filled.
    """

    def __init__(self, cache: KVCache):
        self.keys, self.values, self.position = cache.keys, cache.values, cache.position
        self.index = torch.full((1,), cache.position, dtype=torch.int64, device=cache.keys.device)
        self.all = torch.arange(cache.keys.shape[3], device=cache.keys.device)

    def begin(self, count: int) -> Tensor:
        if count != 1:
            raise ValueError(f"a fixed KV cache goes on by one position a call, got {count}")
        hidden = torch.full_like(self.all, -torch.inf, dtype=self.keys.dtype).masked_fill(self.all <= self.index, 0.0)
        self.bias = hidden[None, None, None]
        return self.index

    def end(self, count: int) -> None:
        self.index.add_(count)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, heads, 1, head_dim] of the next position; return keys and values of all positions, filled or not."""
        self.keys[layer].index_copy_(2, self.index, k.to(self.keys.dtype))  # under autocast k is narrower
        self.values[layer].index_copy_(2, self.index, v.to(self.values.dtype))
        return self.keys[layer], self.values[layer]


class ARBlock(TransformerBlock):
    """Causal, or over the keys and values of a cache."""

    def __init__(self, config: PriorConfig, layer: int):
        super().__init__(config.width, config.num_heads, config.dropout)
        self.layer = layer

    def forward(self, x: Tensor, table: Tensor, cache: KVCache | None = None) -> Tensor:
        q, k, v = self.queries_keys_values(x, table)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        bias = None if cache is None else cache.bias
        return self.finish(x, attention(q, k, v, causal=bias is None, bias=bias, impl=self.impl))


class ARPrior(WideBuffers, ClassConditional, Prior):
    """p(tokens | class) = prod_t p(token_t | class, token_<t).

    Args:
        config: width, depth, heads, dropout.
        vocab_size: number of codes K of the tokenizer.
        factors: sizes of the digits of a token where K is their product, the lowest first: the prior then predicts one digit
            after the other, p(token) = prod_f p(digit_f | digit_<f), with tables of sum_f K_f rows instead of K.
        sequence_length: tokens per image, T.
        num_classes: C; label C is the null class.
        tokenizer: identity of the latent whose tokens these are.
    """

    operation, impl = "linear_cross_entropy", "auto"
    rotary: Tensor
    shape = ("vocab_size", "sequence_length")

    def __init__(
        self,
        config: PriorConfig,
        *,
        vocab_size: int,
        sequence_length: int,
        num_classes: int,
        tokenizer: str = "",
        factors: Sequence[int] | None = None,
    ):
        super().__init__(config, num_classes, tokenizer)
        if config.width % config.num_heads or (config.width // config.num_heads) % 2:
            raise ValueError(
                f"prior.width={config.width} over prior.num_heads={config.num_heads}: expected an even, whole head dimension"
            )
        if factors is not None and math.prod(factors) != vocab_size:
            raise ValueError(f"factors {list(factors)} have the product {math.prod(factors)}, expected vocab_size={vocab_size}")
        self.vocab_size, self.sequence_length = vocab_size, sequence_length
        self.factors = [vocab_size] if factors is None else list(factors)
        rows = sum(self.factors)
        self.class_embedding = nn.Embedding(num_classes + 1, config.width)
        self.token_embedding = nn.Embedding(rows, config.width)
        self.position_embedding = nn.Embedding(sequence_length, config.width)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList([ARBlock(config, layer) for layer in range(config.depth)])
        self.norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.head = nn.Linear(config.width, rows, bias=False)  # of all digits
        if len(self.factors) > 1:
            self.digit_embedding = nn.Embedding(rows - self.factors[-1], config.width)  # of digits for those that follow
        table = rotary_table(sequence_length, config.width // config.num_heads)
        self.register_buffer("rotary", table, persistent=False)
        for name, parameter in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):  # residual branches start small, as in GPT-2
                nn.init.normal_(parameter, std=0.02 / (2 * config.depth) ** 0.5)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def to_config(self) -> dict:
        return super().to_config() | ({"factors": self.factors} if len(self.factors) > 1 else {})

    def embedded(self, table: nn.Embedding, digits: list[Tensor]) -> Tensor:
        """Sum of the rows of the first digits of a token in a table of all digits."""
        starts = accumulate(self.factors[:-1], initial=0)
        rows = [table(digit + start) for digit, start in zip(digits, starts, strict=False)]
        return torch.stack(rows).sum(0)

    def digit_logits(self, x: Tensor, digits: list[Tensor]) -> Tensor:
        """Logits [..., K_f] of the digit after the given ones of the next token, from the `hidden` state [..., width]."""
        return F.linear(self._told(x, digits), self._head(len(digits)))

    def _told(self, x: Tensor, digits: list[Tensor]) -> Tensor:
        return x + self.embedded(self.digit_embedding, digits) if digits else x

    def _head(self, factor: int) -> Tensor:
        """Rows [K_f, width] of the head for a digit."""
        start = sum(self.factors[:factor])
        return self.head.weight[start : start + self.factors[factor]]

    def forward(
        self, labels_B: Tensor, tokens_BT: Tensor, cache: KVCache | None = None, targets_BT: Tensor | None = None
    ) -> Tensor:
        """Logits [B, L, K] of the next token after the class and after each given token; with targets, their mean loss.

        Without cache, the input is the class followed by `tokens_BT` [B, L - 1]; with L - 1 = T - 1 given tokens the
        output holds the logits of all T. With a cache, the input is what follows the cached positions: the class (and
        tokens) in the first call, then tokens only.

        With `targets_BT` [B, L], the tokens that do follow, the result is a scalar: the mean of -log p(target) in nats per token
        (divide by log 2 for bits), without all logits at once. In training mode `label_smoothing` and `z_loss` are in it.

        ValueError: too many tokens, or logits of tokens of several digits, of which each depends on those before it.
        """
        x = self.hidden(labels_B, tokens_BT, cache)
        several = len(self.factors) > 1
        if targets_BT is None:
            if several:
                raise ValueError("a token of several digits has logits digit by digit: use `hidden` and `digit_logits`")
            return self.head(x)
        label_smoothing, z_loss = (self.config.label_smoothing, self.config.z_loss) if self.training else (0.0, 0.0)
        loss = functools.partial(linear_cross_entropy, label_smoothing=label_smoothing, z_loss=z_loss, impl=self.impl)
        if not several:
            return loss(x, self.head.weight, targets_BT)
        digits = list(digits_of(targets_BT, self.factors).unbind(-1))
        terms = [loss(self._told(x, digits[:f]), self._head(f), digit.contiguous()) for f, digit in enumerate(digits)]
        return torch.stack(terms).sum()

    def hidden(self, labels_B: Tensor, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """The state [B, L, width] from which the next token is predicted; arguments as of `forward`."""
        if len(self.factors) > 1:
            x = self.embedded(self.token_embedding, list(digits_of(tokens_BT, self.factors).unbind(-1)))
        else:
            x = self.token_embedding(tokens_BT)
        if cache is None or cache.empty:
            x = torch.cat([self.class_embedding(labels_B)[:, None], x], dim=1)
        positions = slice(0, x.shape[1]) if cache is None else cache.begin(x.shape[1])
        if isinstance(positions, slice) and positions.stop > self.sequence_length:
            raise ValueError(
                f"the prior models {self.sequence_length} tokens; class and {positions.stop - 1} tokens given is too many"
            )
        x = self.dropout(x + self.position_embedding.weight[positions])
        table = self.rotary[:, positions]
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, table, None, use_reentrant=False)
            else:
                x = block(x, table, cache)
        if cache is not None:
            cache.end(x.shape[1])
        return self.norm(x)

    def corrupt(self, tokens_BT: Tensor) -> Tensor:
        """Input tokens, each replaced by a random one with probability `token_noise` (Esser et al. 2021 call 1 - p `pkeep`).

        The targets stay clean: the prior learns to continue also what it would not have written itself.
        """
        if self.config.token_noise == 0:
            return tokens_BT
        options = {"device": tokens_BT.device, "dtype": torch.float32}
        noisy = draw_rows(torch.rand, tokens_BT.shape, **options) < self.config.token_noise
        sizes = [self.vocab_size] if self.vocab_size <= FLOAT32_INTEGERS else self.factors
        draws = [(draw_rows(torch.rand, tokens_BT.shape, **options) * size).long() for size in sizes]
        random = number_of(torch.stack(draws, dim=-1), sizes)
        return torch.where(noisy, random, tokens_BT)

    def make_cache(self, batch: int) -> KVCache:
        """An empty cache for `batch` sequences, on the model's device and in its dtype."""
        weight = self.head.weight
        heads = self.config.num_heads
        return KVCache(
            self.config.depth,
            batch,
            heads,
            self.sequence_length,
            self.config.width // heads,
            device=weight.device,
            dtype=weight.dtype,
        )

"""Cases of sampling from the prior: T tokens for each of B images, with the keys and values of earlier positions and without.

Both draw from the same generator, so `error` is the share of tokens that differ. Flops are those of the matrices, once a token.
"""

from __future__ import annotations

import torch

from dae.config import PriorConfig
from dae.models import ARPrior
from dae.sampling import sample_tokens

SHAPES = {
    "cuda": [{"B": 32, "T": 256, "width": 768, "depth": 12}],
    "cpu": [{"B": 4, "T": 256, "width": 256, "depth": 4}],
}
DTYPES = {"cuda": ["float32"], "cpu": ["float32"]}


def cases(Case, shape, dtype, device):
    config = PriorConfig(width=shape["width"], depth=shape["depth"], num_heads=shape["width"] // 64)
    prior = ARPrior(config, vocab_size=1024, sequence_length=shape["T"], num_classes=10).to(device, dtype).eval()
    labels = torch.arange(shape["B"], device=device) % 10

    def generator() -> torch.Generator:
        return torch.Generator(device).manual_seed(0)

    @torch.no_grad()
    def whole_prefix() -> torch.Tensor:
        drawn, tokens = generator(), labels.new_empty(len(labels), 0)
        for _ in range(shape["T"]):
            logits = prior(labels, tokens)[:, -1].float()
            tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1, generator=drawn)], dim=1)
        return tokens

    matrices = sum(m.weight.numel() for m in prior.modules() if isinstance(m, torch.nn.Linear))
    least = {"flops": 2 * matrices * shape["B"] * shape["T"], "bytes": matrices * prior.head.weight.element_size()}
    product = str(dtype).removeprefix("torch.")
    cached = lambda: sample_tokens(prior, labels, generator=generator())  # noqa: E731
    yield Case("sample_tokens", "cached", lambda: (cached, []), product=product, **least)
    yield Case("sample_tokens", "whole prefix", lambda: (whole_prefix, []), product=product, note="anew for each token", **least)

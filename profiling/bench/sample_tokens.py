"""Cases of sampling from the prior: T tokens for each of B images, with and without a KV cache and a CUDA graph.

All draw from the same generator, so `error` is the share of tokens that differ. Flops are those of the matrices, once per token.
"""

from functools import partial

import torch
from cases import Case

from dae.config import PriorConfig
from dae.models import ARPrior
from dae.sampling import sample_tokens

SHAPES = {
    "cuda": [{"B": 32, "T": 256, "width": 768, "depth": 12}],
    "cpu": [{"B": 4, "T": 256, "width": 256, "depth": 4}],
}


def cases(device, dtype, B, T, width, depth):
    config = PriorConfig(width=width, depth=depth, num_heads=width // 64)
    prior = ARPrior(config, vocab_size=1024, sequence_length=T, num_classes=10).to(device, dtype).eval()
    labels = torch.arange(B, device=device) % 10
    matrices = sum(m.weight.numel() for m in prior.modules() if isinstance(m, torch.nn.Linear))
    work = {"flops": 2 * matrices * B * T, "bytes": matrices * prior.head.weight.element_size()}
    seeded = lambda: torch.Generator(device).manual_seed(0)  # noqa: E731
    case = partial(Case, "sample_tokens", product=dtype, **work)

    @torch.no_grad()
    def whole_prefix():
        generator, tokens = seeded(), labels.new_empty(B, 0)
        for _ in range(T):
            logits = prior(labels, tokens)[:, -1].float()
            tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
        return tokens

    yield case("cached", lambda: sample_tokens(prior, labels, generator=seeded()))
    if torch.device(device).type == "cuda":
        yield case("cached, a graph a token", lambda: sample_tokens(prior, labels, generator=seeded(), cuda_graphs=True))
    yield case("whole prefix", whole_prefix, note="anew for each token")

"""Sampling from the autoregressive prior, one token after another, over a static KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from dae.models.ar_prior import ARPrior


def filter_logits(logits_BK: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Set to -inf all but the `top_k` likeliest entries, then all but the fewest that together reach `top_p`.

    Ties at the border of top-k are all kept; the likeliest entry always is.

    Raises:
        ValueError: top_k < 1, or top_p outside (0, 1].
    """
    if top_k is not None:
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        border = logits_BK.topk(min(top_k, logits_BK.shape[-1])).values[..., -1:]
        logits_BK = logits_BK.masked_fill(logits_BK < border, -torch.inf)
    if top_p is not None:
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
        if top_p == 1:  # all are needed, whatever their rounded sum says
            return logits_BK
        sorted_logits, order = logits_BK.sort(descending=True, stable=True)
        probabilities = sorted_logits.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p  # the likelier ones alone reach top_p
        logits_BK = logits_BK.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits_BK


@torch.no_grad()  # not inference_mode, whose tensors no later training could take
def sample_tokens(
    prior: ARPrior,
    labels_B: Tensor,
    *,
    cfg_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Tokens [B, T] drawn from p(tokens | label).

    Guidance (Ho & Salimans 2022): logits = null + cfg_scale * (conditional - null), so 1 is the model itself and 0 ignores
    the class. Then the logits are divided by `temperature` and filtered by `top_k` and `top_p`; temperature 0 takes the
    likeliest token.

    Args:
        prior: in evaluation mode.
        labels_B: int64 classes, on the prior's device; `prior.null_class` samples without class.
        generator: on the prior's device; its state decides the result.

    Raises:
        ValueError: labels outside the classes, a negative temperature or guidance, top_k or top_p out of range.
    """
    if temperature < 0 or cfg_scale < 0:
        raise ValueError(f"temperature and cfg_scale must not be negative, got {temperature} and {cfg_scale}")
    prior.check_labels(labels_B)
    guided = cfg_scale != 1
    B, T = len(labels_B), prior.sequence_length
    labels = torch.cat([labels_B, torch.full_like(labels_B, prior.null_class)]) if guided else labels_B
    cache = prior.make_cache(len(labels))
    tokens_BT = torch.empty(B, T, dtype=torch.int64, device=labels_B.device)
    new = tokens_BT[:, :0]
    for t in range(T):
        logits = prior(labels, new.repeat(2, 1) if guided else new, cache)[:, -1].float()
        if guided:
            conditional, null = logits.chunk(2)
            logits = null + cfg_scale * (conditional - null)
        logits = filter_logits(logits / (temperature or 1), top_k, top_p)
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens_BT[:, t : t + 1] = new
    return tokens_BT

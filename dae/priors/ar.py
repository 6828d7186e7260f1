"""ar: autoregressive Transformer over tokens; its loss, held-out bits per token, and sampling over a static KV cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from dae_kernels.checks import as_integer, as_number, check_floating
from torch import Tensor

from dae.config import Config, PriorConfig, SamplingConfig
from dae.cuda_graphs import Recorder
from dae.models import ARPrior
from dae.models.ar_prior import FixedKVCache
from dae.priors.family import PriorFamily, draw_augmentations, latent_shape
from dae.quantizers.tokens import number_of

if TYPE_CHECKING:
    from dae.data.cache import EncodedDataset, EncodingCache


class Autoregressive(PriorFamily[ARPrior]):
    """Autoregressive Transformer over the tokens of a discrete latent."""

    name, model, discrete = "ar", ARPrior, True
    criterion = bits_key = "bits_per_token"
    head_unit = 2  # rotary positions turn pairs
    sampling_knobs = ("cfg_scale", "temperature", "top_k", "top_p")
    title, tags = "Autoregressive prior", ("autoregressive", "image-generation")
    imports, usage = "sample_tokens", "autoencoder.decode_indices(sample_tokens(prior, labels)).sample"
    noun = "an autoregressive Transformer"
    learned = "a Transformer, the prior, learned which tokens follow one another"
    loss_name, loss_unit, best = "bits per token", math.log(2), "fewest held-out bits"
    loss_meaning = "Bits per token are what the prior needs to write down one token of an image, given those before it."

    def build(self, settings: PriorConfig, cache: EncodingCache) -> ARPrior:
        shape, factors = latent_shape(cache), getattr(cache, "factors", None)
        return ARPrior(settings, sequence_length=shape.pop("latent_size") ** 2, factors=factors, **shape)

    def loss(self, model: Callable[..., Tensor], prior: ARPrior, batch: dict[str, Tensor]) -> Tensor:
        """Mean of -log p(token | class, earlier tokens) in nats, with class dropout and token noise."""
        tokens = draw_augmentations(batch["tokens"])
        return model(prior.drop_labels(batch["label"]), prior.corrupt(tokens[:, :-1]), targets_BT=tokens)

    @torch.inference_mode()
    def score(self, prior: ARPrior, encoded: EncodedDataset, config: Config) -> float:
        """Mean of -log2 p(token | class, earlier tokens)."""
        prior.eval()
        batch_size = config.evaluation.batch_size
        device, total = prior.head.weight.device, 0.0
        for labels, batch in zip(encoded.labels_N.split(batch_size), encoded.values_NC[:, 0].split(batch_size), strict=True):
            batch = batch.long().to(device)
            total += prior(labels.to(device), batch[:, :-1], targets_BT=batch).item() * len(labels)
        return total / len(encoded) / math.log(2)

    def bits_per_image(self, prior: ARPrior, encoded: EncodedDataset, config: Config) -> float:
        return self.score(prior, encoded, config) * prior.sequence_length

    def tokens_per_image(self, prior: ARPrior) -> int:
        return prior.sequence_length

    def sample(self, prior: ARPrior, labels_B: Tensor, settings: SamplingConfig, generator: torch.Generator) -> Tensor:
        options = {knob: getattr(settings, knob) for knob in self.sampling_knobs}
        return sample_tokens(prior, labels_B, **options, generator=generator, cuda_graphs=settings.cuda_graphs)

    def rehearse(self, prior: ARPrior, batch: dict[str, Tensor]) -> None:
        if prior.sequence_length > 1:  # sampling: one token after the other
            cache, labels = prior.make_cache(1), batch["label"][:1]
            prior.hidden(labels, batch["tokens"][:1, 0, :0], cache)
            prior.hidden(labels, batch["tokens"][:1, 0, :1], cache)


def filter_logits(logits_BK: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Set to -inf all but the `top_k` likeliest entries, then all but the fewest that together reach `top_p`.

    Ties at the border of top-k are all kept; the likeliest entry always is. Probabilities are added in float32 at least. An
    entry of +inf is certain; a row with NaN, or of -inf alone, has no probabilities and is left as it is by top-p.

    Raises:
        TypeError: logits that are no floating point tensor, or a filter that is no number.
        ValueError: logits without entries, top_k < 1, or top_p outside (0, 1].
    """
    check_floating("filter_logits", "logits", logits_BK)
    if logits_BK.dim() == 0 or logits_BK.shape[-1] == 0:
        raise ValueError(f"filter_logits needs logits [..., K] with K >= 1, got {list(logits_BK.shape)}")
    if top_k is not None:
        top_k = as_integer("filter_logits", "top_k", top_k)
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        border = logits_BK.topk(min(top_k, logits_BK.shape[-1])).values[..., -1:]
        logits_BK = logits_BK.masked_fill(logits_BK < border, -torch.inf)
    if top_p is not None:
        top_p = as_number("filter_logits", "top_p", top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
        if top_p == 1:  # keep all, whatever their rounded sum is
            return logits_BK
        sorted_logits, order = logits_BK.sort(descending=True, stable=True)
        wide = torch.promote_types(logits_BK.dtype, torch.float32)
        probabilities = sorted_logits.to(wide).nan_to_num(math.nan, None, -math.inf).softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p  # the likelier ones alone reach top_p
        beyond[..., 0] = False  # float32 has no top_p below 1e-45
        logits_BK = logits_BK.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits_BK


@torch.no_grad()  # not inference_mode: its tensors cannot be trained on
def sample_tokens(
    prior: ARPrior,
    labels_B: Tensor,
    *,
    cfg_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    cuda_graphs: bool = False,
) -> Tensor:
    """Tokens [B, T] drawn from p(tokens | label).

    Guidance (Ho & Salimans 2022): logits = null + cfg_scale * (conditional - null), so 1 is the model itself and 0 ignores
    the class. Then the logits are divided by `temperature` and filtered by `top_k` and `top_p`, of tokens of several digits
    (`prior.factors`) digit by digit; temperature 0 takes the
    likeliest token, as one near 0 does unless several are as likely. An infinite temperature draws uniformly.

    Args:
        prior: in evaluation mode.
        labels_B: int64 classes, on the prior's device; `prior.null_class` samples without class.
        generator: on the prior's device; its state decides the result.
        cuda_graphs: from the third token on, start all kernels of a token by one call. Attention then runs over all positions,
            of which a mask hides the later ones, so logits may differ by rounding.

    Raises:
        TypeError: an option of another type.
        ValueError: labels outside the classes, a negative temperature or guidance, guidance of a prior without class dropout,
            top_k or top_p out of range, `cuda_graphs` on another device, or logits with NaN or infinity, after guidance; -inf
            forbids a token, as long as another is left.
    """
    operation = "sample_tokens"
    temperature, cfg_scale = as_number(operation, "temperature", temperature), as_number(operation, "cfg_scale", cfg_scale)
    if not (temperature >= 0 and 0 <= cfg_scale < math.inf):
        raise ValueError(
            f"temperature and cfg_scale must not be negative, and cfg_scale finite, got {temperature} and {cfg_scale}"
        )
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"{operation} needs generator as a torch.Generator or None, got {type(generator).__name__}")
    number = torch.finfo(torch.float32)
    divisor = min(max(temperature, number.tiny), number.max)
    prior.check_labels(labels_B)
    prior.check_guidance(cfg_scale)
    recorder = Recorder(labels_B.device, [generator] if generator is not None else []) if cuda_graphs else None
    guided = cfg_scale != 1
    B, T = len(labels_B), prior.sequence_length
    labels = torch.cat([labels_B, torch.full_like(labels_B, prior.null_class)]) if guided else labels_B
    cache = prior.make_cache(len(labels))
    tokens_BT = torch.empty(B, T, dtype=torch.int64, device=labels_B.device)
    finite = torch.ones((), dtype=torch.bool, device=labels_B.device)  # read once, at the end: a GPU would wait at each token

    def draw(latest: Tensor) -> Tensor:
        """The next token [B, 1] after the latest."""
        latest = latest.repeat(2, 1) if guided else latest
        if len(prior.factors) == 1:
            return drawn(prior(labels, latest, cache)[:, -1].float())
        state = prior.hidden(labels, latest, cache)[:, -1:]
        digits: list[Tensor] = []
        for _ in prior.factors:
            given = [digit.repeat(2, 1) if guided else digit for digit in digits]
            digits.append(drawn(prior.digit_logits(state, given)[:, -1].float()))
        return number_of(torch.stack(digits, dim=-1), prior.factors)

    def drawn(logits: Tensor) -> Tensor:
        """An index [B, 1] drawn from logits [B, K], with guidance [2 B, K]."""
        if guided:
            conditional, null = logits.chunk(2)
            logits = null + cfg_scale * (conditional - null)
        largest = logits.amax(-1, keepdim=True)  # NaN if any of them is
        known = largest.isfinite()
        finite.logical_and_(known.all())
        # Subtract the largest first: then no division overflows.
        logits = filter_logits((logits - largest).where(known, 0.0) / divisor, top_k, top_p)
        if temperature == 0:
            return logits.argmax(-1, keepdim=True)
        probabilities = logits.softmax(-1)
        # torch.multinomial's draw, without its checks, for which a GPU would wait.
        return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(-1, keepdim=True)

    new = tokens_BT[:, :0]
    for t in range(T if recorder is None else min(T, 1)):
        new = draw(new)
        tokens_BT[:, t : t + 1] = new
    if recorder is not None:
        cache, rest = FixedKVCache(cache), recorder.repeated(lambda: new.copy_(draw(new)))
        for t in range(1, T):
            tokens_BT[:, t : t + 1] = rest()
    if not finite:
        raise ValueError(
            f"{operation} needs finite logits, got NaN or infinity (or -inf alone); look for a diverged prior, or lower cfg_scale"
        )
    return tokens_BT

"""Measure reconstructions of held-out images batch by batch, without keeping all in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from dae.metrics import Classifier, CodebookUsage, as_float, extract_features, gaussian_rate, psnr, ssim
from dae.models import Autoencoder

BATCH_PIXELS = 500 * 64 * 64  # pixels to reconstruct at once: feature maps are larger than images


@torch.inference_mode()
def reconstruct(model: Autoencoder, classifier: Classifier, images: Tensor, shown: Tensor, batch_size: int) -> dict[str, Tensor]:
    """Measure the reconstructions of images [N, C, H, W] (for KL, from the posterior means).

    Args:
        shown: row numbers whose reconstructions are returned.
        batch_size: images at once, fewer if they are large.

    Returns:
        `psnr`, `ssim` and features `found` per image, the `rebuilt` images of the rows `shown`, and tokens or posteriors under
        their names in `Encoding`.
    """
    names = model.bottleneck.kept
    kept: dict[str, list[Tensor]] = {name: [] for name in ("psnr", "ssim", "found", "rebuilt", *names)}
    size = min(batch_size, max(1, BATCH_PIXELS // (images.shape[2] * images.shape[3])))
    for rows in torch.arange(len(images)).split(size):
        batch = as_float(images[rows])
        output = model(batch.to(model.device))
        rebuilt = output.sample.clamp(-1, 1).cpu()
        kept["psnr"].append(psnr(rebuilt, batch.cpu()))
        kept["ssim"].append(ssim(rebuilt, batch.cpu()))
        kept["found"].append(extract_features(classifier, rebuilt))
        kept["rebuilt"].append(rebuilt[torch.isin(rows, shown)])
        for name in names:
            kept[name].append(getattr(output.encoding, name).cpu())
    return {name: torch.cat(parts) for name, parts in kept.items()}


def describe_latent(autoencoder: Autoencoder, measured: dict[str, Tensor]) -> dict:
    """Codebook usage ("codebook") or the rate of a continuous latent under one Gaussian ("latent"); the other is None.

    Args:
        measured: result of `reconstruct`.
    """
    if autoencoder.bottleneck.discrete:
        usage = CodebookUsage(*autoencoder.bottleneck.vocabulary(autoencoder.config)).update(measured["indices"])
        found = {"usage": usage.usage, "perplexity": usage.perplexity, "entropy": usage.entropy, "counts": usage.counts.tolist()}
        return {"codebook": found, "latent": None}
    means, log_variances = (measured[name].split(1, dim=1) for name in ("features", "log_variance"))  # by channel
    bits = [gaussian_rate(*pair, covariance="diagonal") for pair in zip(means, log_variances, strict=True)]
    facts = {"channels": len(means), "size": means[0].shape[2], "gaussian_bits": sum(bits), "gaussian_bits_by_channel": bits}
    return {"codebook": None, "latent": facts}

"""Known tokenizers by name: values of `autoencoder`'s keys, as their authors' configurations have them where one is named."""

from __future__ import annotations

from typing import Any, NamedTuple


class Preset(NamedTuple):
    title: str  # for --help
    values: dict[str, Any]  # nested as in a file, below `autoencoder`


VQGAN = {
    "architecture": "ldm",
    "base_channels": 128,
    "channel_multipliers": [1, 1, 2, 2, 4],
    "num_blocks": 2,
    "attention_resolutions": [16],
    "bottleneck": "vq_gradient",
}
KL = {"architecture": "ldm", "base_channels": 128, "num_blocks": 2, "bottleneck": "kl", "kl": {"kl_weight": 1e-6}}

PRESETS: dict[str, Preset] = {
    # taming-transformers, configs of vqgan_imagenet_f16_1024
    "vqgan_f16": Preset(
        "VQGAN of taming-transformers, 1024 codes of 256 channels",
        VQGAN | {"latent_channels": 256, "vq": {"codebook_size": 1024, "commitment_weight": 0.25}},
    ),
    # LlamaGen (Sun et al. 2024, arXiv 2406.06525), VQ-16
    "llamagen_f16": Preset(
        "LlamaGen's, 16384 codes of 8 channels on the sphere",
        VQGAN
        | {
            "latent_channels": 8,
            "ldm": {"z_channels": 256},
            "vq": {"codebook_size": 16384, "commitment_weight": 0.25, "metric": "cosine"},
        },
    ),
    # latent-diffusion, models/first_stage_models/kl-f8: Stable Diffusion's
    "kl_f8": Preset("Stable Diffusion's, 4 channels", KL | {"channel_multipliers": [1, 2, 4, 4], "latent_channels": 4}),
    # latent-diffusion, models/first_stage_models/kl-f16
    "kl_f16": Preset(
        "latent diffusion's, 16 channels",
        KL | {"channel_multipliers": [1, 1, 2, 2, 4], "attention_resolutions": [16], "latent_channels": 16},
    ),
    # the quantizer as in ViT-VQGAN (Yu et al. 2022, arXiv 2110.04627), sizes as ViT-B/16
    "vit_f16": Preset(
        "Transformers of the size of ViT-B/16, 8192 codes of 32 channels on the sphere",
        {
            "architecture": "vit",
            "vit": {"patch_size": 16, "width": 768, "depth": 12, "num_heads": 12},
            "latent_channels": 32,
            "bottleneck": "vq",
            "vq": {"codebook_size": 8192, "metric": "cosine"},
        },
    ),
}

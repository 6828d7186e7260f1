"""Dataclasses with every knob of the autoencoder: encoder, bottlenecks, decoders."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import List, Optional

from dae.config.knobs import knob, section
from dae.config.presets import PRESETS


@dataclass
class DecoderConfig:
    """A member of the decoder family: the generators for which the latent should be simple."""

    family: str = knob(
        "full",
        "full; or weaker: linear (one linear map per latent position), overlap (a linear map to 3 x 3 patches, which overlap), "
        "projection (the linear map that is best for the batch, solved anew for each), narrow, shallow, dropout",
        choices=("full", "linear", "overlap", "projection", "narrow", "shallow", "dropout"),
    )
    ridge: float = knob(1e-4, "projection: weight of |W|^2 beside the mean squared error, summed over a patch", ge=1e-8, le=1e8)
    width_factor: float = knob(0.25, "narrow: channels relative to the full decoder", gt=0, le=1)
    num_blocks: int = knob(
        0,
        "shallow: residual blocks per level, where a full decoder has num_blocks + 1; vit: of vit.depth",
        ge=0,
        le=1000,
    )
    dropout: float = knob(
        0.5,
        "dropout: probability that Dropout2d zeroes a channel after a residual block; vit: an entry of a residual branch",
        ge=0,
        lt=1,
    )
    latent_noise: float = knob(
        0.0, "any family, in training: Gaussian noise on its latents, in standard deviations of each channel", ge=0, le=100
    )
    latent_mask: float = knob(
        0.0, "any family, in training: share of its latents that are replaced by the batch's mean latent", ge=0, lt=1
    )


@dataclass
class AuxiliaryDecoderConfig(DecoderConfig):
    keep: bool = knob(
        False,
        "stage 2 goes on with the weights of this decoder, not with new ones: for full and dropout, which are the same network",
    )

    def without_keep(self) -> DecoderConfig:
        """The decoder alone, as `AutoencoderConfig.decoder` holds it."""
        return DecoderConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(DecoderConfig)})


@dataclass
class VQConfig:
    codebook_size: int = knob(64, "number of codes K", ge=1, le=2**24)
    ema_decay: float = knob(0.99, "decay of the moving average that carries the codebook", ge=0, lt=1)
    commitment_weight: float = knob(0.25, "weight of |z - sg(code)|^2 that keeps the encoder near its codes", ge=0, weight=True)
    kmeans_iterations: int = knob(10, "Lloyd iterations that place the codebook on the first batches; 0: random", ge=0, le=10_000)
    revive_threshold: float = knob(0.1, "codes used below this share of the average are moved onto a latent; 0: none", ge=0, lt=1)
    metric: str = knob("l2", "l2, or cosine: latents and codes of length 1, as in ViT-VQGAN", choices=("l2", "cosine"))
    gradient: str = knob(
        "ste",
        "of the encoder: ste passes the decoder's straight through, rotation turns it as the latent onto its code",
        choices=("ste", "rotation"),
    )


@dataclass
class FSQConfig:
    levels: List[int] = knob(
        [8, 5, 5, 5],
        "levels of each channel of the latent, autoencoder.latent_channels of them; their product is K",
        ge=2,
        le=4096,
    )


@dataclass
class BSQConfig:
    entropy_weight: float = knob(
        0.1, "weight of the entropy terms: sure of each latent's code, all codes used", ge=0, weight=True
    )
    diversity: float = knob(1.0, "weight of the batch's entropy within them", ge=0, weight=True)
    inverse_temperature: float = knob(100.0, "of the soft assignment that the entropies are of", gt=0)


@dataclass
class LFQConfig(BSQConfig):
    """The entropies of binary codes, and a commitment, which codes on a sphere do not need."""

    commitment_weight: float = knob(0.25, "weight of |z - sg(code)|^2", ge=0, weight=True)


@dataclass
class RVQConfig:
    num_quantizers: int = knob(2, "quantizers of autoencoder.vq.codebook_size codes, one after the other", ge=1, le=32)


@dataclass
class GVQConfig:
    groups: int = knob(2, "groups of channels, each with autoencoder.vq.codebook_size codes", ge=1, le=32)


@dataclass
class KLConfig:
    kl_weight: float = knob(
        1e-6, "weight of KL(q(z|x) || N(0, I)), summed over a latent, averaged over the batch", ge=0, weight=True
    )


@dataclass
class LDMConfig:
    z_channels: Optional[int] = knob(
        None, "channels of encoder and decoder next to the 1 x 1 convolutions; null: latent_channels", ge=1, le=65536
    )
    quant_conv: bool = knob(True, "1 x 1 convolution between encoder and bottleneck")
    post_quant_conv: bool = knob(True, "1 x 1 convolution between bottleneck and decoder")
    mid_attention: bool = knob(True, "self-attention between the two residual blocks next to the latent")
    norm_num_groups: int = knob(
        32, "groups of each normalisation, or their greatest common divisor with its channels", ge=1, le=65536
    )


@dataclass
class ViTConfig:
    patch_size: int = knob(16, "pixels of a patch's side: the downsampling factor", ge=1, le=16384)
    width: int = knob(256, "channels of the residual stream", ge=1, le=65536)
    depth: int = knob(6, "Transformer blocks of the encoder, and of a full decoder", ge=0, le=1000)
    num_heads: int = knob(4, "attention heads; 4 divides width / num_heads", ge=1)


@dataclass
class AutoencoderConfig:
    preset: Optional[str] = knob(
        None,
        "a known tokenizer, whose values the other keys of `autoencoder` have unless given: "
        + "; ".join(f"{name}: {known.title}" for name, known in PRESETS.items()),
        choices=(None, *PRESETS),
        role="free",
    )
    architecture: str = knob(
        "conv",
        "of encoder and full decoder: conv (residual blocks at each level); ldm (that of latent diffusion, taming-transformers "
        "and diffusers' AutoencoderKL and VQModel); vit (Transformer over patches)",
        choices=("conv", "ldm", "vit"),
    )
    encoder: Optional[str] = knob(
        None,
        "a frozen pretrained network as encoder, with bottleneck=identity: timm:<name>, or a folder with config.json and "
        "model.safetensors in timm's format; stage 1 is left out; null trains one",
        path=True,
    )
    base_channels: int = knob(64, "conv, ldm: channels at full resolution", ge=1, le=16384)
    channel_multipliers: List[int] = knob(
        [1, 2],
        "conv, ldm: channels of each level / base_channels; each level but the first halves the resolution",
        ge=1,
        le=1024,
    )
    num_blocks: int = knob(1, "conv, ldm: residual blocks per level in the encoder; a full decoder has one more", ge=0, le=1000)
    attention_resolutions: List[int] = knob([], "conv, ldm: feature-map sizes at which self-attention is added", ge=1)
    latent_channels: int = knob(16, "channels of the latent", ge=1, le=65536)
    bottleneck: str = knob(
        "vq",
        "tokens: vq (codes follow averages), vq_gradient (codes are trained), simvq (a trained map of fixed ones), rvq (codes of "
        "what codes left), gvq (codes of groups of channels), fsq, lfq (2^latent_channels codes), bsq (the same on a sphere); "
        "continuous: kl, identity (the encoder's output itself)",
        choices=("vq", "vq_gradient", "simvq", "rvq", "gvq", "fsq", "lfq", "bsq", "kl", "identity"),
    )
    vq: VQConfig = section(VQConfig, "vector quantization, of vq, vq_gradient, simvq, rvq and gvq")
    rvq: RVQConfig = section(RVQConfig, "residual vector quantization")
    gvq: GVQConfig = section(GVQConfig, "grouped vector quantization")
    fsq: FSQConfig = section(FSQConfig, "finite scalar quantization")
    lfq: LFQConfig = section(LFQConfig, "lookup-free quantization")
    bsq: BSQConfig = section(BSQConfig, "binary spherical quantization")
    kl: KLConfig = section(KLConfig, "Gaussian posterior")
    decoder: DecoderConfig = section(DecoderConfig, "the real decoder")
    ldm: LDMConfig = section(LDMConfig, "the architecture of latent diffusion")
    vit: ViTConfig = section(ViTConfig, "Vision Transformer")

"""The autoencoder: encoder, bottleneck, and a decoder from the decoder family."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dae.config import AutoencoderConfig, DecoderConfig, from_dict
from dae.hub import PretrainedModel
from dae.models.architectures import build_encoder, downsampling_factor, latent_size
from dae.models.decoders import build_decoder
from dae.models.diffusers_weights import (
    config_from_diffusers,
    config_to_diffusers,
    is_diffusers_folder,
    read_folder,
    write_folder,
)
from dae.models.latent import Latent, brief, identify, refuse_other_weights, weights_digest
from dae.models.pretrained_encoder import PretrainedEncoder
from dae.models.projection import ProjectionDecoder
from dae.models.weight_layouts import CODEBOOK, DIFFUSERS, Layout, from_layout, key_map, to_layout
from dae.precision import own_arithmetic
from dae.quantizers import Encoding, VectorQuantizer, bottleneck_class


@dataclass
class Decoding:
    sample: Tensor  # [B, C, H, W]


@dataclass
class Reconstruction:
    sample: Tensor  # [B, C, H, W]
    encoding: Encoding


class Autoencoder(PretrainedModel):
    """Encoder, bottleneck and decoder; the unit that is trained, saved and loaded.

    Args:
        config: architecture.
        image_channels: channels of the images, which are in [-1, 1].
        resolution: height and width of the images.
        pretrained: `PretrainedNetwork.description` of the network that `config.encoder` named when the model was saved, whose
            weights will be loaded; None loads those that `config.encoder` names.

    Attributes:
        latent: its identity as loaded or measured in training; None of a new model and of one that an earlier version saved.

    Raises:
        ImportError, FileNotFoundError: `config.encoder` names what is not there.
        ValueError: the resolution is not divisible by the encoder's factor, or a part of `config` is out of range.
    """

    encoder: Any  # modules with an attribute `gradient_checkpointing`
    decoder: Any

    def __init__(self, config: AutoencoderConfig, image_channels: int, resolution: int, pretrained: dict[str, Any] | None = None):
        super().__init__()
        self.config, self.image_channels, self.resolution = config, image_channels, resolution
        self.latent_frozen = False
        self.latent: Latent | None = None
        self.diffusers_config: dict[str, Any] = {}  # scale and the like of the latent, where the model came from diffusers
        self.factor = downsampling_factor(config)
        self.latent_size = latent_size(config, resolution)  # height and width of the latent
        self.bottleneck = bottleneck_class(config).build(config)
        features = config.latent_channels * self.bottleneck.features_per_latent
        if config.encoder:
            self.encoder = PretrainedEncoder(config, self.latent_size, self.factor, pretrained)
        else:
            self.encoder = build_encoder(config, image_channels, resolution, features)
        self.decoder = build_decoder(config, image_channels, resolution)

    def encode(self, images: Tensor, *, sample_posterior: bool = False) -> Encoding:
        """Images [B, C, H, W] in [-1, 1] to `.latents` [B, D, h, w], and for VQ `.indices` [B, h, w].

        Both have the model's dtype; under autocast the images may have another. A KL bottleneck returns the posterior's mean, or
        a sample of it with `sample_posterior`.

        Raises:
            ValueError: another number of channels, or a size that the encoder's factor does not divide.
        """
        if images.ndim != 4 or images.shape[1] != self.image_channels:
            raise ValueError(f"expected images [B, {self.image_channels}, H, W], got {list(images.shape)}")
        if images.shape[2] % self.factor or images.shape[3] % self.factor:
            raise ValueError(f"height and width must be divisible by {self.factor}, got {list(images.shape[2:])}")
        features = self.encoder(images).to(next(self.encoder.parameters()).dtype)  # autocast returns narrower ones
        return self.bottleneck(features, sample_posterior)

    def decode(self, latents: Tensor) -> Decoding:
        """Latents [B, D, h, w] to `.sample` [B, C, H, W], images in about [-1, 1] (not clipped)."""
        return Decoding(self.decoder(latents))

    def decode_indices(self, indices: Tensor) -> Decoding:
        """Codebook indices [B, h, w], or [B, h * w] in raster order, to `.sample` [B, C, H, W].

        Raises:
            ValueError: the bottleneck has no codebook, an index lies outside it, or a raster of another length.
        """
        if not self.bottleneck.discrete:
            raise ValueError(
                f"autoencoder.bottleneck={self.config.bottleneck} has no indices, its latent is continuous: use .decode(latents)"
            )
        codes = self.bottleneck.num_codes(self.config)
        if indices.numel() and not (indices.min() >= 0 and indices.max() < codes):
            raise ValueError(f"indices must lie in 0..{codes - 1}, got {int(indices.min())}..{int(indices.max())}")
        if indices.ndim == 2:
            if indices.shape[1] != self.latent_size**2:
                raise ValueError(f"expected {self.latent_size**2} indices an image in raster order, got {indices.shape[1]}")
            indices = indices.unflatten(1, (self.latent_size, self.latent_size))
        return self.decode(self.bottleneck.lookup(indices).to(self.dtype))

    def forward(self, images: Tensor) -> Reconstruction:
        encoding = self.encode(images, sample_posterior=self.training)
        targets = (images,) if self.training and isinstance(self.decoder, ProjectionDecoder) else ()
        return Reconstruction(self.decoder(encoding.latents, *targets), encoding)

    def freeze_latent(self, *, codebook: bool = True) -> None:
        """Freeze encoder and bottleneck for good: no gradients, no codebook update, evaluation mode even after `.train()`.

        Without `codebook` the encoder alone: the bottleneck goes on learning.
        """
        self.latent_frozen = True
        self.encoder.requires_grad_(False)
        if codebook:
            self.bottleneck.frozen = True
            self.bottleneck.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Autoencoder:
        super().train(mode)
        if self.latent_frozen:
            self.encoder.eval()
        if self.bottleneck.frozen:
            self.bottleneck.eval()
        return self

    def replace_decoder(self, decoder: DecoderConfig, *, keep_weights: bool = False) -> None:
        """Replace the decoder by a freshly initialised one (the switch from stage 1 to stage 2), or by one of the same weights.

        RuntimeError: weights are to be kept, and the decoders are not the same network.
        """
        weights = self.decoder.state_dict() if keep_weights else None
        self.config = dataclasses.replace(self.config, decoder=decoder)
        new = build_decoder(self.config, self.image_channels, self.resolution)
        if weights is not None:
            new.load_state_dict(weights)
        self.decoder = new.to(self.device, self.dtype).train(self.training)
        self.decoder.gradient_checkpointing = self.encoder.gradient_checkpointing

    def with_decoder(self, name_or_path: str | Path, *, revision: str | None = None) -> Autoencoder:
        """This latent with the decoder of another autoencoder, in eval mode, on this one's device and in its dtype.

        Args:
            name_or_path: an autoencoder of the same latent, as for `from_pretrained`, or a folder as for `from_diffusers`.
            revision: of a repository of the Hub.

        Raises:
            FileNotFoundError, ValueError: as `from_pretrained` or `from_diffusers`; or its latent is another one.
        """
        if is_diffusers_folder(name_or_path):
            other = self.from_diffusers(name_or_path, resolution=self.resolution)
        else:
            other = self.from_pretrained(name_or_path, revision=revision)
        own, its = identify(self), identify(other)
        unnamed = self.latent is None or other.latent is None  # earlier versions did not say how images were cropped
        if own.id != its.id and not (unnamed and (own.is_of(its.weights) or its.is_of(own.weights))):
            raise ValueError(
                f"the decoder in {name_or_path} reads the latent {brief(its.id)}, this autoencoder's is {brief(own.id)}: take a "
                "decoder that was trained on this latent (recipes/refit.py)"
            )
        other.to(self.device, self.dtype)
        for part in ("encoder", "bottleneck"):
            getattr(other, part).load_state_dict(getattr(self, part).state_dict())
        other.latent, other.diffusers_config = own, self.diffusers_config
        return other

    def save_pretrained(self, folder: str | Path, *, state_dict: dict | None = None, card: str | None = None) -> None:
        """As `PretrainedModel.save_pretrained`, and `latent.json`, the identity of the latent (`dae.models.latent`)."""
        super().save_pretrained(folder, state_dict=state_dict, card=card)
        identify(self, state_dict).save(Path(folder))

    def remember(self, folder: Path) -> None:
        if (latent := Latent.load(folder)) is not None:
            refuse_other_weights(latent, weights_digest(self.state_dict(), self.config), folder)
            self.latent, self.diffusers_config = latent, dict(latent.diffusers)

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = enabled

    def refuse_other_data(self, image_channels: int, resolution: int) -> None:
        """ValueError unless the autoencoder was made for images of this size and number of channels."""
        if (self.image_channels, self.resolution) != (image_channels, resolution):
            raise ValueError(
                f"this autoencoder was trained on {self.image_channels}-channel images of {self.resolution} pixels, "
                f"data.channels={image_channels} and data.resolution={resolution} are asked for"
            )

    def to_config(self) -> dict:
        known = {"image_channels": self.image_channels, "resolution": self.resolution}
        if self.config.encoder:
            known["pretrained"] = self.encoder.backbone.description
        return known | {"autoencoder": dataclasses.asdict(self.config)}

    @classmethod
    def read_pretrained(
        cls, name_or_path: str | Path, revision: str | None = None
    ) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
        if is_diffusers_folder(name_or_path):
            raise ValueError(f"{name_or_path} is a folder of diffusers: load it by Autoencoder.from_diffusers")
        return super().read_pretrained(name_or_path, revision)

    @classmethod
    @own_arithmetic(gradients=True)
    def from_diffusers(
        cls,
        path: str | Path,
        *,
        resolution: int | None = None,
        variant: str | None = None,
        device: Any = "cpu",
        torch_dtype: torch.dtype | None = None,
    ) -> Autoencoder:
        """Load diffusers' AutoencoderKL or VQModel from a folder, in eval mode; `to_diffusers` is the inverse.

        Both compute the same: the posterior's mean and log-variance, the codes, the decoder's images. What the configuration has
        beside the network, such as `scaling_factor`, is in `diffusers_config`.

        Args:
            path: with `config.json` and `diffusion_pytorch_model.safetensors`, or of a pipeline that has it in `vae`.
            resolution: of the images; None takes `sample_size`, rounded up to what the factor divides.
            variant: of the weights, such as fp16.
            device, torch_dtype: as of `from_pretrained`.

        Raises:
            FileNotFoundError: no such folder, or no model in it.
            ValueError: weights as a pickle alone, another class, an option that the architecture `ldm` lacks, tensors that are
                missing or left over, or damaged files.
        """
        given, weights, folder = read_folder(path, variant)
        config, channels, resolution, beside = config_from_diffusers(given, str(folder / "config.json"), resolution)
        model = cls.from_layout(DIFFUSERS, weights, config, channels, resolution, str(folder))
        model.diffusers_config = beside
        latent = Latent.load(folder)
        digest = weights_digest(model.state_dict(), config)
        if latent is not None and latent.transform["resolution"] == resolution and latent.is_of(digest):
            model.latent = latent
        return model.to(device, torch_dtype or torch.float32)

    @classmethod
    def from_layout(
        cls,
        layout: Layout,
        weights: dict[str, Tensor],
        config: AutoencoderConfig,
        image_channels: int,
        resolution: int,
        source: str,
    ) -> Autoencoder:
        """An autoencoder with the weights of another project, in eval mode. ValueError: they do not fit the configuration."""
        model = cls(config, image_channels, resolution)
        names = key_map(layout, config, resolution)
        model.load_state_dict(from_layout(weights, model.state_dict(), names, layout, source))
        return model.eval()

    def to_diffusers(self, folder: str | Path, *, scaling_factor: float | None = None, shift_factor: float | None = None) -> None:
        """Write a folder that diffusers' `AutoencoderKL.from_pretrained` or `VQModel.from_pretrained` loads.

        Args:
            folder: created if missing.
            scaling_factor, shift_factor: a diffusion model there works on (latent - shift) * scale; None keeps what
                `from_diffusers` read, else those measured in training (`latent.scale`, `latent.shift`), else 1 and no shift.

        Raises:
            ValueError: diffusers has no such network; the message names what it lacks.
            OSError: the folder cannot be written.
        """
        latent, given = identify(self), {"scaling_factor": scaling_factor, "shift_factor": shift_factor}
        measured = {"scaling_factor": latent.scale, "shift_factor": latent.shift}
        beside: dict[str, Any] = {}
        for factors in (self.diffusers_config or measured, given):
            beside |= {name: value for name, value in factors.items() if value is not None}
        config = config_to_diffusers(self.config, self.image_channels, self.resolution, beside)
        weights = self.state_dict()
        if isinstance(self.bottleneck, VectorQuantizer):  # the codes as they are compared, wherever they come from
            weights[CODEBOOK] = self.bottleneck.codes()
        write_folder(folder, config, to_layout(weights, key_map(DIFFUSERS, self.config, self.resolution), DIFFUSERS))
        latent.save(Path(folder))

    @classmethod
    def from_config(cls, config: dict) -> Autoencoder:
        shape = config["image_channels"], config["resolution"]
        return cls(from_dict(AutoencoderConfig, config["autoencoder"]), *shape, config.get("pretrained"))

"""Sources of latents to measure: noise, PCA, features, autoencoders (saved or trained here), or a user's function."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dae.complexity.estimate import check_cloud, check_pair
from dae.complexity.own_function import codes_of_function
from dae.config import Config
from dae.hub import fingerprint
from dae.metrics import Classifier, extract_features
from dae.models import Autoencoder
from dae.models.pretrained import INPUT, PretrainedNetwork
from dae.precision import own_arithmetic
from dae.seeding import seed_for
from dae.training import plan_stages

MIXTURE_COMPONENTS, MIXTURE_WITHIN = 10, 0.1  # Gaussians, and the share of variance within each


@dataclass(frozen=True)
class Latent:
    """A latent of N images."""

    name: str  # its specification
    codes: Tensor  # float32 [N, ...], unscaled
    paired: bool  # code n was computed from image n; False for noise, which has no reconstruction error
    description: str  # sentence for a page
    provenance: dict[str, Any]  # JSON-able: fingerprints, settings, seed, and the SHA-256 of the codes


@own_arithmetic(gradients=True)
def load_latent(spec: str, images_NCHW: Tensor, labels_N: Tensor | None, config: Config, seed: int) -> Latent:
    """Load or compute the latent named by `spec`, one code per image.

    | spec | codes |
    |---|---|
    | `gaussian`, `uniform` | [N, measure.latent_dim]: independent numbers of mean 0 and variance 1 |
    | `mixture` | the same shape: 10 equally likely Gaussians N(m_k, 0.1 I), with m_k drawn from N(0, 0.9 I) |
    | `pca` | [N, measure.latent_dim]: the images' leading principal components, centred, not whitened |
    | `label` | [N, classes]: one-hot classes |
    | `features:<name>` | [N, D]: pooled features of a network of timm by name, of a folder in timm's format (config.json and \
weights), or of a file written by `dae.metrics.Classifier.save` |
    | `autoencoder:<folder>` | [N, D, h, w]: of a VQ autoencoder the code vectors, of a KL one the posteriors' means |
    | `posterior:<folder>` | [N, D, h, w]: of a KL autoencoder one sample of each posterior |
    | `ae`, `vae`, `vq`, `dae` | [N, D, h, w]: as above, of an autoencoder trained here by `config`, all its steps: KL of \
weight 0, KL and VQ trained jointly, and the configured bottleneck by method dae |
    | `package.module:function` | what function(images) returns, [N, ...]; the current directory is importable |

    Fitted latents (pca, ae, vae, vq, dae) use all these images.

    Args:
        images_NCHW: images in [-1, 1].
        labels_N: their classes, int64; None without labels.
        config: measure.latent_dim, and architecture and training of autoencoders trained here.
        seed: for all randomness; the global random state is restored.

    Raises:
        ValueError: an unknown specification; codes with NaN, of another length than the images, constant, or that float32
            cannot represent or distinguish; images that do not fit an autoencoder; too many principal components.
        TypeError: not a function, or one that returns no dense floating tensor or array.
        RuntimeError: a function that raises; its own error is the cause.
        ImportError: a module or function that cannot be imported, whatever its code raises, or timm, which is not installed.
        FileNotFoundError: no such model.
    """
    check_cloud("images", images_NCHW)
    if images_NCHW.dim() != 4:
        raise ValueError(f"images: expected [N, C, H, W], got {list(images_NCHW.shape)}")
    kind, separator, argument = spec.partition(":")
    if spec in SOURCES:
        found = SOURCES[spec](spec, images_NCHW, labels_N, config, seed)
    elif separator:
        if kind in LOADERS and not argument:
            raise ValueError(f"latent {spec!r}: expected `{kind}:<what to load>`, got nothing after the colon")
        found = LOADERS[kind](spec, images_NCHW, config, seed) if kind in LOADERS else _from_function(spec, images_NCHW, seed)
    else:
        near = difflib.get_close_matches(spec, SOURCES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        loaders = ", ".join(f"{name}:<...>" for name in LOADERS)
        raise ValueError(
            f"measure.latents: expected one of {', '.join(SOURCES)}, {loaders} or package.module:function, got {spec!r}{hint}"
        )
    try:
        check_pair(found.codes, images_NCHW)
        codes = _in_float32(found.codes)
    except (ValueError, TypeError) as error:
        raise type(error)(f"latent {spec!r}: {error}") from error
    digest = hashlib.sha256(codes.numpy().tobytes()).hexdigest()
    provenance = {"spec": spec, "seed": seed, "shape": list(codes.shape), "codes_sha256": digest, **found.facts}
    return Latent(spec, codes, found.paired, found.description, provenance)


def _in_float32(codes: Tensor) -> Tensor:
    """Codes in float32, as for training. ValueError: float32 cannot represent them, or rounds away 1 % of their variation."""
    exact = codes.detach().cpu().double()
    rounded, largest = exact.float().contiguous(), exact.abs().max().item()
    if not rounded.isfinite().all():
        raise ValueError(f"values of up to {largest:.3g} do not fit into float32 (3.4e38); divide the codes by their deviation")
    deviation = (exact - exact.mean(0)).abs().max()
    if (exact - rounded).abs().max() > 0.01 * deviation:
        raise ValueError(
            f"expected codes that differ in float32, got values of up to {largest:.3g} that differ from their mean by at most "
            f"{deviation:.3g}; subtract their mean and divide by their deviation"
        )
    return rounded


class Found(NamedTuple):
    """Codes of one source, its description and its `Latent.provenance`."""

    codes: Tensor
    description: str
    facts: dict[str, Any]
    paired: bool = True


# ---- noise and closed forms ----


def _noise(spec: str, images: Tensor, labels: Tensor | None, config: Config, seed: int) -> Found:
    count, dim = len(images), config.measure.latent_dim
    generator = torch.Generator().manual_seed(seed_for(seed, "latent", spec))
    unlike = "drawn without looking at the image"
    if spec == "gaussian":
        codes = torch.randn(count, dim, generator=generator)
        words = f"Noise: {dim} independent numbers from the bell curve (standard normal), {unlike}. Most GANs start from it."
    elif spec == "uniform":
        codes = math.sqrt(3) * (2 * torch.rand(count, dim, generator=generator) - 1)
        words = f"Noise: {dim} independent numbers, each equally likely anywhere in an interval (variance 1), {unlike}."
    else:
        means = math.sqrt(1 - MIXTURE_WITHIN) * torch.randn(MIXTURE_COMPONENTS, dim, generator=generator)
        component_N = torch.randint(MIXTURE_COMPONENTS, (count,), generator=generator)
        codes = means[component_N] + math.sqrt(MIXTURE_WITHIN) * torch.randn(count, dim, generator=generator)
        words = f"Noise: {dim} numbers from one of {MIXTURE_COMPONENTS} clumps at random places, {unlike}."
    return Found(codes, words, {}, paired=False)


def _pca(spec: str, images: Tensor, labels: Tensor | None, config: Config, seed: int) -> Found:
    """codes = (x - mean) V_k, V_k the k leading right singular vectors, each with its largest entry positive."""
    dim = config.measure.latent_dim
    x_ND = images.flatten(1).double()
    x_ND = x_ND - x_ND.mean(0)
    _, singular, V_DR = torch.linalg.svd(x_ND, full_matrices=False)
    rank = int((singular > singular[0] * max(x_ND.shape) * torch.finfo(torch.float64).eps).sum())
    if dim > rank:
        raise ValueError(
            f"latent 'pca': expected measure.latent_dim of at most {rank}, the rank of {len(images)} images of "
            f"{x_ND.shape[1]} values, got {dim}"
        )
    directions_kD = V_DR[:dim]
    largest_k1 = directions_kD.gather(1, directions_kD.abs().argmax(1, keepdim=True))
    codes = x_ND @ (directions_kD * largest_k1.sign()).T
    share = (singular[:dim].square().sum() / singular.square().sum()).item()
    words = (
        f"The {dim} directions in which the images differ most (principal components), computed without training, centred and "
        f"not whitened. They hold {100 * share:.1f} % of the variance of the pixels."
    )
    return Found(codes.float(), words, {"explained_variance": share})


def _label(spec: str, images: Tensor, labels: Tensor | None, config: Config, seed: int) -> Found:
    if labels is None:
        raise ValueError("latent 'label': expected images with labels, this data set has none")
    codes = F.one_hot(labels).float()
    return Found(codes, f"Only the class of the image, one of {codes.shape[1]}: a latent with next to no information.", {})


def _from_function(spec: str, images: Tensor, seed: int) -> Found:
    loaders = ", ".join(f"{name}:" for name in LOADERS)
    codes, function, facts = codes_of_function(spec, images, seed_for(seed, "latent", spec), f"one of {loaders} and what to load")
    return Found(codes, f"What the function {function} computes from each image.", facts)


# ---- networks ----


def _features(spec: str, images: Tensor, config: Config, seed: int) -> Found:
    name = spec.partition(":")[2]
    path = Path(name)
    if path.is_file() or path.suffix == ".safetensors":
        classifier = Classifier.load(path)
        codes = extract_features(classifier, images, config.evaluation.batch_size)
        return Found(codes, f"Features of the small classifier {classifier.identifier}.", {"model": classifier.identifier})
    remedy = "or give features:<file of dae.metrics.Classifier.save>"
    try:
        network = PretrainedNetwork.load(name, f"latent 'features:{name}'", remedy)
    except ValueError as error:
        raise ValueError(f"{error}; an autoencoder of this project is autoencoder:{name}" if path.is_dir() else error) from error
    with torch.no_grad():
        codes = torch.cat([network(batch) for batch in images.split(64)])
    height, width = network.description["input_size"][1:]
    words = f"Features of the pretrained network {name}, which sees each image enlarged or reduced to {height} × {width} pixels."
    facts = {key: network.description[key] for key in ("model", "timm", "weights_sha256", *INPUT)}
    return Found(codes, words, facts)


def saved_autoencoder(spec: str) -> Path | None:
    """Folder of the autoencoder in `autoencoder:<folder>` or `posterior:<folder>`, where <folder> may be a whole run."""
    kind, _, folder = spec.partition(":")
    if kind not in ("autoencoder", "posterior"):
        return None
    path = Path(folder).expanduser()
    return path / "autoencoder" if not (path / "config.json").is_file() and (path / "autoencoder").is_dir() else path


def _saved_autoencoder(spec: str, images: Tensor, config: Config, seed: int) -> Found:
    path, sample = cast(Path, saved_autoencoder(spec)), spec.startswith("posterior:")
    autoencoder = Autoencoder.from_pretrained(path)
    if sample and autoencoder.bottleneck.discrete:
        raise ValueError(f"latent {spec!r}: a VQ autoencoder has no posterior; use autoencoder:{spec.partition(':')[2]}")
    codes, what = _encode(autoencoder, images, config, seed, sample)
    facts = {"model": str(path), "fingerprint": fingerprint(path)}
    return Found(codes, f"{what} of the autoencoder saved in {path}.", facts)


def _trained_autoencoder(spec: str, images: Tensor, labels: Tensor | None, config: Config, seed: int) -> Found:
    from dae.training.in_memory import train_autoencoder

    config = dataclasses.replace(configuration_of(spec, config), seed=seed)
    codes, what = _encode(train_autoencoder(images, config), images, config, seed)
    steps = sum(stage.config.max_train_steps for stage in plan_stages(config))
    words = f"{what} of {AUTOENCODERS[spec]}, trained here for {steps:,} steps on these images."
    trained = {key: dataclasses.asdict(getattr(config, key)) for key in ("autoencoder", "auxiliary_decoder", "stage1", "stage2")}
    return Found(codes, words, {"method": config.method, **trained})


def rehearse_training(spec: str, config: Config, rows: int) -> tuple[int, ...] | None:
    """Check before training that `ae`, `vae`, `vq` or `dae` can be trained here on `rows` images.

    Returns:
        the shape of a code; None if `spec` is not trained here.

    Raises:
        ValueError, TypeError, ImportError: from the configuration, a model or a kernel.
    """
    if spec not in AUTOENCODERS:
        return None
    from dae.training.engine import LocalEngine
    from dae.training.rehearsal import rehearse_autoencoder

    config = configuration_of(spec, config)
    autoencoder = rehearse_autoencoder(config, rows, LocalEngine(mixed_precision=config.mixed_precision))
    return (autoencoder.config.latent_channels, autoencoder.latent_size, autoencoder.latent_size)


def configuration_of(spec: str, config: Config) -> Config:
    """The configuration that trains `ae`, `vae`, `vq` or `dae`: `config` with another method and bottleneck."""
    architecture = config.autoencoder
    if spec != "dae":
        architecture = dataclasses.replace(architecture, bottleneck="vq" if spec == "vq" else "kl")
    if spec == "ae":
        architecture = dataclasses.replace(architecture, kl=dataclasses.replace(architecture.kl, kl_weight=0.0))
    return dataclasses.replace(config, method="dae" if spec == "dae" else "joint", autoencoder=architecture)


@torch.no_grad()
def _encode(autoencoder: Autoencoder, images: Tensor, config: Config, seed: int, sample: bool = False) -> tuple[Tensor, str]:
    """Latents [N, D, h, w] and their description."""
    autoencoder.eval().refuse_other_data(images.shape[1], images.shape[2])
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed_for(seed, "posterior"))
        batches = images.split(config.evaluation.batch_size)
        codes = torch.cat([autoencoder.encode(batch, sample_posterior=sample).latents for batch in batches])
    if autoencoder.bottleneck.discrete:
        return codes, f"The code vectors (out of {autoencoder.bottleneck.num_codes(autoencoder.config)})"
    return codes, "A sample of each posterior" if sample else "The means of the posteriors"


AUTOENCODERS = {
    "ae": "an autoencoder without a bottleneck but its size",
    "vae": "a variational autoencoder",
    "vq": "a VQ autoencoder",
    "dae": "a Decoupled Autoencoder (encoder trained with a weak decoder)",
}
SOURCES: dict[str, Callable[..., Found]] = {
    **dict.fromkeys(("gaussian", "uniform", "mixture"), _noise),
    "pca": _pca,
    "label": _label,
    **dict.fromkeys(AUTOENCODERS, _trained_autoencoder),
}
LOADERS: dict[str, Callable[..., Found]] = {
    "features": _features,
    **dict.fromkeys(("autoencoder", "posterior"), _saved_autoencoder),
}

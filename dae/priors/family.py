"""The interface of a prior family: everything that training, sampling, evaluation and pages need to know of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from dae.config import Config, PriorConfig, SamplingConfig
from dae.distributed import draw_rows
from dae.models import Autoencoder, Prior

if TYPE_CHECKING:
    from dae.data.cache import EncodedDataset, EncodingCache

Model = TypeVar("Model", bound=Prior)

SCORE_BATCH = 64  # latents at once where numbers are drawn for each batch: no setting may change the score


class PriorFamily(Generic[Model]):
    """One kind of prior: its model, loss, held-out score, bits and sampler. A file of `dae.priors` has one, `PRIORS` has all.

    Nothing outside of `dae.priors` asks for a family's name to decide anything.

    Attributes:
        name: in `prior.family`.
        model: class of the network.
        discrete: it models the tokens of a discrete bottleneck; else the posteriors of a continuous one.
        fitted: at once by `fit`, rather than trained in steps by `loss`; such a prior knows no classes.
        criterion: what `score` measures, the less the better; its key in the log.
        bits_key: key in the log of the held-out code length.
        costly_bits: `bits_per_image` takes too long for every validation, and is measured once, of the delivered prior.
        size_knob: of `prior`, how large the model is.
        head_unit: what the dimension of an attention head must be a multiple of; 0 without attention.
        sampling_knobs: of `sampling`, those that `sample` reads.
        title, tags, usage: of the model card; `usage` is Python that makes `images` of `labels`, and `imports` what it needs.
        noun: with its article, in sentences about a latent and its prior.
        learned: on the page of a run, what the prior is and does; {components} is `prior.num_components`.
        loss_name, loss_unit, loss_meaning, best: there, of the curve of training: its name, nats per unit, an explanation, and
            what distinguishes the step with the best score; not where `fitted`.
    """

    name: ClassVar[str]
    model: ClassVar[type]
    discrete: ClassVar[bool]
    fitted: ClassVar[bool] = False
    criterion: ClassVar[str]
    bits_key: ClassVar[str] = "bits_per_image"
    costly_bits: ClassVar[bool] = False
    size_knob: ClassVar[str] = "width"
    head_unit: ClassVar[int] = 0
    sampling_knobs: ClassVar[tuple[str, ...]] = ()
    title: ClassVar[str]
    tags: ClassVar[tuple[str, ...]]
    imports: ClassVar[str | None] = None
    usage: ClassVar[str]
    noun: ClassVar[str]
    learned: ClassVar[str]
    loss_name: ClassVar[str] = ""
    loss_unit: ClassVar[float] = 1.0
    loss_meaning: ClassVar[str] = ""
    best: ClassVar[str] = ""

    def build(self, settings: PriorConfig, cache: EncodingCache) -> Model:
        """A new model for what a cache holds. ValueError: settings and latent do not go together."""
        raise NotImplementedError

    def loss(self, model: Callable[..., Tensor], prior: Model, batch: dict[str, Tensor]) -> Tensor:
        """Training loss in nats or squared error; all draws by `draw_rows`, so that processes share them.

        Args:
            model: what to call in place of the prior: as the engine wrapped and compiled it.
            batch: of the cache, on the prior's device.
        """
        raise NotImplementedError(f"a {self.title} is fitted, it has no loss")

    def fit(self, prior: Model, cache: EncodingCache, config: Config) -> None:
        """Fit all of the prior to a cache; only where `fitted`."""
        raise NotImplementedError(f"a {self.title} is trained in steps")

    def score(self, prior: Model, encoded: EncodedDataset, config: Config) -> float:
        """`criterion` of the plain encodings; leaves the global random state as it was."""
        raise NotImplementedError

    def bits_per_image(self, prior: Model, encoded: EncodedDataset, config: Config) -> float:
        """Code length of the latent of an image under the prior, given its class if the prior knows classes."""
        return self.score(prior, encoded, config)

    def tokens_per_image(self, prior: Model) -> int | None:
        """How many tokens the prior writes for an image; None if it writes a continuous latent."""
        return None

    def sample(self, prior: Model, labels_B: Tensor, settings: SamplingConfig, generator: torch.Generator) -> Tensor:
        """Tokens [B, T], or latents [B, D, h, w] in the autoencoder's own scale, of the given classes."""
        raise NotImplementedError

    def rehearse(self, prior: Model, batch: dict[str, Tensor]) -> None:
        """Try what sampling needs on a batch of two encodings; raises what sampling would raise."""

    def require_rows(self, config: Config, autoencoder: Autoencoder, rows: int | None) -> None:
        """ValueError if a prior cannot be fitted to `rows` training images (None: unknown), or does not fit into memory."""

    def resized(self, settings: PriorConfig, size: int) -> list[str]:
        """Overrides for a model of another size. Adam's best step falls as 1 / width (Yang et al. 2022, arXiv 2203.03466)."""
        return [f"prior.width={size}", f"prior.learning_rate={settings.learning_rate * settings.width / size!r}"]


def latent_shape(cache: EncodingCache) -> dict:
    """Arguments of a prior over a continuous latent that say what the latent of a cache is like."""
    known = {name: getattr(cache, name) for name in (cache.size, "latent_size", "num_classes")}
    return known | {"tokenizer": cache.fingerprint.tokenizer}


def draw_augmentations(encodings_BC: Tensor) -> Tensor:
    """[B, ...]: of each row of [B, C, ...], the encodings of an image and its augmentations, one drawn by `draw_rows`."""
    return choose_augmentations(encodings_BC, draw_rows(torch.rand, encodings_BC.shape[:1], device=encodings_BC.device))


def choose_augmentations(encodings_BC: Tensor, draw_B: Tensor) -> Tensor:
    """[B, ...]: of each row of [B, C, ...] the one that a uniform draw in [0, 1) points at."""
    chosen = (draw_B * encodings_BC.shape[1]).long()
    return encodings_BC[torch.arange(len(encodings_BC), device=encodings_BC.device), chosen]

"""Caches of a data set's encodings (VQ tokens or KL posteriors), with fingerprints of what produced them.

Posteriors are stored rather than samples: a prior is trained on the whole posterior (`dae.losses.flow_matching_loss`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dae.config import Config, knobs
from dae.files import replaced_folder, write_file
from dae.quantizers import bottleneck_class
from dae.quantizers.tokens import index_dtype

DESCRIPTION = "cache.json"


@dataclass
class Fingerprint:
    """What the encodings depend on; two caches with equal fingerprints hold equal encodings."""

    tokenizer: str  # the latent's identity, `dae.models.latent.identities`
    data: str  # ImageData.fingerprint
    transform: str  # transform_fingerprint: how the images were augmented


class EncodedDataset(Dataset):
    """Rows {name: [C, ...], "label": int, "row": int} of C encodings: the image's, then its augmentations'."""

    name: ClassVar[str]  # key of the encodings in a row and in the file
    given: ClassVar[torch.dtype]  # dtype in a row

    def __init__(self, values_NC: Tensor, labels_N: Tensor):
        self.values_NC, self.labels_N = values_NC, labels_N

    def __len__(self) -> int:
        return len(self.labels_N)

    def spread(self, count: int) -> Self:
        """A subset of `count` evenly spaced rows, or all rows if there are fewer."""
        if count >= len(self):
            return self
        rows = torch.arange(count) * len(self) // count
        return type(self)(self.values_NC[rows], self.labels_N[rows])

    def __getitem__(self, row: int) -> dict:
        return {self.name: self.values_NC[row].to(self.given), "label": int(self.labels_N[row]), "row": row}


class TokenDataset(EncodedDataset):
    """Rows {"tokens": int64 [C, T], "label": int, "row": int}."""

    name, given = "tokens", torch.int64


class PosteriorDataset(EncodedDataset):
    """Rows {"moments": float32 [C, 2D, h, w], "label": int, "row": int}; the 2D channels are D means, then D log-variances."""

    name, given = "moments", torch.float32


@dataclass
class EncodingCache:
    """Encodings of a training and a held-out set in one file, with their fingerprint."""

    train: EncodedDataset
    validation: EncodedDataset
    num_classes: int
    latent_size: int
    fingerprint: Fingerprint

    dataset: ClassVar[type[EncodedDataset]]
    folder: ClassVar[str]  # inside a run's folder
    title: ClassVar[str]  # name in messages
    size: ClassVar[str]  # name of its own field: the number of codes, or of channels

    @property
    def stored(self) -> torch.dtype:
        """dtype in the file."""
        return self.dataset.given

    def save(self, folder: Path) -> None:
        """Write `<name>.safetensors` and `cache.json` into `folder`; both or none."""
        from safetensors.torch import save

        parts = {"train": self.train, "validation": self.validation}
        tensors = {f"{part}.{rows.name}": rows.values_NC.to(self.stored).contiguous() for part, rows in parts.items()}
        data = save(tensors | {f"{part}.labels": rows.labels_N.int().contiguous() for part, rows in parts.items()})
        description: dict[str, Any] = {k: getattr(self, k) for k in (self.size, "num_classes", "latent_size")}
        if factors := getattr(self, "factors", None):
            description["factors"] = factors
        description["fingerprint"] = dataclasses.asdict(self.fingerprint)
        description["sha256"] = hashlib.sha256(data).hexdigest()  # or a crash could leave new ones under an old description
        with replaced_folder(folder) as new:
            for name, content in zip(self.files(), (data, json.dumps(description, indent=2).encode()), strict=True):
                write_file(new / name, content)

    @classmethod
    def files(cls) -> list[str]:
        """Names of the files that `save` writes."""
        return [f"{cls.dataset.name}.safetensors", DESCRIPTION]

    @classmethod
    def load(cls, folder: Path, expected: Fingerprint, earlier_names: Sequence[str] = ()) -> Self:
        """Read the cache in `folder` and check that its fingerprint is `expected`.

        Args:
            earlier_names: of the expected tokenizer, in caches of earlier versions.

        Raises:
            FileNotFoundError: there is no cache in `folder`.
            ValueError: it is damaged, or stale (another tokenizer, other data or another transform).
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        file, name = cls.files()[0], cls.dataset.name
        if not (folder / DESCRIPTION).is_file():
            raise FileNotFoundError(f"no {cls.title} in {folder}: make it with recipes/encode.py and the same configuration")
        try:
            description = json.loads((folder / DESCRIPTION).read_text())
            found = Fingerprint(**description.pop("fingerprint"))
            data = (folder / file).read_bytes()
            if hashlib.sha256(data).hexdigest() != description.pop("sha256"):
                raise ValueError(f"{file} is not the file that {DESCRIPTION} describes")
            tensors = load(data)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"the {cls.title} in {folder} is damaged ({error}): remake it with recipes/encode.py") from error
        if found.tokenizer in earlier_names:
            expected = dataclasses.replace(expected, tokenizer=found.tokenizer)
        titles = {"tokenizer": "tokenizer", "data": "data set", "transform": "augmentation"}
        if stale := [title for key, title in titles.items() if getattr(found, key) != getattr(expected, key)]:
            latents = f" (its latent is {found.tokenizer[:12]}, the autoencoder's is {expected.tokenizer[:12]})"
            raise ValueError(
                f"the {cls.title} in {folder} is stale: it was made with another {' and '.join(stale)}. Remake it with "
                f"recipes/encode.py and the same configuration{latents if 'tokenizer' in stale else ''}"
            )
        train, held_out = (cls.dataset(tensors[f"{n}.{name}"], tensors[f"{n}.labels"].long()) for n in ("train", "validation"))
        return cls(train=train, validation=held_out, fingerprint=found, **description)


@dataclass
class TokenCache(EncodingCache):
    vocab_size: int
    factors: list[int] | None = None  # sizes of a token's digits, the lowest first, if its prior predicts them one by one
    dataset, folder, title, size = TokenDataset, "tokens", "token cache", "vocab_size"

    @property
    def stored(self) -> torch.dtype:
        return index_dtype(self.vocab_size)


@dataclass
class LatentCache(EncodingCache):
    latent_channels: int
    dataset, folder, title, size = PosteriorDataset, "latents", "latent cache", "latent_channels"


_ORDER = ("copies", "code_temperature", "seed", "batch_size", "flip", "affine")  # in the fingerprints of existing caches


def transform_fingerprint(config: Config) -> str:
    """Identify how images were augmented, by the knobs with an `encoding` name; a constant without augmentations."""
    if config.prior.num_augmentations == 0:
        return "plain"
    how = {knob.encoding: operator.attrgetter(key)(config) for key, knob in knobs().items() if knob.encoding}
    if not bottleneck_class(config.autoencoder).draws_codes:
        del how["code_temperature"]
    if not config.prior.augment_images:
        del how["flip"], how["affine"]
    return json.dumps(dict(sorted(how.items(), key=lambda item: _ORDER.index(item[0]))))

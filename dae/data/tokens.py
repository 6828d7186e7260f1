"""The token cache: what a VQ tokenizer makes of a data set, and of what exactly it is the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dae.config import Config
from dae.files import write_file

TOKENS, DESCRIPTION = "tokens.safetensors", "cache.json"


@dataclass
class Fingerprint:
    """What the tokens depend on; two caches with equal fingerprints hold equal tokens."""

    tokenizer: str  # dae.hub.fingerprint of the autoencoder's folder
    data: str  # ImageData.fingerprint
    transform: str  # augmentation of the copies


class TokenDataset(Dataset):
    """Rows {"tokens": int64 [copies, T], "label": int, "row": int}: the plain encoding first, then augmented copies."""

    def __init__(self, tokens_NCT: Tensor, labels_N: Tensor):
        self.tokens_NCT, self.labels_N = tokens_NCT, labels_N

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, row: int) -> dict:
        return {"tokens": self.tokens_NCT[row].long(), "label": int(self.labels_N[row]), "row": row}


@dataclass
class TokenCache:
    train: TokenDataset
    validation: TokenDataset
    vocab_size: int
    num_classes: int
    latent_size: int
    fingerprint: Fingerprint

    def save(self, folder: Path) -> None:
        """Write `tokens.safetensors` and `cache.json` into `folder`."""
        from safetensors.torch import save

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name in ("train", "validation"):
            part: TokenDataset = getattr(self, name)
            tensors |= {f"{name}.tokens": part.tokens_NCT.int(), f"{name}.labels": part.labels_N.int()}
        description = {k: getattr(self, k) for k in ("vocab_size", "num_classes", "latent_size")}
        description["fingerprint"] = dataclasses.asdict(self.fingerprint)
        data = save({k: v.contiguous() for k, v in tensors.items()})
        description["sha256"] = hashlib.sha256(data).hexdigest()  # or a crash could leave new tokens under an old description
        write_file(folder / TOKENS, data)
        write_file(folder / DESCRIPTION, json.dumps(description, indent=2).encode())

    @classmethod
    def load(cls, folder: Path, expected: Fingerprint) -> TokenCache:
        """Read a cache and make sure that it is the cache of what is `expected`.

        Raises:
            FileNotFoundError: there is no cache in `folder`.
            ValueError: it is stale: made with another tokenizer, from other data, or with another transform; or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        if not (folder / DESCRIPTION).is_file():
            raise FileNotFoundError(f"no token cache in {folder}: make it with recipes/encode.py and the same configuration")
        try:
            description = json.loads((folder / DESCRIPTION).read_text())
            found = Fingerprint(**description.pop("fingerprint"))
            data = (folder / TOKENS).read_bytes()
            if hashlib.sha256(data).hexdigest() != description.pop("sha256"):
                raise ValueError(f"{TOKENS} is not the file that {DESCRIPTION} describes")
            tensors = load(data)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"the token cache in {folder} is damaged ({error}): remake it with recipes/encode.py") from error
        stale = [f.name for f in dataclasses.fields(Fingerprint) if getattr(found, f.name) != getattr(expected, f.name)]
        if stale:
            names = {"tokenizer": "tokenizer", "data": "data set", "transform": "augmentation"}
            what = " and ".join(names[name] for name in stale)
            raise ValueError(
                f"the token cache in {folder} is stale: it was made with another {what}. Remake it with recipes/encode.py and "
                "the same configuration"
            )
        parts = {n: TokenDataset(tensors[f"{n}.tokens"], tensors[f"{n}.labels"].long()) for n in ("train", "validation")}
        return cls(**parts, **description, fingerprint=found)


def transform_fingerprint(config: Config) -> str:
    """Identifies how the further copies were made; without copies nothing matters."""
    prior, data = config.prior, config.data
    if prior.augmented_copies == 0:
        return "plain"
    how = {"copies": prior.augmented_copies, "code_temperature": prior.code_temperature, "seed": config.seed}
    how["batch_size"] = config.evaluation.batch_size  # one seed a batch
    if prior.augment_images:
        how |= {"flip": data.random_flip, "affine": data.random_affine}
    return json.dumps(how)


def choose_copies(tokens_BCT: Tensor, draw: Tensor) -> Tensor:
    """[B, T]: of each row the copy that a uniform draw in [0, 1) [B] points at."""
    chosen = (draw * tokens_BCT.shape[1]).long()
    return tokens_BCT[torch.arange(len(tokens_BCT), device=tokens_BCT.device), chosen]

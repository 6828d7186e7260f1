"""The token cache: what a VQ tokenizer makes of a data set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dae.data.cache import EncodedDataset, EncodingCache


class TokenDataset(EncodedDataset):
    """Rows {"tokens": int64 [copies, T], "label": int, "row": int}: the plain encoding first, then augmented copies."""

    name, stored, given = "tokens", torch.int32, torch.int64

    @property
    def tokens_NCT(self) -> Tensor:
        return self.values_NC


@dataclass
class TokenCache(EncodingCache):
    vocab_size: int

    dataset, folder, title = TokenDataset, "tokens", "token cache"
    facts = ("vocab_size", "num_classes", "latent_size")

"""The base class of all priors: their configuration in a saved folder."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self

from dae.config import PriorConfig, from_dict
from dae.hub import PretrainedModel


class Prior(PretrainedModel):
    """A model of the latent of one autoencoder.

    Args:
        config: of the prior.
        num_classes: C of the data.
        tokenizer: identity of the latent that it models (`dae.models.latent.identities`).

    Attributes:
        shape: arguments of the subclass that say what the latent is like.
    """

    shape: ClassVar[tuple[str, ...]]

    def __init__(self, config: PriorConfig, num_classes: int, tokenizer: str):
        super().__init__()
        self.config, self.num_classes, self.tokenizer = config, num_classes, tokenizer
        self.gradient_checkpointing = False

    def to_config(self) -> dict:
        known = {name: getattr(self, name) for name in (*self.shape, "num_classes", "tokenizer")}
        return {"prior": dataclasses.asdict(self.config), **known}

    @classmethod
    def from_config(cls, config: dict) -> Self:
        return cls(from_dict(PriorConfig, config["prior"]), **{k: v for k, v in config.items() if k != "prior"})

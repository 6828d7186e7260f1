"""Families of priors, each in a file of its own: what a prior is, how it is trained, judged, sampled and described."""

from dae.config import Config
from dae.models import Prior
from dae.priors.ar import Autoregressive
from dae.priors.dit import DiffusionTransformer
from dae.priors.family import PriorFamily
from dae.priors.mixture import Mixture
from dae.quantizers import bottleneck_class

PRIORS: dict[str, PriorFamily] = {family.name: family for family in (Autoregressive(), DiffusionTransformer(), Mixture())}


def prior_family(config: Config) -> PriorFamily:
    """The family of `config.prior.family`; for `auto` the first that models the latent of `config.autoencoder.bottleneck`.

    Raises:
        ValueError: the family cannot model that latent.
    """
    bottleneck, name = config.autoencoder.bottleneck, config.prior.family
    fitting = [family for family in PRIORS.values() if family.discrete == bottleneck_class(config.autoencoder).discrete]
    if name == "auto":
        return fitting[0]
    if PRIORS[name] not in fitting:
        verb, latent = ("models", "tokens") if len(fitting) == 1 else ("model", "continuous latent")
        raise ValueError(
            f"prior.family={name} cannot model the latent of autoencoder.bottleneck={bottleneck}: "
            f"{' and '.join(family.name for family in fitting)} {verb} its {latent}. Set prior.family, or "
            "train an autoencoder with the other bottleneck"
        )
    return PRIORS[name]


def family_of(prior: Prior) -> PriorFamily:
    """The family that a model belongs to."""
    return next(family for family in PRIORS.values() if isinstance(prior, family.model))


def require_guidance(config: Config) -> None:
    """Before anything is trained: guidance subtracts the prediction without a class, which only class dropout teaches.

    Raises:
        ValueError: a scale other than 1 is configured for sampling or evaluation, and `prior.class_dropout` is 0.
    """
    if config.prior.class_dropout > 0 or prior_family(config).fitted:
        return
    scales = {"sampling.cfg_scale": [config.sampling.cfg_scale], "evaluation.cfg_scales": config.evaluation.cfg_scales}
    for key, values in scales.items():
        if guided := [value for value in values if value != 1]:
            raise ValueError(
                f"{key}: a guidance scale of {guided[0]:g} needs a prior trained with prior.class_dropout above 0, got 0; "
                f"set {key}={'1' if key.endswith('scale') else '[1.0]'}, or prior.class_dropout=0.1"
            )


__all__ = ["PRIORS", "PriorFamily", "family_of", "prior_family", "require_guidance"]

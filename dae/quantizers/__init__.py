from dae.config import AutoencoderConfig
from dae.quantizers.bottleneck import Bottleneck, Encoding
from dae.quantizers.bsq import BinarySphericalQuantizer
from dae.quantizers.fsq import FiniteScalarQuantizer
from dae.quantizers.grouped_vq import GroupedQuantizer
from dae.quantizers.identity import IdentityBottleneck
from dae.quantizers.kl import GaussianBottleneck, latent_statistics, sample_posteriors
from dae.quantizers.lfq import LookupFreeQuantizer
from dae.quantizers.residual_vq import ResidualQuantizer
from dae.quantizers.simvq import SimVectorQuantizer
from dae.quantizers.vq import VectorQuantizer
from dae.quantizers.vq_gradient import GradientVectorQuantizer

BOTTLENECKS: dict[str, type[Bottleneck]] = {
    "vq": VectorQuantizer,
    "vq_gradient": GradientVectorQuantizer,
    "simvq": SimVectorQuantizer,
    "rvq": ResidualQuantizer,
    "gvq": GroupedQuantizer,
    "fsq": FiniteScalarQuantizer,
    "lfq": LookupFreeQuantizer,
    "bsq": BinarySphericalQuantizer,
    "kl": GaussianBottleneck,
    "identity": IdentityBottleneck,
}


def bottleneck_class(config: AutoencoderConfig) -> type[Bottleneck]:
    """The class that `config.bottleneck` names. ValueError: there is none of that name."""
    if config.bottleneck not in BOTTLENECKS:
        names = " or ".join(map(repr, BOTTLENECKS))
        raise ValueError(f"autoencoder.bottleneck: expected {names}, got {config.bottleneck!r}")
    return BOTTLENECKS[config.bottleneck]


__all__ = [
    "BOTTLENECKS",
    "BinarySphericalQuantizer",
    "Bottleneck",
    "Encoding",
    "FiniteScalarQuantizer",
    "GaussianBottleneck",
    "GradientVectorQuantizer",
    "GroupedQuantizer",
    "IdentityBottleneck",
    "LookupFreeQuantizer",
    "ResidualQuantizer",
    "SimVectorQuantizer",
    "VectorQuantizer",
    "bottleneck_class",
    "latent_statistics",
    "sample_posteriors",
]

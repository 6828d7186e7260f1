"""The generator-induced distance D^G, complexity curves, and the latent that is best for a family of generators."""

from dae.complexity.curves import ComplexityCurve, complexity_curve
from dae.complexity.distances import Distance, make_distance
from dae.complexity.estimate import Estimate, check_cloud, check_pair
from dae.complexity.families import ConvDecoders, DropoutNetworks, GeneratorFamily, LinearMaps, LipschitzNetworks, MLPs
from dae.complexity.generator_distance import fit_generator, generator_distance
from dae.complexity.gromov_wasserstein import gromov_wasserstein
from dae.complexity.optimal_latent import OptimalLatent, optimal_latent

__all__ = [
    "ComplexityCurve",
    "ConvDecoders",
    "Distance",
    "DropoutNetworks",
    "Estimate",
    "GeneratorFamily",
    "LinearMaps",
    "LipschitzNetworks",
    "MLPs",
    "OptimalLatent",
    "check_cloud",
    "check_pair",
    "complexity_curve",
    "fit_generator",
    "generator_distance",
    "gromov_wasserstein",
    "make_distance",
    "optimal_latent",
]

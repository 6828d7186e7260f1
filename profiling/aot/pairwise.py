"""Variants of the sums over pairs, of `mmd` (with bandwidths) and `energy_distance` (without); D = 100 leaves a remainder."""

from dae_kernels.pairwise import fused
from variants import Variant

# bandwidths, D, same, gradient
VARIANTS = {
    "mmd sum D=64": (5, 64, True, False),
    "mmd gradient D=64": (5, 64, True, True),
    "mmd gradient D=8, across": (3, 8, False, True),
    "energy sum D=100, across": (0, 100, False, False),
    "energy gradient D=64, across": (0, 64, False, True),
    "energy gradient D=100": (0, 100, True, True),
}


def variants(backend):
    precision = "ieee" if backend == "hip" else "tf32x3"
    for name, (bandwidths, D, same, gradient) in VARIANTS.items():
        constants = {"D": D, "BANDWIDTHS": bandwidths, "SAME": same, "GRADIENT": gradient, "INPUT_PRECISION": precision}
        tile = fused.tile(D, bandwidths, same, gradient, backend == "hip")
        yield Variant(name, fused.pair_rows_kernel, {}, constants, tile, product=True)

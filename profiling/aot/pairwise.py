"""Variants of the sums over pairs, of `mmd` (with bandwidths) and `energy_distance` (without); D = 100 leaves a remainder.

Given weights multiply the columns; without them the pass across adds its gradient to what is there. Clouds of 16 bits are read
once, to be centred.
"""

from dae_kernels.clouds import SAMPLES
from dae_kernels.pairwise import fused, fused_centre
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
        types = {"factor": "fp32", "slope_factor": "fp32"}
        for label, weighted in (("", False), (", weights", True)):
            flags = {"WEIGHTED": weighted, "ADD": gradient and not same and not weighted}
            yield Variant(name + label, fused.pair_rows_kernel, types, constants | flags, tile, product=True)
    clouds = {"x_ptr": "*bf16", "y_ptr": "*bf16"}
    yield Variant("medians", fused_centre.middle_kernel, clouds, {"SAMPLES": SAMPLES}, {"num_warps": 4})
    yield Variant("largest", fused_centre.largest_kernel, clouds, {}, fused_centre.BLOCK)
    for scaled in (False, True):
        label = "centred, scaled" if scaled else "centred"
        yield Variant(label, fused_centre.centre_kernel, clouds, {"SCALED": scaled}, fused_centre.BLOCK)

"""Variants of the sums over pairs, of `mmd` (with bandwidths) and `energy_distance` (without); D = 100 leaves a remainder."""

from dae_kernels.pairwise import fused

# bandwidths, D, same, gradient
VARIANTS = {
    "mmd sum D=64": (5, 64, True, False),
    "mmd gradient D=64": (5, 64, True, True),
    "mmd gradient D=8, across": (3, 8, False, True),
    "energy sum D=100, across": (0, 100, False, False),
    "energy gradient D=64, across": (0, 64, False, True),
    "energy gradient D=100": (0, 100, True, True),
}


def variants(Variant, backend):
    names = ("q", "s", "q_norm", "s_norm", "v", "rate", "sum", "gradient")
    pointers = {f"{name}_ptr": "*fp32" for name in names}
    for name, (bandwidths, D, same, gradient) in VARIANTS.items():
        tile = fused.tile(D, gradient)
        blocks = {key: value for key, value in tile.items() if key.startswith("BLOCK")}
        options = {key: value for key, value in tile.items() if not key.startswith("BLOCK")}
        constants = {"D": D, "BANDWIDTHS": bandwidths, "SAME": same, "GRADIENT": gradient}
        constants |= blocks | {"INPUT_PRECISION": "ieee" if backend == "hip" else "tf32x3"}
        sizes = {"N": "i32", "M": "i32", "d_end": "i32"}
        yield Variant(name, fused.pair_rows_kernel, pointers, sizes, constants, options, product=True)

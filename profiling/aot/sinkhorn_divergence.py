"""Variants of sinkhorn_divergence. p = 2 loops over D above 16, D = 100 leaves a remainder; p = 1 has no product.

An update is flat where epsilon exceeds every cost; the derivative, and a mean of values, are the same there.
"""

from dae_kernels.sinkhorn_divergence import fused
from variants import Variant

# p, D
VARIANTS = {"p=2 D=2": (2, 2), "p=2 D=64": (2, 64), "p=2 D=100": (2, 100), "p=1 D=2": (1, 2), "p=1 D=64": (1, 64)}


def variants(backend):
    for name, (p, D) in VARIANTS.items():
        shared = {"D": D, "P": p, "INPUT_PRECISION": "ieee" if backend == "hip" else "tf32x3"}
        for label, kernel, tile, flags in (
            (name, fused.sinkhorn_update_kernel, fused.UPDATE_TILE[p], {"FLAT": False, "AVERAGE": False}),
            (f"{name} average", fused.sinkhorn_update_kernel, fused.UPDATE_TILE[p], {"FLAT": False, "AVERAGE": True}),
            (f"{name} flat", fused.sinkhorn_update_kernel, fused.UPDATE_TILE[p], {"FLAT": True, "AVERAGE": False}),
            (f"{name} derivative", fused.sinkhorn_mean_kernel, fused.mean_tile(p, D, True), {"GRADIENT": True}),
            (f"{name} mean", fused.sinkhorn_mean_kernel, fused.mean_tile(p, D, False), {"GRADIENT": False}),
        ):
            yield Variant(label, kernel, {"scale": "fp32"}, shared | flags, tile, product=p == 2 or label.endswith("mean"))

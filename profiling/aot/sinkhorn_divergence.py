"""Variants of sinkhorn_divergence. p = 2 loops over D above 16, D = 100 leaves a remainder; p = 1 has no product.

An update is flat where epsilon exceeds every cost; the derivative, and a mean of values, are the same there. A step takes all
problems at once; parts of a potential are joined by a kernel of their own.
"""

from dae_kernels.sinkhorn_divergence import fused, fused_joint
from variants import Variant

# p, D
VARIANTS = {"p=2 D=2": (2, 2), "p=2 D=64": (2, 64), "p=2 D=100": (2, 100), "p=1 D=2": (1, 2), "p=1 D=64": (1, 64)}


def variants(backend):
    for name, (p, D) in VARIANTS.items():
        shared = {"D": D, "P": p, "INPUT_PRECISION": "ieee" if backend == "hip" else "tf32x3"}
        update, step = (
            (fused.sinkhorn_update_kernel, fused.UPDATE_TILE[p]),
            (fused_joint.sinkhorn_step_kernel, fused.UPDATE_TILE[p]),
        )
        for label, (kernel, tile), flags in (
            (name, update, {"FLAT": False, "AVERAGE": False, "WHOLE": True}),
            (f"{name} flat", update, {"FLAT": True, "AVERAGE": True, "WHOLE": True}),
            (f"{name} joint", step, {"FLAT": False, "AVERAGE": True, "WHOLE": True}),
            (f"{name} joint flat", step, {"FLAT": True, "AVERAGE": True, "WHOLE": True}),
            (f"{name} joint parts", step, {"FLAT": False, "AVERAGE": True, "WHOLE": False}),
            (f"{name} joint derivative", (fused_joint.sinkhorn_slopes_kernel, fused_joint.slopes_tile(p, D)), {}),
            (f"{name} derivative", (fused.sinkhorn_mean_kernel, fused.mean_tile(p, D, True)), {"GRADIENT": True}),
            (f"{name} mean", (fused.sinkhorn_mean_kernel, fused.mean_tile(p, D, False)), {"GRADIENT": False}),
        ):
            yield Variant(label, kernel, {"scale": "fp32"}, shared | flags, tile, product=p == 2 or label.endswith("mean"))
    for flat in (False, True):
        label = "joined, flat" if flat else "joined"
        yield Variant(label, fused.sinkhorn_join_kernel, {"scale": "fp32"}, {"FLAT": flat, "AVERAGE": True}, fused.JOIN)

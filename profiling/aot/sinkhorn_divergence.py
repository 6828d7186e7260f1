"""Variants of sinkhorn_divergence. p = 2 loops over D above 16, D = 100 leaves a remainder; p = 1 has no product.

An update is flat where epsilon exceeds every cost; the derivative, and a mean of values, are the same there.
"""

from dae_kernels.sinkhorn_divergence import fused

# p, D
VARIANTS = {"p=2 D=2": (2, 2), "p=2 D=64": (2, 64), "p=2 D=100": (2, 100), "p=1 D=2": (1, 2), "p=1 D=64": (1, 64)}
VECTORS = ("log_b_ptr", "g_ptr", "f_ptr")


def variants(Variant, backend):
    pointers = dict.fromkeys(("x_ptr", "y_ptr", *VECTORS), "*fp32")
    scalars = {"N": "i32", "M": "i32", "d_end": "i32", "scale": "fp32"}
    for name, (p, D) in VARIANTS.items():
        update, mean = fused.sinkhorn_update_kernel, fused.sinkhorn_mean_kernel
        outputs = {"v_ptr": "*fp32", "out_ptr": "*fp32"}
        for label, kernel, tile, buffers, sizes, flags in (
            (name, update, fused.UPDATE_TILE[p], {}, {"share": "i32"}, {"FLAT": False}),
            (f"{name} flat", update, fused.UPDATE_TILE[p], {}, {"share": "i32"}, {"FLAT": True}),
            (f"{name} derivative", mean, fused.MEAN_TILE, outputs, {"E": "i32"}, {"GRADIENT": True}),
            (f"{name} mean", mean, fused.MEAN_TILE, outputs, {"E": "i32"}, {"GRADIENT": False}),
        ):
            constants = {"D": D, "P": p, "INPUT_PRECISION": "ieee" if backend == "hip" else "tf32x3"} | flags
            constants |= {key: value for key, value in tile.items() if key.startswith("BLOCK")}
            options = {key: value for key, value in tile.items() if not key.startswith("BLOCK")}
            yield Variant(
                label, kernel, pointers | buffers, scalars | sizes, constants, options, product=p == 2 or "mean" in label
            )

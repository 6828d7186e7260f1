"""LPIPS's term of one layer in Triton: a and b are read once forward, once more backward.

Roofline (counts, with the measured floors of an H100: 3.0 TB/s of copy, 132 SMs; the kernels themselves are not yet measured).
- Bound by memory. For n elements of b bytes in each map, forward reads 2 n b; backward reads 2 n b and writes n b for each of the
  gradients to a and b that is wanted. relu1_2 of VGG16 at [8, 64, 256, 256] in bf16 is 67 MB per map: 0.045 ms forward, 0.067 ms
  backward with the gradient of one.
- Arithmetic: at 3.0 TB/s an SM meets 3.2 pairs of bf16 per cycle, at 128 float32 instructions: 40 per pair. Forward takes about
  12 (two conversions, two squares, the difference, five sums), backward about 20.
- A tile is [BLOCK_P positions, all C channels padded to a power of two], so norms need no second read; it has 4096 elements, 16
  per thread and map, which lie in registers. In NCHW a row of the tile is BLOCK_P positions of one channel: 8 at C = 512, which
  is half a sector of 32 bytes in bf16; the other half is read next, by the same program from L1 or by its neighbour from L2.
- What is summed over positions stays in the tile's lanes until the end of a chunk of at most 16 tiles; a program writes its own
  partial sums (one number, and C for the gradient of the weight), and torch adds those: no atomics, one order of summation.
  Chunks are so short that 528 programs (4 per SM) run where the maps have as many tiles.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dae_kernels.dispatch import register_op
from dae_kernels.tiles import cdiv, next_power_of_2

# Enough programs to keep 132 SMs busy, several per SM.
PROGRAMS, TILES_PER_CHUNK, TILE = 528, 16, 4096


@triton.jit
def pointers(ptr, batch, start, lane, c, stride_b, stride_c, stride_p):
    """Pointers to the tile [BLOCK_P, BLOCK_C] of an image that begins at position `start`."""
    ptr += batch * stride_b + start.to(tl.int64) * stride_p
    return ptr + lane[:, None] * stride_p + c.to(tl.int64)[None, :] * stride_c


@triton.jit
def chunk_of_program(
    a_ptr, b_ptr, a_stride_b, a_stride_c, a_stride_p, b_stride_b, b_stride_c, b_stride_p, P, chunk, chunks,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program's image, first position and number of positions; lanes and channels of a tile; pointers to its first tile."""
    start = tl.program_id(0) % chunks * chunk
    count = tl.minimum(P - start, chunk)
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    lane, c = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    a_ptr += batch * a_stride_b + start.to(tl.int64) * a_stride_p
    b_ptr += batch * b_stride_b + start.to(tl.int64) * b_stride_p
    a_ptrs = a_ptr + lane[:, None] * a_stride_p + c.to(tl.int64)[None, :] * a_stride_c
    b_ptrs = b_ptr + lane[:, None] * b_stride_p + c.to(tl.int64)[None, :] * b_stride_c
    return batch, start, count, lane, c, a_ptrs, b_ptrs


@triton.jit
def inverse(squares, eps):
    """1 / (sqrt(squares) + eps), and 0 where squares is 0."""
    present = squares != 0  # true for NaN: all channels of its position become NaN, as in the reference
    return tl.div_rn(present.to(tl.float32), tl.where(present, tl.sqrt_rn(squares) + eps, 1.0))


@triton.jit
def compare(a, b, eps):
    """u - v, and the squared norms and 1 / (|a| + eps), 1 / (|b| + eps) of each position.

    Where all channels agree the difference is exactly 0, also if the compiler sums the two norms in two orders (a tensor in each
    layout), or contracts a product with the subtraction.
    """
    squares_a, squares_b = tl.sum(a * a, axis=1), tl.sum(b * b, axis=1)
    inverse_a, inverse_b = inverse(squares_a, eps), inverse(squares_b, eps)
    apart = tl.sum(tl.abs(a - b), axis=1) != 0  # written so that NaN differs from everything
    e = tl.where(apart[:, None], a * inverse_a[:, None] - b * inverse_b[:, None], 0.0)
    return e, squares_a, squares_b, inverse_a, inverse_b


@triton.jit
def through_norm(de, x, squares, inverse_norm):
    """The gradient to x from the gradient `de` to its unit vector x / (|x| + eps)."""
    along = inverse(squares, 0.0) * tl.sum(de * x, axis=1)
    return (de - x * (along * inverse_norm)[:, None]) * inverse_norm[:, None]


@triton.jit
def distance_kernel(
    a_ptr, b_ptr, weight_ptr, part_ptr,
    a_stride_b, a_stride_c, a_stride_p, b_stride_b, b_stride_c, b_stride_p,
    C, P, chunk, chunks, eps,
    WEIGHT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum of weight (u - v)^2 over all channels and a chunk of positions, into [B, chunks]. Grid (B * chunks)."""
    _batch, _start, count, lane, c, a_ptrs, b_ptrs = chunk_of_program(
        a_ptr, b_ptr, a_stride_b, a_stride_c, a_stride_p, b_stride_b, b_stride_c, b_stride_p, P, chunk, chunks, BLOCK_P, BLOCK_C
    )
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for p0 in range(0, count, BLOCK_P):
        inside = (p0 + lane[:, None] < count) & (c[None, :] < C)
        a = tl.load(a_ptrs, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(b_ptrs, mask=inside, other=0.0).to(tl.float32)
        e, _, _, _, _ = compare(a, b, eps)
        total += e * e
        a_ptrs += BLOCK_P * a_stride_p
        b_ptrs += BLOCK_P * b_stride_p
    if WEIGHT:
        total *= tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(part_ptr + tl.program_id(0), tl.sum(tl.sum(total, axis=1), axis=0))


@triton.jit
def gradient_kernel(
    d_out_ptr, a_ptr, b_ptr, weight_ptr, da_ptr, db_ptr, part_ptr,
    a_stride_b, a_stride_c, a_stride_p, b_stride_b, b_stride_c, b_stride_p,
    da_stride_b, da_stride_c, da_stride_p, db_stride_b, db_stride_c, db_stride_p,
    C, P, chunk, chunks, eps,
    WEIGHT: tl.constexpr, WANTS_A: tl.constexpr, WANTS_B: tl.constexpr, WANTS_WEIGHT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """da, db, and the sums over a chunk of positions of the gradient to the weight, into [B * chunks, C]. Grid (B * chunks)."""
    batch, start, count, lane, c, a_ptrs, b_ptrs = chunk_of_program(
        a_ptr, b_ptr, a_stride_b, a_stride_c, a_stride_p, b_stride_b, b_stride_c, b_stride_p, P, chunk, chunks, BLOCK_P, BLOCK_C
    )
    if WANTS_A:
        da_ptrs = pointers(da_ptr, batch, start, lane, c, da_stride_b, da_stride_c, da_stride_p)
    if WANTS_B:
        db_ptrs = pointers(db_ptr, batch, start, lane, c, db_stride_b, db_stride_c, db_stride_p)
    if WANTS_WEIGHT:
        total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    d_out = tl.load(d_out_ptr + batch).to(tl.float32) / P
    factor = tl.full([BLOCK_C], 2.0, tl.float32) * d_out
    if WEIGHT:
        factor *= tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    for p0 in range(0, count, BLOCK_P):
        inside = (p0 + lane[:, None] < count) & (c[None, :] < C)
        a = tl.load(a_ptrs, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(b_ptrs, mask=inside, other=0.0).to(tl.float32)
        e, squares_a, squares_b, inverse_a, inverse_b = compare(a, b, eps)
        de = e * factor[None, :]
        if WANTS_A:
            da = through_norm(de, a, squares_a, inverse_a)
            tl.store(da_ptrs, da.to(da_ptr.dtype.element_ty), mask=inside)
            da_ptrs += BLOCK_P * da_stride_p
        if WANTS_B:
            db = -through_norm(de, b, squares_b, inverse_b)
            tl.store(db_ptrs, db.to(db_ptr.dtype.element_ty), mask=inside)
            db_ptrs += BLOCK_P * db_stride_p
        if WANTS_WEIGHT:
            total += e * e
        a_ptrs += BLOCK_P * a_stride_p
        b_ptrs += BLOCK_P * b_stride_p
    if WANTS_WEIGHT:
        part = part_ptr + tl.program_id(0).to(tl.int64) * C + c
        tl.store(part, tl.sum(total, axis=0) * d_out, mask=c < C)


def tile(C: int, P: int) -> dict[str, int]:
    """A tile of all channels and as many positions as make TILE elements."""
    block_c = next_power_of_2(C)
    return {"BLOCK_P": min(next_power_of_2(P), max(1, TILE // block_c)), "BLOCK_C": block_c, "num_warps": 8}


class PairLayout:
    """Launch parameters: sizes of [B, C, P] views, tile, grid and the split of positions into chunks."""

    def __init__(self, shape: tuple[int, int, int]):
        self.B, self.C, self.P = shape
        self.options = tile(self.C, self.P)
        tiles = cdiv(self.P, self.options["BLOCK_P"])
        tiles_per_chunk = max(1, min(TILES_PER_CHUNK, tiles * self.B // PROGRAMS))
        self.chunk = tiles_per_chunk * self.options["BLOCK_P"]
        self.chunks = cdiv(self.P, self.chunk)
        self.programs = self.B * self.chunks
        self.sizes = (self.C, self.P, self.chunk, self.chunks)


pair_layout = functools.lru_cache(maxsize=4096)(PairLayout)


def positions(x: Tensor) -> Tensor:
    """[B, C, *positions] as [B, C, P]: a view if positions are evenly spaced, else a copy.

    Also a copy if offsets within a tile would exceed int32.
    """
    x_BCP = x.flatten(2) if x.dim() > 2 else x[..., None]
    return x_BCP if TILE * x_BCP.stride(2) < 2**31 else x_BCP.contiguous()


def in_layout_of(x: Tensor, dx_BCP: Tensor) -> Tensor:
    """[B, C, P] in the shape of x and the strides of `empty_like(x)`: a view, or a copy where `positions` made one of x."""
    dx = dx_BCP.view(x.shape)
    if dx.stride() == x.stride():  # dx is dense, so x is, and so are those of `empty_like`, which take long to ask for
        return dx
    wanted = torch.empty_like(x, device="meta").stride()
    return dx if dx.stride() == wanted else torch.empty_strided(x.shape, wanted, dtype=dx.dtype, device=dx.device).copy_(dx)


def launch_distance(layout: PairLayout, a_BCP: Tensor, b_BCP: Tensor, weight: Tensor | None, part: Tensor, eps: float) -> None:
    distance_kernel[(layout.programs,)](
        a_BCP,
        b_BCP,
        weight,
        part,
        *a_BCP.stride(),
        *b_BCP.stride(),
        *layout.sizes,
        eps,
        WEIGHT=weight is not None,
        **layout.options,
    )


def launch_gradient(
    layout: PairLayout,
    d_out: Tensor,
    a_BCP: Tensor,
    b_BCP: Tensor,
    weight: Tensor | None,
    da_BCP: Tensor | None,
    db_BCP: Tensor | None,
    part: Tensor | None,
    eps: float,
) -> None:
    """Launch the gradient into those of da, db [B, C, P] and part [B * chunks, C] that are not None."""
    gradient_kernel[(layout.programs,)](
        d_out,
        a_BCP,
        b_BCP,
        weight,
        da_BCP,
        db_BCP,
        part,
        *a_BCP.stride(),
        *b_BCP.stride(),
        *((0, 0, 0) if da_BCP is None else da_BCP.stride()),
        *((0, 0, 0) if db_BCP is None else db_BCP.stride()),
        *layout.sizes,
        eps,
        WEIGHT=weight is not None,
        WANTS_A=da_BCP is not None,
        WANTS_B=db_BCP is not None,
        WANTS_WEIGHT=part is not None,
        **layout.options,
    )


def forward_empty(a: Tensor, b: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return a.new_empty(a.shape[:1], dtype=torch.float32)


def forward_launcher(a: Tensor, b: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The distance of each pair, [B] float32."""
    a_BCP, b_BCP = positions(a), positions(b)
    layout = pair_layout(a_BCP.shape)
    part = a.new_empty(layout.B, layout.chunks, dtype=torch.float32)
    launch_distance(layout, a_BCP, b_BCP, None if weight is None else weight.contiguous(), part, eps)
    return part.sum(dim=1) / layout.P


def backward_empty(
    d_out: Tensor, a: Tensor, b: Tensor, weight: Tensor | None, eps: float, wants_a: bool, wants_b: bool, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    da = torch.empty_like(a) if wants_a else a.new_empty(0)
    db = torch.empty_like(b) if wants_b else b.new_empty(0)
    return da, db, a.new_empty(a.shape[1] if wants_weight else 0, dtype=torch.float32)


def backward_launcher(
    d_out: Tensor, a: Tensor, b: Tensor, weight: Tensor | None, eps: float, wants_a: bool, wants_b: bool, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """da and db in the layouts of a and b, and the gradient of the weight [C] float32; empty where not wanted."""
    a_BCP, b_BCP = positions(a), positions(b)
    da_BCP = torch.empty_like(a_BCP) if wants_a else None
    db_BCP = torch.empty_like(b_BCP) if wants_b else None
    layout = pair_layout(a_BCP.shape)
    part = a.new_empty(layout.programs, layout.C, dtype=torch.float32) if wants_weight else None
    weight = None if weight is None else weight.contiguous()
    launch_gradient(layout, d_out.contiguous(), a_BCP, b_BCP, weight, da_BCP, db_BCP, part, eps)
    da = a.new_empty(0) if da_BCP is None else in_layout_of(a, da_BCP)
    db = b.new_empty(0) if db_BCP is None else in_layout_of(b, db_BCP)
    return da, db, a.new_empty(0, dtype=torch.float32) if part is None else part.sum(dim=0)


lpips_forward = register_op("dae_kernels::lpips_forward", forward_launcher, forward_empty)
lpips_backward = register_op("dae_kernels::lpips_backward", backward_launcher, backward_empty)

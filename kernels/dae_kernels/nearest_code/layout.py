"""Launch parameters of nearest_code: tiles by measurement or rule, and grids and arguments, made once per shape."""

from __future__ import annotations

import functools

import torch

from dae_kernels.tiles import cdiv, generation, measured_tile, next_power_of_2, processors

NAMES = ("BLOCK_N", "BLOCK_K", "BLOCK_D", "num_warps", "num_stages")  # of a measured tile
LANES = 32  # of a tile, per thread, for which minima are kept


def padded(D: int) -> int:
    """The power of two, at least 16, that a tensor core takes for D."""
    return max(16, next_power_of_2(D))


def norm_tile(D: int) -> dict[str, int]:
    """Tile sizes and launch options of the norm kernel."""
    return {"BLOCK_K": 32, "BLOCK_D": min(32, padded(D)), "num_warps": 4}


@functools.lru_cache(maxsize=1024)
def search_tile(D: int, dot_dtype: torch.dtype, exact: bool, gpu: str | None = None) -> dict[str, int]:
    """Tile sizes and launch options of the search: those measured on the GPU generation at the nearest D, else by rule.

    D is padded and larger ones come first in the table, so a tile that keeps whole rows of x is not taken for longer ones: such a
    tile may spill where it loops over D.
    """
    when = {"bits": 8 * dot_dtype.itemsize, "exact": exact}
    if found := measured_tile("nearest_code", gpu, "search", when, {"D": padded(D)}, NAMES):
        return found | {"BLOCK_D": min(found["BLOCK_D"], padded(D))}
    if dot_dtype == torch.float32:
        block_d = 16 if exact else min(padded(D), 32)
        return {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_D": block_d, "num_warps": 4, "num_stages": 2}
    block_k = 64 if exact else 128
    return {"BLOCK_N": 128, "BLOCK_K": block_k, "BLOCK_D": min(padded(D), 64), "num_warps": 8, "num_stages": 2}


def by_lane(tile: dict[str, int], exact: bool) -> bool:
    """Whether the search keeps a minimum per lane of the tile, reduced once at the end, instead of reducing every tile.

    With at most LANES lanes per thread no target spills. "exact" keeps three numbers per lane, which takes up to 214 registers
    per thread instead of 128 (sm_80): one program of 8 warps per SM instead of two. So it does only where rows of 128 values or
    more are kept, whose shared memory leaves room for no second program either.
    """
    lanes = tile["BLOCK_N"] * tile["BLOCK_K"] // (32 * tile["num_warps"])
    return lanes <= LANES and (not exact or tile["BLOCK_D"] >= 128)


def settle_tile(cosine: bool) -> dict[str, int]:
    """Tile sizes and launch options of the settlement, with which no target spills: four coordinates per thread, or two."""
    return {"BLOCK_N": 32, "BLOCK_E": 16 if cosine else 8, "num_warps": 4}


def walk_tile(cosine: bool) -> dict[str, int]:
    """Tile sizes and launch options of the walk."""
    return {"BLOCK_K": 32, "BLOCK_E": 16 if cosine else 8, "num_warps": 4}


def walk_programs(device: torch.device) -> int:
    """Programs of the walk: eight per multiprocessor; the interpreter, which runs one after the other, has few."""
    return 8 * processors(device) if device.type == "cuda" else 8


def dot_dtype(x: torch.dtype, codebook: torch.dtype, exact: bool) -> torch.dtype:
    """The dtype in which operands are multiplied (sums are float32): the wider one, or that of `x` if it need not be exact."""
    return torch.promote_types(x, codebook) if exact else x


def split_count(N: int, H: int, K: int, tile: dict[str, int], device: torch.device) -> int:
    """The number of splits of the codes: two programs per SM, and at least four tiles per program."""
    programs = cdiv(N, tile["BLOCK_N"]) * H
    return max(1, min(K // (4 * tile["BLOCK_K"]), 2 * processors(device) // programs))


class SearchLayout:
    """Grids and arguments of all launches for one shape, and how many scores and candidates [S, N, H] the search writes."""

    def __init__(
        self,
        N: int,
        H: int,
        K: int,
        D: int,
        x: torch.dtype,
        codebook: torch.dtype,
        cosine: bool,
        exact: bool,
        device: torch.device,
    ) -> None:
        dtype = dot_dtype(x, codebook, exact)
        norm, settle, walk = norm_tile(D), settle_tile(cosine), walk_tile(cosine)
        search = search_tile(D, dtype, exact, generation(device))
        block_k, P = search["BLOCK_K"], walk_programs(device)
        S = split_count(N, H, K, search, device)
        self.cosine, self.exact, self.programs = cosine, exact, P
        self.scores, self.candidates = (3 * S * N * H, 2 * S * N * H) if exact else (S * N * H, S * N * H)
        self.list_dtype = torch.int32 if N * H < 1 << 31 else torch.int64
        # AMD has no tf32x3; its float32 product is a float32 product.
        precision = "tf32" if not exact else "ieee" if torch.version.hip else "tf32x3"
        constants = {"H": H, "COSINE": cosine}
        self.norm_grid, self.norm_sizes = (cdiv(H * K, norm["BLOCK_K"]),), (H * K,)
        self.norm_options = {"D": D, "COSINE": cosine, **norm}
        self.search_grid = (cdiv(N, search["BLOCK_N"]), H, S)
        self.search_sizes = (N, K, cdiv(cdiv(K, block_k), S) * block_k, D)
        self.search_options = constants | {"D": D, "EXACT": exact, "UPCAST": dtype != x, "INPUT_PRECISION": precision} | search
        self.search_options |= {"BY_LANE": by_lane(search, exact), "RAGGED": K % block_k != 0}
        self.settle_grid, self.settle_sizes = (cdiv(N, settle["BLOCK_N"]), H), (N, K, S, D)
        self.settle_options = constants | {"EXACT": exact} | settle
        self.walk_grid, self.walk_sizes, self.walk_options = (P,), (K, D, P), constants | walk
        self.join_grid = (max(1, P // 2),)
        self.join_options = {"COSINE": cosine, "BLOCK_K": walk["BLOCK_K"], "BLOCK_S": next_power_of_2(P), "num_warps": 4}


search_layout = functools.lru_cache(maxsize=1024)(SearchLayout)

"""`precision="exact"` of the kernel is float64's choice, also where float32 cannot tell codes apart; and its splits over K.

The truth is the float64 distance from differences of the float32 operands, which do not cancel.
"""

from __future__ import annotations

import math

import pytest
import torch
from dae_kernels import nearest_code
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METRICS = ["l2", "cosine"]
EPS = torch.finfo(torch.float32).eps


def truth(x_ND: Tensor, codebook_KD: Tensor, metric: str) -> Tensor:
    """[N, K] distances in float64."""
    x_ND, codebook_KD = x_ND.double(), codebook_KD.double()
    if metric == "cosine":
        x_ND, codebook_KD = (torch.nn.functional.normalize(t, dim=1, eps=0.0) for t in (x_ND, codebook_KD))
        return 1 - x_ND @ codebook_KD.T
    return torch.stack([(x_D - codebook_KD).square().sum(dim=1) for x_D in x_ND])


def close_codes(N: int, copies: int, D: int, spread: bool) -> tuple[Tensor, Tensor]:
    """Rows, each with `copies` codes beside it that differ in the last bit of one coordinate, in an order by chance.

    `spread` puts them K / copies apart, else they are neighbours in one tile.
    """
    torch.manual_seed(N + copies + D)
    anchor = torch.randn(N, D)
    codes = anchor.repeat(copies, 1, 1)
    for i in range(copies):
        column = torch.randint(D, (N,))
        direction = torch.full((N,), float("inf")).where(torch.rand(N) < 0.5, -float("inf"))
        codes[i, torch.arange(N), column] = torch.nextafter(codes[i, torch.arange(N), column], direction)
    codebook = codes.flatten(0, 1) if spread else codes.transpose(0, 1).flatten(0, 1)
    return (anchor + 0.2 * torch.randn(N, D)).to(DEVICE), codebook.to(DEVICE)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("copies, spread", [(2, True), (2, False), (4, True)])
def test_codes_that_float32_cannot_tell_apart(metric, copies, spread):
    x, codebook = close_codes(66 if copies == 2 else 24, copies, 12, spread)
    distance_NK = truth(x, codebook, metric)
    best = distance_NK.min(dim=1).values
    index, distance = nearest_code(x, codebook, metric=metric, impl="triton")
    # 1e-14: float64's own rounding; the distances of two such codes are 1e-9 to 1e-7 apart.
    assert (distance_NK.gather(1, index[:, None])[:, 0] - best <= 1e-14).all()
    torch.testing.assert_close(distance.double(), best, rtol=EPS, atol=1e-14)

    if metric == "l2":
        naive = torch.addmm(codebook.square().sum(1), x, codebook.T, alpha=-2).argmin(1)  # or the case would show nothing
        assert (distance_NK.gather(1, naive[:, None])[:, 0] - best > 1e-14).sum() > 5


@pytest.mark.parametrize("metric", METRICS)
def test_other_operands_that_leave_float32_no_choice(metric):
    torch.manual_seed(14)
    x, codes = torch.randn(20, 16), torch.randn(80, 16)
    far = torch.randn(20, 16) + 3000
    cases = {
        "one rounding apart": (x, torch.cat([codes, codes * (1 + EPS), codes * (1 - EPS)])),
        "all cancels": (far, far[:10].repeat(7, 1) + 1e-2 * torch.randn(70, 16)),
        "tiny codes": (x, codes * 1e-22),
        "a code far out": (x, torch.cat([codes, torch.full((1, 16), 1e15)])),
        "denormal": (x * 1e-40, codes * 1e-40),
        "tiny": (x * 1e-25, codes * 1e-25),
        "huge": (x * 1e20, codes * 1e20),  # |x|^2 and x . c overflow float32
    }
    for name, (rows, codebook) in cases.items():
        rows, codebook = rows.to(DEVICE), codebook.to(DEVICE)
        index, _ = nearest_code(rows, codebook, metric=metric, impl="triton")
        distance_NK = truth(rows, codebook, metric)
        best = distance_NK.min(dim=1).values
        away = distance_NK.gather(1, index[:, None])[:, 0] - best
        # The cosine in float64 is off by some roundings of 1, l2 by some of itself.
        assert (away <= 32 * 2**-53 * (1 if metric == "cosine" else best)).all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_operands_are_decided_as_by_float64(dtype):
    torch.manual_seed(3)
    x, codes = torch.randn(30, 3).to(dtype), torch.randn(200, 3).to(dtype)  # many codes nearly as near
    index, _ = nearest_code(x.to(DEVICE), codes.to(DEVICE), impl="triton")
    assert torch.equal(index.cpu(), truth(x, codes, "l2").argmin(dim=1))


@pytest.mark.parametrize("splits", [2, 7])
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("metric", METRICS)
def test_splits_do_not_show(monkeypatch, splits, precision, metric):
    """Also more splits than tiles, whose last ones have no code, and equal codes in several of them."""
    torch.manual_seed(splits)
    for K, D in ((30, 5), (70, 20)):
        codes = torch.randn(2, K, D, device=DEVICE)
        codebook = torch.cat([codes, codes], dim=1)
        x = torch.randn(5, 2, D, device=DEVICE)
        x[3, 0] = float("nan")
        whole = nearest_code(x, codebook, metric=metric, precision=precision, impl="triton")
        with monkeypatch.context() as patch:
            fixed(patch, split_count=lambda *_: splits)
            parts = nearest_code(x, codebook, metric=metric, precision=precision, impl="triton")
        torch.testing.assert_close(parts, whole, rtol=0, atol=0, equal_nan=True)


def test_split_count():
    """Two programs an SM (132 here) where there are codes for it, four tiles a program at least, never none."""
    from dae_kernels.nearest_code import layout

    tile, cpu = {"BLOCK_N": 64, "BLOCK_K": 64}, torch.device("cpu")
    count = lambda N, H, K: layout.split_count(N, H, K, tile, cpu)  # noqa: E731
    assert count(1_000_000, 1, 16384) == 1 and count(64, 1, 100) == 1 and count(1, 1, 1) == 1
    assert count(64, 1, 16384) == 64 and count(64, 8, 16384) == 33 and count(1024, 1, 262144) == 16


def rounded(values: Tensor, bits: int) -> Tensor:
    """float32 cut to `bits` significant bits, the worst that a conversion to tf32 may do."""
    return (values.view(torch.int32) & -(1 << (24 - bits))).view(torch.float32)


@pytest.mark.parametrize("D", [1, 8, 64, 500])
def test_the_bound_covers_three_truncated_tf32_products(D):
    """An imitation of the tensor core: operands cut to 11 bits, every addition truncated to float32."""
    torch.manual_seed(D)
    for x, code in ((torch.randn(300, D), torch.randn(300, D)), (torch.rand(300, D), torch.rand(300, D))):
        (x_high, code_high), total = (rounded(t, 11) for t in (x, code)), torch.zeros(300)
        x_low, code_low = rounded(x - x_high, 11), rounded(code - code_high, 11)
        for a, b in ((x_low, code_high), (x_high, code_low), (x_high, code_high)):
            for d in range(D):
                exact = total.double() + a[:, d].double() * b[:, d].double()
                total = exact.float()
                total = torch.where(total.double().abs() > exact.abs(), torch.nextafter(total, torch.zeros(300)), total)
        score = code.double().square().sum(1).float() - 2 * total
        x, code = x.double(), code.double()
        error = (score.double() - (code.square().sum(1) - 2 * (x * code).sum(1))).abs()
        length, size = x.norm(dim=1), code.norm(dim=1)
        assert (error <= (D + 16) * 2**-21 * size * (size + 2 * length)).all()
        assert math.isfinite(error.max().item())


def fixed(patch, **functions):
    """These functions of the launch parameters, which are then made anew at each call."""
    from dae_kernels.nearest_code import fused, layout

    for name, function in functions.items():
        patch.setattr(layout, name, function)
    patch.setattr(fused, "search_layout", layout.SearchLayout)


class Spied:
    """A kernel, and how many rows were on the list of each launch."""

    def __init__(self, kernel):
        self.kernel, self.counts, self.grids = kernel, [], []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.counts.append(arguments[2].item())
            self.grids.append(grid)
            return self.kernel[grid](*arguments, **options)

        return run


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("walking", [0, 1, 3, 40])
def test_rows_that_walk_are_spread_over_the_programs(metric, walking, monkeypatch):
    """`walking` rows have three codes that float32 cannot tell apart; few are split over their codes, many are not."""
    from dae_kernels.nearest_code import fused

    x, codebook = close_codes(40, 3, 12, True)
    x = x[:, None].repeat(1, 2, 1)
    away = 3 * torch.randn(40, 12, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    codebook = torch.stack([torch.cat([codebook, away]), torch.cat([away + 50, away + 100, codebook[:40], away - 50])])
    x[walking:, 0], x[:, 1] = away[walking:], codebook[1, 80:120]
    expected = None
    for programs in (2, 16, 500):
        spied = Spied(fused.walk_kernel)
        monkeypatch.setattr(fused, "walk_kernel", spied)
        fixed(monkeypatch, walk_programs=lambda _, P=programs: P)
        found = nearest_code(x, codebook, metric=metric, impl="triton")
        monkeypatch.undo()
        assert spied.grids == [(programs,)] and spied.counts[0] >= walking and (metric == "cosine" or spied.counts[0] <= walking)
        expected = expected or found
        assert all(map(torch.equal, found, expected))  # bit for bit, however the codes are shared out
    for head in range(2):
        distance_NK = truth(x[:, head], codebook[head], metric)
        best = distance_NK.min(dim=1).values
        assert (distance_NK.gather(1, found[0][:, head, None])[:, 0] - best <= 1e-14).all()


@pytest.mark.parametrize("programs", [1, 4, 64])
def test_equal_codes_in_several_shares(programs, monkeypatch):
    """The lowest index wins, across the shares too, and codes that are not finite never do."""
    fixed(monkeypatch, walk_programs=lambda _: programs)
    torch.manual_seed(0)
    codes = torch.randn(5, 6, device=DEVICE)
    codebook = torch.cat([torch.full_like(codes, math.nan), codes.repeat(30, 1), torch.full_like(codes, math.inf)])
    index, distance = nearest_code(codes[[3, 0]] + 0.1, codebook, impl="triton")
    assert torch.equal(index, torch.cdist(codes[[3, 0]] + 0.1, codes).argmin(dim=1) + 5) and distance.isfinite().all()


def test_layouts_are_made_once_per_shape():
    """What a launch needs beside pointers is no work of the host at the second call."""
    from dae_kernels.nearest_code import layout

    x, codebook = torch.randn(9, 5, device=DEVICE), torch.randn(7, 5, device=DEVICE)
    layout.search_layout.cache_clear()
    for _ in range(3):
        nearest_code(x, codebook, impl="triton")
    assert layout.search_layout.cache_info()[:2] == (2, 1)  # hits, misses


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("K, D", [(200, 3), (70, 20), (128, 130), (5, 1)])
def test_minima_by_lane_choose_what_minima_by_tile_do(metric, precision, K, D, monkeypatch):
    """Small integers: no score is rounded, and many are equal, in one tile and in several; the lowest code wins."""
    generator = torch.Generator().manual_seed(K)
    x, codebook = (torch.randint(-2, 3, (n, D), generator=generator).float().to(DEVICE) for n in (150, K))
    x[7] = math.nan
    codebook[K // 2] = math.nan
    tile = {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2}
    found = []
    for lanes in (True, False):
        fixed(monkeypatch, search_tile=lambda *_: tile, by_lane=lambda *_, lanes=lanes: lanes)
        found.append(nearest_code(x, codebook, metric=metric, precision=precision, impl="triton"))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0, equal_nan=True)
    if metric == "l2":
        rows = torch.arange(150, device=DEVICE) != 7
        squares = (x[rows, None] - codebook.nan_to_num(100.0)).square().sum(dim=2)
        first = (squares == squares.amin(dim=1, keepdim=True)).int().argmax(dim=1)
        assert torch.equal(found[0][0][rows], first) and found[0][0][7] == 0


@pytest.mark.parametrize("apart, walks", [(1, False), (63, False), (64, True), (128, True)])
def test_which_rows_walk_if_minima_are_kept_by_lane(apart, walks, monkeypatch):
    """Two copies of a code are compared unless they share a lane of the tiles of 64 codes; then the row walks."""
    from dae_kernels.nearest_code import fused

    torch.manual_seed(0)
    codebook = torch.randn(200, 20, device=DEVICE)
    codebook[3 + apart] = codebook[3]
    x = torch.cat([codebook[3:4], torch.randn(30, 20, device=DEVICE)])
    tile = {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_D": 128, "num_warps": 4, "num_stages": 2}
    fixed(monkeypatch, search_tile=lambda *_: tile)
    monkeypatch.setattr(fused, "walk_kernel", spied := Spied(fused.walk_kernel))
    index, _ = nearest_code(x, codebook, impl="triton")
    assert index[0] == 3 and spied.counts == [int(walks)]
    assert torch.equal(index.cpu(), truth(x, codebook, "l2").argmin(dim=1).cpu())


def test_minima_by_lane_have_registers():
    """Thirty-two lanes per thread; "exact", which keeps three numbers per lane, only where the rows fill the shared memory."""
    from dae_kernels.nearest_code.layout import by_lane

    tile = lambda n, k, d, warps: {"BLOCK_N": n, "BLOCK_K": k, "BLOCK_D": d, "num_warps": warps}  # noqa: E731
    assert by_lane(tile(64, 64, 16, 4), False) and by_lane(tile(128, 64, 64, 8), False)
    assert not by_lane(tile(128, 64, 64, 4), False) and not by_lane(tile(128, 128, 64, 8), False)
    assert by_lane(tile(128, 64, 256, 8), True) and not by_lane(tile(128, 64, 64, 8), True)

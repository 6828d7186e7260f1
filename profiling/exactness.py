"""Count how often nearest_code misses the float64 nearest code, on families of data where rounding matters.

    python profiling/exactness.py --impl triton --json exactness.jsonl          # 1e6 queries per family, for a GPU
    python profiling/exactness.py --impl reference --queries 2000

- wrong: queries whose code is farther, in float64, than the nearest one. Ties are not wrong.
- beyond_rounding: wrong queries that float32 could have resolved: farther by more than the error that one rounding to float32
  of |x| |c| can leave in the score, 2 * 2^-24 * 2 |x| |c|. Closer codes may be swapped by any float32 arithmetic.
- excess: the largest error of any query, as a share of |x| |c|.
"""

import time
from typing import Any

import torch
from measuring import append_row, machine, measuring_parser
from torch import Tensor
from torch.nn.functional import normalize

SCORES = 1 << 27  # float64 scores in memory at once: 1 GiB
FAMILIES = {"random": (8192, 64), "uniform": (1024, 64), "normalized": (16384, 8), "pairs": (1024, 16)}  # K, D


def operands(family: str, N: int, K: int, D: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Queries [N, D] and codebook [K, D]."""
    source: dict[str, Any] = {"generator": generator, "device": generator.device}

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, D, **source)

    if family == "random":
        return normal(N), normal(K)
    if family == "normalized":  # both on the unit sphere
        return normalize(normal(N), dim=1), normalize(normal(K), dim=1)
    if family == "uniform":  # the usual codebook initialisation, U(-1/K, 1/K): all distances are nearly equal
        codebook_KD = torch.rand(K, D, **source)
        return normal(N), (2 * codebook_KD - 1) / K
    # Pairs of codes that differ in the last bit of one coordinate, with queries near them: float32 scores cannot decide.
    codes_KD = normal(K // 2).repeat(2, 1)
    column_K = torch.randint(D, (len(codes_KD), 1), **source)
    changed_K = codes_KD.gather(1, column_K)
    codes_KD.scatter_(1, column_K, torch.nextafter(changed_K, torch.full_like(changed_K, float("inf"))))
    code_N = torch.randint(K // 2, (N,), **source)
    return codes_KD[code_N] + 0.1 * normal(N), codes_KD


def judge(x_ND: Tensor, codebook_KD: Tensor, index_N: Tensor) -> tuple[int, int, float]:
    """The columns wrong, beyond_rounding and excess."""
    codes_KD = codebook_KD.double()
    squares_K = codes_KD.square().sum(dim=1)
    wrong, beyond, excess = 0, 0, 0.0
    rows = max(1, SCORES // codes_KD.shape[0])
    for x_nD, index_n in zip(x_ND.split(rows), index_N.split(rows), strict=True):
        x_nD = x_nD.double()
        score_nK = torch.addmm(squares_K, x_nD, codes_KD.T, alpha=-2.0)
        away_n = score_nK.gather(1, index_n[:, None])[:, 0] - score_nK.amin(dim=1)
        scale_n = x_nD.norm(dim=1) * squares_K[index_n].sqrt()
        share_n = away_n / scale_n.clamp_min(torch.finfo(torch.float64).tiny)
        # 2^-48: error of the float64 product itself
        wrong += int((share_n > 2**-48).sum())
        beyond += int((share_n > 4 * 2**-24).sum())
        excess = max(excess, share_n.max().item())
    return wrong, beyond, excess


def main() -> None:
    parser = measuring_parser(__doc__)
    parser.add_argument("--queries", type=int, default=1_000_000, help="of each family")
    parser.add_argument("--codes", type=int, help="K of each family instead of its own")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="only this family (may be repeated)")
    parser.add_argument("--impl", choices=["auto", "reference", "triton", "float32"], default="auto")
    parser.add_argument("--precision", choices=["exact", "fast"], action="append", help="default: exact (may be repeated)")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    from dae_kernels.nearest_code import nearest_code

    device = torch.device(arguments.device)
    where = machine(device, "torch", "triton")
    print(f"{'family':<12}{'precision':<11}{'K':>7}{'D':>5}{'queries':>10}{'wrong':>8}{'beyond rounding':>17}{'excess':>10}")
    for family in arguments.family or FAMILIES:
        K, D = arguments.codes or FAMILIES[family][0], FAMILIES[family][1]
        drawn = operands(family, arguments.queries, K, D, torch.Generator(device).manual_seed(0))
        x_ND, codebook_KD = (t.to(getattr(torch, arguments.dtype)) for t in drawn)
        for precision in arguments.precision or ["exact"]:
            start = time.perf_counter()
            if arguments.impl == "float32":  # torch's own arithmetic, for comparison
                squares_K = codebook_KD.square().sum(dim=1)
                parts = x_ND.split(max(1, SCORES // K))
                index_N = torch.cat([torch.addmm(squares_K, x, codebook_KD.T, alpha=-2).argmin(dim=1) for x in parts])
            else:
                index_N, _ = nearest_code(x_ND, codebook_KD, precision=precision, impl=arguments.impl)
            wrong, beyond, excess = judge(x_ND, codebook_KD, index_N)
            print(
                f"{family:<12}{precision:<11}{K:>7}{D:>5}{len(x_ND):>10}{wrong:>8}{beyond:>17}{excess:>10.1e}"
                f"   {time.perf_counter() - start:.1f} s",
                flush=True,
            )
            row = {"family": family, "impl": arguments.impl, "precision": precision, "dtype": arguments.dtype, "K": K, "D": D}
            row |= {"queries": len(x_ND), "wrong": wrong, "beyond_rounding": beyond, "excess": excess, "seed": 0}
            append_row(arguments.json, row | where)


if __name__ == "__main__":
    main()

"""One Sinkhorn update in eager torch, in blocks of bounded size: the definition."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

# Scores in memory at once. On a CPU they fit into its cache: larger blocks are slower, as every step then goes to memory.
MAX_SCORES = {"cpu": 1 << 17}
MAX_SCORES_ELSEWHERE = 1 << 23
MIN_ROWS = 16  # with fewer, products degrade to matrix-vector ones
MAX_HELD = 1 << 22  # distances kept from one update to the next for p = 1, up to four times: 64 MiB in float32


def product(a_nK: Tensor, b_Km: Tensor, bias_m: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """bias + scale a @ b, in float64 where a setting (`torch.set_float32_matmul_precision`) would have torch round a and b."""
    backend = torch.backends.mkldnn if a_nK.device.type == "cpu" else torch.backends.cuda
    dtype = a_nK.dtype if backend.matmul.fp32_precision in ("none", "ieee") else torch.float64
    if bias_m is None:
        return (a_nK.to(dtype) @ b_Km.to(dtype)).to(a_nK.dtype)
    return torch.addmm(bias_m.to(dtype), a_nK.to(dtype), b_Km.to(dtype), alpha=scale).to(a_nK.dtype)


class Update:
    """One Sinkhorn update between two clouds x and y: defined by `ReferenceUpdate`, also computed by the kernels.

    For p = 2 half the squared norm of the point is subtracted from its potential: a score is then a product and two numbers,
    without cancellation and with less rounding.
    """

    def __init__(self, x_ND: Tensor, y_MD: Tensor, p: int) -> None:
        self.x_ND, self.y_MD, self.p = x_ND, y_MD, p

    @functools.cached_property
    def nothing(self) -> Tensor:
        return self.x_ND.new_empty(0)

    def __call__(
        self, log_b_M: Tensor, g_M: Tensor, epsilon: float, flat: bool, gradient: bool = False, values_ME: Tensor | None = None,
        average_N: Tensor | None = None, into_N: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The new potential [N] of x from that of y, and the requested derivative or mean under the plan, else an empty tensor.

        Args:
            log_b_M: logarithms of the weights of y, at least one finite.
            g_M: the potential of y.
            epsilon: the strength of the entropy.
            flat: all scores are below 1.5, as when epsilon exceeds every cost: logsumexp loses the small terms there,
                log1p(mean(expm1)) does not.
            gradient: also the derivative of the cost by x, [N, D].
            values_ME: also the mean of these values, [N, E].
            average_N: the new potential is averaged with this one; then neither a derivative nor a mean is requested.
            into_N: the memory for the new potential.
        """
        N = self.x_ND.shape[0]
        # Written in place: small results allocated between large blocks would fragment the heap.
        f_N, made_NE = self.x_ND.new_empty(N) if into_N is None else into_N, self.nothing
        if gradient or values_ME is not None:
            made_NE = self.x_ND.new_empty(N, (self.y_MD if gradient or values_ME is None else values_ME).shape[1])
        self.write(f_N, made_NE, log_b_M, g_M, epsilon, flat, gradient, values_ME, average_N)
        return f_N, made_NE

    def write(
        self, f_N: Tensor, made_NE: Tensor, log_b_M: Tensor, g_M: Tensor, epsilon: float, flat: bool,
        gradient: bool, values_ME: Tensor | None, average_N: Tensor | None,
    ) -> None:  # fmt: skip
        """Compute the results of `__call__` into f_N and made_NE."""
        raise NotImplementedError


class ReferenceUpdate(Update):
    """f_i = -epsilon log sum_j exp(log_b_j + (g_j + x_i . y_j) / epsilon) for p = 2, with -|x_i - y_j| for the product for p = 1.

    For p = 2 that is the update of f - |x|^2 / 2 from g - |y|^2 / 2 under the cost |x - y|^2 / 2. The derivative df_i is
    sum_j P_ij d|x_i - y_j|^p / p / dx_i, with the rows of P scaled to sum to 1, and the mean of values sum_j P_ij v_j. A point of
    weight 0 has a score of -inf and takes no part. For p = 1 distances come from differences: a root would lay bare the
    cancellation of |x|^2 - 2 x.y + |y|^2. Few of them are held, as they are slow to compute.
    """

    def __init__(self, x_ND: Tensor, y_MD: Tensor, p: int) -> None:
        super().__init__(x_ND, y_MD, p)
        self.rows = max(MIN_ROWS, MAX_SCORES.get(x_ND.device.type, MAX_SCORES_ELSEWHERE) // y_MD.shape[0])
        # exp is some seventy times slower for subnormal results, which are negligible beside the largest term, 1.
        self.minimum = 0.9 * math.log(torch.finfo(x_ND.dtype).tiny)
        held = p == 1 and len(x_ND) * len(y_MD) <= MAX_HELD
        self.distance_NM = self.distances(x_ND) if held else None

    def distances(self, x_nD: Tensor) -> Tensor:
        return torch.cdist(x_nD, self.y_MD, compute_mode="donot_use_mm_for_euclid_dist")

    def write(
        self, f_N: Tensor, made_NE: Tensor, log_b_M: Tensor, g_M: Tensor, epsilon: float, flat: bool,
        gradient: bool, values_ME: Tensor | None, average_N: Tensor | None,
    ) -> None:  # fmt: skip
        b_M = log_b_M.exp()
        u_M = g_M / epsilon if flat else g_M / epsilon + log_b_M
        if gradient and self.p == 2:
            values_ME = self.y_MD
        for start in range(0, len(self.x_ND), self.rows):
            block = slice(start, start + self.rows)
            x_nD = self.x_ND[block]
            if self.p == 2:
                score_nM = product(x_nD, self.y_MD.T, u_M, 1 / epsilon)
            else:
                distance_nM = self.distances(x_nD) if self.distance_NM is None else self.distance_NM[block]
                score_nM = torch.add(u_M, distance_nM, alpha=-1 / epsilon)
            if flat:
                plan_nM = score_nM.expm1_().mul_(b_M)
                f_N[block] = -epsilon * plan_nM.sum(dim=1).log1p()
                total_n = plan_nM.add_(b_M).sum(dim=1)
            else:
                top_n = score_nM.amax(dim=1)  # finite, as at least one weight is positive
                plan_nM = score_nM.sub_(top_n[:, None]).clamp_(min=self.minimum).exp_()
                total_n = plan_nM.sum(dim=1)
                f_N[block] = -epsilon * (total_n.log() + top_n)
            if values_ME is not None:
                made_NE[block] = product(plan_nM, values_ME) / total_n[:, None]
                if gradient:
                    made_NE[block] = x_nD - made_NE[block]
            elif gradient:
                # From differences, as near points have large weights. The distance of a point to itself has derivative 0.
                weight_nM = plan_nM.div_(distance_nM).masked_fill_(distance_nM == 0, 0.0)
                for d in range(x_nD.shape[1]):
                    difference_nM = x_nD[:, d, None] - self.y_MD[:, d]
                    made_NE[block, d] = difference_nM.mul_(weight_nM).sum(dim=1) / total_n
        if average_N is not None:
            f_N.add_(average_N).div_(2)

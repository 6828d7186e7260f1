"""Square root of a positive semi-definite matrix, differentiable even with equal eigenvalues."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dae_kernels.dispatch import apply, taken_whole


@taken_whole
def square_root(matrix_DD: Tensor) -> Tensor:
    return apply(SquareRoot, matrix_DD)[0]


class SquareRoot(torch.autograd.Function):
    """The positive semi-definite square root of the symmetric part of a matrix; negative eigenvalues from rounding become 0.

    torch's derivative of eigh divides by differences of eigenvalues and fails if two are equal, as in the identity. The root R
    itself is smooth: dR solves dS = dR R + R dR, in the eigenbasis a division by sums of roots. Eigenvectors and roots of the
    eigenvalues are further outputs, needed by the derivative.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix_DD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values_D, vectors_DD = torch.linalg.eigh((matrix_DD + matrix_DD.mT) / 2)
        roots_D = values_D.clamp_min(0).sqrt()
        return (vectors_DD * roots_D) @ vectors_DD.mT, roots_D, vectors_DD

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, roots_D, vectors_DD = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(roots_D, vectors_DD)

    @staticmethod
    def backward(ctx: Any, grad_DD: Tensor | None, grad_roots_D: Tensor | None, grad_vectors_DD: Tensor | None) -> Tensor | None:
        if grad_roots_D is not None or grad_vectors_DD is not None:  # reached by double backward
            raise RuntimeError("gaussian_w2 and frechet_distance have no second derivatives")
        if grad_DD is None:
            return None
        roots_D, vectors_DD = ctx.saved_tensors
        sums_DD = roots_D[:, None] + roots_D
        # Between eigenvectors with eigenvalues of about 0 there is no derivative: use 0 instead of dividing noise by 0.
        floor = (len(roots_D) * torch.finfo(roots_D.dtype).eps) ** 0.5 * roots_D.max()
        inverse_DD = torch.where(sums_DD > floor, 1 / sums_DD, 0.0)
        symmetric_DD = (grad_DD + grad_DD.mT) / 2
        return vectors_DD @ (vectors_DD.mT @ symmetric_DD @ vectors_DD * inverse_DD) @ vectors_DD.mT

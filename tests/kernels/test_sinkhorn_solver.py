"""The loop of the Sinkhorn divergence: what runs beside its updates, and averages in the kernel and in the reference."""

from __future__ import annotations

import pytest
import torch
from dae_kernels.dispatch import triton_refusal
from dae_kernels.sinkhorn_divergence.reference import ReferenceUpdate
from dae_kernels.sinkhorn_divergence.solver import Sinkhorn, TransportOptions
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(triton_refusal(DEVICE) is not None, reason="no Triton here")
def test_a_step_of_the_schedule_is_one_kernel_per_problem(monkeypatch):
    """No tensor is made and none of torch's arithmetic runs in a step that is not flat; values are read once per solve."""
    from dae_kernels.sinkhorn_divergence import fused

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            names.append(function.name())
            return function(*arguments, **(options or {}))

    class NoKernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: names.append("kernel")

    tolist, reads = Tensor.tolist, []
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: reads.append(tensor.shape) or tolist(tensor))
    monkeypatch.setattr(fused, "sinkhorn_update_kernel", NoKernel())
    x, y, counts = torch.randn(20, 2, device=DEVICE), torch.randn(30, 2, device=DEVICE), []
    weights = [torch.full((n,), 1 / n, device=DEVICE) for n in (20, 30)]
    for blur in (0.5, 0.05):
        names: list[str] = []
        options = TransportOptions(2, blur, 0.5, None, None, None, None)
        problems = Sinkhorn(fused.TritonUpdate, x, y, *weights, options, True)
        with Calls():
            problems.solve()
        counts.append((len(problems.schedule), names.count("kernel"), len(names) - names.count("kernel")))
    (steps, kernels, others), (more_steps, more_kernels, more_others) = counts
    assert more_steps > steps and more_kernels - kernels == 4 * (more_steps - steps) and more_others == others
    assert reads == [(4,)] * 2


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("flat", [False, True])
def test_averages_and_memory_of_the_reference(p, flat):
    """(new + old) / 2, to the bit, in the memory that is given."""
    torch.manual_seed(p)
    x, y, g, old = (torch.randn(shape) for shape in ((7, 2), (5, 2), (5,), (7,)))
    update, log_b, into = ReferenceUpdate(x, y, p), torch.full((5,), 0.2).log(), torch.empty(7)
    new, nothing = update(log_b, g, 50.0, flat)
    averaged, _ = update(log_b, g, 50.0, flat, average_N=old, into_N=into)
    assert averaged is into and torch.equal(averaged, (old + new) / 2) and not nothing.numel()


@pytest.mark.skipif(triton_refusal(DEVICE) is not None, reason="no Triton here")
@pytest.mark.parametrize("p, D, gradient, rows", [
    (1, 2, True, 128), (1, 64, True, 128), (1, 2, False, 64), (1, 64, False, 64),
    (2, 16, True, 128), (2, 17, True, 64), (2, 256, True, 64), (2, 16, False, 128), (2, 64, False, 128),
])  # fmt: skip
def test_rows_of_a_mean_by_what_spilled(p, D, gradient, rows):
    """The compilation itself is a test of the gate, test_aot.py, which fails with triton 3.8 where 64 are 128."""
    from dae_kernels.sinkhorn_divergence import fused

    assert fused.mean_tile(p, D, gradient) == fused.MEAN_TILE | {"BLOCK_N": rows}

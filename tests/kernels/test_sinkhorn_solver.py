"""The loop of the Sinkhorn divergence: what runs beside its updates, and averages in the kernel and in the reference."""

from __future__ import annotations

import functools

import pytest
import torch
from dae_kernels.dispatch import triton_refusal
from dae_kernels.sinkhorn_divergence.reference import ReferenceUpdate
from dae_kernels.sinkhorn_divergence.solver import Sinkhorn, TransportOptions
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(triton_refusal(DEVICE) is not None, reason="no Triton here")
@pytest.mark.parametrize("joint", [False, True])
def test_a_step_of_the_schedule_is_one_kernel(joint, monkeypatch):
    """Or one per problem, with reach. No tensor is made and none of torch's arithmetic runs in a step; values are read once."""
    from dae_kernels.sinkhorn_divergence import fused, fused_joint

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
    monkeypatch.setattr(fused_joint, "sinkhorn_step_kernel", NoKernel())
    problems_at_once, per_step = (fused_joint.TritonJoint, 1) if joint else (None, 4)
    x, y, counts = torch.randn(20, 2, device=DEVICE), torch.randn(30, 2, device=DEVICE), []
    weights = [torch.full((n,), 1 / n, device=DEVICE) for n in (20, 30)]
    for blur in (0.5, 0.05):
        names: list[str] = []
        options = TransportOptions(2, blur, 0.5, None, None, None, None)
        problems = Sinkhorn(fused.TritonUpdate, x, y, *weights, options, True, problems_at_once)
        with Calls():
            problems.solve()
        counts.append((len(problems.schedule), names.count("kernel"), len(names) - names.count("kernel")))
    (steps, kernels, others), (more_steps, more_kernels, more_others) = counts
    assert more_steps > steps and more_kernels - kernels == per_step * (more_steps - steps) and more_others == others
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


@pytest.mark.skipif(triton_refusal(DEVICE) is not None, reason="no Triton here")
@pytest.mark.parametrize(
    "p, debias, max_iter, shares", [(2, True, None, 1), (2, True, 1, 2), (2, False, None, 1), (1, True, None, 2)]
)
def test_all_problems_at_once_are_each_of_them(p, debias, max_iter, shares):
    """Clouds of unlike sizes, with a weight of 0, over several blocks and shares, the first steps flat (a diameter of 20)."""
    from dae_kernels.sinkhorn_divergence import fused, fused_joint

    torch.manual_seed(0)
    N, M, D = 10, 70, 3
    x, y = torch.randn(N, D, device=DEVICE), torch.randn(M, D, device=DEVICE) + 1
    a, b = torch.rand(N, device=DEVICE), torch.rand(M, device=DEVICE)
    b[5] = 0
    options = TransportOptions(p, 0.5, 0.1, 20.0, None, max_iter, None)
    joint = functools.partial(fused_joint.TritonJoint, shares=shares)
    made = [Sinkhorn(fused.TritonUpdate, x, y, a / a.sum(), b / b.sum(), options, debias, kind).solve() for kind in (joint, None)]
    assert made[1].joint is None and made[0].joint.shares == shares and made[0].schedule[0][1]
    for one, other in zip(made[0].potentials, made[1].potentials, strict=False):
        # of scores of up to |x| |y| / epsilon = 10^2, which err by a few roundings, times epsilon
        torch.testing.assert_close(one.vector, other.vector, rtol=1e-5, atol=1e-5)
    results = [problems.divergence(False) for problems in made]
    filled = [result for result in results[0] if result.numel()]
    assert len({result.untyped_storage().data_ptr() for result in filled}) == len(filled) == 5  # results share no memory
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_equal_weights_need_not_be_looked_at():
    """To the bit, with one box around the clouds for two."""
    torch.manual_seed(0)
    x, y = torch.randn(7, 2), torch.randn(5, 2)
    a, b = torch.full((7,), 1 / 7), torch.full((5,), 1 / 5)
    options = TransportOptions(2, 0.3, 0.5, None, None, None, None)
    known, asked = (Sinkhorn(ReferenceUpdate, x, y, a, b, options, True, None, equal) for equal in (True, False))
    assert all(map(torch.equal, known.solve().divergence(False), asked.solve().divergence(False)))

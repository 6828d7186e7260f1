"""Every operation where torch watches instead of computing: fake and meta tensors, counting, export."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.filterwarnings("ignore")  # of numpy in the interpreter, and of what torch imports
READS_COUNTS = "statistics reduced"  # on the host, as documented


def forward_and_backward(operation, operands):
    """Results, and the gradients of the leaves."""
    torch.manual_seed(0)
    leaves = [operands[i].requires_grad_() for i in operation.leaves]
    results = operation(*operands)
    differentiable = [result for result in results if result.requires_grad]
    gradients = torch.autograd.grad(differentiable, leaves, [torch.ones_like(r) for r in differentiable]) if leaves else ()
    return [*results, *gradients]


def test_modes(operation):
    expected = forward_and_backward(operation, operation.operands())
    with FlopCounterMode(display=False):
        counted = forward_and_backward(operation, operation.operands())
    torch.testing.assert_close(counted, expected)  # not the bits: the mode takes some of torch's own operations apart

    if operation.name == READS_COUNTS:
        return
    with FakeTensorMode() as mode:
        fakes = forward_and_backward(operation, [mode.from_tensor(operand) for operand in operation.operands()])
    for fake, real in zip(fakes, expected, strict=True):
        assert (fake.shape, fake.stride(), fake.dtype, fake.device) == (real.shape, real.stride(), real.dtype, real.device)

    operands = [operand.to("meta") for operand in operation.operands()]
    if "triton" in operation.name:
        with pytest.raises(ValueError, match="impl='triton' cannot run here: the tensors are on meta"):
            operation(*operands)
    elif operands:
        for meta, real in zip(forward_and_backward(operation, operands), expected, strict=True):
            # Strides are left to torch, whose kernels for meta tensors have those of a GPU.
            assert (meta.shape, meta.dtype, meta.device.type) == (real.shape, real.dtype, "meta")


class Exported(torch.nn.Module):
    def __init__(self, operation):
        super().__init__()
        self.operation = operation

    def forward(self, *operands):
        return self.operation(*operands)


def records_generators():
    """Whether a graph of torch.fx may hold a generator; that of torch 2.11 may not."""
    try:
        make_fx(lambda x: x + torch.rand(1, generator=torch.Generator()))(torch.ones(1))
    except NotImplementedError:
        return False
    return True


def test_export(operation, operations):
    """Strictly, through Dynamo as torch.compile, once for each public operation: test_transforms.py has more of that."""
    operands = tuple(operation.operands())
    if operation.name == READS_COUNTS or not operands:
        return
    first = next(other for other in operations if other.public == operation.public)
    for strict in (False, True) if operation is first else (False,):
        torch._dynamo.reset()
        if operation.name == "sliced generator" and not records_generators():
            with pytest.raises(ValueError, match=r"^sliced_wasserstein: torch .* cannot record a generator.*give projections$"):
                torch.export.export(Exported(operation), operands, strict=strict)
            continue
        exported = torch.export.export(Exported(operation), operands, strict=strict).module()
        if not operation.random:
            torch.testing.assert_close(list(exported(*operands)), list(operation(*operands)))

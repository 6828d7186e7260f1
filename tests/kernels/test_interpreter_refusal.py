"""Without the tests' mended interpreter bfloat16 is refused there: its results would be wrong without a word."""

from __future__ import annotations

import pytest
import torch
from dae_kernels import dispatch, group_norm_silu, linear_cross_entropy

pytestmark = [
    pytest.mark.skipif(not (dispatch.TRITON_INSTALLED and dispatch.interpreting()), reason="about Triton's CPU interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
REFUSAL = (
    r"^impl='triton' cannot run here: Triton's CPU interpreter computes with the bits of bfloat16[^\n]*Use impl='auto'[^\n]*$"
)


@pytest.fixture(autouse=True)
def as_it_comes(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED_BFLOAT16", False)


def test_bfloat16_is_refused_by_every_kernel(operations):
    with_kernels = [operation for operation in operations if "triton" in operation.name]
    assert len(with_kernels) > 8
    for operation in with_kernels:
        narrow = [x.bfloat16() if x.is_floating_point() else x for x in operation.operands()]
        with pytest.raises(ValueError, match=REFUSAL):
            operation.function(*narrow)


def test_autocast_to_bfloat16_is_refused():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=REFUSAL):
        linear_cross_entropy(torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3, dtype=torch.long), impl="triton")


def test_other_dtypes_and_implementations_run():
    x = torch.randn(2, 4, 3)
    expected = group_norm_silu(x.bfloat16(), 2)
    assert torch.equal(torch.compile(lambda x: group_norm_silu(x, 2), backend="eager", fullgraph=True)(x.bfloat16()), expected)
    assert group_norm_silu(x.half(), 2, impl="triton").isfinite().all()

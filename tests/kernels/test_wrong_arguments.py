"""Whatever is passed, every operation takes it or refuses it itself, in one line: no error comes out of torch's depths."""

from __future__ import annotations

import inspect
import traceback
import warnings

import dae_kernels as ops
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
NEVER_TAKEN = {"list", "tuple", "array", "text", "number", "object", "complex", "quantized", "float8", "sparse", "rows", "nested"}
VALUES = {"NaN", "infinity", "huge", "tiny", "narrow", "negative"}


def wrong_operands(x):
    """What may stand in the place of a tensor by mistake."""
    floating = x.is_floating_point()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from {"list": x.tolist(), "tuple": tuple(x), "array": x.cpu().numpy(), "text": "x", "number": 3.0}.items()
        yield from {"none": None, "object": object(), "complex": x.to(torch.complex64), "bool": x > 0}.items()
        yield "quantized", torch.quantize_per_tensor(x.cpu().float(), 0.1, 0, torch.quint8)
        yield "float8", x.to(torch.float8_e4m3fn)
        yield "sparse", x.to_sparse()
        yield "rows", x.reshape(1, -1).to_sparse_csr()
        yield "nested", torch.nested.nested_tensor([x, x])
    yield from {"kind": x.long() if floating else x.float(), "uint8": x.abs().to(torch.uint8), "meta": x.to("meta")}.items()
    yield from {"wide": x.double() if floating else x.int(), "narrow": x.half() if floating else x.short()}.items()
    yield from {"scalar": x.flatten()[0], "row": x[0], "batch": x[None], "batches": x[None, None, None]}.items()
    yield from {"none of it": x[:0], "no columns": x[..., :0], "empty": torch.empty(0, device=x.device)}.items()
    yield from {"rows twice": torch.cat([x, x]), "columns twice": torch.cat([x, x], dim=-1)}.items()
    if floating:
        yield from {"NaN": x * float("nan"), "infinity": x * float("inf"), "huge": x * 1e30, "tiny": x * 1e-30}.items()
    else:
        yield from {"negative": -x - 1, "huge": x + 10**6}.items()


def refused_in_one_line(call):
    """The message that refuses the call; None if it is taken, or fails before it comes to us."""
    try:
        call()
    except Exception as error:
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if not any("dae_kernels" in file for file in frames):  # the list of operations slices some
            return None
        assert isinstance(error, ValueError | TypeError) and "dae_kernels" in frames[-1], repr(error)
        assert "\n" not in str(error) and " got " in str(error), str(error)
        return str(error)
    return None


def test_operands(operation):
    operands = operation.operands()
    for position, operand in enumerate(operands):
        for kind, wrong in wrong_operands(operand):
            if "triton" in operation.name and kind in VALUES:  # taken, and the interpreter is slow
                continue
            given = [*operands[:position], wrong, *operands[position + 1 :]]
            before_us = operation.public == "GaussianStatistics" and position == 0
            message = refused_in_one_line(lambda given=given: operation.function(*given))
            assert message or kind not in NEVER_TAKEN or before_us, (position, kind)


X, Y, Q, IMAGE = torch.randn(9, 4), torch.randn(8, 4), torch.randn(1, 2, 5, 4), torch.randn(2, 4, 3)
BORDERS, TARGETS, SQUARE = torch.tensor([0, 2]), torch.arange(9) % 8, torch.eye(4)
OPERANDS = {
    "attention": (Q, Q, Q),
    "attention_varlen": (Q[0], Q[0], Q[0], BORDERS, BORDERS),
    "barycentric_map": (X, Y),
    "codebook_statistics": (X, TARGETS, 8),
    "energy_distance": (X, Y),
    "frechet_distance": (X, Y),
    "gated_residual": (X, X, X),
    "gaussian_w2": (X[0], SQUARE, X[1], SQUARE),
    "group_norm_silu": (IMAGE, 2),
    "k_nearest_distances": (X, Y, 2),
    "layer_norm_modulate": (X, X, X),
    "linear_cross_entropy": (X, Y, TARGETS),
    "max_sliced_wasserstein": (X, Y),
    "mmd": (X, Y),
    "nearest_code": (X, Y),
    "lpips": (IMAGE, IMAGE + 1),
    "precision_recall_density_coverage": (X, Y),
    "qk_norm": (X, Y, X[0], X[0]),
    "rms_norm": (X,),
    "rotary_table": (5, 4),
    "rotary_table_2d": (2, 3, 4),
    "rotate": (X, torch.randn(2, 9, 2)),
    "sinkhorn_divergence": (X, Y),
    "sinkhorn_transport": (X, Y, Y),
    "sliced_wasserstein": (X, Y),
    "swiglu": (X,),
    "vector_quantize": (X, Y),
}
FIXED = {
    "mmd": {"bandwidths": (1.0,)},
    "barycentric_map": {"blur": 1.0},
    "sinkhorn_transport": {"blur": 1.0},
    "sinkhorn_divergence": {"max_iter": 2},
}
WRONG = {
    "text": "nonsense",
    "empty text": "",
    "object": object(),
    "list": [1.0, "a"],
    "dictionary": {"a": 1},
    "array": np.ones((2, 2)),
    "tensor": torch.ones(2, 2),
    "meta": torch.ones((), device="meta"),
    "complex": 1j,
    "bytes": b"1",
    "type": float,
}
NUMBERS = [True, False, 0, -1, -3, 2, 0.0, -0.5, 1e-320, 1e-40, 1e40, 1e308, float("nan"), float("inf"), -float("inf"), 10**400]
PLAIN = (*NUMBERS, np.float64("nan"), np.int64(-1), np.bool_(True), torch.tensor(-1.0), torch.tensor(float("nan")))


def test_every_operation_has_operands():
    assert set(OPERANDS) == set(ops.__all__) - {"Convention", "GaussianStatistics"}


@pytest.mark.parametrize("name", OPERANDS)
def test_options(name):
    function, options = getattr(ops, name), FIXED.get(name, {})
    parameters = list(inspect.signature(function).parameters)
    for position, parameter in enumerate(parameters):
        if position < len(OPERANDS[name]) and isinstance(OPERANDS[name][position], torch.Tensor):
            continue
        for kind, wrong in [*WRONG.items(), *((repr(number), number) for number in PLAIN)]:
            if position < len(OPERANDS[name]):
                operands = [*OPERANDS[name][:position], wrong, *OPERANDS[name][position + 1 :]]
                message = refused_in_one_line(lambda operands=operands: function(*operands, **options))
            else:
                given = options | {parameter: wrong}
                message = refused_in_one_line(lambda given=given: function(*OPERANDS[name], **given))
            assert message or kind not in WRONG, (parameter, kind)
            named = parameter if parameter != "K" else "indices"  # that are not below K
            assert message is None or parameter in message or named in message, (parameter, kind, message)

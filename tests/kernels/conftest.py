"""bfloat16 in Triton's CPU interpreter, which stores it as uint16 and then computes with those integers.

Found in 3.6.0 and 3.7.1: sums and products of the raw bits, casts from float32 that truncate, comparisons of integers. The patch
decodes to float32, computes there and rounds to nearest even on the way back, as the hardware does; test_interpreter_bf16.py
holds it against torch bit by bit. Loads, stores and moves copy bits and were right. A reduction of bfloat16 is rounded once, at
its end. Atomics on bfloat16 still raise. `tl.minimum` and `tl.maximum` return NaN of a number and NaN; patched, the number, as a
GPU does.
"""

import functools
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from dae_kernels import dispatch
from dae_kernels.dispatch import TRITON_INSTALLED, interpreting


def decode(bits):
    """float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode(values):
    """bfloat16 bits of float32 values, rounded to nearest even; a NaN becomes the quiet NaN 0x7FC0, as in torch."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(values.shape)


def patch_interpreter():
    from triton import language as tl
    from triton.runtime import interpreter

    Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    originals = {name: getattr(Builder, name) for name in ("binary_op", "unary_op", "create_fma", "create_dot", "create_rsqrt")}
    cast_impl, fp_to_fp = Builder.cast_impl, Builder.create_fp_to_fp

    def is_bf16(handle):
        return getattr(handle.dtype, "scalar", handle.dtype) == tl.bfloat16 and handle.data.dtype == np.uint16

    def decoded(handle):
        return Handle(decode(handle.data), tl.float32) if is_bf16(handle) else handle

    def in_float32(original):
        """`original` on decoded operands; a result that stands for bfloat16 is encoded, a truth value is left alone."""

        def operation(self, *arguments):
            handles = [a for a in arguments if isinstance(a, Handle)]
            if not any(is_bf16(h) for h in handles):
                return original(self, *arguments)
            result = original(self, *(decoded(a) if isinstance(a, Handle) else a for a in arguments))
            accumulates_wider = original is originals["create_dot"] and not is_bf16(handles[2])
            if accumulates_wider or result.data.dtype == np.bool_:
                return result
            return Handle(encode(result.data), tl.bfloat16)

        return operation

    for name, original in originals.items():
        setattr(Builder, name, in_float32(original))

    def cast(original):
        def operation(self, source, target, *rounding):
            if target.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
                return Handle(encode(source.data.astype(np.float32)), tl.bfloat16)
            if source.dtype.scalar == tl.bfloat16 and target.scalar != tl.bfloat16:
                return Handle(decode(source.data).astype(interpreter._get_np_dtype(target)), target.scalar)
            return original(self, source, target, *rounding)

        return operation

    def narrowed(x):
        if x.dtype.scalar != tl.float32:  # an index
            return x
        kind = tl.block_type(tl.bfloat16, list(x.shape)) if x.type.is_block() else tl.bfloat16
        return tl.core.tensor(Handle(encode(x.handle.data), tl.bfloat16), kind)

    def reduced(original):
        """Reductions and scans: of float32 values, and the results encoded where the operands were."""

        def apply(self, operands):
            flags = [is_bf16(x.handle) for x in operands]
            operands = tuple(
                self.to_tensor(decode(x.handle.data), tl.float32) if f else x for x, f in zip(operands, flags, strict=True)
            )
            results = original(self, operands)
            if not any(flags):
                return results
            many = isinstance(results, (list, tuple))
            back = [narrowed(r) for r in (results if many else [results])]
            return back if many else back[0]

        return apply

    def sort(x, dim=None, descending=False):
        """`tl.sort` by numpy: the interpreter takes its steps number by number, for a second a call."""
        ordered = np.sort(x.handle.data, axis=-1)
        return tl.core.tensor(Handle(ordered[..., ::-1].copy() if descending else ordered, x.dtype.scalar), x.type)

    tl.sort = sort
    Builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    Builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    for Operation in (interpreter.ReduceOps, interpreter.ScanOps):
        Operation.apply_impl = reduced(Operation.apply_impl)
    Builder.cast_impl, Builder.create_fp_to_fp = cast(cast_impl), cast(fp_to_fp)


if TRITON_INSTALLED and interpreting():
    patch_interpreter()
    dispatch.INTERPRETED_BFLOAT16 = True


@functools.cache
def operations():
    """The list in operations.py, loaded by its path: tests import no tests."""
    spec = importlib.util.spec_from_file_location("kernel_operations", Path(__file__).with_name("operations.py"))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.OPERATIONS.values())


def pytest_generate_tests(metafunc):
    """A test that asks for an `operation` runs with each in the list, one that asks for a `differentiable` with each of those."""
    for name in {"operation", "differentiable"} & set(metafunc.fixturenames):
        chosen = [operation for operation in operations() if name == "operation" or operation.leaves]
        metafunc.parametrize(name, chosen, ids=[operation.name for operation in chosen])


@pytest.fixture(scope="session", name="operations")
def all_operations():
    return operations()

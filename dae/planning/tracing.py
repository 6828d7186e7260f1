"""Trace training steps on tensors without values: memory by part, arithmetic and traffic of the very step that a recipe runs."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from dae_kernels.dispatch import standing_for_cuda
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from dae.models.pretrained import without_weights
from dae.training.engine import LocalEngine
from dae.training.loop import Training

At = tuple[int, Callable[[int], None]]
PARTS = ("weights", "gradients", "optimiser", "average", "batch", "activations")


class Call(NamedTuple):
    """An operator of a step that is no view."""

    times: float  # in a step
    flops: int  # multiplications and additions of matrix products, convolutions and attention
    dtype: torch.dtype  # the narrowest of its operands
    moved: int  # bytes read and written


@dataclass
class Trace:
    """What a step takes.

    Attributes:
        memory: bytes of each of `PARTS` when most memory is allocated; `activations` are all tensors that are none of the others.
        calls: of all micro-steps of a step and of its updates.
        parameters: number of parameters by module, see `parameters_of`.
        trained: how many of them an optimiser changes.
    """

    memory: dict[str, int]
    calls: list[Call]
    parameters: dict[str, int]
    trained: int

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def flops(self) -> float:
        return sum(call.times * call.flops for call in self.calls)


class PlanningEngine(LocalEngine):
    """A `LocalEngine` in any mixed precision, on tensors without values; no loss is scaled."""

    def __init__(self, mixed_precision: str | None):
        super().__init__("cpu", "bf16" if mixed_precision == "fp16" else mixed_precision)
        if mixed_precision == "fp16":
            self.dtype = torch.float16


class _FakeTensors(FakeTensorMode):
    """torch's fake tensors, in modules that can be moved and copied.

    `Module.to` swaps fake parameters, which no weak reference may refer to, so nothing that an operator returns is memorised;
    and a copy of a module has tensors of this mode, not of a copy of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake_tensor_converter.set_tensor_memo = lambda *_: None  # type: ignore[method-assign]

    def __deepcopy__(self, _: dict) -> _FakeTensors:
        return self


@contextlib.contextmanager
def without_values(on_gpu: bool) -> Iterator[None]:
    """Context in which new tensors have shapes and dtypes alone; the random state is afterwards as before.

    With `on_gpu` the operations of dae_kernels run as on a GPU.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), contextlib.ExitStack() as stack:
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # by copies of modules
        if on_gpu:
            stack.enter_context(standing_for_cuda())
        stack.enter_context(_FakeTensors())
        stack.enter_context(without_weights())
        yield


class Ledger(TorchDispatchMode):
    """Watches the operators inside the block: bytes of all tensors alive, each storage once, and the work.

    Args:
        at: number of an operator, and what is called with the bytes alive after it.
    """

    def __init__(self, at: At | None = None):
        super().__init__()
        self.alive, self.peak, self.peak_at, self.count, self.at = 0, 0, 0, 0, at
        self.storages: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.see(made)
        self.count += 1
        if self.alive > self.peak:
            self.peak, self.peak_at = self.alive, self.count
        if self.at is not None and self.count == self.at[0]:
            self.at[1](self.alive)
        self.note(function, args, kwargs or {}, given, made, result)
        return result

    def see(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that are alive."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage not in self.storages:
                size = storage.nbytes()
                self.storages[storage] = size
                self.alive += size
                weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.alive -= size

    def note(self, function: Any, args: tuple, kwargs: dict, given: list[Tensor], made: list[Tensor], result: Any) -> None:
        before = {tensor.untyped_storage()._cdata for tensor in given}
        new = [tensor for tensor in made if tensor.untyped_storage()._cdata not in before]
        written = function._schema.is_mutable
        if not new and not written:
            return  # a view
        formula = flop_registry.get(function._overloadpacket) or _FLOPS.get(function._overloadpacket.__name__)
        flops = formula(*args, **kwargs, out_val=result) if formula else 0
        moved = sum(tensor.numel() * tensor.element_size() for tensor in [*given, *new])
        dtypes = [tensor.dtype for tensor in given if tensor.is_floating_point()]
        dtype = min(dtypes, key=lambda each: each.itemsize) if dtypes else torch.float32
        self.calls.append(Call(1, int(flops), dtype, moved))


def _attention_flops(query_shape: tuple[int, ...], key_shape: tuple[int, ...], *_: Any, products: int, **__: Any) -> int:
    """Of `products` matrix products of [.., Lq, D] and [.., Lk, D]."""
    return products * 2 * math.prod(query_shape) * key_shape[-2]


def _shapes(formula: Callable[..., int]) -> Callable[..., int]:
    def call(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return formula(*(arg.shape if isinstance(arg, Tensor) else arg for arg in args))

    return call


# Operators without a formula in torch.
_FLOPS: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _shapes(lambda q, k, *_: _attention_flops(q, k, products=2)),
    "_scaled_dot_product_flash_attention_for_cpu_backward": _shapes(lambda g, q, k, *_: _attention_flops(q, k, products=5)),
    "nearest_code": _shapes(lambda x, codes, *_: 2 * math.prod(x) * codes[0]),
    # hidden [N, D] and weight [V, D]; at 10 and 11 whether their gradients are computed
    "linear_cross_entropy": _shapes(lambda x, w, *rest: 2 * math.prod(x) * w[0] * (1 + rest[8] + rest[9])),
    "nearest_code_reference": _shapes(lambda x, codes, *_: 2 * math.prod(x) * codes[0]),
}


def trace(
    build: Callable[[LocalEngine], Training], mixed_precision: str | None, *, number: int = 0, on_gpu: bool = False
) -> Trace:
    """Build a training and trace one step of it, without a computation.

    Args:
        build: the training on an engine; called where tensors have no values.
        mixed_precision: as the knob.
        number: of the step, which decides whether its discriminator is on.
        on_gpu: with the kernels and the optimiser's form of a GPU; else of a CPU.
    """
    with without_values(on_gpu):
        training = build(PlanningEngine(mixed_precision))
        accumulated = training.settings.gradient_accumulation_steps
        # Two micro-steps show what gradients from before add to the peak.
        training.settings = dataclasses.replace(training.settings, gradient_accumulation_steps=min(2, accumulated))
        if on_gpu:
            for optimizer in training.state.optimizers.values():
                for group in optimizer.param_groups:
                    group |= {"foreach": False, "fused": True}
        batch = next(training.batches)
        training.batches = itertools.repeat(batch)
        training.step(number)  # makes the optimiser's state
        with _ledger(training, batch) as ledger:
            training.step(number)
        memory: dict[str, int] = {}
        with _ledger(training, batch, (ledger.peak_at, lambda alive: memory.update(_parts(training, batch, alive)))):
            training.step(number)
        times = accumulated / training.settings.gradient_accumulation_steps
        groups = [group for optimizer in training.state.optimizers.values() for group in optimizer.param_groups]
        trained = sum(p.numel() for group in groups for p in group["params"])
        return Trace(memory, [call._replace(times=times) for call in ledger.calls], parameters_of(training), trained)


@contextlib.contextmanager
def _ledger(training: Training, batch: dict[str, Tensor], at: At | None = None) -> Iterator[Ledger]:
    training.state.losses.clear()
    with Ledger(at) as ledger:
        ledger.see(tensor for kept in _kept(training, batch).values() for tensor in kept)
        yield ledger


def _kept(training: Training, batch: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Tensors that are there between steps."""
    state = training.state
    modules = [*state.modules.values(), *_frozen_networks(training).values()]
    moments = [entry for optimizer in state.optimizers.values() for entry in optimizer.state.values()]
    return {
        "weights": [t for m in modules for t in itertools.chain(m.parameters(), m.buffers())],
        "optimiser": [t for entry in moments for t in entry.values() if isinstance(t, Tensor)],
        "average": list(state.ema.state_dict().values()) if state.ema else [],
        "batch": list(batch.values()),
    }


def _parts(training: Training, batch: dict[str, Tensor], alive: int) -> dict[str, int]:
    kept = _kept(training, batch)
    kept["gradients"] = [p.grad for m in training.state.modules.values() for p in m.parameters() if p.grad is not None]
    sizes = {name: sum({id(s): s.nbytes() for s in (t.untyped_storage() for t in ts)}.values()) for name, ts in kept.items()}
    return {part: sizes.get(part, alive - sum(sizes.values())) for part in PARTS}


def _frozen_networks(training: Training) -> dict[str, nn.Module]:
    """What a training reads and no checkpoint holds: of the perceptual loss, and under the heads of a discriminator."""
    discriminator = getattr(getattr(training, "adversary", None), "discriminator", None)
    found = {"loss network": getattr(training, "perceptual", None), "its network": getattr(discriminator, "backbone", None)}
    return {name: module for name, module in found.items() if module is not None}


def parameters_of(training: Training) -> dict[str, int]:
    """Number of parameters of each part: encoder, bottleneck, decoder, or prior; discriminator, loss network."""
    model = training.state.modules["model"]
    parts: dict[str, nn.Module] = {"prior": model}
    if hasattr(model, "encoder"):
        parts = {name: getattr(model, name) for name in ("encoder", "bottleneck", "decoder")}
    parts |= {name: module for name, module in training.state.modules.items() if name not in ("model", "lecam")}
    parts |= _frozen_networks(training)
    return {name: sum(p.numel() for p in module.parameters()) for name, module in parts.items()}

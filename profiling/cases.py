"""`Case`, one implementation of an operation for bench_kernels.py, and helpers for the tables in profiling/bench/."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from dae_kernels.dispatch import triton_refusal
from torch import Tensor

COMPILING = {"flash_kmeans", "flash_sinkhorn", "liger_kernel", "cut_cross_entropy", "quack", "pykeops"}


@dataclass
class Case:
    """One way to compute an operation at one shape.

    Args:
        op: the operation.
        impl: "reference", "compile", "triton", or the peer's name.
        run: computes and returns the result; the first of a tuple is compared and differentiated.
        leaves: tensors that need gradients (none: forward only).
        flops, bytes: minimum for the forward.
        backward_flops, backward_bytes: the same for the backward.
        product: dtype of the product whose rate bounds the flops, or "tf32".
        needs: module to import, "" for none.
        refusal: why it cannot run here, or None.
        note: difference from the operation (half the value, random directions), if any.
    """

    op: str
    impl: str
    run: Callable[[], Any]
    leaves: list[Tensor] = field(default_factory=list)
    flops: float = 0.0
    bytes: float = 0.0
    backward_flops: float = 0.0
    backward_bytes: float = 0.0
    product: torch.dtype | str = torch.float32
    needs: str = ""
    refusal: str | None = None
    note: str = ""

    def __post_init__(self):
        self.product = str(self.product).removeprefix("torch.")

    def minimum(self, phase: str) -> tuple[float, float]:
        """Flops and bytes of "forward", "backward" or "both"."""
        forward, backward = (self.flops, self.bytes), (self.backward_flops, self.backward_bytes)
        both = forward[0] + backward[0], forward[1] + backward[1]
        return {"forward": forward, "backward": backward, "both": both}[phase]

    @property
    def compiled(self) -> bool:
        """Whether torch.compile makes it."""
        return self.impl == "flex" or self.impl.split(",")[0] == "compile"

    @property
    def compiles(self) -> bool:
        """Whether it compiles when it first runs: torch.compile, a kernel of ours, or a peer made of such."""
        return self.compiled or self.impl.startswith("triton") or self.needs in COMPILING

    def obstacle(self) -> str | None:
        """Why it cannot be measured here, known without running it; None if it may be tried."""
        if self.needs and find_spec(self.needs) is None:
            return f"not installed: {self.needs}"
        return self.refusal and f"cannot run: {self.refusal}"


def implementations(
    case: Callable[..., Case], run: Callable[..., Any], device: torch.device, note: str = "of the reference"
) -> Iterator[Case]:
    """Cases of the reference, the compiled reference and the kernel; `note` is for the compiled one."""

    def reference() -> Any:
        return run(impl="reference")

    yield case("reference", reference)
    yield case("compile", torch.compile(reference), note=note)
    yield case("triton", partial(run, impl="triton"), refusal=triton_refusal(device))


def with_compiled(case: Callable[..., Case], run: Callable[[], Any], note: str = "") -> Iterator[Case]:
    """Cases of the reference, with `note`, and the compiled reference of an operation without a kernel."""
    yield case("reference", run, note=note)
    yield case("compile", torch.compile(run), note="of the reference")


def geomloss(case: Callable[..., Case], run: Callable[[Callable], Tensor], note: str = "") -> Iterator[Case]:
    """Cases of geomloss with either backend: `run` takes its class SamplesLoss and returns the value."""

    def value(backend: str) -> Tensor:
        return run(partial(import_module("geomloss").SamplesLoss, backend=backend))

    yield case("geomloss, tensorized", partial(value, "tensorized"), needs="geomloss", note=note)
    yield case("geomloss, keops", partial(value, "online"), needs="pykeops", note=note)


def normal_clouds(
    N: int, M: int, D: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0, shift: float = 0.5
) -> list[Tensor]:
    """x [N, D] from a standard normal, y [M, D] from a scaled and shifted one; both require gradients."""
    x_ND, y_MD = torch.randn(N, D, device=device), scale * torch.randn(M, D, device=device) + shift
    return [cloud.to(dtype).requires_grad_() for cloud in (x_ND, y_MD)]

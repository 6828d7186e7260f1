"""Peak rates of GPUs by their makers' data sheets, for estimates of trainings that run elsewhere."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

import torch

from dae.planning.tracing import Call


@dataclass(frozen=True)
class Gpu:
    """Of one GPU, without sparsity; products accumulate in float32.

    Attributes:
        memory: bytes.
        bandwidth: of its memory, bytes per second.
        half, tf32, single: floating-point operations per second of products in bf16 or fp16, in TF32, and of float32.
    """

    name: str
    memory: int
    bandwidth: float
    half: float
    tf32: float
    single: float

    def rate(self, dtype: torch.dtype, allow_tf32: bool) -> float:
        """Of products whose narrowest operand has this dtype."""
        if dtype.itemsize < 4:
            return self.half
        return self.tf32 if allow_tf32 else self.single


def _gpu(name: str, gigabytes: int, gigabytes_per_second: int, half: float, tf32: float, single: float) -> Gpu:
    return Gpu(name, gigabytes * 2**30, gigabytes_per_second * 1e9, half * 1e12, tf32 * 1e12, single * 1e12)


# GB, GB/s, then teraflop/s of bf16, TF32, float32: NVIDIA's data sheets of each product, and for GeForce the appendix of the
# architecture's white paper. All are dense rates; sheets that print rates "with sparsity" say twice as much.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("A10", 24, 600, 125, 62.5, 31.2),
        _gpu("A100-40GB", 40, 1555, 312, 156, 19.5),
        _gpu("A100-80GB", 80, 2039, 312, 156, 19.5),
        _gpu("A6000", 48, 768, 154.8, 77.4, 38.7),
        _gpu("H100", 80, 3350, 989, 494.5, 67),  # SXM
        _gpu("H100-PCIe", 80, 2000, 756, 378, 51),
        _gpu("H200", 141, 4800, 989, 494.5, 67),
        _gpu("L4", 24, 300, 121, 60, 30.3),
        _gpu("L40S", 48, 864, 362, 183, 91.6),
        _gpu("RTX-3090", 24, 936, 71, 35.6, 35.6),
        _gpu("RTX-4090", 24, 1008, 165.2, 82.6, 82.6),
    )
}
ALIASES = {"A100": "A100-80GB", "3090": "RTX-3090", "4090": "RTX-4090", "RTXA6000": "A6000", "H100SXM": "H100"}

# A step never reaches the sheet's rates. The one that was measured: VQGAN 256x256, batch 16, bf16, 114 ms on an H100
# (profiling/results/h100/README.md), whose operators' roofline is 30.0 ms (tests/planning/test_gpus.py traces it again).
EFFICIENCY = 0.26
MEASURED = "VQGAN 256x256 on an H100, profiling/results/h100"
SECONDS_PER_CALL = 10e-6  # assumed, of the host for an operator: small models wait for it
USABLE = 0.92  # share of a GPU's memory, beside CUDA's own and what fragments: assumed


def find_gpu(name: str) -> Gpu:
    """The GPU of a name, whatever its case, spaces and dashes. ValueError: unknown."""
    known = {_plain(each): each for each in GPUS} | ALIASES
    wanted = _plain(name)
    if wanted in known:
        return GPUS[known[wanted]]
    near = difflib.get_close_matches(wanted, list(known), n=1)
    hint = f"; did you mean {known[near[0]]}?" if near else ""
    raise ValueError(f"--plan: unknown GPU {name!r}, expected one of {', '.join(GPUS)}, or no name for this machine{hint}")


def _plain(name: str) -> str:
    return re.sub(r"[^A-Z0-9]", "", name.upper()).removeprefix("NVIDIA")


def estimated_seconds(calls: list[Call], gpu: Gpu, allow_tf32: bool) -> float:
    """Of the operators of a step on a GPU: a roofline divided by a measured efficiency.

        seconds = max(sum over calls of max(flops / rate, bytes / bandwidth) / EFFICIENCY, number of calls x SECONDS_PER_CALL)

    Source of the roofline: Williams, Waterman & Patterson 2009, "Roofline: an insightful visual performance model".
    """
    return max(roofline(calls, gpu, allow_tf32) / EFFICIENCY, sum(call.times for call in calls) * SECONDS_PER_CALL)


def roofline(calls: list[Call], gpu: Gpu, allow_tf32: bool) -> float:
    """Seconds in which a GPU at its sheet's rates would run the operators, one after the other."""
    return sum(c.times * max(c.flops / gpu.rate(c.dtype, allow_tf32), c.moved / gpu.bandwidth) for c in calls)

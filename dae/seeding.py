"""Seeds by name: each random draw of a run has a seed derived from its purpose."""

from __future__ import annotations

import hashlib

import torch


def seed_for(*names: object) -> int:
    """A 63-bit seed derived from `names`, such as (seed, stage, step); unlike Python's `hash`, the same in every run."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, names)).encode()).digest()[:8], "little") >> 1


def set_seed(*names: object) -> None:
    """torch.manual_seed(seed_for(*names)), without recording stack traces for GPUs not yet in use: saves 0.2 ms per call."""
    seed = seed_for(*names)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)

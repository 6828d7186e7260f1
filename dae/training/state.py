"""The state of a training run, packed into named tensors and JSON for checkpoints, and restored from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dae.distributed import failing_together, gather_objects, rank, world_size
from dae.hub import load_weights
from dae.training.checkpoint import Checkpoint
from dae.training.ema import EMA
from dae.training.optimization import Schedule

if TYPE_CHECKING:
    from dae.data import TrainLoader
    from dae.training.prefetch import Prefetcher


@dataclass
class TrainingState:
    modules: dict[str, nn.Module]  # unwrapped, by the name of their file in a checkpoint
    optimizers: dict[str, torch.optim.Optimizer]
    scheduler: Schedule
    loader: TrainLoader | Prefetcher  # or, where nothing is saved, a TensorLoader
    ema: EMA | None = None
    scalers: dict[torch.optim.Optimizer, Any] = field(default_factory=dict)  # of fp16 training, one for each optimiser
    losses: list[Tensor] = field(default_factory=list)  # of the micro-steps since the last entry of the log

    def pack(self) -> tuple[dict[str, dict[str, Tensor]], dict]:
        """Tensors by file, and the rest as JSON-able values; all processes must call it.

        Raises:
            FloatingPointError: weights are NaN or infinite: no checkpoint must hold them.
        """
        tensors = {name: module.state_dict() for name, module in self.modules.items()}
        weights = [(f"{file}: {name}", w) for file, part in tensors.items() for name, w in part.items() if w.is_floating_point()]
        with failing_together():
            if broken := [name for name, w in weights if not w.isfinite().all()]:
                raise FloatingPointError(
                    f"{len(broken)} of {len(weights)} tensors hold NaN or infinity, such as {broken[0]}. The last checkpoint is "
                    "from before; lower the learning rate, lengthen the warm-up, or use mixed_precision=bf16 or no"
                )
        state: dict[str, Any] = {"scheduler": self.scheduler.state_dict(), "loaders": gather_objects(self.loader.state_dict())}
        for name, optimizer in self.optimizers.items():
            whole = optimizer.state_dict()
            tensors[name] = {f"{i}.{entry}": v for i, entries in whole["state"].items() for entry, v in entries.items()}
            state[name] = whole["param_groups"]
        if self.ema:
            tensors["ema"], state["ema_updates"] = self.ema.state_dict(), self.ema.updates
        if self.scalers:
            state["scalers"] = {name: self.scalers[optimizer].state_dict() for name, optimizer in self.optimizers.items()}
        state["losses"] = gather_objects([loss.item() for loss in self.losses])
        return tensors, state

    def restore(self, checkpoint: Checkpoint | None) -> int:
        """Restore everything; returns the step of the stage at which to continue, 0 without checkpoint.

        Raises:
            ValueError: weights of another architecture, or a stream's position saved by another number of processes.
        """
        if checkpoint is None:
            return 0
        tensors, state = checkpoint.tensors, checkpoint.state
        for name, module in self.modules.items():
            load_weights(module, tensors[name], f"{checkpoint.path}/{name}")
        for name, optimizer in self.optimizers.items():
            entries: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors[name].items():
                index, entry = key.split(".", 1)
                entries.setdefault(int(index), {})[entry] = value
            groups = [saved | _of_this_machine(own) for saved, own in zip(state[name], optimizer.param_groups, strict=True)]
            optimizer.load_state_dict({"state": entries, "param_groups": groups})
        if self.ema:
            self.ema.load_state_dict(tensors["ema"], state["ema_updates"])
        if self.scalers:
            saved = state["scalers"] if "scalers" in state else {"optimizer": state["scaler"]}  # of earlier versions
            for name, optimizer in self.optimizers.items():
                self.scalers[optimizer].load_state_dict(saved[name])
        self.scheduler.load_state_dict(state["scheduler"])
        # The learning rates of this configuration's schedule: they differ from the saved ones if its length changed.
        self.scheduler._last_lr = list(self.scheduler.get_lr())
        for group, rate in zip(self.scheduler.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        positions = state["loaders"]
        if len(positions) != world_size() and "micro_step" not in positions[0]:
            raise ValueError(
                f"{checkpoint.path} holds the stream positions of {len(positions)} processes, this run has {world_size()}; "
                "resume a streaming run with as many processes, or use a map-style data set"
            )
        self.loader.load_state_dict(positions[rank() % len(positions)])
        losses = torch.tensor(state["losses"], dtype=torch.float64)  # [processes then, micro-steps]
        own = losses[rank()] if len(losses) == world_size() else losses.mean(0)
        device = next(next(iter(self.modules.values())).parameters()).device
        self.losses = list(own.float().to(device))
        return state["stage_step"]


def _of_this_machine(group: dict[str, Any]) -> dict[str, Any]:
    """How an optimiser computes; torch would take it from the checkpoint, which may have been written on another device."""
    return {name: group[name] for name in ("foreach", "fused", "capturable") if name in group}

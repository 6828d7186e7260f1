"""Which tensors of a training moved in some steps, and which should have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from dae.training.probe import ProbeEngine, gradients, tensors_in

if TYPE_CHECKING:
    from dae.training.loop import Training

OFF = "; to train nevertheless set preflight=false"  # the end of each message of a preflight
EPSILON = 1e-8  # of AdamW: smaller gradients take smaller steps
RESOLUTION = 2.0**-22  # of float32: a rate below this share of a weight may leave it as it is


@dataclass(eq=False)
class _Watched:
    name: str
    owner: nn.Module
    tensor: Tensor
    before: Tensor

    @property
    def moved(self) -> bool:
        return not torch.equal(self.tensor.detach(), self.before)


class Movement:
    """The tensors of a training before some steps, on a `ProbeEngine`; `check` compares them with what they are then.

    Frozen are the modules of `Training.frozen`, and parameters without gradient in a module that is in evaluation mode, as
    pretrained parts are. All other parameters of the modules that a checkpoint holds should train. Where a codebook is learned
    without gradients, one of the bottleneck's buffers should move.
    """

    def __init__(self, training: Training):
        self.training, self.frozen, self.trained, self.codebook = training, [], [], []
        frozen = {module for each in training.frozen() for module in each.modules()}
        bottleneck = training.learned_codebook()
        codebooks = set() if bottleneck is None else set(bottleneck.modules())
        modules = training.state.modules | {type(each).__name__: each for each in training.frozen()}
        seen: set[int] = set()
        for file, whole in modules.items():
            for prefix, owner in whole.named_modules():
                for key, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
                    if id(tensor) in seen:
                        continue
                    seen.add(id(tensor))
                    entry = _Watched(".".join(filter(None, (file, prefix, key))), owner, tensor, tensor.detach().clone())
                    parameter = isinstance(tensor, nn.Parameter)
                    if owner in frozen or (parameter and not tensor.requires_grad and not owner.training):
                        self.frozen.append(entry)
                    elif parameter:
                        self.trained.append(entry)
                    elif owner in codebooks:
                        self.codebook.append(entry)

    def __len__(self) -> int:
        return len(self.frozen) + len(self.trained) + bool(self.codebook)

    @property
    def engine(self) -> ProbeEngine:
        return cast(ProbeEngine, self.training.engine)

    def waiting(self) -> bool:
        """Whether a tensor that should train has not moved, because its gradients were zeros."""
        rates = self._rates()
        return any(rates.get(id(e.tensor)) and not self.engine.reached.get(e.tensor) and not e.moved for e in self.trained)  # type: ignore[call-overload]

    def check(self, batch: dict[str, Tensor], number: int) -> None:
        """ValueError if a tensor that should train did not move, or one that is frozen did.

        Excused is what cannot move: a rate of 0, or a step of AdamW below the resolution of the weights. So is a tensor with a
        gradient of zeros, on which outputs depend and whose module's other tensors moved: a loss may be flat in it for now, as
        hinge is in the bias of logits within the margins.
        """
        name = self.training.name
        if moved := [e.name for e in self.frozen if e.moved]:
            raise ValueError(
                f"{name}: {_such_as(moved)} frozen and moved; see that no optimiser holds what is frozen, and that nothing else "
                f"updates it{OFF}"
            )
        rates, still = self._rates(), [entry for entry in self.trained if not entry.moved]
        faults: dict[str, list[str]] = {}
        flat = []
        for entry in still:
            rate, reached = rates.get(id(entry.tensor)), self.engine.reached.get(entry.tensor)  # type: ignore[call-overload]
            if rate == 0:
                continue
            if not entry.tensor.requires_grad:
                fault = "it takes no gradient (requires_grad=false in a module that trains)"
            elif rate is None:
                fault = "it is in no optimiser"
            elif reached is None:
                fault = "no loss reaches it"
            elif reached == 0:
                flat.append(entry)
                continue
            elif rate * min(1.0, reached / EPSILON) < RESOLUTION * float(entry.before.abs().max()):
                continue
            else:
                fault = "it has a gradient, and its optimiser does not move it"
            faults.setdefault(fault, []).append(entry.name)
        depending = self._depending(flat, batch, number) if flat else set()
        unmoved = {id(entry.tensor) for entry in still}
        for entry in flat:
            others = [t for t in entry.owner.parameters(recurse=False) if id(t) not in unmoved]
            if id(entry.tensor) not in depending or not others:
                faults.setdefault("its gradient is exactly zero", []).append(entry.name)
        for fault, names in faults.items():
            raise ValueError(
                f"{name}: {_such_as(names)} to train and did not move: {fault}; see that the losses reach it, and that it is "
                f"neither detached nor left out{OFF}"
            )
        if self.codebook and not any(entry.moved for entry in self.codebook):
            raise ValueError(
                f"{name}: the codebook is learned from the latents and did not move; see that the step calls observe and "
                f"update_codebook, and that autoencoder.vq.ema_decay is below 1{OFF}"
            )

    def _rates(self) -> dict[int, float]:
        groups = [group for optimizer in self.training.state.optimizers.values() for group in optimizer.param_groups]
        return {id(p): float(group["lr"]) for group in groups for p in group["params"]}

    def _depending(self, entries: list[_Watched], batch: dict[str, Tensor], number: int) -> set[int]:
        """Those on which outputs of the modules depend, by the gradient of their sum with random weights."""
        calls: dict[nn.Module, tuple[Any, dict]] = {}

        def keep(module: nn.Module, args: Any, kwargs: dict, output: Any) -> None:
            calls[module] = args, kwargs

        modules = {self.training.trained, *self.training.state.modules.values()}
        handles = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
        try:
            gradients(self.training, batch, number)
        finally:
            for handle in handles:
                handle.remove()
        found: set[int] = set()
        tensors = [entry.tensor for entry in entries]
        for module, (args, kwargs) in calls.items():
            outputs = [x for x in tensors_in(module(*args, **kwargs)) if x.requires_grad]
            if outputs:
                total = torch.stack([(x * torch.randn_like(x)).sum() for x in outputs]).sum()
                reached = torch.autograd.grad(total, tensors, allow_unused=True)
                found |= {id(t) for t, g in zip(tensors, reached, strict=True) if g is not None and bool(g.any())}
        return found


def _such_as(names: list[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{len(names)} tensors, such as {names[0]}, are"

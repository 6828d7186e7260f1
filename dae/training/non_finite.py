"""Where a loss stopped being finite: the step, the module and the rows of the batch, by computing that micro-step again."""

from __future__ import annotations

import copy
import itertools
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dae.distributed import as_single_process, gather_numbers, gather_objects, rank, world_size
from dae.seeding import set_seed
from dae.training.probe import ProbeEngine, broken_rows, rows_in_words, watched

if TYPE_CHECKING:
    from dae.training.loop import Training
    from dae.training.run import Run

NON_FINITE = "non_finite"  # condition of the warning in a history
log = logging.getLogger(__name__)


def locate_non_finite(training: Training, losses: list[Tensor], done: int, run: Run | None) -> str:
    """Sentences on where the first loss that is not finite arose; all processes must call it, and get the same.

    The micro-step is computed again on copies, with its seeds, batch and precision. The weights are those that training has; if
    an update has broken them, those of the run's last checkpoint.

    Args:
        losses: of this process's last micro-steps, up to the last one of step `done - 1`.
        run: whose checkpoints may be read.
    """
    broken = [not bool(loss.isfinite()) for loss in losses]
    first = min(index for (index,) in gather_numbers(broken.index(True) if any(broken) else len(losses)))
    accumulation = training.settings.gradient_accumulation_steps
    number, micro = divmod(done * accumulation - len(losses) + first, accumulation)
    try:
        device = training.engine.device
        with as_single_process(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
            found = _replay(training, number, micro, len(losses) - 1 - first, run)
    except Exception as error:  # a search must not hide what it searches for
        log.info("where the loss stopped being finite was not found: %s: %s", type(error).__name__, error)
        found = None
    shown = [words for words in gather_objects(found) if words]
    which = f"It first was not finite at step {number + 1}" + (f", micro-step {micro + 1}" if accumulation > 1 else "")
    return " ".join([f"{which}.", *dict.fromkeys(shown)])


def _replay(training: Training, number: int, micro: int, back: int, run: Run | None) -> str | None:
    """What this process finds; None if nothing on its rows."""
    batch, where = _batch(training, back), f" of process {rank()}" if world_size() > 1 else ""
    rows = len(next(iter(batch.values()))) if batch else 0
    if batch and (wrong := broken_rows((x for x in batch.values() if x.is_floating_point()), rows)) is not None:
        return f"The batch{where} itself holds NaN or infinity in {rows_in_words(wrong)} of {rows}: look at the data."
    twin, weights = training.twin(ProbeEngine(training.engine.device, _autocast_dtype(training))), "its weights"
    if bad := [f"{file}.{name}" for file, module in twin.state.modules.items() for name in _broken(module)]:
        checkpoint = run.checkpoints.load("latest") if run is not None else None
        if checkpoint is None or checkpoint.state.get("stage") != training.name:
            return (
                f"{len(bad)} tensors{where} are not finite, such as {bad[0]}; there is no checkpoint to compute that step from."
            )
        for file, module in twin.state.modules.items():
            module.load_state_dict(checkpoint.tensors[file])
        weights = f"the weights of {checkpoint.path.name}"
    if not batch:
        return f"Its batch{where} cannot be read again."
    modules = dict(twin.state.modules) | ({"perceptual": p} if (p := getattr(training, "perceptual", None)) is not None else {})
    set_seed(twin.config.seed, twin.name, number, micro)
    for module in twin.state.modules.values():
        module.train()
    with watched(modules, rows) as found:
        loss = twin.micro_step(batch, number)
    if found:
        return f"Computed again with {weights}, it arises in {found[0]}{where}."
    if not loss.isfinite():
        return f"Computed again with {weights}, every module's output is finite{where}: the loss itself is not."
    if reached := [n for m in twin.state.modules.values() for n, p in m.named_parameters() if _not_finite(p.grad)]:
        return f"Computed again with {weights}, the loss is finite and the gradient of {reached[0]}{where} is not."
    return f"Computed again with {weights}, the step is finite{where}: the weights diverged after that."


def _autocast_dtype(training: Training) -> torch.dtype | None:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(training.config.mixed_precision or "no")


def _not_finite(x: Tensor | None) -> bool:
    return x is not None and not bool(x.isfinite().all())


def _broken(module: nn.Module) -> list[str]:
    return [name for name, x in module.state_dict().items() if x.is_floating_point() and _not_finite(x)]


def _batch(training: Training, back: int) -> dict[str, Tensor]:
    """The batch of so many micro-steps ago; {} if its loader cannot go back. The loader's position stays."""
    if back == 0:
        return training.batch
    loader: Any = getattr(training.state.loader, "loader", training.state.loader)
    position = training.state.loader.state_dict() if hasattr(training.state.loader, "state_dict") else {}
    if set(position) != {"micro_step"} or position["micro_step"] <= back:
        return {}
    again = copy.copy(loader)
    again._order = copy.copy(loader._order)
    again.seek(position["micro_step"] - 1 - back)
    batches = iter(again)
    batch = next(itertools.islice(batches, 1))
    return {name: batch[name].to(training.engine.device) for name in training.columns or batch}

"""The next batch on its way: the same batches, and a position that counts only those that were taken."""

from pathlib import Path

import pytest
import torch
from tiny_training import CPU, GAN, Reads, autoencoder_training, prior_training, weights
from torch.utils.data import Dataset

from dae.data import TrainLoader
from dae.data.tensors import TensorLoader
from dae.training.checkpoint import Checkpoint
from dae.training.prefetch import Prefetcher, prefetched


class Rows(Dataset):
    """Ten rows, of which `bad` cannot be read."""

    def __init__(self, bad: int | None = None):
        self.bad = bad

    def __len__(self):
        return 10

    def __getitem__(self, row):
        if row == self.bad:
            raise OSError(f"row {row} is lost")
        return {"image": torch.full((1, 8, 8), row / 10.0), "row": row}


def rows_of(batches, count):
    return [next(batches)["row"].tolist() for _ in range(count)]


def test_only_batches_that_were_taken_count():
    plain, loader = TrainLoader(Rows(), 3, seed=1), Prefetcher(TrainLoader(Rows(), 3, seed=1), CPU)
    wanted, taken = iter(plain), iter(loader)
    for _ in range(5):  # past the end of an epoch of three
        assert rows_of(taken, 1) == rows_of(wanted, 1)
        assert loader.state_dict() == plain.state_dict()
        loader.fetch()
        loader.fetch()  # does nothing more
        assert loader.state_dict() == plain.state_dict() != loader.loader.state_dict()
    position, following = loader.state_dict(), rows_of(wanted, 4)
    resumed = Prefetcher(TrainLoader(Rows(), 3, seed=1), CPU)
    resumed.load_state_dict(position)
    assert rows_of(iter(resumed), 4) == following
    loader.load_state_dict(position)  # with a batch on its way, which is dropped or is the right one
    assert rows_of(taken, 4) == following
    loader.fetch()
    loader.load_state_dict({"micro_step": 0})
    assert rows_of(taken, 2) == rows_of(iter(TrainLoader(Rows(), 3, seed=1)), 2)


def test_an_error_belongs_to_its_batch():
    """A checkpoint between the two is written as without `fetch`."""
    order = [row for batch in rows_of(iter(TrainLoader(Rows(), 2, seed=1)), 2) for row in batch]
    loader = Prefetcher(TrainLoader(Rows(bad=order[2]), 2, seed=1), CPU)
    assert rows_of(loader, 1) == [order[:2]]
    loader.fetch()
    assert loader.state_dict() == {"micro_step": 1}
    with pytest.raises(OSError, match="is lost"):
        next(loader)


def test_where_it_gains_nothing_there_is_none():
    loader, in_memory = TrainLoader(Rows(), 2, seed=1), TensorLoader({"row": torch.arange(4)}, 2, seed=1)
    assert prefetched(loader, CPU) is loader
    assert prefetched(in_memory, torch.device("cuda")) is in_memory


def test_training_and_resuming_to_the_bit(monkeypatch):
    steps = "stage1.gradient_accumulation_steps=2"
    plain = autoencoder_training(steps)
    for number in range(4):
        plain.step(number)
    wanted, position = weights(plain)

    monkeypatch.setattr("dae.training.loop.prefetched", lambda loader, device: Prefetcher(loader, device))
    first = autoencoder_training(steps)
    for number in range(2):
        first.step(number)
    assert first.ahead._ahead is not None
    tensors, state = first.state.pack()
    assert state["loaders"] == [{"micro_step": 4}]
    second = autoencoder_training(steps)
    copies = {file: {name: value.clone() for name, value in part.items()} for file, part in tensors.items()}
    second.state.restore(Checkpoint(Path("checkpoint-2"), copies, state | {"stage_step": 2}))
    for training in (first, second):
        for number in range(2, 4):
            training.step(number)
        found, now = weights(training)
        assert now["loaders"] == position["loaders"]
        assert found.keys() == wanted.keys() and all(torch.equal(value, wanted[name]) for name, value in found.items())


def test_no_batch_is_read_after_the_last_step(monkeypatch):
    monkeypatch.setattr("dae.training.loop.prefetched", lambda loader, device: Prefetcher(loader, device))
    training = autoencoder_training("stage1.max_train_steps=2")
    training.step(0)
    training.step(1)
    assert training.ahead._ahead is None and training.ahead.loader.state_dict() == {"micro_step": 2}


@pytest.mark.parametrize(
    "make",
    [
        lambda: autoencoder_training(*GAN),
        lambda: autoencoder_training(*GAN, "stage2.gradient_accumulation_steps=2", which=1),
        lambda: autoencoder_training("autoencoder.bottleneck=kl"),
        lambda: prior_training(values=torch.arange(40 * 2 * 16).view(40, 2, 16) % 16),
        lambda: prior_training("autoencoder.bottleneck=kl", values=torch.randn(40, 2, 8, 4, 4)),
    ],
    ids=["vq", "gan on a frozen latent", "kl", "ar", "dit"],
)
def test_a_step_waits_for_no_value(make):
    training = make()
    training.step(0)
    with Reads() as reads:
        training.step(1)
        training.step(2)
    assert reads.lines == []
    with Reads() as reads:
        training.log(3, Bar(), None, 3)
        training.state.pack()
    assert reads.lines  # what is read for the log and a checkpoint is seen


class Bar:
    def set_postfix(self, **values):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_waits_for_nothing():
    """torch raises for each call in which the host waits for the device."""
    training = autoencoder_training(*GAN, device=torch.device("cuda"))
    assert isinstance(training.ahead, Prefetcher)
    for number in range(3):
        training.step(number)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3, 6):
            training.step(number)
    finally:
        torch.cuda.set_sync_debug_mode(before)

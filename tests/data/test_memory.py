"""Images in memory: 8 bits each, the same values, and a refusal before the work where they do not fit."""

import pytest
import torch

from dae import memory
from dae.data import evaluation_batches, in_memory, load_data
from dae.metrics import as_float


@pytest.mark.parametrize("streaming", [False, True])
def test_8_bits_lose_nothing(saved, table, streaming):
    data = load_data(saved({"train": table(30), "test": table(9, start=50)}, streaming=streaming), 0)
    images = torch.cat([batch["image"] for batch in evaluation_batches(data.train, 7)])
    held, labels = in_memory(data.train, 100, seed=0, batch_size=7, as_bytes=True)
    assert held.dtype == torch.uint8 and torch.equal(as_float(held), images) and len(labels) == 30
    assert torch.equal(in_memory(data.train, 100, seed=0, batch_size=7)[0], images)
    assert torch.equal(as_float(torch.arange(256, dtype=torch.uint8)), torch.arange(256).float() / 127.5 - 1)


def test_what_does_not_fit_is_refused_before_it_is_read(saved, table, monkeypatch):
    data = load_data(saved({"train": table(30), "test": table(9, start=50)}), 0)
    monkeypatch.setattr(memory, "available_memory", lambda: 6 * 30 * 3 * 6 * 6 - 1)
    with pytest.raises(
        ValueError, match=r"30 images of 3x6x6 need about 0\.0 GB of memory, .* are free: lower evaluation\.max_images$"
    ):
        in_memory(data.train, 100, seed=0, batch_size=7)
    in_memory(data.train, 29, seed=0, batch_size=7)
    in_memory(data.train, 100, seed=0, batch_size=7, as_bytes=True)
    monkeypatch.setattr(memory, "available_memory", lambda: None)  # another system
    in_memory(data.train, 100, seed=0, batch_size=7)


def test_a_stream_is_refused_before_it_fills_the_memory(saved, table, monkeypatch):
    data = load_data(saved({"train": table(30), "test": table(9, start=50)}, streaming=True), 0)
    monkeypatch.setattr(memory, "available_memory", lambda: 6 * 20 * 3 * 6 * 6)
    with pytest.raises(ValueError, match=r"images of 3x6x6, read of the stream so far, need .*: lower measure\.max_images$"):
        in_memory(data.train, 100, seed=0, batch_size=7, knob="measure.max_images")
    assert len(in_memory(data.train, 100, seed=0, batch_size=7, as_bytes=True)[1]) == 30


def test_the_memory_that_is_there():
    available = memory.available_memory()
    assert available is None or 0 < available < 1 << 50

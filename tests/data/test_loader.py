"""The order of the rows: who gets what, and that nothing is lost or repeated when training is continued."""

import json

import pytest
import torch
from torch.utils.data import Dataset

from dae.data import TrainLoader, evaluation_batches, load_data


class Rows(Dataset):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return {"image": torch.full((1, 2, 2), float(i)), "label": i % 3, "row": i}


def take(loader, count):
    return [batch["row"].tolist() for _, batch in zip(range(count), loader, strict=False)]


def test_batches_have_the_promised_types():
    batch = next(iter(TrainLoader(Rows(10), 4, seed=0)))
    assert batch["image"].shape == (4, 1, 2, 2) and batch["image"].dtype == torch.float32
    assert batch["label"].dtype == batch["row"].dtype == torch.int64 and batch["label"].shape == (4,)
    assert (batch["image"][:, 0, 0, 0] == batch["row"]).all()


def test_an_epoch_is_a_permutation_and_epochs_differ():
    steps = take(TrainLoader(Rows(20), 4, seed=0), 15)
    epochs = [[row for batch in steps[i : i + 5] for row in batch] for i in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != list(range(20)) and epochs[0] != epochs[1] != epochs[2]


def test_the_order_is_a_function_of_the_seed_and_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = take(TrainLoader(Rows(20), 3, seed=5), 14)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert first == take(TrainLoader(Rows(20), 3, seed=5), 14) == take(TrainLoader(Rows(20), 3, seed=5, num_workers=2), 14)
    assert first != take(TrainLoader(Rows(20), 3, seed=6), 14)


@pytest.mark.parametrize("world", [2, 3])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(world, processes):
    whole = take(TrainLoader(Rows(40), 6, seed=0), 15)
    for rank in range(world):
        processes(rank, world)
        mine = take(TrainLoader(Rows(40), 6 // world, seed=0), 15)
        assert mine == [batch[rank::world] for batch in whole]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_seek_is_as_good_as_having_consumed(num_workers, processes):
    for rank, world in ((0, 1), (1, 2)):
        processes(rank, world)
        steps = take(TrainLoader(Rows(26), 3, seed=0), 24)
        for step in (0, 1, 3, 4, 5, 8, 17) if num_workers == 0 else (3, 9):
            loader = TrainLoader(Rows(26), 3, seed=0, num_workers=num_workers)
            loader.seek(step)
            assert loader.state_dict() == {"micro_step": step}
            assert take(loader, 24 - step) == steps[step:]


def test_seek_reads_nothing_of_what_it_passes():
    rows, read = Rows(1000), []
    rows.__class__ = type("Counted", (Rows,), {"__getitem__": lambda self, i: read.append(i) or Rows.__getitem__(self, i)})
    loader = TrainLoader(rows, 10, seed=0)
    loader.seek(10**6 + 7)
    next(iter(loader))
    assert len(read) == 10


@pytest.mark.parametrize("num_workers", [0, 2])
def test_seek_and_new_iterations_in_the_middle(num_workers):
    steps = take(TrainLoader(Rows(20), 3, seed=0), 12)
    loader = TrainLoader(Rows(20), 3, seed=0, num_workers=num_workers)
    assert take(loader, 4) == steps[:4]  # zip takes none too many
    running = iter(loader)
    assert next(running)["row"].tolist() == steps[4]
    loader.seek(2)
    assert next(running)["row"].tolist() == steps[2]
    loader.load_state_dict(json.loads(json.dumps({"micro_step": 9})))
    assert [next(running)["row"].tolist() for _ in range(3)] == steps[9:]


def test_map_state_is_one_number():
    loader = TrainLoader(Rows(20), 3, seed=0)
    take(loader, 9)
    assert loader.state_dict() == {"micro_step": 9}
    with pytest.raises(ValueError, match="epoch"):
        loader.load_state_dict({"micro_step": 1, "epoch": 0})
    with pytest.raises(ValueError, match="-1"):
        loader.seek(-1)


def test_bad_arguments():
    for options in ({"batch_size": 0}, {"batch_size": 2, "num_workers": -1}, {"batch_size": 2, "shuffle_buffer_size": 0}):
        with pytest.raises(ValueError, match="expected at least"):
            TrainLoader(Rows(5), seed=0, **options)
    with pytest.raises(TypeError, match="ImageStream"):
        TrainLoader(type("Other", (torch.utils.data.IterableDataset,), {"__iter__": lambda self: iter(())})(), 2, seed=0)
    for bad in ((0, None), (2, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            evaluation_batches(Rows(5), *bad)


@pytest.fixture
def stream(saved, table):
    return load_data(saved({"train": table(41, label=None), "test": table(5, label=None, start=90)}, streaming=True), 0).train


def stream_loader(stream, num_workers=0, **changes):
    return TrainLoader(stream, **{"batch_size": 3, "seed": 0, "num_workers": num_workers, "shuffle_buffer_size": 10, **changes})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_continues_exactly_in_any_epoch_and_after_any_number_of_resumes(stream, num_workers):
    steps = take(stream_loader(stream, num_workers), 45)
    assert take(stream_loader(stream, num_workers), 45) == steps
    assert len({row for batch in steps[:13] for row in batch}) == 39  # no row twice in an epoch
    assert steps[13:26] != steps[:13]
    walked, state = [], None
    for count in (4, 1, 8, 3, 11, 2, 7, 9) if num_workers == 0 else (5, 9, 1, 12):  # into the fourth epoch
        loader = stream_loader(stream, num_workers)
        if state is not None:
            loader.load_state_dict(state)
            assert json.loads(json.dumps(loader.state_dict())) == state
        walked += take(loader, count)
        state = json.loads(json.dumps(loader.state_dict()))
        assert state["micro_step"] == len(walked)
    assert walked == steps[: len(walked)]


def test_a_stream_continues_from_every_single_step(stream):
    loader, steps, states = stream_loader(stream), [], []
    for _, batch in zip(range(29), loader, strict=False):
        steps.append(batch["row"].tolist())
        states.append(json.loads(json.dumps(loader.state_dict())))
    for i, state in enumerate(states[:-2]):
        again = stream_loader(stream)
        again.load_state_dict(state)
        assert take(again, 2) == steps[i + 1 : i + 3]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_jumps_while_it_is_iterated(stream, num_workers):
    loader = stream_loader(stream, num_workers)
    steps = take(loader, 3)
    state = loader.state_dict()
    running = iter(loader)
    steps += [next(running)["row"].tolist() for _ in range(14)]
    loader.load_state_dict(state)
    assert [next(running)["row"].tolist() for _ in range(14)] == steps[3:]


def test_continuing_a_stream_decodes_only_what_it_needs(stream, monkeypatch):
    loader = stream_loader(stream)
    take(loader, 10)
    decoded = []
    original = type(stream.decoder).decode
    monkeypatch.setattr(type(stream.decoder), "decode", lambda *args: decoded.append(1) or original(*args))
    take(loader, 1)
    assert len(decoded) == 3


@pytest.mark.parametrize("world, num_workers", [(2, 0), (3, 0), (2, 2)])  # 8 shards: by shards for 2, by rows for 3
def test_processes_share_a_stream_without_overlap(stream, processes, world, num_workers):
    seen = []
    for rank in range(world):
        processes(rank, world)
        loader = stream_loader(stream, num_workers, batch_size=1)
        running = iter(loader)
        while (batch := next(running)) and loader.state_dict()["epoch"] == 0:
            seen += batch["row"].tolist()
    assert len(seen) == len(set(seen)) == 41


def test_the_seed_changes_the_order_of_a_stream_and_the_global_generator_is_left_alone(stream):
    before = torch.get_rng_state()
    assert take(stream_loader(stream), 5) != take(stream_loader(stream, seed=1), 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stream_refuses_a_state_of_other_settings(stream, processes):
    loader = stream_loader(stream)
    take(loader, 2)
    state = loader.state_dict()
    with pytest.raises(ValueError, match="batch_size: 3 -> 4, shuffle_buffer_size: 10 -> 11"):
        stream_loader(stream, batch_size=4, shuffle_buffer_size=11).load_state_dict(state)
    with pytest.raises(ValueError, match="lacks"):
        loader.load_state_dict({"micro_step": 3})
    with pytest.raises(TypeError, match="load_state_dict"):
        loader.seek(3)
    processes(1, 2)
    with pytest.raises(ValueError, match="rank: 0 -> 1, world_size: 1 -> 2"):
        stream_loader(stream).load_state_dict(state)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_reads_all_rows_in_order_on_each_process(processes, num_workers):
    processes(1, 2)
    before = torch.get_rng_state()
    assert [b["row"].tolist() for b in evaluation_batches(Rows(7), 3, num_workers=num_workers)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [b["row"].tolist() for b in evaluation_batches(Rows(7), 3, limit=4, num_workers=num_workers)] == [[0, 1, 3], [5]]
    assert sum(len(b["row"]) for b in evaluation_batches(Rows(7), 3, limit=100)) == 7
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_of_a_stream_keeps_its_order(stream, num_workers):
    rows = [row["row"] for row in stream]
    assert [len(batch["row"]) for batch in evaluation_batches(stream, 4, limit=10, num_workers=num_workers)] == [4, 4, 2]
    assert [row for batch in evaluation_batches(stream, 4, num_workers=num_workers) for row in batch["row"].tolist()] == rows

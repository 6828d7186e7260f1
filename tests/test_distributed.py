"""What processes agree on, with two real ones over gloo."""

import errno
import time

import pytest
import torch
from torch import distributed, multiprocessing

from dae import distributed as ours
from dae.config import Config
from dae.training import Run


def in_processes(world, body, tmp_path):
    """`body(rank)` in `world` processes; what they return, in order of rank."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def work(rank):
        torch.set_num_threads(1)
        store = f"file://{tmp_path / f'store{world}'}"
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        try:
            results.put((rank, body(rank)))
        finally:
            distributed.destroy_process_group()

    workers = [context.Process(target=work, args=(rank,)) for rank in range(world)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    return [value for _, value in sorted((results.get() for _ in workers), key=lambda pair: pair[0])]


def test_alone():
    x = torch.arange(3.0)
    assert (ours.rank(), ours.world_size()) == (0, 1)
    assert ours.sum_over_processes(x) is x and ours.in_global_order(x) is x and ours.gather_objects({"a": 1}) == [{"a": 1}]
    torch.manual_seed(0)
    drawn = ours.draw_rows(torch.rand, (4, 2))
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(4, 2))


def test_rows_are_drawn_for_the_global_batch(monkeypatch):
    whole = torch.randint(0, 100, (6, 3), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(ours, "world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(ours, "rank", lambda rank=rank: rank)
        generator = torch.Generator().manual_seed(1)
        mine = ours.draw_rows(lambda shape, **o: torch.randint(0, 100, shape, **o), (2, 3), generator=generator)
        assert torch.equal(mine, whole[rank::3])


def test_two_processes(tmp_path):
    def body(rank):
        rows = torch.arange(10.0).view(5, 2)
        mine = torch.stack([rows[i] for i in range(4)])[rank::2]
        torch.manual_seed(7)
        return (
            ours.rank(),
            ours.world_size(),
            ours.in_global_order(mine.T.contiguous().T).tolist(),  # not contiguous
            ours.sum_over_processes(torch.tensor([1.0, rank])).tolist(),
            ours.gather_objects({"rank": rank}),
            ours.draw_rows(torch.rand, (2,)).tolist(),
        )

    first, second = in_processes(2, body, tmp_path)
    assert (first[:2], second[:2]) == ((0, 2), (1, 2))
    assert first[2] == second[2] == torch.arange(8.0).view(4, 2).tolist()
    assert first[3] == second[3] == [2.0, 1.0]
    assert first[4] == second[4] == [{"rank": 0}, {"rank": 1}]
    torch.manual_seed(7)
    whole = torch.rand(4)
    assert first[5] == whole[0::2].tolist() and second[5] == whole[1::2].tolist()


def numbered():
    raise OSError(errno.ENOSPC, "disk full", "file.bin")


def worded():
    raise FileExistsError("holds another run")


@pytest.mark.parametrize("action, text", [(numbered, "disk full: 'file.bin'"), (worded, "holds another run"), (lambda: None, "")])
def test_the_first_process_acts_and_all_hear_of_its_failure(tmp_path, action, text):
    acted = []

    def body(rank):
        def recorded():
            acted.append(rank)
            action()

        try:
            ours.run_on_first_process(recorded)
        except OSError as error:
            return acted, str(error), error.errno
        return acted, "", None

    first, second = in_processes(2, body, tmp_path)
    assert first[0] == [0] and second[0] == []
    assert text in first[1] and first[1] == second[1] and first[2] == second[2]


def test_a_run_claims_its_folder_once(tmp_path):
    """The first process writes into the folder that the second has yet to look at."""
    config = Config(output_dir=str(tmp_path / "run"), report_to="none")

    def body(rank):
        time.sleep(0.5 * rank)
        Run(config, "prior").open(None)
        return "claimed"

    assert in_processes(2, body, tmp_path) == ["claimed", "claimed"]

"""What processes agree on, with two real ones over gloo."""

import errno
import json
import subprocess
import time
from pathlib import Path

import pytest
import torch

from dae import distributed as ours
from dae.config import Config
from dae.training import Run
from dae.training.loop import global_mean


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


def test_two_processes(in_processes):
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

    first, second = in_processes(2, body)
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
def test_the_first_process_acts_and_all_hear_of_its_failure(in_processes, action, text):
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

    first, second = in_processes(2, body)
    assert first[0] == [0] and second[0] == []
    assert text in first[1] and first[1] == second[1] and first[2] == second[2]


class Odd(UnicodeDecodeError):
    """A subclass of our own of an error that is not made from a message."""


class Wrapped(ValueError):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def odd():
    raise Odd("utf-8", b"x", 0, 1, "bad start")


FAILURES = [
    (lambda: int("x"), ValueError, "invalid literal"),
    (lambda: Wrapped(1, 2), ValueError, "1 and 2"),
    (lambda: json.loads("{"), ValueError, "Expecting property name"),
    (odd, ValueError, "bad start"),
    (lambda: Path("/no/such/file").read_text(), FileNotFoundError, "/no/such/file"),
    (lambda: torch.ones(2) @ torch.ones(3), RuntimeError, "inconsistent tensor size"),
    (lambda: {}["a"], KeyError, "a"),
    (lambda: subprocess.run("false", check=True), RuntimeError, "'false'"),
]


@pytest.mark.parametrize("world, failing", [(2, 0), (2, 1), (3, 1)])
def test_an_error_of_one_process_is_raised_by_all(in_processes, world, failing):
    """By none of them later, and they go on together afterwards."""

    def body(rank):
        heard = []
        for action, kind, text in FAILURES:
            with pytest.raises(Exception, match=text) as caught, ours.failing_together():
                if rank == failing and isinstance(result := action(), Exception):
                    raise result
            assert isinstance(caught.value, kind) or rank == failing
            heard.append(type(caught.value).__name__)
            with ours.failing_together():
                assert ours.sum_over_processes is not None  # nobody fails: nothing is raised
        return heard, ours.sum_over_processes(torch.ones(1)).item()

    for _, total in in_processes(world, body):
        assert total == world


def test_what_the_first_process_returns(in_processes):
    def body(rank):
        value = ours.run_on_first_process(lambda: {"rank": rank})
        with pytest.raises(ValueError, match="only here") as caught:
            ours.run_on_first_process(lambda: (_ for _ in ()).throw(ValueError("only here")))
        return value, getattr(caught.value, "__notes__", [])

    assert in_processes(3, body) == [({"rank": 0}, [])] + 2 * [({"rank": 0}, ["raised by process 0 of 3"])]


def test_what_the_first_process_does_alone_may_use_every_function(in_processes):
    """They wait for nobody: 1 more call of process 0 than of the others would leave the next collective without a partner."""

    def body(rank):
        def alone():
            with ours.failing_together():
                ours.agree({"only": rank})
            assert ours.run_on_first_process(lambda: "nested") == "nested"
            rows = torch.arange(3.0)[:, None]
            return (
                ours.sum_over_processes(rows.clone()).equal(rows), ours.from_first_process(rows.clone()).equal(rows),
                ours.in_global_order(rows).equal(rows), ours.gather_numbers(7), ours.gather_objects("x"),
                ours.draw_rows(torch.zeros, (2,)).shape, global_mean([torch.tensor(3.0), torch.tensor(5.0)]),
            )  # fmt: skip

        done = ours.run_on_first_process(alone)
        return done, ours.gather_objects(rank), global_mean([torch.tensor(float(rank))])

    expected = (True, True, True, [(7,)], ["x"], (2,), 4.0), [0, 1, 2], 1.0
    assert in_processes(3, body) == 3 * [expected]


@pytest.mark.parametrize("split", [(4, 3), (0, 2), (2, 0, 5), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_rows_in_global_order_where_processes_hold_different_numbers(in_processes, split, dtype):
    rows = (torch.arange(2 * sum(split)).view(-1, 2) % 251).to(dtype)
    order = sorted((i, rank) for rank, count in enumerate(split) for i in range(count))  # row i of process 0, of 1, ...
    parts = [rows[[n for n, (_, owner) in enumerate(order) if owner == rank]] for rank in range(len(split))]
    for found in in_processes(len(split), lambda rank: ours.in_global_order(parts[rank].mT.contiguous().mT)):
        assert torch.equal(found, rows) and found.dtype == dtype


def test_rows_that_do_not_fit_together_are_refused_everywhere(in_processes):
    def body(rank):
        for mine in (torch.zeros(2, 3 + rank), torch.zeros(2, 3, dtype=(torch.float32, torch.float64)[rank])):
            with pytest.raises(ValueError, match="expected rows of one dtype and shape in all processes"):
                ours.in_global_order(mine)
        return True

    assert all(in_processes(2, body))


def test_what_must_be_equal_is_compared(in_processes):
    def body(rank):
        ours.agree({"seed": 0, "data": "abc"})
        with pytest.raises(ValueError, match=r"processes 0 and 1 must have the same and differ \(seed: 0 and 1\): start all"):
            ours.agree({"seed": rank, "data": "abc"})
        x = torch.full((2, 3), float(rank)).mT
        return ours.gather_numbers(rank, 10 * rank), ours.from_first_process(x).tolist()

    assert in_processes(2, body) == 2 * [([(0, 0), (1, 10)], [[0.0, 0.0]] * 3)]


def test_a_run_claims_its_folder_once(tmp_path, in_processes):
    """The first process writes into the folder that the second has yet to look at."""
    config = Config(output_dir=str(tmp_path / "run"), report_to="none")

    def body(rank):
        time.sleep(0.5 * rank)
        Run(config, "prior").open(None)
        return "claimed"

    assert in_processes(2, body) == ["claimed", "claimed"]

"""Checkpoints: complete or absent, verified, and never all lost."""

import json
import logging
import os
import resource
import shutil
import signal

import pytest
import torch
from torch import multiprocessing

import dae.files
from dae.training import Checkpoints
from dae.training.checkpoint import MANIFEST, STATE


def content(step):
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "model": {"weight": torch.randn(3, 4, generator=generator), "steps": torch.tensor(step), "empty": torch.zeros(0, 2)},
        "optimizer": {"0.exp_avg": torch.randn(4, 3, generator=generator).T, "half": torch.ones(2, dtype=torch.bfloat16)},
        "nothing": {},
    }
    return tensors, {"step": step, "nested": {"values": [0.1, 1e-300, None]}}


def equal(checkpoint, step):
    tensors, state = content(step)
    assert checkpoint.state == state and checkpoint.path.name == f"checkpoint-{step}"
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, part in tensors.items():
        assert checkpoint.tensors[name].keys() == part.keys()
        for key, tensor in part.items():
            got = checkpoint.tensors[name][key]
            assert got.dtype == tensor.dtype and torch.equal(got, tensor)
    return True


def fill(folder, *steps, limit=5):
    checkpoints = Checkpoints(folder, limit)
    for step in steps:
        checkpoints.save(step, *content(step))
    return checkpoints


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_round_trip(tmp_path):
    checkpoints = fill(tmp_path / "run", 3, 20)
    assert equal(checkpoints.load("latest"), 20)
    assert equal(checkpoints.load(str(tmp_path / "run" / "checkpoint-3")), 3)
    files = {"manifest.json", "model.safetensors", "nothing.safetensors", "optimizer.safetensors", "state.json"}
    assert set(names(tmp_path / "run" / "checkpoint-3")) == files


def test_nothing_yet(tmp_path):
    assert Checkpoints(tmp_path / "run").load("latest") is None
    with pytest.raises(ValueError, match="checkpoints_total_limit must be at least 1"):
        Checkpoints(tmp_path, 0)


def test_rotation_keeps_the_newest_by_number(tmp_path):
    fill(tmp_path, 5, 9, 10, 100, limit=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100"]


@pytest.mark.parametrize("limit", [1, 2])
def test_going_back_leaves_the_abandoned_steps_behind(tmp_path, limit):
    """A run that resumed from step 10 though 30 exists: what it writes stays, and `latest` does not return to 30."""
    fill(tmp_path, 10, 20, 30)
    checkpoints = fill(tmp_path, 15, limit=limit)
    assert equal(checkpoints.load("latest"), 15)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-15"][-limit:]


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoints = fill(tmp_path, 4)
    (tmp_path / "checkpoint-4" / "old").write_text("old")
    checkpoints.save(4, *content(4))
    assert equal(checkpoints.load("latest"), 4) and not (tmp_path / "checkpoint-4" / "old").exists()


def test_strays_are_ignored(tmp_path):
    checkpoints = fill(tmp_path, 7, limit=1)
    for name in ("checkpoint-abc", "checkpoint-", "checkpoint-9x", "notes", ".checkpoint-99.tmp", "checkpoint-8.bak"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-50").write_text("a file of that name")
    assert [p.name for p in checkpoints.all()] == ["checkpoint-7"]
    assert equal(checkpoints.load("latest"), 7)
    checkpoints.save(8, *content(8))
    assert equal(checkpoints.load("latest"), 8)
    assert ".checkpoint-99.tmp" not in names(tmp_path), "left-over temporaries are cleaned"
    assert {"checkpoint-abc", "checkpoint-50", "notes", "checkpoint-8.bak"} <= set(names(tmp_path))
    assert "checkpoint-7" not in names(tmp_path)


FILES = ["model.safetensors", "optimizer.safetensors", STATE, MANIFEST]


def flip(path, position=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * position)] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "flipped bit": flip,
    "flipped first bit": lambda path: flip(path, 0.0),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "garbage": lambda path: path.write_bytes(b"[1, 2]"),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_older_one_taken(tmp_path, caplog, file, damage):
    checkpoints = fill(tmp_path, 1, 2)
    DAMAGE[damage](tmp_path / "checkpoint-2" / file)
    with caplog.at_level(logging.WARNING):
        assert equal(checkpoints.load("latest"), 1)
    assert "checkpoint-2" in caplog.text and "trying the one before" in caplog.text
    with pytest.raises((ValueError, FileNotFoundError), match="checkpoint-2"):  # asked for by name: no other is taken
        checkpoints.load(str(tmp_path / "checkpoint-2"))


def test_every_bit_of_a_manifest(tmp_path):
    """A flipped bit there gives an error that says so, or (in white space) nothing at all."""
    checkpoints = fill(tmp_path, 1)
    path = tmp_path / "checkpoint-1" / MANIFEST
    whole, refused = path.read_bytes(), 0
    for bit in range(0, 8 * len(whole), 7):  # 7 and 8 have no common divisor: all bits of a byte come up
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            checkpoints.load(str(path.parent))
        except ValueError:
            refused += 1
    assert refused > 0.9 * 8 * len(whole) / 7


def test_two_damaged_and_all_damaged(tmp_path):
    checkpoints = fill(tmp_path, 1, 2, 3)
    for step in (2, 3):
        flip(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    assert equal(checkpoints.load("latest"), 1)
    (tmp_path / "checkpoint-1" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint can be read.*checkpoint-3.*checkpoint-2.*checkpoint-1"):
        checkpoints.load("latest")


def test_after_falling_back_the_new_one_survives(tmp_path):
    """With a limit of one, the damaged newer checkpoint must not push out what is saved after falling back."""
    checkpoints = fill(tmp_path, 1, 9)
    flip(tmp_path / "checkpoint-9" / STATE)
    assert equal(checkpoints.load("latest"), 1)
    checkpoints = fill(tmp_path, 5, limit=1)
    assert equal(checkpoints.load("latest"), 5)


@pytest.mark.parametrize("which", ["nowhere", "run", "run/checkpoint-1/state.json"])
def test_a_path_that_is_no_checkpoint(tmp_path, which):
    checkpoints = fill(tmp_path / "run", 1)
    with pytest.raises(FileNotFoundError, match=r"is no checkpoint.*\['checkpoint-1'\]"):
        checkpoints.load(str(tmp_path / which))


def disk_full(monkeypatch, operation, calls_before):
    """The n-th call of an operation of `os` fails."""
    real, count = getattr(os, operation), [0]

    def failing(*args, **options):
        count[0] += 1
        if count[0] > calls_before:
            raise OSError(28, "No space left on device", *args[:1])
        return real(*args, **options)

    monkeypatch.setattr(os, operation, failing)


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("operation, calls_before", [("fsync", n) for n in range(6)] + [("replace", n) for n in range(5)])
def test_an_error_in_the_middle_of_a_save(tmp_path, monkeypatch, operation, calls_before, limit):
    checkpoints = fill(tmp_path, 1, limit=limit)
    with monkeypatch.context() as patch:
        disk_full(patch, operation, calls_before)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(2, *content(2))
    assert names(tmp_path) == ["checkpoint-1"], "no temporary and no partial checkpoint"
    assert equal(checkpoints.load("latest"), 1)
    checkpoints.save(2, *content(2))
    assert equal(checkpoints.load("latest"), 2)


def test_the_error_names_file_size_and_remedy(tmp_path, monkeypatch):
    disk_full(monkeypatch, "fsync", 0)
    with pytest.raises(
        OSError, match=r"could not save 4 bytes \(No space left on device\); free space or choose another output_dir"
    ):
        dae.files.write_file(tmp_path / "file", b"data")
    assert names(tmp_path) == []


def in_a_child(action):
    """Run `action` in a forked process; its exit code."""
    child = multiprocessing.get_context("fork").Process(target=action)
    child.start()
    child.join(60)
    return child.exitcode


def limited(folder):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    with pytest.raises(OSError, match=r"could not save .*File too large.*free space or choose another output_dir"):
        Checkpoints(folder).save(2, {"model": {"w": torch.zeros(10_000)}}, {"step": 2})


def test_a_real_limit_of_file_size(tmp_path):
    checkpoints = fill(tmp_path, 1)
    assert in_a_child(lambda: limited(tmp_path)) == 0
    assert names(tmp_path) == ["checkpoint-1"] and equal(checkpoints.load("latest"), 1)


def killed(folder, point):
    """Save step 2; the process dies just before its `point`-th operation on the disk."""
    calls = [0]

    def counted(real):
        def call(*args, **options):
            calls[0] += 1
            if calls[0] == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    for name in ("open", "fsync", "replace", "rename", "rmdir", "unlink", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    Checkpoints(folder, 1).save(2, *content(2))


def test_killed_at_any_point_of_a_save(tmp_path):
    """The previous or the new checkpoint loads, also when only one is kept; the next save cleans up."""
    loaded = []
    for point in range(1, 100):
        folder = tmp_path / str(point)
        fill(folder, 1)
        code = in_a_child(lambda folder=folder, point=point: killed(folder, point))
        checkpoint = Checkpoints(folder, 1).load("latest")
        loaded.append(checkpoint.state["step"])
        assert equal(checkpoint, loaded[-1])
        fill(folder, 3, limit=1)
        assert names(folder) == ["checkpoint-3"]
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert len(loaded) > 12 and loaded == sorted(loaded) and set(loaded) == {1, 2}


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        fill(tmp_path / "run", 1)
    finally:
        os.umask(before)
    for path in (tmp_path / "run" / "checkpoint-1").iterdir():
        assert path.stat().st_mode & 0o777 == 0o640


def test_a_planted_pickle_is_never_opened(tmp_path):
    """A file that is in the folder and not in the manifest is not read, whatever it is called."""
    checkpoints = fill(tmp_path, 1)
    (tmp_path / "checkpoint-1" / "optimizer.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    assert equal(checkpoints.load("latest"), 1)
    manifest = tmp_path / "checkpoint-1" / MANIFEST
    entries = json.loads(manifest.read_text())
    shutil.copy(tmp_path / "checkpoint-1" / "optimizer.bin", tmp_path / "checkpoint-1" / "model.safetensors")
    manifest.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"model\.safetensors does not have the SHA-256"):
        checkpoints.load("latest")

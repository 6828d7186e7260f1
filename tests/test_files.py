"""Folders and files that are replaced together or not at all, whatever ends the process; announcements that hold."""

import contextlib
import os

import pytest

from dae import files
from dae.files import announce, replaced_files, replaced_folder


def tree(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def fill(folder, content):
    (folder / "png").mkdir(parents=True, exist_ok=True)
    for name in ("a.txt", "b.txt", "png/0.png"):
        (folder / name).write_text(content)


def replace(folder):
    with replaced_folder(folder) as new:
        fill(new, "new")
        (new / "c.txt").write_text("new")


class Killed(BaseException):
    pass


@pytest.fixture
def samples(tmp_path):
    fill(tmp_path / "samples", "old")
    (tmp_path / "samples" / "png" / "1.png").write_text("old")
    return tmp_path / "samples"


def test_folder(samples):
    replace(samples)
    assert tree(samples.parent) == {f"samples/{name}": "new" for name in ("a.txt", "b.txt", "c.txt", "png/0.png")}


def test_new_folder(tmp_path):
    replace(tmp_path / "run" / "samples")
    assert tree(tmp_path / "run") == {f"samples/{name}": "new" for name in ("a.txt", "b.txt", "c.txt", "png/0.png")}
    assert os.listdir(tmp_path / "run") == ["samples"]


def test_what_is_not_ours_stays(samples):
    (samples / "mine").mkdir()
    (samples / "mine" / "notes.txt").write_text("notes")
    (samples / "score.json").write_text("9")
    replace(samples)
    found = tree(samples)
    assert found["mine/notes.txt"] == "notes" and found["score.json"] == "9" and found["a.txt"] == "new" and len(found) == 6


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_all_as_it_was(samples, error):
    before = tree(samples.parent)
    with pytest.raises(error), replaced_folder(samples) as new:
        fill(new, "half")
        raise error
    assert tree(samples.parent) == before and os.listdir(samples.parent) == ["samples"]


@pytest.mark.parametrize("at", range(1, 13))
def test_killed_anywhere(samples, monkeypatch, at):
    """Before each operation on a folder: the old samples or the new ones, whole, and the next run finds and leaves no trace."""
    old = tree(samples) | {"mine.txt": "mine"}
    (samples / "mine.txt").write_text("mine")
    new = dict.fromkeys(("a.txt", "b.txt", "c.txt", "png/0.png"), "new") | {"mine.txt": "mine"}
    count = 0

    def dies(original):
        def operation(*arguments, **options):
            nonlocal count
            count += 1
            if count >= at:  # a process that was killed cleans nothing up either
                raise Killed
            return original(*arguments, **options)

        return operation

    with monkeypatch.context() as patch:
        patch.setattr(files.Path, "rename", dies(files.Path.rename))
        patch.setattr(files.Path, "mkdir", dies(files.Path.mkdir))
        patch.setattr(files.shutil, "rmtree", dies(files.shutil.rmtree))
        patch.setattr(files, "sync_folder", dies(files.sync_folder))
        with contextlib.suppress(Killed):
            replace(samples)
    with pytest.raises(ZeroDivisionError), replaced_folder(samples):  # the next process, which fails by itself
        1 / 0  # noqa: B018
    assert tree(samples) in (old, new) and os.listdir(samples.parent) == ["samples"]
    replace(samples)
    assert tree(samples) == new and os.listdir(samples.parent) == ["samples"]


def test_behind_a_link(samples, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").symlink_to(samples)
    replace(tmp_path / "run" / "samples")
    assert (tmp_path / "run" / "samples").is_symlink() and tree(samples)["a.txt"] == "new"


def test_files(tmp_path):
    fill(tmp_path, "old")
    with replaced_files(tmp_path) as new:
        (new / "a.txt").write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
    assert tree(tmp_path) == {"a.txt": "new", "b.txt": "old", "png/0.png": "old"}
    with pytest.raises(OSError), replaced_files(tmp_path) as new:
        (new / "b.txt").write_text("new")
        raise OSError
    assert tree(tmp_path) == {"a.txt": "new", "b.txt": "old", "png/0.png": "old"} and not (tmp_path / ".new").exists()


def test_announcement(tmp_path, capsys):
    fill(tmp_path, "x")
    announce(tmp_path, ["a.txt", "png/0.png"], ": 2 files")
    assert capsys.readouterr().out == f"saved {tmp_path}: 2 files\n"
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"should hold b\.txt, c\.txt by now, but does not"):
        announce(tmp_path, ["a.txt", "b.txt", "c.txt"])
    with pytest.raises(FileNotFoundError, match=r"4\.png and 2 more by now"):
        announce(tmp_path, [f"{i}.png" for i in range(7)])
    assert capsys.readouterr().out == ""

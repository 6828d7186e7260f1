"""A folder that cannot be written is one line before anything is read or trained."""

import errno
import os
from types import SimpleNamespace

import pytest

from dae.lock import writes


@writes("part", makes_folder=True)
def recipe(config):
    pytest.fail("began")


@pytest.mark.parametrize("below", ["", "run", "run/deeper"])
def test_a_file_in_the_place_of_the_folder(tmp_path, below):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OSError, match=r"the output_dir cannot be written \(.*choose another") as caught:
        recipe(SimpleNamespace(output_dir=str(file / below)))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("function", ["open", "mkdir"])
def test_the_system_refuses(tmp_path, monkeypatch, number, function):
    """Whoever runs this may be root, whom no permission stops."""

    def refuse(path, *_, **__):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, function, refuse)
    with pytest.raises(OSError, match="the output_dir cannot be written") as caught:
        recipe(SimpleNamespace(output_dir=str(tmp_path / "run")))
    assert caught.value.errno == number and not (tmp_path / "run").exists()

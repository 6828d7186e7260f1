"""`sampling.classes`: samples of some classes alone."""

import json

import numpy as np
import pytest

from dae.sampling import balanced_labels


def test_labels():
    assert balanced_labels(5, 3).tolist() == [0, 1, 2, 0, 1]
    assert balanced_labels(5, 10, [3, 5]).tolist() == [3, 5, 3, 5, 3]
    with pytest.raises(ValueError, match=r"knows the classes 0..2, got 3"):
        balanced_labels(5, 3, [1, 3])


def test_samples_of_some_classes(copied_chain, run, contents):
    run("sample", copied_chain, "sampling.classes=[3,5]", "sampling.num_samples=5")
    folder = copied_chain / "samples"
    assert np.load(folder / "samples.npz")["arr_1"].tolist() == [3, 5, 3, 5, 3]
    names = sorted(path.name for path in (folder / "png").iterdir())
    assert names == [f"{i:06d}_class{label}.png" for i, label in enumerate([3, 5, 3, 5, 3])]
    with pytest.raises(ValueError, match=r"are of 3, 5 alone"):
        run("evaluate", copied_chain)
    before = contents(copied_chain)
    with pytest.raises(ValueError, match=r"sampling.classes: '12' is neither the name .*There are 10 classes: 0, 1, 2, 3, 4"):
        run("sample", copied_chain, "sampling.classes=[12]")
    assert contents(copied_chain) == before


def test_names_and_labels_are_those_of_the_run(copied_chain, run):
    """What the training wrote down, not the data of today's configuration."""
    file = copied_chain / "prior" / "data.json"
    data = json.loads(file.read_text())
    assert data["class_names"] == list("0123456789") and data["labels"] is None
    data |= {"class_names": ["cat", "dog", *map(str, range(1993, 2001))], "labels": list(range(1991, 2001))}
    file.write_text(json.dumps(data))
    run("sample", copied_chain, "sampling.classes=[1992,cat,2000]", "sampling.num_samples=3")
    assert np.load(copied_chain / "samples" / "samples.npz")["arr_1"].tolist() == [1, 0, 9]
    with pytest.raises(ValueError, match=r"'0' is neither the name nor the label of a class. There are 10 classes"):
        run("sample", copied_chain, "sampling.classes=[0]")
    file.write_text(json.dumps(data | {"class_names": ["cat"], "labels": None}))
    with pytest.raises(ValueError, match=r"data\.json tells of 1 classes, the prior knows 10"):
        run("sample", copied_chain)
    file.unlink()  # of a run of earlier versions
    run("sample", copied_chain, "sampling.classes=[3]", "sampling.num_samples=2")
    assert np.load(copied_chain / "samples" / "samples.npz")["arr_1"].tolist() == [3, 3]

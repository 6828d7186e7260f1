"""`sampling.classes`: samples of some classes alone."""

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
    with pytest.raises(ValueError, match=r"are of the classes \[3, 5\] alone"):
        run("evaluate", copied_chain)
    before = contents(copied_chain)
    with pytest.raises(ValueError, match=r"sampling.classes: the prior knows the classes 0..9, got 12"):
        run("sample", copied_chain, "sampling.classes=[12]")
    assert contents(copied_chain) == before

"""Classes by name or by the label of the data: one rule for every kind of label column."""

import pytest
from datasets import Value

from dae.config import load_config, save_config
from dae.data import load_data
from dae.data.columns import resolve_classes


@pytest.mark.parametrize(
    ("names", "labels", "wanted", "numbers"),
    [
        (["0", "1", "2"], None, ["2", 0], [2, 0]),  # digits
        (["ant", "bee", "cat"], None, ["cat", "0", "cat", "ant"], [2, 0]),  # names, and the numbers of a ClassLabel
        (["1990", "2020"], [1990, 2020], [2020], [1]),  # gaps: no position
        (["1", "2", "3"], [1, 2, 3], [1, 3], [0, 2]),
        (["-1", "5"], [-1, 5], ["-1"], [0]),
        (["bee", "dog"], [1, 3], ["3", "bee"], [1, 0]),  # a ClassLabel of which two occur
        (["2", "0", "1"], None, ["2", "0"], [0, 1]),  # a name goes before a label
        (["a, b", "c #1", "0123"], ["a, b", "c #1", "0123"], ["0123", "a, b"], [2, 0]),
        (["caf\u00e9", "the"], ["caf\u00e9", "the"], ["cafe\u0301"], [0]),  # as macOS writes it
        (["x"], None, [], []),
    ],
)
def test_names_go_before_labels(names, labels, wanted, numbers):
    assert resolve_classes(wanted, names, labels) == numbers


@pytest.mark.parametrize(
    ("names", "labels", "wanted", "message"),
    [
        (["1990", "2020"], [1990, 2020], "0", "'0' is neither .*There are 2 classes: 1990, 2020$"),
        (["1990", "2020"], [1990, 2020], "1991", r"Did you mean '1990'\? There"),
        (["husky", "poodle"], None, "huskie", r"Did you mean 'husky'\? There are 2 classes: husky, poodle$"),
        (["husky", "poodle"], ["husky", "poodle"], 1, "'1' is neither"),
        (["image"], None, "cat", "There is 1 class: image$"),
        ([f"c{i}" for i in range(1000)], None, "dog", "There are 1,000 classes: c0, c1, c2, c3, c4 and 995 more$"),
    ],
)
def test_unknown_ones_are_one_line(names, labels, wanted, message):
    with pytest.raises(ValueError, match=message) as caught:
        resolve_classes([wanted], names, labels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[cat, 3]", "['cat', '3']", "\n  - cat\n  - 3"])
def test_entries_are_taken_as_they_are_written(tmp_path, text):
    (tmp_path / "c.yaml").write_text(f"sampling:\n  classes: {text}\n".replace("\n  - ", "\n    - "))
    config = load_config(tmp_path / "c.yaml")
    assert config.sampling.classes == ["cat", "3"]
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml").sampling.classes == ["cat", "3"]
    assert load_config(None, ["sampling.classes=[cat,3,0123,true]"]).sampling.classes == ["cat", "3", "0123", "true"]
    assert load_config(None, ["sampling.classes=cat"]).sampling.classes == ["cat"]


@pytest.mark.parametrize(
    ("column", "wanted", "numbers"),
    [
        ({"label": lambda i: 1990 + 30 * (i % 2), "feature": Value("int64")}, [2020], [1]),
        ({"label": lambda i: ["cat", "dog"][i % 2], "feature": Value("string")}, ["dog"], [1]),
        ({"label": lambda i: ["10", "9"][i % 2], "feature": Value("string")}, [9, 10], [0, 1]),
        ({"label": lambda i: bool(i % 2), "feature": Value("bool")}, ["True", "False"], [1, 0]),
        ({"label": lambda i: 1 + i % 2}, ["c", 1], [1, 0]),
    ],
)
def test_of_a_loaded_data_set(saved, table, column, wanted, numbers):
    """The rows of the class that an entry names have that name or that label."""
    data = load_data(saved(table(40, **column)), 0)
    assert resolve_classes(wanted, data.class_names, data.labels) == numbers
    described = data.describe()
    assert resolve_classes(wanted, described["class_names"], described["labels"]) == numbers
    decoder = data.train.decoder
    for entry, number in zip(wanted, numbers, strict=True):
        values = {row[decoder.labels.column] for row in data.train.rows if decoder.label(row) == number}
        assert len(values) == 1 and str(entry) in (data.class_names[number], *map(str, values))

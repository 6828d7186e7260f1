"""The table of what a run reads: the same facts as a table and as a stream, as far as a stream tells them."""

import pytest

from dae.data import load_data, summarize_data


@pytest.mark.parametrize("streaming", [False, True])
def test_the_table_says_what_is_read(tmp_path, png, configure, streaming):
    for label, count in (("ant", 12), ("bee", 8)):
        (tmp_path / label).mkdir()
        for i in range(count):
            (tmp_path / label / f"{i}.png").write_bytes(png(100 * count + i))
    (tmp_path / "notes.txt").write_text("x")
    data = load_data(configure(tmp_path, streaming=streaming), 0)
    facts = summarize_data(data)
    assert facts.splits == {"train": 20} and facts.rows == {"train": None if streaming else 18, "validation": 2}
    assert list(facts.classes) == ["ant", "bee"] and (streaming or sum(facts.classes.values()) == 18)
    assert list(facts.images) == ["RGB 6x6"] and facts.milliseconds > 0
    text = "\n".join(facts.lines())
    assert ("counts not known before the stream is read" in text) == streaming
    for words in (
        str(tmp_path),
        "found     train 20",
        "2: ant",
        "RGB 6x6",
        "1 file: suffix .txt is not read, notes.txt",
        "digest",
    ):
        assert words in text
    assert data.describe()["left_out"] == ["1 file: suffix .txt is not read, notes.txt"]


def test_many_classes_are_abbreviated_and_a_split_is_named(saved, table):
    names = [f"c{i:02}" for i in range(40)]
    rows = {"train": table(80, label=lambda i: i % 40, class_names=names), "test": table(40, start=500, class_names=names)}
    facts = summarize_data(load_data(saved(rows), 0))
    assert facts.rows == {"train": 80, "validation": 40} and facts.held_out == "the split 'test'"
    line = next(line for line in facts.lines() if line.startswith("classes"))
    assert line.startswith("classes   40: c00 2, ") and line.endswith("c09 2, ...")


def test_classes_without_rows_and_columns_that_are_not_read(saved, table):
    rows = table(20, label=lambda i: i % 2).add_column("breed", ["pug"] * 20)
    lines = summarize_data(load_data(saved(rows, num_classes=3), 0)).lines()
    assert "classes   3: a 9, b 9, c 0; 1 of them without a row to train on" in lines
    assert "read as   columns that are not read: breed" in lines


def test_unlabelled_rows(saved, table):
    facts = summarize_data(load_data(saved(table(20, label=None)), 0))
    assert facts.classes is None and "classes   none" in facts.lines()


def test_rows_that_are_known_to_be_bad_are_left_out(tmp_path, png, configure):
    for i in range(20):
        (tmp_path / f"{i:02}.png").write_bytes(png(i) if i != 4 else b"")
    data = load_data(configure(tmp_path, on_error="skip"), 0)
    assert any("1 row that cannot be decoded" in line and "04.png" in line for line in summarize_data(data).left_out)

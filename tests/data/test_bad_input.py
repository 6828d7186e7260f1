"""What is wrong with the data is said before anything is trained."""

import io
import tarfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dae.config import DataConfig
from dae.data import TrainLoader, load_data
from dae.data.sources import Source, SourceSplit

NOT_THERE = ["nobody/has-such-a-set", "digitz", "/no/such/folder", "./no", "no/*.parquet", "a.parquet", "b.tar", "what ?"]


@pytest.mark.parametrize("name", NOT_THERE)
@pytest.mark.parametrize("streaming", [False, True])
def test_unknown_data_set(name, streaming, monkeypatch):
    monkeypatch.setattr("dae.data.sources._hub_is_reachable", lambda: False)
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(FileNotFoundError) as raised:
        load_data(DataConfig(dataset_name=name, streaming=streaming), 0)
    assert sum(pauses) < 5  # seconds between attempts, which `datasets` repeats for minutes
    message = str(raised.value)
    assert repr(name) in message and "'digits'" in message and "'photos'" in message and "save_to_disk" in message
    if name == "nobody/has-such-a-set":
        assert "cannot be reached" in message


def test_the_offline_switch_is_put_back(monkeypatch):
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr("dae.data.sources._hub_is_reachable", lambda: False)
    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    with pytest.raises(FileNotFoundError):
        load_data(DataConfig(dataset_name="nobody/has-such-a-set"), 0)
    assert before == (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)


def test_an_unreachable_hub_is_noticed_quickly(monkeypatch):
    from huggingface_hub import constants

    from dae.data.sources import _hub_is_reachable

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    assert not _hub_is_reachable()
    assert sum(pauses) < 5  # seconds between attempts


def test_a_folder_and_a_file_of_no_known_form(tmp_path, configure):
    (tmp_path / "notes.txt").write_text("no images")
    with pytest.raises(ValueError, match="holds no images"):
        load_data(configure(tmp_path), 0)
    with pytest.raises(ValueError, match=r"\.txt"):
        load_data(configure(tmp_path / "notes.txt"), 0)


@pytest.mark.parametrize("name", ["a.parquet", "a.tar"])
def test_broken_files(tmp_path, configure, name):
    (tmp_path / name).write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match=f"{name}' is broken"):
        load_data(configure(tmp_path / name), 0)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("where", ["row group 2", "row group 14", "second .tar"])
def test_a_file_that_breaks_off(tmp_path, configure, table, png, where, streaming):
    """At the rows of a stream that are looked at first, and further on."""
    if where.startswith("row"):
        table(80).to_parquet(str(tmp_path / "a.parquet"), batch_size=5)
        with pq.ParquetFile(tmp_path / "a.parquet") as file:
            page = file.metadata.row_group(int(where.split()[-1])).column(0).data_page_offset
        data = bytearray((tmp_path / "a.parquet").read_bytes())
        data[page : page + 40] = b"\xff" * 40
        (tmp_path / "a.parquet").write_bytes(data)
    else:
        for name in ("0.tar", "1.tar"):
            with tarfile.open(tmp_path / name, "w") as file:
                for i in range(12):
                    member = tarfile.TarInfo(f"{i}.png")
                    member.size = len(png(i))
                    file.addfile(member, io.BytesIO(png(i)))
        (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:3000])
    with pytest.raises(ValueError, match="the stream breaks off: " if streaming else "is broken"):
        load_data(configure(tmp_path, streaming=streaming), 0)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("key", ["train_split", "validation_split"])
def test_unknown_split(saved, table, streaming, key):
    with pytest.raises(ValueError, match=rf"{key}='nope'.*\['test', 'train'\]"):
        load_data(saved({"train": table(9), "test": table(3)}, streaming=streaming, **{key: "nope"}), 0)


def test_training_and_validation_split_must_differ(saved, table):
    with pytest.raises(ValueError, match="both 'train'"):
        load_data(saved(table(9), validation_split="train"), 0)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("key", ["image_column", "label_column"])
def test_unknown_column(saved, table, streaming, key):
    with pytest.raises(ValueError, match=rf"{key}='nope'.*image \(Image\), label \(ClassLabel\)"):
        load_data(saved(table(9), streaming=streaming, **{key: "nope"}), 0)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_missing_in_the_held_out_split(saved, table, streaming):
    with pytest.raises(ValueError, match=r"split 'test': no label column 'label'.*image"):
        load_data(_two_folders(saved, table(20), table(5, label=None), streaming), 0)


def _two_folders(saved, train, test, streaming):
    """`DatasetDict` refuses splits with different columns; parquet files on disk may have them all the same."""
    config = saved({"train": train}, streaming=streaming)
    test.save_to_disk(f"{config.dataset_name}/test")
    Path(config.dataset_name, "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return config


def test_label_types_that_differ_between_splits(saved, table):
    with pytest.raises(ValueError, match="differs between the splits"):
        load_data(_two_folders(saved, table(20), table(5, class_names="xyz"), False), 0)


def test_no_image_column_and_several(saved):
    from datasets import Dataset

    with pytest.raises(ValueError, match=r"no column of type Image.*a \(int64\), b \(string\)"):
        load_data(saved(Dataset.from_dict({"a": [1, 2], "b": ["x", "y"]})), 0)


def test_several_image_columns(saved, table):
    rows = table(9)
    encoded = rows.with_format("arrow")[:].column("image").to_pylist()
    rows = rows.add_column("second", encoded).cast_column("second", rows.features["image"])
    with pytest.raises(ValueError, match=r"'image', 'second'"):
        load_data(saved(rows), 0)
    assert len(load_data(saved(rows, image_column="second"), 0).train) == 8


def as_stream(rows):
    from datasets import IterableDataset

    return IterableDataset.from_generator(lambda: iter(rows), features=rows.features)


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_sets(saved, table, streaming, tmp_path, configure, monkeypatch):
    for rows in ({"train": table(0), "test": table(2)}, {"train": table(20), "test": table(0)}):
        with pytest.raises(ValueError, match="split of it is empty"):
            load_data(saved(rows, streaming=streaming), 0)
        source = Source({name: SourceSplit(as_stream(part) if streaming else part) for name, part in rows.items()})
        monkeypatch.setattr("dae.data.load.read_splits", lambda config, source=source: source)
        with pytest.raises(ValueError, match=f"split '{'train' if not len(rows['train']) else 'test'}' is empty"):
            load_data(configure("hub", streaming=streaming), 0)
        monkeypatch.undo()
    with pytest.raises(ValueError, match="1 rows, too few"):
        load_data(saved(table(1), streaming=streaming), 0)


def test_fewer_rows_than_a_batch(saved, table, processes):
    data = load_data(saved(table(20)), 0)
    assert len(data.train) == 18
    TrainLoader(data.train, 18, seed=0)
    with pytest.raises(ValueError, match="18 rows, fewer than one global batch of 19"):
        TrainLoader(data.train, 19, seed=0)
    processes(0, 2)
    with pytest.raises(ValueError, match=r"18 rows.*global batch of 20 \(batch size 10 x 2 processes\)"):
        TrainLoader(data.train, 10, seed=0)


def test_a_stream_with_fewer_rows_than_a_batch(saved, table):
    data = load_data(saved(table(20), streaming=True), 0)
    with pytest.raises(ValueError, match="not one batch of 19 rows"):
        next(iter(TrainLoader(data.train, 19, seed=0)))


def _spoiled(table, png, bad, row=7):
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    images = [{"bytes": png(i), "path": None} for i in range(20)]
    images[row] = {"bytes": bad, "path": "photo.png"}
    return Dataset.from_dict({"image": images}, features=Features({"image": ImageFeature(decode=False)}))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("bad", [b"<html>404</html>", b"", b"\x89PNG"])
def test_bytes_that_are_no_image_are_found_at_load(saved, table, png, bad, streaming):
    config = saved(_spoiled(table, png, bad), streaming=streaming)
    with pytest.raises(ValueError, match=r"split 'train', row 7 \(photo\.png\).*no image"):
        load_data(config, 0)
    config.verify_rows = 7
    load_data(config, 0)
    config.verify_rows = -1
    with pytest.raises(ValueError, match="row 7"):
        load_data(config, 0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_truncated_image_names_its_row_when_it_is_decoded(saved, table, png, num_workers):
    data = load_data(saved(_spoiled(table, png, png(7)[:-60]), label_column="none"), 0)
    part = data.train if 7 in data.train.source_rows else data.validation
    with pytest.raises(ValueError, match=r"saved.*split 'train', row 7 \(photo\.png\): cannot decode"):
        for _ in zip(range(4), TrainLoader(part, len(part), seed=0, num_workers=num_workers), strict=False):
            pass
    with pytest.raises(ValueError, match="row 7"):
        part[part.source_rows.tolist().index(7)]


def test_a_truncated_image_in_a_stream_names_its_row(saved, table, png):
    data = load_data(saved(_spoiled(table, png, png(7)[:-60]), streaming=True), 0)
    with pytest.raises(ValueError, match=r"split 'train', row 7 of the stream.*photo\.png.*cannot decode"):
        list(data.train)


@pytest.mark.parametrize(
    "label, message", [(-1, "row 4: label -1 is out of range: expected 0 to 2"), (None, "row 4: the label.*is missing")]
)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_labels(saved, table, label, message, streaming):
    with pytest.raises(ValueError, match=f"split 'train', {message}"):
        load_data(saved(table(20, label=lambda i: label if i == 4 else i % 3), streaming=streaming), 0)


@pytest.mark.parametrize("streaming", [False, True])
def test_integer_labels_beyond_num_classes(saved, table, streaming):
    from datasets import Value

    rows = table(20, label=lambda i: 5 if i == 4 else i % 3, feature=Value("int64"))
    with pytest.raises(ValueError, match="row 4: label 5 is out of range: expected 0 to 2"):
        load_data(saved(rows, num_classes=3, streaming=streaming), 0)


def test_label_columns_that_cannot_be_classes(saved, table, configure, monkeypatch):
    from datasets import Value

    with pytest.raises(TypeError, match=r"float64.*label_column=none"):
        load_data(saved(table(9, label=lambda i: 0.5, feature=Value("float64"))), 0)
    for feature, value in ((Value("int64"), 1), (Value("string"), "x")):
        rows = table(20, label=lambda i, value=value: value, feature=feature)
        assert load_data(saved(rows, streaming=True), 0).class_names == [str(value)]  # a local table is read for its labels
        monkeypatch.setattr(
            "dae.data.load.read_splits", lambda config, rows=rows: Source({"train": SourceSplit(as_stream(rows))})
        )
        with pytest.raises(ValueError, match=r"classes of 'label' cannot be counted in a stream: set num_classes"):
            load_data(configure("hub", streaming=True), 0)
        monkeypatch.undo()
    with pytest.raises(ValueError, match=r"num_classes=4.*3 classes"):
        load_data(saved(table(9), num_classes=4), 0)


@pytest.mark.parametrize(
    "key, value",
    [
        ("resolution", 0),
        ("resolution", -3),
        ("channels", 0),
        ("channels", 2),
        ("max_train_samples", 0),
        ("validation_size", 0),
        ("num_classes", 0),
    ],
)
def test_numbers_out_of_range(saved, table, key, value):
    with pytest.raises(ValueError, match=f"{key}: expected"):
        load_data(saved(table(20), **{key: value}), 0)

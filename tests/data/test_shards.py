"""Parquet and WebDataset: every file is read into the right split or counted, and different sets are never mixed."""

import io
import json
import tarfile
from collections import Counter

import pytest

from dae.data import load_data
from dae.data.shards import splits_by_name
from dae.data.sources import read_splits


@pytest.fixture
def shard(tmp_path, table):
    """`shard("train-0.parquet", 20, ...)`: a file of so many rows with the classes a, b, c; 12 of them if nothing is said."""

    def write(name, rows=12, **options):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        table(rows, start=sum(map(ord, name)) * 100, **options).to_parquet(str(tmp_path / name))
        return tmp_path / name

    return write


@pytest.fixture
def tar(tmp_path, png):
    """`tar("x.tar", [("0.png", None), ("0.cls", "1")])`: None is a picture."""

    def write(name, members):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(tmp_path / name, "w") as file:
            for i, (member, data) in enumerate(members):
                data = png(i + sum(map(ord, name)) * 100) if data is None else data.encode()
                info = tarfile.TarInfo(member)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
        return tmp_path / name

    return write


def samples(fields, count=12):
    """Members of so many samples; `fields` gives for the suffix the text of sample i, None for a picture."""
    return [(f"{i:03}.{suffix}", text and text(i)) for i in range(count) for suffix, text in fields.items()]


def rows_of(config):
    """(rows to train on, rows held out by a split, classes or None, the source)."""
    data = load_data(config, 0)
    train, held_out = (sum(1 for _ in part.rows) for part in (data.train, data.validation))
    if data.train.decoder.origin == data.validation.decoder.origin:
        train, held_out = (train if config.streaming else train + held_out), 0
    return train, held_out, data.class_names if data.labelled else None, read_splits(config)


SPLITS = {
    "hub": (["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"], {"train": 2, "test": 1}),
    "with a digest": (["train-00000-of-00001-0a1b2c3d4e5f6789", "validation-00000-of-00001"], {"train": 1, "validation": 1}),
    "other splits of the hub": (["train-00000-of-00001", "unlabeled-00000-of-00001"], {"train": 1, "unlabeled": 1}),
    "plain": (["train", "val", "test"], {"train": 1, "val": 1, "test": 1}),
    "numbered": (["train_0", "train_1", "test.0"], {"train": 2, "test": 1}),
    "with the set's name": (["imagenet1k-train-0000", "imagenet1k-validation-0000"], {"train": 1, "validation": 1}),
    "folders": (["data/train/0000", "data/test/0000"], {"train": 1, "test": 1}),
    "no splits": (["00000", "00001"], {"train": 2}),
    "words that are no splits": (["latest-0", "contest-1", "trained-2"], {"train": 3}),
    "numbered folders": (["part-00/0", "part-01/0"], {"train": 2}),
}


@pytest.mark.parametrize("case", SPLITS)
def test_splits_by_convention(case):
    files, expected = SPLITS[case]
    for suffix in (".parquet", ".tar"):
        splits, _ = splits_by_name(sorted(file + suffix for file in files), "set", whole=True)
        assert {split: len(inside) for split, inside in splits.items()} == expected


UNCLEAR = {
    "some of no split": ["train-0", "extra"],
    "splits by no convention": ["training-0", "testing-0"],
    "a word in the middle": ["my_test_pictures", "pictures"],
    "dev": ["train-0", "dev-0"],
    "two sets": ["cifar-train", "mnist-train"],
    "two folders": ["a/0", "b/0"],
    "a folder beside": ["0", "more/0"],
    "sets with splits": ["a/train-0", "a/test-0", "b/train-0", "b/test-0"],
}


@pytest.mark.parametrize("case", UNCLEAR)
@pytest.mark.parametrize("whole", [False, True])
def test_shards_of_unclear_splits_are_refused(case, whole):
    with pytest.raises(ValueError, match=r"data.train_files= and data.validation_files= take paths and globs") as raised:
        splits_by_name(sorted(f"{name}.parquet" for name in UNCLEAR[case]), "set", whole=whole)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_glob_over_several_splits_keeps_them_apart(shard, tmp_path, configure, streaming):
    for name, rows in (("train-00000-of-00001", 12), ("validation-00000-of-00001", 5), ("test-00000-of-00001", 4)):
        shard(f"set/{name}.parquet", rows)
    for name in ("set", "set/*.parquet", "set/*", "s*/*.parquet", "set/**"):
        assert rows_of(configure(tmp_path / name, streaming=streaming))[:2] == (12, 5), name
    assert rows_of(configure(tmp_path / "set/te*", streaming=streaming))[:2] == (4, 0)  # one split, named: trained on
    assert rows_of(configure(tmp_path / "set/test-00000-of-00001.parquet", streaming=streaming))[:2] == (4, 0)
    both = {"train_files": f"{tmp_path}/set/[tv][ra]*", "validation_files": f"{tmp_path}/set/v*"}
    with pytest.raises(ValueError, match=r"1 of these files are trained on: .*validation"):
        load_data(configure("", streaming=streaming, **both), 0)
    both = {"train_files": [f"{tmp_path}/set/t*"], "validation_files": f"{tmp_path}/set/v*"}
    assert rows_of(configure("", streaming=streaming, **both))[:2] == (16, 5)


@pytest.mark.parametrize("streaming", [False, True])
def test_different_sets_are_not_merged(shard, tmp_path, configure, streaming):
    for name, classes in (("x", "abc"), ("y", "pqr")):
        shard(f"sets/{name}/train-0.parquet", class_names=classes)
        shard(f"sets/{name}/test-0.parquet", 4, class_names=classes)
    with pytest.raises(ValueError, match="several sets of files, in the folders x, y"):
        load_data(configure(tmp_path / "sets", streaming=streaming), 0)
    with pytest.raises(ValueError, match="several sets of files, in the folders x, y"):
        load_data(configure(tmp_path / "sets/*/*.parquet", streaming=streaming), 0)
    with pytest.raises(ValueError, match="cannot be one set: the classes of 'label' are a, b, c and p, q, r"):
        load_data(configure("", train_files=f"{tmp_path}/sets/*/train*", streaming=streaming), 0)
    files = {"train_files": f"{tmp_path}/sets/x/train*", "validation_files": f"{tmp_path}/sets/y/test*"}
    with pytest.raises(ValueError, match="label column 'label' differs between the splits"):
        load_data(configure("", streaming=streaming, **files), 0)
    shard("columns/0.parquet", label=None)
    shard("columns/1.parquet")
    with pytest.raises(ValueError, match="only one of them has label"):
        load_data(configure(tmp_path / "columns", streaming=streaming), 0)


def test_each_name_of_many_is_read(shard, tmp_path, png, saved, table, configure):
    (tmp_path / "0.png").write_bytes(png(0))
    files = [str(shard("a.parquet")), str(tmp_path / "0.png")]
    with pytest.raises(ValueError, match=r"'.*0\.png' holds image files, and .parquet files are read of the other names"):
        load_data(configure("", train_files=files), 0)
    name = saved(table(12)).dataset_name
    with pytest.raises(ValueError, match=r"validation_files='.*' was saved by `save_to_disk`: name it by data.dataset_name"):
        load_data(configure("", train_files=files[:1], validation_files=[name]), 0)
    with pytest.raises(ValueError, match=r"a\.parquet: no split validation_split='test'"):
        load_data(configure("plain", train_files=files[:1], validation_split="test"), 0)
    with pytest.raises(FileNotFoundError, match=r"train_files='digits': .*\. Expected a file, folder or glob of images"):
        load_data(configure("", train_files=["digits"]), 0)


@pytest.mark.parametrize("streaming", [False, True])
def test_other_files_beside_shards_are_counted(shard, tar, tmp_path, configure, png, streaming):
    from datasets import Dataset

    shard("set/train-0.parquet")
    shard("set/test-0.parquet", 4)
    (tmp_path / "set/preview.png").write_bytes(png(0))
    (tmp_path / "set/README.md").write_text("about")
    Dataset.from_dict({"n": [1]}).to_parquet(str(tmp_path / "set/stats.parquet"))
    train, test, _, source = rows_of(configure(tmp_path / "set", streaming=streaming))
    assert (train, test) == (12, 4) and source.left_out.counts == {
        ".parquet file without images": 1,
        "image beside .parquet files": 1,
        "suffix .md is not read": 1,
    }
    # as img2dataset writes it
    described = {"jpg": None, "txt": lambda i: "a caption", "json": lambda i: json.dumps({"url": "u", "key": str(i), "exif": {}})}
    for i in range(2):
        tar(f"web/0000{i}.tar", samples(described))
        Dataset.from_dict({"url": ["u"] * 12}).to_parquet(str(tmp_path / f"web/0000{i}.parquet"))
        (tmp_path / f"web/0000{i}_stats.json").write_text("{}")
    train, _, classes, source = rows_of(configure(tmp_path / "web", streaming=streaming))
    assert train == 24 and classes is None
    assert source.left_out.counts == {".parquet file without images": 2, "suffix .json is not read": 2}


@pytest.mark.parametrize("streaming", [False, True])
def test_the_kind_that_the_images_are_in_is_read(shard, tar, tmp_path, configure, png, streaming):
    for i in range(24):
        (tmp_path / "set" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / "ab"[i % 2] / f"{i}.png").write_bytes(png(i))
    (tmp_path / "set" / "broken.tar").write_bytes(b"no tar")
    (tmp_path / "set" / "broken.parquet").write_bytes(b"no parquet")
    tar("set/backup.tar", samples({"png": None}, 24))
    train, _, classes, source = rows_of(configure(tmp_path / "set", streaming=streaming))
    assert train == 24 and classes == ["a", "b"]
    assert sorted(source.left_out.counts.values()) == [1, 2]
    shard("set/0.parquet", 100)
    with pytest.raises(ValueError, match=r"several kinds, 24 in image files and 100 in \.parquet files and 24 in \.tar files"):
        load_data(configure(tmp_path / "set", streaming=streaming), 0)
    shard("set/0.parquet", 240)
    assert rows_of(configure(tmp_path / "set", streaming=streaming))[0] == 240


@pytest.mark.parametrize("streaming", [False, True])
def test_mixed_suffixes_in_a_tar(tar, configure, streaming, png):
    members = [m for i in range(12) for m in ((f"d/{i:03}.{('jpg', 'PNG', 'webp')[i % 3]}", None), (f"d/{i:03}.cls", str(i % 3)))]
    members += [("README.md", "about"), (".hidden.png", None), ("__MACOSX/d/0.png", None)]
    name = tar("x.tar", members)
    train, _, classes, source = rows_of(configure(name, streaming=streaming, num_classes=3))
    assert train == 12 and classes == ["0", "1", "2"]
    assert source.left_out.counts == {"sample of a .tar without an image": 1, "hidden file in a .tar": 2}
    data = load_data(configure(name, streaming=streaming, num_classes=3), 0)
    assert data.columns == {"image": "image", "label": "cls"}
    assert Counter(row["label"] for row in data.train)[0] in (3, 4)


@pytest.mark.parametrize("streaming", [False, True])
def test_every_member_of_a_tar_is_read_or_counted(tmp_path, configure, png, streaming):
    for folder in ("a", "b"):
        (tmp_path / "set" / folder).mkdir(parents=True)
        for i in range(6):
            (tmp_path / "set" / folder / f"{i}.png").write_bytes(png(i + ord(folder) * 100))
    (tmp_path / "set/a/0.npy").write_bytes(b"x")
    (tmp_path / "set/a/LICENSE").write_text("x")
    (tmp_path / "set/a/again.png").symlink_to("0.png")
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        file.add(tmp_path / "set", "set")
    train, _, classes, source = rows_of(configure(tmp_path / "x.tar", streaming=streaming))
    assert (train, classes) == (12, None) and source.notes == ["folders inside .tar files are no classes: set/a, set/b"]
    assert source.left_out.counts == {
        "suffix .npy is not read in a .tar": 1,
        "file without a suffix in a .tar": 1,
        "link in a .tar": 1,
    }


JSON = {
    "label": ({"label": lambda i: i % 3}, {}, ["0", "1", "2"]),
    "cls": ({"cls": lambda i: "xyz"[i % 3]}, {}, ["x", "y", "z"]),
    "class": ({"class": lambda i: 1990 + i % 2 * 30}, {}, ["1990", "2020"]),
    "another key": ({"breed": lambda i: ["pug", "chow"][i % 2]}, {"label_column": "json.breed"}, ["chow", "pug"]),
    "no label": ({"caption": str, "width": lambda i: 6}, {}, None),
}


@pytest.mark.parametrize("case", JSON)
def test_json_labels(tar, configure, case):
    keys, knobs, expected = JSON[case]
    text = lambda i: json.dumps({key: value(i) for key, value in keys.items()} | {"nested": {"x": 1}, "list": [1]})  # noqa: E731
    name = tar("x.tar", samples({"png": None, "json": text}, 24))
    assert rows_of(configure(name, **knobs))[2] == expected
    if expected is None:
        assert rows_of(configure(name, streaming=True))[2] is None
        return
    with pytest.raises(ValueError, match="cannot be counted in a stream: set num_classes"):
        load_data(configure(name, streaming=True, **knobs), 0)
    if case == "label":
        data = load_data(configure(name, streaming=True, num_classes=3), 0)
        assert Counter(row["label"] for row in data.train) + Counter(row["label"] for row in data.validation) == {
            0: 8,
            1: 8,
            2: 8,
        }


@pytest.mark.parametrize("streaming", [False, True])
def test_samples_of_several_images(tar, configure, streaming):
    name = tar("x.tar", samples({"jpg": None, "mask.png": None, "txt": lambda i: "pq"[i % 2]}))
    with pytest.raises(ValueError, match=r"several columns hold images: 'jpg', 'mask.png'; choose one with image_column"):
        load_data(configure(name, streaming=streaming), 0)
    assert rows_of(configure(name, streaming=streaming, image_column="jpg"))[0] == 12
    assert rows_of(configure(name, image_column="jpg", label_column="txt"))[2] == ["p", "q"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([*samples({"png": None}), *samples({"cls": str})], "files of sample '000' do not stand together; pack with `tar --sort"),
        ([("0.png", None), ("0.png", None)], r"two files of sample '0' end in \.png"),
        ([("0.png", None), ("0.json", "{")], r"0\.json cannot be read"),
        ([("0.txt", "x")], "no sample of .* has an image"),
        ([], "no sample of .* has an image"),
        ([(f"n01.{i}.png", None) for i in range(20)], r"images of samples end in 20 ways, 0\.png, 1\.png.*leave no other dots"),
    ],
)
def test_broken_samples(tar, configure, members, message, streaming):
    with pytest.raises(ValueError, match=message):
        load_data(configure(tar("x.tar", members), streaming=streaming), 0)


def test_a_tar_that_changed_is_read_again(tar, configure):
    name = tar("x.tar", samples({"png": None}))
    assert rows_of(configure(name))[0] == 12
    tar("x.tar", samples({"png": None}, 14))
    assert rows_of(configure(name))[0] == 14


LABELS = {
    "1 to 3": (lambda i: 1 + i % 3, "int64", ["1", "2", "3"]),
    "years": (lambda i: 1990 + i % 2 * 30, "int32", ["1990", "2020"]),
    "negative": (lambda i: i % 3 - 1, "int8", ["-1", "0", "1"]),
    "huge": (lambda i: 10**12 * (i % 2), "int64", ["0", "1000000000000"]),
    "texts": (lambda i: ["pear", "fig"][i % 2], "string", ["fig", "pear"]),
    "numbers as texts": (lambda i: ["10", "9"][i % 2], "string", ["9", "10"]),
    "two texts of one number": (lambda i: ["01", "1"][i % 2], "string", ["01", "1"]),
    "truth": (lambda i: i % 2 == 0, "bool", ["False", "True"]),
    "no gap": (lambda i: i % 3, "int64", ["0", "1", "2"]),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", LABELS)
def test_the_classes_are_the_labels_that_occur(shard, configure, case, streaming):
    from datasets import Value

    label, kind, expected = LABELS[case]
    name = shard("x.parquet", 24, label=label, feature=Value(kind))
    for knobs in ({}, {"num_classes": len(expected)}):
        data = load_data(configure(name, streaming=streaming, **knobs), 0)
        assert data.class_names == expected and data.describe()["class_names"] == expected
        for part in (data.train, data.validation):
            for row in part.rows:
                assert data.class_names[part.decoder.label(row)] == str(row["label"])


@pytest.mark.parametrize("streaming", [False, True])
def test_class_label_features_keep_the_classes_that_occur(shard, configure, streaming):
    name = shard("x.parquet", 24, label=lambda i: 1 + 2 * (i % 2), class_names="abcde")
    assert load_data(configure(name, streaming=streaming), 0).class_names == ["b", "d"]
    assert load_data(configure(name, streaming=streaming, num_classes=2), 0).class_names == ["b", "d"]
    assert load_data(configure(name, streaming=streaming, num_classes=5), 0).class_names == list("abcde")
    with pytest.raises(ValueError, match="num_classes=3, but the column 'label' has 5 classes, 2 of which occur"):
        load_data(configure(name, streaming=streaming, num_classes=3), 0)


@pytest.mark.parametrize("streaming", [False, True])
def test_ids_are_no_classes(shard, configure, streaming):
    from datasets import Value

    name = shard("x.parquet", 20, label=lambda i: 7 * i, feature=Value("int64"))
    with pytest.raises(ValueError, match=r"another value in each of its 20 rows: no classes to learn.*num_classes=20"):
        load_data(configure(name, streaming=streaming), 0)
    assert load_data(configure(name, streaming=streaming, num_classes=20), 0).num_classes == 20
    assert not load_data(configure(name, streaming=streaming, label_column="none"), 0).labelled


@pytest.mark.parametrize("streaming", [False, True])
def test_a_class_that_is_only_held_out_is_refused(shard, tmp_path, configure, streaming):
    shard("set/train-0.parquet", label=lambda i: i % 2)
    shard("set/test-0.parquet", 6)
    with pytest.raises(ValueError, match=r"split 'test', row 2: label 2 is out of range: expected 0 to 1"):
        load_data(configure(tmp_path / "set", streaming=streaming), 0)
    assert load_data(configure(tmp_path / "set", streaming=streaming, num_classes=3), 0).class_names == ["a", "b", "c"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["data[1]", "a b", "a#2", "ünï", "st*r", "q?", "{a,b}", "100%"])
def test_paths_of_shards_are_paths(shard, tar, tmp_path, configure, name, streaming):
    shard("data1.parquet", 5)  # what `data[1].parquet` would match as a pattern
    for path in (shard(f"{name}.parquet"), shard(f"{name}/x.parquet").parent, tar(f"{name}.tar", samples({"png": None}))):
        assert rows_of(configure(path, streaming=streaming))[0] == 12


def test_a_path_that_datasets_takes_for_a_chain_of_urls(shard, configure):
    path = shard("a.parquet")
    with pytest.raises(ValueError, match="chain of URLs; rename it"):
        load_data(configure(path.rename(path.with_name("a::b.parquet"))), 0)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_shards_may_say_differently_of_a_column(streaming, tmp_path, table, configure):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(number, kind, rows=12):
        images, labels = table(12, start=100 * number).with_format("arrow")[:].columns
        columns = {"image": images, "label": labels.cast(kind)}
        pq.write_table(pa.table(columns).slice(0, rows), tmp_path / f"{number}.parquet")

    write(0, pa.int64())
    write(2, pa.int64(), rows=0)
    for narrow in (pa.int8(), pa.int32(), pa.uint16()):
        write(1, narrow)
        train, _, classes, source = rows_of(configure(tmp_path, streaming=streaming))
        assert train == 24 and classes == ["0", "1", "2"]
        assert source.left_out.counts == {".parquet file without rows": 1}
    write(1, pa.string())
    with pytest.raises(ValueError, match="cannot be one set: the column 'label' is int64 and string"):
        load_data(configure(tmp_path, streaming=streaming), 0)
    for name in ("0.parquet", "1.parquet"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"holds no images: 1 file: \.parquet file without rows, 2\.parquet"):
        load_data(configure(tmp_path, streaming=streaming), 0)

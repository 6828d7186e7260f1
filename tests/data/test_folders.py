"""Image folders: every layout is read by the same rules, as a table and as a stream, or refused in one line."""

import io
import json
import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dae.data import load_data
from dae.data.files import IMAGE_SUFFIXES, LeftOut, expand
from dae.data.sources import read_splits


@pytest.fixture
def tree(tmp_path, png):
    """`tree({"cat": 3, "dog/husky": 2})`: a folder with so many distinct pictures in these folders."""

    def make(folders, root="set", name="{:03}.png"):
        seed = 1000 * len(list(tmp_path.iterdir()))
        for folder, count in folders.items():
            (tmp_path / root / folder).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                (tmp_path / root / folder / name.format(i)).write_bytes(png(seed := seed + 1))
        return tmp_path / root

    return make


def read(config):
    """(class names or None, {class or None: rows} of all rows read, rows held out by a split, the source)."""
    data, source = load_data(config, 0), read_splits(config)
    counts, held_out = Counter(), 0
    for part in (data.train, data.validation):
        for row in part.rows:
            counts[data.class_names[part.decoder.label(row)] if data.labelled else None] += 1
            held_out += part is data.validation
    if config.streaming and data.validation.decoder.origin == data.train.decoder.origin:
        for row in data.validation.rows:  # in the rows of the stream as well, where training passes over them
            counts[data.class_names[data.train.decoder.label(row)] if data.labelled else None] -= 1
    return data.class_names if data.labelled else None, dict(counts), held_out, source


# folders with their numbers of images, the knobs, the classes with their rows, and the rows of a held-out split
LAYOUTS = {
    "classes": ({"bee": 11, "ant": 10}, {}, {"ant": 10, "bee": 11}, None),
    "a class named train": ({"bus": 10, "car": 10, "train": 10}, {}, {"bus": 10, "car": 10, "train": 10}, None),
    "a class named test": ({"bus": 10, "test": 10}, {}, {"bus": 10, "test": 10}, None),
    "a class named dev": ({"bus": 10, "dev": 10}, {}, {"bus": 10, "dev": 10}, None),
    "classes with split-like names": ({"train-station": 10, "testing": 10}, {}, {"testing": 10, "train-station": 10}, None),
    "classes named like splits of other sets": ({"bus": 10, "Train": 10}, {}, {"Train": 10, "bus": 10}, None),
    "unequal depth": ({"cat": 10, "dog/husky": 10}, {}, {"cat": 10, "dog": 10}, None),
    "deeper folders": ({"cat/day": 9, "cat/night": 1, "dog/day": 10}, {}, {"cat": 10, "dog": 10}, None),
    "level 2": ({"cat/day": 9, "cat/night": 5, "dog/day": 6}, {"label_level": 2}, {"day": 15, "night": 5}, None),
    "level 0": ({"cat": 10, "dog": 10, ".": 10}, {"label_level": 0}, {None: 30}, None),
    "labels ignored": ({"cat": 10, "dog": 10, ".": 10}, {"label_column": "none"}, {None: 30}, None),
    "train alone": ({"train/cat": 10, "train/dog": 10}, {}, {"cat": 10, "dog": 10}, None),
    "train and test": ({"train/b": 10, "train/a": 10, "test/a": 2, "test/b": 3}, {}, {"a": 12, "b": 13}, 5),
    "val is validation": ({"train/a": 10, "train/b": 10, "val/a": 2, "test/b": 3}, {}, {"a": 12, "b": 10}, 2),
    "val by its name": ({"train/a": 9, "train/b": 9, "val/a": 2, "test/b": 3}, {"validation_split": "val"}, {"a": 11, "b": 9}, 2),
    "splits with deeper folders": ({"train/a/x": 10, "train/b": 10, "test/a": 2}, {}, {"a": 12, "b": 10}, 2),
    "flat splits": ({"train": 10, "test": 4}, {}, {None: 14}, 4),
    "flat": ({".": 20}, {}, {None: 20}, None),
    "one folder is no class": ({"cat": 20}, {}, {None: 20}, None),
    "one folder in each split": ({"train/images": 10, "test/images": 4}, {}, {None: 14}, 4),
    "other splits are left alone": ({"test/a": 10, "test/b": 10}, {"train_split": "test"}, {"a": 10, "b": 10}, None),
    "numbers in their order": ({"10": 5, "9": 5, "100": 5}, {}, {"9": 5, "10": 5, "100": 5}, None),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, streaming, tree, configure):
    folders, knobs, expected, held_out = LAYOUTS[layout]
    classes, counts, found, source = read(configure(tree(folders), streaming=streaming, **knobs))
    assert counts == expected and classes == (None if None in expected else list(expected))
    assert held_out in (None, found) and not source.left_out.counts


@pytest.mark.parametrize("streaming", [False, True])
def test_names_of_files_decide_nothing(streaming, tree, configure, png):
    root = tree({"a": 1, "b": 1})
    names = [
        "train.png",
        "test_1.png",
        "my-test.png",
        "train-00000-of-00001.png",
        "validation.png",
        "dev 1.png",
        "data/test/x.png",
    ]
    places = [root / label / name for name in names for label in "ab"]
    for number, place in enumerate(places):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(png(1000 + number))
    assert read(configure(root, streaming=streaming))[1] == {"a": 8, "b": 8}


REFUSED = {
    "splits beside classes": ({"bus": 5, "train": 5, "test": 5}, {}, r"train, test beside bus: splits or classes\?.*train_files"),
    "train with classes beside another": (
        {"train/a": 5, "train/b": 5, "extra": 5},
        {},
        r"train beside extra: splits or classes\?",
    ),
    "splits of another spelling": (
        {"Train/a": 5, "Train/b": 5, "Test/a": 2},
        {},
        r"Test, Train: splits or.*files=.*/Train ",
    ),
    "splits of other words": ({"train": 5, "valid": 5}, {}, r"the folders train, valid: splits or classes\?"),
    "several sets": ({"A/train/x": 4, "A/test/x": 2, "B/train/x": 4, "B/val/x": 2}, {}, r"splits of their own: A, B.*set/A"),
    "a folder around classes": (
        {"data/cat": 5, "data/dog": 5},
        {},
        r"one folder 'data', which holds the folders cat, dog.*label_level",
    ),
    "many beside classes": ({"a": 5, "b": 5, ".": 3}, {}, r"3 images lie beside the class folders.*hold 10.*label_level=0"),
    "many beside splits": ({"train/a": 5, "train/b": 5, ".": 3}, {}, r"3 images lie beside the split folders"),
    "a class that is not trained on": (
        {"train/a": 5, "train/b": 5, "test/c": 2},
        {},
        r"'test', row 0: label 'c' is none of.*a, b",
    ),
    "a flat split that is wanted": ({"train/a": 5, "train/b": 5, "test": 2}, {"validation_split": "test"}, r"no class folders"),
    "no train": ({"test/a": 5, "test/b": 5}, {}, r"no split train_split='train'; the splits are \['test'\]"),
    "a class that is not trained on, either": ({"train/a": 5, "train/b": 5, "test/c": 2}, {"num_classes": 4}, r"has 3 classes"),
    "a class for each row": ({f"c{i}": 1 for i in range(12)}, {}, r"another value in each of its 12 rows.*num_classes=12"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", REFUSED)
def test_what_could_be_read_in_two_ways_is_refused(layout, streaming, tree, configure):
    folders, knobs, message = REFUSED[layout]
    with pytest.raises(ValueError, match=message) as raised:
        load_data(configure(tree(folders), streaming=streaming, **knobs), 0)
    assert "\n" not in str(raised.value)


def test_the_remedies_of_the_refusals_work(tree, configure):
    root = tree({"bus": 10, "train": 10, "test": 10})
    assert read(configure("", train_files=f"{root}/*"))[1] == {"bus": 10, "train": 10, "test": 10}
    assert read(configure("", train_files=[f"{root}/train"], validation_files=f"{root}/test"))[1:3] == ({None: 20}, 10)
    sets = tree({"A/train": 4, "A/test": 2, "B/train": 4, "B/test": 2}, root="sets")
    files = {"train_files": f"{sets}/*/train", "validation_files": f"{sets}/*/test"}
    assert read(configure("", **files))[1:3] == ({"A": 6, "B": 6}, 4)
    assert read(configure("", train_files=f"{sets}/**"))[1] == {"A": 6, "B": 6}


@pytest.mark.parametrize("streaming", [False, True])
def test_few_images_in_other_places_are_counted(streaming, tree, configure):
    root = tree({"train/a": 10, "train/b": 10, "test": 4, "train": 2, ".": 1})
    _, counts, _, source = read(configure(root, streaming=streaming))
    assert counts == {"a": 10, "b": 10}
    assert source.left_out.counts == {
        "beside the split folders": 1,
        "beside the class folders": 2,
        "the split 'test' has no class folders, and the images to train on have": 4,
    }


def test_every_suffix_is_read_and_every_other_file_counted(tmp_path, configure):
    from PIL import features

    formats = {"jp": "JPEG", "jf": "JPEG", "av": "AVIF", "we": "WEBP", "ti": "TIFF", "gi": "GIF", "pn": "PNG", "ap": "PNG"}
    suffixes = sorted(IMAGE_SUFFIXES - ({".avif", ".avifs"} if "avif" not in features.get_supported_modules() else set()))
    for i, suffix in enumerate(suffixes + [suffix.upper() for suffix in suffixes]):
        kind = formats.get(suffix[1:3].lower(), "BMP" if suffix.lower() in (".bmp", ".dib") else "PPM")
        picture = Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 6, 3), dtype=np.uint8))
        picture.save(buffer := io.BytesIO(), "PPM" if suffix.lower() == ".pnm" else kind)
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[i % 2] / f"{i}{suffix}").write_bytes(buffer.getvalue())
    for name in ("notes.txt", "a/x.heic", "README", "b/pictures.zip", "old.TAR", ".DS_Store", ".git/config", "a/._0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    data = load_data(configure(tmp_path), 0)
    assert len(data.train) + len(data.validation) == 2 * len(suffixes)
    assert len({data.train[i]["label"] for i in range(len(data.train))}) == 2
    assert read_splits(configure(tmp_path)).left_out.counts == {
        "hidden file or folder": 3,
        "suffix .txt is not read": 1,
        "suffix .heic is not read": 1,
        "no suffix": 1,
        "archive beside images, not opened (.zip)": 1,
        "archive beside images, not opened (.tar)": 1,
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_links_are_followed_and_loops_are_not(streaming, tree, tmp_path, configure):
    source = tree({"cat": 10, "dog": 10}, root="source")
    root = tmp_path / "set"
    (root / "dog").mkdir(parents=True)
    os.symlink(source / "cat", root / "kitty")  # a folder
    for file in (source / "dog").iterdir():  # files, also out of the set
        os.symlink(file, root / "dog" / file.name)
    os.symlink(root, root / "dog" / "above")
    os.symlink(tmp_path / "nowhere", root / "dog" / "lost.png")
    os.symlink("itself.png", root / "dog" / "itself.png")
    os.mkfifo(root / "pipe.png")
    _, counts, _, found = read(configure(root, streaming=streaming))
    assert counts == {"dog": 10, "kitty": 10}
    assert found.left_out.counts == {
        "link to a folder that it lies in": 1,
        "broken symbolic link": 2,
        "neither file nor folder": 1,
    }
    os.symlink(root, tmp_path / "linked")
    assert read(configure(tmp_path / "linked", streaming=streaming))[1] == counts


NAMES = ["run[12]", "data[1]", "a b", "a#2", "ünï ☃", "st*r", "q?", "{a,b}", "100%", "a::b", "~x", "-n", "a=b", "new\nline"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_paths_are_paths(name, streaming, tree, configure, monkeypatch, tmp_path):
    tree({"a": 3, "b": 3}, root="run1")  # what `run[12]` and `st*r` would match as patterns
    tree({"a": 3, "b": 3}, root="star")
    root = tree({"a": 10, "b": 10}, root=name)
    monkeypatch.chdir(tmp_path)
    for written in (f"{root}/", f"./{name}", f"{root}/*/*.png"):
        assert read(configure(written, streaming=streaming))[1] == {"a": 10, "b": 10}, written
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read(configure(f"~/{name}", streaming=streaming))[1] == {"a": 10, "b": 10}


def test_the_fingerprint_does_not_depend_on_how_the_path_is_written(tree, configure, monkeypatch, tmp_path):
    root = tree({"a": 10, "b": 10})
    monkeypatch.chdir(tmp_path)
    os.symlink(root, tmp_path / "linked")
    names = (root, f"{root}/", "set", f"{root}/../set/", "linked", f"{root}/*")
    assert len({load_data(configure(name), 0).fingerprint for name in names}) == 1


def test_globs(tree, configure):
    root = tree({"cat": 10, "cow": 10, "dog/x": 10, ".cache/y": 1})
    wanted = {f"{root}/c*": {"cat": 10, "cow": 10}, f"{root}/*/0*": {"cat": 10, "cow": 10}}
    wanted |= {f"{root}/**": {"cat": 10, "cow": 10, "dog": 10}, f"{root}/**/00[0-4].png": {"cat": 5, "cow": 5, "dog": 5}}
    for name, counts in wanted.items():
        assert read(configure(name))[1] == counts, name
    files = {"train_files": [f"{root}/*/00[0-6]*", f"{root}/cat/00[5-7]*"], "validation_files": f"{root}/c*/00[89]*"}
    with pytest.raises(ValueError, match="no class folders, other images have"):  # `cat/` is the fixed part of its glob
        load_data(configure("", **files), 0)
    files["train_files"][1] = f"{root}/c[a]t/00[5-7]*"
    assert read(configure("", **files))[1] == {"cat": 10, "cow": 9}
    assert expand(f"{root}/none*", LeftOut()) is None


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("set/pliant", "did you mean '{root}/set/plain'"),
        ("sett/plain", "did you mean '{root}/set/plain'"),
        ("set/PLAIN/x", "did you mean '{root}/set/plain/x'"),
        ("set/nothing/like/it", "'{root}/set' holds plain"),
        ("set/*.parquet", "'{root}/set' holds plain"),
    ],
)
def test_a_mistyped_path_names_its_nearest_neighbour(tree, tmp_path, configure, written, message):
    tree({"plain/a": 2})
    with pytest.raises(FileNotFoundError) as raised:
        load_data(configure(tmp_path / written), 0)
    assert message.format(root=tmp_path) in str(raised.value)
    for key in ("train_files", "validation_files"):
        with pytest.raises(FileNotFoundError, match=rf"data\.{key}="):
            load_data(configure("digits", **{"channels": 1, "resolution": 8, key: str(tmp_path / written)}), 0)


def test_what_looks_like_a_path_is_not_asked_of_the_hub(tree, tmp_path, monkeypatch, configure):
    monkeypatch.setattr("dae.data.sources._hub_is_reachable", lambda: pytest.fail("asked the hub"))
    tree({"plain/a": 2})
    monkeypatch.chdir(tmp_path)
    for name in ("set/pliant", "./pliant", "~/pliant", "../pliant", "", "pliant.parquet", "/pliant", "set/a/b"):
        with pytest.raises(FileNotFoundError, match=f"no file or folder matches data.dataset_name='{name}'"):
            load_data(configure(name), 0)


def test_an_id_of_the_hub_is_announced_and_names_what_is_here(tree, tmp_path, monkeypatch, configure, caplog):
    monkeypatch.setattr("dae.data.sources._hub_is_reachable", lambda: False)
    tree({"a": 2}, root="pictures")
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    with pytest.raises(FileNotFoundError, match="Did you mean 'pictures'"):
        load_data(configure("picturs"), 0)
    assert "looking for a data set of this name on the Hugging Face hub" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_files_named_twice_and_in_both_splits(streaming, tree, configure):
    root = tree({"a": 10, "b": 10})
    both = configure("", streaming=streaming, train_files=f"{root}/**", validation_files=f"{root}/*/00[0-2]*")
    with pytest.raises(ValueError, match=r"6 of these files are trained on.*000\.png"):
        load_data(both, 0)
    assert read(configure("", streaming=streaming, train_files=[f"{root}/**", f"{root}/*/*"]))[1] == {"a": 10, "b": 10}
    for again in (f"{root}/a", f"{root}/../{root.name}", f"{root}/a/000.png"):
        assert read(configure("", streaming=streaming, train_files=[str(root), again]))[1] == {"a": 10, "b": 10}
    with pytest.raises(ValueError, match="validation_split='test': expected one"):
        load_data(configure(root, validation_files=f"{root}/a", validation_split="test"), 0)
    with pytest.raises(ValueError, match="holds the splits train, test: name one"):
        splits = tree({"train/a": 2, "train/b": 2, "test/a": 2}, root="splits")
        load_data(configure("", train_files=str(splits)), 0)


def test_a_stream_is_not_sorted_by_class(tree, configure):
    data = load_data(configure(tree({"a": 40, "b": 40}), streaming=True, validation_size=8), 0)
    assert {data.train.decoder.label(row) for row in data.train.rows.take(12)} == {0, 1}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_files(kind, streaming, tree, configure):
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    root = tree({"train": 20, "test": 6})
    names = [f"train/{i:03}.png" for i in range(19)] + [f"test/{i:03}.png" for i in range(7)]
    table = pa.table({"file_name": names, "label": ["xy"[i % 2] for i in range(26)], "caption": ["c"] * 26})
    if kind == "jsonl":
        (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        (pa.csv.write_csv if kind == "csv" else pa.parquet.write_table)(table, root / f"metadata.{kind}")
    _, counts, held_out, source = read(configure(root, streaming=streaming))
    assert counts == {"x": 13, "y": 12} and held_out == 6
    assert source.left_out.counts == {"named by a metadata file, but not there": 1, "image that no metadata file names": 1}
    with pytest.raises(ValueError, match="label_column='nope'"):
        load_data(configure(root, streaming=streaming, label_column="nope"), 0)


def test_metadata_that_cannot_be_used(tree, configure):
    root = tree({"a": 3})
    for text, message in (("name,label\n", "no column `file_name`"), ("file_name\n../x.png\n", "a path inside of its folder")):
        (root / "metadata.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_data(configure(root), 0)
    for text, message in (
        ("file_name,label\na/000.png,é\n", "'label' is not UTF-8"),
        ("file_name,x,x\na/000.png,1,2\n", "have one name"),
    ):
        (root / "metadata.csv").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=message):
            load_data(configure(root), 0)
    (root / "metadata.csv").unlink()
    (root / "metadata.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"metadata\.jsonl' is broken"):
        load_data(configure(root), 0)
    (root / "metadata.jsonl").unlink()
    for text in ("file_name,label\n", "file_name,label\n000,1\n"):
        (root / "metadata.csv").write_text(text)
        with pytest.raises(ValueError, match=r"the metadata files name none of the images: .*3 files: image that no metadata"):
            load_data(configure(root), 0)
    (root / "metadata.csv").write_text("file_name,label\na/000.png,1\n")
    (root / "metadata.jsonl").write_text('{"file_name": "a/000.png", "label": 2}\n')
    with pytest.raises(ValueError, match=r"the image 'a/000\.png' is named by another metadata file too"):
        load_data(configure(root), 0)


def test_a_level_without_folders_is_refused(tree, configure):
    root = tree({"a/x": 12, "b/y": 12})
    assert load_data(configure(root, label_level=2), 0).class_names == ["x", "y"]
    with pytest.raises(ValueError, match=r"data\.label_level=3, but no image lies in so many folders"):
        load_data(configure(root, label_level=3), 0)

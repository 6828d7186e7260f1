"""Every source and every way to ask for the wrong thing."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dae.config import DataConfig
from dae.data import TrainLoader, evaluation_batches, load_data
from dae.data.builtin import PHOTOS


def images_of(dataset):
    return torch.cat([batch["image"] for batch in evaluation_batches(dataset, 16)])


def labels_of(dataset):
    return torch.cat([batch["label"] for batch in evaluation_batches(dataset, 16)]).tolist()


def as_set(dataset):
    return {image.numpy().tobytes() for image in images_of(dataset)}


def expect(png, seeds):
    arrays = [np.asarray(Image.open(io.BytesIO(png(seed)))) for seed in seeds]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_digits():
    from sklearn.datasets import load_digits

    data = load_data(DataConfig(), seed=0)
    assert (len(data.train), len(data.validation), data.num_classes, data.labelled) == (1437, 360, 10, True)
    assert data.class_names == [str(i) for i in range(10)]
    row = data.train[5]
    assert row["image"].shape == (1, 8, 8) and row["image"].dtype == torch.float32 and row["row"] == 5
    digits = load_digits()
    grey = np.rint(digits.images.reshape(1797, 64) * 255 / 16).astype(int)
    truth = sorted((int(label), tuple(row)) for row, label in zip(grey, digits.target, strict=True))
    read = []
    for part in (data.train, data.validation):
        for image, label in zip(images_of(part), labels_of(part), strict=True):
            read.append((label, tuple(((image.flatten() + 1) * 127.5).round().int().tolist())))
    assert sorted(read) == truth  # both parts together are the whole set, so they are disjoint
    held_out, total = np.bincount(labels_of(data.validation)), np.bincount(digits.target)
    assert np.abs(held_out - total * 360 / 1797).max() < 1  # stratified


def test_digits_are_split_the_same_for_every_seed_and_as_a_stream():
    config = DataConfig()
    assert torch.equal(images_of(load_data(config, 0).validation), images_of(load_data(config, 1).validation))
    stream = load_data(DataConfig(streaming=True), 0)
    assert torch.equal(images_of(stream.train), images_of(load_data(config, 0).train))
    assert stream.describe()["train"] is None


def test_photos_are_split_by_photograph():
    data = load_data(DataConfig(dataset_name="photos", resolution=64, channels=3), seed=0)
    assert not data.labelled and data.num_classes == 1 and set(labels_of(data.validation)) == {0}
    assert 500 < len(data.train) <= 4096 and 100 < len(data.validation) <= 512
    assert not as_set(data.train) & as_set(data.validation)
    with pytest.raises(ValueError, match="label 13 is out of range"):  # no photograph is in both splits
        load_data(DataConfig(dataset_name="photos", resolution=64, channels=3, label_column="photograph"), seed=0)
    config = DataConfig(dataset_name="photos", resolution=64, channels=3, label_column="photograph", num_classes=17)
    named = load_data(config, seed=0)
    assert named.labelled and named.num_classes == len(PHOTOS["train"] + PHOTOS["test"]) == 17
    train, test = set(named.train.rows["photograph"]), set(named.validation.rows["photograph"])
    assert not train & test and train | test == set(range(17))


@pytest.mark.parametrize("resolution", [8, 300])
def test_photos_at_other_resolutions(resolution):
    data = load_data(DataConfig(dataset_name="photos", resolution=resolution, channels=1), seed=0)
    assert data.train[0]["image"].shape == (1, resolution, resolution) and len(data.train) >= 13 and len(data.validation) >= 4


def test_photos_without_the_package_say_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "decoupled-autoencoder\[photos\]"'):
        load_data(DataConfig(dataset_name="photos", resolution=32), seed=0)


KINDS = ["saved", "saved dict", "parquet file", "parquet folder", "parquet glob", "imagefolder", "class folders"]
KINDS += ["tar", "tar folder"]


@pytest.fixture(params=KINDS)
def source(request, tmp_path, table, png):
    """(name, has a test split, is labelled); training pictures are 0..39, held-out ones 100..109."""
    from datasets import DatasetDict

    kind, root = request.param, tmp_path / "set"
    root.mkdir()
    train, test = table(40), table(10, start=100)
    if kind == "saved":
        train.save_to_disk(str(root))
    elif kind == "saved dict":
        DatasetDict(train=train, test=test).save_to_disk(str(root))
    elif kind.startswith("parquet"):
        train.to_parquet(str(root / "train-0.parquet"))
        if kind == "parquet folder":
            test.to_parquet(str(root / "test-0.parquet"))
        root = {"parquet file": root / "train-0.parquet", "parquet glob": root / "*.parquet"}.get(kind, root)
    elif kind in ("imagefolder", "class folders"):
        for split, count, start in (("train", 40, 0), ("test", 10, 100)) if kind == "imagefolder" else ((".", 40, 0),):
            for i in range(count):
                folder = root / split / (".abc"[i % 3 + 1] if kind == "class folders" or split != "." else "")
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{i:03}.png").write_bytes(png(start + i))
    else:
        for name, count, start in (("train-0", 40, 0), ("test-0", 10, 100))[: 2 if kind == "tar folder" else 1]:
            with tarfile.open(root / f"{name}.tar", "w") as tar:
                for i in range(count):
                    for suffix, data in (("png", png(start + i)), ("cls", str(i % 3).encode())):
                        member = tarfile.TarInfo(f"{i:03}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        root = root / "train-0.tar" if kind == "tar" else root
    return str(root), kind in ("saved dict", "parquet folder", "imagefolder", "tar folder")


@pytest.mark.parametrize("streaming", [False, True])
def test_sources(source, streaming, configure, png):
    name, has_test = source
    data = load_data(configure(name, streaming=streaming, num_classes=3), seed=0)
    assert data.num_classes == 3 and data.labelled
    train, validation = images_of(data.train), images_of(data.validation)
    together = torch.cat([train, validation])
    truth = expect(png, [*range(40), *range(100, 110)] if has_test else range(40))
    assert sorted(map(str, together.flatten(1).tolist())) == sorted(map(str, truth.flatten(1).tolist()))
    assert len(validation) == (10 if has_test else 4)
    pictures = {str(image.flatten().tolist()): i for i, image in enumerate(expect(png, range(40)))}
    for image, label in zip(train, labels_of(data.train), strict=True):
        assert pictures[str(image.flatten().tolist())] % 3 == label
    described = json.loads(json.dumps(data.describe()))
    assert described["name"] == name and described["train"] == (None if streaming else len(train))


def test_relative_paths_of_a_saved_set_start_at_its_folder(tmp_path, png, configure, monkeypatch):
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(decode=False)})
    rows = Dataset.from_dict({"image": [{"bytes": None, "path": f"{i}.png"} for i in range(10)]}, features=features)
    (tmp_path / "set").mkdir()
    for i in range(10):
        (tmp_path / "set" / f"{i}.png").write_bytes(png(i))
    monkeypatch.chdir(tmp_path / "set")
    rows.save_to_disk(".")
    monkeypatch.chdir(tmp_path)
    data = load_data(configure(tmp_path / "set"), 0)
    assert len(as_set(data.train)) == 9 and not data.labelled


def test_columns_of_arrays_bytes_and_structs(saved, png):
    from datasets import Array2D, Array3D, Dataset, Features, Value

    grey = np.random.default_rng(0).integers(0, 256, (20, 6, 6), dtype=np.uint8)
    for feature, values in (
        (Array2D((6, 6), "uint8"), grey),
        (Array3D((3, 6, 6), "uint8"), np.repeat(grey[:, None], 3, 1)),
        (Value("binary"), [png(i) for i in range(20)]),
        ({"bytes": Value("binary"), "path": Value("string")}, [{"bytes": png(i), "path": None} for i in range(20)]),
    ):
        config = saved(Dataset.from_dict({"x": list(values)}, features=Features({"x": feature})), label_column="none")
        data = load_data(config, 0)
        assert data.columns["image"] == "x" and len(as_set(data.train)) == 18
        if isinstance(feature, Array2D):
            assert torch.equal(data.train[0]["image"][0], torch.from_numpy(grey[data.train.source_rows[0]]).float() / 127.5 - 1)


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_split_is_found_by_name(saved, table, streaming):
    rows = {"train": table(12), "test": table(3, start=50), "val": table(4, start=70), "extra": table(5, start=80)}
    assert len(images_of(load_data(saved(rows, streaming=streaming), 0).validation)) == 3
    assert len(images_of(load_data(saved(rows, streaming=streaming, validation_split="extra"), 0).validation)) == 5
    none = load_data(saved(rows, streaming=streaming, validation_split="none", validation_size=1), 0)
    assert (len(images_of(none.train)), len(images_of(none.validation))) == (11, 1)  # held out of training nevertheless
    rows["validation"] = table(2, start=90)
    assert len(images_of(load_data(saved(rows, streaming=streaming), 0).validation)) == 2
    other = saved(rows, streaming=streaming, train_split="validation", num_classes=3)
    assert len(images_of(load_data(other, 0).train)) == 2


def test_held_out_rows_are_stratified_disjoint_and_fixed(saved, table):
    config = saved(table(100, label=lambda i: 0 if i < 80 else 1 + i % 2), validation_size=1000)
    data = load_data(config, seed=0)
    assert np.bincount(labels_of(data.validation)).tolist() == [8, 1, 1]
    assert len(data.train) == 90 and not as_set(data.train) & as_set(data.validation)
    assert torch.equal(images_of(load_data(config, seed=9).validation), images_of(data.validation))
    config.validation_size = 5
    assert len(load_data(config, 0).validation) == 5


def test_stream_holds_out_the_same_rows_whatever_the_workers(saved, table):
    config = saved(table(60, label=None), streaming=True, validation_size=6)
    data = load_data(config, 0)
    held_out = as_set(data.validation)
    assert len(held_out) == 6
    loader = iter(TrainLoader(data.train, 1, seed=0, num_workers=2, shuffle_buffer_size=4))
    seen = {next(loader)["image"].numpy().tobytes() for _ in range(54)}
    assert len(seen) == 54 and not seen & held_out


def test_max_train_samples(saved, table):
    config = saved(table(50), max_train_samples=7)
    first, again, other = (load_data(config, seed) for seed in (0, 0, 1))
    assert len(first.train) == 7 and torch.equal(images_of(first.train), images_of(again.train))
    assert as_set(first.train) != as_set(other.train)
    assert not as_set(other.train) & as_set(other.validation) and first.fingerprint != other.fingerprint
    config.streaming = True
    assert len(images_of(load_data(config, 0).train)) == 7


def test_string_and_integer_labels(saved, table):
    from datasets import Value

    data = load_data(saved(table(30, label=lambda i: ("pear", "apple", "fig")[i % 3], feature=Value("string"))), 0)
    assert data.class_names == ["apple", "fig", "pear"]
    assert {(row["label"], int(data.train.source_rows[i]) % 3) for i, row in enumerate(data.train)} == {(2, 0), (0, 1), (1, 2)}
    numbers = table(30, label=lambda i: i % 5, feature=Value("int32"))
    assert load_data(saved(numbers), 0).num_classes == 5
    assert load_data(saved(numbers, num_classes=9), 0).num_classes == 9
    assert load_data(saved(numbers, num_classes=5, streaming=True), 0).num_classes == 5
    ignored = load_data(saved(numbers, label_column="none"), 0)
    assert not ignored.labelled and set(labels_of(ignored.train)) == {0} and ignored.class_names == ["image"]


def test_grey_and_crop_follow_the_configuration(saved, table):
    assert load_data(saved(table(20), channels=1, resolution=5), 0).train[0]["image"].shape == (1, 5, 5)


def test_fingerprint_follows_what_the_model_sees(saved, table):
    base = load_data(saved(table(20)), 0).fingerprint
    assert load_data(saved(table(20), random_flip=True, random_affine=1.0, num_workers=3), 5).fingerprint == base
    changes = [{"resolution": 5}, {"channels": 1}, {"center_crop": False}, {"label_column": "none"}]
    changes += [{"validation_size": 1}, {"max_train_samples": 4}]
    prints = [load_data(saved(table(20), **change), 0).fingerprint for change in changes]
    others = [table(21), table(20, start=1), table(20, label=lambda i: 0), table(20, class_names="xyz")]
    others.append({"train": table(20), "test": table(20)})
    prints += [load_data(saved(rows), 0).fingerprint for rows in others]
    prints.append(load_data(saved(table(20), streaming=True), 0).fingerprint)
    assert len({base, *prints}) == 1 + len(prints)


def test_fingerprint_is_the_same_in_another_process_and_place(saved, table, tmp_path):
    config = saved(table(20))
    moved = tmp_path / "moved"
    shutil.copytree(config.dataset_name, moved)
    code = (
        "from dae.config import DataConfig; from dae.data import load_data\n"
        "for streaming in (False, True):\n"
        f"    config = DataConfig(dataset_name={str(moved)!r}, resolution=6, channels=3, streaming=streaming)\n"
        "    print(load_data(config, 7).fingerprint)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert other == [load_data(replace(config, streaming=streaming), 0).fingerprint for streaming in (False, True)]


def test_fingerprint_of_a_large_set_sees_every_size_and_the_sampled_bytes(saved, table, monkeypatch):
    monkeypatch.setattr("dae.data.partition.WHOLE_DIGEST_BYTES", 10)
    monkeypatch.setattr("dae.data.partition.DIGEST_ROWS", 2)
    base = load_data(saved(table(20)), 0).fingerprint
    assert load_data(saved(table(20)), 0).fingerprint == base
    assert load_data(saved(table(20, start=1)), 0).fingerprint != base


def test_importing_dae_does_not_import_datasets():
    code = "import dae.data, sys; print([m for m in ('datasets', 'torchdata', 'sklearn', 'skimage') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"

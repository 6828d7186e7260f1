"""Held-out rows and the rows that are looked at first are chosen by their content, spread over a set in whatever order."""

import io
import tarfile

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature

from dae.data import TrainLoader, evaluation_batches, in_memory, load_data
from dae.data.survey import UNREADABLE, Survey, choose_held_out

CLASSES, EACH = 4, 15


def class_of(i):
    return i // EACH  # sorted


def identities(dataset, **options):
    """The images, as a set of bytes."""
    return {image.numpy().tobytes() for batch in evaluation_batches(dataset, 7, **options) for image in batch["image"]}


def labels(dataset, **options):
    return np.bincount(torch.cat([b["label"] for b in evaluation_batches(dataset, 7, **options)]), minlength=CLASSES).tolist()


@pytest.fixture
def sorted_table(png):
    """`sorted_table(numbers)`: rows with these pictures; picture i is of class i // EACH."""
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list("abcd"))})

    def make(numbers, label=class_of):
        images = [{"bytes": png(i), "path": None} for i in numbers]
        return Dataset.from_dict({"image": images, "label": [label(i) for i in numbers]}, features=features)

    return make


@pytest.fixture(params=["saved", "parquet", "folder", "tar"])
def source(request, tmp_path, sorted_table, png):
    """The same class-sorted pictures in four forms."""
    root, everything = tmp_path / "set", range(CLASSES * EACH)
    root.mkdir()
    if request.param == "saved":
        sorted_table(everything).save_to_disk(str(root))
    elif request.param == "parquet":
        sorted_table(everything).to_parquet(str(root / "train.parquet"), batch_size=10)
    elif request.param == "folder":
        for i in everything:
            (root / "abcd"[class_of(i)]).mkdir(exist_ok=True)
            (root / "abcd"[class_of(i)] / f"{i:03}.png").write_bytes(png(i))
    else:
        with tarfile.open(root / "train.tar", "w") as tar:
            for i in everything:
                for suffix, data in (("png", png(i)), ("cls", str(class_of(i)).encode())):
                    member = tarfile.TarInfo(f"{i:03}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return root


def test_held_out_rows_are_of_all_classes_and_the_same_in_every_form(source, configure, sorted_table, saved):
    shuffled = np.random.default_rng(0).permutation(CLASSES * EACH).tolist()
    truth = identities(load_data(saved(sorted_table(shuffled), validation_size=4), 0).validation)
    for streaming in (False, True):
        data = load_data(configure(source, streaming=streaming, num_classes=CLASSES, validation_size=4), 0)
        assert labels(data.validation) == [1] * CLASSES and identities(data.validation) == truth
        assert labels(data.train) == [EACH - 1] * CLASSES and not identities(data.train) & truth


@pytest.mark.parametrize("streaming", [False, True])
def test_the_rows_of_a_validation_are_of_all_classes(saved, sorted_table, streaming):
    config = saved({"train": sorted_table(range(30)), "test": sorted_table(range(60))}, streaming=streaming, num_classes=CLASSES)
    validation = load_data(config, 0).validation
    for limit in (4, 8, 20):
        assert labels(validation, limit=limit) == [limit // CLASSES] * CLASSES
        assert identities(validation, limit=limit) < identities(validation, limit=limit + 4)
    assert identities(validation, limit=8, num_workers=1) == identities(validation, limit=8)
    assert identities(validation, limit=60) == identities(validation, limit=100) == identities(validation)
    images, found = in_memory(validation, 12, seed=0, batch_size=5)
    assert len(images) == 12 and (not streaming or np.bincount(found).tolist() == [3] * CLASSES)


def test_table_and_stream_look_at_the_same_rows(saved, sorted_table):
    rows = {"train": sorted_table(range(30)), "test": sorted_table(range(60))}
    table, stream = (
        load_data(saved(rows, streaming=streaming, num_classes=CLASSES), 0).validation for streaming in (False, True)
    )
    assert identities(table, limit=10) == identities(stream, limit=10)


def test_max_train_samples_of_a_sorted_stream(saved, sorted_table):
    config = saved(sorted_table(range(60)), streaming=True, max_train_samples=8, validation_size=4)
    data = load_data(config, 0)
    assert labels(data.train) == [2] * CLASSES and not identities(data.train) & identities(data.validation)
    seen = [batch["row"].tolist() for _, batch in zip(range(4), TrainLoader(data.train, 4, seed=0), strict=False)]
    assert sorted(seen[0] + seen[1]) == list(range(8))


@pytest.mark.parametrize("world, num_workers", [(1, 2), (2, 0), (3, 1)])
def test_no_process_and_no_worker_trains_on_a_held_out_row(saved, sorted_table, processes, world, num_workers):
    for streaming in (False, True):
        config, seen, held_out = saved(sorted_table(range(60)), streaming=streaming, validation_size=6), set(), []
        for rank in range(world):
            processes(rank, world)
            data = load_data(config, seed=rank)
            held_out.append(identities(data.validation, num_workers=num_workers))
            loader = TrainLoader(data.train, 2, seed=0, num_workers=num_workers, shuffle_buffer_size=5)
            for _, batch in zip(range(2 * 54 // (2 * world)), loader, strict=False):
                seen |= {image.numpy().tobytes() for image in batch["image"]}
        assert all(each == held_out[0] for each in held_out) and len(held_out[0]) == 6
        assert not seen & held_out[0] and len(seen) > 40


def test_names_and_order_do_not_matter_and_few_rows_change_when_some_are_added(tmp_path, png, configure):
    def held_out(name, files):
        for file, i in files.items():
            (tmp_path / name / "x").mkdir(parents=True, exist_ok=True)
            (tmp_path / name / "x" / file).write_bytes(png(i))
        return identities(load_data(configure(tmp_path / name, validation_size=5), 0).validation)

    before = held_out("before", {f"{i:03}.png": i for i in range(50)})
    assert held_out("renamed", {f"{(i * 7) % 50:03}-renamed.png": i for i in range(50)}) == before
    after = held_out("more", {f"{i:03}.png": i for i in range(60)})
    data = load_data(configure(tmp_path / "more", validation_size=5), 0)
    added = {data.train.decoder.decode({"image": png(i), "label": 0}, 0, "")["image"].numpy().tobytes() for i in range(50, 60)}
    assert after <= before | added


@pytest.mark.parametrize("streaming", [False, True])
def test_no_copy_of_a_held_out_image_is_trained_on(saved, sorted_table, streaming):
    numbers = [*range(40), *range(40), *range(20)]
    data = load_data(saved(sorted_table(numbers), streaming=streaming, validation_size=10), 0)
    held_out, train = identities(data.validation), identities(data.train)
    assert len(held_out) == 4 and len(train) == 36 and not held_out & train
    same = saved(sorted_table([3] * 30), streaming=streaming)
    with pytest.raises(ValueError, match=r"1 rows, too few to hold some out \(copies of an image count once\)"):
        load_data(same, 0)


@pytest.mark.parametrize("form", ["shards", "row groups"])
def test_a_stream_too_long_to_be_read_is_looked_at_all_over(saved, sorted_table, configure, tmp_path, monkeypatch, form):
    monkeypatch.setattr("dae.data.survey.LOCAL", (1 << 30, 24))
    monkeypatch.setattr("dae.data.survey.PARTS", 8)
    config = saved(sorted_table(range(60)), validation_size=4, streaming=True)
    if form == "row groups":
        sorted_table(range(60)).to_parquet(str(tmp_path / "a.parquet"), batch_size=8)
        config = configure(tmp_path / "a.parquet", validation_size=4, streaming=True)
    data = load_data(config, 0)
    assert len(data.train.survey) == 24  # 3 of each part
    assert len(data.validation) == 2 and len(set(data.validation.rows["label"])) == 2
    assert len(identities(data.train)) == 58 and not identities(data.train) & identities(data.validation)
    assert all(labels(data.train, limit=12))
    config.max_train_samples = 8
    assert all(labels(load_data(config, 0).train))


@pytest.mark.parametrize("sizes", [[100], [40, 40, 40], [1, 2, 3, 50, 400], [1000, 999, 3], [1] * 30])
def test_every_beginning_has_of_each_class_its_share(sizes):
    random, total = np.random.default_rng(len(sizes)), sum(sizes)
    classes = np.repeat(np.arange(len(sizes)), sizes)
    survey = Survey(random.choice(1 << 60, total, replace=False), classes)
    order = survey.order()
    assert sorted(order) == list(range(total))
    counts = np.cumsum(classes[order][:, None] == np.arange(len(sizes)), axis=0)
    share = np.arange(1, total + 1)[:, None] * np.array(sizes) / total
    # Up to place q of 0..1 class c has round(q N_c) rows; all together are within C / 2 of q N.
    assert (np.abs(counts - share) <= 0.5 + len(sizes) / 2 * np.array(sizes) / total + 1e-9).all()
    shuffle = random.permutation(total)
    again = Survey(survey.digests_N[shuffle], np.array([f"name {c}" for c in classes[shuffle]]))
    if len(set(sizes)) == len(sizes):
        assert again.digests_N[again.order()].tolist() == survey.digests_N[order].tolist()


def test_the_last_image_of_a_class_is_held_out_only_where_no_other_is_left():
    random = np.random.default_rng(0)
    for sizes, size in (([1] * 5 + [30, 30], 6), ([1] * 20 + [8], 2), ([2, 2, 1, 50], 5)):
        classes = np.repeat(np.arange(len(sizes)), sizes)
        survey = Survey(random.choice(1 << 60, len(classes), replace=False), classes)
        held_out = choose_held_out(survey, size, "")
        assert len(set(held_out)) == size and set(np.delete(classes, held_out)) == set(classes)
    copies = Survey(np.array([1, 1, *range(2, 22)]), np.array([7, 8, *[8] * 20]))  # class 7 has but a copy of another's image
    assert 1 not in copies.digests_N[choose_held_out(copies, 2, "")]
    assert len(choose_held_out(Survey(np.arange(30), np.arange(30)), 3, "")) == 3


def test_unreadable_rows_and_copies_stand_in_no_order():
    survey = Survey(np.array([5, UNREADABLE, 5, 9, UNREADABLE, 2]), np.zeros(6, int))
    assert survey.digests_N[survey.order()].tolist() == [2, 5, 9]
    labels = Survey(np.array([5, 5, 9]), np.array([1, 0, 1]))
    assert labels.order().tolist() in ([1, 2], [2, 1])  # of copies the least label, in any order of the rows

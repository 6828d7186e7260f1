"""Rows that cannot be decoded: one line that names them, or left out with a budget, a list and a fixed replacement."""

import io
import json
import struct
import zlib
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dae.data import TrainLoader, evaluation_batches, in_memory, load_data
from dae.data.skipping import BadRow, RowError, SkippedRows

ROWS, BAD = 24, (5, 6, 17)  # two in a row, of which the first is replaced by the third


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 400 million pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def truncated_jpeg(png):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png(1, 32))).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()[:-200]


KINDS = {
    "truncated png": lambda png: png(0)[:-60],
    "truncated jpeg": truncated_jpeg,
    "web page": lambda png: b"<html>404</html>",
    "empty": lambda png: b"",
    "bomb": lambda png: bomb(),
    "zeros": lambda png: bytes(300),
    "no image": lambda png: None,
}


@pytest.fixture
def spoiled(saved, png):
    """`spoiled(kind, rows)`: configuration of a set in which these rows cannot be decoded, with a clean held-out split."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(decode=False), "label": ClassLabel(names=list("abc"))})

    def part(rows, start, bad, bytes_of):
        images = [{"bytes": png(start + i), "path": f"{i}.png"} for i in range(rows)]
        for i in bad:
            images[i]["bytes"] = bytes_of(png)
            images[i] = images[i] if images[i]["bytes"] is not None else None
        return Dataset.from_dict({"image": images, "label": [i % 3 for i in range(rows)]}, features=features)

    def save(kind="truncated png", bad=BAD, held_out_bad=(), **changes):
        bytes_of = KINDS[kind]
        splits = {"train": part(ROWS, 0, bad, bytes_of), "test": part(9, 50, held_out_bad, bytes_of)}
        return saved(splits, **{"verify_rows": 0, "max_skipped": 0.5, **changes})

    return save


def take(loader, count):
    return [batch["row"].tolist() for _, batch in zip(range(count), loader, strict=False)]


def loader_of(config, batch_size=4, **options):
    return TrainLoader(load_data(config, 0).train, batch_size, seed=3, shuffle_buffer_size=8, **options)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_one_line_or_is_left_out(spoiled, kind, streaming):
    config = spoiled(kind, streaming=streaming)
    place = r"row \d+.*: " if kind == "no image" else r"row \d+.* \((5|6|17)\.png\): "
    with pytest.raises(RowError, match=f"split 'train', {place}.*data\\.on_error=skip") as raised:
        take(loader_of(config), 12)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    config.on_error = "skip"
    data = load_data(config, 0)
    loader = TrainLoader(data.train, 4, seed=3, shuffle_buffer_size=8)
    assert all(len(rows) == 4 for rows in take(loader, 30))
    found = {row.path for row in data.train.skipped._found.values()}
    assert found == ({None} if kind == "no image" else {"5.png", "6.png", "17.png"})


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_from_a_worker_it_is_the_same_line(spoiled, streaming, num_workers):
    config = spoiled(bad=(5,), streaming=streaming)
    messages = []
    for workers in (0, num_workers):
        with pytest.raises(RowError) as raised:
            take(loader_of(config, num_workers=workers), 12)
        messages.append(str(raised.value))
    place = "row 5" if not streaming else messages[1].split("split 'train', ")[1].split(" (5.png)")[0]  # counted by each worker
    assert messages[1] == messages[0].replace(messages[0].split("split 'train', ")[1].split(" (5.png)")[0], place)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_from_a_worker(spoiled, num_workers):
    for streaming in (False, True):
        data = load_data(spoiled(held_out_bad=(2,), streaming=streaming), 0)
        with pytest.raises(RowError, match=r"split 'test', row 2 .*\(2\.png\)"):
            list(evaluation_batches(data.validation, 4, num_workers=num_workers))


def test_a_bad_row_is_replaced_by_the_next_good_one(spoiled):
    clean, config = spoiled(bad=()), spoiled(on_error="skip")
    assert take(loader_of(config), 18) == [[{5: 7, 6: 7, 17: 18}.get(i, i) for i in rows] for rows in take(loader_of(clean), 18)]
    last = spoiled(bad=(ROWS - 1,), on_error="skip")
    row, bad = load_data(last, 0).train.replace(ROWS - 1)
    assert row["row"] == 0 and bad == []


def test_the_replacement_depends_on_the_row_alone(spoiled, processes):
    config = spoiled(on_error="skip")
    steps = take(loader_of(config), 20)
    assert take(loader_of(config, num_workers=2), 20) == steps
    for world in (2, 4):
        shares = []
        for rank in range(world):
            processes(rank, world)
            shares.append(take(loader_of(config, 4 // world), 20))
        assert [sorted(chain(*rows)) for rows in zip(*shares, strict=True)] == [sorted(rows) for rows in steps]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_resuming_at_any_step_is_exact(spoiled, streaming, num_workers):
    config = spoiled(on_error="skip", streaming=streaming)
    loader, steps, states = loader_of(config, 3, num_workers=num_workers), [], []
    for _, batch in zip(range(17), loader, strict=False):
        steps.append(batch["row"].tolist())
        states.append(json.loads(json.dumps(loader.state_dict())))
    for i in range(15) if num_workers == 0 else (0, 7, 12):
        again = loader_of(config, 3, num_workers=num_workers)
        again.load_state_dict(states[i])
        assert take(again, 2) == steps[i + 1 : i + 3]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_leaves_them_out_and_keeps_the_order(spoiled, streaming, num_workers):
    held_out_bad = (0, 3, 4, 5, 6, 7, 8)  # the first, the last and a whole batch
    clean, config = spoiled(streaming=streaming), spoiled(held_out_bad=held_out_bad, streaming=streaming, on_error="skip")
    rows = [batch["image"] for batch in evaluation_batches(load_data(clean, 0).validation, 1)]
    data = load_data(config, 0)
    found = [each for batch in evaluation_batches(data.validation, 2, num_workers=num_workers) for each in batch["image"]]
    assert [image.tolist() for image in found] == [rows[i][0].tolist() for i in range(9) if i not in held_out_bad]
    assert len(data.train.skipped) == len(held_out_bad)
    assert len(in_memory(data.train, 100, seed=0, batch_size=5)[0]) == ROWS - len(BAD)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_list(spoiled, streaming, tmp_path):
    data = load_data(spoiled(on_error="skip", streaming=streaming, held_out_bad=(1,)), 0)
    assert data.skipped_note() == ""
    data.list_skipped(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    take(TrainLoader(data.train, 4, seed=3, num_workers=2, shuffle_buffer_size=8), 20)
    list(evaluation_batches(data.validation, 4))
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(line["path"] for line in lines) == ["1.png", "17.png", "5.png", "6.png"]
    assert all("truncated" in line["reason"] and line["data"] == data.fingerprint for line in lines)
    if not streaming:
        assert {(line["split"][-7:], line["row"]) for line in lines} == {("'train'", i) for i in BAD} | {(" 'test'", 1)}
    assert "4 rows that cannot be decoded were left out" in data.skipped_note()


def test_the_list_is_continued_and_shared_and_belongs_to_its_data(tmp_path):
    def bad(row):
        return BadRow("set, split 'train'", row, f"row {row}", None, "why")

    first, second, other = (SkippedRows(3, 100) for _ in range(3))
    first.fingerprint = second.fingerprint = "a"
    other.fingerprint = "b"
    for each in (first, second, other):
        each.list_in(tmp_path)
    first.add([bad(1), bad(1)])
    second.add([bad(2), bad(1)])  # another process of the run: it knows of 1 when it lists 2
    first.add([bad(3)])
    assert (len(first), len(second), len(other)) == (3, 2, 0)
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 3
    with pytest.raises(ValueError, match="4 rows cannot be decoded"):
        second.add([bad(4)])
    with open(tmp_path / "skipped.jsonl", "a") as file:
        file.write('{"data": "a", "spl')
    third = SkippedRows(10, 100)
    third.fingerprint = "a"
    third.list_in(tmp_path)
    assert len(third) == 4
    for budget, known in ((0, True), (3, False), (0.03, True)):  # lower than it was: no row needs to be new
        with pytest.raises(ValueError, match=f"4 rows cannot be decoded, data.max_skipped={budget}"):
            lower = SkippedRows(budget, 100, known)
            lower.fingerprint = "a"
            lower.list_in(tmp_path)
    begun = SkippedRows(0.04, 10, known=False)  # a stream of which 10 rows were read so far
    begun.fingerprint = "a"
    begun.list_in(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_budget(spoiled, streaming):
    config = spoiled("web page", on_error="skip", streaming=streaming, max_skipped=2, verify_rows=-1)
    with pytest.raises(ValueError, match=r"3 rows cannot be decoded, data\.max_skipped=2 may be left out.*17\.png"):
        load_data(config, 0)  # found by verification, before training
    config.verify_rows = 0
    data = load_data(config, 0)
    with pytest.raises(ValueError, match="3 rows cannot be decoded"):
        take(TrainLoader(data.train, 4, seed=3, shuffle_buffer_size=8), 20)
    config.max_skipped = 3
    take(loader_of(config), 20)
    if not streaming:
        config.max_skipped = 0.09  # of 33 rows: 2
        with pytest.raises(ValueError, match=r"3 rows .*data\.max_skipped=0\.09 of 33 rows"):
            take(loader_of(config), 20)
        config.max_skipped = 0.1
        take(loader_of(config), 20)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_set_without_one_good_row_ends(spoiled, streaming):
    config = spoiled(bad=range(ROWS), on_error="skip", streaming=streaming, max_skipped=1000)
    with pytest.raises(ValueError, match=r"not one (row|batch)"):
        take(loader_of(config), 2)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_may_be_readable_the_next_time_is_never_skipped(spoiled, streaming, monkeypatch):
    def fails(source, folder=None, original=load_data.__globals__["RowDecoder"].encoded.__globals__["read_bytes"]):
        if source["path"] == "9.png":
            raise OSError(5, "Input/output error")
        return original(source, folder)

    config = spoiled(bad=(), on_error="skip", streaming=streaming)
    data = load_data(config, 0)
    monkeypatch.setattr("dae.data.rows.read_bytes", fails)
    monkeypatch.setattr("dae.data.images.read_bytes", fails)
    with pytest.raises(RowError, match=r"\(9\.png\): \[Errno 5\] Input/output error$"):
        take(TrainLoader(data.train, 4, seed=3, shuffle_buffer_size=8), 12)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_stream_that_breaks_off_is_one_line(tmp_path, table, configure, num_workers, on_error):
    rows = table(400)
    rows.to_parquet(str(tmp_path / "a.parquet"), batch_size=10)
    data = load_data(configure(tmp_path / "a.parquet", streaming=True, validation_size=4, on_error=on_error), 0)
    file = Path(tmp_path / "a.parquet")
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 3000] = np.random.default_rng(0).bytes(3000)
    file.write_bytes(content)
    with pytest.raises(RowError, match=r"split 'train', after .* rows: the stream breaks off: ") as raised:
        for _ in evaluation_batches(data.train, 4, num_workers=num_workers):
            pass
    assert "\n" not in str(raised.value)
    with pytest.raises(RowError, match="the stream breaks off"):
        take(TrainLoader(data.train, 4, seed=0, num_workers=num_workers, shuffle_buffer_size=4), 200)

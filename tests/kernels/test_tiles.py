"""Tables of measured tiles: the nearest shape of this GPU's generation wins, anything else goes by rule, with one warning."""

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from dae_kernels import group_norm_silu, nearest_code, tiles
from dae_kernels.dispatch import triton_refusal
from dae_kernels.group_norm_silu import layout
from dae_kernels.nearest_code import layout as code_layout

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(triton_refusal(DEVICE) is not None, reason="no Triton here")
TABLES = sorted((ROOT / "kernels" / "dae_kernels").glob("*/tiles.json"))


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes the table of an operation "op"."""
    (tmp_path / "op").mkdir()
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)

    def write(content):
        tiles.entries.cache_clear()
        (tmp_path / "op" / "tiles.json").write_text(content if isinstance(content, str) else json.dumps(content))

    yield write
    tiles.entries.cache_clear()


NAMES = ("TILE", "num_warps")


def entry(size, warps, last=True):
    return {"kernel": "k", "when": {"last": last}, "sizes": {"C": size, "P": 64}, "tile": {"TILE": 16 * size, "num_warps": warps}}


def look(size, gpu="sm_90", kernel="k", last=True):
    return tiles.measured_tile("op", gpu, kernel, {"last": last}, {"C": size, "P": 64}, NAMES)


def test_the_nearest_shape_wins(table):
    table({"tiles": {"sm_90": [entry(8, 4), entry(128, 8), entry(32, 2, last=False)]}})
    assert [look(size)["num_warps"] for size in (1, 16, 31, 33, 4096)] == [4, 4, 4, 8, 8]
    assert look(8, last=False)["num_warps"] == 2
    assert look(8, kernel="other") is None and look(8, gpu=None) is None
    assert tiles.measured_tile("op", "sm_90", "k", {"last": True}, {"D": 8}, NAMES) is None


DAMAGED = {
    "no JSON": "{",
    "not a table": "[1]",
    "no tiles": "{}",
    "another kind": {"tiles": {"sm_90": [1]}},
    "no such size": {"tiles": {"sm_90": [entry(8, 3)]}},
    "a text": {"tiles": {"sm_90": [entry(8, "4")]}},
    "another name": {"tiles": {"sm_90": [{**entry(8, 4), "tile": {"TILE": 16, "BLOCK_Q": 16, "num_warps": 4}}]}},
    "no block": {"tiles": {"sm_90": [{**entry(8, 4), "tile": {"num_warps": 4}}]}},
    "too many warps": {"tiles": {"sm_90": [entry(8, 1024)]}},
    "too large a block": {"tiles": {"sm_90": [entry(2**20, 4)]}},
    "no warps": {"tiles": {"sm_90": [{**entry(8, 4), "tile": {"TILE": 16}}]}},
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_table_is_ignored_with_one_warning(table, content):
    table(content)
    with pytest.warns(RuntimeWarning, match=r"op/tiles.json is damaged .*: ignored, tiles go by rule") as caught:
        assert [look(8) for _ in range(3)] == [None] * 3
    assert len(caught) == 1 and "\n" not in str(caught[0].message)


def test_a_table_of_another_gpu_is_ignored_with_one_warning(table):
    table({"tiles": {"sm_90": [entry(8, 4)]}})
    with pytest.warns(RuntimeWarning, match=r"op/tiles.json has tiles of sm_90, not of this sm_80: ignored") as caught:
        assert [look(8, gpu="sm_80") for _ in range(3)] == [None] * 3
    assert len(caught) == 1


def test_no_table_is_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiles.measured_tile("no_such_operation", "sm_90", "k", {}, {}, NAMES) is None


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.parent.name)
def test_tables_are_whole_and_say_what_they_were_made_with(path):
    made = json.loads(path.read_text())
    assert made["made"].keys() == made["tiles"].keys()
    assert all({"hardware", "versions", "date", "what"} <= of.keys() for of in made["made"].values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiles.entries.cache_clear()
        names = {"group_norm_silu": layout.NAMES, "nearest_code": code_layout.NAMES}[path.parent.name]
        assert all(tiles.entries(path.parent.name, gpu, names) for gpu in made["tiles"])


def test_tables_are_installed():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert TABLES and "*/tiles.json" in data["dae_kernels"]


def test_launchers_look_up_their_tables():
    assert layout.tile(128, 65536, True, "moments", "sm_90") == {"BLOCK_P": 32, "BLOCK_C": 128, "num_warps": 4}
    assert layout.tile(128, 65536, True, "gradient", "sm_90") == {"BLOCK_P": 16, "BLOCK_C": 128, "num_warps": 4}
    assert layout.tile(64, 65536, False, "gradient_sums", "sm_90") == {"BLOCK_P": 2048, "BLOCK_C": 1, "num_warps": 8}
    assert layout.tile(128, 65536, True, "moments") == {"BLOCK_P": 16, "BLOCK_C": 128, "num_warps": 4}  # by rule
    search = lambda D, exact, gpu="sm_90": tuple(code_layout.search_tile(D, torch.bfloat16, exact, gpu).values())  # noqa: E731
    assert search(8, False) == (64, 128, 16, 4, 3) and search(300, True) == (128, 64, 256, 8, 2)
    assert search(32, False) == (128, 128, 32, 4, 3) and search(512, False) == (64, 64, 256, 4, 2)
    assert search(100, True) == (128, 64, 128, 8, 2) and search(64, True) == (128, 128, 64, 4, 3)
    assert code_layout.search_tile(64, torch.float32, True, "sm_90") == code_layout.search_tile(
        64, torch.float32, True
    )  # not measured


@needs_triton
@pytest.mark.parametrize("channels_last", [False, True])
def test_measured_tiles_compute_the_same(channels_last, monkeypatch):
    x = torch.randn(2, 24, 9, 7, device=DEVICE)
    x = (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    points, codes = torch.randn(200, 24, device=DEVICE).half(), torch.randn(300, 24, device=DEVICE).half()

    def results():
        layout.map_layout.cache_clear()
        code_layout.search_layout.cache_clear()
        y = group_norm_silu(x, 3, impl="triton")
        index, distance = nearest_code(points, codes, impl="triton")
        return y, torch.autograd.grad(y.square().sum(), x)[0], index, distance

    expected = results()
    monkeypatch.setattr(layout, "WHOLE_GROUP", 0)
    for module in (layout, code_layout):
        monkeypatch.setattr(module, "generation", lambda device: "sm_90")
    got = results()
    layout.map_layout.cache_clear()
    code_layout.search_layout.cache_clear()
    # Means of 8 * 63 float32 terms of about 1 in other orders: 504 roundings of 6e-8 are 3e-5 at worst, a tenth of it at random.
    torch.testing.assert_close(got[:2], expected[:2], rtol=1e-5, atol=1e-5)
    assert torch.equal(got[2], expected[2]) and torch.equal(got[3], expected[3])


def run_tuning(*options):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "profiling" / "tune_kernels.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_tuning_lists_the_candidates_that_survive_compilation():
    done = run_tuning(
        *(
            "--op",
            "group_norm_silu",
            "--dry-run",
            "--gpu",
            "sm_90",
            "--kernel",
            "gradient_sums",
            "--shapes",
            "1",
            "--processes",
            "1",
        )
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, last = done.stdout.splitlines()
    sound = sum(line.endswith(" ok") for line in lines)  # how many is the compiler's choice: 5 with triton 3.6, more since
    assert len(lines) == 12 and sound > 0 and sum(line.endswith(" spills") for line in lines) == 12 - sound > 0
    assert last == f"{sound} of 12 candidates compile for sm_90 without a fault"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_tuning_without_the_gpu_is_refused_in_one_line():
    done = run_tuning("--op", "nearest_code")
    assert done.returncode == 2
    assert (
        "tiles are measured on the GPU they are for, and here is none: use --dry-run with --gpu" in done.stderr.splitlines()[-1]
    )


def test_tuning_replaces_the_tiles_of_one_gpu(table, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "profiling"))
    spec = importlib.util.spec_from_file_location("tune_kernels", ROOT / "profiling" / "tune_kernels.py")
    tune = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tune)
    path = tmp_path / "op" / "tiles.json"
    tune.write_table(path, "sm_90", {"hardware": "one"}, [entry(8, 4)])
    tune.write_table(path, "sm_80", {"hardware": "two"}, [entry(8, 2)])
    tune.write_table(path, "sm_90", {"hardware": "three"}, [entry(8, 8), entry(32, 4)])
    made = json.loads(path.read_text())["made"]
    assert made == {"sm_90": {"hardware": "three"}, "sm_80": {"hardware": "two"}}
    tiles.entries.cache_clear()
    assert [look(8)["num_warps"], look(64)["num_warps"], look(8, gpu="sm_80")["num_warps"]] == [8, 4, 2]
    assert not list(tmp_path.glob("op/*.part"))

"""What holds for the room as a whole: light import, provenance, and sums over real processes."""

import json
import subprocess
import sys

import pytest

from dae.metrics import versions


def test_import_is_light():
    code = "import dae.metrics, sys; print([m for m in ('torchmetrics', 'scipy', 'sklearn', 'dae.data') if m in sys.modules])"
    heavy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert heavy.strip() == "[]"


def test_versions_are_strings_for_json():
    assert set(versions()) == {"python", "dae", "torch", "torchmetrics", "numpy", "scipy"}
    assert json.loads(json.dumps(versions())) == versions()
    assert versions()["torch"][0].isdigit()


PROCESS = """
import sys, torch, torch.distributed as dist
from dae.metrics import CodebookUsage, FeatureStatistics
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
x = torch.arange(20.0).reshape(10, 2).square()
statistics = FeatureStatistics().update(x[:3] if rank else x[3:]).all_reduce()
assert statistics.count == 10
torch.testing.assert_close(statistics.covariance, torch.cov(x.double().T), rtol=1e-12, atol=0)
empty = FeatureStatistics().update(x if rank else x[:0]).all_reduce()
torch.testing.assert_close(empty.mean, x.double().mean(0), rtol=1e-15, atol=0)
assert CodebookUsage(4).update(torch.tensor([rank, 3])).all_reduce().counts.tolist() == [1, 1, 0, 2]
dist.destroy_process_group()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="gloo with a file store")
def test_sums_over_two_real_processes(tmp_path):
    running = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in running:
        _, error = process.communicate()
        assert process.returncode == 0, error

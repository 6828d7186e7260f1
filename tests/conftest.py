"""What must be set before the first import of numpy, torch and triton.

Without a CUDA device the Triton kernels run in Triton's CPU interpreter, which tests/kernels/conftest.py mends for bfloat16.
"""

import gc
import getpass
import itertools
import os
import pickle
import sys
import tempfile

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the interpreter multiplies small blocks: threads only get in the way
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):  # torch.compile's cache would give back the C++ of another one
    folder = f"torchinductor_{getpass.getuser()}_{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), folder))

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish():
    """What is imported by now stays: the garbage collections that accelerate makes in each recipe need not walk it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def timm(monkeypatch):
    """A stand-in for timm, tests/timm_stand_in.py."""
    from timm_stand_in import make_timm

    fake = make_timm()
    monkeypatch.setitem(sys.modules, "timm", fake)
    return fake


@pytest.fixture
def in_processes(tmp_path):
    """`in_processes(world, body)`: what `body(rank)` returns in each of `world` processes over gloo, in order of rank."""
    from torch import distributed, multiprocessing

    context, launches = multiprocessing.get_context("fork"), itertools.count()

    def launch(world, body, seconds=60):
        folder = tmp_path / f"launch{next(launches)}"
        folder.mkdir()

        def work(rank):
            torch.set_num_threads(1)
            distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
            try:
                (folder / f"{rank}").write_bytes(pickle.dumps(body(rank)))
            finally:
                distributed.destroy_process_group()

        workers = [context.Process(target=work, args=(rank,)) for rank in range(world)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(seconds)
        codes = [worker.exitcode for worker in workers]  # None: it hangs
        for worker in workers:
            worker.kill()
        assert codes == [0] * world
        return [pickle.loads((folder / f"{rank}").read_bytes()) for rank in range(world)]

    return launch

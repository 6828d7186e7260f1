"""Compiling beforehand: each case that compiles in a process of its own, into the caches of Triton and inductor on disk."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
from cases import Case
from measuring import load_module, synchronize

OPERATIONS = Path(__file__).with_name("bench")


class Panel(NamedTuple):
    """An operation at a shape and dtype: what is measured in turns."""

    op: str
    shape: dict[str, int]
    dtype: str

    def cases(self, device: torch.device) -> list[Case]:
        """Its cases, their operands drawn anew from one seed."""
        torch.manual_seed(0)
        torch._dynamo.reset()
        # Set as the measured product of floors leaves it: inductor's cache has a key for each state, "never set" included.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32
        module = sys.modules.get(f"bench_{self.op}") or load_module(OPERATIONS / f"{self.op}.py")
        return list(module.cases(device, getattr(torch, self.dtype), **self.shape))

    def __str__(self) -> str:
        return f"{self.op} {','.join(f'{name}={size}' for name, size in self.shape.items())} {self.dtype}"


def run_once(case: Case, device: torch.device) -> None:
    """Forward and backward, which compiles both."""
    result = case.run()
    result = result[0] if isinstance(result, tuple) else result
    if case.leaves:
        torch.autograd.grad(result, case.leaves, torch.ones_like(result))
    synchronize(device)


def prepare(panels: list[Panel], wanted: Callable[[Case], bool], device: torch.device, jobs: int) -> int:
    """Run each wanted case that compiles once, `jobs` at a time, and print it as it is done; returns how many failed.

    Each is this script again with --case: what is compiled in a process of another kind (a pool's, say) has other keys in
    inductor's cache, and one that dies ends no other.
    """
    # Else each process starts as many again, to compile.
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}

    def one(panel: Panel, number: int) -> tuple[float, str]:
        shape = ",".join(f"{name}={size}" for name, size in panel.shape.items())
        command = [sys.executable, sys.argv[0], "--op", panel.op, "--shape", shape, "--dtype", panel.dtype]
        command += ["--case", str(number), "--device", str(device)]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        failure = (lines[-1].strip()[:300] if lines else f"status {done.returncode}") if done.returncode else ""
        return time.perf_counter() - start, failure

    failed = 0
    with ThreadPoolExecutor(jobs) as pool:
        tasks = {}
        for panel in panels:
            for number, case in enumerate(panel.cases(device)):
                if case.compiles and wanted(case) and not case.obstacle():
                    tasks[pool.submit(one, panel, number)] = f"{panel}: {case.impl}"
            if device.type == "cuda":
                torch.cuda.empty_cache()
        for task in as_completed(tasks):
            seconds, failure = task.result()
            failed += bool(failure)
            print(f"{seconds:6.1f} s  {tasks[task]}{f'  not run: {failure}' if failure else ''}", flush=True)
    return failed

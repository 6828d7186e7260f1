"""Record work on a GPU as CUDA graphs: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class Graph:
    """Recorded work, and the tensor in which each replay leaves its result."""

    def __init__(self, graph: torch.cuda.CUDAGraph, result: Tensor):
        self.graph, self.result = graph, result

    def replay(self) -> Tensor:
        """Start the work on the current stream; the next replay overwrites the result."""
        self.graph.replay()
        return self.result


class Recorder:
    """Graphs that share memory, and are therefore replayed in the order in which they were recorded.

    Args:
        device: of CUDA.
        generators: other than the device's own, from which the work draws.

    Raises:
        ValueError: another device.
    """

    def __init__(self, device: torch.device, generators: Iterable[torch.Generator] = ()):
        if device.type != "cuda":
            raise ValueError(f"CUDA graphs need a CUDA device, got {device}; leave cuda_graphs out")
        self.generators = list(generators)
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], Tensor]) -> Tensor:
        """Do the work without a graph, on the stream on which it will be recorded: libraries choose and load what they need."""
        before = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(before)
        with torch.cuda.stream(self.stream):
            result = work()
        before.wait_stream(self.stream)
        return result

    def record(self, work: Callable[[], Tensor]) -> Graph:
        """Record the work, which is not done yet. Other threads, such as a loader's, may use the GPU meanwhile."""
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            result = work()
        return Graph(graph, result)

    def repeated(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The work as a function: the first call does it without a graph, the second records it, and replays begin."""
        calls: list[Graph | None] = []

        def again() -> Tensor:
            if not calls:
                calls.append(None)
                return self.warm_up(work)
            graph = calls[0] = calls[0] or self.record(work)
            return graph.replay()

        return again

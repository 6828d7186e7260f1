"""autograd.Functions that Dynamo must not trace into (`allow_in_graph`), registered when something is first compiled.

Imported just before such a function is called, as torch._dynamo takes a second to import; Dynamo looks functions up after that.
"""

from __future__ import annotations

import torch

from dae_kernels.tracing import TAKEN_WHOLE

for function in TAKEN_WHOLE:
    torch.compiler.allow_in_graph(function)

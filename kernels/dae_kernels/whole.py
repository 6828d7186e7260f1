"""autograd.Functions that Dynamo must not trace into (`allow_in_graph`), registered when something is first compiled.

torch._dynamo takes a second to import; and a function is looked up after the import that stands before its call.
"""

from __future__ import annotations

import torch

from dae_kernels.tracing import TAKEN_WHOLE

for function in TAKEN_WHOLE:
    torch.compiler.allow_in_graph(function)

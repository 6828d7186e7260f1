"""Differentiable functions that torch.compile has to take whole, without a look inside.

Dynamo ignores the `backward` of an autograd.Function inside torch.func.grad, vjp and jacrev: the derivative would be that of
the forward pass, or 0, without an error (torch 2.13). Taken whole, the function is traced below these transforms, as in
eager mode. Imported only while torch.compile traces, as torch._dynamo takes a second to import.
"""

from __future__ import annotations

import torch

from dae_kernels.frechet_distance.reference import apply_square_root
from dae_kernels.group_norm_silu.api import apply_group_norm_silu
from dae_kernels.group_norm_silu.reference import apply_input_in_graph
from dae_kernels.linear_cross_entropy.autograd import apply_chunked_losses
from dae_kernels.pairwise.sums import apply_pair_sums
from dae_kernels.perceptual_tap.api import apply_perceptual_tap
from dae_kernels.sinkhorn_divergence.autograd import apply_envelope, apply_plan_means

input_in_graph_function = torch.compiler.allow_in_graph(apply_input_in_graph)
group_norm_silu_function = torch.compiler.allow_in_graph(apply_group_norm_silu)
chunked_losses_function = torch.compiler.allow_in_graph(apply_chunked_losses)
pair_sums_function = torch.compiler.allow_in_graph(apply_pair_sums)
perceptual_tap_function = torch.compiler.allow_in_graph(apply_perceptual_tap)
envelope_function = torch.compiler.allow_in_graph(apply_envelope)
plan_means_function = torch.compiler.allow_in_graph(apply_plan_means)
square_root_function = torch.compiler.allow_in_graph(apply_square_root)

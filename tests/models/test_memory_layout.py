"""What a training step costs beside its arithmetic: layout conversions, bytes kept for the backward pass, breaks of the graph.

Steps are traced on fake tensors with the kernels chosen, in a process without Triton's interpreter; nothing is launched. Where
torch has no CUDA, autograd refuses fake CUDA tensors, so the whole step is traced on fake CPU ones (convolutions give the layout
of their input on both) and the forward pass of encoder and decoder on fake CUDA ones too.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

TRACE = """
import importlib, json, sys
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from dae.config import AutoencoderConfig, KernelsConfig, LossConfig, PriorConfig
from dae.losses import discriminator_loss, generator_loss, reconstruction_loss
from dae.models import ARPrior, Autoencoder, PatchDiscriminator, choose_kernels

device, layout, kernels, what = sys.argv[1:]
memory_format = getattr(torch, layout)
for operation, choice in (("group_norm_silu", kernels), ("nearest_code", "triton")):  # as on a GPU
    importlib.import_module(f"dae_kernels.{operation}.api").choose = lambda *arguments, choice=choice: choice


def feature_map(t):
    return isinstance(t, torch.Tensor) and t.dim() == 4 and t.shape[1] > 1 and t.shape[2] * t.shape[3] > 1


def layouts(t):
    return {f for f in ("contiguous_format", "channels_last") if t.is_contiguous(memory_format=getattr(torch, f))}


class Conversions(TorchDispatchMode):
    '''Operations that copy a map of more than a thousand values without making it of another type, or change its layout.'''

    def __init__(self):
        super().__init__()
        self.found, self.operations = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = str(function)
        self.operations.add(name)
        first = next((a for a in args if isinstance(a, torch.Tensor)), None)
        if isinstance(out, torch.Tensor) and first is not None and out.numel() >= 1000:
            copies = name.startswith(("aten.clone", "aten.copy_", "aten.contiguous", "aten._to_copy"))
            same_type = out.dtype == first.dtype and out.device == first.device
            changed = feature_map(out) and feature_map(first) and not layouts(out) & layouts(first)
            if (copies and (same_type or changed)) or (changed and name.startswith("dae_kernels")):
                self.found.append([name, list(first.shape), list(first.stride()), list(out.stride())])
        return out


def fake(module):
    '''The module with fake parameters: `.to(device)` would ask for a real device.'''
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for key, value in store.items():
                if value is not None:
                    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
                    store[key] = torch.nn.Parameter(made) if store is part._parameters else made
    return module


config = AutoencoderConfig(base_channels=32, channel_multipliers=[1, 2], attention_resolutions=[16], latent_channels=16)
autoencoder = Autoencoder(config, 3, 32).to(memory_format=memory_format)
critic = PatchDiscriminator(3, 32, 2).to(memory_format=memory_format)
saved = {}


def keep(t):
    if not isinstance(t, torch.nn.Parameter):
        saved[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
    return t


with FakeTensorMode(allow_non_fake_inputs=True), Conversions() as conversions:
    fake(autoencoder), fake(critic)
    strides = (3072, 1, 96, 3) if layout == "channels_last" else (3072, 1024, 32, 1)
    images = torch.empty_strided((4, 3, 32, 32), strides, device=device)
    conversions.found.clear()
    if what == "forward":
        with torch.no_grad():
            features = autoencoder.encoder(images)
            sample = autoencoder.decoder(features)
        assert features.device.type == sample.device.type == device
    else:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            output = autoencoder(images)
            loss = reconstruction_loss(output.sample, images, LossConfig(l1=1.0)) + output.encoding.loss
            loss = loss + generator_loss(critic(output.sample))
        loss.backward()
        discriminator_loss(critic(images), critic(output.sample.detach())).backward()
        for p in autoencoder.parameters():
            assert p.grad.stride() == p.stride() or p.numel() == max(p.shape), (p.shape, p.stride(), p.grad.stride())

print(json.dumps({"conversions": conversions.found, "saved": sum(saved.values()), "operations": sorted(conversions.operations)}))
"""


def trace(device, layout, kernels, what, program=TRACE):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program, device, layout, kernels, what]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


AUTOGRAD_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CUDA build asks the driver for gradients of fakes, too


def test_training_in_channels_last_converts_no_layout():
    step = trace(AUTOGRAD_DEVICE, "channels_last", "triton", "step")
    assert {"dae_kernels.group_norm_silu_forward.default", "dae_kernels.group_norm_silu_backward.default"} < set(
        step["operations"]
    )
    assert step["conversions"] == []
    forward = trace("cuda", "channels_last", "triton", "forward")
    assert forward["conversions"] == [] and "dae_kernels.group_norm_silu_forward.default" in forward["operations"]


def test_conversions_are_seen():
    """What torch's GroupNorm does to channels_last on CUDA, put where ours stands: the trace above would name every copy."""
    spoilt = TRACE.replace(
        "with FakeTensorMode",
        "import dae.models.layers as layers\n"
        "own = layers.group_norm_silu\n"
        "layers.group_norm_silu = lambda x, *a, **k: own(x.contiguous(), *a, **k)\n"
        "with FakeTensorMode",
    )
    assert len(trace(AUTOGRAD_DEVICE, "channels_last", "triton", "step", spoilt)["conversions"]) >= 10


def test_kernels_keep_fewer_bytes_for_the_backward_pass():
    """GroupNorm + SiLU in plain torch keeps the normalised map for SiLU besides its input; the kernel does not."""
    plain = trace(AUTOGRAD_DEVICE, "channels_last", "reference", "step")["saved"]
    fused = trace(AUTOGRAD_DEVICE, "channels_last", "triton", "step")["saved"]
    # Maps before SiLU: [C, H, W] of each norm that has one, 4 images in float32; statistics (2 x 32 groups) come and go with it.
    blocks = {"encoder 32": [(32, 32), (32, 32)], "encoder 16": [(32, 16), (64, 16), (64, 16)]}  # the last is norm_out
    blocks |= {"decoder 16": [(64, 16)] * 4, "decoder 32": [(64, 32), (32, 32), (32, 32), (32, 32), (32, 32)]}
    maps = sum(4 * 4 * channels * size * size for norms in blocks.values() for channels, size in norms)
    assert plain - fused == pytest.approx(maps, rel=0.01)
    assert fused < 0.8 * plain


@pytest.mark.slow
@pytest.mark.parametrize("bottleneck", ["vq", "kl"])
def test_the_autoencoder_is_one_graph(bottleneck):
    """Forward and backward, with the gradients of eager mode."""
    from dae.config import AutoencoderConfig
    from dae.models import Autoencoder

    torch.manual_seed(0)
    config = AutoencoderConfig(
        base_channels=8, channel_multipliers=[1, 2], attention_resolutions=[4], latent_channels=4, bottleneck=bottleneck
    )
    model = Autoencoder(config, 3, 8)
    images = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        torch.manual_seed(1)
        output = run(images)
        (output.sample.square().mean() + output.encoding.loss).backward()
        gradients.append([output.sample.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)

"""Any part of a model may be trained alone, in either memory layout: torch's group norm ends the process for some (on CPUs)."""

import subprocess
import sys

SCRIPT = """
import torch
from dae.config import AutoencoderConfig
from dae.models import Autoencoder, PatchDiscriminator

torch.manual_seed(0)
sizes = dict(base_channels=8, channel_multipliers=[1, 2], latent_channels=4, attention_resolutions=[4])
config = AutoencoderConfig(bottleneck="kl", **sizes)
images = torch.rand(2, 3, 8, 8) * 2 - 1
for model, run in (
    (Autoencoder(config, 3, 8).train(), lambda model, x: model(x).sample),
    (PatchDiscriminator(3, channels=8), lambda model, x: model(x)),
):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=memory_format)
        for name, parameter in model.named_parameters():
            print(type(model).__name__, memory_format, name, flush=True)
            model.requires_grad_(False)
            parameter.requires_grad_()
            run(model, images.contiguous(memory_format=memory_format)).square().mean().backward()
            assert parameter.grad.isfinite().all() and parameter.grad.count_nonzero() > 0
            parameter.grad = None
print("done")
"""


def test_each_parameter_alone():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True)
    assert done.stdout.endswith("done\n"), (done.returncode, done.stdout.splitlines()[-1:], done.stderr[-2000:])

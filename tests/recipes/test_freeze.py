"""What stage 2 must not touch: encoder, bottleneck, and so the latents and tokens of every image."""

import pytest
import torch

from dae.data import load_data
from dae.models import Autoencoder
from dae.quantizers import VectorQuantizer

SMALL = ("autoencoder.channel_multipliers=[1]", "autoencoder.num_blocks=0", "auxiliary_decoder.family=linear")


@pytest.mark.parametrize("bottleneck", ["vq", "kl"])
def test_frozen(tmp_path, run, assert_frozen, bottleneck):
    """With all that could move it: weight decay, an average, the adversarial loss, accumulation."""
    run(
        "train_dae", tmp_path, f"autoencoder.bottleneck={bottleneck}", "checkpointing_steps=1", "stage2.adam_weight_decay=0.1",
        "stage2.gradient_accumulation_steps=2", "stage2.loss.adversarial=0.1", "stage2.loss.discriminator_channels=8",
    )  # fmt: skip
    assert_frozen(tmp_path / "autoencoder", steps=range(11, 17))


def test_tokens_of_held_out_images(chain, configure):
    validation = load_data(configure(chain).data, 0).validation
    images = torch.stack([validation[i]["image"] for i in range(len(validation))])
    first, last = (Autoencoder.from_pretrained(chain / "autoencoder" / name).encode(images) for name in ("stage1", ""))
    assert torch.equal(first.indices, last.indices) and torch.equal(first.latents, last.latents)


def test_frozen_codebook_takes_no_update(tmp_path, run, monkeypatch):
    """The training loop does not even try: the quantizer would refuse."""
    calls = []
    update = VectorQuantizer.update_codebook
    monkeypatch.setattr(VectorQuantizer, "update_codebook", lambda self: (calls.append(self.frozen), update(self)))
    run("train_dae", tmp_path)
    assert calls == [False] * 10


@pytest.mark.slow
def test_compiled(tmp_path, run, history, same_log, assert_frozen):
    """The compiler changes neither losses nor the freeze. Nothing is drawn here, for compiled code draws other numbers."""
    still = (
        *SMALL,
        "prior.class_dropout=0",
        "evaluation.cfg_scales=[1.0]",
        "stage1.max_train_steps=3",
        "stage2.max_train_steps=3",
        "prior.max_train_steps=3",
    )
    for folder, on in (("eager", "false"), ("compiled", "true")):
        for name in ("train_dae", "encode", "train_prior"):
            run(name, tmp_path / folder, *still, f"compile={on}")
    for name in ("autoencoder", "prior"):
        same_log(history(tmp_path / "eager" / name), history(tmp_path / "compiled" / name), validation=1e-2)
    assert_frozen(tmp_path / "compiled" / "autoencoder", steps=(4, 6))

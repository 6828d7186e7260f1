"""Any one operation of dae_kernels may be taken out or exchanged: the chain trains to the same losses."""

import pytest
import torch
from dae_kernels.dispatch import triton_refusal
from safetensors.torch import save_file

from dae.losses import PerceptualLoss
from dae.models import Autoencoder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(triton_refusal(DEVICE) is not None, reason="no Triton here")
triton = lambda *values: pytest.param(*values, marks=needs_triton)  # noqa: E731

STEPS = 2
SMALL = [f"{stage}.{key}" for stage in ("stage1", "stage2") for key in (f"max_train_steps={STEPS}", "train_batch_size=2")]
SMALL += ["data.resolution=16", "data.max_train_samples=64", "data.validation_size=4", "autoencoder.attention_resolutions=[8]"]
SMALL += ["autoencoder.base_channels=4", "autoencoder.num_blocks=0", "autoencoder.decoder.family=narrow"]
SMALL += ["stage2.loss.adversarial=0.1", "stage2.loss.discriminator_channels=4"]
PRIOR = [f"prior.max_train_steps={STEPS}", "prior.train_batch_size=4", "data.max_train_samples=64", "data.validation_size=8"]


@pytest.fixture
def losses(tmp_path, run, history, monkeypatch):
    """`losses(recipe, folder, overrides)`: the training losses of all steps, logged at each."""
    monkeypatch.setattr(PerceptualLoss, "widths", (4, 4, 8, 8, 8))
    torch.manual_seed(0)
    save_file(PerceptualLoss().state_dict(), tmp_path / "vgg.safetensors")
    vgg = [f"{stage}.loss.perceptual_weights={tmp_path / 'vgg.safetensors'}" for stage in ("stage1", "stage2")]

    def train(recipe, folder, *overrides):
        small = PRIOR if recipe == "train_prior" else [*SMALL, *vgg, "stage1.loss.perceptual=1", "stage2.loss.perceptual=1"]
        run(recipe, folder, *small, *overrides)
        name = {"train_dae": "autoencoder", "train_prior": "prior"}[recipe]
        return [row["loss"] for row in history(folder / name) if row["split"] == "train"]

    return train


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        triton("kernels.group_norm_silu=triton"),
        triton("kernels.lpips=triton"),
        triton("kernels.vector_quantize=triton"),
        "kernels.attention=reference",
        "channels_last=true",
    ],
)
def test_autoencoder(tmp_path, losses, change):
    """Sums in another order, two steps of each stage long: 1e-4 of the loss."""
    plain = ["kernels.group_norm_silu=reference", "kernels.lpips=reference", "kernels.vector_quantize=reference"]
    expected = losses("train_dae", tmp_path / "plain", *plain, "kernels.attention=sdpa")
    assert len(expected) == 2 * STEPS
    assert losses("train_dae", tmp_path / "changed", *plain, change) == pytest.approx(expected, rel=1e-4)
    Autoencoder.from_pretrained(tmp_path / "changed" / "autoencoder")  # whatever the layout of the weights was


@pytest.mark.slow
def test_prior(tmp_path, run, losses):
    run("train_dae", tmp_path, *PRIOR, *(f"{stage}.max_train_steps=2" for stage in ("stage1", "stage2")))
    run("encode", tmp_path, *PRIOR)
    choices = [f"kernels.linear_cross_entropy={impl}" for impl in ("reference", "chunked", "torch")]
    choices += [f"kernels.attention={impl}" for impl in ("sdpa", "reference")]
    if triton_refusal(DEVICE) is None:
        choices.append("kernels.linear_cross_entropy=triton")
    curves = {}
    for number, choice in enumerate(choices):
        folder = tmp_path / str(number)
        folder.mkdir()
        for part in ("autoencoder", "tokens"):
            (folder / part).symlink_to(tmp_path / part)
        if choice.endswith("=torch") and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            with pytest.raises(ValueError, match=r"^impl='torch' needs torch 2\.13 or later, got [^\n]*: use impl='chunked'$"):
                losses("train_prior", folder, choice)
            continue
        curves[choice] = losses("train_prior", folder, choice)
    first = curves.pop(choices[0])
    assert len(first) == STEPS
    for choice, curve in curves.items():
        assert curve == pytest.approx(first, rel=1e-5), choice


def test_what_cannot_run_is_named_and_leaves_the_folder_free(tmp_path, run, history, monkeypatch):
    steps = [f"{stage}.max_train_steps=1" for stage in ("stage1", "stage2")]
    with monkeypatch.context() as patch:
        patch.setattr("dae.models.kernels.triton_refusal", lambda device: f"the tensors are on {device}, not on a CUDA device")
        with pytest.raises(ValueError, match=r"kernels.group_norm_silu=triton cannot run here: the tensors are on cpu"):
            run("train_dae", tmp_path, *steps, "kernels.group_norm_silu=triton")
    attending = ["autoencoder.attention_resolutions=[4]", "kernels.attention=flash_attn"]
    with pytest.raises((ValueError, ImportError), match="impl='flash_attn'"):
        run("train_dae", tmp_path, *steps, *attending)
    run("train_dae", tmp_path, *steps)
    assert len(history(tmp_path / "autoencoder")) == 4

"""The doctor notices what goes wrong in trainings that are broken on purpose, once, and says nothing of healthy ones."""

import json
from collections import Counter

import pytest
import tiny_training
import torch
from tiny_training import GAN

from dae.diagnostics.doctor import CHANCE, CONDITIONS, WINDOW, Doctor
from dae.training.autoencoder import train_stage
from dae.training.prior import train_by_steps
from dae.training.run import Run

TOKENS = torch.randint(16, (40, 2, 16), generator=torch.Generator().manual_seed(0))
MOMENTS = torch.randn(40, 2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
KL = "autoencoder.bottleneck=kl"
STEADY = [f"{section}.lr_scheduler=constant" for section in ("stage1", "stage2", "prior")]


def autoencoder_training(*overrides, which=0):
    return tiny_training.autoencoder_training(*STEADY, *overrides, which=which)


def prior_training(*overrides, values):
    return tiny_training.prior_training(*STEADY, *overrides, values=values)


def warnings(training, folder, steps=3 * WINDOW):
    """Conditions that the run's history warns of, each with its number of warnings, and the messages."""
    training.settings.max_train_steps = steps
    training.config.output_dir, training.config.checkpointing_steps = str(folder), 10**6
    training.config.validation_steps = 10**6
    loss = getattr(getattr(training.settings, "loss", None), "adversarial_loss", "hinge")
    run = Run(training.config, "tiny", Doctor({training.name: CHANCE[loss]}).examine)
    run.open(None)
    if training.name == "prior":
        train_by_steps(training, None, run=run)
    else:
        train_stage(training, None, run, 0, 0)
    found = [row for row in run.history() if row["split"] == "warning"]
    for row in found:
        assert set(row) == {"step", "seconds", "stage", "split", "condition", "message"} and row["condition"] in CONDITIONS
        assert row["message"].startswith(f"{training.name}, step {row['step']}: ") and "\n" not in row["message"]
        assert "; " in row["message"], "a remedy"
    return Counter(row["condition"] for row in found), [row["message"] for row in found]


HEALTHY = {
    "vq": lambda: autoencoder_training(),
    "kl": lambda: autoencoder_training(KL, "autoencoder.kl.kl_weight=1e-4"),
    "rvq": lambda: autoencoder_training("autoencoder.bottleneck=rvq"),
    "gan": lambda: autoencoder_training(*GAN, "stage2.loss.adversarial_start=15", which=1),
    "joint gan": lambda: autoencoder_training("method=joint", *GAN, "stage2.loss.lecam=0.1", "stage2.loss.r1=1"),
    "ar": lambda: prior_training(values=TOKENS),
    "dit": lambda: prior_training(KL, values=MOMENTS),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_said_of_a_healthy_training(tmp_path, name):
    assert warnings(HEALTHY[name](), tmp_path, 60) == (Counter(), [])


def after(module, steps, change):
    """The module's output as `change` makes it, from its call number `steps` on."""
    calls = []

    def hook(module, args, output):
        calls.append(1)
        return change(output) if len(calls) > steps else output

    module.register_forward_hook(hook)


def test_codebook_collapse(tmp_path):
    training = autoencoder_training("autoencoder.vq.revive_threshold=0")
    after(training.autoencoder.encoder, 10, lambda x: x[:1, :, :1, :1] + 0 * x)
    counts, (message, *_) = warnings(training, tmp_path)
    assert counts["codebook_collapse"] == 1
    assert message.startswith(
        "stage1, step 13: the codebook collapses: the batch uses 6% of the codes that it could, at its best"
    )


def test_codes_that_fall_out_of_use_slowly():
    doctor, found = Doctor(), []
    for step in range(60):
        used = max(3, 60 - step)
        row = {"code_usage": used / 64, "code_perplexity": 0.8 * used, "loss": 1.0, "lr": 1e-3}
        found += [(step, w.condition) for w in doctor.examine({"stage": "s", "split": "train", "step": step} | row)]
    assert found == [(43, "codebook_collapse")]


def test_posterior_collapse(tmp_path):
    training = autoencoder_training(KL, "autoencoder.kl.kl_weight=1", "stage1.learning_rate=0.02")
    counts, messages = warnings(training, tmp_path, 80)
    assert counts["posterior_collapse"] == 1
    assert any(
        "of the latent's channels tell nothing of an image" in m and "lower autoencoder.kl.kl_weight" in m for m in messages
    )


@pytest.mark.parametrize("kind", CHANCE)
def test_a_dead_discriminator_and_a_weight_at_its_limit(tmp_path, kind):
    level = 0.5 if kind == "least_squares" else 0.0
    training = autoencoder_training(*GAN, f"stage2.loss.adversarial_loss={kind}", which=1)
    after(training.adversary.discriminator, 0, lambda x: 0 * x + level)
    counts, messages = warnings(training, tmp_path)
    assert counts["dead_discriminator"] == counts["adaptive_weight"] == 1 and "pinned at its limit of 1e4" in messages[0]


def test_a_discriminator_that_wins(tmp_path):
    training = autoencoder_training(*GAN, "stage2.loss.discriminator_learning_rate=0.03", "stage2.learning_rate=0", which=1)
    counts, _ = warnings(training, tmp_path, 60)
    assert counts["winning_discriminator"] == 1


def test_an_adaptive_weight_of_zero(tmp_path, monkeypatch):
    monkeypatch.setattr("dae.training.adversary.adaptive_weight", lambda reconstruction, *rest: 0 * reconstruction.detach())
    counts, messages = warnings(autoencoder_training(*GAN, which=1), tmp_path)
    assert counts["adaptive_weight"] == 1 and "all but 0" in messages[0]


def test_a_loss_spike(tmp_path):
    training = autoencoder_training()
    step, taken = training.step, training.next_batch

    def once(number):
        training.next_batch = (lambda: {"image": 30 * taken()["image"]}) if number == 20 else taken
        return step(number)

    training.step = once
    counts, messages = warnings(training, tmp_path, 45)
    assert counts["loss_spike"] == 1 and messages[0].startswith("stage1, step 21: the loss jumps to")


@pytest.mark.parametrize("name", ["vq", "ar", "dit"])
def test_a_learning_rate_that_is_too_high(tmp_path, name):
    training = HEALTHY[name]()
    for optimizer in training.state.optimizers.values():
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"] = 1.0
    training.state.scheduler.base_lrs = [1.0] * len(training.state.scheduler.base_lrs)
    counts, messages = warnings(training, tmp_path, 60)
    assert counts["learning_rate"] >= 1
    assert any("the learning rate looks too high: the loss" in m and "lower" in m for m in messages)


def rows(losses, **more):
    return [{"stage": "s", "split": "train", "step": i, "loss": x, "lr": 1e-3} | {k: v[i] for k, v in more.items()}
            for i, x in enumerate(losses)]  # fmt: skip


def reported(log, doctor=None):
    doctor = doctor or Doctor()
    return [(row["step"], warning.condition) for row in log for warning in doctor.examine(row)]


def test_oscillation_and_growing_gradients():
    falling = [1 / (1 + i) for i in range(20)]
    assert reported(rows(falling)) == []
    swinging = [0.5 if i % 2 else 3.0 for i in range(60)]
    assert (found := reported(rows([4.0, *swinging]))) and {name for _, name in found} == {"learning_rate"}
    slowly = [1 - 0.02 * i for i in range(20)] + [0.62 + 0.006 * i for i in range(40)]
    norms = [0.1] * 25 + [5.0] * 35
    assert {name for _, name in reported(rows(slowly, grad_norm=norms))} == {"learning_rate"}
    assert reported(rows(slowly, grad_norm=[0.1] * 60)) == []


def test_an_episode_is_reported_once_and_again_after_a_pause():
    bad, good = (0.01, 1.0), (0.9, 50.0)
    pattern = [good] * 5 + [bad] * 30 + [good] * 2 + [bad] * 5 + [good] * (WINDOW + 3) + [bad] * 5
    usage, perplexity = zip(*pattern, strict=True)
    found = reported(rows([1.0] * len(pattern), code_usage=usage, code_perplexity=perplexity))
    assert found == [(7, "codebook_collapse"), (57, "codebook_collapse")]


def test_a_resumed_run_warns_as_an_uninterrupted_one():
    usage = [0.9] * 5 + [0.01] * 30
    log = rows([1.0] * 35, code_usage=usage, code_perplexity=[50.0] * 5 + [1.0] * 30)
    again = Doctor()
    reported(log[:20], again)
    assert reported(log[20:], again) == [] and reported(log) == [(7, "codebook_collapse")]


def test_a_resumed_run_remembers(tmp_path):
    training = autoencoder_training(f"output_dir={tmp_path}")
    seen = []
    run = Run(training.config, "autoencoder", lambda row: seen.append(row) or [])
    run.open(None)
    run.record(1, {"loss": 1.0, "lr": 0.1}, stage="stage1", split="train")
    run.warn(2, "stage1", "non_finite", "stage1: it broke")
    run.save(1, {"model": {"w": torch.ones(2)}}, {}, stage="stage1", stage_step=1)
    training.config.resume_from_checkpoint = "latest"
    again = Run(training.config, "autoencoder", lambda row: seen.append(row) or [])
    again.open(None)
    assert [row["split"] for row in seen] == ["train", "train", "warning"]
    assert [row.get("message") for row in again.history()] == [None, "stage1: it broke"], "what broke the run stays"


def test_what_the_log_holds(tmp_path):
    """Numbers are of the whole batch; none is measured where nothing is recorded."""
    training = autoencoder_training(*GAN, which=1)
    warnings(training, tmp_path, 2)
    row = json.loads((tmp_path / "tiny" / "logs" / "history.jsonl").read_text().splitlines()[1])
    assert {"loss", "lr", "grad_norm", "discriminator_loss", "real_logit", "fake_logit", "adaptive_weight"} <= row.keys()
    assert "code_usage" not in row, "the latent is frozen"
    training = autoencoder_training()
    warnings(training, tmp_path / "vq", 1)
    row = json.loads((tmp_path / "vq" / "tiny" / "logs" / "history.jsonl").read_text().splitlines()[0])
    assert 0 < row["code_usage"] <= 1 <= row["code_perplexity"] <= 16 and training.encoding is None, "freed at the end"


def test_a_run_that_broke_before_its_first_numbers_leaves_the_folder_free(tmp_path):
    training = autoencoder_training(f"output_dir={tmp_path}")
    run = Run(training.config, "autoencoder")
    run.open(None)
    run.warn(1, "stage1", "non_finite", "stage1: it broke")
    again = Run(training.config, "autoencoder")
    assert again.open(None) is None and again.history() == []
    again.record(1, {"loss": 1.0, "lr": 0.1}, stage="stage1", split="train")
    with pytest.raises(FileExistsError, match="holds another run"):
        Run(training.config, "autoencoder").open(None)

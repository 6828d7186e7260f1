"""A run that goes on: with more steps than it was planned with, on new data from given weights."""

import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

LATEST = "resume_from_checkpoint=latest"
CONSTANT = ["prior.early_stopping=false", *(f"{part}.lr_scheduler=constant" for part in ("stage1", "stage2", "prior"))]


def same_tensors(a, b):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.fixture
def copied(tmp_path):
    """`copied(folder)`: a copy of a run to go on with; of None, a folder for a new one."""
    numbers = iter(range(100))

    def make(folder):
        target = tmp_path / str(next(numbers))
        return target if folder is None else shutil.copytree(folder, target)

    return make


@pytest.fixture(scope="module")
def finished(made_once):
    """Stages of 10 and 6 steps and a prior of 12, all at a constant rate."""
    return made_once("finished", ("train_dae", "encode", "train_prior"), *CONSTANT)


def test_more_steps_of_the_last_stage(finished, copied, run):
    folder = copied(finished)
    run("train_dae", folder, *CONSTANT, LATEST, "stage2.max_train_steps=9")
    run("train_dae", planned := copied(None), *CONSTANT, "stage2.max_train_steps=9")
    assert same_tensors(folder / "autoencoder", planned / "autoencoder")
    assert not same_tensors(folder / "autoencoder", finished / "autoencoder")


def test_more_steps_of_the_prior(finished, copied, run):
    folder, planned = copied(finished), copied(finished)
    run("train_prior", folder, *CONSTANT, LATEST, "prior.max_train_steps=15")
    (planned / "prior").rename(planned / "old")
    run("train_prior", planned, *CONSTANT, "prior.max_train_steps=15")
    assert same_tensors(folder / "prior", planned / "prior")


def test_the_schedule_is_that_of_the_new_length(chain, copied, run, history):
    """Half a cosine over 9 steps after a warm-up of 3, from the step on at which it went on."""
    folder = copied(chain)
    run("train_dae", folder, LATEST, "stage2.max_train_steps=9")
    rates = {row["step"]: row["lr"] for row in history(folder / "autoencoder") if row["split"] == "train"}
    after = {10 + step: 0.5 * (1 + math.cos(math.pi * (step - 3) / 6)) * 3e-3 for step in (7, 8, 9)}
    assert {step: rates[step] for step in after} == pytest.approx(after, abs=1e-12)
    assert rates[16] == 0.0  # where the run first ended


def test_stage_1_may_grow_while_it_trains(copied, run, kill, history):
    from_stage1 = copied(None)
    kill(before_update=9)
    with pytest.raises(kill.Killed):
        run("train_dae", from_stage1, *CONSTANT)
    run("train_dae", from_stage1, *CONSTANT, LATEST, "stage1.max_train_steps=11", "stage2.max_train_steps=7")
    run("train_dae", planned := copied(None), *CONSTANT, "stage1.max_train_steps=11", "stage2.max_train_steps=7")
    assert same_tensors(from_stage1 / "autoencoder", planned / "autoencoder")
    assert [r["step"] for r in history(from_stage1 / "autoencoder") if r["split"] == "train"] == list(range(1, 19))


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("train_dae", "stage2.max_train_steps=5", "stands at step 6 of stage2, stage2.max_train_steps now ends it at 5"),
        ("train_dae", "stage1.max_train_steps=12", "stage1.max_train_steps: 10 -> 12"),
        ("train_prior", "prior.max_train_steps=11", "stands at step 12 of prior, prior.max_train_steps now ends it at 11"),
    ],
)
def test_what_is_over_cannot_change(finished, copied, run, contents, recipe, override, message):
    folder = copied(finished)
    before = contents(folder)
    with pytest.raises(ValueError, match=message):
        run(recipe, folder, *CONSTANT, LATEST, override)
    assert contents(folder) == before


# ---- new data from given weights ----


def starts_from(model, other, parts):
    """Which of these parts of two autoencoders hold the same weights."""
    same = []
    for part in parts:
        a, b = getattr(model, part).state_dict(), getattr(other, part).state_dict()
        same += [part] if a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a) else []
    return same


PARTS = ("encoder", "bottleneck", "decoder")


def test_an_autoencoder_starts_from_given_weights(chain, recipe, configure, tmp_path):
    from dae.models import Autoencoder
    from dae.training import plan_stages
    from dae.training.autoencoder import build_autoencoder as build

    final, switch = (Autoencoder.from_pretrained(chain / "autoencoder" / part) for part in ("", "stage1"))
    for source in (chain, chain / "autoencoder"):
        config = configure(tmp_path, f"init_from={source}", "seed=5")
        one, two = (build(config, stage) for stage in plan_stages(config))
        assert starts_from(one, switch, PARTS) == list(PARTS) and starts_from(two, final, PARTS) == list(PARTS)
    config = configure(tmp_path, f"init_from={chain}", "auxiliary_decoder.family=linear")
    linear = build(config, plan_stages(config)[0])
    assert starts_from(linear, final, PARTS) == ["encoder", "bottleneck"]
    new = configure(tmp_path, "auxiliary_decoder.family=linear")
    assert starts_from(linear, build(new, plan_stages(new)[0]), PARTS) == ["decoder"]  # as it would be without `init_from`


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("init_from=nowhere", "'nowhere' is neither a folder nor a repository"),
        (f"init_from={Path(__file__).parent}x", f"neither a folder.*; did you mean '{Path(__file__).parent}'"),
        ("autoencoder.base_channels=16", "the encoder of init_from=.* is a checkpoint of another architecture"),
        (
            "autoencoder.vq.codebook_size=8",
            "the bottleneck of init_from=.*codebook is .16, 4., expected .8, 4.",
        ),
        ("autoencoder.bottleneck=kl", "of init_from=.* another architecture"),
        (
            "data.channels=3",
            r"the encoder of init_from=.*conv_in.weight is .8, 1, 3, 3., expected .8, 3, 3, 3..*set data.channels=1$",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_training(chain, tmp_path, run, override, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run("train_dae", tmp_path / "new", f"init_from={chain}", override)
    assert not list((tmp_path / "new").rglob("checkpoint-*"))


def test_training_on_new_data_from_given_weights(chain, copied, run, history, kill):
    """k-means does not place the codebook anew, and a resumed run ends as one that nothing interrupted."""
    settings = [f"init_from={chain}", "data.max_train_samples=200", "seed=3"]
    run("train_dae", first := copied(None), *settings)
    kill(before_update=12)
    with pytest.raises(kill.Killed):
        run("train_dae", second := copied(None), *settings)
    run("train_dae", second, *settings, LATEST)
    assert same_tensors(first / "autoencoder", second / "autoencoder")
    run("train_dae", anew := copied(None), *settings[1:])
    first_losses = [next(r["loss"] for r in history(f / "autoencoder") if r["step"] == 1) for f in (first, anew)]
    assert first_losses[0] < 0.9 * first_losses[1]


def test_a_prior_starts_from_given_weights(chain, copied, run):
    from dae.models import ARPrior
    from dae.training.initialization import load_prior

    given = ARPrior.from_pretrained(chain / "prior")
    shape = {"vocab_size": given.vocab_size, "sequence_length": given.sequence_length}
    for classes in (given.num_classes, 3):
        prior = ARPrior(given.config, **shape, num_classes=classes)
        own = prior.class_embedding.weight.clone()
        load_prior(prior, str(chain))
        assert starts_from(prior, given, ("blocks", "token_embedding", "head")) == ["blocks", "token_embedding", "head"]
        assert prior.class_embedding.weight.equal(given.class_embedding.weight if classes == given.num_classes else own)
    folder = copied(chain)
    (folder / "prior").rename(folder / "old")
    with pytest.raises(ValueError, match="another architecture"):
        run("train_prior", folder, f"prior.init_from={chain}", "prior.width=32")
    run("train_prior", folder, f"prior.init_from={folder / 'old'}", "prior.max_train_steps=1", "prior.learning_rate=0")
    assert same_tensors(folder / "prior", chain / "prior")


def test_a_diffusion_transformer_keeps_the_scale_of_its_own_latent():
    import torch

    from dae.config import PriorConfig
    from dae.models import DiT, GaussianMixturePrior
    from dae.training import initialization

    settings, shape = PriorConfig(width=16, depth=1, num_heads=2), {"latent_channels": 2, "latent_size": 4, "num_classes": 3}
    given, prior = (DiT(settings, **shape) for _ in range(2))
    given.set_latent_statistics(torch.ones(2), torch.ones(2))
    prior.set_latent_statistics(torch.zeros(2), torch.full((2,), 5.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initialization, "load_trained", lambda *_: given)
        initialization.load_prior(prior, "given")
        assert starts_from(prior, given, ("blocks", "class_embedding")) == ["blocks", "class_embedding"]
        assert prior.latent_std.flatten().tolist() == [5.0, 5.0] and prior.latent_mean.flatten().tolist() == [0.0, 0.0]
        with pytest.raises(ValueError, match="a Gaussian mixture is fitted at once"):
            initialization.load_prior(GaussianMixturePrior(settings, **shape), "given")

"""The whole chain, in this process, on several kinds of data and with each switch that changes what is trained."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dae.config import load_config
from dae.data import load_data
from dae.hub import fingerprint
from dae.models import ARPrior, Autoencoder
from dae.sampling import load_chain

METHODS = ("dae", "joint", "joint_dropout")
COLOUR = ("data.resolution=16", "data.channels=3", "autoencoder.channel_multipliers=[1,1,2]", "data.random_flip=true")
SHORT = (
    "stage1.max_train_steps=3", "stage2.max_train_steps=2", "prior.max_train_steps=3", "validation_steps=100",
    "checkpointing_steps=100", "evaluation.classifier_steps=4", "evaluation.cfg_scales=[1.0]",
)  # fmt: skip


def test_promised_files(chain):
    promised = [
        "config.yaml", "report.html", "metrics.json",
        "autoencoder/config.json", "autoencoder/model.safetensors", "autoencoder/README.md", "autoencoder/config.yaml",
        "autoencoder/logs/history.jsonl", "autoencoder/stage1/config.json", "autoencoder/stage1/model.safetensors",
        "tokens/tokens.safetensors", "tokens/cache.json",
        "prior/config.json", "prior/model.safetensors", "prior/README.md", "prior/config.yaml", "prior/logs/history.jsonl",
        "samples/samples.npz", "samples/grid.png", "samples/sampling.json", "evaluation/classifier.safetensors",
        "evaluation/pictures.npz",
    ]  # fmt: skip
    assert [name for name in promised if not (chain / name).is_file()] == []
    assert sorted(p.name for p in (chain / "autoencoder").glob("checkpoint-*")) == [
        f"checkpoint-{step}" for step in sorted((4, 8, 10, 12, 16), key=str)
    ]
    assert not list(chain.rglob(".*")), "temporaries"
    assert load_config(chain / "config.yaml").output_dir == str(chain)


def test_models_load_and_describe_themselves(chain):
    autoencoder, prior = load_chain(chain)
    assert autoencoder.config.decoder.family == "full" and not autoencoder.training
    assert Autoencoder.from_pretrained(chain / "autoencoder" / "stage1").config.decoder.family == "narrow"
    latent = Autoencoder.from_pretrained(chain / "autoencoder" / "stage1").latent
    assert autoencoder.latent == latent and latent.images == 20 and latent.transform["center_crop"] is True
    cached = json.loads((chain / "tokens" / "cache.json").read_text())["fingerprint"]["tokenizer"]
    assert ARPrior.from_pretrained(chain / "prior").tokenizer == latent.id == prior.tokenizer == cached
    for name, text in (("autoencoder", "psnr"), ("prior", "bits_per_token")):
        card = (chain / name / "README.md").read_text()
        assert card.startswith("---\n") and text in card and "hyper-parameters are ours" in card


def test_delivered_autoencoder_is_the_average(chain):
    delivered = load_file(chain / "autoencoder" / "model.safetensors")
    last = {name: load_file(chain / "autoencoder" / "checkpoint-16" / f"{name}.safetensors") for name in ("model", "ema")}
    for key, value in last["ema"].items():
        assert torch.equal(delivered[f"decoder.{key}"], value)
    assert not torch.equal(delivered["decoder.conv_out.weight"], last["model"]["decoder.conv_out.weight"])


def test_delivered_prior_is_the_average_with_the_fewest_bits(chain, history):
    validations = [row for row in history(chain / "prior") if row["split"] == "validation"]
    best = min(validations, key=lambda row: row["bits_per_token"])
    delivered = load_file(chain / "prior" / "model.safetensors")
    average = load_file(chain / "prior" / f"checkpoint-{best['step']}" / "ema.safetensors")
    assert all(torch.equal(value, average[key]) for key, value in delivered.items())


def test_histories(chain, history):
    rows = history(chain / "autoencoder")
    trained = [(row["stage"], row["step"]) for row in rows if row["split"] == "train"]
    assert trained == [("stage1", s) for s in range(1, 11)] + [("stage2", s) for s in range(11, 17)]
    assert [row["step"] for row in rows if row["split"] == "validation"] == [4, 8, 10, 14, 16]
    assert {"psnr", "codebook_usage", "codebook_perplexity"} <= rows[-1].keys()
    assert rows[15]["loss"] < rows[0]["loss"]
    prior = history(chain / "prior")
    assert [row["step"] for row in prior if row["split"] == "train"] == list(range(1, 13))
    assert [row["step"] for row in prior if row["split"] == "validation"] == [4, 8, 12]


def test_samples(chain):
    samples = np.load(chain / "samples" / "samples.npz")
    assert samples["arr_0"].dtype == np.uint8 and samples["arr_0"].shape == (40, 8, 8, 1)
    assert (np.bincount(samples["arr_1"], minlength=10) == 4).all()
    assert len(list((chain / "samples" / "png").glob("*.png"))) == 40
    assert json.loads((chain / "samples" / "sampling.json").read_text())["prior"] == fingerprint(chain / "prior")


def test_metrics(chain):
    metrics = json.loads((chain / "metrics.json").read_text())
    assert metrics.keys() >= {
        "reconstruction", "codebook", "prior", "generation", "floor", "guidance_sweep", "extractor", "data", "counts", "sampling",
        "method", "seed", "versions", "measured", "seconds",
    }  # fmt: skip
    assert {name: row["decoder"] for name, row in metrics["reconstruction"].items()} == {"stage 1": "narrow", "final": "full"}
    assert metrics["reconstruction"]["final"].keys() >= {"psnr", "ssim", "frechet"}
    assert len(metrics["codebook"]["counts"]) == 16 and sum(metrics["codebook"]["counts"]) == 360 * 16
    assert metrics["counts"] == {"train": 1437, "heldout": 360, "samples": 40, "frechet": 360}
    assert metrics["prior"]["tokens_an_image"] == 16
    numbers = {
        "recognised", "recognised_interval", "frechet", "frechet_std", "frechet_ratio", "precision", "recall", "memorised",
        "memorised_heldout", "memorised_threshold",
    }  # fmt: skip
    kernel = {"kernel_distance", "kernel_distance_std", "kernel_subsets", "kernel_subset_size"}
    assert metrics["generation"].keys() == numbers | kernel  # not for each row of the trade: it is slow, and no table shows it
    assert metrics["generation"]["kernel_subset_size"] == 20 and metrics["floor"]["kernel_subset_size"] == 180  # half of 40, 360
    assert metrics["generation"]["kernel_distance"] > metrics["floor"]["kernel_distance"]
    assert metrics["generation"]["kernel_subsets"] == 100 and metrics["generation"]["kernel_distance_std"] > 0
    assert all(row.keys() == numbers | {"prior_step", "heldout_bits_per_token", "cfg_scale"} for row in metrics["guidance_sweep"])
    assert [row["cfg_scale"] for row in metrics["guidance_sweep"]][:2] == [1.0, 2.0]
    assert json.loads(json.dumps(metrics), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) == metrics


def test_report(chain):
    page = (chain / "report.html").read_text()
    assert (
        "Decoupled Autoencoder on digits" in page
        and "100 random subsets of 20 per side" in page
        and len(re.findall('src="data:image/', page)) > 10
    )


def test_tokens_are_what_the_autoencoder_says(chain, configure):
    tokens = load_file(chain / "tokens" / "tokens.safetensors")
    assert tokens["train.tokens"].shape == (1437, 1, 16) and tokens["validation.tokens"].shape == (360, 1, 16)
    data = load_data(configure(chain).data, 0)
    autoencoder = Autoencoder.from_pretrained(chain / "autoencoder")
    images = torch.stack([data.validation[i]["image"] for i in range(20)])
    assert torch.equal(autoencoder.encode(images).indices.flatten(1).int(), tokens["validation.tokens"][:20, 0])
    assert tokens["validation.labels"][:20].tolist() == [data.validation[i]["label"] for i in range(20)]


def test_one_seed_one_result(chain, tmp_path, run):
    again = tmp_path / "again"
    for name in ("train_dae", "encode", "train_prior", "sample"):
        run(name, again)
    for name in ("autoencoder/model", "prior/model", "tokens/tokens"):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (chain, again))
        assert a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())
    assert (chain / "samples" / "grid.png").read_bytes() == (again / "samples" / "grid.png").read_bytes()
    assert fingerprint(chain / "autoencoder") == fingerprint(again / "autoencoder")
    run("train_dae", tmp_path / "other", "seed=1", *SHORT)
    a, b = (load_file(folder / "autoencoder" / "stage1" / "model.safetensors") for folder in (chain, tmp_path / "other"))
    assert not torch.equal(a["encoder.conv_in.weight"], b["encoder.conv_in.weight"])


def test_resuming_a_finished_run_leaves_its_tokens_valid(copied_chain, run):
    before = fingerprint(copied_chain / "autoencoder")
    run("train_dae", copied_chain, "resume_from_checkpoint=latest")
    assert fingerprint(copied_chain / "autoencoder") == before
    load_chain(copied_chain)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("labels", ["labelled", "unlabelled"])
def test_rgb_folder(tmp_path, run, image_folder, method, labels):
    """Pictures of several shapes in folders, 16 x 16 RGB; the chain to its end."""
    if labels == "unlabelled" and method != "dae":
        pytest.skip("labels do not reach the autoencoder")
    options = (
        *COLOUR, *SHORT, f"method={method}", f"data.dataset_name={image_folder}",
        "prior.num_augmentations=1", "prior.code_temperature=0.5", "auxiliary_decoder.dropout=0.25",
        "auto" if labels == "labelled" else "none",
    )  # fmt: skip
    options = (*options[:-1], f"data.label_column={options[-1]}")
    for name in ("train_dae", "encode", "train_prior", "sample", "evaluate", "report"):
        run(name, tmp_path / "run", *options)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(metrics["reconstruction"]) == (["stage 1", "final"] if method == "dae" else ["final"])
    assert metrics["reconstruction"]["final"]["decoder"] == ("dropout" if method == "joint_dropout" else "full")
    assert metrics["data"]["class_names"] == (["a", "b", "c"] if labels == "labelled" else ["image"])
    assert (metrics["generation"]["recognised"] is None) == (labels == "unlabelled")
    assert np.load(tmp_path / "run" / "samples" / "samples.npz")["arr_0"].shape == (40, 16, 16, 3)
    assert load_file(tmp_path / "run" / "tokens" / "tokens.safetensors")["train.tokens"].shape == (87, 2, 16)
    assert (tmp_path / "run" / "report.html").is_file()


def test_adversarial_loss_starts_at_its_step(tmp_path, run, history):
    """Until then the decoder learns as without it; the discriminator learns from the first step on and is saved."""
    adversarial = ("stage2.loss.adversarial=0.5", "stage2.loss.adversarial_start=3", "stage2.loss.discriminator_channels=8")
    small = ("stage1.max_train_steps=2", "stage2.max_train_steps=5")
    run("train_dae", tmp_path / "with", *small, *adversarial)
    run("train_dae", tmp_path / "without", *small)
    rows = [[r for r in history(tmp_path / n / "autoencoder") if r["split"] == "train"] for n in ("with", "without")]
    decoders = [[{key: r[key] for key in ("step", "stage", "loss", "lr")} for r in part[:6]] for part in rows]
    assert decoders[0] == decoders[1]  # the update of step 3 of the stage shows in the loss of the next
    assert rows[0][6]["loss"] != rows[1][6]["loss"]
    checkpoints = tmp_path / "with" / "autoencoder"
    assert not (checkpoints / "checkpoint-2" / "discriminator.safetensors").exists()
    early, late = (load_file(checkpoints / f"checkpoint-{step}" / "discriminator.safetensors") for step in (4, 7))
    assert all(not torch.equal(early[key], late[key]) for key in ("conv_in.weight", "conv_out.weight"))


def test_two_micro_batches_are_one_batch(tmp_path, run, history, same_log):
    """Where nothing is drawn for a micro-step, only the order of a sum differs."""
    still = ("autoencoder.vq.revive_threshold=0", "prior.class_dropout=0", *SHORT, "stage1.max_train_steps=6")
    for folder, batch, accumulation in (("one", 32, 1), ("two", 16, 2)):
        sizes = [f"{s}.train_batch_size={batch}" for s in ("stage1", "stage2", "prior")]
        sizes += [f"{s}.gradient_accumulation_steps={accumulation}" for s in ("stage1", "stage2", "prior")]
        for name in ("train_dae", "encode", "train_prior"):
            run(name, tmp_path / folder, *still, *sizes)
    for name in ("autoencoder", "prior"):
        same_log(history(tmp_path / "one" / name), history(tmp_path / "two" / name))


def test_gradient_checkpointing_changes_nothing(tmp_path, run, history, same_log):
    """Not even the masks of a dropout decoder and of the prior, which are drawn again on the way back."""
    drawing = ("auxiliary_decoder.family=dropout", "prior.dropout=0.2", "data.random_flip=true")
    for folder, on in (("off", "false"), ("on", "true")):
        options = [f"{stage}.gradient_checkpointing={on}" for stage in ("stage1", "stage2", "prior")]
        for name in ("train_dae", "encode", "train_prior"):
            run(name, tmp_path / folder, *drawing, *SHORT, *options)
    for name in ("autoencoder", "prior"):
        same_log(history(tmp_path / "off" / name), history(tmp_path / "on" / name))


def test_streaming(tmp_path, run, image_folder):
    options = (*COLOUR, *SHORT, f"data.dataset_name={image_folder}", "data.streaming=true", "data.shuffle_buffer_size=20")
    for name in ("train_dae", "encode", "train_prior", "sample", "evaluate", "report"):
        run(name, tmp_path / "run", *options)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["data"]["train"] is None and metrics["counts"]["train"] == 87


def test_bfloat16_and_a_tracker(tmp_path, run, history):
    run("train_dae", tmp_path / "run", *SHORT, "mixed_precision=bf16", "report_to=tensorboard")
    assert list((tmp_path / "run" / "autoencoder" / "logs").rglob("events.out.tfevents.*"))
    assert all(np.isfinite(row.get("loss", 0.0)) for row in history(tmp_path / "run" / "autoencoder"))
    weights = load_file(tmp_path / "run" / "autoencoder" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}

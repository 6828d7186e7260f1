"""Resuming: all that changes while a run trains comes back to the bit, and only the same run is continued."""

import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from dae.config import Config
from dae.data import TrainLoader
from dae.models import Autoencoder
from dae.seeding import seed_for
from dae.training import EMA, Run, TrainingState, build_optimizer, build_scheduler
from dae.training.checkpoint import Checkpoint


class Rows(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, row):
        return {"image": torch.full((1, 8, 8), row / 10.0), "row": row}


def tiny_config(folder, **changes) -> Config:
    config = Config(output_dir=str(folder), report_to="none", **changes)
    config.autoencoder.base_channels, config.autoencoder.latent_channels, config.autoencoder.vq.codebook_size = 4, 2, 8
    config.stage1.max_train_steps, config.stage1.lr_warmup_steps, config.stage1.adam_weight_decay = 12, 3, 0.1
    return config


class Trainer:
    """A training loop as in the recipes, at its smallest, with two optimisers."""

    def __init__(self, config):
        settings = config.stage1
        torch.manual_seed(0)
        self.model = Autoencoder(config.autoencoder, 1, 8)
        self.critic = nn.Linear(64, 1)
        loader = TrainLoader(Rows(), 4, seed=1)
        optimizer, other = build_optimizer(self.model, settings), build_optimizer(self.critic, settings, 0.01)
        self.parts = TrainingState(
            {"model": self.model, "discriminator": self.critic},
            {"optimizer": optimizer, "discriminator_optimizer": other},
            build_scheduler(optimizer, settings),
            loader,
            EMA(self.model, 0.9),
        )
        self.rows: list[int] = []

    def train(self, start, end):
        batches = iter(self.parts.loader)
        self.model.train()
        for step in range(start, end):
            torch.manual_seed(seed_for("test", step))
            batch = next(batches)
            self.rows += batch["row"].tolist()
            noisy = batch["image"] + 0.1 * torch.randn(batch["image"].shape)
            output = self.model(noisy)
            loss = output.sample.square().mean() + output.encoding.loss + self.critic(output.sample.flatten(1)).mean()
            loss.backward()
            self.model.bottleneck.observe(output.encoding)
            for each in self.parts.optimizers.values():
                each.step()
                each.zero_grad()
            self.parts.scheduler.step()
            self.model.bottleneck.update_codebook()
            self.parts.ema.update(self.model)
            self.parts.losses.append(loss.detach())


def same(a, b):
    (tensors, state), (others, other) = a.parts.pack(), b.parts.pack()
    assert tensors.keys() == others.keys() and json.dumps(state) == json.dumps(other)  # JSON has no tuples
    for name, part in tensors.items():
        assert part.keys() == others[name].keys()
        assert all(torch.equal(v, others[name][k]) for k, v in part.items()), name
    return True


@pytest.mark.parametrize("at", [0, 1, 3, 7])
def test_resuming_is_exact(tmp_path, at):
    """In the first epoch and in a later one, through files, as one uninterrupted run: rows, weights, moments, averages."""
    config = tiny_config(tmp_path)
    whole, first, second = Trainer(config), Trainer(config), Trainer(config)
    whole.train(0, 9)
    first.train(0, at)
    run = Run(config, "autoencoder")
    run.save(at, *first.parts.pack(), stage="stage1", stage_step=at)
    with torch.no_grad():  # what is restored must not lean on equal beginnings
        for p in [*second.model.parameters(), *second.parts.ema.average.parameters()]:
            p.add_(1)
    checkpoint = run.checkpoints.load("latest")
    assert second.parts.restore(checkpoint) == at
    assert same(first, second)
    second.train(at, 9)
    assert first.rows + second.rows == whole.rows
    assert same(whole, second)
    assert not all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


def test_nothing_to_restore(tmp_path):
    assert Trainer(tiny_config(tmp_path)).parts.restore(None) == 0


def test_a_checkpoint_is_json_and_tensors(tmp_path):
    trainer = Trainer(tiny_config(tmp_path))
    trainer.train(0, 2)
    tensors, state = trainer.parts.pack()
    json.dumps(state, allow_nan=False)
    assert set(tensors) == {"model", "discriminator", "optimizer", "discriminator_optimizer", "ema"}
    assert "0.exp_avg" in tensors["optimizer"] and tensors["ema"].keys() == tensors["model"].keys()


def test_weights_of_another_architecture(tmp_path):
    config = tiny_config(tmp_path)
    one = Trainer(config)
    tensors, state = one.parts.pack()
    config.autoencoder.latent_channels = 3
    with pytest.raises(ValueError, match=r"another architecture .*of another shape"):
        Trainer(config).parts.restore(Checkpoint(tmp_path, tensors, state | {"stage_step": 0}))


def test_no_checkpoint_of_nan(tmp_path):
    trainer = Trainer(tiny_config(tmp_path))
    with torch.no_grad():
        trainer.model.encoder.conv_in.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"model: encoder\.conv_in\.weight"):
        trainer.parts.pack()


def saved_run(config, step=4, rows=6):
    """A run with a checkpoint at `step` and a log of `rows` steps."""
    run = Run(config, "prior")
    run.open(None)
    for i in range(1, rows + 1):
        run.record(i, {"loss": torch.tensor(1.0 / i)}, stage="prior", split="train")
    run.save(step, {"model": {"w": torch.ones(2)}}, {}, stage="prior", stage_step=step)
    return run


def resumed(config, **changes):
    return dataclasses.replace(config, resume_from_checkpoint="latest", **changes)


def test_history_and_config(tmp_path):
    config = tiny_config(tmp_path)
    run = saved_run(config)
    assert [row["step"] for row in run.history()] == [1, 2, 3, 4, 5, 6]
    third = run.history()[2]
    assert third.pop("seconds") >= 0
    assert third == {"step": 3, "stage": "prior", "split": "train", "loss": pytest.approx(1 / 3)}
    assert {p.name for p in (tmp_path / "prior").iterdir()} == {"checkpoint-4", "config.yaml", "inputs.json", "logs"}
    assert (tmp_path / "config.yaml").read_text() == (tmp_path / "prior" / "config.yaml").read_text()


def test_what_was_logged_after_the_checkpoint_is_forgotten(tmp_path):
    config = tiny_config(tmp_path)
    before = saved_run(config).history()
    with open(tmp_path / "prior" / "logs" / "history.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # half a line, as a crash leaves it
    run = Run(resumed(config), "prior")
    checkpoint = run.open(None)
    assert checkpoint.state["step"] == 4 and checkpoint.tensors["model"]["w"].tolist() == [1, 1]
    assert run.history() == before[:4]
    run.record(5, {"loss": 2.0}, stage="prior")
    assert [row["step"] for row in run.history()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("trace", ["logs/history.jsonl", "model.safetensors", "checkpoint-3/manifest.json"])
def test_an_occupied_folder_is_refused(tmp_path, trace):
    path = tmp_path / "prior" / trace
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    with pytest.raises(FileExistsError, match=r"holds another run .*resume_from_checkpoint=latest, choose .*or delete it"):
        Run(tiny_config(tmp_path), "prior").open(None)
    assert path.read_text() == "precious" and not (tmp_path / "config.yaml").exists()
    Run(tiny_config(tmp_path), "autoencoder").open(None)  # the other half of the chain is free


def test_latest_of_nothing_starts(tmp_path):
    assert Run(resumed(tiny_config(tmp_path)), "prior").open(None) is None
    run = saved_run(tiny_config(tmp_path / "killed_early"))
    for path in run.checkpoints.all()[0].iterdir():
        path.unlink()
    run.checkpoints.all()[0].rmdir()
    again = Run(resumed(tiny_config(tmp_path / "killed_early")), "prior")
    assert again.open(None) is None and again.history() == []


def test_another_configuration_lists_every_difference(tmp_path):
    config = tiny_config(tmp_path)
    saved_run(config)
    other = resumed(config, seed=7, prior=dataclasses.replace(config.prior, width=64, train_batch_size=32))
    with pytest.raises(ValueError) as error:
        Run(other, "prior").open(None)
    for difference in ("seed: 0 -> 7", "prior.width: 128 -> 64", "prior: global batch 64 -> 32"):
        assert difference in str(error.value)
    assert "output_dir" not in str(error.value).split("Restore")[0]


def test_what_may_change(tmp_path):
    config = tiny_config(tmp_path)
    saved_run(config)
    free = resumed(config, logging_steps=3, checkpointing_steps=9, compile=True, checkpoints_total_limit=1)
    free.data = dataclasses.replace(config.data, num_workers=2)
    free.sampling = dataclasses.replace(config.sampling, temperature=0.5)
    assert Run(free, "prior").open(None) is not None
    elsewhere = resumed(config, stage1=dataclasses.replace(config.stage1, learning_rate=9.0))
    assert Run(elsewhere, "prior").open(None) is not None
    elsewhere = resumed(config, prior=dataclasses.replace(config.prior, learning_rate=9.0))
    with pytest.raises(ValueError, match=r"prior\.learning_rate"):
        Run(elsewhere, "prior").open(None)


def test_the_global_batch_counts(tmp_path, monkeypatch):
    """Two processes with half the batch continue what one began."""
    config = tiny_config(tmp_path)
    saved_run(config)
    halves = {name: dataclasses.replace(getattr(config, name), train_batch_size=32) for name in ("stage1", "stage2", "prior")}
    monkeypatch.setattr("dae.training.run.world_size", lambda: 2)
    with pytest.raises(ValueError, match="prior: global batch 64 -> 128"):
        Run(resumed(config), "prior").open(None)
    assert Run(resumed(config, **halves), "prior").open(None) is not None


def test_other_inputs_are_refused(tmp_path):
    config = tiny_config(tmp_path)
    run = Run(config, "prior")
    run.open(None, {"tokens": "abc"})
    run.save(1, {}, {}, stage="prior", stage_step=1)
    assert Run(resumed(config), "prior").open(None, {"tokens": "abc"}) is not None
    with pytest.raises(ValueError, match="another tokens"):
        Run(resumed(config), "prior").open(None, {"tokens": "abd"})


def test_resuming_from_a_path(tmp_path):
    config = tiny_config(tmp_path)
    run = saved_run(config)
    path = str(run.checkpoints.all()[0])
    assert Run(dataclasses.replace(config, resume_from_checkpoint=path), "prior").open(None).state["step"] == 4
    with pytest.raises(FileNotFoundError, match="is no checkpoint"):
        Run(dataclasses.replace(config, resume_from_checkpoint=path + "0"), "prior").open(None)


def test_optimizers_resume_each_other(tmp_path):
    """A GPU's run is fused, a CPU's is not: each continues the other's checkpoint, by its own way of computing."""

    def trainer(fused):
        made = Trainer(tiny_config(tmp_path))
        for optimizer in made.parts.optimizers.values():
            for group in optimizer.param_groups:
                group |= {"foreach": not fused, "fused": fused}
        return made

    for before, after in ((False, True), (True, False)):
        first, second = trainer(before), trainer(after)
        first.train(0, 2)
        saved, state = first.parts.pack()
        copies = {file: {name: value.clone() for name, value in part.items()} for file, part in saved.items()}
        second.parts.restore(Checkpoint(tmp_path, copies, state | {"stage_step": 2}))
        found, _ = second.parts.pack()
        for name in ("optimizer", "discriminator_optimizer"):
            assert all(torch.equal(value, found[name][key]) for key, value in saved[name].items())
            assert {group["fused"] for group in second.parts.optimizers[name].param_groups} == {after}
        second.train(2, 3)
        found, _ = second.parts.pack()
        assert {value.item() for key, value in found["optimizer"].items() if key.endswith(".step")} == {3}

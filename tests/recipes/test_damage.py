"""Any file of a finished chain, cut, emptied or garbled: a recipe that reads it says so in one line, before it works for long."""

import shutil
from pathlib import Path

import pytest

from dae.cli import is_message

DAMAGE = {"empty": lambda data: b"", "cut": lambda data: data[: len(data) // 2], "garbled": lambda data: b"\xff{]" + data[3:]}
READ = [
    ("encode", "autoencoder/model.safetensors"),
    ("encode", "autoencoder/config.json"),
    ("encode", "autoencoder/inputs.json"),
    ("train_prior", "autoencoder/model.safetensors"),
    ("train_prior", "autoencoder/config.json"),
    ("train_prior", "tokens/cache.json"),
    ("train_prior", "tokens/tokens.safetensors"),
    ("sample", "autoencoder/model.safetensors"),
    ("sample", "prior/config.json"),
    ("sample", "prior/model.safetensors"),
    ("evaluate", "prior/model.safetensors"),
    ("evaluate", "prior/logs/history.jsonl"),
    ("evaluate", "samples/samples.npz"),
    ("evaluate", "samples/sampling.json"),
    ("evaluate", "autoencoder/inputs.json"),
    ("report", "metrics.json"),
    ("report", "samples/samples.npz"),
    ("report", "samples/sampling.json"),
    ("report", "evaluation/pictures.npz"),
    ("report_latent", "autoencoder/config.json"),
]


@pytest.mark.parametrize(("name", "file"), READ)
def test_damaged_file(copied_chain, run, recipe, name, file):
    """It may go on without it, as where half of a line of a log is missing: but never with a traceback."""
    path = copied_chain / file
    whole = path.read_bytes()
    for how, damage in DAMAGE.items():
        path.write_bytes(damage(whole))
        if name == "train_prior":
            shutil.rmtree(copied_chain / "prior", ignore_errors=True)
        try:
            run(name, copied_chain, "measure.max_images=100")
        except Exception as error:
            assert is_message(error, Path(recipe(name).__file__)), (how, repr(error))
            stale = "stale" in str(error)  # another file than the one that the tokens were made with
            assert path.name in str(error) or path.parent.name in str(error) or stale, (how, str(error))


@pytest.mark.parametrize("damage", ["no files", "empty state", "cut tensors"])
def test_damaged_checkpoints(copied_chain, run, capsys, damage):
    """Resuming at a damaged one names it and what can be done, `latest` takes the one before, evaluation leaves it out."""
    prior = copied_chain / "prior"
    newest = max(prior.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if damage == "no files":
        for file in newest.iterdir():
            file.unlink()
    elif damage == "empty state":
        (newest / "state.json").write_text("")
    else:
        (newest / "model.safetensors").write_bytes((newest / "model.safetensors").read_bytes()[:100])
    with pytest.raises((ValueError, FileNotFoundError), match=newest.name):
        run("train_prior", copied_chain, f"resume_from_checkpoint={newest}")
    if damage == "cut tensors":
        run("evaluate", copied_chain, "evaluation.cfg_scales=[1.0]")
        assert newest.name in capsys.readouterr().out
    run("train_prior", copied_chain, "resume_from_checkpoint=latest")
    for path in prior.glob("checkpoint-*"):
        (path / "manifest.json").write_text("")
    with pytest.raises(ValueError, match=r"no checkpoint can be read.*another output_dir"):
        run("train_prior", copied_chain, "resume_from_checkpoint=latest")


def test_lost_log(copied_chain, run):
    (copied_chain / "prior" / "logs" / "history.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"no log of the prior's training.*recipes/train_prior\.py"):
        run("evaluate", copied_chain)

"""compile=true trains what eager mode does, through the switch and the prior, with an adversarial loss."""

import json

import pytest
import torch
from safetensors.torch import load_file

STEPS = (
    "stage1.max_train_steps=2", "stage2.max_train_steps=2", "prior.max_train_steps=2", "stage2.loss.adversarial=0.1",
    "stage2.loss.discriminator_channels=8", "validation_steps=100", "checkpointing_steps=100",
    "logging_steps=1",
)  # fmt: skip


def losses(folder):
    rows = map(json.loads, (folder / "logs" / "history.jsonl").read_text().splitlines())
    return torch.tensor([row["loss"] for row in rows if row["split"] == "train"])


@pytest.mark.slow
def test_a_compiled_chain(tmp_path, run):
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        run("train_dae", tmp_path / name, *STEPS, f"compile={compiled}")
    eager, compiled = (losses(tmp_path / name / "autoencoder") for name in ("eager", "compiled"))
    assert len(eager) == 4  # means of thousands of float32 terms in other orders, before and after a step, in both stages
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=0)
    eager, compiled = (load_file(tmp_path / name / "autoencoder" / "model.safetensors") for name in ("eager", "compiled"))
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():  # AdamW divides by the gradient's size, so rounding can turn whole steps
        torch.testing.assert_close(compiled[name], value, rtol=0, atol=4 * 3e-3, msg=lambda text, name=name: f"{name}: {text}")
    run("encode", tmp_path / "compiled", *STEPS)
    run("train_prior", tmp_path / "compiled", *STEPS, "compile=true")

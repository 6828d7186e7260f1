"""What the README promises is run."""

import re
from pathlib import Path

import torch

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_inference_example_is_three_lines_and_runs(chain):
    example = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    lines = [line for line in example.splitlines() if line and not line.startswith(("import ", "from "))]
    assert len(lines) <= 3
    names: dict = {}
    exec(example.replace("runs/demo", str(chain)), names)
    images = names["images"]
    assert images.shape == (3, 1, 8, 8)
    assert images.isfinite().all()


def test_every_file_it_names_exists():
    root = Path(__file__).parents[2]
    named = re.findall(r"(?:recipes|profiling|dae|kernels|tests)/[\w/]+(?:\.py|\.yaml)", README)
    assert named
    assert not [name for name in named if not (root / name).is_file()]


def test_the_example_of_a_measurement_runs():
    examples = re.findall(r"```python\n(.*?)```", README, re.S)
    (example,) = [e for e in examples if "dae.complexity" in e]
    latents = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    names = {"latents": latents, "data": latents @ torch.tensor([[2.0, 0.0], [0.0, 0.5]])}
    exec(example, names)
    assert names["distance"].bound == "exact" and names["distance"].value > names["curve"].estimates[-1].value
    assert names["curve"].required_capacity(0.1) in (2.0, 4.0)

"""Model cards: training data, training and quality of a published model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from dae.config import Config
from dae.priors import PriorFamily


def _card(
    title: str, tags: Sequence[str], usage: str, data: dict, history: list[dict], config: Config, facts: Sequence[str]
) -> str:
    steps = [row["step"] for row in history if row.get("split") == "validation"]
    last = [row for row in history if steps and row["step"] == steps[-1] and row.get("split") != "train"]
    metrics = {k: v for row in last for k, v in row.items() if isinstance(v, float) and k != "seconds"}
    table, header = "\n".join(f"| {k} | {v:.4g} |" for k, v in metrics.items()), "\n".join(f"- {tag}" for tag in tags)
    read = "\n".join(["", "```", *facts, "```", ""]) if facts else ""
    return f"""---
library_name: decoupled-autoencoder
tags:
{header}
---

# {title}

Trained with the method of "Complexity Matters: Rethinking the Latent Space for Generative Modeling" (Hu et al., NeurIPS 2023,
arXiv 2307.08283) as publicly described; the hyper-parameters are ours.

```python
{usage}
```

## Data
{read}
```json
{json.dumps(data, indent=2)}
```

## Metrics on held-out data

| metric | value |
|---|---|
{table}

## Configuration

```json
{json.dumps(dataclasses.asdict(config), indent=2)}
```
"""


def autoencoder_card(config: Config, data: dict, history: list[dict], facts: Sequence[str] = ()) -> str:
    """Model card of an autoencoder; `facts` is the table of `dae.data.Summary`."""
    usage = (
        "from dae.models import Autoencoder\n"
        'autoencoder = Autoencoder.from_pretrained("path or repository")\n'
        "images = autoencoder.decode(autoencoder.encode(images).latents).sample"
    )
    encoder = config.autoencoder.encoder
    how = f"decoder on the frozen encoder {encoder}" if encoder else f"method: {config.method}"
    title = f"Autoencoder of {data['title']} ({how})"
    return _card(title, ["autoencoder", "image-tokenizer", config.method], usage, data, history, config, facts)


def prior_card(config: Config, family: PriorFamily, data: dict, history: list[dict], facts: Sequence[str] = ()) -> str:
    """Model card of a prior of `family`."""
    name = family.model.__name__
    usage = (
        "import torch\n"
        f"from dae.models import {', '.join(sorted(('Autoencoder', name)))}\n"
        + (f"from dae.sampling import {family.imports}\n" if family.imports else "")
        + 'autoencoder = Autoencoder.from_pretrained("path or repository of the autoencoder")\n'
        f'prior = {name}.from_pretrained("path or repository of the prior")\n'
        "labels = torch.arange(prior.num_classes)\n"
        f"images = {family.usage}"
    )
    return _card(f"{family.title} of {data['title']}", family.tags, usage, data, history, config, facts)

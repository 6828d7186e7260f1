"""Model cards: what a published model was trained on, how, and how good it is."""

from __future__ import annotations

import json

from dae.config import Config


def _card(title: str, tags: list[str], usage: str, data: dict, history: list[dict], config: Config) -> str:
    import dataclasses

    validations = [row for row in history if row.get("split") == "validation"]
    metrics = {k: v for k, v in validations[-1].items() if isinstance(v, float)} if validations else {}
    metrics.pop("seconds", None)
    table = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
    header = "\n".join(f"- {tag}" for tag in tags)
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


def autoencoder_card(config: Config, data: dict, history: list[dict]) -> str:
    usage = (
        "from dae.models import Autoencoder\n"
        'autoencoder = Autoencoder.from_pretrained("path or repository")\n'
        "images = autoencoder.decode(autoencoder.encode(images).latents).sample"
    )
    title = f"Autoencoder of {config.data.dataset_name} (method: {config.method})"
    return _card(title, ["autoencoder", "image-tokenizer", config.method], usage, data, history, config)


def prior_card(config: Config, data: dict, history: list[dict]) -> str:
    usage = (
        "import torch\n"
        "from dae.models import ARPrior, Autoencoder\n"
        "from dae.sampling import sample_tokens\n"
        'autoencoder = Autoencoder.from_pretrained("path or repository of the autoencoder")\n'
        'prior = ARPrior.from_pretrained("path or repository of the prior")\n'
        "labels = torch.arange(prior.num_classes)\n"
        "images = autoencoder.decode_indices(sample_tokens(prior, labels)).sample"
    )
    title = f"Autoregressive prior of {config.data.dataset_name}"
    return _card(title, ["autoregressive", "image-generation"], usage, data, history, config)

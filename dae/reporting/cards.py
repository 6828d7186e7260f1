"""Model cards: what a published model was trained on, how, and how good it is."""

from __future__ import annotations

import json

from dae.config import Config


def _card(title: str, tags: list[str], usage: str, data: dict, history: list[dict], config: Config, facts: list[str]) -> str:
    import dataclasses

    validations = [row for row in history if row.get("split") == "validation"]
    last = [row for row in history if validations and row["step"] == validations[-1]["step"] and row.get("split") != "train"]
    metrics = {k: v for row in last for k, v in row.items() if isinstance(v, float)}
    metrics.pop("seconds", None)
    table = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
    header = "\n".join(f"- {tag}" for tag in tags)
    facts_block = "\n".join(["", "```", *facts, "```", ""]) if facts else ""
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
{facts_block}
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


def autoencoder_card(config: Config, data: dict, history: list[dict], facts: list[str] = ()) -> str:
    """Card of an autoencoder; `facts` is the table of `dae.data.Summary`."""
    usage = (
        "from dae.models import Autoencoder\n"
        'autoencoder = Autoencoder.from_pretrained("path or repository")\n'
        "images = autoencoder.decode(autoencoder.encode(images).latents).sample"
    )
    title = f"Autoencoder of {data['title']} (method: {config.method})"
    return _card(title, ["autoencoder", "image-tokenizer", config.method], usage, data, history, config, facts)


PRIORS = {
    "ARPrior": ("Autoregressive prior", ["autoregressive", "image-generation"], "sample_tokens",
                "autoencoder.decode_indices(sample_tokens(prior, labels)).sample"),
    "DiT": ("Diffusion Transformer", ["flow-matching", "image-generation"], "sample_latents",
            "autoencoder.decode(sample_latents(prior, labels, num_inference_steps=32)).sample"),
    "GaussianMixturePrior": ("Gaussian mixture prior", ["gaussian-mixture", "image-generation"], None,
                             "autoencoder.decode(prior.sample(len(labels))).sample"),
}  # fmt: skip


def prior_card(config: Config, kind: type, data: dict, history: list[dict], facts: list[str] = ()) -> str:
    """Card of a prior of class `kind`."""
    name, tags, sampler, images = PRIORS[kind.__name__]
    usage = (
        "import torch\n"
        f"from dae.models import {', '.join(sorted(('Autoencoder', kind.__name__)))}\n"
        + (f"from dae.sampling import {sampler}\n" if sampler else "")
        + 'autoencoder = Autoencoder.from_pretrained("path or repository of the autoencoder")\n'
        f'prior = {kind.__name__}.from_pretrained("path or repository of the prior")\n'
        "labels = torch.arange(prior.num_classes)\n"
        f"images = {images}"
    )
    return _card(f"{name} of {data['title']}", tags, usage, data, history, config, facts)

"""Train an autoencoder: the Decoupled Autoencoder in two stages, or one of its one-stage baselines.

    accelerate launch recipes/train_dae.py --config recipes/configs/digits.yaml
    accelerate launch recipes/train_dae.py --config recipes/configs/digits.yaml method=joint output_dir=runs/joint
    torchrun --standalone --nproc_per_node 2 recipes/train_dae.py stage1.train_batch_size=32 stage2.train_batch_size=32

Stage 1 trains encoder, bottleneck and a weak auxiliary decoder; then encoder and bottleneck are frozen, and stage 2 trains
the real decoder. A pretrained encoder (autoencoder.encoder=timm:<name>) is frozen from the start: there is no stage 1.
Runs on a CPU unchanged; on GPUs add `--mixed_precision bf16` to `accelerate launch`.
Writes <output_dir>/autoencoder: model.safetensors and config.json, stage1/ (the model at the switch), checkpoint-*/, logs/.
"""

from __future__ import annotations

import functools
from pathlib import Path

from dae.cli import main
from dae.config import Config
from dae.data import load_data, summarize_data
from dae.diagnostics.doctor import CHANCE, Doctor
from dae.distributed import failing_together, run_on_first_process
from dae.files import announce
from dae.hub import prepare_repository
from dae.lock import writes
from dae.planning.plan import plan_autoencoder
from dae.priors import require_guidance
from dae.reporting.cards import autoencoder_card
from dae.training import Run, end_training, make_accelerator, plan_stages
from dae.training.autoencoder import build_autoencoder, train_stages, training_loader
from dae.training.engine import AcceleratorEngine
from dae.training.preflight import preflight_autoencoder
from dae.training.rehearsal import rehearse_chain, require_measurable, sampled_classes
from dae.training.stages import saved_discriminators


@writes("autoencoder", makes_folder=True)
def train(config: Config) -> Path:
    """Train, save, and return the folder of the trained autoencoder."""
    if config.method == "refit":
        raise ValueError("method=refit trains a decoder for the latent of init_from: that is what recipes/refit.py does")
    require_guidance(config)
    stages = plan_stages(config)
    run = Run(config, "autoencoder", Doctor({stage.name: CHANCE[stage.config.loss.adversarial_loss] for stage in stages}).examine)
    accelerator = make_accelerator(config, run.folder / "logs")
    engine = AcceleratorEngine(accelerator)
    with failing_together():
        data = load_data(config.data, config.seed)
        rows, loaders = data.describe(), functools.partial(training_loader, config, data)
        for stage in stages:
            loaders(stage, "check")
        rehearse_chain(config, data.num_classes, rows["train"], engine, accelerator.num_processes)
        sampled_classes(config, data.class_names, data.labels)
        require_measurable(config, training_images=rows["train"], held_out_images=rows["validation"])
        summary = summarize_data(data) if accelerator.is_main_process else None
    if config.push_to_hub:
        run_on_first_process(lambda: prepare_repository(config.hub_model_id, f"{config.hub_model_id}-prior"))
    resumed = run.open(accelerator, {"data set": data.fingerprint}, stages, rows | {"table": summary and summary.table()})
    data.list_skipped(config.output_dir)
    if summary:
        print("\n".join(summary.lines()))

    if resumed is None:
        preflight_autoencoder(config, loaders, engine.device)
    autoencoder = build_autoencoder(config, stages[0]).to(engine.device)
    train_stages(config, autoencoder, loaders, engine, heldout=data.validation, run=run, resumed=resumed)

    def save() -> None:
        autoencoder.save_pretrained(run.folder, card=autoencoder_card(config, data.describe(), run.history(), summary.lines()))
        announce(
            run.folder,
            run.outputs(*(stage.name for stage in stages[:-1]), *saved_discriminators(config).values()),
            data.skipped_note(),
        )
        if config.push_to_hub:
            print(autoencoder.push_to_hub(config.hub_model_id, folder=run.folder))

    run_on_first_process(save)
    end_training(accelerator)
    return run.folder


if __name__ == "__main__":
    main(train, __doc__, plan_autoencoder)

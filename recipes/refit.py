"""Refit: a better decoder for a latent that must stay as it is, trained on your images.

    python recipes/refit.py --config recipes/configs/refit_sd_vae.yaml init_from=/models/sd-vae data.dataset_name=/data/images
    python recipes/refit.py --config runs/mine/config.yaml init_from=runs/mine output_dir=runs/refit stage2.max_train_steps=5000

Stage 2 of the Decoupled Autoencoder on a frozen encoder and bottleneck: those of a folder of diffusers' AutoencoderKL or VQModel,
or of one of ours (`init_from`). Starts from its decoder or from a new one (`refit.decoder`). What was made for the old decoder
(encodings, diffusion models) works with the new one: checksums of encoder, bottleneck and the latents of held-out images are
compared, and a difference is an error. Writes <output_dir>/autoencoder (model, checkpoints, log), in it diffusers/ for
`from_pretrained` there, and <output_dir>/refit.html and refit.json: both decoders on held-out images.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

from dae.cli import main
from dae.config import Config
from dae.data import load_data, summarize_data
from dae.diagnostics.doctor import CHANCE, Doctor
from dae.distributed import failing_together, run_on_first_process
from dae.evaluation.refit import RefitEvaluation
from dae.files import announce, write_file
from dae.hub import prepare_repository
from dae.lock import writes
from dae.models import Autoencoder
from dae.planning.plan import plan_autoencoder
from dae.reporting.cards import autoencoder_card
from dae.reporting.refit import lines, refit_page
from dae.training import Run, end_training, make_accelerator, plan_stages
from dae.training.autoencoder import train_stages, training_loader
from dae.training.engine import AcceleratorEngine
from dae.training.preflight import preflight_autoencoder
from dae.training.refit import build_refit, prepare_refit, write_diffusers
from dae.training.rehearsal import rehearse_autoencoder


@writes("autoencoder", makes_folder=True)
def refit(config: Config) -> Path:
    """Train, save, measure, and return the folder of the autoencoder."""
    config, source = prepare_refit(config)
    (stage,), output = plan_stages(config), Path(config.output_dir)
    run = Run(config, "autoencoder", Doctor({stage.name: CHANCE[stage.config.loss.adversarial_loss]}).examine)
    accelerator = make_accelerator(config, run.folder / "logs")
    engine = AcceleratorEngine(accelerator)
    with failing_together():
        data = load_data(config.data, config.seed)
        rows, loaders = data.describe(), functools.partial(training_loader, config, data)
        loaders(stage, "check")
        rehearse_autoencoder(config, rows["train"], engine)
        evaluation = RefitEvaluation.start(config, data, source, engine.device) if accelerator.is_main_process else None
        summary = summarize_data(data) if accelerator.is_main_process else None
    if config.push_to_hub:
        run_on_first_process(lambda: prepare_repository(config.hub_model_id))
    inputs = {"data set": data.fingerprint, "latent": source.latent.id}
    resumed = run.open(accelerator, inputs, [stage], rows | {"table": summary and summary.table()})
    data.list_skipped(config.output_dir)
    if summary:
        print("\n".join(summary.lines()))

    if resumed is None:
        preflight_autoencoder(config, loaders, engine.device)
    autoencoder = build_refit(config, source).to(engine.device)
    train_stages(config, autoencoder, loaders, engine, heldout=data.validation, run=run, resumed=resumed)

    def save() -> None:
        autoencoder.save_pretrained(run.folder, card=autoencoder_card(config, data.describe(), run.history(), summary.lines()))
        found = evaluation.finish(Autoencoder.from_pretrained(run.folder))
        written = write_diffusers(autoencoder, run.folder / "diffusers")
        write_file(output / "refit.json", json.dumps(found.facts, indent=1).encode())
        refit_page(found, run.history(), config, summary.table()).write(output / "refit.html")
        print("\n".join(lines(found)))
        announce(output, ["refit.json", "refit.html"], "/refit.html")
        announce(run.folder, [*run.outputs(), *written], data.skipped_note())
        if config.push_to_hub:
            print(autoencoder.push_to_hub(config.hub_model_id, folder=run.folder))

    run_on_first_process(save)
    end_training(accelerator)
    return run.folder


def plan(config: Config, gpu: str) -> list[str]:
    return plan_autoencoder(prepare_refit(config)[0], gpu)


if __name__ == "__main__":
    main(refit, __doc__, plan)

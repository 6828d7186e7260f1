"""Train a tokenizer and its peer of diffusers for equal times, in turns in one process, and compare their held-out PSNR.

    python profiling/bench_tokenizer.py --config recipes/configs/cifar10_vq.yaml --minutes 20
    python profiling/bench_tokenizer.py --config recipes/configs/clothing128_kl.yaml data.dataset_name=/data/clothing

The peer of a KL configuration is diffusers' AutoencoderKL, of any other VQModel, built by diffusers' own blocks with the same
channels, multipliers, residual blocks, attention, latent and codes, and with its own mid blocks and its own quantizer. Both are
trained by the same step (dae/training): images in the same order, losses, AdamW, clipping, and an average of the weights, which
is what is measured. `--minutes` is for each; turns of one step go to the model that has trained less so far, so other load on
the machine slows both. Building the model and placing its codebook count, validation does not. The learning rate is warmed up
over the first 2 % of the time and falls by a cosine to 0 at its end, as the number of steps is not known before.

PSNR is the mean over --images held-out images (all, if there are fewer), with a standard error; that of the difference is over
the same images. Printed, too: steps, images/s, parameters; with a codebook also the share of codes that these images use.
"""

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_report import software
from configuration import read_config
from measuring import append_row, machine, measuring_parser, now, synchronize
from torch import Tensor, nn

from dae.config import Config
from dae.data import TrainLoader, load_data
from dae.data.loader import evaluation_batches
from dae.metrics import psnr
from dae.models.autoencoder import Reconstruction
from dae.quantizers import Encoding, bottleneck_class
from dae.seeding import seed_for
from dae.training import plan_stages
from dae.training.autoencoder import StageTraining, build_autoencoder, build_perceptual_loss
from dae.training.engine import LocalEngine, set_backends

WARM_UP = 0.02  # of the time


class Peer(nn.Module):
    """diffusers' AutoencoderKL or VQModel with the interface that a training step needs of an autoencoder."""

    latent_frozen = False

    def __init__(self, config: Config):
        super().__init__()
        ours = config.autoencoder
        levels = range(len(ours.channel_multipliers))
        kinds = ["Attn" if config.data.resolution >> level in ours.attention_resolutions else "" for level in levels]
        options = {
            "in_channels": config.data.channels,
            "out_channels": config.data.channels,
            "down_block_types": tuple(f"{kind}DownEncoderBlock2D" for kind in kinds),
            "up_block_types": tuple(f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)),
            "block_out_channels": tuple(ours.base_channels * multiplier for multiplier in ours.channel_multipliers),
            "layers_per_block": ours.num_blocks,
            "latent_channels": ours.latent_channels,
            "norm_num_groups": math.gcd(32, *(ours.base_channels * multiplier for multiplier in ours.channel_multipliers)),
        }
        self.kl_weight = ours.kl.kl_weight
        if ours.bottleneck == "kl":
            from diffusers import AutoencoderKL

            self.network: Any = AutoencoderKL(**options)
        else:
            from diffusers import VQModel

            codes = bottleneck_class(ours).num_codes(ours)
            self.network = VQModel(**options, num_vq_embeddings=codes, vq_embed_dim=ours.latent_channels)
        self.bottleneck = Untouched()

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def encoder(self) -> nn.Module:
        return self.network.encoder

    def enable_gradient_checkpointing(self, enabled: bool) -> None:
        if enabled:
            raise ValueError("the peer has no gradient checkpointing here: leave stage1.gradient_checkpointing=false")

    def forward(self, images: Tensor) -> Reconstruction:
        network = self.network
        if hasattr(network, "quantize"):
            features = network.quant_conv(network.encoder(images))
            latents, loss, (*_, indices) = network.quantize(features)
            sample = network.decoder(network.post_quant_conv(latents))
            return Reconstruction(sample, Encoding(latents, loss, features, indices))
        posterior = network.encode(images).latent_dist
        latents = posterior.sample() if self.training else posterior.mode()
        loss = self.kl_weight * posterior.kl().mean()
        return Reconstruction(network.decode(latents).sample, Encoding(latents, loss, posterior.mean))


class Untouched(nn.Module):
    """In place of our bottleneck: diffusers' codes are parameters, which the optimiser moves."""

    learns_codebook = False


class Contestant:
    """A model in training, with the time that it took."""

    def __init__(
        self, name: str, config: Config, build: Callable[[], nn.Module], data: Any, seconds: float, device: torch.device
    ):
        self.name, self.budget, self.steps, self.spent = name, seconds, 0, 0.0
        (stage,) = plan_stages(config)
        engine = LocalEngine(device, config.mixed_precision)
        start = time.perf_counter()

        def loaders(stage: Any, purpose: str) -> TrainLoader:
            seed = seed_for(config.seed, stage.name, purpose)
            return TrainLoader(data.train, stage.config.train_batch_size, seed=seed, num_workers=config.data.num_workers)

        torch.manual_seed(seed_for(config.seed, "autoencoder"))
        model: Any = build().to(device).train()
        self.training = StageTraining(config, stage, model, loaders, engine, build_perceptual_loss(config, stage))
        self.training.state.scheduler.lr_lambdas = [self.rate for _ in self.training.state.scheduler.lr_lambdas]
        self.model, self.batch = model, stage.config.train_batch_size * stage.config.gradient_accumulation_steps
        self.spent += time.perf_counter() - start

    def rate(self, _: int) -> float:
        """Factor of the learning rate, by the time that was spent."""
        share = min(1.0, self.spent / self.budget)
        return min(share / WARM_UP, 1.0) * 0.5 * (1 + math.cos(math.pi * share))

    def step(self) -> None:
        start = time.perf_counter()
        self.training.step(self.steps)
        loss = self.training.state.losses[-1]
        if not math.isfinite(loss.item()):
            sys.exit(f"{self.name}: the loss is {loss.item()} at step {self.steps}: lower stage1.learning_rate")
        self.training.state.losses.clear()
        self.steps += 1
        synchronize(self.training.engine.device)
        self.spent += time.perf_counter() - start

    @torch.no_grad()
    def measure(self, data: Any, images: int, batch_size: int) -> tuple[Tensor, float | None]:
        """PSNR of each held-out image, and the share of all codes that they use."""
        ratios, used = [], []
        with self.training.averaged(), self.training.engine.autocast():
            self.model.eval()
            for batch in evaluation_batches(data.validation, batch_size, limit=images):
                shown = batch["image"].to(self.training.engine.device)
                output = self.model(shown)
                ratios.append(psnr(output.sample.float().clamp(-1, 1), shown).cpu())
                if output.encoding.indices is not None:
                    used.append(output.encoding.indices.flatten().cpu())
            self.model.train()
        codes = bottleneck_class(self.training.config.autoencoder)
        share = len(torch.cat(used).unique()) / codes.num_codes(self.training.config.autoencoder) if used else None
        return torch.cat(ratios), share


def show(contestant: Contestant, ratios: Tensor, share: float | None) -> str:
    codes = "" if share is None else f", {share:.0%} of the codes used"
    return (
        f"{contestant.name}: PSNR {ratios.mean():.3f} dB, n={len(ratios)}, after {contestant.steps:,} steps in "
        f"{contestant.spent / 60:.1f} min, {contestant.steps * contestant.batch / contestant.spent:.0f} images/s{codes}"
    )


def main() -> None:
    parser = measuring_parser(__doc__)
    parser.add_argument("--config", required=True, help="YAML file of a tokenizer")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for the recipes")
    parser.add_argument("--minutes", type=float, default=20.0, help="training time of each model (default: %(default)s)")
    parser.add_argument("--images", type=int, default=1000, help="held-out images, at most (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--every", type=float, default=5.0, help="minutes between two lines of progress (default: %(default)s)")
    arguments = parser.parse_intermixed_args()
    if not arguments.minutes > 0 or arguments.images < 2 or not arguments.every > 0:
        parser.error("expected --minutes and --every above 0 and --images of at least 2")
    try:
        config = read_config(arguments.config, arguments.overrides)
        if len(plan_stages(config)) > 1:
            raise ValueError("a comparison needs a method of one stage: method=joint")
        config = dataclasses.replace(config, mixed_precision=config.mixed_precision or "no")
        data = load_data(config.data, config.seed)
    except (ValueError, FileNotFoundError) as error:
        parser.error(" ".join(str(error).split()))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    set_backends(config, device)
    where = machine(device, "torch", "diffusers")
    title = " ".join([Path(arguments.config).name, *arguments.overrides])
    print(f"{title} on {where['hardware']}, {torch.get_num_threads()} threads; {software(where)}", flush=True)
    (stage,) = plan_stages(config)
    seconds = 60 * arguments.minutes
    contestants = [
        Contestant("ours", config, lambda: build_autoencoder(config, stage), data, seconds, device),
        Contestant("diffusers", config, lambda: Peer(config), data, seconds, device),
    ]
    for each in contestants:
        print(f"{each.name}: {sum(p.numel() for p in each.model.parameters()):,} parameters", flush=True)

    def measured() -> list[tuple[Contestant, Tensor, float | None]]:
        return [(each, *each.measure(data, arguments.images, stage.config.train_batch_size)) for each in contestants]

    due = itertools.count(60 * arguments.every, 60 * arguments.every)
    upcoming = next(due)
    while (current := min(contestants, key=lambda each: (each.steps > 0, each.spent))).spent < seconds or not current.steps:
        current.step()
        if min(each.spent for each in contestants) >= upcoming:
            print("\n".join(itertools.starmap(show, measured())), flush=True)
            upcoming = next(due)
    found = measured()
    print("at the end\n" + "\n".join(itertools.starmap(show, found)))
    ours, theirs = (ratios for _, ratios, _ in found)
    gain, error = (ours - theirs).mean().item(), ((ours - theirs).std() / len(ours) ** 0.5).item()
    print(f"ours - diffusers: {gain:+.3f} dB (standard error over images {error:.3f}), n={len(ours)}")
    rows = [
        {
            "model": each.name,
            "psnr": ratios.mean().item(),
            "standard_error": (ratios.std() / len(ratios) ** 0.5).item(),
            "steps": each.steps,
            "seconds": each.spent,
            "images_per_second": each.steps * each.batch / each.spent,
            "parameters": sum(p.numel() for p in each.model.parameters()),
            "codes_used": share,
        }
        for each, ratios, share in found
    ]
    row = {"config": title, "minutes": arguments.minutes, "n": len(ours), "gain": gain, "gain_standard_error": error}
    append_row(arguments.json, row | {"models": rows, "time": now()} | where)


if __name__ == "__main__":
    main()

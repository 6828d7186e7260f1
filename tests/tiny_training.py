"""Trainings of a few seconds on random data, and watches over what a step does."""

import contextlib
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import dae
from dae.config import load_config
from dae.cuda_graphs import Recorder
from dae.data import TrainLoader
from dae.data.cache import Fingerprint
from dae.losses import PerceptualLoss
from dae.priors import prior_family
from dae.training import plan_stages
from dae.training.autoencoder import StageTraining, build_autoencoder
from dae.training.encodings import build_cache, cache_class
from dae.training.engine import LocalEngine
from dae.training.prior import PriorTraining

CPU = torch.device("cpu")
TINY = Path(__file__).parent / "recipes" / "tiny.yaml"
GAN = ("stage2.loss.adversarial=0.1", "stage2.loss.discriminator_channels=8", "autoencoder.vq.revive_threshold=0.5")


def autoencoder_training(*overrides, which=0, device=CPU, engine=None):
    config = load_config(TINY, ["data.random_flip=true", "autoencoder.vq.kmeans_iterations=1", *overrides])
    stage = plan_stages(config)[which]
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    data = [{"image": image} for image in images]
    autoencoder = build_autoencoder(config, stage)
    stage.freeze(autoencoder)
    autoencoder.to(device).train()

    def loaders(stage, purpose):
        return TrainLoader(data, stage.config.train_batch_size, seed=3)

    perceptual = PerceptualLoss() if stage.config.loss.perceptual else None
    return StageTraining(config, stage, autoencoder, loaders, engine or LocalEngine(device), perceptual)


def prior_training(*overrides, values, device=CPU):
    config = load_config(TINY, ["prior.num_augmentations=1", "prior.token_noise=0.1", "prior.dropout=0.1", *overrides])
    autoencoder = build_autoencoder(config, plan_stages(config)[0])
    parts = [cache_class(autoencoder.bottleneck).dataset(values, torch.arange(len(values)) % 3)] * 2
    cache = build_cache(autoencoder, *parts, 3, Fingerprint("", "", ""))
    family = prior_family(config)
    torch.manual_seed(0)
    prior = family.build(config.prior, cache)
    loader = TrainLoader(cache.train, config.prior.train_batch_size, seed=1)
    return PriorTraining(config, family, prior.train().to(device), loader, LocalEngine(device))


def weights(training):
    tensors, state = training.state.pack()
    return {f"{file}/{name}": value.clone() for file, part in tensors.items() for name, value in part.items()}, state


class ScalingEngine(LocalEngine):
    """Losses scaled by 2^10; and fp16 on a CPU, which accelerate does not offer, with torch's autocast and scaler as on a GPU."""

    def __init__(self, dtype=None, growth_interval=2000):
        super().__init__(CPU)
        self.dtype, self.scales, self.growth_interval = dtype, True, growth_interval

    def prepare(self, module, optimizer):
        prepared = super().prepare(module, optimizer)
        self.scalers[optimizer] = torch.amp.GradScaler("cpu", 2.0**10, growth_interval=self.growth_interval)
        return prepared


class Replicated(LocalEngine):
    """Two processes of torch's DistributedDataParallel, as accelerate makes it."""

    def prepare(self, module, optimizer):
        return super().prepare(DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True), optimizer)

    @contextlib.contextmanager
    def synchronize(self, *modules, when):
        with contextlib.ExitStack() as stack:
            for module in modules:
                if not when:
                    stack.enter_context(module.no_sync())
            yield


class Rerun(Recorder):
    """In place of graphs on a CPU: a replay does the work again, on the tensors that it was recorded with."""

    def __init__(self, device=CPU, generators=()):
        self.recorded = 0

    def warm_up(self, work):
        return work()

    def record(self, work):
        self.recorded += 1
        return _Again(work)


class _Again:
    def __init__(self, work):
        self.work, self.result = work, None

    def replay(self):
        result = self.work()
        self.result = result if self.result is None else self.result.copy_(result)
        return self.result


READERS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")


class Reads(TorchDispatchMode):
    """The lines of dae that read a value of a tensor, for which the host would wait on a GPU.

    Lines of torch do not count: AdamW, whose count of steps is on the CPU where it is not fused. Nor do those of dae_kernels,
    which read values on a CPU alone (`values_readable`), and of dae.data, whose tables are in the host's memory.
    """

    def __init__(self):
        super().__init__()
        self.lines = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masked = name == "index" and any(each is not None and each.dtype == torch.bool for each in args[1])
        if name in READERS or name.startswith("unique") or masked:
            frame = sys._getframe(1)
            while frame.f_code.co_filename.endswith(("_python_dispatch.py", "eval_frame.py", "_compile.py")):  # the mode's own
                frame = frame.f_back
            folders = Path(frame.f_code.co_filename).parents
            if (package := Path(dae.__file__).parent) in folders and package / "data" not in folders:
                self.lines.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return function(*args, **(kwargs or {}))

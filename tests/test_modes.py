"""Modes of torch that a caller has set change no bit of what is measured, and inference tensors are taken everywhere.

Every public name of these packages is in `CASES`, or in `NO_CASE` with the reason.
"""

import contextlib
import dataclasses

import pytest
import torch
from torch import nn

from dae import complexity, losses, metrics, sampling
from dae.complexity import adversarial
from dae.config import AutoencoderConfig, LossConfig, PriorConfig, SamplingConfig, VQConfig
from dae.diagnostics import predictors
from dae.models import ARPrior, Autoencoder, DiT

pytest.importorskip("ot")
FAST = {"seeds": (0,), "steps": 2, "batch_size": 32}
LATENT, DATA, ADVERSARIES = (2, 4, 4), (1, 8, 8), ("js", "wgan_gp", "wgan_sn")


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def all_at_once():
    with contextlib.ExitStack() as stack:
        for name in ("autocast", "float64", "meta", "deterministic", "inference_mode"):
            stack.enter_context(MODES[name]())
        yield


MODES = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: default_device("meta"),
    "device": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "all at once": all_at_once,
}


# ---- what is called: each takes tensors `t` and returns what is compared ----


def clouds(make):
    return lambda t: make(t["latents"], t["data"])


def family(kind, latent=LATENT, data=DATA, **options):
    """Construction, its best or first member, a step back into the family, and the forward pass outside of the modes."""

    def call(t):
        torch.manual_seed(0)
        member = kind(**options)
        z, x = t["z"].reshape(-1, *latent), t["images"].reshape(-1, *data)
        start, built = member.start(z, x), member.build(latent, data)
        with torch.inference_mode(False), torch.no_grad():
            for parameter in (*start.parameters(), *built.parameters()):
                parameter.mul_(3)
        member.constrain_(start)
        member.constrain_(built)
        return start, built, str(member)

    return call


def quality(name):
    return lambda t: getattr(metrics, name)(t["images"], t["other images"])


def augmented(images):
    with torch.random.fork_rng(devices=[]):  # it draws from the global generator, as it says
        torch.manual_seed(0)
        return losses.differentiable_augmentation(images, tuple(losses.AUGMENTATIONS))


def classifier_of(t):
    return metrics.train_classifier(t["images"], t["labels"], 3, steps=2, seed=0, batch_size=8, progress=False)


CASES = {
    "complexity_curve": clouds(lambda z, x: complexity.complexity_curve(z, x, complexity.MLPs(), (4, 8), "energy", **FAST)),
    "generator_distance": clouds(
        lambda z, x: [
            complexity.generator_distance(z, x, complexity.MLPs(width=4), name, **FAST)
            for name in ("reconstruction", "sliced_wasserstein", "sinkhorn", "mmd", "energy", "frechet")
        ]
    ),
    "generator_distance by a critic": clouds(
        lambda z, x: complexity.generator_distance(z, x, complexity.MLPs(width=4), "wgan_sn", **FAST)
    ),
    "generator_distance of linear maps": clouds(
        lambda z, x: [
            complexity.generator_distance(z, x, complexity.LinearMaps(1.0), name, **FAST)
            for name in ("reconstruction", "frechet")
        ]
    ),
    "fit_generator": clouds(
        lambda z, x: complexity.fit_generator(z, x, complexity.LipschitzNetworks(width=4), "energy", steps=2, batch_size=32)
    ),
    "optimal_latent": lambda t: complexity.optimal_latent(
        t["data"], complexity.MLPs(width=4), latent_dim=2, seeds=(0,), steps=2, batch_size=32
    ),
    "gromov_wasserstein": clouds(lambda z, x: complexity.gromov_wasserstein(z, x, seeds=(0,), num_points=16)),
    "make_distance": lambda t: [
        complexity.make_distance(name, t["data"])(t["data"], t["data"].flip(0) + 1, torch.Generator().manual_seed(0))
        for name in ("reconstruction", "sliced_wasserstein", "sinkhorn", "mmd", "energy", "frechet")
    ],
    "LinearMaps": family(complexity.LinearMaps, max_norm=0.5),
    "MLPs": family(complexity.MLPs, width=4),
    "LipschitzNetworks": family(complexity.LipschitzNetworks, width=4),
    "ConvDecoders": family(complexity.ConvDecoders, base_channels=8),
    "DropoutNetworks": family(complexity.DropoutNetworks),
    "adversarial_distance": clouds(
        lambda _, x: [adversarial.adversarial_distance(x, x + 1, name, **FAST) for name in ADVERSARIES]
    ),
    "train_adversarial": clouds(
        lambda z, x: adversarial.train_adversarial(complexity.MLPs(width=4), z, x, "js", seed=0, steps=2, batch_size=32)
    ),
    "Classifier": lambda t: classifier_of(t).identifier,
    "train_classifier": classifier_of,
    "accuracy": lambda t: metrics.accuracy(t["classifier"], t["images"], t["labels"]),
    "extract_features": lambda t: metrics.extract_features(t["classifier"], t["images"]),
    "predict": lambda t: metrics.predict(t["classifier"], t["images"]),
    "rotation_task": lambda t: metrics.rotation_task(t["images"]),
    "CodebookUsage": lambda t: metrics.CodebookUsage(16).update(t["tokens"]).perplexity,
    "FeatureStatistics": lambda t: metrics.FeatureStatistics().update(t["data"]).update(t["data"] + 1).all_reduce().state(),
    "frechet_distance": clouds(lambda _, x: metrics.frechet_distance(x, x.flip(1) * 2)),
    "equal_count_frechet": clouds(lambda _, x: metrics.equal_count_frechet(x, x * 2, count=20, repeats=2, seed=0)),
    "kernel_distance": clouds(lambda _, x: metrics.kernel_distance(x, x * 2, subsets=3, subset_size=20, seed=0)),
    "as_float": lambda t: metrics.as_float((127 * t["images"] + 128).byte()),
    "precision_recall": clouds(lambda _, x: metrics.precision_recall(x, x + 0.1)),
    "memorisation": lambda t: metrics.memorisation(t["images"], t["other images"], t["images"].flip(3)),
    "bits_back": lambda t: metrics.bits_back(
        t["z"], -t["z"].abs(), lambda z: -z.double().square().sum((1, 2, 3)), torch.Generator().manual_seed(0)
    ),
    "code_entropy_rate": lambda t: metrics.code_entropy_rate(t["tokens"], 16),
    "gaussian_rate": lambda t: metrics.gaussian_rate(t["z"], -t["z"].abs()),
    "psnr": quality("psnr"),
    "ssim": quality("ssim"),
    "reconstruction_loss": lambda t: losses.reconstruction_loss(t["images"], t["other images"], LossConfig(l1=0.5, l2=1.0)),
    "discriminator_loss": lambda t: losses.discriminator_loss(t["data"], t["latents"]),
    "generator_loss": lambda t: losses.generator_loss(t["data"]),
    "differentiable_augmentation": lambda t: augmented(t["images"]),
    "adaptive_weight": lambda t: losses.adaptive_weight(*t["graph"]),
    "filter_logits": lambda t: sampling.filter_logits(t["data"], top_k=5, top_p=0.8),
    "balanced_labels": lambda t: [sampling.balanced_labels(5, 3), sampling.balanced_labels(5, 3, (0, 2))],
    "sample_tokens": lambda t: sampling.sample_tokens(t["ar"], t["labels"][:4], cfg_scale=2.0, generator=seeded()),
    "sample_latents": lambda t: sampling.sample_latents(t["dit"], t["labels"][:4], num_inference_steps=2, generator=seeded()),
    "log_likelihood": lambda t: sampling.log_likelihood(t["dit"], t["z"], t["labels"], num_steps=2, generator=seeded()),
    "generate": lambda t: list(sampling.generate(t["autoencoder"], t["ar"], t["labels"][:3], SamplingConfig(batch_size=2), 0)),
    "flow_matching_loss": lambda t: losses.flow_matching_loss(t["dit"], t["z"], t["labels"], generator=seeded()),
    "PerceptualLoss": lambda t: t["perceptual"](t["images"][:1].repeat(1, 1, 2, 2), t["other images"][:1].repeat(1, 1, 2, 2)),
    "tiny_transformer_bits": lambda t: predictors.tiny_transformer_bits(
        t["tokens"].view(-1, 4, 4), t["tokens"].view(-1, 4, 4), 16, seed=0
    ),
    "ngram_bits": lambda t: predictors.ngram_bits(t["tokens"].view(-1, 4, 4), t["tokens"].view(-1, 4, 4), 16),
    "gaussian_prior_bits": lambda t: predictors.gaussian_prior_bits(*[t["z"], -t["z"].abs()] * 2),
    "spectrum": lambda t: predictors.spectrum_slope(predictors.spectrum(t["data"])),
    "perturb": lambda t: predictors.perturb(t["z"], seed=0),
    "energy_coefficient": lambda t: predictors.energy_coefficient(t["images"], t["other images"]),
    "midpoints": lambda t: predictors.midpoints(t["z"], seed=0),
    "mlp_distance": lambda t: predictors.mlp_distance(t["ridge"], t["z"], t["z"], t["images"], seed=0),
    "probe_accuracy": lambda t: predictors.probe_accuracy(t["z"], t["labels"], t["z"], t["labels"]),
    "sliced_distance": lambda t: predictors.sliced_distance(t["images"], t["other images"], seed=0),
}
# They run a model of the caller, who may want it under autocast: the model then computes in autocast's dtype.
OBEY_AUTOCAST = {
    "sample_tokens", "sample_latents", "log_likelihood", "generate", "flow_matching_loss", "PerceptualLoss",
}  # fmt: skip
SLOW = ("generator_distance by a critic", "train_adversarial")  # of hundreds of steps, whatever is asked for
NO_CASE = {
    **dict.fromkeys(("ComplexityCurve", "Estimate", "OptimalLatent", "Distance"), "a result, or what make_distance returns"),
    **dict.fromkeys(("EqualCountFrechet", "KernelDistance", "Memorisation", "PrecisionRecall"), "a result"),
    **dict.fromkeys(("check_cloud", "check_pair"), "checks alone, computes nothing"),
    **dict.fromkeys(("AUGMENTATIONS", "GAN_LOSSES"), "names"),
    "LeCam": "a module whose averages move at each call: tests/losses/test_adversarial.py",
    "gradient_penalty": "differentiates the caller's discriminator, whose gradients must be recorded",
    "GeneratorFamily": "abstract; its subclasses are cases",
    "load_chain": "reads files: test_hub and test_chain; it builds by from_pretrained, which is a test below",
    "versions": "strings",
}


def seeded():
    return torch.Generator(device="cpu").manual_seed(0)


def tensors():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    t = {"latents": normal(160, 3), "data": normal(160, 6), "z": normal(24, *LATENT)}
    t |= {"images": normal(24, *DATA).tanh(), "other images": normal(24, *DATA).tanh()}
    t |= {"labels": torch.arange(24) % 3, "tokens": torch.randint(16, (24, 16), generator=generator)}
    return t


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    settings = PriorConfig(width=16, depth=1, num_heads=2)
    dit = DiT(settings, latent_channels=2, latent_size=4, num_classes=3).eval()
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.1)
    architecture = AutoencoderConfig(
        base_channels=8, channel_multipliers=(1, 2), latent_channels=2, vq=VQConfig(codebook_size=16)
    )
    t = tensors()
    sample = t["images"].clone().requires_grad_()
    return {
        "dit": dit,
        "ar": ARPrior(settings, vocab_size=16, sequence_length=16, num_classes=3).eval(),
        "autoencoder": Autoencoder(architecture, 1, 8).eval(),
        "perceptual": losses.PerceptualLoss(),
        "classifier": classifier_of(t),
        "ridge": predictors.Ridge(t["z"], t["images"]),
        "graph": (sample.square().mean(), sample.sin().sum(), sample),
    }


def bits(value):
    """`value` as plain data that are equal if every bit of it is."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return str(value.dtype), str(value.device), tuple(value.shape), value.contiguous().view(-1).numpy().tobytes()
    if isinstance(value, nn.Module):
        return bits(value.state_dict())
    if dataclasses.is_dataclass(value):
        return {field.name: bits(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: bits(each) for key, each in value.items()}
    return [bits(each) for each in value] if isinstance(value, (list, tuple)) else repr(value)


@pytest.fixture(autouse=True)
def short_training(monkeypatch):
    """Of what takes a fixed number of steps: modes are the same in all of them."""
    monkeypatch.setattr(predictors, "PRIOR_STEPS", 5)
    monkeypatch.setattr(predictors, "MLP_STEPS", 5)


def test_every_public_name_is_listed():
    public = {name for package in (complexity, metrics, losses, sampling) for name in package.__all__}
    assert public <= CASES.keys() | NO_CASE.keys() and not NO_CASE.keys() & CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_modes_change_nothing(name, models):
    """Neither a bit of the value, nor the global random numbers, nor the modes themselves."""
    expected = bits(CASES[name](tensors() | models))
    for mode, context in MODES.items():
        if name in OBEY_AUTOCAST and mode in ("autocast", "all at once"):
            continue
        if name in SLOW and mode not in ("no_grad", "all at once"):
            continue
        for made_in_inference in (False, True):
            with torch.inference_mode() if made_in_inference else contextlib.nullcontext():
                given = {key: x.clone() for key, x in tensors().items()} | models
            torch.manual_seed(1)
            with context():
                before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
                found = CASES[name](given)
                after = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
            assert bits(found) == expected, (mode, made_in_inference)
            assert before == after and torch.get_default_device().type == "cpu"


@pytest.mark.parametrize("name", CASES)
def test_the_global_random_state_is_left_alone(name, models):
    if name in ("LinearMaps", "MLPs", "LipschitzNetworks", "ConvDecoders", "DropoutNetworks"):
        return  # `build` draws from it, as its docstring says
    state = torch.get_rng_state()
    CASES[name](tensors() | models)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", MODES)
def test_models_are_read_alike(mode, models, tmp_path):
    """Also with parameters that can be trained, where they are read inside inference mode."""
    for name in ("autoencoder", "ar", "dit"):
        models[name].save_pretrained(tmp_path / name)
        with MODES[mode]():
            found = type(models[name]).from_pretrained(tmp_path / name)
        assert bits(found) == bits(models[name])
        assert not any(x.is_inference() for x in (*found.parameters(), *found.buffers()))


@pytest.mark.parametrize("mode", MODES)
def test_what_was_fitted_can_be_trained_on(mode):
    t = tensors()
    with MODES[mode]():
        generator = complexity.fit_generator(t["latents"], t["data"], complexity.MLPs(width=4), "energy", steps=2, batch_size=32)
    generator(t["latents"]).sum().backward()
    assert all(parameter.grad is not None for parameter in generator.parameters())

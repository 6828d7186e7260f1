"""bf16, fp16 with a loss scale for each optimiser, accumulation, checkpointing, compilation and averages, each against float32.

All with the discriminator on, over 20 steps of the whole autoencoder.
"""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_training import CPU, ScalingEngine, autoencoder_training

from dae.training import adversary, autoencoder, loop
from dae.training.engine import LocalEngine

STEPS = 20
LOSSES = ("loss", "discriminator's loss")
GAN = (
    "stage1.loss.adversarial=1.0", "stage1.loss.adversarial_loss=non_saturating", "stage1.loss.discriminator_channels=8",
    "auxiliary_decoder.family=full", "data.random_flip=false", f"stage1.max_train_steps={STEPS}",
)  # fmt: skip
KL = (*GAN, "autoencoder.bottleneck=kl")  # no code that another rounding could exchange for another


class Run:
    """A training of 20 steps: its losses, and by what each part has moved."""

    def __init__(self, *overrides, engine=None, batches=None):
        self.training = autoencoder_training(*overrides, engine=engine)
        if batches is not None:
            self.training.next_batch = iter(batches).__next__
        self.before, self.discriminator_losses = self.parts(), []
        term = self.training.adversary.discriminator_term
        self.training.adversary.discriminator_term = lambda *arguments: self.noted(term(*arguments))
        for number in range(STEPS):
            self.training.step(number)
        self.moved = {name: part - self.before[name] for name, part in self.parts().items()}

    def noted(self, loss):
        self.discriminator_losses.append(loss.detach())
        return loss

    def losses(self):
        each = self.training.state.losses, self.discriminator_losses
        return [torch.stack(losses).double().view(STEPS, -1).mean(1) for losses in each]

    def parts(self):
        modules = {"encoder": self.training.autoencoder.encoder, "decoder": self.training.autoencoder.decoder}
        modules |= {"discriminator": self.training.adversary.discriminator, "average": self.training.state.ema.average}
        return {name: torch.cat([p.detach().double().flatten() for p in m.parameters()]) for name, m in modules.items()}


def off(run, reference):
    """|a - b| / |b| of each part's total update, which is its direction and its length, and of the losses of all steps."""
    pairs = {name: (run.moved[name], moved) for name, moved in reference.moved.items()}
    pairs |= dict(zip(LOSSES, zip(run.losses(), reference.losses(), strict=True), strict=True))
    return {name: ((a - b).norm() / b.norm()).item() for name, (a, b) in pairs.items()}


def wrong(run, reference, epsilon):
    """What is off by more than roundings of `epsilon` explain.

    Each module rounds its result, and in the backward pass its gradient, by at most epsilon / 2 each. Errors of either sign add
    in quadrature over the modules of both networks, of which a gradient passes all: sqrt(2 n) epsilon / 2. The adversarial
    gradients of real and generated images cancel to about a third, so they are off by three times as much of what is left; and
    later steps start from weights that are off, which again does as much as all before: 8 sqrt(2 n) epsilon / 2. Besides, each
    step rounds the weights, which are float32 and larger than what they move by, in both runs. A loss is a mean of hundreds of
    values, whose errors cancel but for a few roundings.
    """
    training = reference.training
    modules = sum(1 for model in (training.autoencoder, training.adversary.discriminator) for _ in model.modules())
    stored = math.sqrt(STEPS) * torch.finfo(torch.float32).eps
    bounds = dict.fromkeys(LOSSES, 2 * epsilon)
    for name, moved in reference.moved.items():
        bounds[name] = 4 * math.sqrt(2 * modules) * epsilon + stored * (reference.before[name].norm() / moved.norm()).item()
    return {name: value for name, value in off(run, reference).items() if not value <= bounds[name]}


@pytest.fixture(autouse=True)
def smooth(monkeypatch):
    """Gradient descent, and no kinks in the discriminator.

    AdamW divides by the size of the gradients and would hide a wrong scale; where an activation has a kink, a rounding may change
    a gradient by any amount.
    """

    def build(module, config, learning_rate=None):
        return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.003)

    for place in (loop, autoencoder):
        monkeypatch.setattr(place, "build_optimizer", build)
    monkeypatch.setattr(F, "leaky_relu", lambda x, slope: F.silu(x))


@pytest.fixture
def reference(smooth):
    return in_float32()


@functools.cache
def in_float32():
    return Run(*KL)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision(reference, precision):
    engine = ScalingEngine(torch.float16) if precision == "fp16" else LocalEngine(CPU, precision)
    run = Run(*KL, engine=engine)
    assert not wrong(run, reference, torch.finfo(engine.dtype).eps)
    assert max(off(run, reference).values()) > torch.finfo(engine.dtype).eps  # it was narrow
    assert len(engine.scalers) == (2 if precision == "fp16" else 0)
    assert all(scaler.get_scale() == 2**10 for scaler in engine.scalers.values())  # no step was left out


def never_unscaled(engine):
    def step(optimizers):
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    engine.step = step
    engine.clip = lambda parameters, max_norm, optimizer: None


def clipped_before_unscaling(engine):
    engine.clip = lambda parameters, max_norm, optimizer: torch.nn.utils.clip_grad_norm_(parameters, max_norm)


def one_scale_for_both(engine):
    """The scale of the first optimiser for the losses, its own for each division."""
    first, second = engine.scalers
    engine.scalers[second] = torch.amp.GradScaler("cpu", 2.0**11)
    engine.scalers[second].scale(torch.ones(()))
    engine.scaled = lambda loss, optimizer: engine.scalers[first].scale(loss)


def without_adversarial_loss(engine):
    adversary.adaptive_weight = lambda *losses: torch.zeros(())


FAULTS = {
    "fp16": (never_unscaled, clipped_before_unscaling, one_scale_for_both, without_adversarial_loss),
    "bf16": (without_adversarial_loss,),
}


@pytest.mark.parametrize("precision, fault", [(precision, fault) for precision, faults in FAULTS.items() for fault in faults])
def test_faults_are_noticed(reference, monkeypatch, precision, fault):
    """The bounds above are narrow enough for what goes wrong in mixed precision."""
    engine = ScalingEngine(torch.float16) if precision == "fp16" else LocalEngine(CPU, precision)
    monkeypatch.setattr(adversary, "adaptive_weight", adversary.adaptive_weight)
    prepare, prepared = engine.prepare, []

    def then_break(module, optimizer):
        found = prepare(module, optimizer)
        prepared.append(optimizer)
        if len(prepared) == 2:
            fault(engine)
        return found

    engine.prepare = then_break
    assert wrong(Run(*KL, engine=engine), reference, torch.finfo(engine.dtype).eps)


def test_accumulation(monkeypatch):
    """Halves of a batch after one another are the batch, up to the order of sums.

    With a constant weight of the adversarial loss: the adaptive one is that of a micro-batch, by its definition a ratio of norms
    (tests/training/test_adversary.py has it bit for bit, with equal micro-batches).
    """
    monkeypatch.setattr(adversary, "adaptive_weight", lambda *losses: torch.ones(()))
    options = (*GAN, "autoencoder.vq.revive_threshold=0")  # codes are revived at latents of the last micro-batch
    batches = [{"image": torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(n)) * 2 - 1} for n in range(STEPS)]
    halves = itertools.chain.from_iterable(({"image": each} for each in batch["image"].split(8)) for batch in batches)
    whole = Run(*options, batches=batches)
    accumulated = Run(*options, "stage1.gradient_accumulation_steps=2", batches=halves)
    epsilon = torch.finfo(torch.float32).eps
    assert not wrong(accumulated, whole, epsilon)
    one, two = (run.training.autoencoder.bottleneck for run in (whole, accumulated))
    torch.testing.assert_close(two.average_counts, one.average_counts, rtol=STEPS * epsilon, atol=0)
    torch.testing.assert_close(two.codebook, one.codebook, rtol=0, atol=100 * epsilon)  # means of latents of order one


@pytest.mark.parametrize("engine", [None, "bf16"])
def test_gradient_checkpointing(engine):
    """What is computed twice is the same both times, with the same autocast and the same draws."""
    options = (*KL, "auxiliary_decoder.family=dropout", "auxiliary_decoder.latent_noise=0.2")
    kept, again = (
        Run(*options, f"stage1.gradient_checkpointing={on}", engine=LocalEngine(CPU, engine)) for on in ("false", "true")
    )
    assert not wrong(again, kept, torch.finfo(torch.float32).eps)


def test_compilation(monkeypatch):
    """AOTAutograd's decompositions of each operator, without the time of a code generator."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    still = (*GAN, "autoencoder.bottleneck=fsq")  # compiled code draws other numbers
    assert not wrong(Run(*still, "compile=true"), Run(*still), torch.finfo(torch.float32).eps)


@pytest.mark.slow
def test_compilation_by_inductor():
    still = (*GAN, "autoencoder.bottleneck=fsq", "autoencoder.num_blocks=0")
    assert not wrong(Run(*still, "compile=true"), Run(*still), torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_average(monkeypatch, precision):
    """The average of the weights after each step, in float32 whatever the step computes in; it changes no weight."""
    seen, move = [], loop.EMA.move
    monkeypatch.setattr(loop.EMA, "move", lambda ema, module: (seen.append(flat(module)), move(ema, module)))
    run = Run(*KL, engine=LocalEngine(CPU, precision))
    expected = flat(autoencoder_training(*KL).autoencoder)
    for number, now in enumerate(seen):
        decay = min(0.9, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * now
    # One rounding a step of values of order one, each then multiplied by the decays after it: 1 / (1 - 0.9) of them.
    torch.testing.assert_close(flat(run.training.state.ema.average), expected, rtol=0, atol=10 * torch.finfo(torch.float32).eps)
    monkeypatch.setattr(Run, "parts", lambda run: {})
    without = Run(*KL, "stage1.use_ema=false", engine=LocalEngine(CPU, precision))
    assert torch.equal(flat(without.training.autoencoder), flat(run.training.autoencoder))


def flat(module):
    return torch.cat([p.detach().double().flatten() for p in module.parameters()])

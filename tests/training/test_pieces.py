"""Schedule, optimiser groups, moving average, stages and the small pieces of the loop."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dae.config import AuxiliaryDecoderConfig, Config, DecoderConfig, LossConfig, OptimizationConfig, StageConfig, load_config
from dae.models import Autoencoder
from dae.seeding import seed_for
from dae.training import EMA, build_optimizer, build_scheduler, plan_stages
from dae.training.engine import backends
from dae.training.loop import global_mean, refuse_non_finite


def rates(shape, warmup, total, steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    config = OptimizationConfig(lr_scheduler=shape, lr_warmup_steps=warmup, max_train_steps=total)
    scheduler = build_scheduler(optimizer, config)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


@pytest.mark.parametrize(
    "shape, decay",
    [("constant", lambda p: 1.0), ("linear", lambda p: 1 - p), ("cosine", lambda p: (1 + math.cos(math.pi * p)) / 2)],
)
def test_schedules(shape, decay):
    got = rates(shape, warmup=4, total=10, steps=13)
    assert got[:4] == [0.5, 1.0, 1.5, 2.0]  # the first step learns already
    after = [2 * decay(min(1, i / 6)) for i in range(9)]
    assert got[4:] == pytest.approx(after, abs=1e-12)
    assert (got[9] > 0) and (got[10] == (2.0 if shape == "constant" else 0.0))  # 0 at max_train_steps, after the last step
    assert rates(shape, 0, 1, 1) == [2.0]
    assert rates(shape, 5, 3, 3) == pytest.approx([0.4, 0.8, 1.2])  # a warm-up longer than the run


def test_optimizer_groups():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Linear(2, 2))
    module[2].weight.requires_grad_(False)
    config = OptimizationConfig(learning_rate=0.5, adam_beta1=0.7, adam_beta2=0.8, adam_weight_decay=0.1)
    decayed, plain = build_optimizer(module, config).param_groups
    assert [id(p) for p in decayed["params"]] == [id(module[0].weight)] and decayed["weight_decay"] == 0.1
    assert len(plain["params"]) == 4 and plain["weight_decay"] == 0
    assert decayed["betas"] == (0.7, 0.8) and decayed["lr"] == plain["lr"] == 0.5
    assert build_optimizer(module, config, 0.25).param_groups[0]["lr"] == 0.25
    assert len(build_optimizer(nn.GroupNorm(1, 2), config).param_groups) == 1  # no empty group


def test_optimizer_is_fused_on_cuda_alone():
    module, config = nn.Linear(3, 2), OptimizationConfig()
    assert [(group["fused"], group["foreach"]) for group in build_optimizer(module, config).param_groups] == [(False, True)] * 2
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name in ("weight", "bias"):  # on a CUDA device in name alone
            setattr(module, name, nn.Parameter(torch.empty(getattr(module, name).shape, device="cuda")))
        assert [(group["fused"], group["foreach"]) for group in build_optimizer(module, config).param_groups] == [
            (True, False)
        ] * 2


def test_backends_are_set_on_cuda_alone():
    def found():
        return torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = found()
    assert Config().cudnn_benchmark and Config().allow_tf32
    with backends(Config(), torch.device("cpu")):
        assert found() == before
    for wanted in (True, False):
        with backends(Config(cudnn_benchmark=wanted, allow_tf32=not wanted), torch.device("cuda")):
            assert found() == (wanted, not wanted, not wanted)
        assert found() == before


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.register_buffer("book", torch.tensor([5.0]))


def test_ema_by_hand():
    module, expected = Toy(), torch.tensor([1.0, 2.0])
    ema = EMA(module, decay=0.5)
    for n in range(30):
        with torch.no_grad():
            module.weight += n + 1
            module.book += 1
        ema.update(module)
        d = min(0.5, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * module.weight.detach()
        torch.testing.assert_close(ema.state_dict()["weight"], expected)
        assert torch.equal(ema.state_dict()["book"], module.book)  # copied, not averaged
    assert ema.updates == 30 and ema.state_dict().keys() == module.state_dict().keys()
    assert not any(p.requires_grad for p in ema.average.parameters())


def test_a_recorded_average_converts_its_rate_once():
    class Conversions(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += "_to_copy" in str(function)
            return function(*args, **(kwargs or {}))

    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    ema = EMA(module, decay=0.5)
    ema.keep_rate_on(torch.device("cpu"))
    with Conversions() as conversions:
        ema.update(module)
    assert conversions.count == 1


def test_ema_is_swapped_in_and_out():
    module = Toy()
    ema = EMA(module, decay=0.9)
    with torch.no_grad():
        module.weight += 3
        module.book += 3
    own, parameter = {k: v.clone() for k, v in module.state_dict().items()}, module.weight
    for error in (None, KeyError):
        try:
            with ema.swapped_in(module):
                assert torch.equal(module.weight, torch.tensor([1.0, 2.0])) and module.book == 5
                if error:
                    raise error
        except KeyError:
            pass
        assert module.weight is parameter  # the optimiser still holds it
        assert all(torch.equal(v, own[k]) for k, v in module.state_dict().items())
    assert torch.equal(ema.state_dict()["weight"], torch.tensor([1.0, 2.0]))


def test_ema_loads_what_it_saved():
    module = Toy()
    one, two = EMA(module, 0.9), EMA(Toy(), 0.9)
    for _ in range(3):
        with torch.no_grad():
            module.weight.mul_(1.7)
        one.update(module)
    two.load_state_dict({k: v.clone() for k, v in one.state_dict().items()}, one.updates)
    with torch.no_grad():
        module.weight.mul_(1.7)
    one.update(module)
    two.update(module)
    assert torch.equal(one.state_dict()["weight"], two.state_dict()["weight"])


def test_ema_carries_a_codebook():
    config = load_config(None, ["autoencoder.base_channels=8", "autoencoder.latent_channels=4"]).autoencoder
    model = Autoencoder(config, 1, 8)
    ema = EMA(model, 0.9)
    encoding = model.encode(torch.rand(2, 1, 8, 8))
    model.bottleneck.observe(encoding)
    model.bottleneck.update_codebook()
    ema.update(model)
    assert torch.equal(ema.state_dict()["bottleneck.codebook"], model.bottleneck.codebook)


def config_of(method):
    config = Config(method=method)
    config.stage1.max_train_steps, config.stage2.max_train_steps = 30, 20
    config.stage1.learning_rate, config.stage2.learning_rate = 0.1, 0.2
    config.stage2.loss = LossConfig(l1=1.0, adversarial=0.5, adversarial_start=7)
    config.auxiliary_decoder = AuxiliaryDecoderConfig("narrow", dropout=0.4)
    return config


def test_stages_of_dae():
    config = config_of("dae")
    one, two = plan_stages(config)
    weak = DecoderConfig("narrow", dropout=0.4)
    assert (one.name, one.decoder, one.latent_frozen, one.config) == ("stage1", weak, False, config.stage1)
    assert (two.name, two.decoder, two.latent_frozen, two.config) == ("stage2", config.autoencoder.decoder, True, config.stage2)


def test_finetuning_goes_on_with_the_decoder_on_the_frozen_latent():
    config = config_of("joint_finetuned")
    one, two = plan_stages(config)
    assert (one.decoder, one.latent_frozen, one.keeps_decoder) == (config.autoencoder.decoder, False, False)
    assert (two.decoder, two.latent_frozen, two.keeps_decoder) == (config.autoencoder.decoder, True, True)
    assert one.config.max_train_steps + two.config.max_train_steps == 50 and one.name != two.name
    assert (one.config.learning_rate, two.config) == (0.1, config.stage2)


@pytest.mark.parametrize("method", ["joint", "joint_dropout", "weak"])
def test_stages_of_the_baselines(method):
    config = config_of(method)
    before = dataclasses.asdict(config)
    (stage,) = plan_stages(config)
    assert (stage.name, stage.latent_frozen) == ("joint", False)
    decoders = {"joint": config.autoencoder.decoder, "weak": DecoderConfig("narrow", dropout=0.4)}
    assert stage.decoder == decoders.get(method, DecoderConfig("dropout", dropout=0.4))
    assert stage.config.max_train_steps == 50 and stage.config.learning_rate == 0.1  # as many steps in all
    assert stage.config.loss == LossConfig(l1=1.0, adversarial=0.5, adversarial_start=37)
    assert isinstance(stage.config, StageConfig) and dataclasses.asdict(config) == before


def test_seeds_are_stable_and_apart():
    assert seed_for(0, "stage1", 5, 0) == 3297888114834341086  # in every process, on every machine, for ever
    seeds = {seed_for(s, stage, step, m) for s in range(4) for stage in ("a", "b") for step in range(50) for m in range(3)}
    assert len(seeds) == 4 * 2 * 50 * 3 and all(0 <= s < 2**63 for s in seeds)
    torch.manual_seed(max(seeds))


def test_global_mean():
    assert global_mean([torch.tensor(1.0), torch.tensor(4.0)]) == 2.5


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(loss):
    with pytest.raises(FloatingPointError, match=r"stage1: the loss is .* at step 7.*stage1\.learning_rate"):
        refuse_non_finite(loss, "stage1", 7)
    refuse_non_finite(0.5, "stage1", 7)


@pytest.mark.parametrize("method", ["dae", "joint", "joint_dropout", "joint_finetuned", "weak", "refit"])
def test_stages_that_train_nothing_are_refused(method):
    def config(*overrides):
        return load_config(None, [f"method={method}", *overrides])

    nothing = ["loss.l1=0", "loss.l2=0", "loss.perceptual=0", "loss.adversarial=1"]
    with pytest.raises(ValueError, match=r"stage2\.loss: l1, l2, charbonnier, perceptual are all 0"):
        plan_stages(config(*(f"stage2.{weight}" for weight in nothing)))
    only_stage1 = config(*(f"stage1.{weight}" for weight in nothing))
    if method == "dae":
        with pytest.raises(ValueError, match=r"stage1\.loss: l1, l2, charbonnier, perceptual are all 0"):
            plan_stages(only_stage1)
    else:
        plan_stages(only_stage1)  # stage 1's losses are not used
    levels = ["data.resolution=32", "autoencoder.channel_multipliers=[1,2,2]"]
    plan_stages(config(*levels, "autoencoder.attention_resolutions=[8,32]"))
    with pytest.raises(ValueError, match=r"no level has \[7\]; the feature maps' sizes are \[32, 16, 8\]"):
        plan_stages(config(*levels, "autoencoder.attention_resolutions=[8,7]"))

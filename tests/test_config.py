"""The configuration: names, types and values are checked, files round trip, and every shipped file trains."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dae.cli import config_from_command_line
from dae.config import (
    RENAMED,
    Config,
    PriorConfig,
    config_differences,
    describe,
    from_dict,
    knobs,
    load_config,
    save_config,
)
from dae.losses import discriminator_loss, flow_matching_loss, generator_loss, reconstruction_loss
from dae.models import ARPrior, Autoencoder, DiT, GaussianMixturePrior, PatchDiscriminator
from dae.models.architectures import latent_size
from dae.models.pretrained import without_weights
from dae.priors import prior_family
from dae.quantizers import bottleneck_class
from dae.training import build_optimizer, plan_stages

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
METHODS = ("dae", "joint", "joint_dropout", "joint_finetuned", "weak", "refit")


@pytest.fixture
def yaml(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("mehtod", "method"),
        ("resolution", "data.resolution"),  # a leaf's name without its section
        ("l1", "stage1.loss.l1"),
        ("data.width", "prior.width"),
        ("data.resolutoin", "data.resolution"),
        ("autoencoder.num_block", "autoencoder.num_blocks"),
        ("autoencoder.vq.codebok_size", "autoencoder.vq.codebook_size"),
        ("prior.max_train_step", "prior.max_train_steps"),
        ("sampling.cfg_scal", "sampling.cfg_scale"),
        ("stage3", "stage2"),
    ],
)
def test_unknown_keys_name_the_nearest(yaml, key, nearest):
    with pytest.raises(ValueError, match=rf"override '{key}=1': unknown key '{key}'; the nearest one is '{nearest}'"):
        load_config(None, [f"{key}=1"])
    *sections, leaf = key.split(".")
    text = "".join(f"{'  ' * i}{s}:\n" for i, s in enumerate(sections)) + f"{'  ' * len(sections)}{leaf}: 1\n"
    with pytest.raises(ValueError, match=rf"config.yaml: unknown key '{key}'; the nearest one is '{nearest}'"):
        load_config(yaml(text))


def test_an_unknown_key_lists_its_section_where_the_nearest_is_elsewhere():
    with pytest.raises(ValueError, match=r"'autoencoder.rvq.depth'; the nearest .*; autoencoder.rvq has num_quantizers$"):
        load_config(None, ["autoencoder.rvq.depth=4"])
    with pytest.raises(ValueError, match=r"nearest one is 'autoencoder.rvq.num_quantizers'$"):
        load_config(None, ["autoencoder.rvq.quantizers=4"])


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.resolution=abc", "wrong type at data.resolution"),
        ("data.resolution=8.5", "wrong type at data.resolution"),  # not silently 8
        ("autoencoder.channel_multipliers=[1,2.5]", r"wrong type at autoencoder.channel_multipliers\[1\]"),
        ("autoencoder.channel_multipliers=3", "wrong type at autoencoder.channel_multipliers"),
        ("stage1.use_ema=maybe", "wrong type at stage1.use_ema"),
        ("seed=null", "wrong type at seed"),
        ("seed=true", "wrong type at seed"),
        ("seed={a: 1}", "wrong type at seed"),
        ("output_dir=", "output_dir: expected text, got ''"),
        ("measure.latents=[a, {b: c}]", "measure.latents: expected text"),
        ("measure.latents=[autoencoder:run[12]]", "cannot be parsed"),
        ("output_dir=${nowhere", "cannot be parsed"),
        ("output_dir=${nowhere}", "nowhere"),
        ("data=5", "data is a section"),
        ("data=null", "data is a section"),
        ("autoencoder.vq=x", "autoencoder.vq is a section"),
        ("data.channels=2", r"data.channels: expected one of \[1, 3\], got 2"),
        ("report_to=tensorbord", "did you mean 'tensorboard'"),
        ("autoencoder.decoder.family=narow", "autoencoder.decoder.family: expected one of .* did you mean 'narrow'"),
        ("logging_steps=0", "logging_steps: expected at least 1, got 0"),
        ("stage2.gradient_accumulation_steps=0", "stage2.gradient_accumulation_steps: expected at least 1"),
        ("stage1.learning_rate=nan", "stage1.learning_rate: expected a finite number"),
        ("stage1.learning_rate=1e9", "stage1.learning_rate: expected at least 0 and at most 1, got"),
        ("stage1.loss.l2=1e39", "stage1.loss.l2: expected a finite number of 32 bits"),
        ("prior.depth=1000000000", "prior.depth: expected at least 1 and at most 1000, got"),
        ("stage1.learning_rate=.inf", "stage1.learning_rate: expected a finite number"),
        ("data.random_affine=.inf", "data.random_affine: expected a finite number"),
        ("evaluation.cfg_scales=[1,.inf]", "evaluation.cfg_scales: expected a finite number"),
        ("seed=-1", "seed: expected at least 0 and at most 9223372036854775807"),
        ("seed=9223372036854775808", "seed: expected at least 0 and at most"),
        ("compare.seeds=[0,-1]", "compare.seeds: expected at least 0"),
        ("measure.seeds=[9223372036854775808]", "measure.seeds: expected at least 0 and at most"),
        ("autoencoder.attention_resolutions=[0]", "attention_resolutions: expected at least 1"),
        ("sampling.top_p=0", "sampling.top_p: expected more than 0 and at most 1"),
        ("evaluation.cfg_scales=[1,-1]", "evaluation.cfg_scales: expected at least 0"),
        ("push_to_hub=true", "needs hub_model_id"),
        ("seed", "expected an override `key=value`"),
        ("--seed=1", "expected an override `key=value`"),
    ],
)
def test_wrong_values_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, [override])


UNIT_INTERVAL = [  # probabilities, shares and decays, by whether 1 has a meaning
    *((row.key, False) for row in describe() if row.key.endswith(("ema_decay", "adam_beta1", "adam_beta2", "dropout", ".decay"))),
    *((f"prior.{name}", False) for name in ("token_noise", "label_smoothing")),
    *((f"{decoder}.width_factor", True) for decoder in ("autoencoder.decoder", "auxiliary_decoder")),
    *((f"{decoder}.latent_mask", False) for decoder in ("autoencoder.decoder", "auxiliary_decoder")),
    ("autoencoder.vq.revive_threshold", False),
    ("sampling.top_p", True),
]


@pytest.mark.parametrize("key, one_is_allowed", UNIT_INTERVAL, ids=[key for key, _ in UNIT_INTERVAL])
def test_probabilities_and_decays_lie_between_0_and_1(key, one_is_allowed):
    for value in (-0.1, 1.5) if one_is_allowed else (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match=f"{key}: expected .* and .*, got {value}"):
            load_config(None, [f"{key}={value}"])
    load_config(None, [f"{key}={1 if one_is_allowed else 0.5}"])


def fields(section, prefix=""):
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        yield from fields(value, f"{prefix}{f.name}.") if dataclasses.is_dataclass(value) else [(f"{prefix}{f.name}", f)]


def test_every_number_has_a_least_value():
    numbers = [(key, f.metadata) for key, f in fields(Config()) if any(kind in str(f.type) for kind in ("int", "float"))]
    assert len(numbers) > 50
    assert not [key for key, knob in numbers if not knob["choices"] and not {"ge", "gt"} & set(knob["bounds"])]


MAY_BE_LARGE = (  # a period, a limit, a number of rows, or of steps that are what the user asks for
    "_steps", "_total_limit", "_size", "_samples", "_rows", "max_images", "norm", "adversarial_start",
    "num_classes", "label_level", "attention_resolutions", "num_heads", "top_k", "neighbours", "weight", "z_loss",
    "code_temperature", "max_skipped", "rates", "loss.l1", "loss.l2", "loss.perceptual", "loss.adversarial", "loss.charbonnier",
    "loss.lecam", "loss.r1", "r1_every", "adversarial_ramp", "diversity", "inverse_temperature",
)  # fmt: skip


def test_no_number_sizes_a_model_or_a_loop_without_limit():
    """What is as large as it is asked for is compared with the data or does no harm; the rest has a greatest value."""
    numbers = [(key, f.metadata) for key, f in fields(Config()) if any(kind in str(f.type) for kind in ("int", "float"))]
    unbounded = {key for key, knob in numbers if not knob["choices"] and not {"le", "lt"} & set(knob["bounds"])}
    assert sorted(key for key in unbounded if not key.endswith(MAY_BE_LARGE)) == []
    assert not {"autoencoder.vq.codebook_size", "prior.depth", "stage1.gradient_accumulation_steps"} & unbounded


@pytest.mark.parametrize(
    "text",
    ["2024_01_15", "0123", "1e3", "12:30", "a #2", "no", "true", "[1]", "{a}", "a: b", "a=b", "run[12]", "x,y", "a[*]", "ü x"],
)
def test_text_is_taken_as_it_stands(yaml, text):
    """From the command line in any case; from a file where YAML reads a scalar at all, quoted or not."""
    for key in ("output_dir", "data.dataset_name", "hub_model_id", "data.image_column"):
        assert dict(leaves(load_config(None, [f"{key}={text}"])))[key] == text
    assert load_config(None, [f"measure.compare_folders=['{text}', 0123]"]).measure.compare_folders == [text, "0123"]
    if not text.startswith("["):
        assert load_config(None, [f"measure.compare_folders={text}"]).measure.compare_folders == [text]
    assert load_config(yaml(f"output_dir: '{text}'\ndata: {{dataset_name: '{text}'}}")).output_dir == text
    if not set(text) & set("#[{*:"):
        config = load_config(yaml(f"output_dir: {text}\ndata:\n  dataset_name: {text}\nmeasure:\n  compare_folders: [{text}]"))
        assert config.output_dir == config.data.dataset_name == text
        assert config.measure.compare_folders == text.split(",")


def test_null_is_null_and_home_is_home(yaml, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(None, ["resume_from_checkpoint=null"]).resume_from_checkpoint is None
    assert load_config(yaml("resume_from_checkpoint: null\nhub_model_id: ~")).hub_model_id is None
    for text in ("~", "null", ""):
        with pytest.raises(ValueError, match=f"output_dir: expected text, got {text or 'nothing'}, which is null in YAML"):
            load_config(yaml(f"output_dir: {text}"))
    for config in (load_config(yaml("sampling: {classes: [null, 01]}")), load_config(None, ["sampling.classes=[null, 01]"])):
        assert config.sampling.classes == ["null", "01"]
    for config in (
        load_config(None, ["output_dir=~/r", "data.dataset_name=~/d", "measure.compare_folders=[~/c, d]"]),
        load_config(yaml("output_dir: ~/r\ndata: {dataset_name: ~/d}\nmeasure: {compare_folders: [~/c, d]}")),
    ):
        assert config.output_dir == f"{tmp_path}/r" and config.data.dataset_name == f"{tmp_path}/d"
        assert config.measure.compare_folders == [f"{tmp_path}/c", "d"]


def test_missing_files_name_the_nearest(tmp_path):
    (tmp_path / "digits.yaml").touch()
    with pytest.raises(FileNotFoundError, match=r"digit\.yaml'; did you mean '.*/digits\.yaml'\?"):
        load_config(tmp_path / "digit.yaml")
    with pytest.raises(FileNotFoundError, match=r"nothing/like/it'$"):
        load_config(tmp_path / "nothing/like/it")


@pytest.mark.parametrize(
    "text, message",
    [
        ("data:\n", "data is a section"),
        ("data: 5\n", "data is a section"),
        ("- 1\n", "expected `key: value` pairs"),
        ("a: [1", "is not valid YAML"),
        ("seed: 1\nseed: 2\n", "duplicate key seed"),
        ("seed: !!python/object/apply:os.getpid []\n", "is not valid YAML"),  # a tag never runs code
        ("data: {resolution: abc}\n", "config.yaml: wrong type at data.resolution"),
        ("method: jiont\n", "did you mean 'joint'"),
    ],
)
def test_wrong_files_are_refused(yaml, text, message):
    with pytest.raises(ValueError, match=message):
        load_config(yaml(text))


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_config("nowhere.yaml")


def test_layers_in_order(yaml):
    path = yaml("seed: 1\ndata: {resolution: 16}\n")
    config = load_config(path, ["seed=2", "seed=3", "prior.width=64", "data.max_train_samples=null"])
    assert (config.seed, config.data.resolution, config.prior.width) == (3, 16, 64)
    assert config_differences(Config(), load_config(yaml(""))) == []


@pytest.mark.parametrize("old, new", RENAMED.items(), ids=RENAMED)
def test_keys_of_earlier_versions_load(yaml, caplog, monkeypatch, old, new):
    """From files, overrides and what was saved, with one line per process that names today's key; none is lost or meant twice."""
    monkeypatch.setattr(sys.modules["dae.config.load"], "_announced", set())
    assert old not in knobs() and knobs()[new]
    (section, _, was), (same_section, _, today) = old.rpartition("."), new.rpartition(".")
    assert section == same_section
    value = next(v for v in (3, "reference") if isinstance(v, type(knobs()[new].default)))
    path = yaml(f"{section}: {{{was}: {value}}}")
    for config in (load_config(path), load_config(path), load_config(None, [f"{old}={value}"])):
        assert dict(leaves(config))[new] == value
    assert caplog.messages == [f"{path}: {old} is now called {new}"]
    values = dataclasses.asdict(config)
    values[section][was] = values[section].pop(today)
    assert from_dict(Config, values) == config
    assert from_dict(type(getattr(config, section)), values[section]) == getattr(config, section)
    with pytest.raises(ValueError, match=rf"'{old}' is the earlier name of '{new}', which is given too"):
        load_config(yaml(f"{section}: {{{was}: {value}, {today}: {value}}}"))


@pytest.mark.parametrize("bare", ["no", "'no'", "bf16", "null"])
def test_mixed_precision_no_is_a_word(yaml, bare):
    """YAML 1.1 reads a bare `no` as false."""
    expected = None if bare == "null" else bare.strip("'")
    assert load_config(None, [f"mixed_precision={bare}"]).mixed_precision == expected
    assert load_config(yaml(f"mixed_precision: {bare}\n")).mixed_precision == expected


def test_merge_keys(yaml):
    config = load_config(yaml("stage1: &s\n  learning_rate: 0.5\n  loss: {l1: 2}\nstage2:\n  <<: *s\n  max_train_steps: 7\n"))
    assert config.stage2.learning_rate == 0.5 and config.stage2.loss.l1 == 2 and config.stage2.max_train_steps == 7
    assert config.stage1.max_train_steps == 1000


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_files_and_dictionaries_round_trip(path, tmp_path):
    config = load_config(path, ["mixed_precision=no", "sampling.top_k=5", "evaluation.cfg_scales=[]", "output_dir=runs/ü x"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert from_dict(Config, dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    "values, message",
    [
        ({"widht": 1}, r"PriorConfig has no field 'widht'"),
        ({"width": {"a": 1}}, "PriorConfig.width: expected a value"),
    ],
)
def test_from_dict_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(PriorConfig, values)
    with pytest.raises(ValueError, match=message):
        from_dict(Config, {"prior": values})
    with pytest.raises(ValueError, match=r"Config.data: expected a section"):
        from_dict(Config, {"data": 5})


def test_config_differences():
    changed = load_config(None, ["seed=4", "autoencoder.vq.ema_decay=0.5"])
    assert list(map(str, config_differences(Config(), changed))) == ["seed: 0 -> 4", "autoencoder.vq.ema_decay: 0.99 -> 0.5"]


def leaves(section, prefix=""):
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value


def test_describe_lists_every_leaf():
    rows = describe()
    assert [(row.key, row.default) for row in rows] == list(leaves(Config()))
    assert all(row.type and row.help for row in rows)
    assert next(r for r in rows if r.key == "auxiliary_decoder.family").default == "narrow"
    assert next(r for r in rows if r.key == "data.channels").help.endswith("[1 | 3]")


def test_defaults_pass_their_own_checks(tmp_path):
    save_config(Config(), tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == Config()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_help_lists_every_key(recipe, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location(f"recipe_{recipe.stem}", recipe)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(recipe), "--help"])
    with pytest.raises(SystemExit) as stop:
        config_from_command_line(module.__doc__)
    text = capsys.readouterr().out
    assert stop.value.code == 0 and module.__doc__.splitlines()[0] in text
    missing = [row.key for row in describe() if f"  {row.key} " not in text or row.help not in text]
    assert not missing
    assert "digits.yaml" in text  # what runs without --config


def test_help_as_a_user_calls_it():
    done = subprocess.run([sys.executable, "recipes/sample.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sampling.top_p" in done.stdout and "stage1.loss.adversarial_start" in done.stdout


def test_mistakes_on_the_command_line_are_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "recipes" / "train_dae.py")])
    with pytest.raises(SystemExit) as stop:
        config_from_command_line("doc", ["data.resolutoin=3"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "'data.resolution'" in error
    (tmp_path / "bad.yaml").write_text("data: {dataset_name: a[1]}\n")
    with pytest.raises(SystemExit):
        config_from_command_line("doc", ["--config", str(tmp_path / "bad.yaml")])
    assert capsys.readouterr().err.count("\n") == 1


TINY = {
    "imagenet256": ("data.resolution=32", "autoencoder.base_channels=4", "autoencoder.attention_resolutions=[2]"),
    "refit_sd_vae": ("data.resolution=32", "autoencoder.base_channels=4"),
    "photos": ("data.resolution=16", "autoencoder.base_channels=4"),
    "clothing128_kl": ("data.resolution=32", "autoencoder.base_channels=4"),
    "fashion_mnist_vq": ("autoencoder.base_channels=4",),
    **{f"cifar10_{kind}": ("data.resolution=16", "autoencoder.base_channels=4") for kind in ("vq", "kl", "fsq")},
    **dict.fromkeys(
        ("faceshq256_vqgan", "imagenet256_vqgan", "imagenet256_llamagen", "imagenet256_kl"),
        (
            *("data.resolution=32", "autoencoder.base_channels=4", "autoencoder.attention_resolutions=[2]"),
            *("autoencoder.ldm.z_channels=8", "autoencoder.ldm.norm_num_groups=4"),
        ),
    ),
    "imagenet256_rae": (
        *("data.resolution=32", "autoencoder.encoder=timm:tokens", "autoencoder.latent_channels=8"),  # of tests/timm_stand_in.py
        *(f"autoencoder.vit.{knob}" for knob in ("width=16", "depth=1", "num_heads=2")),
    ),
    "digits": ("autoencoder.base_channels=8",),
    "evidence-digits": ("autoencoder.base_channels=8",),
    "evidence-photos": ("autoencoder.base_channels=8",),
    **{f"digits-{kind}": ("autoencoder.base_channels=8",) for kind in ("kl", "gan")},
    **{f"photos-{kind}": ("data.resolution=16", "autoencoder.base_channels=4") for kind in ("kl", "gan")},
}


def test_every_shipped_file_has_a_tiny_version():
    assert {path.stem for path in SHIPPED} == set(TINY)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_files_build_at_full_size(path, timm):
    config = load_config(path)
    if config.autoencoder.encoder:
        config.autoencoder.encoder, config.autoencoder.latent_channels = "timm:tokens", 8
    with torch.device("meta"), without_weights():
        for method in methods_of(config):
            for stage in plan_stages(dataclasses.replace(config, method=method)):
                build(config, stage)
        build_prior(config)


def methods_of(config):
    """A pretrained encoder leaves one method: it is not trained."""
    return ("dae",) if config.autoencoder.encoder else METHODS


def build_prior(config):
    settings, latent = config.prior, config.autoencoder
    side = latent_size(latent, config.data.resolution)
    if (family := prior_family(config).name) == "ar":
        vocabulary, factors = bottleneck_class(latent).vocabulary(latent)
        return ARPrior(settings, vocab_size=vocabulary, sequence_length=side**2, num_classes=10, factors=factors)
    kind = DiT if family == "dit" else GaussianMixturePrior
    return kind(settings, latent_channels=latent.latent_channels, latent_size=side, num_classes=10)


def build(config, stage):
    architecture = dataclasses.replace(config.autoencoder, decoder=stage.decoder)
    return Autoencoder(architecture, config.data.channels, config.data.resolution)


def step(module, loss, settings):
    """One optimiser step: finite, every parameter has a gradient, and nearly all move (some gradients are exactly 0)."""
    optimizer = build_optimizer(module, settings)
    parameters = [p for p in module.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in parameters)
    assert all(torch.isfinite(p).all() for p in parameters)
    moved = [not torch.equal(a, b) for a, b in zip(before, parameters, strict=True)]
    assert sum(moved) > 0.8 * len(moved)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_files_step(path, method, timm):
    tiny = ["autoencoder.latent_channels=4", "autoencoder.vq.codebook_size=16", *TINY[path.stem], f"method={method}"]
    config = load_config(path, tiny)
    if method not in methods_of(config):
        pytest.skip("its encoder is not trained")
    torch.manual_seed(0)
    images = torch.rand(2, config.data.channels, config.data.resolution, config.data.resolution) * 2 - 1
    for stage in plan_stages(config):
        autoencoder = build(config, stage).train()
        stage.freeze(autoencoder)
        output = autoencoder(images)
        loss = reconstruction_loss(output.sample, images, stage.config.loss) + output.encoding.loss
        if stage.config.loss.adversarial:
            critic = PatchDiscriminator(config.data.channels, 8, stage.config.loss.discriminator_layers)
            loss = loss + stage.config.loss.adversarial * generator_loss(critic(output.sample))
        step(autoencoder, loss, stage.config)
        if stage.config.loss.adversarial:
            critic.zero_grad()
            step(critic, discriminator_loss(critic(images), critic(output.sample.detach())), stage.config)
    config.prior.width, config.prior.depth, config.prior.num_heads, config.prior.num_components = 8, 2, 2, 2
    step_prior(build_prior(config).train(), output.encoding, config.prior)


def step_prior(prior, encoding, settings):
    labels = torch.tensor([0, 2])
    if isinstance(prior, GaussianMixturePrior):  # there is nothing to step
        assert torch.isfinite(prior.fit(encoding.latents, seed=0).log_prob(encoding.latents)).all()
    elif isinstance(prior, DiT):
        for parameter in prior.parameters():  # as after some steps: at first all but its last matrix has zero gradient
            parameter.data += 0.02 * torch.randn_like(parameter)
        step(prior, flow_matching_loss(prior, prior.normalise(encoding.latents.detach()), prior.drop_labels(labels)), settings)
    else:
        tokens = encoding.indices.flatten(1)
        step(prior, prior(prior.drop_labels(labels), prior.corrupt(tokens[:, :-1]), targets_BT=tokens), settings)

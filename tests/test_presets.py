"""Presets: values below those of a file and of the command line, resolved in what is saved."""

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from dae.cli import config_from_command_line
from dae.config import PRESETS, load_config, save_config, with_overrides
from dae.models import Autoencoder

KNOWN = {  # parameters: of the published models where one is named, else of today's network
    "vqgan_f16": 72_141_699,
    "llamagen_f16": 71_883_403,
    "kl_f8": 83_653_863,
    "kl_f16": 69_610_963,
    "vit_f16": 171_141_155,
}
LATENTS = {"vqgan_f16": (256, 16), "llamagen_f16": (8, 16), "kl_f8": (4, 32), "kl_f16": (16, 16), "vit_f16": (32, 16)}


@pytest.mark.parametrize("name", PRESETS)
def test_each_builds_what_its_name_says(name):
    config = load_config(None, [f"autoencoder.preset={name}"]).autoencoder
    with FakeTensorMode():
        model = Autoencoder(config, 3, 256)
    assert (config.latent_channels, model.latent_size) == LATENTS[name]
    assert model.factor == int(name.rpartition("_f")[2])
    assert sum(p.numel() for p in model.parameters()) == KNOWN[name]


def test_the_cosine_metric_is_that_of_normalised_codes():
    assert load_config(None, ["autoencoder.preset=llamagen_f16"]).autoencoder.vq.metric == "cosine"


def test_file_and_command_line_go_before_it(tmp_path, caplog):
    path = tmp_path / "a.yaml"
    path.write_text("autoencoder: {preset: kl_f8, num_blocks: 1}\n")
    config = load_config(path, ["autoencoder.kl.kl_weight=1e-3"]).autoencoder
    assert (config.channel_multipliers, config.num_blocks, config.kl.kl_weight) == ([1, 2, 4, 4], 1, 1e-3)
    assert not caplog.messages  # the file names the preset and means its own values
    other = load_config(path, ["autoencoder.preset=kl_f16"]).autoencoder
    assert (other.preset, other.latent_channels, other.num_blocks) == ("kl_f16", 16, 1)
    assert caplog.messages == [
        f"override 'autoencoder.preset=kl_f16': {path} has other values and keeps them: autoencoder.num_blocks; "
        "for the whole preset take a file without them"
    ]


def test_what_is_saved_is_resolved(tmp_path, monkeypatch):
    config = load_config(None, ["autoencoder.preset=kl_f8", "autoencoder.num_blocks=1"])
    save_config(config, tmp_path / "config.yaml")
    monkeypatch.setitem(PRESETS, "kl_f8", PRESETS["kl_f8"]._replace(values={"latent_channels": 99}))  # of a later version
    assert load_config(tmp_path / "config.yaml") == config


def test_an_override_of_a_configuration_lies_on_top(caplog):
    config = with_overrides(load_config(None, []), ["autoencoder.preset=kl_f8", "autoencoder.num_blocks=1"])
    assert config == load_config(None, ["autoencoder.num_blocks=1", "autoencoder.preset=kl_f8"])
    assert config.autoencoder.latent_channels == 4
    assert "autoencoder.num_blocks" in caplog.text  # the order of the two says which was meant to go before


def test_the_last_that_is_named_counts_also_none():
    assert load_config(None, ["autoencoder.preset=kl_f8", "autoencoder.preset=kl_f16"]).autoencoder.latent_channels == 16
    assert load_config(None, ["autoencoder.preset=kl_f8", "autoencoder.preset=null"]) == load_config(None, [])


@pytest.mark.parametrize(
    "text, message",
    [
        ("autoencoder: [1]", "autoencoder is a section"),
        ("autoencoder: 5", "autoencoder is a section"),
        ("autoencoder: {preset: {a: 1}}", "wrong type at autoencoder.preset"),
        ("autoencoder: {preset: [kl_f8]}", "wrong type at autoencoder.preset"),
        ("autoencoder: {preset: '${nowhere}'}", "nowhere"),
    ],
)
def test_what_is_no_name_is_refused(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "a.yaml")


def test_an_unknown_one_names_the_nearest():
    with pytest.raises(ValueError, match=r"autoencoder.preset: expected one of .*, got 'kl_f9'; did you mean 'kl_f8'\?"):
        load_config(None, ["autoencoder.preset=kl_f9"])


def test_help_lists_them(capsys):
    with pytest.raises(SystemExit):
        config_from_command_line("doc", ["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown and known.title in shown for name, known in PRESETS.items())

"""The registries of prior families and bottlenecks are what the configuration offers, and nothing outside asks for a name."""

import ast
import dataclasses
import math
from pathlib import Path

import pytest
import torch

from dae.config import AutoencoderConfig, Config, PriorConfig, knobs, load_config
from dae.priors import PRIORS, family_of, prior_family
from dae.quantizers import BOTTLENECKS, bottleneck_class

DAE = Path(__file__).parents[2] / "dae"


def test_the_configuration_offers_what_there_is():
    def choices(section, name):
        return set(next(f for f in dataclasses.fields(section) if f.name == name).metadata["choices"])

    assert choices(PriorConfig, "family") == {"auto", *PRIORS}
    assert choices(AutoencoderConfig, "bottleneck") == set(BOTTLENECKS)
    assert all(name == family.name for name, family in PRIORS.items())


@pytest.mark.parametrize("name", PRIORS)
def test_what_a_family_names_exists(name):
    family = PRIORS[name]
    config = Config()
    assert hasattr(config.prior, family.size_knob)
    assert all(hasattr(config.sampling, knob) for knob in family.sampling_knobs)
    assert family.fitted or type(family).loss is not type(family).__mro__[1].loss
    kind = next(key for key, each in BOTTLENECKS.items() if each.discrete == family.discrete)
    assert prior_family(load_config(None, [f"autoencoder.bottleneck={kind}", f"prior.family={name}"])) is family


@pytest.mark.parametrize("name", BOTTLENECKS)
def test_what_a_bottleneck_says_of_itself(name):
    config = load_config(None, [f"autoencoder.bottleneck={name}", "autoencoder.latent_channels=4"]).autoencoder
    kind = bottleneck_class(config)
    assert kind.rate_knob in knobs()
    if name == "fsq":
        with pytest.raises(ValueError, match="a list and cannot be swept"):
            kind.check_rates([kind.rate(config)])
    else:
        kind.check_rates([kind.rate(config)])
    bottleneck = kind.build(config)
    if kind.discrete:
        last = torch.full((1, 1, 1), kind.num_codes(config) - 1)
        assert bottleneck.lookup(last).shape == (1, config.latent_channels, 1, 1)
        assert math.prod(kind.factors(config)) == kind.num_codes(config)
    else:
        with pytest.raises(ValueError, match="has no codes"):
            kind.num_codes(config)


def test_every_model_belongs_to_one_family():
    assert len({family.model for family in PRIORS.values()}) == len(PRIORS)
    for family in PRIORS.values():
        assert family_of(family.model.__new__(family.model)) is family


def test_nobody_branches_on_a_name():
    """Comparisons with the name of a family or a bottleneck stand in their own rooms alone."""
    names, found = {*PRIORS, *BOTTLENECKS}, []
    for path in sorted(DAE.rglob("*.py")) + sorted((DAE.parent / "recipes").glob("*.py")):
        if path.relative_to(DAE.parent).parts[1] in ("priors", "quantizers"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                constants, words = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}, ast.unparse(node)
                if constants & names and any(word in words for word in ("bottleneck", "family", "latent_type", "prior")):
                    found.append(f"{path}:{node.lineno}: {words}")
    assert not found

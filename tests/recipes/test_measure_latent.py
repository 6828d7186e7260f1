"""From the command line to the page: numbers, pictures and JSON of latents, and one line for whatever is wrong with one."""

import base64
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dae.cli import main
from dae.complexity.estimate import Estimate
from dae.models import Autoencoder
from dae.reporting import latents as latent_page

SMALL = ["data.max_train_samples=60", "measure.steps=3", "measure.seeds=[0,1]", "measure.latent_dim=4"]
OWN = """
import torch
def encode(x): return x[:, :, ::2, ::2].flatten(1)
def missing(x): return torch.full((len(x), 3), float("nan"))
def one(x): return x.flatten(1)[:1]
def constant(x): return torch.ones(len(x), 3)
def shorter(x): return x.flatten(1)[1:]
def huge(x): return x.flatten(1).double() * 1e300
def nearly_constant(x): return 1 + 1e-12 * x.flatten(1).double()
def sparse(x): return x.flatten(1).to_sparse()
def raises(x): return x.flatten(1) @ torch.ones(3, 3)
class Network(torch.nn.Module): pass
def four(x): return x[:, 0, 2:6:2, 3:7:2].flatten(1)
def four_repeated(x): return four(x).repeat(1, 16)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_encoders.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def measured(own, run, read_page):
    """`measured(*overrides)`: the folder that the recipe wrote, its JSON and its page."""

    def call(*overrides):
        path = run("measure_latent", own / "run", *SMALL, *overrides)
        return path.parent, json.loads((path.parent / "latents.json").read_text()), read_page(path)

    return call


def test_page_pictures_and_json(measured, own, configure):
    torch.manual_seed(0)
    Autoencoder(configure(own).autoencoder, 1, 8).save_pretrained(own / "trained" / "autoencoder")
    folder, found, page = measured(
        f"measure.latents=[gaussian,pca,own_encoders:encode,autoencoder:{own / 'trained'}]",
        "measure.distances=[frechet,reconstruction]",
    )
    assert [a["name"] for a in found["latents"]] == ["gaussian", "pca", "own_encoders:encode", f"autoencoder:{own / 'trained'}"]
    assert [a["paired"] for a in found["latents"]] == [False, True, True, True]
    curves = {(c["distance"], c["family"], c["latent"]): c for c in found["curves"]}
    assert len(curves) == 2 * 4 + 2 * 3, "noise has no reconstruction"
    for curve in curves.values():
        assert curve["capacities"] == sorted(curve["capacities"]) and len(curve["capacities"]) > 1
        for estimate in curve["estimates"]:
            computed = (curve["distance"], curve["family"]) == ("frechet", "linear")
            assert estimate["bound"] == ("exact" if computed else "upper") and estimate["seeds"] == [0, 1]
            assert estimate["counts"] == ([60, 60] if computed else [24, 30]), "6 rows choose"
            assert all(math.isfinite(v) for v in estimate["values"]) and estimate["std"] == pytest.approx(
                np.std(estimate["values"], ddof=1)
            )
    # 16 of 64 pixels given as they are: a linear map gives back at least these, an average image none
    given, average = curves["reconstruction", "linear", "own_encoders:encode"], found["yardsticks"]["reconstruction"]["average"]
    assert given["estimates"][-1]["value"] < 0.75 * average["value"]
    assert found["yardsticks"]["reconstruction"]["real"]["value"] == 0 < found["yardsticks"]["frechet"]["real"]["value"]

    words = re.sub(r"\s+", " ", page.words)
    for section in (
        "The answer",
        "Pictures",
        "What these numbers do not say",
        "Lower is better",
        "bounds the true distance from above",
    ):
        assert section in words
    for curve in curves.values():
        if curve["distance"] == "frechet":
            first = curve["estimates"][0]
            value, margin = first["value"], max(first["std"], first["standard_error"])
            assert any(f"{value:.{places}f} ± {margin:.{places}f}" in words for places in range(5))
    assert "trained on 24 and judged on 30 others" in words
    assert "With linear maps each number is exact" in words and "With small networks each number bounds" in words
    assert "autoencoder: trained" in words and "encode of the module own_encoders" in words
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert all(p["src"].startswith("data:") and p["alt"] for p in pictures)
    assert sum(p["src"].startswith("data:image/svg") for p in pictures) == 4
    strips = [p for p in pictures if p["src"].startswith("data:image/png")]
    assert len(strips) == 4 + 3 * 6 and all(base64.b64decode(p["src"].split(",")[1]) for p in strips)
    for name in ("curves-frechet", "curves-reconstruction", "pictures-gaussian", "pictures-own_encoders-encode"):
        assert np.asarray(Image.open(folder / f"{name}.png")).std() > 0


def test_same_seed_same_numbers_without_POT_and_no_spread_of_one_seed(measured, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "ot", None)
    overrides = (
        "measure.latents=[gaussian,uniform]",
        "measure.distances=[frechet]",
        "measure.families=[mlp,dropout]",
        "measure.seeds=[3]",
    )
    state = torch.get_rng_state()
    (_, a, page), (_, b, again) = measured(*overrides), measured(*overrides)
    assert page.values("img", "src") == again.values("img", "src"), "pictures of dropout networks, too"
    assert a["curves"] == b["curves"] and a["latents"] == b["latents"] and torch.equal(state, torch.get_rng_state())
    assert a["gromov_wasserstein"] is None and "POT is not installed" in page.words
    words = page.words
    assert "Measured with one seed, which tells no spread" in words and "±" not in words
    assert "±" not in capsys.readouterr().out


def test_a_latent_gains_nothing_by_repeating_itself(measured):
    """The same information in 4 and in 64 numbers, for families whose stretch is bounded."""
    _, found, page = measured(
        "measure.latents=[own_encoders:four,own_encoders:four_repeated]", "measure.distances=[frechet,reconstruction]",
        "measure.families=[linear,lipschitz]", "data.max_train_samples=200", "measure.steps=60",
    )  # fmt: skip
    curves = {(c["distance"], c["family"], c["latent"]): c["estimates"] for c in found["curves"]}
    for distance in ("frechet", "reconstruction"):
        for family in ("linear", "lipschitz"):
            of = [curves[distance, family, f"own_encoders:{name}"] for name in ("four", "four_repeated")]
            for once, often in zip(*of, strict=True):
                if family == "linear":  # unique, and computed, not trained
                    assert often["values"] == pytest.approx(once["values"], rel=1e-4)
                # twice the deviation of a difference; many times that where each value, not each code, has variance 1
                assert abs(once["value"] - often["value"]) <= 2 * math.hypot(once["std"], often["std"])
    words = re.sub(r"\s+", " ", page.words)
    assert "from 4 to 64 numbers" in words and "linear maps and smooth networks, whose stretch is limited" in words
    once, often = (a["divided_by"] for a in found["latents"])
    assert often == pytest.approx(4 * once), "of 16 times the values, the summed variance is 16 times as large"


@pytest.mark.slow
def test_an_adversarial_distance_bounds_neither_side(measured):
    _, found, page = measured(
        "measure.latents=[own_encoders:encode]",
        "measure.distances=[js]",
        "measure.families=[mlp]",
        "measure.seeds=[0]",
        "data.max_train_samples=80",
    )
    estimates = [e for c in found["curves"] for e in c["estimates"]]
    assert {e["bound"] for e in estimates} == {"neither"} and found["enough"] == {"js": None}
    assert all(e["value"] <= math.log(2) for e in estimates), "of held-out rows too: its estimate is never above its supremum"
    assert "bounds neither side" in page.words


def test_the_other_families(measured, own, configure):
    torch.manual_seed(0)
    Autoencoder(configure(own).autoencoder, 1, 8).save_pretrained(own / "trained")
    families = ["conv", "lipschitz", "dropout"]
    _, found, page = measured(
        f"measure.latents=[autoencoder:{own / 'trained'}]", "measure.distances=[reconstruction]",
        f"measure.families=[{','.join(families)}]", "measure.seeds=[0]",
    )  # fmt: skip
    assert [c["family"] for c in found["curves"]] == families
    assert all(latent_page.FAMILIES[name].words in page.words for name in families)


def estimate(*values, error=None):
    facts = {
        "standard_error": error,
        "bound": "upper",
        "distance": "sinkhorn",
        "convention": "",
        "family": None,
        "capacity": None,
        "counts": (9, 9),
    }
    return Estimate.over(values, range(len(values)), **facts)


def test_a_winner_is_ahead_with_every_seed():
    a, b, c = ("a", estimate(1.0, 2.0)), ("b", estimate(1.1, 2.1)), ("c", estimate(0.9, 9.0))
    assert latent_page.tile([a, b], "x")[0] == "a" and "ahead with each of 2 seeds" in latent_page.tile([a, b], "x")[2]
    assert latent_page.tile([a, c], "x")[0] == "a or c", "c is better with the first seed"
    assert latent_page.tile([a, c, c], "x")[0] == "no clear winner"
    near = [("a", estimate(1.0, 2.0, error=0.1)), ("b", estimate(1.1, 2.1, error=0.1))]
    assert latent_page.tile(near, "x")[0] == "a or b", "ahead by less than the sampling error"
    lucky = [("a", estimate(1.0, 2.0)), ("b", estimate(1.01, 2.2))]
    assert latent_page.tile(lucky, "x")[0] == "a or b", "ahead with both seeds, but by 0.01 and 0.2"
    assert "one seed, so how sure" in latent_page.tile([("a", estimate(1.0)), ("b", estimate(2.0))], "x")[2]


REFUSED = {
    "NaN": ("measure.latents=[own_encoders:missing]", "latent 'own_encoders:missing': latents: expected finite values, got NaN"),
    "one point": (
        "measure.latents=[own_encoders:one]",
        "latent 'own_encoders:one': expected one code an image, 60 in all, got shape [1, 64]",
    ),
    "constant": ("measure.latents=[own_encoders:constant]", "expected latents that differ, got 60 equal ones"),
    "length": ("measure.latents=[own_encoders:shorter]", "60 in all, got shape [59, 64]"),
    "map": (
        "measure.families=[conv]",
        "measure.families: 'conv' cannot map the latent 'gaussian': convolutional decoders map [D, h, w]",
    ),
    "module": ("measure.latents=[no_such_module:encode]", "no module 'no_such_module' in the current directory"),
    "attribute": ("measure.latents=[own_encoders:encod]", "own_encoders has no 'encod'; it has encode"),
    "latent": ("measure.latents=[gaussin]", "did you mean 'gaussian'"),
    "distance": ("measure.distances=[sinkhron]", "did you mean 'sinkhorn'"),
    "family": ("measure.families=[linaer]", "did you mean 'linear'"),
    "nothing": ("measure.latents=[]", "measure.latents: expected at least one and none twice"),
    "twice": ("measure.latents=[pca,pca]", "measure.latents: expected at least one and none twice"),
    "seeds": ("measure.seeds=[]", "measure.seeds: expected at least one and none twice"),
    "unpaired": ("measure.distances=[reconstruction]", "reconstruction needs a latent that is computed from images"),
    "dimensions": ("measure.latents=[pca]", "latent 'pca': expected measure.latent_dim of at most"),
    "folder": ("measure.latents=[autoencoder:nowhere]", "nowhere"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(run, own, what):
    override, words = REFUSED[what]
    latents = [] if "measure.latents" in override else ["measure.latents=[gaussian]"]
    dim = ["measure.latent_dim=64"] if what == "dimensions" else []
    with pytest.raises((ValueError, TypeError, ImportError, FileNotFoundError), match=re.escape(words)):
        run("measure_latent", own / "run", *SMALL, *latents, override, *dim)
    assert not (own / "run" / "measure").exists()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("own_encoders:huge", "latent 'own_encoders:huge': values of up to 1e+300 do not fit into float32"),
        ("own_encoders:nearly_constant", "latent 'own_encoders:nearly_constant': expected codes that differ in float32"),
        ("broken:encode", "latent 'broken:encode': the module broken was found, but its import failed: ValueError: no weights"),
        ("own_encoders:Network", "latent 'own_encoders:Network': expected a function or an instance, got the class Network"),
        ("own_encoders:sparse", "latent 'own_encoders:sparse': expected a dense tensor"),
        ("own_encoders:raises", "latent 'own_encoders:raises': the function failed: RuntimeError: mat1 and mat2"),
        ("own_encoders.py:four", "a module is named without .py: own_encoders:four"),
        ("own_encoders:missing", "latent 'own_encoders:missing': latents: expected finite values, got NaN"),
    ],
)
def test_whatever_is_wrong_with_an_own_latent_is_one_line(recipe, tiny, own, monkeypatch, capsys, spec, words):
    """Of the command line, in this process."""
    (own / "broken.py").write_text("raise ValueError('no\\nweights')")
    module = recipe("measure_latent")
    monkeypatch.setattr(
        "sys.argv", [module.__file__, *tiny, f"output_dir={own / 'run'}", *SMALL, f"measure.latents=[gaussian,{spec}]"]
    )
    with pytest.raises(SystemExit) as done:
        main(module.measure_latent, module.__doc__)
    *_, message = capsys.readouterr().err.splitlines()
    assert done.value.code == 2 and message.startswith("measure_latent.py: error: ") and words in message


def test_a_refusal_is_one_line(script, tiny, own):
    """As a user starts it: the own module lies in the current directory, which is not that of the script."""
    arguments = [*tiny, f"output_dir={own / 'run'}", *SMALL, "measure.latents=[own_encoders:missing]"]
    done = script(
        "measure_latent", *arguments, PYTHONPATH=f"{own}:{Path(__file__).parents[2]}:{Path(__file__).parents[2] / 'kernels'}"
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    *_, message = done.stderr.splitlines()
    assert message.startswith("measure_latent.py: error: latent 'own_encoders:missing': latents: expected finite values, got NaN")

"""Where latents come from: closed forms, pairing, reproducibility, and each way in which a latent can be wrong."""

import re
import sys

import numpy as np
import pytest
import torch

from dae.complexity.latents import MIXTURE_COMPONENTS, configuration_of, load_latent
from dae.config import load_config
from dae.metrics import Classifier, extract_features
from dae.models import Autoencoder

TINY = ["autoencoder.base_channels=8", "autoencoder.latent_channels=4", "autoencoder.vq.codebook_size=8", "measure.latent_dim=5"]


@pytest.fixture(scope="module")
def images():
    return 2 * torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 1


@pytest.fixture
def load(images):
    """`load(spec, *overrides)` of the images, and with `images=` of others."""

    def call(spec, *overrides, images=images, labels=None, seed=0):
        return load_latent(spec, images, labels, load_config(None, [*TINY, *overrides]), seed)

    return call


@pytest.fixture
def module(tmp_path, monkeypatch):
    """`module(name, source)` writes name.py into a new current directory, which is not on sys.path."""
    monkeypatch.chdir(tmp_path)
    written = []

    def write(name, source):
        path = tmp_path / (name.replace(".", "/") + ".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
        written.append(name)
        return path

    yield write
    for name in written:
        for loaded in (name, name.split(".")[0]):
            sys.modules.pop(loaded, None)


@pytest.mark.parametrize("spec", ["gaussian", "uniform", "mixture"])
def test_noise_has_mean_0_and_variance_1_and_is_of_its_seed(load, spec):
    many = torch.zeros(20000, 1, 1, 1)
    state = torch.get_rng_state()
    a, b, c = load(spec, images=many), load(spec, images=many), load(spec, images=many, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert a.codes.shape == (20000, 5) and a.codes.dtype == torch.float32 and not a.paired
    assert torch.equal(a.codes, b.codes) and a.provenance == b.provenance
    assert not torch.equal(a.codes, c.codes) and a.provenance["codes_sha256"] != c.provenance["codes_sha256"]
    if spec == "mixture":  # variance 1 in expectation over the places of the clumps, not in one draw of them
        within = torch.cdist(a.codes[:2000], a.codes[:2000])
        clumps = len((within < 2.2).unique(dim=0))  # distances within a clump are about sqrt(2 * 5 * 0.1) = 1
        assert clumps >= MIXTURE_COMPONENTS
    else:
        # the standard error of a variance of 20,000 numbers is at most sqrt(2 / 20000) = 0.01; five of them
        assert a.codes.mean(0).abs().max() < 0.05 and (a.codes.var(0) - 1).abs().max() < 0.05
    if spec == "uniform":
        assert a.codes.abs().max() <= 3**0.5


def test_mixture_varies_by_its_share_within_a_clump(load):
    codes = torch.cat([load("mixture", images=torch.zeros(4000, 1, 1, 1), seed=seed).codes for seed in range(20)])
    # 20 x 10 places, each of 5 coordinates: the relative error of their variance is about sqrt(2 / 1000) = 0.045; three of them
    assert codes.var().item() == pytest.approx(1, rel=0.14)


def test_pca_is_the_best_linear_code(load, images):
    found = load("pca")
    x_ND = images.flatten(1).double()
    centred = x_ND - x_ND.mean(0)
    spectrum = torch.linalg.eigvalsh(centred.T @ centred).flip(0)
    # not whitened: the variance along component k is eigenvalue k; what is left out is the sum of the other eigenvalues
    torch.testing.assert_close(found.codes.double().square().sum(0), spectrum[:5], rtol=1e-5, atol=0)
    fit = torch.linalg.lstsq(found.codes.double(), centred).solution
    left = (centred - found.codes.double() @ fit).square().sum()
    torch.testing.assert_close(left, spectrum[5:].sum(), rtol=1e-5, atol=0)
    assert found.provenance["explained_variance"] == pytest.approx((spectrum[:5].sum() / spectrum.sum()).item())
    assert found.paired and torch.equal(found.codes, load("pca", seed=7).codes), "nothing is random in it"


def test_pca_of_more_components_than_there_are(load, images):
    with pytest.raises(ValueError, match=r"latent 'pca': .* at most 3, the rank of 4 images of 64 values, got 5"):
        load("pca", images=images[:4])


def test_label(load):
    labels = torch.arange(60) % 3
    assert torch.equal(load("label", labels=labels).codes, torch.eye(3)[labels])
    with pytest.raises(ValueError, match="'label': expected images with labels"):
        load("label")


def test_features_of_a_saved_classifier(load, images, tmp_path):
    torch.manual_seed(0)
    classifier = Classifier(1, 3, width=4).eval()
    classifier.save(tmp_path / "c.safetensors")
    found = load(f"features:{tmp_path / 'c.safetensors'}")
    assert torch.equal(found.codes, extract_features(classifier, images))
    assert found.paired and classifier.identifier in found.description
    with pytest.raises(FileNotFoundError, match="no classifier file"):
        load("features:missing.safetensors")


@pytest.mark.parametrize("bottleneck", ["vq", "kl"])
def test_saved_autoencoder(load, images, tmp_path, bottleneck):
    torch.manual_seed(0)
    config = load_config(None, [*TINY, f"autoencoder.bottleneck={bottleneck}"])
    autoencoder = Autoencoder(config.autoencoder, 1, 8).eval()
    autoencoder.save_pretrained(tmp_path / "run" / "autoencoder")
    with torch.no_grad():
        encoding = autoencoder.encode(images)
    for folder in (tmp_path / "run", tmp_path / "run" / "autoencoder"):
        found = load(f"autoencoder:{folder}")
        # batches of another size: convolutions may sum in another order
        torch.testing.assert_close(found.codes, encoding.latents, rtol=1e-5, atol=1e-6)
        assert found.paired and len(found.provenance["fingerprint"]) == 64
    if bottleneck == "vq":
        with pytest.raises(ValueError, match=r"VQ autoencoder has no posterior; use autoencoder:"):
            load(f"posterior:{tmp_path / 'run'}")
        return
    sample = load(f"posterior:{tmp_path / 'run'}")
    assert torch.equal(sample.codes, load(f"posterior:{tmp_path / 'run'}").codes)
    z = (sample.codes - encoding.features) / (0.5 * encoding.log_variance).exp()
    # 60 x 64 standard normal numbers: standard errors of mean and variance 0.016 and 0.023; four of them
    assert z.mean().abs() < 0.07 and (z.var() - 1).abs() < 0.1


def test_saved_autoencoder_of_other_images(load, tmp_path):
    Autoencoder(load_config(None, TINY).autoencoder, 3, 8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained on 3-channel images"):
        load(f"autoencoder:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load("autoencoder:/nowhere/at/all")


def test_configurations_of_the_autoencoders_trained_here():
    config = load_config(None, ["autoencoder.bottleneck=vq", "method=joint", "autoencoder.kl.kl_weight=0.5"])
    found = {spec: configuration_of(spec, config) for spec in ("ae", "vae", "vq", "dae")}
    assert [c.method for c in found.values()] == ["joint", "joint", "joint", "dae"]
    assert [c.autoencoder.bottleneck for c in found.values()] == ["kl", "kl", "vq", "vq"]
    assert (found["ae"].autoencoder.kl.kl_weight, found["vae"].autoencoder.kl.kl_weight) == (0.0, 0.5)
    assert all(c.stage1 == config.stage1 and c.stage2 == config.stage2 for c in found.values())
    assert config.autoencoder.kl.kl_weight == 0.5 and config.method == "joint", "the user's configuration is left alone"


TRAINED = [f"{stage}.{key}" for stage in ("stage1", "stage2") for key in ("max_train_steps=2", "train_batch_size=16")]


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("ae", "means of the posteriors of an autoencoder without a bottleneck"),
        ("vae", "means of the posteriors of a variational"),
        ("vq", "code vectors.*of a VQ autoencoder"),
        ("dae", "code vectors.*Decoupled"),
    ],
)
def test_autoencoder_trained_here(load, spec, what):
    state = torch.get_rng_state()
    a, b, c = load(spec, *TRAINED), load(spec, *TRAINED), load(spec, *TRAINED, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert a.codes.shape == (60, 4, 4, 4) and torch.equal(a.codes, b.codes) and not torch.equal(a.codes, c.codes)
    assert re.search(what + ".*trained here for 4 steps", a.description)


# ---- timm ----


def test_features_of_timm_see_images_as_the_model_expects(load, timm):
    grey = torch.linspace(-1, 1, 60).reshape(60, 1, 1, 1).expand(60, 1, 8, 8)
    found = load("features:small", images=grey)
    expected = ((grey.mean((2, 3)) + 1) / 2 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.5, 0.2, 0.1])
    torch.testing.assert_close(found.codes, torch.cat([expected, expected], 1), rtol=1e-4, atol=1e-5)
    assert timm.asked == [("small", True, 0)] and "16 × 20 pixels" in found.description
    assert found.provenance["mean"] == (0.5, 0.4, 0.3) and len(found.provenance["weights_sha256"]) == 64


def test_features_of_a_folder_in_the_format_of_timm(load, timm, tmp_path):
    with pytest.raises(ValueError, match=r"config.json that names timm's `architecture`.*autoencoder:"):
        load(f"features:{tmp_path}")
    (tmp_path / "config.json").write_text('{"architecture": "small"}')
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors: expected the weights of small"):
        load(f"features:{tmp_path}")
    (tmp_path / "model.safetensors").touch()
    assert load(f"features:{tmp_path}").codes.shape == (60, 6)
    assert timm.asked == [(f"local-dir:{tmp_path}", True, 0)]


def test_features_refused(load, timm, monkeypatch):
    with pytest.raises(ValueError, match="near names are small"):
        load("features:smal")
    timm.is_model = lambda name: True
    with pytest.raises(FileNotFoundError, match=r"timm 1.0 cannot load the weights \(cannot reach the Hub\); connect"):
        load("features:offline")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"features:small.*needs the package timm.*pip install timm"):
        load("features:small")


def test_features_of_timm_itself(load, tmp_path):
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", pretrained=False, num_classes=0).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        '{"architecture": "test_resnet", "num_classes": 0, "pretrained_cfg": {"num_classes": 0}}'
    )
    found = load(f"features:{tmp_path}")
    assert found.codes.shape == (60, model.num_features)


# ---- functions ----


def test_own_function(load, module, images):
    path = module("encoders", "import torch\ndef halves(x):\n    x.add_(1)\n    return x[..., :4] + torch.rand(())\n")
    kept, state, path_before = images.clone(), torch.get_rng_state(), list(sys.path)
    a, b = load("encoders:halves"), load("encoders:halves")
    assert a.codes.shape == (60, 1, 8, 4) and torch.equal(a.codes, b.codes) and a.paired
    assert torch.equal(images, kept) and torch.equal(state, torch.get_rng_state()) and sys.path == path_before
    assert a.provenance["source"] == str(path) and len(a.provenance["source_sha256"]) == 64


def test_own_function_in_a_package_and_in_numpy(load, module, images):
    module(
        "mine.deep",
        "class Encoder:\n    @staticmethod\n    def encode(x):\n        return x.numpy().reshape(len(x), -1)[:, :3]\n",
    )
    assert torch.equal(load("mine.deep:Encoder.encode").codes, images.flatten(1)[:, :3])


FUNCTIONS = """
import numpy as np, torch
number = 3
def encode(x): return x.flatten(1)
def missing(x): return torch.where(torch.arange(len(x))[:, None] == 7, torch.nan, x.flatten(1))
def infinite(x): return x.flatten(1) / 0
def constant(x): return torch.ones(len(x), 4)
def shorter(x): return x[1:].flatten(1)
def one(x): return x.sum()
def tokens(x): return (x > 0).flatten(1).long()
def nothing(x): pass
def words(x): return np.array(["a"] * len(x))
def empty(x): return x.flatten(1)[:, :0]
def huge(x): return x.flatten(1).double() * 1e300
def nearly_constant(x): return 1 + 1e-12 * x.flatten(1).double()
def vanishing(x): return 1e-60 * x.flatten(1).double()
def sparse(x): return x.flatten(1).to_sparse()
def raises(x): return x.flatten(1) @ torch.ones(3, 3)
def interrupted(x): raise ValueError("give me\\nother images")
def exits(x): raise SystemExit(0)
class Network(torch.nn.Module): pass
"""
BAD = {
    "huge": (ValueError, r"values of up to 1e\+300 do not fit into float32 .* divide the codes"),
    "nearly_constant": (ValueError, "expected codes that differ in float32, .* subtract their mean"),
    "vanishing": (ValueError, "expected codes that differ in float32, .* subtract their mean"),
    "sparse": (TypeError, r"expected a dense tensor .*, got layout torch.sparse_coo; .* return .to_dense\(\)"),
    "raises": (RuntimeError, r"the function failed: RuntimeError: mat1 and mat2 .*; DAE_TRACEBACK=1 shows where"),
    "interrupted": (RuntimeError, "the function failed: ValueError: give me other images; DAE_TRACEBACK"),
    "exits": (RuntimeError, "the function failed: SystemExit: 0"),
    "Network": (TypeError, "expected a function or an instance, got the class Network; write `encode = Network"),
    "missing": (ValueError, "NaN or infinity in 1 of 60 points, first in point 7"),
    "infinite": (ValueError, "NaN or infinity in 60 of 60"),
    "constant": (ValueError, "expected latents that differ, got 60 equal ones"),
    "shorter": (ValueError, r"one code an image, 60 in all, got shape \[59, 64\]"),
    "one": (ValueError, r"one code an image, 60 in all, got shape \[\]"),
    "tokens": (TypeError, "int64.*one_hot"),
    "nothing": (TypeError, r"return a tensor or array \[N, ...\], got NoneType"),
    "words": (TypeError, "array of floating point numbers, got one of <U1"),
    "empty": (ValueError, r"at least one value a point, got \[60, 0\]"),
    "number": (TypeError, "expected a function of images .* got int, not callable"),
    "encoed": (ImportError, "functions has no 'encoed'; it has encode"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_functions(load, module, name):
    module("functions", FUNCTIONS)
    kind, words = BAD[name]
    with pytest.raises(kind, match=f"^latent 'functions:{name}': .*{words}") as caught:
        load(f"functions:{name}")
    assert "\n" not in str(caught.value) and ("failed" not in words or caught.value.__cause__ is not None)


def test_small_codes_are_codes(load, module, images):
    module("functions", "def encode(x): return 1e-25 * x.flatten(1)")
    assert torch.equal(load("functions:encode").codes, 1e-25 * images.flatten(1))


@pytest.mark.parametrize(
    ("source", "spec", "words"),
    [
        ("", "absent:encode", r"no module 'absent' in the current directory \(.*\).*PYTHONPATH=<folder>"),
        ("", "functions.inner:encode", "no module 'functions.inner'"),
        (
            "import no_such_package_at_all",
            "functions:encode",
            "was found, but its import failed: ModuleNotFoundError: No module named 'no_such",
        ),
        (
            "from math import no_such_name",
            "functions:encode",
            "its import failed: ImportError: cannot import name",
        ),
        ("def encode(x:", "functions:encode", "its import failed: SyntaxError: .*line 1"),
        ("raise ValueError('no weights\\nhere')", "functions:encode", "its import failed: ValueError: no weights here"),
        ("import sys; sys.exit(0)", "functions:encode", "its import failed: SystemExit: 0"),
        ("1 / 0", "functions:encode", "its import failed: ZeroDivisionError"),
        ("def encode(x): return x", "functions.py:encode", "; a module is named without .py: functions:encode"),
    ],
)
def test_functions_that_do_not_import(load, module, source, spec, words):
    module("functions", source)
    path_before = list(sys.path)
    with pytest.raises(ImportError, match=f"^latent '{spec}': .*{words}"):
        load(spec)
    assert sys.path == path_before


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("gausian", "got 'gausian'; did you mean 'gaussian'"),
        ("", "expected one of gaussian"),
        ("autoencoder:", "`autoencoder:<what to load>`, got nothing"),
        ("my file.py:encode", "expected package.module:function"),
        (
            "./code/own.py:encode",
            "; a module is named without .py: own:encode with PYTHONPATH=code",
        ),
        ("module:", "expected package.module:function"),
    ],
)
def test_specifications_that_are_none(load, spec, words):
    with pytest.raises(ValueError, match=words):
        load(spec)


def test_images_that_are_none(load):
    with pytest.raises(ValueError, match="at least 2 points, got 1"):
        load("gaussian", images=torch.zeros(1, 1, 8, 8))
    with pytest.raises(TypeError, match="ndarray"):
        load("gaussian", images=np.zeros((4, 1, 8, 8)))
    with pytest.raises(ValueError, match=r"\[N, C, H, W\]"):
        load("gaussian", images=torch.zeros(4, 64))

"""Whatever stands in the place of a tensor, the functions of dae refuse it themselves, in one line."""

from __future__ import annotations

import warnings

import pytest
import torch

from dae import complexity, losses, metrics
from dae.complexity.adversarial import adversarial_distance
from dae.config import KLConfig, VQConfig
from dae.data.augmentation import augment
from dae.quantizers import GaussianBottleneck, VectorQuantizer
from dae.sampling import filter_logits

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
GENERATOR = torch.Generator().manual_seed(0)
CLOUD, IMAGES = torch.randn(32, 4, generator=GENERATOR), torch.randn(4, 1, 16, 16, generator=GENERATOR).clamp(-1, 1)
LATENTS, CODES = torch.randn(4, 2, 3, 3, generator=GENERATOR), torch.arange(16).view(4, 4)
CLASSIFIER = metrics.Classifier(1, 2, width=2)
LINEAR = complexity.LinearMaps()
VQ, KL = VectorQuantizer(VQConfig(codebook_size=4), 2), GaussianBottleneck(KLConfig())

FLOATING = {  # a function of one tensor, and one that it takes
    "frechet_distance": (lambda x: metrics.frechet_distance(x, CLOUD), CLOUD),
    "equal_count_frechet": (lambda x: metrics.equal_count_frechet(CLOUD, x, seed=0), CLOUD),
    "kernel_distance": (lambda x: metrics.kernel_distance(CLOUD, x, seed=0), CLOUD),
    "precision_recall": (lambda x: metrics.precision_recall(CLOUD, x), CLOUD),
    "gaussian_rate": (lambda x: metrics.gaussian_rate(x, LATENTS), LATENTS),
    "psnr": (lambda x: metrics.psnr(x, IMAGES), IMAGES),
    "ssim": (lambda x: metrics.ssim(IMAGES, x), IMAGES),
    "memorisation": (lambda x: metrics.memorisation(IMAGES, x, IMAGES), IMAGES),
    "predict": (lambda x: metrics.predict(CLASSIFIER, x), IMAGES),
    "extract_features": (lambda x: metrics.extract_features(CLASSIFIER, x), IMAGES),
    "accuracy": (lambda x: metrics.accuracy(CLASSIFIER, x, torch.zeros(4, dtype=torch.int64)), IMAGES),
    "make_distance": (lambda x: complexity.make_distance("energy", x), CLOUD),
    "generator_distance": (
        lambda x: complexity.generator_distance(x, CLOUD, complexity.LinearMaps(), "reconstruction", seeds=(0,)),
        CLOUD,
    ),
    "adversarial_distance": (lambda x: adversarial_distance(x, CLOUD, "js", seeds=(0,), steps=2), CLOUD),
    "gromov_wasserstein": (lambda x: complexity.gromov_wasserstein(CLOUD, x, seeds=(0,)), CLOUD),
    "optimal_latent": (lambda x: complexity.optimal_latent(x, LINEAR, latent_dim=2, seeds=(0,)), CLOUD),
    "flow_matching_loss": (lambda x: losses.flow_matching_loss(lambda z, *_: z, x, torch.zeros(4, dtype=torch.int64)), LATENTS),
    "augment": (lambda x: augment(x, random_flip=True, random_affine=1.0), IMAGES),
    "filter_logits": (lambda x: filter_logits(x, 2, None), CLOUD),
    "VectorQuantizer": (lambda x: VQ(x), LATENTS),
    "sample_indices": (lambda x: VQ.sample_indices(x, 0.5), LATENTS),
    "GaussianBottleneck": (lambda x: KL(x, False), LATENTS),
}
INTEGER = {
    "code_entropy_rate": (lambda x: metrics.code_entropy_rate(x, 16), CODES),
    "CodebookUsage": (lambda x: metrics.CodebookUsage(16).update(x), CODES),
    "labels": (lambda x: metrics.accuracy(CLASSIFIER, IMAGES, x), CODES[:, 0] % 2),
}
MAY_BE_META = {"augment", "filter_logits", "VectorQuantizer", "GaussianBottleneck", "flow_matching_loss"}  # they read no value


def wrong(x, floating):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from {"list": x.tolist(), "array": x.numpy(), "text": "x", "none": None, "complex": x.to(torch.complex64)}.items()
        yield from {"sparse": x.to_sparse(), "rows": x.reshape(1, -1).to_sparse_csr()}.items()
        yield from {"nested": torch.nested.nested_tensor([x, x]), "float8": x.float().to(torch.float8_e4m3fn)}.items()
        yield from {"bool": x > 0, "meta": x.to("meta"), "kind": x.long() if floating else x.float()}.items()


@pytest.mark.parametrize("name", [*FLOATING, *INTEGER])
def test_refused_in_one_line(name):
    function, right = (FLOATING | INTEGER)[name]
    function(right)
    for kind, value in wrong(right, name in FLOATING):
        if kind == "meta" and name in MAY_BE_META:
            continue
        with pytest.raises((TypeError, ValueError)) as caught:
            function(value)
        assert "\n" not in str(caught.value) and "got " in str(caught.value), (kind, str(caught.value))
        assert caught.traceback[-1].path.parent.as_posix().rsplit("/", 1)[-1] not in ("torch", "nn"), (kind, repr(caught.value))


@pytest.mark.parametrize("shape", [(4, 3, 3), (2, 5, 3, 3), (4,)])
def test_bottlenecks_name_the_shape(shape):
    for bottleneck in (lambda x: VQ(x), lambda x: VQ.sample_indices(x, 0.5), lambda x: KL(x, True)):
        with pytest.raises(ValueError, match=r"needs features \[B, .*, h, w\], got \["):
            bottleneck(torch.zeros(shape))

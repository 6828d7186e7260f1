"""Two decoders of one latent: checksums notice any change of it, and the comparison finds what differs and where."""

from types import SimpleNamespace

import pytest
import torch

from dae.config import AutoencoderConfig, VQConfig
from dae.evaluation.decoders import CROP, Worst, checksums, compare_decoders, crop_side, require_equal, worst_places
from dae.metrics import frechet_distance, psnr, ssim
from dae.models import Autoencoder


def make(bottleneck):
    torch.manual_seed(0)
    config = AutoencoderConfig(base_channels=4, latent_channels=3, bottleneck=bottleneck, vq=VQConfig(codebook_size=6))
    return Autoencoder(config, 1, 8).eval()


def images(count=9, size=8):
    return torch.randint(0, 256, (count, 1, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize("bottleneck", ["vq", "kl"])
def test_checksums(bottleneck):
    x = images()
    before = checksums(make(bottleneck), x, 4)
    assert set(before) == ({"encoder", "bottleneck", "latents"} if bottleneck == "vq" else {"encoder", "latents"})
    model = make(bottleneck)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(1)
    require_equal(before, checksums(model, x, 4))
    with torch.no_grad():
        next(model.encoder.parameters()).view(-1)[0].add_(1e-6)
    after = checksums(model, x, 4)
    with pytest.raises(
        RuntimeError, match=rf"latent has changed \(encoder: {before['encoder'][:12]} before, {after['encoder'][:12]}"
    ):
        require_equal(before, after)
    assert checksums(make(bottleneck), 255 - x, 4)["latents"] != before["latents"]
    if bottleneck == "vq":
        model = make(bottleneck)
        model.bottleneck.codebook[0, 0] += 1e-3
        assert checksums(model, x, 4)["bottleneck"] != before["bottleneck"]


class Decoder:
    """Its latent is the image; decodes it with an error."""

    device = torch.device("cpu")

    def __init__(self, error):
        self.error = error

    def encode(self, x):
        return SimpleNamespace(latents=x)

    def decode(self, latents):
        return SimpleNamespace(sample=latents + self.error)


def test_compare():
    x = images(7, 16)
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(1, 1, 16, 16, generator=generator)
    first, second = Decoder(0.3 * noise), Decoder(0.1 * noise)
    features = lambda batch: batch[:, 0, :2, :2].flatten(1)  # noqa: E731
    perceptual = lambda a, b: (a - b).abs().mean((1, 2, 3))  # noqa: E731
    values, worst = compare_decoders(first, second, x, features, perceptual, batch_size=3, seed=0)
    real = x.float() / 127.5 - 1
    pair = [(real + decoder.error).clamp(-1, 1) for decoder in (first, second)]
    for name, measure in {"psnr": psnr, "ssim": ssim, "lpips": perceptual}.items():
        one, two = (measure(each, real).double().mean().item() for each in pair)
        found = {side: values[name][side]["mean"] for side in ("first", "second", "difference")}
        # Batches of 3 and of 7 may be summed in another order, in float32 for the last of the three measures.
        assert found == pytest.approx({"first": one, "second": two, "difference": two - one}, rel=1e-6, abs=1e-6)
        assert values[name]["difference"]["low"] <= two - one <= values[name]["difference"]["high"]
    assert values["psnr"]["difference"]["low"] > 5 and values["lpips"]["difference"]["high"] < 0  # three times less noise
    distances = [frechet_distance(features(real), features(each)) for each in pair]
    assert [values["frechet"][side]["mean"] for side in ("first", "second")] == pytest.approx(distances)
    assert values["frechet"]["repeats"] == 200 and values["frechet"]["first"]["n"] == 7
    assert sorted(place.row for place in worst) == list(range(7))
    alone = [worst_places(pair[0][place.row, None], real[place.row, None])[0] for place in worst]
    assert [(place.top, place.left) for place in worst] == [(top, left) for _, top, left in alone]
    assert [error for error, *_ in alone] == sorted((error for error, *_ in alone), reverse=True)


def test_worst_places():
    real = torch.zeros(2, 3, 64, 64)
    rebuilt = real.clone()
    rebuilt[0, :, 30 : 30 + CROP, 8 : 8 + CROP] = 1
    rebuilt[1, 1, :CROP, 64 - CROP :] = 0.5
    (one, *first), (two, *second) = worst_places(rebuilt, real)
    assert (first, second) == ([30, 8], [0, 64 - CROP])
    assert (one, two) == pytest.approx((1, 0.25 / 3), rel=CROP**2 * 2**-24)  # of a sum of so many float32 numbers
    assert [crop_side(torch.zeros(1, 1, side, side)) for side in (1, 8, 40, 256)] == [1, 4, 20, CROP]
    assert Worst(0, 1, 2).left == 2

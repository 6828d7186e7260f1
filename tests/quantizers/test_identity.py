"""No bottleneck: what comes in goes out, with a posterior as narrow as rounding."""

import pytest
import torch

from dae.config import load_config
from dae.priors import prior_family
from dae.quantizers import BOTTLENECKS, IdentityBottleneck, bottleneck_class, latent_statistics

CONFIG = load_config(None, ["autoencoder.bottleneck=identity", "autoencoder.latent_channels=5"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_comes_in_goes_out(dtype):
    bottleneck, features = IdentityBottleneck.build(CONFIG.autoencoder), torch.randn(3, 5, 2, 4, dtype=dtype, requires_grad=True)
    state = torch.get_rng_state()
    encoding = bottleneck(features, sample_posterior=True)
    assert encoding.latents is features and encoding.features is features and torch.equal(state, torch.get_rng_state())
    assert encoding.loss == 0 and encoding.loss.dtype == torch.promote_types(dtype, torch.float32)
    assert encoding.log_variance.dtype == dtype and (encoding.log_variance == -30).all()
    moments = bottleneck.pack(encoding)
    assert moments.shape == (3, 10, 2, 4) and moments.dtype == torch.float32
    mean, std = latent_statistics(moments[:, None].detach())
    torch.testing.assert_close(mean, features.detach().float().mean((0, 2, 3)))
    torch.testing.assert_close(std, features.detach().float().std((0, 2, 3), correction=0))
    with pytest.raises(ValueError, match=r"IdentityBottleneck needs features \[B, 1, h, w\]"):
        bottleneck(torch.zeros(3, 5))


def test_it_is_a_continuous_latent():
    assert bottleneck_class(CONFIG.autoencoder) is IdentityBottleneck and prior_family(CONFIG).name == "dit"
    assert [name for name, kind in BOTTLENECKS.items() if kind.keeps_features] == ["identity"]
    assert IdentityBottleneck.rate(CONFIG.autoencoder) == 5
    IdentityBottleneck.check_rates([4, 8.0])
    with pytest.raises(ValueError, match="whole numbers of channels"):
        IdentityBottleneck.check_rates([0.5])

"""Diffusion Transformer: the velocity of a flow between a continuous latent and Gaussian noise (Peebles & Xie 2023).

Written from the paper's formulae: adaLN-zero blocks over tokens that are the positions of the latent (patch size 1). As in
`dae.models.ar_prior`, learned positions and rotary ones (here of a grid), QK-norm and SwiGLU. `dae.losses.flow_matching_loss`
trains it, `dae.sampling.sample_latents` and `log_likelihood` use it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from dae_kernels import attention, gated_residual, layer_norm_modulate, qk_norm, rotary_table_2d, rotate, swiglu
from dae_kernels.tracing import values_readable
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dae.config import PriorConfig
from dae.models.continuous import ContinuousPrior
from dae.models.layers import NORM_EPS, ClassConditional, Dropout
from dae.precision import WideBuffers


class TimeEmbedding(WideBuffers, nn.Module):
    """[B] times in [0, 1] to [B, width]: cosines and sines of w_i t, then a two-layer MLP.

    w_i falls geometrically from 100 to 0.1. The frequencies of discrete diffusion, up to 1000, are noise to a small model:
    it sees each time once, and the ODE's solver asks for the times between.
    """

    frequencies: Tensor

    def __init__(self, width: int, frequencies: int = 64):
        super().__init__()
        self.hidden, self.out = nn.Linear(2 * frequencies, width), nn.Linear(width, width)
        w = 100 * 1000 ** (-torch.arange(frequencies, dtype=torch.float64) / (frequencies - 1))
        self.register_buffer("frequencies", w.float(), persistent=False)

    def forward(self, t_B: Tensor) -> Tensor:
        angles = t_B[:, None] * self.frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.hidden.weight.dtype)
        return self.out(F.silu(self.hidden(waves)))


class DiTBlock(nn.Module):
    """x + gate * attention(adaLN(x)), then x + gate * swiglu(adaLN(x)); scales, shifts and gates are linear in the condition."""

    operation, impl = "attention", "auto"

    def __init__(self, config: PriorConfig):
        super().__init__()
        width, self.heads = config.width, config.num_heads
        hidden = -(-width * 8 // 3 // 16) * 16  # as many parameters as a 4 x MLP, rounded up to a multiple of 16
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = (nn.RMSNorm(width // config.num_heads, eps=NORM_EPS) for _ in range(2))
        self.proj = nn.Linear(width, width)
        self.gate_up = nn.Linear(width, 2 * hidden)
        self.down = nn.Linear(hidden, width)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BLC: Tensor, condition_BC: Tensor, table: Tensor) -> Tensor:
        B, L, width = x_BLC.shape
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(condition_BC).chunk(6, dim=1)
        qkv = self.qkv(layer_norm_modulate(x_BLC, scale, shift)).view(B, L, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = qk_norm(q, k, self.norm_q.weight, self.norm_k.weight, NORM_EPS)
        h = attention(rotate(q, table), rotate(k, table), v, impl=self.impl)
        x = gated_residual(x_BLC, self.dropout(self.proj(h.transpose(1, 2).flatten(2))), gate)
        h = self.down(swiglu(self.gate_up(layer_norm_modulate(x, mlp_scale, mlp_shift))))
        return gated_residual(x, self.dropout(h), mlp_gate)


class DiT(WideBuffers, ClassConditional, ContinuousPrior):
    """v(x, t, class): the velocity dx/dt that carries latents (t = 0) to standard normal noise (t = 1).

        v(x, t, c) = (2t - 1) / (t^2 + (1 - t)^2) x + network(x, t, c)

    It works on (latent - mean) / std of each channel (`set_latent_statistics`, `normalise`): the scale of a latent is the
    autoencoder's choice and says nothing of how hard it is to model. The first term is the velocity of a standard normal
    latent under x_t = (1 - t) x + t noise. So the network, which starts at zero, learns how the latent differs from a Gaussian,
    and need not pass the length of a token through layer norms that remove it.

    Args:
        config: width, depth, num_heads, dropout, class_dropout.
        latent_channels, latent_size, num_classes, tokenizer: as of `ContinuousPrior`.

    Raises:
        ValueError: a size below 1, or a head dimension that is no multiple of 4.

    Source: Peebles & Xie 2023, arXiv 2212.09748, section 3.2 (adaLN-zero); the first term: c_skip of Karras et al. 2022,
    arXiv 2206.00364, for this path.
    """

    latent_mean: Tensor
    latent_std: Tensor
    rotary: Tensor

    def __init__(self, config: PriorConfig, *, latent_channels: int, latent_size: int, num_classes: int, tokenizer: str = ""):
        shape = {"latent_channels": latent_channels, "latent_size": latent_size}
        super().__init__(config, **shape, num_classes=num_classes, tokenizer=tokenizer)
        width = config.width
        if width % config.num_heads or (width // config.num_heads) % 4:
            raise ValueError(
                f"prior.width={width} over prior.num_heads={config.num_heads}: expected a head dimension that 4 divides"
            )
        self.register_buffer("latent_mean", torch.zeros(latent_channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(latent_channels, 1, 1))
        self.register_buffer("rotary", rotary_table_2d(latent_size, latent_size, width // config.num_heads), persistent=False)
        self.time_embedding = TimeEmbedding(width)
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.position_embedding = nn.Embedding(latent_size**2, width)
        self.stem = nn.Linear(latent_channels, width)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList([DiTBlock(config) for _ in range(config.depth)])
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, latent_channels)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
                if name.endswith(("modulation", "head")):  # every block starts as the identity, and the network at zero
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.Embedding):
                # as large as the time embedding: with 0.02, small models take hundreds of steps to notice the class
                nn.init.normal_(module.weight, std=0.5 if name == "class_embedding" else 0.02)

    def set_latent_statistics(self, mean_D: Tensor, std_D: Tensor) -> None:
        """Set mean and standard deviation of each channel of the latents, in the autoencoder's own scale.

        Raises:
            ValueError: not D finite numbers, or a standard deviation that is not positive.
        """
        for name, x in (("mean", mean_D), ("std", std_D)):
            if x.shape != (self.latent_channels,):
                raise ValueError(f"{name}: expected one number for each of {self.latent_channels} channels, got {list(x.shape)}")
            if values_readable(x) and not torch.isfinite(x).all():
                raise ValueError(f"{name}: expected finite numbers, got {x.tolist()}; has the autoencoder diverged?")
        if values_readable(std_D) and not (std_D > 0).all():
            constant = (std_D <= 0).nonzero().flatten().tolist()
            raise ValueError(
                f"std: channels {constant} do not vary, which no density describes; train the autoencoder with fewer "
                "latent_channels, or with another kl_weight"
            )
        self.latent_mean.copy_(mean_D[:, None, None])
        self.latent_std.copy_(std_D[:, None, None])

    def normalise(self, latents_BDhw: Tensor) -> Tensor:
        """(latents - mean) / std: from the autoencoder's scale to the model's."""
        dtype = torch.promote_types(latents_BDhw.dtype, self.dtype)  # the statistics are float32 in any model
        return ((latents_BDhw - self.latent_mean) / self.latent_std).to(dtype)

    def denormalise(self, x_BDhw: Tensor) -> Tensor:
        """std * x + mean: from the model's scale to the autoencoder's."""
        return (x_BDhw * self.latent_std + self.latent_mean).to(torch.promote_types(x_BDhw.dtype, self.dtype))

    def forward(self, x_BDhw: Tensor, t_B: Tensor, labels_B: Tensor) -> Tensor:
        """The velocity [B, D, h, w].

        Args:
            x_BDhw: a point of the flow, in the model's scale and dtype.
            t_B: its time in [0, 1]: 0 latent, 1 noise; best in float32 also for a model of 16 bits.
            labels_B: int64 classes, `null_class` for none.

        Raises:
            TypeError, ValueError: x is no floating point [B, D, h, h].
        """
        self.check_latents(x_BDhw)
        condition = F.silu(self.time_embedding(t_B) + self.class_embedding(labels_B))
        x = self.dropout(self.stem(x_BDhw.flatten(2).mT) + self.position_embedding.weight)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, condition, self.rotary, use_reentrant=False)
            else:
                x = block(x, condition, self.rotary)
        shift, scale = self.modulation(condition).chunk(2, dim=1)
        network = self.head(layer_norm_modulate(x, scale, shift)).mT.view_as(x_BDhw)
        t = t_B[:, None, None, None]
        return ((2 * t - 1) / (t.square() + (1 - t).square()) * x_BDhw + network).to(x_BDhw.dtype)

"""Vision Transformer as encoder and decoder (Yu et al. 2022, "Vector-quantized Image Modeling with Improved VQGAN", section 3.1).

Patches are tokens, and nothing else is: no class token, no registers. Positions are rotary ones of a grid (Heo et al. 2024),
so that other sizes than trained need no other weights; blocks as in `dae.models.layers.TransformerBlock`.
"""

from __future__ import annotations

from dae_kernels import rotary_table_2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dae.config import AutoencoderConfig
from dae.models.architecture import Architecture
from dae.models.layers import NORM_EPS, TransformerBlock
from dae.precision import WideBuffers


class TokenNetwork(WideBuffers, nn.Module):
    """conv_in, Transformer blocks over the positions of its output, norm_out, conv_out: feature maps on both sides.

    Args:
        conv_in, conv_out: to and from [B, width, h, w].
        size: h and w that positions are prepared for; other sizes compute theirs.
        heads, head_dim: their product is the width.
        depth: number of blocks.
        dropout: probability of zeroing an entry of a residual branch.
    """

    gradient_checkpointing = False
    rotary: Tensor

    def __init__(
        self, conv_in: nn.Module, conv_out: nn.Module, size: int, heads: int, head_dim: int, depth: int, dropout: float = 0.0
    ):
        super().__init__()
        self.size, self.head_dim, width = size, head_dim, heads * head_dim
        self.conv_in = conv_in
        self.blocks = nn.ModuleList([TransformerBlock(width, heads, dropout) for _ in range(depth)])
        self.norm_out = nn.RMSNorm(width, eps=NORM_EPS)
        self.conv_out = conv_out
        self.register_buffer("rotary", rotary_table_2d(size, size, head_dim), persistent=False)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):  # residual branches start small, as in GPT-2
                nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def positions(self, height: int, width: int) -> Tensor:
        """The rotary table [2, height * width, head_dim / 2] of a grid."""
        if (height, width) == (self.size, self.size):
            return self.rotary
        return rotary_table_2d(height, width, self.head_dim).to(self.rotary)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv_in(x)
        height, width = maps.shape[2:]
        h, table = maps.flatten(2).transpose(1, 2), self.positions(height, width)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                h = checkpoint(block, h, table, use_reentrant=False)
            else:
                h = block(h, table)
        h = self.norm_out(h)
        return self.conv_out(h.transpose(1, 2).unflatten(2, (height, width)))


class ViTEncoder(TokenNetwork):
    """Images [B, C, H, W] to features [B, out_channels, H/p, W/p]: a linear map of each patch of p x p pixels, then blocks."""

    def __init__(self, config: AutoencoderConfig, image_channels: int, resolution: int, out_channels: int):
        vit, head_dim = config.vit, checked_head_dim(config)
        patches = nn.Conv2d(image_channels, vit.width, vit.patch_size, stride=vit.patch_size)
        size = resolution // vit.patch_size
        super().__init__(patches, nn.Conv2d(vit.width, out_channels, 1), size, vit.num_heads, head_dim, vit.depth)


class ViTDecoder(TokenNetwork):
    """Latents [B, D, h, w] to images: blocks, then a linear map of each token to its patch of pixels.

    Args:
        width_factor: scales the number of heads (at least one is left) and with it the width.
        num_blocks: Transformer blocks.
        dropout: probability of zeroing an entry of a residual branch.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        image_channels: int,
        resolution: int,
        width_factor: float,
        num_blocks: int,
        dropout: float,
    ):
        vit, head_dim = config.vit, checked_head_dim(config)
        heads = max(1, round(vit.num_heads * width_factor))
        width, size = heads * head_dim, resolution // vit.patch_size
        pixels = nn.ConvTranspose2d(width, image_channels, vit.patch_size, stride=vit.patch_size)
        super().__init__(nn.Conv2d(config.latent_channels, width, 1), pixels, size, heads, head_dim, num_blocks, dropout)


class ViT(Architecture):
    encoder = ViTEncoder
    decoder = ViTDecoder

    @staticmethod
    def factor(config: AutoencoderConfig) -> int:
        return config.vit.patch_size

    @staticmethod
    def says_factor(config: AutoencoderConfig) -> str:
        return f"autoencoder.vit.patch_size={config.vit.patch_size}"

    @staticmethod
    def check(config: AutoencoderConfig, resolution: int) -> None:
        checked_head_dim(config)

    @staticmethod
    def decoder_blocks(config: AutoencoderConfig) -> int:
        return config.vit.depth


def checked_head_dim(config: AutoencoderConfig) -> int:
    """Width over heads. ValueError unless it is whole and 4 divides it: two coordinates, and pairs that turn."""
    vit = config.vit
    if vit.width % vit.num_heads or (vit.width // vit.num_heads) % 4:
        raise ValueError(
            f"autoencoder.vit.width={vit.width} over autoencoder.vit.num_heads={vit.num_heads}: expected a head dimension that 4 "
            f"divides, as {max(4, round(vit.width / vit.num_heads / 4) * 4) * vit.num_heads} over {vit.num_heads}"
        )
    return vit.width // vit.num_heads

"""Vector quantization (van den Oord et al. 2017, "Neural Discrete Representation Learning", appendix A.1: EMA codebook)."""

from __future__ import annotations

import dataclasses
from itertools import chain
from typing import Self

import torch
import torch.nn.functional as F
from dae_kernels.codebook_statistics import codebook_statistics
from dae_kernels.nearest_code import nearest_code
from dae_kernels.vector_quantize import vector_quantize
from torch import Tensor

from dae.config import AutoencoderConfig, VQConfig
from dae.distributed import from_first_process, gather_numbers, in_global_order, rank, sum_over_processes
from dae.precision import WideBuffers, wide
from dae.quantizers.bottleneck import Encoding, check_feature_map
from dae.quantizers.tokens import TokenBottleneck


class VectorQuantizer(WideBuffers, TokenBottleneck):
    """Nearest code in l2, straight-through gradient, commitment loss, and a codebook that follows the latents.

    latents = code[argmin_k |z - code_k|^2], loss = commitment_weight * mean |z - sg(latents)|^2.

    With `metric=cosine` latents and codes have length 1 (Yu et al. 2022, arXiv 2110.04627, section 3.2); with `gradient=rotation`
    the encoder's gradient is rotated (Fifty et al. 2024, arXiv 2410.06424), see `dae_kernels.vector_quantize`.

    The forward pass changes nothing. Training calls `observe` after each micro-batch and `update_codebook` after each
    optimiser step: counts and sums of the *global* batch move averages with `ema_decay`, code_k = sums_k / counts_k, and
    a code that is hardly used moves onto a random latent of the batch.

    Processes may hold different numbers of latents, also none, and be seeded differently: process 0 decides what is drawn, and
    all end with its codebook to the bit. The codebook and its averages are float32, whatever the module is cast to.
    """

    learns_codebook = draws_codes = revives = True
    rate_knob = "autoencoder.vq.codebook_size"
    rate_plural, rate_setting = "codebook sizes", "a codebook of {:,.0f} codes"
    operation, impl = "vector_quantize", "auto"  # for dae.models.kernels
    statistics = ("average_counts", "average_sums")
    buffer_dtypes = (torch.float32,)
    codebook: Tensor  # [K, D]
    average_counts: Tensor  # [K]
    average_sums: Tensor  # [K, D]

    def __init__(self, config: VQConfig, channels: int):
        super().__init__()
        if config.codebook_size < 1:
            raise ValueError(f"autoencoder.vq.codebook_size must be positive, got {config.codebook_size}")
        self.config, self.channels = config, channels
        K = config.codebook_size
        self.register_buffer("codebook", self.placed(torch.randn(K, channels, dtype=torch.float32)))
        self.register_buffer("average_counts", torch.ones(K, dtype=torch.float32))
        self.register_buffer("average_sums", self.codebook.clone())
        self._counts: Tensor | None = None  # of the micro-batches since the last update
        self._sums: Tensor | None = None
        self._latest: Tensor | None = None  # [B, T, D] latents of the last micro-batch that had any: where dead codes go

    @classmethod
    def build(cls, config: AutoencoderConfig) -> Self:
        return cls(config.vq, config.latent_channels)

    def forward(self, features: Tensor, sample_posterior: bool = False) -> Encoding:
        """Features [B, D, h, w] to latents of the same shape and dtype and indices [B, h, w]; a code is never sampled."""
        check_feature_map("VectorQuantizer", features, self.channels)
        config, z_BhwD = self.config, features.to(wide(features.dtype)).movedim(1, -1)
        out = vector_quantize(
            z_BhwD,
            self.codes(),
            gradient=config.gradient,
            commitment_weight=config.commitment_weight,
            metric=config.metric,
            impl=self.impl,
        )
        return Encoding(out.quantized.movedim(-1, 1).to(features.dtype), out.loss, features, out.indices)

    def codes(self) -> Tensor:
        """[K, D] float32."""
        return self.codebook

    def placed(self, x: Tensor) -> Tensor:
        """Points [..., D] where latents and codes lie: anywhere, or with the cosine metric on the sphere."""
        return F.normalize(x, dim=-1) if self.config.metric == "cosine" else x

    def resample(self, encoding: Encoding, temperature: float) -> Encoding:
        if temperature == 0:
            return encoding
        return dataclasses.replace(encoding, indices=self.sample_indices(encoding.features, temperature))

    @staticmethod
    def rate(config: AutoencoderConfig) -> float:
        return float(config.vq.codebook_size)

    @staticmethod
    def check_rates(rates: list[float]) -> None:
        if any(not r >= 2 or r != int(r) for r in rates):
            raise ValueError(f"compare.rates: expected codebook sizes (whole numbers from 2) for the vq bottleneck, got {rates}")

    @classmethod
    def num_codes(cls, config: AutoencoderConfig) -> int:
        return config.vq.codebook_size

    def lookup(self, indices_Bhw: Tensor) -> Tensor:
        """Codes [B, D, h, w] of indices [B, h, w], in float32."""
        return F.embedding(indices_Bhw, self.codes()).movedim(-1, 1)

    @torch.no_grad()
    def sample_indices(self, features: Tensor, temperature: float) -> Tensor:
        """Draw a code for each feature instead of taking the nearest (Lee et al. 2022, "RQ-VAE Transformer", section 3.2.2).

        p(k) = softmax_k(-|z - code_k|^2 / (temperature * m)), with m the mean over the batch of the squared distance to the
        nearest code: at 0.5, a code whose squared distance is larger by m is chosen e^2 times less often. Other encodings of
        the same image: a prior trained on them learns which codes are alike and copies less. Where all features are codes,
        m = 0, each gets a nearest code.

        Args:
            features: [B, D, h, w], the encoder's output.
            temperature: positive.

        Returns:
            Indices [B, h, w]; draws from the global generator.

        Raises:
            ValueError: the temperature is not positive, or features or codebook hold NaN or infinity.
        """
        if not temperature > 0:
            raise ValueError(f"the temperature must be positive, got {temperature}; the nearest code is `forward`'s")
        check_feature_map("VectorQuantizer", features, self.channels)
        z_BhwD, codebook_KD = self.placed(features.movedim(1, -1).double()), self.codes().double()
        nearest_Bhw, _ = nearest_code(self.placed(features.float().movedim(1, -1)), self.codes(), impl=self.impl)
        minimum_N = (z_BhwD - codebook_KD[nearest_Bhw]).square().sum(-1).flatten()
        if not (minimum_N.isfinite().all() and codebook_KD.isfinite().all()):
            raise ValueError("sample_indices needs finite features and codes, got NaN or infinity; look for a diverged encoder")
        scale = (temperature * minimum_N.mean()).clamp(min=torch.finfo(torch.float64).tiny)
        rows = max(1, 2**23 // len(codebook_KD))  # 64 MiB of distances at once
        drawn = []
        for z_ND, minimum_n in zip(z_BhwD.flatten(0, -2).split(rows), minimum_N.split(rows), strict=True):
            # Differences in float64: products would cancel far from the origin.
            square_NK = torch.cdist(z_ND, codebook_KD, compute_mode="donot_use_mm_for_euclid_dist").square_()
            drawn.append(torch.multinomial(((minimum_n[:, None] - square_NK) / scale).softmax(-1), 1))
        return torch.cat(drawn).view(nearest_Bhw.shape)

    @torch.no_grad()
    def initialize_codebook(self, features_NDhw: Tensor, generator: torch.Generator) -> None:
        """k-means on encoder outputs: on those of all processes, each of which passes its own (also none).

        Args:
            features_NDhw: outputs of the encoder.
            generator: on the CPU; all processes go on from the state of process 0's.

        Raises:
            ValueError: there are no features in any process.
        """
        self._refuse_if_frozen()
        x_ND = self.placed(in_global_order(features_NDhw).movedim(1, -1).flatten(0, -2).float())
        if len(x_ND) == 0:
            raise ValueError("k-means needs at least one latent, got none; encode images first")
        generator.set_state(from_first_process(generator.get_state()))
        K = len(self.average_counts)

        def random_latents(count: int) -> Tensor:
            few = len(x_ND) < K  # codes share latents then, and noise separates them
            rows = (
                torch.randint(len(x_ND), (count,), generator=generator) if few else torch.randperm(len(x_ND), generator=generator)
            )
            chosen = x_ND[rows[:count].to(x_ND.device)]
            noise = torch.randn(chosen.shape, generator=generator).to(chosen) * x_ND.std(0, correction=0)
            return self.placed(chosen + 1e-2 * noise) if few else chosen

        codebook = random_latents(K)
        counts = torch.ones(K, device=x_ND.device)
        for _ in range(self.config.kmeans_iterations):
            indices, _ = nearest_code(x_ND, codebook, impl=self.impl)
            counts, sums = codebook_statistics(x_ND.double(), indices, K)
            empty = counts == 0
            codebook = self.placed((sums / counts.clamp(min=1)[:, None]).float())
            codebook[empty] = random_latents(int(empty.sum()))
        self._set_codes(torch.ones(K, dtype=torch.bool, device=x_ND.device), codebook)
        self._take_first_process_codebook()

    @torch.no_grad()
    def observe(self, encoding: Encoding) -> None:
        """Count what a micro-batch used."""
        self._refuse_if_frozen()
        if encoding.indices is None:
            raise ValueError("observe needs encodings with indices")
        x_BTD = self.placed(encoding.features.detach().movedim(1, -1).flatten(1, 2))
        # Sums in float64: over micro-batches and processes they add up to the global sum with a single rounding.
        counts, sums = codebook_statistics(x_BTD.double(), encoding.indices.flatten(1), len(self.average_counts))
        if self._counts is None or self._sums is None:
            self._counts, self._sums = counts, sums
        else:  # in place: a CUDA graph of this step may be replayed several times, and then adds to what its first replay left
            self._counts += counts
            self._sums += sums
        if x_BTD.numel():
            self._latest = x_BTD

    @torch.no_grad()
    def update_codebook(self) -> None:
        """Update the codebook with all latents observed since the last call, identically on all processes.

        Raises:
            RuntimeError: no process has observed anything, on all of them.
        """
        self._refuse_if_frozen()
        images, positions = (0, 0) if self._latest is None else self._latest.shape[:2]
        held = gather_numbers(int(self._counts is not None), images, positions)
        if not any(observed for observed, _, _ in held):
            raise RuntimeError("update_codebook without observe: there is nothing to update from")
        (K, D), device = self.codes().shape, self.average_counts.device
        if self._counts is None or self._sums is None:
            self._counts = torch.zeros(K, dtype=torch.int64, device=device)
            self._sums = torch.zeros(K, D, dtype=torch.float64, device=device)
        counts, sums = sum_over_processes(self._counts), sum_over_processes(self._sums)
        if any(images for _, images, _ in held):
            self.average_counts.mul_(self.config.ema_decay).add_(counts.float(), alpha=1 - self.config.ema_decay)
            self._follow(sums.float())
            if self.revives and self.config.revive_threshold > 0:
                dead = self.average_counts < self.config.revive_threshold * self.average_counts.mean()
                self._set_codes(dead, self._random_latents_of_the_global_batch(held))
        self._take_first_process_codebook()
        self._counts = self._sums = self._latest = None

    def _follow(self, sums_KD: Tensor) -> None:
        """Move the codes by the sums of the global batch; the average counts have moved."""
        self.average_sums.mul_(self.config.ema_decay).add_(sums_KD, alpha=1 - self.config.ema_decay)
        self.codebook.copy_(self.placed(self.average_sums / self.average_counts.clamp(min=1e-6)[:, None]))

    def _random_latents_of_the_global_batch(self, held: list[tuple[int, ...]]) -> Tensor:
        """[K, D], drawn by process 0 from [images, positions], the last two numbers `held` by each process.

        The latents are numbered as one process would have them. Each process fills in those that it holds, and a sum brings them
        together.
        """
        device, K = self.average_counts.device, len(self.average_counts)
        if len(held) == 1 and self._latest is not None:  # one process: no table of images, whose copy the host would wait for
            latents_ND = self._latest.flatten(0, 1)
            number_K = (torch.rand(K, device=device, dtype=torch.float64) * len(latents_ND)).long()
            return latents_ND[number_K].float()
        images_W, positions_W = torch.tensor(held)[:, 1:].unbind(1)
        image_process = (torch.arange(int(images_W.max()))[:, None] < images_W).nonzero()  # row in its process, process
        ends = positions_W[image_process[:, 1]].cumsum(0)
        count = int(ends[-1])
        image_process, ends, positions_W = (x.to(device) for x in (image_process, ends, positions_W))
        number_K = (from_first_process(torch.rand(K, device=device, dtype=torch.float64)) * count).long()
        image_K = torch.searchsorted(ends, number_K, right=True)
        row_K, process_K = image_process[image_K].unbind(1)
        position_K = number_K - ends[image_K] + positions_W[process_K]
        found_KD = torch.zeros(K, self.channels, device=device)
        if self._latest is not None:
            mine_K = process_K == rank()
            latents_KD = self._latest[row_K * mine_K, position_K * mine_K].to(found_KD)
            found_KD = torch.where(mine_K[:, None], latents_KD, found_KD)
        return sum_over_processes(found_KD)

    def _take_first_process_codebook(self) -> None:
        """Copy process 0's codebook: others may have started with another one, or round differently."""
        for tensor in chain(self.buffers(), self.parameters()):
            from_first_process(tensor.detach())

    def _set_codes(self, which_K: Tensor, codes_KD: Tensor) -> None:
        """Set the chosen codes, each with an average count, so that it has time to be used."""
        which = which_K[:, None]
        mean_count = self.average_counts.mean()
        self.average_counts.copy_(torch.where(which_K, mean_count, self.average_counts))
        self.average_sums.copy_(torch.where(which, codes_KD * mean_count, self.average_sums))
        self.codebook.copy_(torch.where(which, codes_KD, self.codebook))

    def _refuse_if_frozen(self) -> None:
        if self.frozen:
            raise RuntimeError("the latent is frozen: its codebook takes no updates")

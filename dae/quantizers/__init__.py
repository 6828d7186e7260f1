from dae.quantizers.encoding import Encoding
from dae.quantizers.kl import GaussianBottleneck
from dae.quantizers.vq import VectorQuantizer

__all__ = ["Encoding", "GaussianBottleneck", "VectorQuantizer"]

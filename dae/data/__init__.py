"""Images for training: Hugging Face data sets, decoding, loaders that resume exactly, augmentation per batch."""

from dae.data.augmentation import augment
from dae.data.images import decode_image, to_square, to_tensor
from dae.data.load import ImageData, load_data
from dae.data.loader import TrainLoader, evaluation_batches, in_memory
from dae.data.summary import Summary, summarize_data

__all__ = [
    "ImageData",
    "Summary",
    "TrainLoader",
    "augment",
    "decode_image",
    "evaluation_batches",
    "in_memory",
    "load_data",
    "summarize_data",
    "to_square",
    "to_tensor",
]

"""The two data sets that need no download: their images ship with installed packages."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dae.data.images import decode_image
from dae.data.survey import stratified_split

if TYPE_CHECKING:
    from datasets import Dataset

NAMES = ("digits", "photos")

# Each photograph is in one split only; one picture of the stereo pair `motorcycle_*` is used.
PHOTOS = {
    "train": (
        "sklearn/datasets/images/china.jpg", "skimage/data/astronaut.png", "skimage/data/brick.png", "skimage/data/camera.png",
        "skimage/data/coffee.png", "skimage/data/coins.png", "skimage/data/grass.png", "skimage/data/hubble_deep_field.jpg",
        "skimage/data/ihc.png", "skimage/data/moon.png", "skimage/data/motorcycle_left.png", "skimage/data/retina.jpg",
        "skimage/data/rocket.jpg",
    ),
    "test": (
        "sklearn/datasets/images/flower.jpg", "skimage/data/chelsea.png", "skimage/data/clock_motion.png",
        "skimage/data/gravel.png",
    ),
}  # fmt: skip
MAX_CROPS = {"train": 4096, "test": 512}


@functools.cache  # takes half a second
def load_digits() -> dict[str, Dataset]:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey, 10 classes: 1,437 for training, 360 held out.

    Grey levels 0..16 become 0..255. The split is stratified and always the same.
    """
    from datasets import ClassLabel
    from sklearn.datasets import load_digits

    digits = load_digits()
    levels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    names = [str(i) for i in range(10)]
    train, test = stratified_split(len(levels), 360, digits.target)
    return {
        split: _dataset([Image.fromarray(levels[i]) for i in rows], "label", digits.target[rows], ClassLabel(names=names))
        for split, rows in (("train", train), ("test", test))
    }


def load_photos(resolution: int) -> dict[str, Dataset]:
    """Crops of the photographs inside the scikit-learn and scikit-image wheels, split by photograph.

    Crops are 2 x `resolution` wide and halved. They are cut side by side; if that gives fewer than `MAX_CROPS`, at a stride
    of half a crop, so that neighbours overlap. If there are more, every n-th is kept.
    The column `photograph` numbers the source; there is no label column.

    ImportError: a package is missing.
    """
    from datasets import Value

    names = [path for paths in PHOTOS.values() for path in paths]
    splits = {}
    for split, paths in PHOTOS.items():
        photos = [decode_image(_inside_package(path), 3) for path in paths]
        for overlap in (1, 2):
            places = [(i, box) for i, photo in enumerate(photos) for box in _boxes(photo, resolution, overlap)]
            if len(places) >= MAX_CROPS[split]:
                break
        kept = np.unique(np.linspace(0, len(places) - 1, min(len(places), MAX_CROPS[split])).round().astype(int))
        images = [_shrunk(photos[i].crop(box), resolution) for i, box in (places[k] for k in kept)]
        labels = [names.index(paths[places[k][0]]) for k in kept]
        splits[split] = _dataset(images, "photograph", labels, Value("int32"))  # `auto` would take a ClassLabel
    return splits


def _boxes(photo: Image.Image, resolution: int, overlap: int) -> list[tuple[int, int, int, int]]:
    side = min(2 * resolution, *photo.size)
    lefts, tops = (range(0, length - side + 1, max(side // overlap, 1)) for length in photo.size)
    return [(x, y, x + side, y + side) for y in tops for x in lefts]


def _shrunk(crop: Image.Image, resolution: int) -> Image.Image:
    side = min(crop.width, resolution)
    return crop.resize((side, side), Image.Resampling.BOX)


def _inside_package(path: str) -> str:
    package, _, inside = path.partition("/")
    spec = importlib.util.find_spec(package)  # finds the folder without importing the package
    file = Path(spec.submodule_search_locations[0]) / inside if spec and spec.submodule_search_locations else None
    if file is None or not file.is_file():
        raise ImportError(
            f"the data set 'photos' needs {path!r} from the wheel of {package}, which is not there: "
            'pip install "decoupled-autoencoder[photos]"'
        )
    return str(file)


def _dataset(images: list[Image.Image], label_column: str, labels: list | np.ndarray, label: object) -> Dataset:
    """A data set of the images as encoded PNG."""
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(decode=False), label_column: label})
    return Dataset.from_dict({"image": images, label_column: [int(i) for i in labels]}, features=features)

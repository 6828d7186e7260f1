"""Pictures in the tracker: reconstructions and samples at each validation, which change nothing of what is trained."""

import io

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

SHOWN = ("report_to=tensorboard", "logged_images=5")


@pytest.fixture(scope="module", params=["vq", "kl"])
def shown(request, made_once):
    recipes = ("train_dae", "encode", "train_prior")
    return request.param, made_once(f"shown_{request.param}", recipes, *SHOWN, f"autoencoder.bottleneck={request.param}")


def pictures(folder, tag):
    """By step, the pictures of one name in the event files below a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), size_guidance={"images": 0}).Reload()
        if tag in events.Tags()["images"]:
            found |= {e.step: np.asarray(Image.open(io.BytesIO(e.encoded_image_string))) for e in events.Images(tag)}
    return found


def test_reconstructions_and_samples(shown, history):
    _, folder = shown
    for part, tag, rows in (("autoencoder", "reconstructions", 2), ("prior", "samples", 1)):
        found = pictures(folder / part / "logs", tag)
        assert sorted(found) == [row["step"] for row in history(folder / part) if row["split"] == "validation"]
        assert all(picture.shape[:2] == (rows * 9 + 1, 5 * 9 + 1) for picture in found.values())
        first, *_, last = (found[step] for step in sorted(found))
        assert not np.array_equal(first, last)
        if tag == "reconstructions":
            assert np.array_equal(first[:9], last[:9])  # the originals


def test_training_does_not_depend_on_them(shown, run, tmp_path):
    bottleneck, folder = shown
    for recipe in ("train_dae", "encode", "train_prior"):
        run(recipe, tmp_path, f"autoencoder.bottleneck={bottleneck}", "logged_images=0")
    for part in ("autoencoder", "prior"):
        a, b = (load_file(each / part / "model.safetensors") for each in (folder, tmp_path))
        assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)

"""The token cache: it comes back as it was, and only for what it was made of."""

import dataclasses
import json

import pytest
import torch

import dae.data.cache
from dae.config import Config
from dae.data import TrainLoader
from dae.data.cache import Fingerprint, TokenCache, TokenDataset, transform_fingerprint
from dae.priors.family import choose_augmentations

FINGERPRINT = Fingerprint("tokenizer-1", "data-1", "plain")


def make(augmentations=3, fingerprint=FINGERPRINT) -> TokenCache:
    def part(rows, seed):
        generator = torch.Generator().manual_seed(seed)
        return TokenDataset(torch.randint(50, (rows, augmentations, 4), generator=generator), torch.arange(rows) % 3)

    return TokenCache(part(7, 0), part(2, 1), vocab_size=50, num_classes=3, latent_size=2, fingerprint=fingerprint)


def test_round_trip(tmp_path):
    cache = make()
    cache.save(tmp_path / "tokens")
    loaded = TokenCache.load(tmp_path / "tokens", FINGERPRINT)
    assert (loaded.vocab_size, loaded.num_classes, loaded.latent_size, loaded.fingerprint) == (50, 3, 2, FINGERPRINT)
    for name in ("train", "validation"):
        before, after = getattr(cache, name), getattr(loaded, name)
        assert len(after) == len(before)
        for row in range(len(before)):
            assert torch.equal(after[row]["tokens"], before[row]["tokens"]) and after[row]["tokens"].dtype == torch.int64
            assert (after[row]["label"], after[row]["row"]) == (row % 3, row)


def test_rows_make_batches(tmp_path):
    make().save(tmp_path)
    batch = next(iter(TrainLoader(TokenCache.load(tmp_path, FINGERPRINT).train, 4, seed=0)))
    assert batch["tokens"].shape == (4, 3, 4) and torch.equal(batch["label"], batch["row"] % 3)


@pytest.mark.parametrize("field, name", [("tokenizer", "tokenizer"), ("data", "data set"), ("transform", "augmentation")])
def test_a_stale_cache(tmp_path, field, name):
    make().save(tmp_path)
    expected = dataclasses.replace(FINGERPRINT, **{field: "other"})
    with pytest.raises(ValueError, match=rf"is stale: it was made with another {name}\. Remake it with recipes/encode\.py"):
        TokenCache.load(tmp_path, expected)
    with pytest.raises(ValueError, match="another tokenizer and data set and augmentation"):
        TokenCache.load(tmp_path, Fingerprint("a", "b", "c"))


def test_no_cache(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no token cache in .*recipes/encode\.py"):
        TokenCache.load(tmp_path, FINGERPRINT)


@pytest.mark.parametrize("written", [0, 1], ids=["before the tokens", "before the description"])
def test_a_crash_while_saving(tmp_path, monkeypatch, written):
    """The old cache or none: never new tokens under the old description."""
    old, new, real, left = make(), make(fingerprint=Fingerprint("a", "b", "c")), dae.data.cache.write_file, [written]
    new.train.values_NC += 1
    old.save(tmp_path)

    def full(path, data):
        if left[0] == 0:
            raise OSError(28, "No space left on device")
        left[0] -= 1
        real(path, data)

    monkeypatch.setattr(dae.data.cache, "write_file", full)
    with pytest.raises(OSError, match="No space"):
        new.save(tmp_path)
    try:
        tokens = TokenCache.load(tmp_path, FINGERPRINT).train.values_NC
    except (FileNotFoundError, ValueError):
        return
    assert torch.equal(tokens, old.train.values_NC.int())


DAMAGE = {
    "missing": None,
    "empty": lambda data: b"",
    "truncated": lambda data: data[:20],
    "cut by a byte": lambda data: data[:-1],
    "flipped bit": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
}


@pytest.mark.parametrize("name", ["tokens.safetensors", "cache.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache(tmp_path, name, damage):
    make().save(tmp_path)
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    error = FileNotFoundError if (name, damage) == ("cache.json", "missing") else ValueError
    with pytest.raises(error, match=r"recipes/encode\.py"):
        TokenCache.load(tmp_path, FINGERPRINT)


def test_a_description_of_another_version(tmp_path):
    make().save(tmp_path)
    description = json.loads((tmp_path / "cache.json").read_text())
    description["fingerprint"]["new"] = "x"
    (tmp_path / "cache.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"remake it with recipes/encode\.py"):
        TokenCache.load(tmp_path, FINGERPRINT)


def configured(**changes):
    config = Config()
    for key, value in changes.items():
        section, name = key.split("__")
        setattr(getattr(config, section), name, value)
    return config


def test_the_transform_is_what_the_augmentations_depend_on():
    assert transform_fingerprint(configured()) == "plain"
    assert transform_fingerprint(configured(data__random_flip=True, prior__code_temperature=0.5)) == "plain"  # no augmentations
    base = {"prior__num_augmentations": 2, "data__random_flip": True}
    seen = {
        transform_fingerprint(configured(**base | more))
        for more in (
            {},
            {"prior__num_augmentations": 3},
            {"prior__code_temperature": 0.5},
            {"data__random_flip": False},
            {"data__random_affine": 0.5},
            {"prior__augment_images": False},
        )
    }
    assert len(seen) == 6 and "plain" not in seen
    assert transform_fingerprint(configured(**base, prior__augment_images=False)) == transform_fingerprint(
        configured(prior__num_augmentations=2, prior__augment_images=False, data__random_affine=1.0)
    )


@pytest.mark.parametrize(
    "changes, digest",
    [
        ({}, "plain"),
        (
            {"prior__num_augmentations": 2, "prior__code_temperature": 0.5, "data__random_flip": True},
            '{"copies": 2, "code_temperature": 0.5, "seed": 0, "batch_size": 500, "flip": true, "affine": 0.0}',
        ),
        (
            {"prior__num_augmentations": 2, "data__random_affine": 1.0, "autoencoder__bottleneck": "kl"},
            '{"copies": 2, "seed": 0, "batch_size": 500, "flip": false, "affine": 1.0}',
        ),
        (
            {"prior__num_augmentations": 1, "prior__augment_images": False},
            '{"copies": 1, "code_temperature": 0.0, "seed": 0, "batch_size": 500}',
        ),
    ],
)
def test_caches_of_earlier_versions_match(changes, digest):
    assert transform_fingerprint(configured(**changes)) == digest


def test_choose_augmentations():
    tokens = torch.arange(4 * 3 * 2).view(4, 3, 2)
    draw = torch.tensor([0.0, 0.34, 0.999999, 0.66])
    assert torch.equal(choose_augmentations(tokens, draw), torch.stack([tokens[0, 0], tokens[1, 1], tokens[2, 2], tokens[3, 1]]))
    assert torch.equal(choose_augmentations(tokens[:, :1], draw), tokens[:, 0])
    generator = torch.Generator().manual_seed(0)
    many = choose_augmentations(torch.arange(3).view(1, 3, 1).expand(6000, 3, 1), torch.rand(6000, generator=generator))
    assert (many.flatten().bincount(minlength=3) - 2000).abs().max() < 4 * (6000 * 2 / 9) ** 0.5

"""Models on disk and on the Hugging Face Hub: `config.json` and `model.safetensors`, no pickle.

The configuration is also in the metadata of the safetensors file, so that the weights alone describe the model.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from dae_kernels.checks import FLOAT_DTYPES
from torch import nn

import dae
from dae.config import nearest_sibling
from dae.precision import own_arithmetic

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WEIGHTS, CONFIG, CARD = MODEL_FILES = ("model.safetensors", "config.json", "README.md")
LATENT = "latent.json"  # of autoencoders, `dae.models.latent`


class PretrainedModel(nn.Module):
    """A module that saves and loads itself. Subclasses define `to_config()` (JSON-able) and `from_config(dict)`."""

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the parameters, or of the buffers if there are none."""
        return next(x.dtype for x in chain(self.parameters(), self.buffers()) if x.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Device of the parameters, or of the buffers if there are none."""
        return next(chain(self.parameters(), self.buffers())).device

    def to_config(self) -> dict:
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: dict) -> Self:
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path, *, state_dict: dict | None = None, card: str | None = None) -> None:
        """Write `config.json`, `model.safetensors` and, if given, the model card `README.md` into `folder`.

        Args:
            folder: created if missing. Each file is written atomically.
            state_dict: weights to write instead of the module's own (an EMA, say).
            card: text of the model card.

        OSError: the disk is full or the folder cannot be written; earlier files are unchanged.
        """
        from safetensors.torch import save

        from dae.files import write_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"_class_name": type(self).__name__, "_dae_version": dae.__version__} | self.to_config(), indent=2)
        weights = self.state_dict() if state_dict is None else state_dict
        weights = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
        write_file(folder / WEIGHTS, save(weights, metadata={"format": "pt", "config": text}))
        write_file(folder / CONFIG, text.encode())
        if card is not None:
            write_file(folder / CARD, card.encode())

    @classmethod
    @own_arithmetic(gradients=True)
    def from_pretrained(
        cls, name_or_path: str | Path, *, revision: str | None = None, device: Any = "cpu", torch_dtype: torch.dtype | None = None
    ) -> Self:
        """Load a folder written by `save_pretrained`, or a Hub repository, in eval mode.

        Args:
            name_or_path: a `Path` is always a local folder; a string that is no existing folder is a Hub repository.
            revision: branch, tag or commit of the repository.
            device: where to put the model.
            torch_dtype: for parameters; None is float32. Codebooks and tables stay float32.

        Raises:
            TypeError: `torch_dtype` is none of float16, bfloat16, float32 and float64.
            FileNotFoundError: no such folder or repository, or no model in it.
            ValueError: it holds another class, is damaged, or its weights do not fit the configuration.
        """
        if torch_dtype not in (None, *FLOAT_DTYPES):
            raise TypeError(f"torch_dtype: expected one of {', '.join(map(str, FLOAT_DTYPES))}, got {torch_dtype!r}")
        folder, config, weights = cls.read_pretrained(name_or_path, revision)
        try:
            model = cls.from_config(config)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / CONFIG} does not describe this version's {cls.__name__}: {error}") from error
        load_weights(model, weights, str(folder / WEIGHTS))
        model.remember(folder)
        return model.to(device, torch_dtype or torch.float32).eval()

    def remember(self, folder: Path) -> None:
        """Called with the folder that a model was loaded from, while it has the weights of the file in float32."""

    @classmethod
    def read_pretrained(
        cls, name_or_path: str | Path, revision: str | None = None
    ) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
        """The folder of a saved model, what `to_config` wrote, and the weights; arguments and errors of `from_pretrained`."""
        folder = Path(name_or_path)
        if not folder.is_dir():
            if not isinstance(name_or_path, str):
                raise FileNotFoundError(f"no folder {folder}: expected one written by {cls.__name__}.save_pretrained")
            folder = download(name_or_path, revision)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                inside = " or ".join(sorted(str(found.parent) for found in folder.glob(f"*/{CONFIG}")))
                expected = f"a folder written by {cls.__name__}.save_pretrained{inside and f', such as {inside}'}"
                raise FileNotFoundError(f"{folder} holds no {name}: expected {expected}")
        config = read_json(folder / CONFIG)
        if config.get("_class_name") != cls.__name__:
            raise ValueError(f"{folder} holds a {config.get('_class_name')!r}, expected a {cls.__name__!r}")
        return folder, {k: v for k, v in config.items() if not k.startswith("_")}, read_tensors(folder / WEIGHTS)

    def push_to_hub(self, repo_id: str, *, folder: str | Path, private: bool = False, token: str | None = None) -> str:
        """Upload a folder that `save_pretrained` wrote to the Hub repository `repo_id`; returns the commit's URL.

        A discriminator and the identity of a latent saved beside the model go with it.

        OSError: the upload failed; one line says why, that the model is saved in `folder`, and how to upload it later.
        """
        api, patterns = hub_api(token), [*MODEL_FILES, LATENT, *(f"discriminator/{name}" for name in (CONFIG, WEIGHTS))]
        remedy = (
            f"the model is saved in {folder}; upload it with `hf upload {repo_id} {folder} --include {' '.join(MODEL_FILES)}`"
        )
        with hub_errors(f"the upload to {repo_id} failed", remedy):
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=patterns)
        return str(commit)


def hub_api(token: str | None = None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="decoupled-autoencoder", library_version=dae.__version__)


@contextmanager
def hub_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn any error of the Hub client into a one-line OSError: `what`, the client's message, and the `remedy`.

    Its errors have no common base: network errors come from httpx, or requests in earlier versions.
    """
    try:
        yield
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{what} ({words}): {remedy}") from error


def prepare_repository(repo_id: str, *later: str) -> None:
    """Before training: create the repository `repo_id` if missing, and check that it can be written.

    Args:
        repo_id: target of the upload after this training.
        later: target repositories of later trainings; only read.

    Raises:
        ValueError: not a repository name.
        OSError: offline mode, no token or a wrong one, no connection, or no permission to create or write the repository.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    unset = "or set push_to_hub=false"
    for name in (repo_id, *later):
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            words = " ".join(str(error).split())
            raise ValueError(f"hub_model_id: {name!r} is no name of a repository ({words}): expected <user>/<name>") from error
    if constants.HF_HUB_OFFLINE:
        raise OSError(f"push_to_hub=true cannot upload while HF_HUB_OFFLINE=1 is in the environment: unset it, {unset}")
    api = hub_api()
    with hub_errors("push_to_hub=true needs an account of the Hub that can be reached", f"log in with `hf auth login`, {unset}"):
        api.whoami()
    remedy = f"choose a hub_model_id of your own and a token that may write, {unset}"
    with hub_errors(f"hub_model_id={repo_id} cannot be created or written", remedy):
        api.create_repo(repo_id, exist_ok=True)
        if "write" in inspect.signature(api.auth_check).parameters:  # not in earlier clients
            api.auth_check(repo_id, write=True)


def download(repo_id: str, revision: str | None) -> Path:
    """The local copy of a repository's weights, configuration and card; FileNotFoundError if it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=[*MODEL_FILES, LATENT]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{repo_id!r} is neither a folder nor a repository of the Hub that can be reached: {error}"
            f"{nearest_sibling(Path(repo_id))}"
        ) from error


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Load a state dict, strictly; ValueError names the tensors that are missing, left over, or of another shape."""
    if text := misfit(weights, model.state_dict()):
        raise ValueError(f"{source} is a checkpoint of another architecture ({text})")
    model.load_state_dict(weights)


def misfit(given: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str:
    """The tensors that are missing, unknown, or of another shape, in words; empty if there are none."""
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    shapes = [
        f"{name} is {list(given[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    parts = [("missing", missing), ("unknown", unknown), ("of another shape", shapes)]
    return "; ".join(f"{len(names)} {what}: {', '.join(names[:3])}" for what, names in parts if names)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, on the CPU. ValueError: it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError: it is damaged, or holds something else."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def holds_model(folder: Path) -> bool:
    """Whether `save_pretrained` wrote a model into `folder`."""
    return all((folder / name).is_file() for name in (CONFIG, WEIGHTS))


def require_model(folder: Path, recipe: str) -> Path:
    """`folder`, if it holds a saved model. FileNotFoundError names the recipe that makes one."""
    if not holds_model(folder):
        raise FileNotFoundError(
            f"no trained model in {folder}: make it with recipes/{recipe}.py and the same configuration "
            "(resume_from_checkpoint=latest finishes an interrupted run)"
        )
    return folder


def fingerprint(folder: str | Path) -> str:
    """SHA-256 of a saved model's weights and configuration; stable when the same are saved again.

    ValueError: the header of the weights cannot be read.
    """
    data = (Path(folder) / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    try:
        tensors = dict(json.loads(data[8:end]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{Path(folder) / WEIGHTS} is damaged ({error}): make the model again, or restore the file") from error
    tensors.pop("__metadata__", None)  # safetensors writes its entries in varying order
    digest = hashlib.sha256((Path(folder) / CONFIG).read_bytes())
    digest.update(json.dumps(tensors, sort_keys=True).encode())
    digest.update(data[end:])
    return digest.hexdigest()

"""Codes computed from images by a user's function, with one-line errors."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def codes_of_function(spec: str, images: Tensor, seed: int, others: str) -> tuple[Tensor, str, dict[str, Any]]:
    """Call `package.module:function` on images [N, C, H, W]; returns codes, description and provenance.

    Args:
        spec: the function; the current directory is importable.
        images: all of them, in one call.
        seed: for torch's global generator, whose state is restored.
        others: other valid forms of `spec`, for the message.

    Raises:
        ValueError: a malformed `spec`, or codes of another length than the images.
        ImportError: a module or function that cannot be imported, whatever its code raises.
        TypeError: not a function, or one that returns no dense tensor or array of numbers.
        RuntimeError: a function that raises; its own error is the cause.
    """
    with _importable(Path.cwd()), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.random.default_generator.manual_seed(seed)
        module, function = _import_function(spec, others)
        try:
            codes = function(images.clone())  # a copy, as it may change its argument
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            raise RuntimeError(f"latent {spec!r}: the function failed: {_cause(error)}; DAE_TRACEBACK=1 shows where") from error
    if not isinstance(codes, Tensor):
        if not hasattr(codes, "__array__"):
            raise TypeError(
                f"latent {spec!r}: expected the function to return a tensor or array [N, ...], got {type(codes).__name__}; "
                "end it with torch.stack(...) or np.asarray(...)"
            )
        import numpy

        array = numpy.asarray(codes)
        if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
            raise TypeError(f"latent {spec!r}: expected an array of floating point numbers, got one of {array.dtype}")
        codes = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    if codes.layout is not torch.strided or codes.is_nested:
        kind = "a nested tensor" if codes.is_nested else f"layout {codes.layout}"
        raise TypeError(f"latent {spec!r}: expected a dense tensor [N, ...], got {kind}; of a sparse one return .to_dense()")
    if not codes.dim() or len(codes) != len(images):
        raise ValueError(
            f"latent {spec!r}: expected one code an image, {len(images)} in all, got shape {list(codes.shape)}; "
            "the function is called once, with all images"
        )
    facts = {"source": getattr(module, "__file__", None)}
    if facts["source"] and facts["source"].endswith(".py"):
        facts["source_sha256"] = hashlib.sha256(Path(facts["source"]).read_bytes()).hexdigest()
    module_name, _, function_name = spec.partition(":")
    return codes, f"{function_name} of the module {module_name}", facts


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _import_function(spec: str, others: str) -> tuple[Any, Callable]:
    """The module and function in `spec`. ImportError, ValueError, TypeError: as `codes_of_function`."""
    module_name, _, function_name = spec.partition(":")
    file, hint = Path(module_name), ""
    if file.suffix == ".py":
        folder = f" with PYTHONPATH={file.parent}" if file.parent != Path() else ""
        hint = f"; a module is named without .py: {file.stem}:{function_name}{folder}"
    if not all(part.isidentifier() for part in [*module_name.split("."), *function_name.split(".")]):
        raise ValueError(f"latent {spec!r}: expected package.module:function, or {others}{hint}")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not f"{module_name}.".startswith(f"{missing}."):
            what = f"the module {module_name} was found, but its import failed: {_cause(error)}; DAE_TRACEBACK=1 shows where"
        else:
            where = module_name.rpartition(".")[0] if "." in missing else "the current directory"
            remedy = hint or "; start in the folder that holds it, or add that folder: PYTHONPATH=<folder>"
            what = f"no module {missing!r} in {where} ({Path.cwd()}) or elsewhere on sys.path{remedy}"
        raise ImportError(f"latent {spec!r}: {what}") from error
    found: Any = module
    for part in function_name.split("."):
        if not hasattr(found, part):
            names = [name for name in dir(found) if callable(getattr(found, name)) and not name.startswith("__")]
            near = difflib.get_close_matches(part, names, 3) or names[:5]
            hint = f"; it has {', '.join(near)}" if near else ""
            raise ImportError(f"latent {spec!r}: {getattr(found, '__name__', found)} has no {part!r}{hint}")
        found = getattr(found, part)
    if isinstance(found, type):
        raise TypeError(
            f"latent {spec!r}: expected a function or an instance, got the class {found.__name__}; write "
            f"`encode = {found.__name__}(...)` in {module_name} and give {module_name}:encode"
        )
    if not callable(found):
        raise TypeError(f"latent {spec!r}: expected a function of images [N, C, H, W], got {type(found).__name__}, not callable")
    return module, found


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Make `folder` importable: `python recipes/x.py` adds the script's folder, not the current directory, to the path."""
    sys.path.insert(0, str(folder))
    try:
        importlib.invalidate_caches()
        yield
    finally:
        sys.path.remove(str(folder))

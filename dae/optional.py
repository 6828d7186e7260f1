"""Optional packages: a one-line error if one is missing or broken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def optional(package: str, needed_by: str, remedy: str = "") -> Iterator[None]:
    """`with optional("timm", "features:<name>"): import timm`.

    Args:
        package: what pip installs.
        needed_by: the setting that needs it, as the user wrote it.
        remedy: an alternative.

    Raises:
        ImportError: the import failed, with whatever error: timm raises RuntimeError if torchvision was built for another
            torch.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"{needed_by} needs the package {package} ({error}): pip install {package}{_and(remedy)}") from error
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise ImportError(
            f"{needed_by} needs the package {package}, which is installed but cannot be imported ({words}): mend it{_and(remedy)}"
        ) from error


def _and(remedy: str) -> str:
    return f", {remedy}" if remedy else ""

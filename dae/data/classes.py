"""From the names in `sampling.classes` to class numbers."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Sequence

from dae.data.files import few


def resolve_classes(wanted: Sequence[str | int], class_names: Sequence[str], labels: Sequence | None = None) -> list[int]:
    """Numbers of the classes that `wanted` (`sampling.classes`) names, each once, in its order.

    An entry is the name of a class or else, if none has that name, the label that stands in the data: of labels 1990 and 2020
    without names, 2020 is class 1.

    Args:
        class_names: in the order of the numbers.
        labels: what stands in the label column for each class; None where these are the numbers 0 to K - 1 themselves.

    ValueError: an entry is neither; the message names the nearest ones.
    """
    originals = [str(label) for label in (range(len(class_names)) if labels is None else labels)]
    numbers = dict(zip(originals, range(len(originals)), strict=True))
    numbers |= dict(zip(class_names, range(len(class_names)), strict=True))
    numbers = {_composed(name): number for name, number in numbers.items()} | numbers
    entries = [entry if entry in numbers else _composed(entry) for entry in map(str, wanted)]
    for entry in entries:
        if entry not in numbers:
            near = difflib.get_close_matches(entry, numbers, 3)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            count = "is 1 class" if len(class_names) == 1 else f"are {len(class_names):,} classes"
            raise ValueError(
                f"sampling.classes: {entry!r} is neither the name nor the label of a class.{hint} There {count}: "
                f"{few(class_names)}"
            )
    return list(dict.fromkeys(numbers[entry] for entry in entries))


def _composed(name: str) -> str:
    """Unicode's composed form: macOS writes `é` as two characters."""
    return unicodedata.normalize("NFC", name)

"""Find the image and label columns, the classes of the labels, and the classes that a configuration names."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dae.data.files import few

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

LABEL_NAMES = ("label", "labels", "cls", *(f"json.{name}" for name in ("label", "labels", "cls", "class")))


@dataclass
class Labels:
    """Class numbers of the values in the label column; `column` is None for unlabelled data.

    Attributes:
        class_names: in the order of the numbers.
        values: the column's value for each class; None if the values are the class numbers.
        assumed: no label of the stream was read; the classes are taken to be 0 to K - 1.
    """

    column: str | None = None
    class_names: list[str] = field(default_factory=lambda: ["image"])
    values: list | None = None
    assumed: bool = False

    def __post_init__(self) -> None:
        self._numbers = {value: i for i, value in enumerate(range(self.num_classes) if self.values is None else self.values)}

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def number(self, value: Any) -> int:
        """The class of one row. Raises ValueError if the label is missing, unknown or out of range."""
        if value is None:
            raise ValueError(f"the label in column {self.column!r} is missing")
        if value not in self._numbers:
            wrong = f"{value!r} is none of the {self.num_classes} classes to train on: {few(self.class_names)}"
            if self.values is None:
                wrong = f"{int(value)} is out of range: expected 0 to {self.num_classes - 1}"
            read = "streaming=false reads which labels occur, " if self.assumed else ""
            raise ValueError(f"label {wrong} ({read}num_classes= takes more, label_column=none ignores them)")
        return self._numbers[value]

    def numbers(self, values: np.ndarray) -> np.ndarray:
        """The class of each value, -1 if it has none."""
        return np.asarray([self._numbers.get(value, -1) for value in values.tolist()], np.int64)


def resolve_classes(wanted: Sequence[str | int], class_names: Sequence[str], labels: Sequence | None = None) -> list[int]:
    """Numbers of the classes listed in `wanted` (`sampling.classes`), without repeats, in that order.

    An entry is a class name or, if no class has that name, a label as it is in the data: with unnamed labels 1990 and 2020,
    2020 means class 1.

    Args:
        class_names: in the order of the numbers.
        labels: the label column's value for each class; None if the values are 0 to K - 1.

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


def image_columns(features: Any) -> list[str]:
    """The columns that hold images: of type Image if there are any, else of encoded bytes, else of arrays."""
    from datasets import Array2D, Array3D, Image

    kinds = (
        lambda feature: isinstance(feature, Image),
        lambda feature: "bytes" in feature if isinstance(feature, dict) else getattr(feature, "dtype", "").endswith("binary"),
        lambda feature: isinstance(feature, (Array2D, Array3D)),
    )
    return next(filter(None, ([name for name, feature in features.items() if is_kind(feature)] for is_kind in kinds)), [])


def find_image_column(features: Any, wanted: str) -> str:
    """The image column: `wanted`, or for `auto` the only one of `image_columns`."""
    if wanted != "auto":
        _require_column(features, wanted, "image_column")
        return wanted
    found = image_columns(features)
    if len(found) > 1:
        raise ValueError(f"several columns hold images: {few(map(repr, found))}; choose one with image_column")
    if not found:
        raise ValueError(f"no column of type Image; the columns are {describe_columns(features)}; name one with image_column")
    return found[0]


def find_label_column(features: Any, wanted: str) -> str | None:
    """The label column: `wanted`, None for `none`, or for `auto` one of `LABEL_NAMES` or the only ClassLabel."""
    if wanted == "none":
        return None
    if wanted != "auto":
        _require_column(features, wanted, "label_column")
        return wanted
    if usual := next((name for name in LABEL_NAMES if name in features), None):
        return usual
    classes = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    if len(classes) > 1:
        raise ValueError(f"several columns hold classes: {classes}; choose one with label_column, or `none`")
    return classes[0] if classes else None


def _require_column(features: Any, name: str, key: str) -> None:
    if name not in features:
        raise ValueError(f"{key}={name!r}: there is no such column; the columns are {describe_columns(features)}")


def describe_columns(features: Any) -> str:
    return ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items()) or "none"


def _kind(feature: Any) -> str:
    return str(feature.dtype) if type(feature).__name__ == "Value" else type(feature).__name__


def resolve_labels(
    column: str | None, features: Any, num_classes: int | None, found: np.ndarray | None, held_out: np.ndarray | None = None
) -> Labels:
    """The classes: the labels that occur in the training rows, in numerical or alphabetical order.

    If `num_classes` says otherwise, the classes are all names of a ClassLabel, the integers 0 to num_classes - 1, or the labels
    of training and held-out rows together, whichever has that number. If a stream would have to be read for its labels,
    the classes are those of the ClassLabel, or `num_classes` integers.

    Args:
        column: the label column, or None.
        features: features of the training rows.
        num_classes: as configured, or None.
        found: all labels of the training rows; None for a stream.
        held_out: all labels of the held-out split, if known.

    Raises:
        TypeError: the column holds neither classes, integers nor strings.
        ValueError: there are not `num_classes` classes, every row is its own class, or a stream leaves them open.
    """
    if column is None:
        return Labels()
    feature, dtype = features[column], str(getattr(features[column], "dtype", ""))
    if type(feature).__name__ == "ClassLabel":
        names = list(feature.names or map(str, range(feature.num_classes or 0)))
        occurring: list = list(range(len(names)))
        if found is not None and num_classes != len(names):
            occurring = sorted(set(found.tolist()).intersection(occurring)) or occurring
    elif type(feature).__name__ == "Value" and dtype.startswith(("int", "uint", "bool", "string", "large_string")):
        names = []
        occurring = _occurring(column, "string" in dtype, num_classes, found, held_out)
    else:
        raise TypeError(
            f"label_column {column!r} is of type {_kind(feature)}; expected ClassLabel, integers or strings, "
            "or label_column=none to ignore labels"
        )
    if num_classes is not None and num_classes != len(occurring):
        counts = f"{len(names)} classes, {len(occurring)} of which occur" if names else f"{len(occurring)} classes"
        raise ValueError(f"num_classes={num_classes}, but the column {column!r} has {counts}")
    class_names = [names[value] if names else str(value) for value in occurring]
    values = None if occurring == list(range(len(occurring))) else occurring
    return Labels(column, class_names, values, assumed=found is None and not names)


def _occurring(
    column: str, is_text: bool, num_classes: int | None, found: np.ndarray | None, held_out: np.ndarray | None
) -> list:
    """The classes of a column of integers or strings; see `resolve_labels`."""
    if found is None and num_classes is None:
        raise ValueError(f"the classes of {column!r} cannot be counted in a stream: set num_classes or streaming=false")
    occurring = together = [] if found is None else _in_order(found)
    if found is not None and num_classes is None and len(occurring) == len(found) > 1:
        raise ValueError(
            f"the column {column!r} has another value in each of its {len(found):,} rows: no classes to learn. Choose another "
            f"label_column, `none` to ignore labels, or accept them with num_classes={len(occurring)}"
        )
    if num_classes is None or num_classes == len(occurring):
        return occurring
    if found is not None and held_out is not None:
        together = _in_order(np.concatenate([found, held_out]))
    if num_classes == len(together) or (together and _as_integers(together) is None):
        return together
    return [str(i) if is_text else i for i in range(num_classes)]


def _in_order(values: np.ndarray) -> list:
    """The distinct labels, sorted numerically if all are different integers, else alphabetically."""
    different = sorted(set(values.tolist()))
    numbers = _as_integers(different)
    return different if numbers is None else [value for _, value in sorted(zip(numbers, different, strict=True))]


def _as_integers(values: list) -> list[int] | None:
    """Labels as integers; None if some are not integers, or two are the same integer."""
    try:
        numbers = [int(value) for value in values]
    except ValueError:
        return None
    return numbers if len(set(numbers)) == len(numbers) else None


def table_column(rows: Dataset, name: str) -> pa.ChunkedArray:
    return rows.select_columns([name]).with_format("arrow")[:].column(name)


def label_values(values: Any, column: str, origin: str) -> np.ndarray:
    """Labels of a split as an array. Raises ValueError with `origin` and the first row that has none.

    Args:
        values: the Arrow column, or the rows of a table.
    """
    if hasattr(values, "select_columns"):
        values = table_column(values, column)
    if values.null_count:
        missing = np.asarray(values.is_null())
        raise ValueError(f"{origin}, row {int(missing.argmax())}: the label in column {column!r} is missing")
    return values.to_numpy()

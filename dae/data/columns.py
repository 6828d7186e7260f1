"""Which column holds the images, which the labels, and what the labels mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

LABEL_NAMES = ("label", "labels", "cls")


@dataclass
class Labels:
    """From the value in the label column to a class number; `column` is None for unlabelled data."""

    column: str | None = None
    class_names: list[str] = field(default_factory=lambda: ["image"])
    from_string: bool = False

    def __post_init__(self) -> None:
        self._numbers = {name: i for i, name in enumerate(self.class_names)} if self.from_string else None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def number(self, value: Any) -> int:
        """The class of one row. Raises ValueError where the label is missing, unknown or out of range."""
        if value is None:
            raise ValueError(f"the label in column {self.column!r} is missing")
        if self._numbers is not None:
            if value not in self._numbers:
                raise ValueError(f"label {value!r} is none of the {self.num_classes} classes")
            return self._numbers[value]
        if not 0 <= int(value) < self.num_classes:
            raise ValueError(f"label {int(value)} is out of range: expected 0 to {self.num_classes - 1}")
        return int(value)


def find_image_column(features: Any, wanted: str) -> str:
    """The column with the images: `wanted`, or for `auto` the only one of type Image, else of encoded bytes, else of arrays."""
    from datasets import Array2D, Array3D, Image

    if wanted != "auto":
        require_column(features, wanted, "image_column")
        return wanted
    kinds = (
        lambda feature: isinstance(feature, Image),
        lambda feature: "bytes" in feature if isinstance(feature, dict) else getattr(feature, "dtype", "").endswith("binary"),
        lambda feature: isinstance(feature, (Array2D, Array3D)),
    )
    for is_kind in kinds:
        found = [name for name, feature in features.items() if is_kind(feature)]
        if len(found) > 1:
            raise ValueError(f"several columns hold images: {found}; choose one with image_column")
        if found:
            return found[0]
    raise ValueError(f"no column of type Image; the columns are {describe_columns(features)}; name one with image_column")


def find_label_column(features: Any, wanted: str) -> str | None:
    """The column with the labels: `wanted`, none for `none`, or for `auto` one of `LABEL_NAMES` or the only ClassLabel."""
    if wanted == "none":
        return None
    if wanted != "auto":
        require_column(features, wanted, "label_column")
        return wanted
    if usual := next((name for name in LABEL_NAMES if name in features), None):
        return usual
    classes = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    if len(classes) > 1:
        raise ValueError(f"several columns hold classes: {classes}; choose one with label_column, or `none`")
    return classes[0] if classes else None


def require_column(features: Any, name: str, key: str) -> None:
    if name not in features:
        raise ValueError(f"{key}={name!r}: there is no such column; the columns are {describe_columns(features)}")


def describe_columns(features: Any) -> str:
    return ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items()) or "none"


def _kind(feature: Any) -> str:
    return getattr(feature, "dtype", None) if type(feature).__name__ == "Value" else type(feature).__name__


def resolve_labels(column: str | None, features: Any, num_classes: int | None, splits: dict[str, Any] | None) -> Labels:
    """Names and number of the classes, from the features or, for map-style data, from the rows.

    Args:
        column: the label column, or None.
        features: features of the data set.
        num_classes: what the configuration says, or None.
        splits: the map-style splits whose labels count, by the name that messages give them; None for a stream.

    Raises:
        TypeError: the column holds neither classes, integers nor strings.
        ValueError: the numbers of classes contradict each other, or a stream leaves it open.
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    if column is None:
        return Labels()
    feature = features[column]
    dtype = str(getattr(feature, "dtype", ""))
    if type(feature).__name__ == "ClassLabel":
        names = list(feature.names or map(str, range(feature.num_classes or 0)))
    elif type(feature).__name__ == "Value" and (dtype.startswith(("int", "uint")) or dtype == "bool"):
        if num_classes is None:
            if splits is None:
                raise ValueError(f"the classes of the integer column {column!r} cannot be counted in a stream: set num_classes")
            num_classes = 1 + max(int(label_values(rows, column, origin).max(initial=0)) for origin, rows in splits.items())
        names = [str(i) for i in range(max(num_classes, 1))]
    elif type(feature).__name__ == "Value" and dtype in ("string", "large_string"):
        if splits is None:
            raise ValueError(f"the classes of the string column {column!r} cannot be collected from a stream: use integer labels")
        names = sorted({str(value) for origin, rows in splits.items() for value in label_values(rows, column, origin)})
    else:
        raise TypeError(
            f"label_column {column!r} is of type {_kind(feature)}; expected ClassLabel, integers or strings, "
            "or label_column=none to ignore labels"
        )
    if num_classes is not None and num_classes != len(names):
        raise ValueError(f"num_classes={num_classes}, but the column {column!r} has {len(names)} classes")
    return Labels(column, names, from_string=dtype in ("string", "large_string"))


def label_values(rows: Any, column: str, origin: str) -> np.ndarray:
    """All labels of a map-style split. Raises ValueError naming `origin` and the first row without one."""
    values = rows.select_columns([column]).with_format("arrow")[:].column(column)
    if values.null_count:
        missing = np.asarray(values.is_null())
        raise ValueError(f"{origin}, row {int(missing.argmax())}: the label in column {column!r} is missing")
    return values.to_numpy()

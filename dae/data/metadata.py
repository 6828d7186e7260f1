"""metadata.csv, .jsonl or .parquet beside images: further columns, as the `imagefolder` of `datasets` reads them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dae.data.files import LeftOut, Place, suffix_of

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass
class Described:
    """Columns of image metadata files.

    Attributes:
        table: all columns but the image.
        rows: absolute image path to its rows in `table`.
        image_column: name of the image column.
    """

    table: pa.Table
    rows: dict[str, list[int]]
    image_column: str


def read(places: list[Place], image_column: str, left_out: LeftOut) -> Described | None:
    """Read all metadata files of an image folder; None if there are none.

    The column `file_name` (image column `image`) or `<image_column>_file_name` is the image's path relative to the
    metadata file.

    ValueError: a file cannot be read, has no such column, or names a file outside its folder.
    """
    import pyarrow as pa

    tables: list[pa.Table] = []
    rows: dict[str, list[int]] = {}
    columns: set[str] = set()
    start = 0
    for file in (place.absolute(file) for place in places for file in place.files):
        table = _read_table(file)
        column = _name_column(table.column_names, image_column, file)
        columns.add(column)
        folder = os.path.dirname(file)
        missing = []
        for row, name in enumerate(table[column].to_pylist(), start):
            inside = os.path.normpath(str(name))
            if os.path.isabs(inside) or inside.split(os.sep)[0] == "..":
                raise ValueError(f"{file!r} names the image {name!r}: expected a path inside of its folder")
            path = os.path.join(folder, inside)
            if os.path.isfile(path):
                if path in rows and rows[path][-1] < start:
                    raise ValueError(f"{file!r}: the image {name!r} is named by another metadata file too; remove one of them")
                rows.setdefault(path, []).append(row)
            else:
                missing.append(path)
        left_out.add("named by a metadata file, but not there", *missing)
        tables.append(table.drop_columns([name for name in (column, "image") if name in table.column_names]))
        start += len(table)
    if not tables:
        return None
    if len(columns) > 1:
        raise ValueError(f"metadata files name images in the columns {' and '.join(sorted(columns))}: expected one of them")
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"the metadata files of one set have different columns: {error}") from error
    return Described(table, rows, columns.pop().removesuffix("file_name").removesuffix("_") or "image")


def _name_column(columns: list[str], image_column: str, file: str) -> str:
    if len(set(columns)) < len(columns):
        raise ValueError(f"{file!r}: two columns have one name: {', '.join(columns)}")
    if "file_name" in columns:
        return "file_name"
    found = [name for name in columns if name.endswith("_file_name")]
    wanted = [name for name in found if name == f"{image_column}_file_name"] or found
    if len(wanted) != 1:
        what = f"several columns name images ({', '.join(found)}): choose with image_column" if found else "no column `file_name`"
        raise ValueError(f"{file!r}: {what}; it has {', '.join(columns)}")
    return wanted[0]


def _read_table(file: str) -> pa.Table:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    try:
        if suffix_of(file) == ".csv":
            table = pa.csv.read_csv(file, convert_options=pa.csv.ConvertOptions(column_types={"file_name": pa.string()}))
            if binary := [field.name for field in table.schema if pa.types.is_binary(field.type)]:
                raise ValueError(f"{file!r}: the column {binary[0]!r} is not UTF-8")
            return table
        return (pa.json.read_json if suffix_of(file) == ".jsonl" else pa.parquet.read_table)(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file!r} is broken: {' '.join(str(error).split())}") from error

"""Reads a CSV file of image files and labels. The file is untrusted."""

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PureWindowsPath
from typing import IO, NamedTuple

from ecanet.train.data.folders import FolderImages
from ecanet.train.data.splits import (
    MAX_NAME,
    PART_NAMES,
    Label,
    Split,
    Splits,
    check_classes,
    check_validation_labels,
    find_parts,
    number_classes,
    split_off,
)
from ecanet.untrusted import check_file, listed, shown

#: Largest file, in bytes, and largest number of images in it; ImageNet has 1.3 million.
MAX_CSV_BYTES, MAX_ROWS = 2**27, 2_000_000
#: Names of the columns, in upper or lower case.
IMAGE_COLUMNS = ("file", "filename", "file_name", "filepath", "path", "image", "image_path")
LABEL_COLUMNS = ("label", "labels", "class", "classes", "category", "tags")
SPLIT_COLUMN = "split"
#: Separators of several labels in a cell.
SEPARATORS = {"pipe": "|", "semicolon": ";", "comma": ",", "space": " ", "none": None}

_LONGEST_HEADER = 2**16  # characters


class Columns(NamedTuple):
    """The columns of a table that are read.

    Attributes:
        image: Name of the column of images; None means that it is found by the usual names.
        label: Name of the column of labels; None likewise.
        separator: Separator of several labels in a cell; None if each cell has one label.
    """

    image: str | None = None
    label: str | None = None
    separator: str | None = "|"


class _Row(NamedTuple):
    """One row: the path of the image, its labels, its part (empty without such a column), and the line number."""

    path: str
    labels: tuple[str, ...]
    part: str
    line: int


def csv_images(
    root: str | Path,
    val_root: str | Path | None = None,
    split: Split = Split(),  # noqa: B008
    columns: Columns = Columns(),  # noqa: B008
) -> Splits:
    """Read the image files and labels that a CSV file lists.

    Its first line names the columns: one for the file (:data:`IMAGE_COLUMNS`), one for the label
    (:data:`LABEL_COLUMNS`), and optionally ``split``, with the values train, val or test. Cells are separated by
    commas, semicolons or tabs. The path of an image is relative to the folder of the CSV file and stays below it. If
    any cell has several labels, the data is multi-label, and an empty cell means no label.

    Args:
        root: The CSV file, UTF-8.
        val_root: Another CSV file, with the validation images.
        split: How to split off validation images; see :func:`~ecanet.train.data.splits.split_off`.
        columns: Names of the columns, and the separator of labels.

    Returns:
        Images ``(3, H, W)``, each in its own size.

    Raises:
        FileNotFoundError: there is no such file, an image that it lists is missing, or nothing to validate on.
        ValueError: something in the file is wrong; the message names the file, the line and the cell.

    Example:
        >>> csv_images("photos/labels.csv", split=Split(0.1)).classes  # doctest: +SKIP
        ('cat', 'dog')
    """
    source = Path(root)
    parts = _parts(source, columns)
    train, val = find_parts(filter(None, parts), _quoted(source), split._replace(elsewhere=val_root is not None))
    train_rows = parts[train] if train is not None else [row for rows in parts.values() for row in rows]
    val_rows: list[_Row] = []
    val_source = source
    if val_root is not None:
        val_source = Path(val_root)
        val_rows = _validation_rows(_parts(val_source, columns), _quoted(val_source))
    elif val is not None:
        val_rows = parts[val]
    multi = any(len(row.labels) > 1 for row in (*train_rows, *val_rows))
    for path, rows in ((source, train_rows), (val_source, val_rows)):
        _check_labels(path, rows, multi)
    classes = number_classes(label for row in train_rows for label in row.labels)
    check_classes(classes, _quoted(source))
    numbers = {name: i for i, name in enumerate(classes)}
    samples = _samples(source, train_rows, numbers, multi)
    if val_rows:
        val_samples = _samples(val_source, val_rows, numbers, multi)
    else:
        keys, labels = [row.path for row in train_rows], [label for _, label in samples]
        samples, val_samples = ([samples[i] for i in part] for part in split_off(keys, labels, classes, split))
    check_validation_labels((label for _, label in val_samples), _quoted(val_source))
    return Splits(FolderImages(samples, len(classes)), FolderImages(val_samples, len(classes)), tuple(classes), multi)


def _quoted(path: Path) -> str:
    return f"'{shown(path, 300)}'"


def _validation_rows(parts: dict[str, list[_Row]], where: str) -> list[_Row]:
    """The validation rows of a file that is given for validation: all rows, or those of its validation part."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    _, val = find_parts(parts, where, Split())
    assert val is not None
    return parts[val]


def _parts(path: Path, columns: Columns) -> dict[str, list[_Row]]:
    """The rows of a CSV file by their part."""
    if path.is_dir():
        raise IsADirectoryError(
            f"{_quoted(path)} is a folder, and data.source=csv reads a file; class folders are data.source=image_folder"
        )
    check_file(path, MAX_CSV_BYTES)
    parts: dict[str, list[_Row]] = {}
    seen: dict[str, int] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in _rows(file, columns):
                if (first := seen.setdefault(row.path, row.line)) != row.line:
                    raise ValueError(
                        f"line {row.line}: '{shown(row.path, 200)}' is already in line {first}: put several labels "
                        "into one cell, as in cat|dog"
                    )
                if len(seen) > MAX_ROWS:
                    raise ValueError(f"it has more than {MAX_ROWS:,} images: split it")
                parts.setdefault(row.part, []).append(row)
    except UnicodeDecodeError as error:
        raise ValueError(f"{_quoted(path)} is not UTF-8 ({error.reason}): save it as CSV in UTF-8") from error
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{_quoted(path)}: {error}") from error
    if not parts:
        raise ValueError(f"{_quoted(path)} has no images: its first line names columns, and each further line one")
    return parts


def _rows(file: IO[str], columns: Columns) -> Iterator[_Row]:
    header = file.readline(_LONGEST_HEADER)
    delimiter = max(",;\t", key=header.count)
    file.seek(0)
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    names = [name.strip() for name in next(reader, [])]
    if not any(names):
        raise ValueError("its first line is empty, and must name the columns, as in file,label")
    image = _column(names, columns.image, IMAGE_COLUMNS, "image")
    label = _column(names, columns.label, LABEL_COLUMNS, "label")
    part = next((i for i, name in enumerate(names) if name.lower() == SPLIT_COLUMN), None)
    while (cells := _next(reader)) is not None:
        if not cells:  # an empty line
            continue
        line = reader.line_num
        if len(cells) != len(names):
            raise ValueError(f"line {line} has {len(cells)} cells, and the first line {len(names)}")
        try:
            path = _checked_path(cells[image])
            labels = _checked_labels(cells[label], columns.separator)
        except ValueError as error:
            raise ValueError(f"line {line}: {error}") from error
        named = "" if part is None else cells[part].strip()
        if part is not None and named.lower() not in PART_NAMES:
            raise ValueError(
                f"line {line}: {SPLIT_COLUMN} must be one of {', '.join(PART_NAMES)}, got '{shown(named)}'"
            )
        yield _Row(path, labels, named, line)


def _next(reader: Iterator[list[str]]) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        raise ValueError(f"line {getattr(reader, 'line_num', 0)}: {error}") from error


def _column(names: Sequence[str], wanted: str | None, known: Sequence[str], kind: str) -> int:
    """The index of the column with the wanted name or, without one, with one of the known names."""
    matching = [i for i, name in enumerate(names) if (name == wanted if wanted else name.lower() in known)]
    if len(matching) == 1:
        return matching[0]
    what = f"'{shown(wanted)}'" if wanted else f"one of {', '.join(known)}"
    problem = f"{len(matching)} of its columns are called" if matching else "no column is called"
    raise ValueError(
        f"{problem} {what}: its first line is {listed(names, 10)}. Name one with data.{kind}_column, or rename them"
    )


def _checked_path(cell: str) -> str:
    """The path in a cell, relative to the CSV file's folder, with slashes; ValueError if it could leave the folder."""
    path = cell.strip().replace("\\", "/")
    if not path or not path.isprintable():
        raise ValueError(f"it must name an image file, got '{shown(cell)}'")
    parts = path.split("/")
    if not parts[0] or PureWindowsPath(path).drive or ".." in parts:
        raise ValueError(
            f"the path '{shown(path, 200)}' must be relative to the folder of the CSV file and must not leave it"
        )
    return "/".join(part for part in parts if part not in ("", "."))


def _checked_labels(cell: str, separator: str | None) -> tuple[str, ...]:
    labels = [label.strip() for label in (cell.split(separator) if separator else [cell])]
    labels = list(dict.fromkeys(filter(None, labels)))
    for label in labels:
        if len(label) > MAX_NAME or not label.isprintable():
            raise ValueError(f"a label must be text of at most {MAX_NAME} characters, got '{shown(label)}'")
        if label[0] in "=+-@" and not _is_number(label):
            raise ValueError(
                f"the label '{shown(label)}' starts like a formula, which a spreadsheet would run: give it another name"
            )
    return tuple(labels)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_labels(path: Path, rows: Sequence[_Row], multi: bool) -> None:
    empty = None if multi else next((row for row in rows if not row.labels), None)
    if empty is not None:
        raise ValueError(
            f"{_quoted(path)}: line {empty.line} has no label, which only data with several labels in a cell may have"
        )


def _samples(path: Path, rows: Sequence[_Row], numbers: dict[str, int], multi: bool) -> list[tuple[str, Label]]:
    """Pairs of file and label; FileNotFoundError if a file is missing."""
    base = os.fspath(path.parent)
    samples: list[tuple[str, Label]] = []
    missing: list[str] = []
    for row in rows:
        if unknown := [label for label in row.labels if label not in numbers]:
            raise ValueError(
                f"{_quoted(path)}: line {row.line} has the label '{shown(unknown[0])}', which no training image has"
            )
        labels = tuple(sorted(numbers[label] for label in row.labels))
        file = os.path.join(base, *row.path.split("/"))
        if not os.path.isfile(file):
            missing.append(row.path)
        samples.append((file, labels if multi else labels[0]))
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(rows)} images that {_quoted(path)} lists are not in its folder: {listed(missing)}"
        )
    return samples

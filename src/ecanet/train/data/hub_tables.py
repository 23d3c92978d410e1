"""Reads image data that Hugging Face's ``datasets`` stored on disk: Arrow and Parquet files with pictures in them.

Only the tables are read: loading scripts, formats and paths that a file names are not used, and nothing is loaded
from the Hub.
"""

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ecanet.train.data.csv_file import LABEL_COLUMNS, MAX_ROWS, Columns
from ecanet.train.data.pictures import read_image
from ecanet.train.data.splits import (
    PART_NAMES,
    Label,
    Split,
    Splits,
    check_classes,
    check_validation_labels,
    find_parts,
    number_classes,
    split_off,
    target,
)
from ecanet.untrusted import check_file, listed, shown

_SUFFIXES = (".arrow", ".parquet")


class TableImages(Dataset[Any]):
    """Pictures in the rows of a table, decoded at every access.

    Args:
        table: A ``datasets.Dataset`` with one column of encoded pictures.
        labels: A label for each row.
        rows: The rows that are used.
        classes: Number of classes.
        where: The table's name in errors.
    """

    def __init__(self, table: Any, labels: Sequence[Label], rows: Sequence[int], classes: int, where: str) -> None:
        self.table, self.labels, self.rows, self.classes, self.where = table, labels, rows, classes, where

    def __len__(self) -> int:
        """Number of images."""
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """One image ``(3, H, W)`` and its label; errors as in :func:`read_image`."""
        row = self.rows[index]
        (value,) = self.table[row].values()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            path = value.get("path") if isinstance(value, dict) else None
            what = f"it holds only the path {shown(path)!r}, which is not followed" if path else "it holds no picture"
            what += ": save_to_disk puts pictures into the table"
            raise ValueError(f"cannot read the image {self.name(index)}: {what}") from ValueError(what)
        return read_image(data, self.name(index)), target(self.labels[row], self.classes)

    def label(self, index: int) -> Label:
        """The label of one image, without reading it: the index of its class, or those of all its classes."""
        return self.labels[self.rows[index]]

    def name(self, index: int) -> str:
        """The row and its table."""
        return f"in row {self.rows[index]} of {self.where}"


def hub_images(
    root: str | Path,
    val_root: str | Path | None = None,
    split: Split = Split(),  # noqa: B008
    columns: Columns = Columns(),  # noqa: B008
) -> Splits:
    """Read pictures from files of ``Dataset.save_to_disk``, ``DatasetDict.save_to_disk``, ``to_parquet`` or the Hub.

    The name of a part is that of its folder, or the start of its file names: ``train/data-00000-of-00001.arrow``,
    ``train-00000-of-00001.parquet``. Labels are in the column of type ``ClassLabel``, or in one of texts or whole
    numbers; if it holds lists, the data is multi-label.

    Args:
        root: Folder of the files, or one file.
        val_root: Another folder or file, with the validation pictures.
        split: How to split off validation images; see :func:`~ecanet.train.data.splits.split_off`.
        columns: Names of the columns, if they cannot be found by their types.

    Returns:
        Images ``(3, H, W)``, each in its own size.

    Raises:
        FileNotFoundError: there are no such files, or nothing to validate on.
        ValueError: a column of pictures or labels is missing, or a label is not valid; the message names it.
        ModuleNotFoundError: ``datasets`` is missing.

    Example:
        >>> hub_images("beans").classes  # doctest: +SKIP
        ('angular_leaf_spot', 'bean_rust', 'healthy')
    """
    where = f"'{shown(root, 300)}'"
    parts = _files_by_part(Path(root))
    train, val = find_parts(filter(None, parts), where, split._replace(elsewhere=val_root is not None))
    pictures, labels, multi, names = _read(parts[train or ""], where, columns)
    validation: tuple[Any, list[Any]] | None = None
    val_where = where
    if val_root is not None:
        val_where = f"'{shown(val_root, 300)}'"
        parts = _files_by_part(Path(val_root))
        val = next(iter(parts)) if len(parts) == 1 else find_parts(parts, val_where, Split())[1]
    if val is not None:
        val_pictures, val_labels, val_multi, val_names = _read(parts[val], val_where, columns)
        if val_multi != multi or (names and val_names and names != val_names):
            raise ValueError(f"the validation labels of {val_where} are not those of the training data in {where}")
        validation = val_pictures, val_labels
    classes = names or number_classes(str(name) for label in labels for name in (label if multi else [label]))
    check_classes(classes, where)
    indices = _class_indices(labels, classes, names, multi, where)
    if validation is None:
        keys = [str(row) for row in range(len(labels))]
        parts_of_rows = split_off(keys, indices, classes, split)
        images = [TableImages(pictures, indices, rows, len(classes), where) for rows in parts_of_rows]
    else:
        val_indices = _class_indices(validation[1], classes, names, multi, val_where)
        images = [
            TableImages(table, of_table, range(len(of_table)), len(classes), place)
            for table, of_table, place in ((pictures, indices, where), (validation[0], val_indices, val_where))
        ]
    check_validation_labels((images[1].labels[row] for row in images[1].rows), val_where)
    return Splits(images[0], images[1], tuple(classes), multi)


def _files_by_part(root: Path) -> dict[str, list[Path]]:
    """The files of each part, in order; the name of the part is empty if no file or folder names one."""
    if not root.exists():
        raise FileNotFoundError(
            f"no folder or file '{shown(root, 300)}': it must hold what save_to_disk wrote, or be Parquet files"
        )
    files = root.rglob("*") if root.is_dir() else [root]
    tables = sorted(p for p in files if p.suffix in _SUFFIXES and not p.name.startswith((".", "cache-")))
    if not tables:
        raise FileNotFoundError(
            f"'{shown(root, 300)}' has neither .arrow nor .parquet files: write them with save_to_disk; "
            "class folders are data.source=image_folder, and metadata.csv is data.source=csv"
        )
    parts: dict[str, list[Path]] = {}
    for path in tables:
        check_file(path)
        parts.setdefault(_part_of(path.relative_to(root)), []).append(path)  # a single file belongs to no part
    if "" in parts and len(parts) > 1:
        first, other = parts[""][0], next(name for name in parts if name)
        raise ValueError(
            f"'{shown(root, 300)}' has the part '{shown(other)}', but '{shown(first, 200)}' belongs to no part: remove "
            "it, or rename it as train-... or validation-..."
        )
    return parts


def _part_of(path: Path) -> str:
    names = [re.split(r"[-_.]", path.name, maxsplit=1)[0], *(parent.name for parent in path.parents)]
    return next((name for name in names if name.lower() in PART_NAMES), "")


@contextlib.contextmanager
def _progress_bars_only_on_a_terminal(datasets: Any) -> Iterator[None]:
    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _read(files: Sequence[Path], where: str, columns: Columns) -> tuple[Any, list[Any], bool, list[str]]:
    """Pictures, labels, whether a picture may have several, and the names of the classes if labels are numbers."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("data.source=hf needs datasets: pip install 'ecanet[hf]'", name="datasets") from error
    try:
        with _progress_bars_only_on_a_terminal(datasets):
            tables = [datasets.Dataset.from_file(str(path)) for path in files if path.suffix == ".arrow"]
            parquets = [str(path) for path in files if path.suffix == ".parquet"]
            if parquets:
                tables.append(datasets.Dataset.from_parquet(parquets))
            table = datasets.concatenate_datasets(tables)
    except Exception as error:  # pyarrow and datasets raise many kinds
        reason = shown(" ".join(str(error.__cause__ or error).split()), 300)
        raise ValueError(f"{where}: its tables cannot be read ({type(error).__name__}: {reason})") from error
    if not 0 < len(table) <= MAX_ROWS:
        raise ValueError(f"{where} has {len(table):,} rows, and must have 1 to {MAX_ROWS:,}")
    image, label = _image_column(table, where, columns), _label_column(table, where, columns)
    if isinstance(table.features[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    feature = table.features[label]
    multi = hasattr(feature, "feature")
    names = getattr(feature.feature if multi else feature, "names", None)
    return table.select_columns([image]), list(table.select_columns([label])[:][label]), multi, list(names or [])


def _image_column(table: Any, where: str, columns: Columns) -> str:
    kinds = {name: type(feature).__name__ for name, feature in table.features.items()}
    matching = [name for name, kind in kinds.items() if (name == columns.image if columns.image else kind == "Image")]
    if len(matching) != 1:
        what = f"'{shown(columns.image)}'" if columns.image else "of type Image"
        raise ValueError(
            f"{where} has {len(matching)} columns {what}; its columns are {listed(kinds, 10)}: name that of the "
            "pictures with data.image_column"
        )
    return matching[0]


def _label_column(table: Any, where: str, columns: Columns) -> str:
    features = {name: getattr(feature, "feature", feature) for name, feature in table.features.items()}
    matching = [name for name in features if name == columns.label] if columns.label else []
    if not columns.label:
        matching = [name for name, feature in features.items() if hasattr(feature, "names")]
        matching = matching or [name for name in features if name.lower() in LABEL_COLUMNS]
    if len(matching) != 1:
        what = f"called '{shown(columns.label)}'" if columns.label else "of labels"
        raise ValueError(
            f"{where} has {len(matching)} columns {what}; its columns are {listed(features, 10)}: name that of the "
            "labels with data.label_column"
        )
    return matching[0]


def _class_indices(labels: list[Any], classes: list[str], names: list[str], multi: bool, where: str) -> list[Label]:
    """The class index, or indices, of each label. If there are ``names``, the labels are indices already."""
    numbers: dict[Any, int] = {i: i for i in range(len(classes))} if names else {n: i for i, n in enumerate(classes)}
    result: list[Label] = []
    for row, label in enumerate(labels):
        row_labels = label if multi else [label]
        if not isinstance(row_labels, list) or not all(type(name) in (int, str) for name in row_labels):
            raise ValueError(f"{where}: row {row} has the label {shown(label)}, which is neither a text nor a number")
        indices = [numbers.get(name if names else str(name)) for name in row_labels]
        if None in indices:
            unknown = row_labels[indices.index(None)]
            raise ValueError(
                f"{where}: row {row} has the label {shown(unknown)}, which is none of the {len(classes)} classes"
            )
        known = tuple(sorted({index for index in indices if index is not None}))
        result.append(known if multi else known[0])
    return result

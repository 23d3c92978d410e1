"""Image data as Hugging Face's ``datasets`` keeps it on disk: Arrow and Parquet files with pictures in them.

Only the tables are read: no loading script, no format and no path that a file names, and nothing from the Hub.
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
    check_held,
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
        table: A ``datasets.Dataset`` with one column, of encoded pictures.
        labels: A label for each row.
        rows: The rows that count.
        classes: Number of classes.
        where: What errors call the table.
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
    """Pictures that ``Dataset.save_to_disk``, ``DatasetDict.save_to_disk`` or ``to_parquet`` wrote, or the Hub's files.

    A part is called as its folder, or as its files begin: ``train/data-00000-of-00001.arrow``,
    ``train-00000-of-00001.parquet``. Labels are the column of type ``ClassLabel``, or one of texts or whole numbers;
    where it holds lists, the data is multi-label.

    Args:
        root: Folder of the files, or one file.
        val_root: Another one, whose pictures are validated on.
        split: Split images off to validate on; see :func:`~ecanet.train.data.splits.split_off`.
        columns: Names of the columns, where their types do not tell.

    Returns:
        Images ``(3, H, W)``, each in its own size.

    Raises:
        FileNotFoundError: no such files, or nothing to validate on.
        ValueError: no column of pictures or of labels, or a label that is none; the message names it.
        ModuleNotFoundError: ``datasets`` is missing.

    Example:
        >>> hub_images("beans").classes  # doctest: +SKIP
        ('angular_leaf_spot', 'bean_rust', 'healthy')
    """
    where = f"'{shown(root, 300)}'"
    parts = _files_by_part(Path(root))
    train, val = find_parts(filter(None, parts), where, split._replace(elsewhere=val_root is not None))
    pictures, labels, multi, names = _read(parts[train or ""], where, columns)
    held: tuple[Any, list[Any]] | None = None
    held_where = where
    if val_root is not None:
        held_where = f"'{shown(val_root, 300)}'"
        others = _files_by_part(Path(val_root))
        val = next(iter(others)) if len(others) == 1 else find_parts(others, held_where, Split())[1]
        parts = others
    if val is not None:
        held_pictures, held_labels, held_multi, held_names = _read(parts[val], held_where, columns)
        if held_multi != multi or (names and held_names and names != held_names):
            raise ValueError(f"{held_where} has other labels to validate on than {where} to train on")
        held = held_pictures, held_labels
    classes = names or number_classes(str(name) for each in labels for name in (each if multi else [each]))
    check_classes(classes, where)
    numbered = _numbered(labels, classes, names, multi, where)
    if held is None:
        keys = [str(row) for row in range(len(labels))]
        mine, others_rows = split_off(keys, numbered, classes, split)
        images = [TableImages(pictures, numbered, rows, len(classes), where) for rows in (mine, others_rows)]
    else:
        held_numbered = _numbered(held[1], classes, names, multi, held_where)
        images = [
            TableImages(table, each, range(len(each)), len(classes), place)
            for table, each, place in ((pictures, numbered, where), (held[0], held_numbered, held_where))
        ]
    check_held((images[1].labels[row] for row in images[1].rows), held_where)
    return Splits(images[0], images[1], tuple(classes), multi)


def _files_by_part(root: Path) -> dict[str, list[Path]]:
    """The files of each part, in order; the part is empty where names say nothing."""
    if not root.exists():
        raise FileNotFoundError(
            f"no folder or file '{shown(root, 300)}': it must hold what save_to_disk wrote, or be Parquet files"
        )
    files = root.rglob("*") if root.is_dir() else [root]
    every = sorted(p for p in files if p.suffix in _SUFFIXES and not p.name.startswith((".", "cache-")))
    if not every:
        raise FileNotFoundError(
            f"'{shown(root, 300)}' has no .arrow and no .parquet files: write them with save_to_disk; "
            "class folders are data.source=image_folder, and metadata.csv is data.source=csv"
        )
    parts: dict[str, list[Path]] = {}
    for path in every:
        check_file(path)
        parts.setdefault(_part_of(path.relative_to(root)), []).append(path)  # one file alone is of no part
    if "" in parts and len(parts) > 1:
        first, other = parts[""][0], next(name for name in parts if name)
        raise ValueError(
            f"'{shown(root, 300)}' has the part '{shown(other)}', and '{shown(first, 200)}' is of none: remove it, or "
            "rename it as train-... or validation-..."
        )
    return parts


def _part_of(path: Path) -> str:
    names = [re.split(r"[-_.]", path.name, maxsplit=1)[0], *(parent.name for parent in path.parents)]
    return next((name for name in names if name.lower() in PART_NAMES), "")


@contextlib.contextmanager
def _no_bars_but_on_a_terminal(datasets: Any) -> Iterator[None]:
    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _read(files: Sequence[Path], where: str, columns: Columns) -> tuple[Any, list[Any], bool, list[str]]:
    """Pictures, labels, whether a picture has several, and the names of the classes if they are numbered."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("data.source=hf needs datasets: pip install 'ecanet[hf]'", name="datasets") from error
    try:
        with _no_bars_but_on_a_terminal(datasets):
            arrows = [datasets.Dataset.from_file(str(path)) for path in files if path.suffix == ".arrow"]
            parquets = [str(path) for path in files if path.suffix == ".parquet"]
            if parquets:
                arrows.append(datasets.Dataset.from_parquet(parquets))
            table = datasets.concatenate_datasets(arrows)
    except Exception as error:  # pyarrow and datasets raise many
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
    found = [name for name, kind in kinds.items() if (name == columns.image if columns.image else kind == "Image")]
    if len(found) != 1:
        what = f"'{shown(columns.image)}'" if columns.image else "of type Image"
        raise ValueError(
            f"{where} has {len(found)} columns {what}, it has {listed(kinds, 10)}: name the one of pictures with "
            "data.image_column"
        )
    return found[0]


def _label_column(table: Any, where: str, columns: Columns) -> str:
    features = {name: getattr(feature, "feature", feature) for name, feature in table.features.items()}
    found = [name for name in features if name == columns.label] if columns.label else []
    if not columns.label:
        found = [name for name, feature in features.items() if hasattr(feature, "names")]
        found = found or [name for name in features if name.lower() in LABEL_COLUMNS]
    if len(found) != 1:
        what = f"called '{shown(columns.label)}'" if columns.label else "of labels"
        raise ValueError(
            f"{where} has {len(found)} columns {what}, it has {listed(features, 10)}: name the one of labels with "
            "data.label_column"
        )
    return found[0]


def _numbered(labels: list[Any], classes: list[str], names: list[str], multi: bool, where: str) -> list[Label]:
    """The index of each label; ``names`` says that they are numbers already."""
    numbers: dict[Any, int] = {i: i for i in range(len(classes))} if names else {n: i for i, n in enumerate(classes)}
    result: list[Label] = []
    for row, label in enumerate(labels):
        each = label if multi else [label]
        if not isinstance(each, list) or not all(type(name) in (int, str) for name in each):
            raise ValueError(f"{where}: row {row} has the label {shown(label)}, which is neither a text nor a number")
        indices = [numbers.get(name if names else str(name)) for name in each]
        if None in indices:
            unknown = each[indices.index(None)]
            raise ValueError(
                f"{where}: row {row} has the label {shown(unknown)}, which is none of the {len(classes)} classes"
            )
        found = tuple(sorted({index for index in indices if index is not None}))
        result.append(found if multi else found[0])
    return result

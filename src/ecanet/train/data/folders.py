"""Reads a folder of images with a sub-folder for each class."""

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ecanet.train.data.pictures import SUFFIXES, image_files, read_image
from ecanet.train.data.splits import (
    PART_NAMES,
    TRAIN_NAMES,
    Label,
    Split,
    Splits,
    check_classes,
    find_parts,
    split_off,
    target,
)
from ecanet.train.data.verify import list_first
from ecanet.untrusted import shown


class FolderImages(Dataset[Any]):
    """Image files, decoded at every access.

    Args:
        samples: Pairs of file and label.
        classes: Number of classes; needed if an image may have several labels.
    """

    def __init__(self, samples: Sequence[tuple[str, Label]], classes: int = 0) -> None:
        self.samples, self.classes = samples, classes

    def __len__(self) -> int:
        """Number of images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """One image ``(3, H, W)`` and its label; errors as in :func:`read_image`."""
        path, label = self.samples[index]
        return read_image(path), target(label, self.classes)

    def label(self, index: int) -> Label:
        """The label of one image, without reading it: the index of its class, or those of all its classes."""
        return self.samples[index][1]

    def name(self, index: int) -> str:
        """The file, quoted for a message."""
        return f"'{shown(self.samples[index][0], 300)}'"


def image_folder(root: str | Path, val_root: str | Path | None = None, split: Split = Split()) -> Splits:  # noqa: B008
    """Find images in ``root/train/<class>/`` and ``root/val/<class>/``, at any depth below; or in ``root/<class>/``.

    The validation folder may also be called ``validation`` or ``valid``; if there is none of these, ``test`` takes its
    place. A label is the index of the class name in the sorted list of the training folders. Images are files with a
    suffix in :data:`~ecanet.train.data.pictures.SUFFIXES`, in upper or lower case; names that start with a dot are left
    out.

    Args:
        root: The folder. If it has no folder ``train``, its sub-folders are the classes.
        val_root: Validation folder, instead of any in ``root``: it holds the classes, or a folder ``val`` with the
            classes.
        split: How to split off validation images; see :func:`~ecanet.train.data.splits.split_off`.

    Returns:
        Images ``(3, H, W)``, each in its own size.

    Warns:
        UserWarning: there are pictures of formats that are not read.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: there are no class folders, one has no images, or training and validation have different classes.

    Example:
        >>> image_folder("imagenet").classes[0]  # doctest: +SKIP
        'n01440764'
    """
    train, val = _find_folders(Path(root), split._replace(elsewhere=val_root is not None))
    if val_root is not None:
        val = _validation_folder(Path(val_root))
    classes = _class_names(train)
    if val is not None:
        _check_same_classes(train, classes, val, _class_names(val))
    check_classes(classes, f"'{shown(train, 300)}'")
    samples = _samples(train, classes)
    if val is not None:
        return Splits(FolderImages(samples), FolderImages(_samples(val, classes)), tuple(classes))
    labels = [label for _, label in samples]
    parts = split_off(_keys(train, classes, samples), labels, classes, split)
    train_images, val_images = (FolderImages([samples[i] for i in part]) for part in parts)
    return Splits(train_images, val_images, tuple(classes))


def _find_folders(root: Path, split: Split) -> tuple[Path, Path | None]:
    """The training folder, and the validation folder if it is in ``root``."""
    names = _sub_folders(root)
    parts = [name for name in names if name.lower() in PART_NAMES]
    # In car/, bus/, train/ the last one is a class: it holds pictures, and no folder is called val or test.
    is_a_class = len(names) > 1 and len(parts) == 1 and not _sub_folders(root / parts[0])
    if is_a_class and parts[0].lower() in TRAIN_NAMES:
        parts = []
    train, val = find_parts(parts, f"the folder '{shown(root, 300)}'", split)
    return root / (train or ""), None if val is None else root / val


def _validation_folder(root: Path) -> Path:
    """The folder of classes to validate on: ``root``, or its validation part if it holds only parts."""
    names = _sub_folders(root)
    if not names or any(name.lower() not in PART_NAMES for name in names):
        return root
    val = names[0] if len(names) == 1 else find_parts(names, f"the folder '{shown(root, 300)}'", Split())[1]
    return root / (val or "")


def _sub_folders(folder: Path) -> list[str]:
    if folder.is_file():
        raise NotADirectoryError(
            f"'{shown(folder, 300)}' is a file, and data.source=image_folder reads a folder; a CSV file is "
            "data.source=csv, Arrow and Parquet files are data.source=hf"
        )
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder '{shown(folder, 300)}': it must have train/<class>/ and val/<class>/, or <class>/, and images "
            "in them"
        )
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _class_names(split: Path) -> list[str]:
    names = _sub_folders(split)
    if not names:
        raise ValueError(f"{str(split)!r} has no class folders: put its images in {str(split / '<class>')!r}")
    top = split.resolve()
    for name in names:
        if (split / name).resolve() in (top, *top.parents):
            raise ValueError(
                f"the class folder {str(split / name)!r} is a link to a folder that contains it: remove it"
            )
    return names


def _check_same_classes(train: Path, train_classes: list[str], val: Path, val_classes: list[str]) -> None:
    if lacking := sorted(set(train_classes) - set(val_classes)):
        raise ValueError(
            f"{str(val)!r} lacks classes of {str(train)!r}: {list_first(map(repr, lacking))}. Add folders with "
            "validation images for them, or remove them from train"
        )
    if unknown := sorted(set(val_classes) - set(train_classes)):
        raise ValueError(
            f"{str(val)!r} has classes that {str(train)!r} lacks: {list_first(map(repr, unknown))}. Remove them, or "
            "add training images for them"
        )


def _samples(split: Path, classes: Sequence[str]) -> list[tuple[str, Label]]:
    samples: list[tuple[str, Label]] = []
    left_out: Counter[str] = Counter()
    for label, name in enumerate(classes):
        paths = sorted(image_files(split / name, left_out))
        if not paths:
            raise ValueError(
                f"no images in the class folder {str(split / name)!r}: add some, of suffix {', '.join(SUFFIXES)}, or "
                "remove the class from train and val"
            )
        samples += [(path, label) for path in paths]
    if left_out:
        counts = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(left_out.items()))
        warnings.warn(
            f"'{shown(split, 300)}' has pictures of formats that are not read, which are left out: {counts}. Convert "
            "them, for example to JPEG",
            stacklevel=2,
        )
    return samples


def _keys(train: Path, classes: Sequence[str], samples: Sequence[tuple[str, Label]]) -> list[str]:
    """Paths relative to ``train``, the same on every system. pathlib would take ten seconds for ImageNet."""
    lengths = [len(str(train / name)) for name in classes]
    return [
        (classes[label] + path[lengths[label] :]).replace(os.sep, "/")
        for path, label in samples
        if isinstance(label, int)
    ]

"""Divides pictures into those for training and those for validation."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ecanet.untrusted import listed, shown

#: The label of a picture: the index of its class or, if the data is multi-label, the indices of all its classes.
Label: TypeAlias = int | tuple[int, ...]

#: Names of the training part, of the validation part, and of the part that is used for validation if there is none.
TRAIN_NAMES, VAL_NAMES, TEST_NAMES = ("train", "training"), ("val", "validation", "valid"), ("test", "testing")
PART_NAMES = (*TRAIN_NAMES, *VAL_NAMES, *TEST_NAMES)

#: Largest number of classes, and longest name of a class: the limits of a checkpoint.
MAX_CLASSES, MAX_NAME = 100_000, 200


class Splits(NamedTuple):
    """Training and validation images with their classes.

    Attributes:
        train: Map-style dataset with a length: ``train[i]`` is ``(uint8 image (C, H, W), label)``. If the data is
            multi-label, the label is float32 ``(classes,)`` of zeros and ones.
        val: As ``train``.
        classes: Class names; a label is an index into them.
        multi_label: Whether an image may have several labels, or none.
    """

    train: Dataset[Any]
    val: Dataset[Any]
    classes: tuple[str, ...]
    multi_label: bool = False


def target(label: Label, classes: int) -> int | Tensor:
    """A label as the loss takes it: an index, or zeros and ones ``(classes,)``, float32."""
    if isinstance(label, int):
        return label
    values = torch.zeros(classes)
    values[list(label)] = 1
    return values


class Split(NamedTuple):
    """How to find the validation images if the data does not set them apart.

    Attributes:
        fraction: Share of the training images, or None.
        seed: Seed of the choice.
        elsewhere: Whether they are in another place, ``data.val_root``.
    """

    fraction: float | None = None
    seed: int = 0
    elsewhere: bool = False


class TwoValidationPartsError(ValueError):
    """``val_fraction`` is set, but the data already has a validation part."""


def find_parts(names: Iterable[str], where: str, split: Split) -> tuple[str | None, str | None]:
    """Find the training part and the validation part by their names.

    Args:
        names: The names of all parts, in upper or lower case.
        where: What holds the parts, for errors.
        split: How to find the validation images if no part has them.

    Returns:
        The training part's name, or None if there is none, which means all images. The validation part's name, or None
        if ``split`` gives the validation images.

    Raises:
        FileNotFoundError: there is nothing to train on, or nothing to validate on.
        TwoValidationPartsError: there is a validation part, and ``split`` has a fraction, too.
        ValueError: there are several training parts, or several validation parts.
    """
    ordered = sorted(names)
    train, val, test = (
        [name for name in ordered if name.lower() in known] for known in (TRAIN_NAMES, VAL_NAMES, TEST_NAMES)
    )
    if not train and (val or test):
        raise FileNotFoundError(
            f"{where} has {_quoted(val + test)}, but nothing to train on: add train, with the same classes in it"
        )
    if len(train) > 1:
        raise ValueError(f"{where} has {_quoted(train)}, and one is trained on: rename the others")
    if split.elsewhere:
        return next(iter(train), None), None
    if split.fraction is not None:
        if val:
            raise TwoValidationPartsError(
                f"data.val_fraction={split.fraction} splits off images to validate on, and {where} has {_quoted(val)}: "
                "leave data.val_fraction out, or rename that"
            )
        return next(iter(train), None), None
    validation = val or test
    if not validation:
        raise FileNotFoundError(
            f"{where} has no images to validate on: add val ({', '.join((*VAL_NAMES[1:], *TEST_NAMES))} also work), "
            "name another place with data.val_root, or let data.val_fraction=0.1 split off a tenth of each class"
        )
    if len(validation) > 1:
        raise ValueError(f"{where} has {_quoted(validation)}: choose the one to validate on with data.val_root")
    return next(iter(train), None), validation[0]


def split_off(
    keys: Sequence[str], labels: Sequence[Label], classes: Sequence[str], split: Split
) -> tuple[list[int], list[int]]:
    """Split images into a training and a validation part, with the same fraction of each class.

    The images of a class are sorted by a hash of seed and key, and the first ones are for validation: at least one, and
    never all. The split depends on nothing else, neither on the order of the images nor on their folder, and an image
    that is added later moves at most one other image to the other part. An image with several labels counts for its
    rarest one.

    Args:
        keys: A text for each image that does not depend on where the data is, such as its path below the root.
        labels: The labels.
        classes: Class names, for errors.
        split: Fraction and seed.

    Returns:
        The indices of the images to train on, and of those to validate on, both in ascending order.

    Raises:
        ValueError: a class has a single image, or no image could be split off.
    """
    assert split.fraction is not None
    counts = Counter(index for label in labels if not isinstance(label, int) for index in label)
    digests = [hashlib.sha256(f"{split.seed}/".encode() + os.fsencode(key)).digest() for key in keys]
    members: dict[int, list[int]] = defaultdict(list)
    for index in sorted(range(len(keys)), key=digests.__getitem__):
        label = labels[index]
        members[label if isinstance(label, int) else min(label, key=lambda i: (counts[i], i), default=-1)].append(index)
    alone = [classes[group] for group, images in sorted(members.items()) if len(images) == 1]
    if alone and not counts:
        raise ValueError(
            f"data.val_fraction needs two images or more of each class, and there is one of {listed(alone)}"
        )
    val: list[int] = []
    for images in members.values():
        val += images[: min(max(1, round(split.fraction * len(images))), len(images) - 1)]
    if not val:
        raise ValueError("data.val_fraction needs two or more images with the same labels: add some")
    in_val = set(val)
    return [index for index in range(len(keys)) if index not in in_val], sorted(val)


def number_classes(names: Iterable[str]) -> list[str]:
    """Class names in the order of their indices: sorted, by value if all of them are whole numbers."""
    unique = set(names)
    are_numbers = all(name.isascii() and name.isdecimal() for name in unique)
    return sorted(unique, key=lambda name: (int(name), name)) if are_numbers else sorted(unique)


def check_classes(classes: Sequence[str], where: str) -> None:
    """Raise ValueError unless there are two or more classes and a checkpoint can hold them."""
    if len(classes) < 2:
        raise ValueError(f"{where} has one class, {_quoted(classes)}: two or more are needed")
    if len(classes) > MAX_CLASSES:
        raise ValueError(f"{where} has {len(classes):,} classes, such as {listed(classes, 3)}: at most {MAX_CLASSES:,}")
    if long := [name for name in classes if len(name) > MAX_NAME]:
        raise ValueError(f"{where}: the name of the class {shown(long[0])!r} is longer than {MAX_NAME} characters")


def check_validation_labels(labels: Iterable[Label], where: str) -> None:
    """Raise ValueError if no validation image has a label, as there would be nothing to measure."""
    if all(label == () for label in labels):
        raise ValueError(f"no image to validate on in {where} has a label: name others with data.val_root")


def _quoted(names: Iterable[str]) -> str:
    return " and ".join(f"'{shown(name)}'" for name in names)
